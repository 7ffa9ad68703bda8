"""`pst-timm monitor` with what it should not be given: each is one sentence, and nothing is written."""
import json
import os
import shutil
import sys
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pst_timm.cli import main
from pst_timm.review.monitor import HEADER_KEY
from tests.commands.bad_inputs import BadInput, parametrize, refused
from tests.commands.test_bad_data import bomb, file
from tests.review.helpers import make_data, make_source

READ = ('--device', 'cpu')


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    """A model, images and a reference, made once."""
    root = tmp_path_factory.mktemp('ready')
    make_source(root)
    make_data(root / 'data', validation=2)
    assert main(['monitor', 'fit', str(root / 'last.pth.tar'), '--data-dir', str(root / 'data'), '-o',
                 str(root / 'ref.safetensors'), *READ]) == 0
    return root


def fit(*words, data='data'):
    return ['monitor', 'fit', '{ready}/last.pth.tar', '--data-dir', data, '-o', 'new.safetensors', *READ, *words]


def check(*words, reference='{ready}/ref.safetensors', data='{ready}/data'):
    return ['monitor', 'check', reference, '{ready}/last.pth.tar', '--data-dir', data, *READ, *words]


def answers(text=None, name='answers.csv'):
    words = ['monitor', 'check', '{ready}/ref.safetensors', '--answers', name]
    return (words, None if text is None else file(name, text.encode() if isinstance(text, str) else text))


def bad_answers(name, text, culprit):
    words, make = answers(text)
    return BadInput(name, words, culprit, make)


def folders(*names, content=None):
    def make(folder):
        for name in names:
            (folder / 'data' / name).mkdir(parents=True)
            if content is None:
                make_data(folder / 'some', validation=1)
                (folder / 'some/validation/class0/0.png').rename(folder / 'data' / name / '0.png')
                shutil.rmtree(folder / 'some')
            else:
                (folder / 'data' / name / '0.png').write_bytes(content)
    return make


def header(text, folder):
    save_file({'x': np.zeros(3)}, folder / 'x.safetensors', {HEADER_KEY: text})


TABLE = [
    # words
    BadInput('no action', ['monitor'], 'action', code=2),
    BadInput('unknown action', ['monitor', 'chek'], 'Did you mean check?', code=2),
    BadInput('fit without data', ['monitor', 'fit', 'test_resnet_pst'], '--data-dir', code=2),
    BadInput('check without new images', ['monitor', 'check', 'x.safetensors', 'test_resnet_pst'], '--answers', code=2),
    BadInput('both kinds of answers', check('--answers', 'x.csv'), '--answers', code=2),
    BadInput('no model', ['monitor', 'check', 'x.safetensors', '--data-dir', 'data'], 'name the model', code=2),
    BadInput('a model beside answers', ['monitor', 'check', 'x.safetensors', 'test_resnet_pst', '--answers', 'x.csv'],
             'no model is needed', code=2),
    BadInput('labels of a file', ['monitor', 'check', 'x.safetensors', '--answers', 'x.csv', '--labels'], '--labels',
             code=2),
    BadInput('rate of nothing', check('--alpha', '0'), '--alpha', code=2),
    BadInput('rate that is no number', check('--alpha', 'nan'), "'nan'", code=2),
    BadInput('unknown flag', check('--aplha', '0.1'), 'Did you mean --alpha?', code=2),
    # outputs
    BadInput('reference of another ending', fit('-o', 'new.bin'), 'new.bin must be called .safetensors'),
    BadInput('reference that is there', fit('-o', 'there.safetensors'), '--overwrite', file('there.safetensors')),
    BadInput('report of another ending', check('-o', 'report.pdf'), 'report.pdf must be called .json or .html'),
    BadInput('report that is there', check('-o', 'report.json'), '--overwrite', file('report.json')),
    BadInput('second report that is there', check('-o', 'new.json', '-o', 'report.html'), 'report.html', file(
        'report.html')),
    BadInput('report nowhere', check('-o', 'no/report.json'), 'there is no folder no'),
    # data
    BadInput('no data to fit', fit(), 'There is no data'),
    BadInput('no images', fit(), 'has no images', lambda f: (f / 'data').mkdir()),
    BadInput('one image', fit('--no-labels'), 'Two images are the least', folders('class0')),
    BadInput('not one readable image', fit(), 'Not one of the 2 images', folders('a', 'b', content=b'no image')),
    BadInput('bombs', fit(), 'Not one of the 2 images', folders('class0', 'class1', content=bomb())),
    BadInput('folders that are no classes', fit('--labels'), "knows no class 'monday'", folders('monday', 'class1')),
    BadInput('one new image', check(data='data'), 'Two images are the least', folders('class0')),
    BadInput('a broken tar', check(data='x.tar'), 'x.tar', file('x.tar', b'no tar' * 999)),
    # the model
    BadInput('another model', ['monitor', 'check', '{ready}/ref.safetensors', 'test_resnet_pst', '--data-dir',
                               '{ready}/data', *READ], 'monitor fit'),
    BadInput('another size', check('--img-size', '96'), '--img-size'),
    BadInput('missing model', ['monitor', 'check', '{ready}/ref.safetensors', 'no.pth.tar', '--data-dir',
                               '{ready}/data'], 'no.pth.tar'),
    # the reference
    BadInput('missing reference', check(reference='no.safetensors'), 'There is no file no.safetensors'),
    BadInput('reference in a pipe', check(reference='x.safetensors'), 'pipe', lambda f: os.mkfifo(f / 'x.safetensors')),
    BadInput('garbage for a reference', check(reference='x.safetensors'), 'x.safetensors', file(
        'x.safetensors', b'garbage' * 99)),
    BadInput('weights for a reference', check(reference='x.safetensors'), 'is no reference', lambda f: save_file(
        {'x': np.zeros(3)}, f / 'x.safetensors')),
    BadInput('header that is no JSON', check(reference='x.safetensors'), HEADER_KEY, partial(header, '{')),
    BadInput('header nested without end', check(reference='x.safetensors'), 'nested too deeply', partial(
        header, '[' * 100_000)),
    BadInput('header with a key twice', check(reference='x.safetensors'), 'there twice', partial(
        header, '{"images": 2, "images": 3}')),
    BadInput('header that is a list', check(reference='x.safetensors'), 'a mapping', partial(header, '[]')),
    # answers
    BadInput('missing answers', answers()[0], 'There is no file answers.csv'),
    BadInput('answers in a pipe', answers()[0], 'pipe', lambda f: os.mkfifo(f / 'answers.csv')),
    bad_answers('empty answers', '', 'answers.csv is empty'),
    bad_answers('answers without rows', 'confidence,predicted\n', 'has no answers'),
    bad_answers('binary answers', b'\xff\xfe\0', 'not a CSV file'),
    bad_answers('answers without confidence', 'predicted\nclass0\n', "no column 'confidence'"),
    bad_answers('answers cut off', 'confidence,predicted\n0.5\n', 'line 2'),
    bad_answers('confidence in percent', 'confidence,predicted\n0.5,class0\n97,class0\n', "line 3: confidence '97'"),
    bad_answers('confidence that is no number', 'confidence,predicted\nnan,class0\n', "line 2: confidence 'nan'"),
    bad_answers('unknown class', 'confidence,predicted\n0.5,zebra\n', "line 2: predicted 'zebra'"),
    bad_answers('place beyond the classes', 'confidence,predicted\n0.5,3\n', "line 2: predicted '3'"),
    bad_answers('unknown label', 'confidence,predicted,label\n0.5,class0,zebra\n0.5,1,1\n', "line 2: label 'zebra'"),
    bad_answers('one answer', 'confidence,predicted\n0.5,class0\n', 'Two images are the least'),
]


@parametrize(TABLE)
def test_bad_inputs_are_refused(row, ready, tmp_path, monkeypatch, capfd):
    words = [str(word).replace('{ready}', str(ready)) for word in row.words]
    refused(row._replace(words=words), tmp_path, monkeypatch, capfd)
    assert not (tmp_path / 'new.safetensors').exists() and not (tmp_path / 'new.json').exists()


@pytest.mark.parametrize('name, words', [('scipy', ()), ('matplotlib', ('-o', 'report.html'))])
def test_without_a_package_there_is_one_sentence(name, words, ready, tmp_path, monkeypatch, capfd):
    for module in (name, f'{name}.stats'):
        monkeypatch.setitem(sys.modules, module, None)
    words = [word.replace('{ready}', str(ready)) for word in check(*words)]
    row = BadInput(name, words, "pip install 'pst_timm[train]'")
    refused(row, tmp_path, monkeypatch, capfd)
    assert not list(tmp_path.iterdir())


def test_class_names_cannot_steer_the_terminal(ready, tmp_path, capsys):
    reference = tmp_path / 'ref.safetensors'
    from safetensors import safe_open

    with safe_open(ready / 'ref.safetensors', 'np') as opened:
        facts = json.loads(opened.metadata()[HEADER_KEY])
    facts['class_names'] = ['\x1b[2J', 'a', 'b']
    save_file(load_file(ready / 'ref.safetensors'), reference, {HEADER_KEY: json.dumps(facts)})
    (tmp_path / 'answers.csv').write_text('confidence,predicted\n0.5,\x1b[2Jx\n')
    assert main(['monitor', 'check', str(reference), '--answers', str(tmp_path / 'answers.csv')]) == 1
    assert '\x1b' not in capsys.readouterr().err

"""Predictions against the model run by hand, and what people and programs are told of them."""
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config

from pst_timm.checkpoints import load_model, readable_names
from pst_timm.cli import main
from pst_timm.data.samples import Samples
from pst_timm.review.answers import open_loose, open_subject
from pst_timm.review.predict import (
    Prediction,
    calibration_note,
    heading,
    listed_paths,
    most_probable,
    predict,
    render,
)
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import ROOT, script_env
from tests.review.helpers import CLASSES, make_data, make_source

# what a terminal, a spreadsheet or a reader of lines might take for something else
NASTY = ['a,b "c".png', 'new\nline.png', 'back\rreturn.png', 'turn\u202eback.png', 'red\x1b[31m.png', '=1+1.png',
         "it's ü.png"]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp('predict')
    return make_source(root), make_data(root / 'data', validation=3) / 'validation'


def by_hand(source, path, temperature=1.):
    model = load_model(source)
    x = create_transform(**resolve_data_config({}, model=model))(Image.open(path).convert('RGB'))[None]
    with torch.inference_mode():
        return (model(x)[0].double() / temperature).softmax(dim=0)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline='')))


@pytest.mark.parametrize('temperature, batch_size', [(1., 2), (2.5, 100)])
def test_probabilities_are_those_of_the_model_by_hand(place, temperature, batch_size):
    source, data = place
    subject = open_subject(str(source), device='cpu')
    batches = list(predict(subject, open_loose(subject, [data]), 2, temperature, batch_size))
    assert [len(batch) for batch in batches] == ([2, 2, 2, 2, 1] if batch_size == 2 else [9])
    got = [prediction for batch in batches for prediction in batch]
    assert [p.name for p in got] == [str(path) for path in sorted(data.rglob('*.png'))]
    for prediction in got:
        expected = by_hand(source, prediction.name, temperature)
        best = expected.argsort(descending=True)[:2]
        assert prediction.classes == best.tolist()
        assert prediction.probabilities == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_equal_classes_come_in_their_order():
    (classes, probabilities), = most_probable(np.array([[1., 3., 1., 3.]], np.float32), 3)
    assert classes == [1, 3, 0] and probabilities[0] == probabilities[1] > probabilities[2]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=8), st.floats(0.1, 10), st.integers(1, 9))
def test_the_most_probable_classes_are_sorted_and_true(logits, temperature, top):
    (classes, probabilities), = most_probable(np.array([logits], np.float32), top, temperature)
    assert len(set(classes)) == len(classes) == min(top, len(logits))
    weights = [np.exp((x - max(logits)) / temperature) for x in logits]
    assert probabilities == pytest.approx([weights[i] / sum(weights) for i in classes], rel=1e-6, abs=1e-12)
    assert probabilities == sorted(probabilities, reverse=True)
    if top >= len(logits):
        assert sum(probabilities) == pytest.approx(1)


def test_broken_images_keep_their_places(place, tmp_path, caplog):
    source, data = place
    good = sorted(data.rglob('*.png'))[:2]
    (tmp_path / 'b.png').write_bytes(b'no image')
    (tmp_path / 'pipe').symlink_to('/dev/zero')
    paths = [tmp_path / 'gone.png', good[0], tmp_path / 'b.png', good[1], good[1], tmp_path / 'pipe']
    subject = open_subject(str(source), device='cpu')
    for batch_size in (1, 4, 9):
        got = [p for batch in predict(subject, open_loose(subject, paths), 1, batch_size=batch_size) for p in batch]
        assert [p.name for p in got] == [str(path) for path in paths]
        assert [bool(p.reason) for p in got] == [True, False, True, False, False, True]
        assert got[0].reason == 'there is no such file' and 'identify' in got[2].reason
    assert 'b.png (cannot identify image file)' in caplog.text
    with pytest.raises(PSTError, match=r'Not one of 1 images could be read, such as .*b.png: cannot identify'):
        list(predict(subject, open_loose(subject, paths[2:3])))


# what is told

ONE = Prediction('photos/a.jpg', [1, 0], [0.9312, 0.0688])


def test_the_table_for_people():
    assert render([ONE], 'table', CLASSES, 2) == (
        'photos/a.jpg\n   93.1%  ██████████████████▋   class1\n    6.9%  █▍                    class0\n\n')
    assert render([ONE._replace(classes=[1], probabilities=[0.9312])], 'table', ('x', 'dog', 'a cat'), 1) == (
        '   93.1%  dog    photos/a.jpg\n')
    assert render([Prediction('b.jpg', reason='broken')], 'table', CLASSES, 2) == ''
    assert render([ONE], 'table', CLASSES, 2, '#').splitlines()[1] == '   93.1%  ###################   class1'


@pytest.mark.parametrize('share, shown', [
    (1., '> 99.9%'), (0.9996, '> 99.9%'), (0.9994, '99.9%'), (0.05, '5.0%'), (0.0006, '0.1%'), (1e-9, '< 0.1%')])
def test_nothing_is_certain(share, shown):
    line = render([Prediction('a', [0], [share])], 'table', ['x'], 1)
    assert line.strip().startswith(f'{shown}  x') and line.index('%') == 7


@pytest.mark.parametrize('name', NASTY)
def test_nasty_names_are_exact_for_programs_and_harmless_for_people(name):
    nasty = Prediction(name, [1, 0], [0.75, 0.25])
    for top in (1, 2):
        shown = nasty._replace(classes=[1, 0][:top], probabilities=[0.75, 0.25][:top])
        table = render([shown], 'table', [name, name], top)
        assert all(line.isprintable() for line in table.split('\n')) and '\u202e' not in table
        assert len(table.splitlines()) == (1 if top == 1 else 4)
    line = render([nasty], 'jsonl', ['x', name], 2)
    assert line.isascii() and len(line.splitlines()) == 1
    assert json.loads(line) == {'image': name, 'predictions': [
        {'class': name, 'index': 1, 'probability': 0.75}, {'class': 'x', 'index': 0, 'probability': 0.25}]}
    broken = Prediction(name, reason=f'no {name}')
    rows = rows_of(heading('csv', 2) + render([nasty, broken, ONE], 'csv', ['x', name], 2))
    assert rows[0] == dict(
        image=name, class1=name, probability1='0.750000', class2='x', probability2='0.250000', error='')
    assert rows[1] == dict(image=name, class1='', probability1='', class2='', probability2='', error=f'no {name}')
    assert rows[2]['image'] == ONE.name and len(rows) == 3
    assert json.loads(render([broken], 'jsonl', ['x'], 1)) == {'image': name, 'error': f'no {name}'}


@pytest.mark.parametrize('names, cfg, shown', [
    (['n02056570', 'cat'], {}, ['king penguin', 'cat']),
    (['n02056570', 'cat'], {'label_descriptions': {'cat': 'a cat', 'n02056570': 'mine'}}, ['mine', 'a cat']),
    (['n02056570'], {'label_descriptions': {'n02056570': 'king penguin, Aptenodytes patagonica'}}, ['king penguin']),
    (['n03126707', 'n02012849'], {}, ['crane (n03126707)', 'crane (n02012849)']),  # for loads, and the bird
    (['n99999999', 'king penguin'], {}, ['n99999999', 'king penguin']),
])
def test_people_read_words(place, names, cfg, shown):
    model_cfg = open_subject(str(place[0]), device='cpu').model.pretrained_cfg
    assert readable_names(names, {**model_cfg, **cfg}) == shown


def test_timms_own_models_of_imagenet_are_readable(place):
    cfg = open_subject(str(place[0]), device='cpu').model.pretrained_cfg
    made_up = [f'class {i}' for i in range(1000)]
    names = readable_names(made_up, {**cfg, 'num_classes': 1000, 'hf_hub_id': 'timm/resnet18.a1_in1k'}, known=False)
    assert names[145] == 'king penguin' and len(set(names)) == 1000
    # a thousand classes of somebody's own
    assert readable_names(made_up, {**cfg, 'num_classes': 1000, 'hf_hub_id': 'acme/mine'}, known=False) == made_up


def test_what_probabilities_are_is_said(place):
    subject = open_subject(str(place[0]), device='cpu')
    assert 'not calibrated (to mend that: pst-timm monitor recalibrate' in calibration_note(subject)
    assert calibration_note(subject, 2) == 'probabilities at temperature 2, as asked for'
    subject.model.pretrained_cfg['temperature'] = 1.31
    assert calibration_note(subject) == 'calibrated probabilities (T = 1.31)'
    assert 'of a calibrated model (T = 1.31) at temperature 2' in calibration_note(subject, 2)


@pytest.mark.parametrize('content, paths', [
    (b'a\nb c \n\n\r\nd\r\ne', ['a', 'b c ', 'd', 'e']), (b'', []), (b'\xef\xbb\xbfa\n', ['a']),
    (b'\xff\n', ['\udcff'])])
def test_lists_are_read_as_the_system_has_names(content, paths):
    assert list(listed_paths(io.BytesIO(content), 'the list')) == paths


@pytest.mark.parametrize('content', [b'a' * (1 << 17), b'a\nb\0c\n', bytes(1 << 20)])
def test_what_is_no_list_is_refused(content):
    with pytest.raises(PSTError, match='the list is not a list of images'):
        list(listed_paths(io.BytesIO(content), 'the list'))


# the command

def test_names_that_are_no_text_come_out_as_they_are(place, tmp_path, monkeypatch, capsys):
    source, data = place
    image = next(data.rglob('*.png')).read_bytes()
    names = [os.fsencode(tmp_path) + b'/\xff\xfe.png', os.fsencode(tmp_path / 'ü.png')]
    for name in names:
        Path(os.fsdecode(name)).write_bytes(image)
    result = subprocess.run(
        [sys.executable, '-m', 'pst_timm', 'predict', source, '--list', '-', '--top', '1', '--device', 'cpu'], cwd=ROOT,
        env=script_env(), capture_output=True, timeout=300, input=b'\n'.join(names))
    lines, err = result.stdout.split(b'\n'), result.stderr.decode()  # csv, since it is no terminal
    assert lines[0] == b'image,class1,probability1,error' and len(lines) == 4
    assert [line.split(b',')[0] for line in lines[1:3]] == names
    assert 'test_resnet_pst: 3 classes, 2 images at 64 px, probabilities not calibrated' in err and err.count('\n') == 1
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(names[0])))
    assert main(['predict', str(source), '--list', '-', '--format', 'jsonl', '--device', 'cpu']) == 0
    assert os.fsencode(json.loads(capsys.readouterr().out)['image']) == names[0]


def test_a_reader_that_leaves_ends_it_in_silence(place):
    source, data = place
    words = ' '.join(f'"{word}"' for word in (
        sys.executable, '-m', 'pst_timm', 'predict', source, *[data] * 50, '-b', 1, '--device', 'cpu'))
    result = subprocess.run(
        ['bash', '-c', f'{words} | head -n 2; exit ${{PIPESTATUS[0]}}'], cwd=ROOT, env=script_env(),
        capture_output=True, text=True, timeout=300)
    assert len(result.stdout.splitlines()) == 2 and result.returncode == 141
    assert result.stderr.count('\n') == 1  # what model it is


@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'txt'])
def test_files_hold_what_is_printed(place, ending, tmp_path, capsys, monkeypatch):
    source, data = place
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'noise.jpg').write_bytes(b'noise')
    words = ['predict', str(source), str(data), 'noise.jpg', '--top', '9', '--device', 'cpu', '-b', '4']
    assert main([*words, '-o', f'out.{ending}']) == 0
    out, err = capsys.readouterr()
    assert not out and f'Written: out.{ending}' in err and 'noise.jpg' in err
    assert main([*words, '--format', {'txt': 'table'}.get(ending, ending)]) == 0
    written = (tmp_path / f'out.{ending}').read_text()
    assert capsys.readouterr().out == written
    if ending == 'csv':
        rows = rows_of(written)
        assert len(rows) == 10 and list(rows[0])[-3:] == ['class3', 'probability3', 'error']
        assert sum(float(rows[0][f'probability{k}']) for k in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
        assert rows[9]['error'] == 'cannot identify image file' and rows[9]['class1'] == ''
    assert main([*words, '-o', f'out.{ending}']) == 1  # there already
    assert 'add --overwrite' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['noise.jpg', f'out.{ending}'])


def test_flags_may_stand_anywhere(place, capsys):
    source, data = place
    first, second = map(str, sorted(data.rglob('*.png'))[:2])
    for words in ([str(source), '--top', '1', first, second], ['--top', '1', str(source), first, '-b', '1', second]):
        assert main(['predict', *words, '--device', 'cpu', '--format', 'csv']) == 0
        assert [row['image'] for row in rows_of(capsys.readouterr().out)] == [first, second]


def test_nothing_read_is_nothing_written(place, tmp_path, capsys):
    (tmp_path / 'noise.jpg').write_bytes(b'noise')
    words = ['predict', str(place[0]), str(tmp_path / 'noise.jpg'), '--device', 'cpu']
    assert main([*words, '-o', str(tmp_path / 'out.csv')]) == 1
    assert 'Not one of 1 images could be read' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['noise.jpg']
    assert main([*words, '--format', 'csv']) == 1
    assert rows_of(capsys.readouterr().out)[0]['error'] == 'cannot identify image file'


def test_no_batch_is_kept(place, monkeypatch):
    """An answer is taken in, told and forgotten before the next one is asked for."""
    source, data = place
    told = []
    monkeypatch.setattr('pst_timm.review.predict.render', lambda batch, *args: told.append(len(batch)) or '')
    seen, read = [], Samples.__getitem__

    def counted(self, index):
        seen.append((index, len(told)))
        return read(self, index)

    monkeypatch.setattr(Samples, '__getitem__', counted)
    assert main(['predict', str(source), str(data), '-b', '2', '--device', 'cpu']) == 0
    assert [before for _, before in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_a_model_without_names_counts_its_classes(tmp_path, place, capsys):
    source = make_source(tmp_path, names=None)
    image = str(next(place[1].rglob('*.png')))
    assert main(['predict', str(source), image, '--device', 'cpu', '--format', 'jsonl']) == 0
    found = json.loads(capsys.readouterr().out)['predictions']
    assert [row['class'] for row in found] == [f'class {row["index"]}' for row in found] and len(found) == 3

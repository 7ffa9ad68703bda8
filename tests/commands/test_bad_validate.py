"""What `pst-timm validate` refuses, in one sentence that names the culprit."""
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from pst_timm.cli import main

from .bad_inputs import BadInput, parametrize, refused

WORDS = 'validate --data-dir images --img-size 48 -b 8 -j 0 --device cpu'.split()
FILE = [*WORDS, '--model', 'test_resnet_pst', '--checkpoint']


def bad(name, flags, culprit, make=None, code=1):
    """A row: flags that are added to an evaluation of good weights."""
    return BadInput(name, [*FILE, 'good.safetensors', *flags.split(' ')], culprit, make, code)


def checkpoint(name, source, culprit, make=None, more=''):
    """A row: another checkpoint."""
    return BadInput(name, [*FILE, source, *more.split()], culprit, make)


def named(name, flags, culprit, code=1):
    """A row: a model by name, without a checkpoint."""
    return BadInput(name, [*WORDS, *flags.split(' ')], culprit, None, code)


def write(name, content):
    def make(folder: Path):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return make


def weights(change):
    def make(folder: Path):
        torch.save(change(timm.create_model('test_resnet_pst', num_classes=3).state_dict()), folder / 'bad.pth')
    return make


def one_good_one_bad(folder: Path):
    (folder / 'some').mkdir()
    (folder / 'some' / 'bad.pth').write_bytes(b'no checkpoint')
    (folder / 'some' / 'good.safetensors').write_bytes((folder / 'good.safetensors').read_bytes())


def folder_of_notes(folder: Path):
    (folder / 'notes').mkdir()
    (folder / 'notes' / 'read.me').write_text('mine')


LABELS = '--valid-labels labels.txt'

TABLE = [
    # results over what is no result
    *(bad(f'results-over-{name}', f'--results-file {name}', 'no results', write(name, content)) for name, content in (
        ('notes.txt', 'mine'), ('last.pth.tar', b'PK\0\0weights'), ('config.yaml', 'model: resnet50\n'))),
    bad('labels-without-end', '--valid-labels /dev/zero', '--valid-labels'),
    # weights
    checkpoint('weights-missing', 'nowhere.pth', 'nowhere.pth'),
    checkpoint('weights-empty', 'bad.pth', 'bad.pth', weights(lambda state: {})),
    checkpoint('weights-prefixed', 'bad.pth', 'bad.pth', weights(
        lambda state: {f'net.{k}': v for k, v in state.items()})),
    checkpoint('weights-wrapped', 'bad.pth', 'bad.pth', weights(lambda state: {'net': {'weights': state}})),
    checkpoint('weights-half', 'bad.pth', 'bad.pth', weights(lambda state: dict(list(state.items())[:50]))),
    checkpoint('weights-nan', 'bad.pth', 'NaN', weights(
        lambda state: {k: v * float('nan') if v.is_floating_point() else v for k, v in state.items()})),
    checkpoint('statistics-infinite', 'bad.pth', 'running_var', weights(
        lambda state: {k: v / 0 if k.endswith('running_var') else v for k, v in state.items()})),
    checkpoint('weights-too-large', 'bad.pth', 'the loss is', weights(
        lambda state: {k: v * 1e30 if v.is_floating_point() else v for k, v in state.items()})),
    checkpoint('json-for-weights', 'bad.json', 'bad.json', write('bad.json', '{}')),
    checkpoint('text-for-weights', 'bad.txt', 'bad.txt', write('bad.txt', 'x')),
    checkpoint('garbage-for-weights', 'bad.pth', 'bad.pth', write('bad.pth', b'\x80\x04garbage')),
    checkpoint('device-for-weights', '/dev/null', '/dev/null'),
    checkpoint('address-for-weights', 'http://localhost/x.pth', 'x.pth'),
    checkpoint('folder-without-weights', 'notes', 'notes', folder_of_notes),
    checkpoint('folder-with-one-bad', 'some', '1 of 2 evaluations failed, of some/bad.pth', one_good_one_bad),
    checkpoint('weights-of-another', 'good.safetensors', 'good.safetensors', more='--model test_resnet'),
    bad('classes-of-others', '--num-classes 7', 'has 3 classes, not 7'),
    bad('channels-of-others', '--in-chans 1', 'good.safetensors'),
    bad('channels-twice', '--input-size 1 48 48 --in-chans 3', '--in-chans 3'),
    bad('average-that-is-not-there', '--use-ema', '--use-ema'),
    # models by name
    named('nothing', '--split validation', 'Nothing to evaluate'),
    named('model-unknown', '--model test_resnet_ps', 'test_resnet_pst'),
    named('model-pattern', '--model test_resnet*', "'test_resnet*'"),
    named('model-tag', '--model test_resnet.r160_in2k', 'test_resnet.r160_in1k'),
    named('model-without-weights', '--model resnet34_pst', 'resnet34_pst'),
    named('model-empty', '--model ,', '--model'),
    named('models-one-unknown', '--model test_resnet_pst,bogus', 'bogus'),
    named('average-of-a-name', '--model test_resnet_pst --use-ema', '--use-ema'),
    named('classes-of-a-name', '--model test_resnet_pst --num-classes 3', '10 classes'),
    named('size-of-a-vit', '--model test_vit', 'test_vit', 75),
    # labels
    bad('labels-missing', LABELS, 'labels.txt'),
    bad('labels-words', LABELS, 'labels.txt', write('labels.txt', 'cat dog')),
    bad('labels-bytes', LABELS, 'labels.txt', write('labels.txt', b'\xff\xfe\x00')),
    bad('labels-none', LABELS, 'labels.txt', write('labels.txt', '\n')),
    bad('labels-beyond', LABELS, 'no class 99', write('labels.txt', '0 1 99')),
    bad('labels-negative', LABELS, 'no class -1', write('labels.txt', '-1 0 1')),
    bad('labels-twice', LABELS, 'twice', write('labels.txt', '0 0 1')),
    bad('labels-too-few', LABELS, '3 classes', write('labels.txt', '0 1')),
    bad('real-labels-missing', '--real-labels real.json', 'real.json'),
    bad('real-labels-torn', '--real-labels real.json', 'real.json', write('real.json', '[[1], [')),
    bad('real-labels-of-others', '--real-labels real.json', '--real-labels', write('real.json', '[[1], [2]]')),
    # preprocessing
    bad('border', '--crop-border-pixels 16', '--crop-border-pixels 16'),
    bad('border-negative', '--crop-border-pixels -1', '--crop-border-pixels'),
    bad('sizes', '--img-size 48 64', "'64'"),
    bad('size-zero', '--img-size 0', '--img-size'),
    bad('size-absurd', '--img-size 1000000', '--img-size'),
    bad('input-size-short', '--input-size 3 48', '--input-size'),
    bad('interpolation', '--interpolation bicubical', "'bicubical'"),
    bad('crop', '--crop-pct 0', '--crop-pct'),
    bad('mean-infinite', '--mean inf', '--mean'),
    # the machine
    bad('seed', '--seed 99999999999', '--seed'),
    bad('device', '--device gpu', '--device gpu'),
    bad('gpus', '--num-gpu 64', '--num-gpu 64'),
    bad('compile-backend', '--torchcompile inductr', "'inductr'"),
    bad('compile-mode-of-another', '--torchcompile eager --torchcompile-mode default', '--torchcompile-mode'),
    bad('compile-twice', '--torchcompile eager --aot-autograd', '--aot-autograd'),
    bad('half-twice', '--amp --model-dtype bfloat16', '--amp'),
    bad('module-missing', '--device-modules no_such_package', 'no_such_package'),
    # metrics and the model's arguments
    bad('sweep-negative', '--topk-sweep -1', '--topk-sweep'),
    bad('sweep-twice', '--topk-sweep 2 2', '--topk-sweep'),
    bad('sweep-scripted', '--topk-sweep 2 --torchscript', '--torchscript'),
    bad('kwargs-form', '--model-kwargs topk', "'topk'"),
    bad('kwargs-unknown', '--model-kwargs topkk=2', 'topkk=2'),
    bad('kwargs-type', '--model-kwargs topk=2 pst_depth=deep', "pst_depth='deep'"),
    bad('pooling', '--gp average', 'average'),
    # results
    bad('results-nowhere', '--results-file missing/r.csv', 'missing'),
    bad('results-is-a-folder', '--results-file images', 'images'),
    bad('results-over-the-weights', '--results-file good.safetensors', 'good.safetensors'),
    bad('results-format', '--results-format xml', '--results-format'),
]


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('good') / 'good.safetensors'
    save_file(timm.create_model('test_resnet_pst', num_classes=3).state_dict(), path)
    return path


@parametrize(TABLE)
def test_validate_refuses(row, tmp_path, images, good, monkeypatch, capfd):
    monkeypatch.setattr('pst_timm.checkpoints.fetching.HF_HUB_OFFLINE', True)
    (tmp_path / 'images').symlink_to(images)
    (tmp_path / 'good.safetensors').write_bytes(good.read_bytes())
    refused(row, tmp_path, monkeypatch, capfd)


def test_what_can_be_evaluated_is_shown_beside_what_cannot(tmp_path, images, good, monkeypatch, capfd):
    (tmp_path / 'images').symlink_to(images)
    (tmp_path / 'good.safetensors').write_bytes(good.read_bytes())
    monkeypatch.chdir(tmp_path)
    one_good_one_bad(tmp_path)
    assert main([*FILE, 'some', '--results-file', 'r.json', '--results-format', 'json']) == 1
    told = capfd.readouterr().out.split('--result\n')[1]
    for rows in (json.loads(told), json.loads((tmp_path / 'r.json').read_text())):
        assert [Path(row['checkpoint']).name for row in rows] == ['good.safetensors', 'bad.pth']
        assert rows[0]['top1'] >= 0 and 'cannot be read' in rows[1]['error']

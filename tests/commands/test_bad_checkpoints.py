"""Checkpoints that are damaged, of something else, or say what cannot be: one sentence, and nothing changed on disk."""
import json
import os
import pickle
import zipfile
from functools import lru_cache, partial

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.helpers import Payload, build, run_args
from tests.engine.helpers import write_images

from .bad_inputs import BadInput, parametrize, refused

CONVERT = ('convert', 'bad.pth', 'out.safetensors')
HEADER = ('convert', 'bad.safetensors', 'out.pth')
FOLDER = ('convert', 'bad', 'out.pth')
PUBLISH = ('publish', 'bad.pth', '--repo-id', 'acme/tiny', '--dry-run', '--folder', 'out')
EXPORT = ('export', 'bad.pth', '--format', 'torchscript', '--output', 'out.pt')
VISUALIZE = ('visualize', 'data/train/class0/0.png', '--checkpoint', 'bad.pth', '--output', 'out.png')
VALIDATE = ('validate', '--data-dir', 'data', '--checkpoint', 'bad.pth', '--workers', '0', '--device', 'cpu')
TRAIN = ('train', '--data-dir', 'data', '--model', 'test_resnet_pst', '--num-classes', '3', '--img-size', '48',
         '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '3', '--workers', '0', '--device', 'cpu')


@lru_cache
def weights():
    return build().state_dict()


def save(content, folder):
    torch.save(content() if callable(content) else content, folder / 'bad.pth')


def content(**entries):
    """What a run leaves, with some entries changed."""
    return {
        'arch': 'test_resnet_pst', 'state_dict': weights(), 'epoch': 1, 'metric': 71.5, 'args': run_args(), **entries}


def run(**entries):
    """Writes the checkpoint of a run, with some entries changed."""
    return partial(save, lambda: content(**{k: v() if callable(v) else v for k, v in entries.items()}))


def facts(**entries):
    return run(facts=lambda: {'arch': 'test_resnet_pst', **entries})


def args(**values):
    return run(args=lambda: run_args(**values))


def changed(**tensors):
    """Writes the checkpoint of a run whose weights differ: by name, with '.' written as '__'."""
    return run(state_dict=lambda: {**weights(), **{k.replace('__', '.'): v for k, v in tensors.items()}})


def whole(write):
    """Writes a checkpoint, and changes its bytes."""
    def make(folder):
        run()(folder)
        path = folder / 'bad.pth'
        path.write_bytes(write(path.read_bytes()))
    return make


def flipped(data):
    """A bit of the largest tensor is another one."""
    at = data.index(b'data/') + len(data) // 2
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1:]


def compressed(folder):
    run()(folder)
    with zipfile.ZipFile(folder / 'bad.pth') as old:
        with zipfile.ZipFile(folder / 'new', 'w', zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    os.replace(folder / 'new', folder / 'bad.pth')


def endless(folder):
    """A mapping whose key is a tuple of the same tuple twice, which is one of another twice, and so on."""
    pairs = b''.join(b'h%c\x86q%c' % (i, i + 1) for i in range(60))
    with zipfile.ZipFile(folder / 'bad.pth', 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02}K\x01q\x00' + pairs + b'K\x01s.')
        archive.writestr('archive/version', b'3\n')


def payload(folder):
    save({'state_dict': {'fc.weight': Payload(folder / 'executed')}}, folder)


def bare_payload(folder):
    (folder / 'bad.pth').write_bytes(pickle.dumps(Payload(folder / 'executed'), protocol=2))


def header(text):
    def make(folder):
        entry = text if isinstance(text, str) else json.dumps(text)
        save_file(weights(), folder / 'bad.safetensors', {'pst_timm': entry})
    return make


def config(text):
    def make(folder):
        (folder / 'bad').mkdir()
        save_file(weights(), folder / 'bad' / 'model.safetensors')
        known = {'architecture': 'test_resnet_pst', 'num_classes': 3, 'pretrained_cfg': {'num_classes': 3}}
        data = text if isinstance(text, bytes) else json.dumps({**known, **text}).encode()
        (folder / 'bad' / 'config.json').write_bytes(data)
    return make


def expanded():
    return torch.zeros(1).expand(10 ** 12)


def prefixed():
    return {**weights(), **{f'module.{k}': v for k, v in weights().items()}}


TABLE = [
    # files that are none
    BadInput('missing', CONVERT, 'There is no checkpoint bad.pth'),
    BadInput('empty', CONVERT, 'bad.pth', whole(lambda data: b'')),
    BadInput('truncated', CONVERT, 'truncated', whole(lambda data: data[:len(data) // 2])),
    BadInput('cut at the end', PUBLISH, 'truncated', whole(lambda data: data[:-10])),
    BadInput('a bit has changed', CONVERT, 'checksum', whole(flipped)),
    BadInput('a bit has changed, exported', EXPORT, 'checksum', whole(flipped)),
    BadInput('a bit has changed, drawn', VISUALIZE, 'checksum', whole(flipped)),
    BadInput('a bit has changed, validated', VALIDATE, 'checksum', whole(flipped)),
    BadInput('a bit has changed, trained on', (*TRAIN, '--initial-checkpoint', 'bad.pth'), 'checksum', whole(flipped)),
    BadInput('a bit has changed, as a trunk', (*TRAIN, '--trunk-checkpoint', 'bad.pth'), 'checksum', whole(flipped)),
    BadInput('zeros', CONVERT, 'not a checkpoint', whole(lambda data: bytes(len(data)))),
    BadInput('compressed', CONVERT, 'compressed', compressed),
    BadInput('a key without end', CONVERT, 'tuples within tuples', endless),
    BadInput('a key without end, drawn', VISUALIZE, 'tuples within tuples', endless),
    BadInput('a pipe', CONVERT, 'not an ordinary file', lambda folder: os.mkfifo(folder / 'bad.pth')),
    BadInput('a pipe, validated', VALIDATE, 'not an ordinary file', lambda folder: os.mkfifo(folder / 'bad.pth')),
    BadInput('a device', PUBLISH, 'not an ordinary file', lambda folder: os.symlink('/dev/zero', folder / 'bad.pth')),
    BadInput('a broken link', CONVERT, 'bad.pth', lambda folder: os.symlink('nowhere', folder / 'bad.pth')),
    BadInput('a folder of that name', CONVERT, 'has neither', lambda folder: (folder / 'bad.pth').mkdir()),
    BadInput('code', CONVERT, 'could run code', payload),
    BadInput('code alone', PUBLISH, 'could run code', bare_payload),
    BadInput('code, drawn', VISUALIZE, 'could run code', payload),
    BadInput('code, trained on', (*TRAIN, '--initial-checkpoint', 'bad.pth'), 'could run code', payload),
    BadInput('noise as safetensors', HEADER, 'bad.safetensors', lambda folder: (
        folder / 'bad.safetensors').write_bytes(b'noise' * 99)),
    # weights that are none, or of something else
    BadInput('a list', CONVERT, 'holds a list', partial(save, [1, 2])),
    BadInput('no weights', CONVERT, 'holds no weights', run(state_dict=dict)),
    BadInput('no weights, validated', VALIDATE, 'holds no weights', run(state_dict=dict)),
    BadInput('numbers as names', EXPORT, 'holds no weights',
             run(state_dict=lambda: dict(enumerate(weights().values())))),
    BadInput('numbers as weights', CONVERT, 'holds no weights', run(state_dict=lambda: dict.fromkeys(weights(), 1.))),
    BadInput('NaN', VALIDATE, 'NaN or infinite', changed(fc__bias=torch.full((3,), torch.nan))),
    BadInput('infinite', EXPORT, 'NaN or infinite', changed(fc__bias=torch.tensor([0., 1., -torch.inf]))),
    BadInput('NaN, trained on', (*TRAIN, '--initial-checkpoint', 'bad.pth'), 'fc.bias',
             changed(fc__bias=torch.full((3,), torch.nan))),
    BadInput('complex', CONVERT, 'fc.bias', changed(fc__bias=torch.zeros(3, dtype=torch.complex64))),
    BadInput('whole numbers', VALIDATE, 'torch.int8', changed(fc__weight=torch.zeros(3, 128, dtype=torch.int8))),
    BadInput('whole numbers, as a trunk', (*TRAIN, '--trunk-checkpoint', 'bad.pth'), 'torch.int8',
             changed(conv1__0__weight=torch.zeros(16, 3, 3, 3, dtype=torch.int8))),
    BadInput('sparse', CONVERT, 'fc.bias', changed(fc__bias=torch.zeros(3).to_sparse())),
    BadInput('without memory', CONVERT, 'fc.bias', changed(fc__bias=torch.zeros(3, device='meta'))),
    BadInput('larger than the file', CONVERT, 'fc.bias', run(state_dict=lambda: {**weights(), 'fc.bias': expanded()})),
    BadInput('the same name twice', CONVERT, 'same names twice', run(state_dict=prefixed)),
    BadInput('a scalar as a classifier', CONVERT, 'fc.weight', changed(fc__weight=torch.zeros(()))),
    BadInput('another shape', VISUALIZE, 'fc.bias', changed(fc__bias=torch.zeros(4))),
    BadInput('another number of classes', (*VALIDATE, '--num-classes', '5'), 'has 3 classes, not 5', run()),
    BadInput('another architecture', (*VALIDATE, '--model', 'resnet18_pst'), 'not a checkpoint of resnet18_pst', run()),
    BadInput('no average', (*CONVERT, '--use-ema'), 'holds no moving average', run()),
    # what they say of themselves
    BadInput('no architecture', CONVERT, 'does not name a known architecture', run(arch=None)),
    BadInput('an unknown architecture', CONVERT, 'resnt', run(arch='resnt')),
    BadInput('an architecture on the Hub', PUBLISH, 'hf-hub:evil/model', run(arch='hf-hub:evil/model')),
    BadInput('an architecture in a folder', EXPORT, 'local-dir:.', run(arch='local-dir:.')),
    BadInput('architecture', CONVERT, 'arch', run(arch=lambda: [1, 2])),
    BadInput('epoch', CONVERT, "epoch: expected a whole number", run(epoch='three')),
    BadInput('epoch as a tensor', PUBLISH, 'epoch', run(epoch=lambda: torch.zeros(2))),
    BadInput('metric', PUBLISH, 'metric', run(metric='good')),
    BadInput('arguments as a list', CONVERT, 'args', run(args=lambda: ['--lr'])),
    BadInput('facts as a list', VALIDATE, 'garbled', run(facts=lambda: [1])),
    BadInput('facts of another kind', VALIDATE, 'colour', facts(colour='red')),
    BadInput('facts within themselves', CONVERT, 'nested', facts(recipe={'x': json.loads('[' * 50 + ']' * 50)})),
    BadInput('an input of a million pixels', CONVERT, 'input_size',
             facts(pretrained_cfg={'input_size': [3, 10 ** 6, 8]})),
    BadInput('an input of one side', EXPORT, 'input_size', facts(pretrained_cfg={'input_size': 64})),
    BadInput('no deviation', VISUALIZE, 'std', facts(pretrained_cfg={'std': [0., 0., 0.]})),
    BadInput('class names', PUBLISH, 'label_names', facts(pretrained_cfg={'label_names': 7})),
    BadInput('an interpolation', VALIDATE, 'interpolation', args(interpolation='sharp')),
    BadInput('a crop', VALIDATE, 'crop_pct', args(crop_pct=1e-9)),
    BadInput('another number of means', VALIDATE, 'do not fit its weights', args(mean=[0.5, 0.5])),
    BadInput('an image size', CONVERT, 'img_size', args(img_size=10 ** 9)),
    BadInput('model arguments as text', CONVERT, 'model_kwargs', args(model_kwargs='topk=1')),
    BadInput('a million blocks', CONVERT, 'pst_depth', args(model_kwargs={'pst_depth': 10 ** 6})),
    BadInput('a billion classes', PUBLISH, 'num_classes', args(model_kwargs={'num_classes': 10 ** 9})),
    BadInput('a cache', EXPORT, 'cache_dir', args(model_kwargs={'cache_dir': 'out'})),
    BadInput('a file', VISUALIZE, 'checkpoint_path', args(model_kwargs={'checkpoint_path': 'out'})),
    BadInput('published weights', VALIDATE, 'pretrained', args(model_kwargs={'pretrained': True})),
    BadInput('arguments that do not go together', CONVERT, 'Cannot create', args(model_kwargs={'pst_head_dim': 7})),
    BadInput('a division by zero', CONVERT, 'bad.pth', args(model_kwargs={'pst_head_dim': 0})),
    BadInput('a header that is no JSON', HEADER, 'pst_timm', header('{')),
    BadInput('a header within itself', HEADER, 'nested too deeply', header('[' * 10 ** 5)),
    BadInput('a key twice', HEADER, 'there twice', header('{"epoch": 1, "epoch": 2}')),
    BadInput('no number', HEADER, 'NaN', header('{"metric": NaN}')),
    BadInput('a list as a header', HEADER, 'a mapping', header([1, 2])),
    BadInput('a header with weights', HEADER, 'weights', header({'weights': {}})),
    BadInput('a header with a path', HEADER, 'path', header({'path': '/tmp/x'})),
    BadInput('a folder without one', FOLDER, 'has neither', lambda folder: (folder / 'bad').mkdir()),
    BadInput('config.json that is none', FOLDER, 'config.json', config(b'{')),
    BadInput('config.json in another encoding', FOLDER, 'config.json', config(b'{"architecture": "\xe4"}')),
    BadInput('config.json without a model', FOLDER, 'names no architecture', config(b'{}')),
    BadInput('config.json as a list', FOLDER, 'config.json', config(b'[]')),
    BadInput('config.json with arguments as a list', FOLDER, 'model_args', config({'model_args': [1]})),
    BadInput('config.json with a text as a configuration', FOLDER, 'pretrained_cfg', config({'pretrained_cfg': 'x'})),
    BadInput('config.json with two numbers of classes', FOLDER, 'classes', config({'model_args': {'num_classes': 7}})),
    BadInput('config.json with an argument', FOLDER, 'features_only', config({'model_args': {'features_only': True}})),
    BadInput('config.json within itself', FOLDER, 'config.json', config(b'{"a":' * 10 ** 5)),
    BadInput('config.json from the Hub', FOLDER, 'hf-hub:evil/model', config({'architecture': 'hf-hub:evil/model'})),
    # a folder by timm's name
    BadInput('a folder that is not there', (*TRAIN, '--pretrained', '--model', 'local-dir:nowhere'), 'nowhere'),
    BadInput('a teacher with an argument', (*TRAIN, '--kd-model-name', 'local-dir:bad'), 'features_only',
             config({'model_args': {'features_only': True}})),
    BadInput('a model with an argument', ('export', 'local-dir:bad'), 'cache_dir',
             config({'model_args': {'cache_dir': 'x'}})),
    BadInput('weights from a path that are none', (*TRAIN, '--pretrained', '--pretrained-path', 'bad.pth'),
             'no weights', run(state_dict=dict)),
    BadInput('weights from a path of another model', (*TRAIN, '--pretrained', '--pretrained-path', 'bad.pth'),
             '--pretrained-path', run(state_dict=lambda: {f'net.{k}': v for k, v in weights().items()})),
    BadInput('damaged weights from a path', (*TRAIN, '--pretrained', '--pretrained-path', 'bad.pth'), 'checksum',
             whole(flipped)),
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('data'), {'train': 1, 'validation': 1})


@parametrize(TABLE)
def test_a_bad_checkpoint_is_one_sentence(row, data, tmp_path, monkeypatch, capfd):
    os.symlink(data, tmp_path / 'data')
    refused(row, tmp_path, monkeypatch, capfd)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(('out', 'executed'))]

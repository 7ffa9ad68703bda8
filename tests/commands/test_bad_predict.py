"""Bad inputs of predict, compare and recalibrate: one sentence each, and nothing changed on disk."""
import os
from pathlib import Path

import pytest
import timm
from PIL import Image

from pst_timm.commands import recalibrate
from tests.checkpoints.helpers import save_checkpoint
from tests.commands.bad_inputs import BadInput, parametrize, refused
from tests.review.helpers import make_data, make_source

PREDICT = ('predict', 'last.pth.tar')
COMPARE = ('compare', 'last.pth.tar', 'other/last.pth.tar', '--data-dir', 'data')
RECALIBRATE = ('recalibrate', 'last.pth.tar', '--data-dir', 'data')


def write(name, content=b''):
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return make


def fifo(folder: Path) -> None:
    os.mkfifo(folder / 'pipe.png')


def other_classes(folder: Path) -> None:
    (folder / 'other').mkdir()
    make_source(folder / 'other', names=('class0', 'class1', 'zebra'))


def zebra(folder: Path) -> None:
    (folder / 'data' / 'validation' / 'zebra').mkdir()
    Image.new('RGB', (9, 9)).save(folder / 'data' / 'validation' / 'zebra' / '1.png')


def headless(folder: Path) -> None:
    model = timm.create_model('test_resnet_pst', num_classes=0)
    save_checkpoint(folder / 'headless.pth.tar', model, facts={
        'arch': 'test_resnet_pst', 'pretrained_cfg': {'num_classes': 0, 'input_size': [3, 64, 64]}})


def full(folder: Path) -> None:
    (folder / 'last-calibrated').mkdir()
    (folder / 'last-calibrated' / 'thesis.tex').write_text('mine')


TABLE = [
    BadInput('predict: no images', PREDICT, '--list', code=2),
    BadInput('predict: nothing', ['predict'], 'source', code=2),
    BadInput('predict: missing model', ['predict', 'gone.pth.tar', 'photo.png'], 'gone.pth.tar'),
    BadInput('predict: unknown model', ['predict', 'resnet18_ptt', 'photo.png'], 'Did you mean resnet18_pst'),
    BadInput('predict: no weights', ['predict', 'resnet34_pst', 'photo.png'], 'weights exist for resnet34_pst'),
    BadInput('predict: no classifier', ['predict', 'headless.pth.tar', 'photo.png'], 'no classifier', headless),
    BadInput('predict: missing image', [*PREDICT, 'gone.png'], 'gone.png: there is no such file'),
    BadInput('predict: noise', [*PREDICT, 'noise.png'], 'noise.png: cannot identify', write('noise.png', b'noise')),
    BadInput('predict: a pipe', [*PREDICT, 'pipe.png'], 'pipe.png', fifo),
    BadInput('predict: a device', [*PREDICT, '/dev/zero'], '/dev/zero'),
    BadInput('predict: an empty folder', [*PREDICT, 'empty'], 'The folder empty has no images',
             lambda folder: (folder / 'empty').mkdir()),
    BadInput('predict: missing list', [*PREDICT, '--list', 'gone.txt'], 'gone.txt'),
    BadInput('predict: list of a folder', [*PREDICT, '--list', 'data'], 'data cannot be read'),
    BadInput('predict: list of noise', [*PREDICT, '--list', 'photo.png'], 'photo.png is not a list of images'),
    BadInput('predict: list without end', [*PREDICT, '--list', '/dev/zero'], '/dev/zero is not a list of images'),
    BadInput('predict: empty list', [*PREDICT, '--list', 'l.txt'], 'No images are named', write('l.txt', b'\n\n')),
    BadInput('predict: list of what is gone', [*PREDICT, '--list', 'l.txt'], 'Not one of 2 images',
             write('l.txt', b'a\nb')),
    BadInput('predict: no classes', [*PREDICT, 'photo.png', '--top', '0'], '--top', code=2),
    BadInput('predict: temperature of zero', [*PREDICT, 'photo.png', '--temperature', '0'], '--temperature', code=2),
    BadInput('predict: no temperature', [*PREDICT, 'photo.png', '--temperature', 'nan'], "'nan'", code=2),
    BadInput('predict: endless temperature', [*PREDICT, 'photo.png', '--temperature', 'inf'], "'inf'", code=2),
    BadInput('predict: unknown format', [*PREDICT, 'photo.png', '--format', 'json'], 'Did you mean jsonl', code=2),
    BadInput('predict: unknown ending', [*PREDICT, 'photo.png', '-o', 'out.xlsx'], 'out.xlsx', code=2),
    BadInput('predict: two formats', [*PREDICT, 'photo.png', '-o', 'out.csv', '--format', 'jsonl'], 'out.csv', code=2),
    BadInput('predict: output in no folder', [*PREDICT, 'photo.png', '-o', 'gone/out.csv'], 'there is no folder gone'),
    BadInput('predict: output that is there', [*PREDICT, 'photo.png', '-o', 'o.csv'], 'o.csv is there already',
             write('o.csv')),
    BadInput('predict: over its list', [*PREDICT, '--list', 'l.txt', '-o', 'l.txt', '--overwrite'], 'is what is read',
             write('l.txt', b'photo.png\n')),
    BadInput('predict: over its image', [*PREDICT, 'photo.txt', '-o', 'photo.txt', '--overwrite'], 'is what is read',
             lambda folder: (folder / 'photo.png').rename(folder / 'photo.txt')),
    BadInput('predict: absurd size', [*PREDICT, 'photo.png', '--img-size', '1000000'], '1000000 px'),
    BadInput('predict: unknown device', [*PREDICT, 'photo.png', '--device', 'gpu'], 'gpu'),
    BadInput('predict: unknown flag', [*PREDICT, 'photo.png', '--topk5'], "'--topk5'", code=2),
    # compare
    BadInput('compare: one model', ['compare', 'last.pth.tar', '--data-dir', 'data'], 'NEW', code=2),
    BadInput('compare: no data', ['compare', 'last.pth.tar', 'last.pth.tar'], '--data-dir', code=2),
    BadInput('compare: missing data', ['compare', 'last.pth.tar', 'last.pth.tar', '--data-dir', 'gone'], 'gone'),
    BadInput('compare: missing model', COMPARE, 'other/last.pth.tar'),
    BadInput('compare: other classes', COMPARE, "only last.pth.tar knows 'class2'", other_classes),
    BadInput('compare: other folders', ['compare', 'last.pth.tar', 'last.pth.tar', '--data-dir', 'data'],
             "knows no class 'zebra'", zebra),
    BadInput('compare: unknown split', [*COMPARE[:2], *COMPARE[1:2], *COMPARE[3:], '--split', 'tset'], 'tset'),
    BadInput('compare: negative tolerance', [*COMPARE, '--tolerance', '-1'], '--tolerance', code=2),
    BadInput('compare: absurd tolerance', [*COMPARE, '--tolerance', '101'], "'101'", code=2),
    BadInput('compare: no ratio', [*COMPARE, '--max-latency-ratio', 'fast'], "'fast'", code=2),
    BadInput('compare: ratio without times', [*COMPARE, '--max-latency-ratio', '2', '--repeats', '0'], '--repeats',
             code=2),
    BadInput('compare: unknown ending', [*COMPARE, '-o', 'out.txt'], 'out.txt', code=2),
    BadInput('compare: output that is there', [*COMPARE, '-o', 'o.json'], 'o.json is there already', write('o.json')),
    # recalibrate
    BadInput('recalibrate: no data', RECALIBRATE[:2], '--data-dir', code=2),
    BadInput('recalibrate: missing model', ['recalibrate', 'gone.pth.tar', *RECALIBRATE[2:]], 'gone.pth.tar'),
    BadInput('recalibrate: too few images', RECALIBRATE, '6 images are too few'),
    BadInput('recalibrate: folder of others', RECALIBRATE, 'thesis.tex', full),
    BadInput('recalibrate: over its source', [*RECALIBRATE, '-o', '.', '--overwrite'],
             'is where the checkpoint is read'),
    BadInput('recalibrate: into a file', [*RECALIBRATE, '-o', 'photo.png'], 'photo.png: it is not a folder'),
    BadInput('recalibrate: unknown split', [*RECALIBRATE, '--split', 'tset'], 'tset'),
]


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp('start')
    make_source(folder)
    Image.new('RGB', (70, 60), 'red').save(folder / 'photo.png')
    return folder


@parametrize(TABLE)
def test_bad_inputs_are_refused(row, start, tmp_path, monkeypatch, capfd):
    for path in start.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    make_data(tmp_path / 'data', validation=2)
    if row.words[0] == 'recalibrate':  # a command of `monitor`
        monkeypatch.setattr('tests.commands.bad_inputs.main', lambda words: recalibrate.main(words[1:]))
    refused(row, tmp_path, monkeypatch, capfd)

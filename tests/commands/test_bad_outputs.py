"""Bad inputs of the commands that write, measure and report: one sentence each, and nothing changed on disk."""
import json
import os
from pathlib import Path

import pytest
import timm
from PIL import Image

from tests.checkpoints.helpers import build, save_checkpoint
from tests.commands.bad_inputs import BadInput, parametrize, refused

EXPORT = ('export', 'model.pth.tar', '--output', 'out')
CONVERT = ('convert', 'model.pth.tar')
VISUALIZE = ('visualize', 'photo.png', '--checkpoint', 'model.pth.tar')
PUBLISH = ('publish', 'model.pth.tar', '--dry-run', '--repo-id')


def write(name, content=''):
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return make


def make(*makers):
    return lambda folder: [maker(folder) for maker in makers]


def fifo(folder: Path) -> None:
    os.mkfifo(folder / 'pipe.png')


def results(**change):
    row = dict(model='test_resnet_pst', top1=80.5, top5=99., img_size=96, crop_pct=0.9, interpolation='bicubic')
    return write('results.json', json.dumps([{**row, **change}]))


TABLE = [
    # export
    BadInput('export: unknown format', [*EXPORT, '--format', 'onx'], 'Did you mean onnx', code=2),
    BadInput('export: unknown dtype', [*EXPORT, '--dtype', 'float8'], "got 'float8'", code=2),
    BadInput('export: no size', [*EXPORT, '--img-size', '0'], '--img-size', code=2),
    BadInput('export: size of a word', [*EXPORT, '--img-size', 'large'], "'large'", code=2),
    BadInput('export: absurd size', [*EXPORT, '--img-size', '1000000'], '1000000 px'),
    BadInput('export: missing source', ['export', 'gone.pth.tar'], 'gone.pth.tar'),
    BadInput('export: unknown model', ['export', 'resnet18_ptt'], 'Did you mean resnet18_pst'),
    BadInput('export: fusion of a plain model', ['export', 'test_resnet', '--no-pretrained', '--topk', '2'],
             'test_resnet has no fine attention'),
    BadInput('export: output in no folder', [*EXPORT[:3], 'gone/out.onnx'], 'there is no folder gone'),
    BadInput('export: output is a folder', [*EXPORT[:3], 'run'], 'run: it is a folder'),
    BadInput('export: output is a device', [*EXPORT[:3], '/dev/null', '--overwrite'], 'not an ordinary file'),
    BadInput('export: output below a file', [*EXPORT[:3], 'photo.png/out.onnx'], 'there is no folder photo.png'),
    BadInput('export: name too long', [*EXPORT[:3], 'a' * 300, '--format', 'torchscript'], 'File name too long'),
    BadInput('export: too few class names', [*EXPORT, '--class-names', 'names.txt'], '1 class names',
             write('names.txt', 'cat\n')),
    BadInput('export: class names that are no text', [*EXPORT, '--class-names', 'photo.png'], 'photo.png'),
    BadInput('export: no classes', ['export', 'test_resnet_pst', '--num-classes', '0'], '--num-classes', code=2),
    BadInput('export: images that are gone', [*EXPORT, '--check', '--images', 'gone.png'], 'gone.png', code=2),
    BadInput('export: images that are none', [*EXPORT, '--check', '--images', 'noise.png'], 'noise.png',
             write('noise.png', 'noise')),
    BadInput('export: topk below zero', [*EXPORT, '--topk', '-2'], '--topk', code=2),
    # convert
    BadInput('convert: unknown ending', [*CONVERT, 'out.onnx'], 'out.onnx'),
    BadInput('convert: no ending', [*CONVERT, 'out'], 'out must end with'),
    BadInput('convert: unknown dtype', [*CONVERT, 'o.safetensors', '--dtype', 'int8'], "got 'int8'", code=2),
    BadInput('convert: target in no folder', [*CONVERT, 'gone/o.safetensors'], 'no folder gone'),
    BadInput('convert: target is a folder', [*CONVERT, 'dir.safetensors'], 'it is a folder',
             lambda folder: (folder / 'dir.safetensors').mkdir()),
    BadInput('convert: unknown architecture', [*CONVERT, 'o.safetensors', '--model', 'resnet1'], "'resnet1'"),
    BadInput('convert: a picture', ['convert', 'photo.png', 'o.safetensors'], 'photo.png'),
    BadInput('convert: an average that is not there', [*CONVERT, 'o.safetensors', '--use-ema'], '--use-ema'),
    # visualize
    BadInput('visualize: missing image', ['visualize', 'gone.png', *VISUALIZE[2:]], 'gone.png'),
    BadInput('visualize: a pipe', ['visualize', 'pipe.png', *VISUALIZE[2:]], 'pipe.png', fifo),
    BadInput('visualize: noise', ['visualize', 'noise.png', *VISUALIZE[2:]], 'noise.png', write('noise.png', 'noise')),
    BadInput('visualize: an empty image', ['visualize', 'e.png', *VISUALIZE[2:]], 'e.png', write('e.png')),
    BadInput('visualize: absurd size', [*VISUALIZE, '--img-size', '1000000'], '1000000 px'),
    BadInput('visualize: unknown ending', [*VISUALIZE, '--output', 'x.gif'], 'x.gif'),
    BadInput('visualize: class names that are no text', [*VISUALIZE, '--class-names', 'photo.png'], 'photo.png'),
    BadInput('visualize: no such block', [*VISUALIZE, '--block', '7'], 'PST block 7'),
    BadInput('visualize: a plain model', ['visualize', 'photo.png', '--model', 'test_resnet.r160_in1k',
                                          '--checkpoint', 'plain.pth.tar'], 'PST',
             lambda folder: save_checkpoint(folder / 'plain.pth.tar', timm.create_model('test_resnet', num_classes=3),
                                            arch='test_resnet')),
    BadInput('visualize: neither model nor checkpoint', ['visualize', 'photo.png'], '--model', code=2),
    # publish
    BadInput('publish: no owner', [*PUBLISH, 'tiny'], "'tiny' must name the owner"),
    BadInput('publish: three parts', [*PUBLISH, 'a/b/c'], "'a/b/c'"),
    BadInput('publish: spaces', [*PUBLISH, 'a b/c'], "'a b/c'"),
    BadInput('publish: way out', [*PUBLISH, '../tiny'], "'../tiny'"),
    BadInput('publish: empty name', [*PUBLISH, ''], "''"),
    BadInput('publish: licence that is none', [*PUBLISH, 'a/b', '--license', 'mit\n---\nx: y'], 'no identifier'),
    BadInput('publish: folder of others', [*PUBLISH, 'a/b', '--folder', '.'], 'is where the checkpoint is read'),
    BadInput('publish: folder that is a file', [*PUBLISH, 'a/b', '--folder', 'photo.png'], 'photo.png'),
    BadInput('publish: folder below a file', [*PUBLISH, 'a/b', '--folder', 'photo.png/x'], 'photo.png/x'),
    BadInput('publish: no results', [*PUBLISH, 'a/b', '--results', 'gone.csv'], 'gone.csv'),
    BadInput('publish: results of a folder', [*PUBLISH, 'a/b', '--results', 'run'], 'run'),
    BadInput('publish: garbled results', [*PUBLISH, 'a/b', '--results', 'results.json'], 'results.json',
             write('results.json', '[{"top1": {}}]')),
    BadInput('publish: results of 1e9', [*PUBLISH, 'a/b', '--results', 'results.json'], 'top1 = 1000000000',
             results(top1=1e9)),
    BadInput('publish: results below zero', [*PUBLISH, 'a/b', '--results', 'results.json'], 'top5 = -1',
             results(top5=-1)),
    BadInput('publish: results of no number', [*PUBLISH, 'a/b', '--results', 'results.json'], 'top1 = nan',
             results(top1=float('nan'))),
    BadInput('publish: results of another model', [*PUBLISH, 'a/b', '--results', 'results.json'], 'resnet18_pst',
             results(model='resnet18_pst')),
    BadInput('publish: deep results', [*PUBLISH, 'a/b', '--results', 'results.json'], 'results.json',
             write('results.json', '[' * 100_000)),
    BadInput('publish: no time', [*PUBLISH, 'a/b', '--timeout', '0'], '--timeout', code=2),
    # benchmark
    BadInput('benchmark: unknown model', ['benchmark', 'resnet18_ptt'], 'Did you mean resnet18_pst'),
    BadInput('benchmark: no rounds', ['benchmark', 'test_resnet_pst', '--repeats', '0'], '--repeats', code=2),
    BadInput('benchmark: odd maps', ['benchmark', '--layers', '--sizes', '7'], '--sizes', code=2),
    BadInput('benchmark: absurd maps', ['benchmark', '--layers', '--sizes', '1000000'], '--sizes', code=2),
    BadInput('benchmark: unknown device', ['benchmark', 'test_resnet_pst', '--device', 'gpu'], 'gpu'),
    BadInput('benchmark: absurd size', ['benchmark', 'test_resnet_pst', '--img-size', '1000000'], '8 images of 1'),
    BadInput('benchmark: absurd batch', ['benchmark', 'test_resnet_pst', '-b', '100000000'], '100000000 images'),
    BadInput('benchmark: output is a file', ['benchmark', 'test_resnet_pst', '--output', 'photo.png'], 'photo.png'),
    BadInput('benchmark: results without columns', ['benchmark', 'test_resnet_pst', '--results-file', 'r.csv'], 'r.csv',
             write('r.csv', 'a,b\n1,2\n')),
    BadInput('benchmark: over what it reads',
             ['benchmark', 'test_resnet_pst', '--results-file', 'o/benchmark.csv', '--output', 'o'], 'is what is read',
             write('o/benchmark.csv', 'model,top1\ntest_resnet_pst,50.0\n')),
    BadInput('benchmark: missing checkpoint', ['benchmark', '--checkpoint', 'gone.pth.tar'], 'gone.pth.tar'),
    # report, study, list
    BadInput('report: no checkout', ['report', '--root', 'run'], 'no folder results', code=2),
    BadInput('report: garbled study', ['report'], 'study.json', write('results/study/a/study.json', '{')),
    BadInput('report: study of a list', ['report'], 'study.json', write('results/study/a/study.json', '[]')),
    BadInput('report: study without files', ['report'], 'study.json', write('results/study/a/other', '')),
    BadInput('report: cut table', ['report'], 't.csv', make(
        write('results/performance/t.csv', 'a,b\n1\n'), write('results/performance/t.json', '{"setting": "x"}'),
        write('README.md', '<!-- table performance/t -->\n<!-- end -->\n'))),
    BadInput('report: table without its setting', ['report'], 't.json', make(
        write('results/performance/t.csv', 'a,b\n1,2\n'), write('results/performance/t.json', '[1]'),
        write('README.md', '<!-- table performance/t -->\n<!-- end -->\n'))),
    BadInput('report: mark of nothing', ['report'], 'README.md', make(
        write('results/x', ''), write('README.md', '<!-- study a nonsense -->\n'))),
    BadInput('report: page that is no text', ['report'], 'README.md', make(
        write('results/x', ''), write('README.md', b'\xff\xfe\x00'))),
    BadInput('report: way out of the results', ['report'], '../../secret', make(
        write('results/x', ''), write('README.md', '<!-- table ../../secret -->\n'))),
    BadInput('study: missing configuration', ['study', 'gone.yaml', '--data-dir', '.'], 'gone.yaml'),
    BadInput('study: a list', ['study', 's.yaml', '--data-dir', '.'], 's.yaml', write('s.yaml', '- a\n')),
    BadInput('study: broken YAML', ['study', 's.yaml', '--data-dir', '.'], 's.yaml', write('s.yaml', 'a: [\n')),
    BadInput('study: no text', ['study', 's.yaml', '--data-dir', '.'], 's.yaml', write('s.yaml', b'\xff\x00')),
    BadInput('list: a word', ['list', 'models'], "'models'", code=2),
    BadInput('list: a flag', ['list', '--al'], "'--al'", code=2),
]


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp('start')
    save_checkpoint(folder / 'model.pth.tar', build())
    Image.new('RGB', (70, 60), 'red').save(folder / 'photo.png')
    return folder


@parametrize(TABLE)
def test_bad_inputs_are_refused(row, start, tmp_path, monkeypatch, capfd):
    for path in start.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'run').mkdir()
    refused(row, tmp_path, monkeypatch, capfd)

"""What `pst-timm audit` refuses, in one sentence that names the culprit, before it has written anything."""
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pst_timm.commands import audit
from pst_timm.data import scores
from tests.review.helpers import make_data, make_source

from .bad_inputs import BadInput, parametrize, refused

RECIPE = 'model: test_resnet_pst\nimg_size: 32\nbatch_size: 2\nworkers: 0\nepochs: 1\nlr: 0.05\n'
WORDS = ['--data-dir', 'data', '-o', 'out', '--device', 'cpu']


def bad(name, flags, culprit, make=None, code=1):
    """A row: flags that are added to an audit of good data by a good model."""
    return BadInput(name, ['audit', 'last.pth.tar', *WORDS, *flags.split()], culprit, make, code)


def crossed(name, flags, culprit, make=None, code=1):
    """A row: likewise, of an audit that trains."""
    return BadInput(
        name, ['audit', *WORDS, '--split', 'train', '--cross', '2', '--config', 'recipe.yaml', *flags.split()], culprit,
        make, code)


def source(name, words, culprit, make=None, code=1):
    """A row: another model."""
    return BadInput(name, ['audit', *words.split(), *WORDS], culprit, make, code)


def write(name, content=b'mine'):
    def make(folder: Path):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return make


def all_broken(folder: Path):
    for path in (folder / 'data' / 'validation').rglob('*.png'):
        path.write_bytes(b'x')


def one_class(folder: Path):
    for name in ('class1', 'class2'):
        shutil.rmtree(folder / 'data' / 'validation' / name)


def strangers(folder: Path):
    (folder / 'data' / 'validation' / 'class0').rename(folder / 'data' / 'validation' / 'zebra')


def one_image_of_a_class(folder: Path):
    for path in sorted((folder / 'data' / 'train' / 'class0').iterdir())[1:]:
        path.unlink()


def as_tar(folder: Path):
    with tarfile.open(folder / 'data.tar', 'w') as tar:
        tar.add(folder / 'data' / 'train', '.')


def folds_of_others(folder: Path):
    write('out/folds/mine.txt')(folder)


def garbled_folds(folder: Path):
    write('out/folds/folds.json', '{"folds": ')(folder)


def other_folds(folder: Path):
    write('out/folds/folds.json', '{"folds": 7, "training": [1]}')(folder)


def flat(folder: Path):
    (folder / 'data' / 'loose').mkdir()
    Image.new('RGB', (8, 8)).save(folder / 'data' / 'loose' / 'a.png')


TABLE = [
    # the model
    source('nothing-named', '', 'name a model', code=2),
    source('source-missing', 'nowhere.pth', 'nowhere.pth'),
    source('source-unknown', 'test_resnet_ps', 'test_resnet_pst'),
    source('source-without-weights', 'resnet34_pst', 'No pretrained weights exist for resnet34_pst'),
    source('source-garbage', 'bad.pth', 'bad.pth', write('bad.pth', b'\x80\x04garbage')),
    source('recipe-of-no-checkpoint', 'last.pth.tar --cross 2', 'does not tell how it was trained'),
    bad('average-that-is-not-there', '--use-ema', '--use-ema'),
    bad('size', '--img-size 8', '--img-size', code=2),
    bad('size-absurd', '--img-size 1000000', '1000000'),
    bad('device', '--device gpu', 'gpu'),
    # the data
    bad('split-missing', '--split testing', "'testing'"),
    bad('split-flat', '--split loose', 'no class folders', flat),
    bad('data-missing', '--data-dir nowhere', 'nowhere'),
    bad('data-no-images', '--data-dir empty', 'empty', lambda folder: (folder / 'empty').mkdir()),
    bad('data-all-broken', '', 'Not one of the', all_broken),
    bad('data-one-class', '', 'class0', one_class),
    bad('data-of-others', '', "'zebra'", strangers),
    bad('against-missing', '--against tset', 'tset'),
    bad('against-itself', '--against train validation', 'validation'),
    bad('against-in-a-tar', '--data-dir data.tar --against train', '.tar', as_tar),
    # flags
    bad('ranking', '--ranking best', "'best'", code=2),
    bad('folds-one', '--cross 1', '--cross', code=2),
    bad('config-without-folds', '--config recipe.yaml', '--cross', code=2),
    bad('flags-without-folds', '-- --epochs 1', '--cross', code=2),
    bad('resume-without-folds', '--resume auto', '--cross', code=2),
    bad('repeats-without-folds', '--repeats 2', '--cross', code=2),
    bad('resume-a-file', '--cross 2 --resume last.pth.tar', '--resume', code=2),
    bad('batch', '--batch-size 0', '--batch-size', code=2),
    bad('unknown', '--fold 3', '--fold', code=2),
    # the trainings
    crossed('config-missing', '--config nowhere.yaml', 'nowhere.yaml'),
    crossed('config-key', '--config bad.yaml', "'epoch'", write('bad.yaml', 'epoch: 3')),
    crossed('config-model', '--config bad.yaml', 'resnet18_pst', write('bad.yaml', 'model: resnet18_pts')),
    crossed('flag-value', '-- --epochs none', '--epochs'),
    crossed('flag-unknown', '-- --epoch 3', '--epoch'),
    crossed('folds-of-few', '--cross 50', '--cross 50'),
    crossed('class-of-one', '', 'class0', one_image_of_a_class),
    crossed('tar', '--data-dir data.tar', 'unpack', as_tar),
    crossed('folds-of-others', '', 'holds no folds', folds_of_others),
    crossed('folds-garbled', '--resume auto', 'folds.json', garbled_folds),
    crossed('folds-of-another-audit', '--resume auto', 'another audit', other_folds),
    crossed('folds-without-resume', '', '--resume auto', other_folds),
    # the output
    bad('output-nowhere', '-o missing/out', 'missing'),
    bad('output-is-a-file', '-o recipe.yaml', 'recipe.yaml'),
    bad('output-among-the-images', '-o data/validation/class0', 'data/validation'),
    bad('output-there', '', 'audit.csv', write('out/audit.csv')),
    bad('output-weights-there', '', 'weights.csv', write('out/weights.csv')),
    bad('output-over-the-source', '-o run --sheet last.pth.tar --overwrite', '--sheet'),
    bad('sheet-elsewhere', '--sheet ../x.png', '../x.png'),
    bad('sheet-kind', '--sheet x.gif', '.gif'),
]


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp('start')
    make_source(folder)
    make_data(folder / 'data', train=4, validation=2)
    (folder / 'recipe.yaml').write_text(RECIPE)
    return folder


@parametrize(TABLE)
def test_audit_refuses(row, start, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr('pst_timm.checkpoints.fetching.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('pst_timm.review.crossing.train', lambda args: pytest.fail('too late'))
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    refused(row, tmp_path, monkeypatch, capfd)
    assert not (tmp_path / 'out' / 'audit.lock').exists()
    if row.make is None:  # nothing that was not there is there now
        assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'last.pth.tar', 'recipe.yaml']


def test_the_rankings_are_those_of_the_arithmetic():
    assert audit.RANKINGS == scores.RANKINGS

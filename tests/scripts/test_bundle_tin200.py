"""Weights of a run become a file of half the size, with the record and the card that were measured on them."""
import hashlib
import json

import pytest
import torch
import yaml

from pst_timm.checkpoints import label_names, load_model, read_checkpoint
from pst_timm.engine import train
from scripts import bundle_tin200
from scripts.bundle_tin200 import main
from tests.engine.helpers import TINY, tiny_train_args, write_images
from tests.helpers import relative_error

WNIDS = ['n01443537', 'n01629819', 'n01641577']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    data = write_images(tmp_path_factory.mktemp('images'), {'train': 12, 'val': 4}, classes=3)
    for split in ('train', 'val'):
        for i, name in enumerate(WNIDS):
            (data / split / f'class{i}').rename(data / split / name)
    return data


@pytest.fixture(scope='module')
def runs(images, tmp_path_factory):
    output = tmp_path_factory.mktemp('runs')
    return [
        train(tiny_train_args(
            images, output / str(i), epochs=1 + i, val_split='val', model_ema=True, img_size=64)).output_dir
        for i in range(2)]


def test_weights_record_and_card_agree(images, runs, tmp_path, capsys):
    assert main(['--runs', *map(str, runs), '--data-dir', str(images), '--folder', str(tmp_path / 'package'),
                 '--records', str(tmp_path / 'records')]) == 0
    short, path = sorted((tmp_path / 'package').iterdir())
    record = json.loads((tmp_path / 'records' / 'test_resnet_pst.tin200.json').read_text())
    assert (path.name, record['weights']) == ('test_resnet_pst.tin200.safetensors', 'test_resnet_pst.tin200')
    assert json.loads(short.read_text()).items() <= {**record, **record['metrics'][0]}.items()
    assert record['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record['images'], record['classes'], record['img_size']) == (12, 3, 64)
    assert [stage['epochs'] for stage in record['stages']] == [1, 2] and record['stages'][1]['train_seconds'] > 0
    # the moving average of the last epoch, in half precision
    weights, expected = load_model(path), load_model(runs[1] / 'last.pth.tar', use_ema=True)
    assert label_names(weights) == WNIDS and read_checkpoint(path).weights['fc.weight'].dtype == torch.float16
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(weights(x), expected(x)) < 1e-2
    coarse, *fine = record['metrics']
    assert coarse['topk'] == 0 and fine and all(row['topk'] for row in fine)
    assert sum(record['top1_by_class'].values()) / 3 == pytest.approx(coarse['top1'], abs=0.01)
    told = (tmp_path / 'records' / 'test_resnet_pst.tin200.md').read_text()
    assert f'{coarse["top1"]:.2f}' in told and 'goldfish' in told and 'hf-hub' not in told
    assert "timm.create_model('test_resnet_pst.tin200', pretrained=True)" in told
    texts = (told, json.dumps(record), str(path.read_bytes()))
    assert not any(str(folder) in text for text in texts for folder in (images, runs[0].parents[1], tmp_path))


def test_stages_are_trained_in_order_and_once(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle_tin200, 'CONFIGS', tmp_path)
    for i, name in enumerate(('short', 'long')):
        (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(
            {**TINY, 'epochs': 1 + i, 'val_split': 'val', 'model_ema': True, 'model': 'resnet10t'}))
    words = ['--data-dir', str(images), '--output', str(tmp_path / 'output'), '--folder', str(tmp_path / 'package'),
             '--records', str(tmp_path), '--recipes', 'short', 'long', '--model', 'test_resnet_pst', '--seed', '7']
    assert main(words) == 0
    folders = [tmp_path / 'output' / f'test_resnet_pst.tin200-{name}' for name in ('short', 'long')]
    last = [folder / 'last.pth.tar' for folder in folders]
    assert str(last[0]) in (folders[1] / 'args.yaml').read_text()
    record = json.loads((tmp_path / 'test_resnet_pst.tin200.json').read_text())
    assert record['command'].endswith('--recipes short long --model test_resnet_pst --seed 7') and record['seed'] == 7
    times = [path.stat().st_mtime_ns for path in last]
    assert main(words) == 0 and times == [path.stat().st_mtime_ns for path in last]
    # one that is not at its end goes on
    (tmp_path / 'long.yaml').write_text((tmp_path / 'long.yaml').read_text().replace('epochs: 2', 'epochs: 3'))
    assert main(words) == 0 and times[0] == last[0].stat().st_mtime_ns and times[1] < last[1].stat().st_mtime_ns


def test_a_run_that_is_none_is_one_sentence(images, tmp_path, capsys):
    assert main(['--runs', str(tmp_path / 'none'), '--data-dir', str(images), '--folder', str(tmp_path), '--records',
                 str(tmp_path)]) == 1
    assert 'last.pth.tar' in capsys.readouterr().err and bundle_tin200.TAG == 'tin200'

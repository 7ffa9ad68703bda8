"""Weights of a run become a file of half the size, with the record and the card that were measured on them."""
import hashlib
import json

import pytest
import torch

from pst_timm.checkpoints import label_names, load_model, read_checkpoint
from pst_timm.engine import train
from scripts import bundle_tin200
from scripts.bundle_tin200 import main
from tests.engine.helpers import tiny_train_args, write_images
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
    assert main([*map(str, runs), '--data-dir', str(images), '--folder', str(tmp_path / 'package'),
                 '--records', str(tmp_path / 'records')]) == 0
    [path] = (tmp_path / 'package').iterdir()
    record = json.loads((tmp_path / 'records' / 'test_resnet_pst.tin200.json').read_text())
    assert (path.name, record['weights']) == ('test_resnet_pst.tin200.safetensors', 'test_resnet_pst.tin200')
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
    assert not any(str(path.parent) in text for text in (told, json.dumps(record)))


def test_a_run_that_is_none_is_one_sentence(images, tmp_path, capsys):
    assert main([str(tmp_path / 'none'), '--data-dir', str(images), '--folder', str(tmp_path), '--records',
                 str(tmp_path)]) == 1
    assert 'last.pth.tar' in capsys.readouterr().err and bundle_tin200.TAG == 'tin200'

"""The weights of digits that come with the package, and what is said of them."""
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg

from pst_timm.checkpoints.building import create_model, load_model
from pst_timm.cli import main
from pst_timm.commands.list import bundled_weights
from pst_timm.models.digest import digest_note
from pst_timm.models.resnet_pst import WEIGHTS
from scripts.bundle_weights import bundle, measure
from scripts.demo import write_digits

README = Path(__file__).parents[2] / 'README.md'
RECORD = {record['weights']: record for record in bundled_weights()}['test_resnet_pst.digits']


def test_they_are_small_and_the_default():
    path = WEIGHTS / 'test_resnet_pst.digits.safetensors'
    assert path.stat().st_size < 3 * 2 ** 20 and not list(WEIGHTS.glob('*.pt*'))
    cfg = get_pretrained_cfg('test_resnet_pst')
    assert (cfg.tag, Path(cfg.file)) == ('digits', path)
    names = ['resnet18_pst.tin200', 'test_resnet_pst.digits']
    assert timm.list_pretrained('*pst*') == [record['weights'] for record in bundled_weights()] == names
    assert timm.list_models('*pst*', pretrained=True) == names


def test_without_being_asked_for_they_change_nothing():
    model = timm.create_model('test_resnet_pst')
    assert model.num_classes == 1000 and model.pretrained_cfg['input_size'] == (3, 160, 160)
    assert timm.create_model('test_resnet_pst', features_only=True).pretrained_cfg['input_size'] == (3, 160, 160)
    served = timm.create_model('test_resnet_pst', pretrained=True)
    assert served.num_classes == 10 and served.pretrained_cfg['input_size'] == (3, 64, 64)


def test_they_adapt_as_timms_do():
    served = timm.create_model('test_resnet_pst', pretrained=True).eval()
    other = timm.create_model('test_resnet_pst.digits', pretrained=True, num_classes=4, in_chans=1).eval()
    x = torch.rand(1, 1, 64, 64)
    assert other(x).shape == (1, 4)
    with torch.no_grad():  # weights of three equal channels are added up
        features = served.forward_features(x.expand(-1, 3, -1, -1))
        torch.testing.assert_close(other.forward_features(x), features, rtol=1e-3, atol=1e-4)


def test_a_replaced_file_is_noticed_and_a_file_of_ones_own_is_not(tmp_path):
    tensors, cfg = load_file(WEIGHTS / 'test_resnet_pst.digits.safetensors'), get_pretrained_cfg('test_resnet_pst')
    assert cfg.notes == (digest_note(tensors),)
    tensors['fc.bias'] += 1
    save_file(tensors, tmp_path / 'other.safetensors')
    own = dict(file=str(tmp_path / 'other.safetensors'))
    model = timm.create_model('test_resnet_pst', pretrained=True, pretrained_cfg_overlay=own)
    assert torch.equal(model.fc.bias, tensors['fc.bias'])
    replaced = dict(cfg.to_dict(), **own)
    for create in (timm.create_model, create_model):
        with pytest.raises(RuntimeError, match='damaged or replaced'):
            create('test_resnet_pst', pretrained=True, pretrained_cfg=replaced)


def test_the_recorded_accuracy_is_what_is_measured(tmp_path):
    pytest.importorskip('sklearn')
    assert write_digits(tmp_path)[1] == RECORD['images']
    results = measure(tmp_path, WEIGHTS / f'{RECORD["weights"]}.safetensors')
    one_image = 100 / RECORD['images']
    assert results['top1'] == pytest.approx(RECORD['top1'], abs=one_image * 1.01)
    assert RECORD['top1'] > 99
    assert results['loss'] == pytest.approx(RECORD['loss'], rel=0.02)


def test_list_and_readme_tell_the_record(capsys):
    assert main(['list']) == 0
    shown = capsys.readouterr().out
    readme = re.sub(r'\s+', ' ', README.read_text())
    for text in (shown, readme):
        assert f'{RECORD["top1"]:.2f}% top-1 of {RECORD["images"]}' in text
        assert f'{RECORD["img_size"]} px' in text and RECORD['command'] in text


@pytest.mark.slow
def test_the_command_makes_weights_and_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = bundle(tmp_path, ['--epochs', '1', '--warmup-epochs', '0'])
    assert record.keys() == RECORD.keys() and record['top1'] < RECORD['top1']
    assert json.loads((tmp_path / f'{RECORD["weights"]}.json').read_text()) == record
    model = load_model(tmp_path / f'{RECORD["weights"]}.safetensors')
    assert model.num_classes == 10 and tuple(model.pretrained_cfg['input_size']) == (3, 64, 64)

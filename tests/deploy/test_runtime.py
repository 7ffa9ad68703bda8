"""Exported files as models: any batch, preprocessing, validation, and what they refuse."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from timm.data import resolve_data_config

from pst_timm.checkpoints import label_names
from pst_timm.commands.validate import main as validate_main
from pst_timm.deploy.export import export
from pst_timm.deploy.runtime import Deployed, is_model_file, open_source
from pst_timm.utils.errors import PSTError
from tests.engine.helpers import write_images
from tests.models.helpers import build

CLASSES = ['class0', 'class1']


@pytest.fixture(scope='module')
def model():
    return build('test_resnet_pst', num_classes=2, topk=2)


@pytest.fixture(scope='module')
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('export') / 'model.onnx'
    export(model, path, img_size=64, class_names=CLASSES)
    return path


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('format, suffix', [('onnx', '.onnx'), ('exported-program', '.pt2')])
def test_an_export_is_a_model_for_any_batch(model, tmp_path, format, suffix, dynamic):
    path = tmp_path / f'model{suffix}'
    folded = export(model, path, format, dynamic=dynamic, img_size=64)
    deployed = open_source(path)
    assert isinstance(deployed, Deployed) and not deployed.training
    for batch in (1, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(deployed(x), folded(x), rtol=1e-3, atol=1e-4)
    assert deployed.inference_settings() == model.inference_settings()


def test_half_precision_goes_in_and_single_comes_out(model, tmp_path):
    path = tmp_path / 'model.pt2'
    folded = export(model, path, 'exported-program', dtype=torch.bfloat16, img_size=64)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        got = open_source(path)(x)
        torch.testing.assert_close(got, folded(x.bfloat16()).float(), rtol=5e-2, atol=5e-2)
    assert got.dtype == torch.float32


def test_preprocessing_and_classes_are_known(model, file):
    deployed = open_source(file)
    ours, theirs = (resolve_data_config({'img_size': 64}, model=m) for m in (deployed, model))
    assert json.dumps(ours) == json.dumps(theirs)
    assert label_names(deployed) == CLASSES and deployed.num_classes == 2


def test_validate_measures_it_as_it_does_the_model(model, file, tmp_path, capsys):
    data = write_images(tmp_path / 'data', {'validation': 6}, classes=2)
    weights = tmp_path / 'model.safetensors'
    from safetensors.torch import save_file
    save_file(model.state_dict(), weights)
    found = []
    for words in (
            ['--checkpoint', str(file)],
            ['--checkpoint', str(weights), '--model', 'test_resnet_pst', '--img-size', '64', '--crop-pct', '0.95',
             '--model-kwargs', 'topk=2']):
        assert validate_main(['--data-dir', str(data), '-b', '4', '-j', '0', '--device', 'cpu', *words]) == 0
        found.append(json.loads(capsys.readouterr().out.partition('--result\n')[2]))
    assert found[0]['top1'] == found[1]['top1']
    assert 'param_count' not in found[0] and found[1]['param_count'] > 0
    assert found[0]['loss'] == pytest.approx(found[1]['loss'], rel=1e-3)


@pytest.mark.parametrize('kwargs', [dict(num_classes=3), dict(reparam=True), dict(arch='resnet18'), dict(topk=4)])
def test_it_stays_as_it_was_exported(file, kwargs):
    with pytest.raises(PSTError, match=f'leave out {next(iter(kwargs))}'):
        open_source(file, **kwargs)


@pytest.mark.parametrize('words', [['--torchcompile'], ['--aot-autograd'], ['--test-pool']])
def test_validate_runs_it_in_no_other_form(file, words, tmp_path, capsys):
    data = write_images(tmp_path / 'data', {'validation': 1}, classes=2)
    words = ['--data-dir', str(data), '--checkpoint', str(file), '--device', 'cpu', '-j', '0', *words]
    assert validate_main(words) == 1
    assert f'is an exported model, which runs as it is: leave out {words[-1]}.' in capsys.readouterr().err


def test_the_models_of_a_folder_are_those_that_open(tmp_path):
    for name in ('a.onnx', 'b.xml', 'b.bin', 'c.safetensors', 'd.bin', 'cascade.json', 'a.onnx.json', 'notes.txt'):
        (tmp_path / name).touch()
    assert sorted(path.name for path in tmp_path.iterdir() if is_model_file(path)) == [
        'a.onnx', 'b.xml', 'c.safetensors', 'd.bin']


def test_validate_measures_a_folder_of_exports(file, tmp_path, capsys):
    data = write_images(tmp_path / 'data', {'validation': 1}, classes=2)
    (tmp_path / 'exports').mkdir()
    for name in ('a.onnx', 'b.onnx'):
        shutil.copyfile(file, tmp_path / 'exports' / name)
    words = ['--data-dir', str(data), '--checkpoint', str(tmp_path / 'exports'), '--device', 'cpu', '-j', '0']
    assert validate_main(words) == 0
    rows = json.loads(capsys.readouterr().out.partition('--result\n')[2])
    assert sorted(Path(row['checkpoint']).name for row in rows) == ['a.onnx', 'b.onnx']


def test_what_it_is_anyway_may_be_said(file):
    assert open_source(file, arch='test_resnet_pst', num_classes=2, in_chans=3, pretrained=True).in_chans == 3


def test_what_is_no_export_is_opened_as_ever(tmp_path):
    assert open_source('test_resnet_pst', pretrained=False).num_classes == 1000
    with pytest.raises(PSTError, match='There is no checkpoint'):
        open_source(tmp_path / 'none.onnx')

"""Exported models answer as eager ones do, at several sizes, and carry what their users need to know."""
import json

import pytest
import timm
import torch

import pst_timm
from pst_timm.commands.export import main
from pst_timm.deploy.export import FORMATS, check_export, export
from pst_timm.deploy.loading import load_exported
from pst_timm.utils.errors import PSTError
from tests.helpers import randomize

pytest.importorskip('onnxruntime')


def build(**kwargs):
    torch.manual_seed(0)
    return randomize(timm.create_model('test_resnet_pst', num_classes=3, **kwargs)).eval()


@pytest.mark.parametrize('format', [
    format if format == 'onnx' else pytest.param(format, marks=pytest.mark.slow) for format in FORMATS])
@pytest.mark.parametrize('topk, fine_fusion', [
    pytest.param(0, 'gate', marks=pytest.mark.slow), (8, 'gate'), pytest.param(8, 'joint', marks=pytest.mark.slow)])
def test_dynamic_exports_agree_with_eager_at_three_sizes(format, topk, fine_fusion, tmp_path):
    path = tmp_path / f'model{FORMATS[format]}'
    model = build(topk=topk, fine_fusion=fine_fusion)
    exported = export(model, path, format, dynamic=True, img_size=64)
    rows = check_export(exported, path, format, dynamic=True, img_size=64)
    # 33 x 64 has 2 x 4 coarse tokens or fewer: topk is clamped in the exported program too
    assert [row['shape'] for row in rows] == ['1x3x64x64', '3x3x65x97', '2x3x33x64']
    assert max(row['difference'] for row in rows) < 1e-4
    run, _ = load_exported(path, format)
    x = torch.randn(2, 3, 70, 130)
    with torch.no_grad():
        assert torch.allclose(run(x), model(x), rtol=1e-3, atol=1e-4 * model(x).abs().max().item())


@pytest.mark.parametrize('format', FORMATS)
def test_metadata_travels(format, tmp_path):
    path = tmp_path / f'model{FORMATS[format]}'
    export(build(topk=2), path, format, img_size=64, class_names=['cat', 'dog', 'newt'])
    _, info = load_exported(path, format)
    assert info['class_names'] == ['cat', 'dog', 'newt']
    assert info['mean'] == list(timm.data.IMAGENET_DEFAULT_MEAN)
    assert (info['architecture'], info['topk'], info['fine_fusion']) == ('test_resnet_pst', 2, 'gate')


def test_a_wrong_answer_is_seen(tmp_path):
    path = tmp_path / 'model.pt'
    exported = export(build(), path, 'torchscript', img_size=64)
    exported.fc.bias.data += 1.
    assert max(row['difference'] for row in check_export(exported, path, 'torchscript', img_size=64)) > 1e-3


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    path = tmp_path / 'model.pt2'
    exported = export(build(topk=4), path, 'exported-program', dtype=dtype, img_size=64)
    assert exported.fc.weight.dtype == dtype
    rows = check_export(exported, path, 'exported-program', img_size=64)
    assert max(row['difference'] for row in rows) < 5e-2


def test_unknown_format_and_misfitting_class_names(tmp_path):
    with pytest.raises(ValueError, match=r"format must be one of .*'tflite'"):
        export(build(), tmp_path / 'm', 'tflite')
    with pytest.raises(ValueError, match='2 class names for a model of 3 classes'):
        export(build(), tmp_path / 'm.onnx', 'onnx', class_names=['a', 'b'])


def test_command(tmp_path, capsys):
    path = tmp_path / 'out.pt'
    code = main([
        'test_resnet_pst', '--format', 'torchscript', '--topk', '4', '--fine-fusion', 'joint', '--img-size', '64',
        '--output', str(path), '--check'])
    assert code == 0 and path.is_file()
    assert 'largest difference' in capsys.readouterr().out
    _, info = load_exported(path, 'torchscript')
    assert (info['topk'], info['fine_fusion']) == (4, 'joint')
    assert main(['resnet18', '--no-pretrained', '--topk', '4', '--output', str(tmp_path / 'other.onnx')]) == 1
    assert 'resnet18 has no fine attention' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['test_resnet_pst', '--topk', '-1', '--output', str(path)])
    assert 'whole number of at least 0' in capsys.readouterr().err


def test_an_answer_that_is_no_number_fails_the_check(tmp_path, capsys, monkeypatch):
    rows = [{'shape': '1x3x64x64', 'difference': 0.}, {'shape': '3x3x65x97', 'difference': float('nan')}]
    monkeypatch.setattr('pst_timm.deploy.export.check_export', lambda *args: rows)
    argv = ['test_resnet_pst', '--format', 'torchscript', '--output', str(tmp_path / 'out.pt'), '--check']
    assert main(argv) == 1
    assert 'largest difference nan' in capsys.readouterr().out


def test_what_cannot_be_checked_is_explained(tmp_path, capsys):
    image, path = tmp_path / 'noise.png', tmp_path / 'out.pt'
    image.write_bytes(b'noise')
    argv = ['--format', 'torchscript', '--output', str(path), '--check']
    assert main(['test_resnet_pst', *argv, '--images', str(image)]) == 1
    assert 'cannot identify image file' in capsys.readouterr().err
    path.unlink()
    assert main(['test_vit', '--no-pretrained', *argv]) == 1  # one size only
    assert 'Input height' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['test_resnet_pst', *argv, '--img-size', '0'])
    assert "at least 1, got '0'" in capsys.readouterr().err


def test_metadata_is_json():
    from pst_timm.deploy.export import metadata

    assert json.loads(json.dumps(metadata(pst_timm.reparameterize(build()))))['num_classes'] == 3


def test_open_sizes_are_refused_where_the_trunk_rounds_down(tmp_path):
    model = pst_timm.create_pst('test_convnext', num_classes=3)
    with pytest.raises(PSTError, match='rounds sizes down'):
        export(model, tmp_path / 'm.onnx', dynamic=True)
    assert not list(tmp_path.iterdir())


def test_the_model_that_is_exported_stays_as_it_is(tmp_path):
    model = timm.create_model('test_resnet_pst', num_classes=3).train()
    export(model, tmp_path / 'model.ts', 'torchscript', dtype=torch.bfloat16, reparam=False)
    assert model.training and model.fc.weight.dtype == torch.float32

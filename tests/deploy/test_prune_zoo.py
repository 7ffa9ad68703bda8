"""Pruned models of many architectures: they run, fold, export, and are the same in another process."""
import json
import subprocess
import sys

import pytest
import timm
import torch

import pst_timm
from pst_timm.checkpoints.folder import save_folder
from pst_timm.deploy.export import check_export, export, tolerance
from pst_timm.deploy.prune import prune
from pst_timm.models.pruned import widths
from pst_timm.utils.cost import count_gmacs
from tests.engine.helpers import ROOT, script_env
from tests.helpers import randomize, relative_error

pytest.importorskip('torch_pruning')

FAST = ('test_resnet_pst', 'test_convnext2')
# every classifier of the zoo, and the usual ones of timm
ZOO = sorted({
    *timm.list_models('*_pst'), 'test_efficientnet',
    'resnet18', 'resnet50', 'resnext50_32x4d', 'seresnet50', 'resnetv2_50',
    'mobilenetv2_100', 'mobilenetv3_large_100', 'mobilenetv4_conv_small', 'efficientnet_b0', 'tf_efficientnetv2_b0',
    'regnetx_002', 'regnety_008', 'convnext_atto', 'convnextv2_atto', 'densenet121', 'repvgg_a0', 'hgnetv2_b0',
    'ese_vovnet19b_dw', 'edgenext_xx_small', 'mobilenetv4_hybrid_medium', 'ghostnet_100', 'cspdarknet53', 'lcnet_050'})
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in ZOO if name not in FAST)]
LOAD = '''
import json, sys, timm, torch, pst_timm
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
x = load_file(folder + '/x.safetensors')['x']
model = timm.create_model('local-dir:' + folder + '/pruned', pretrained=True).eval()
with torch.no_grad():
    save_file({'y': model(x)}, folder + '/y.safetensors')
'''


@pytest.mark.parametrize('name', NAMES)
def test_it_runs_folds_exports_and_is_rebuilt(name, tmp_path):
    from safetensors.torch import load_file, save_file

    model = randomize(timm.create_model(name)).eval()
    size = model.pretrained_cfg['input_size']
    # the least widths of tiny models are few
    smaller = prune(model, 0.3, round_to=4 if name.startswith('test_') else 16)
    assert count_gmacs(smaller, size) <= 0.7 * count_gmacs(model, size)
    assert widths(smaller) != widths(model) and type(smaller) is type(model)

    x = torch.randn(2, *size)
    with torch.no_grad():
        expected = smaller(x)
        assert torch.isfinite(expected).all()
        if hasattr(smaller, 'set_topk'):
            smaller.set_topk(4)
            assert torch.isfinite(smaller(x)).all()
            smaller.set_topk(0)
        assert relative_error(pst_timm.reparameterize(smaller)(x), expected) < 1e-4

    save_folder(smaller, tmp_path / 'pruned')
    assert (tmp_path / 'pruned' / 'config.json').stat().st_size < 40_000
    assert not [path for path in (tmp_path / 'pruned').iterdir() if path.suffix not in ('.json', '.safetensors')]
    save_file({'x': x}, tmp_path / 'x.safetensors')
    done = subprocess.run(
        [sys.executable, '-c', LOAD, str(tmp_path)], env=script_env(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / 'y.safetensors')['y'], expected)

    exported = export(smaller, tmp_path / 'model.pt2', 'exported-program', img_size=size[-1])
    worst = max(row['difference'] for row in check_export(exported, tmp_path / 'model.pt2', 'exported-program'))
    assert worst <= tolerance(torch.float32)


def test_its_file_tells_it_in_plain_values(tmp_path):
    smaller = prune(randomize(timm.create_model('test_resnet_pst')), 0.5)
    save_folder(smaller, tmp_path)
    told = json.loads((tmp_path / 'config.json').read_text())
    assert told['architecture'] == 'pruned' and told['model_args']['arch'] == 'test_resnet_pst'
    channels = told['model_args']['channels']
    assert 20 < len(channels) < 60
    assert all(type(n) is int for n in [
        n for width in channels.values() for n in (width if isinstance(width, list) else [width]) if n is not None])

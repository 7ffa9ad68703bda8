"""Recorded vectors: the project's own, always, and those of the published mathematics where they are at hand."""
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pst_timm.layers import FINE_FUSIONS, PyramidSparseAttention, PyramidSparseTransformer
from tests.helpers import PARITY, read_parity, relative_error
from tests.layers import oracle
from tests.vectors import make

OWN = Path(make.__file__).parent


def read(path):
    with safe_open(path, 'pt') as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize('fusion', FINE_FUSIONS)
@pytest.mark.parametrize('topk', make.TOPKS)
@pytest.mark.parametrize('name', make.CASES)
def test_own_vectors(name, topk, fusion, dtype, tolerance):
    tensors = read(OWN / f'{name}.safetensors')
    layer = make.CASES[name][0]().to(dtype).eval()
    weights = {k[2:]: v for k, v in tensors.items() if k.startswith('w.')}
    missing, unexpected = layer.load_state_dict(weights, strict=False)
    assert not unexpected and all(k.endswith('num_batches_tracked') for k in missing)
    layer.set_topk(topk, fusion)
    y = layer(tensors['x'].to(dtype), tensors['u'].to(dtype))
    assert relative_error(y, tensors[f'y_k{topk}_{fusion}']) < tolerance


def test_own_vectors_can_be_regenerated(tmp_path, monkeypatch):
    monkeypatch.setattr(make, 'FOLDER', tmp_path)
    make.make('attention')
    recorded, again = read(OWN / 'attention.safetensors'), read(tmp_path / 'attention.safetensors')
    assert recorded.keys() == again.keys()
    assert all(torch.allclose(recorded[name], again[name], rtol=1e-12, atol=1e-12) for name in recorded)


def topks(outputs):
    return sorted(int(re.fullmatch(r'y_k(\d+)', name)[1]) for name in outputs if name.startswith('y_k'))


def build_published(kind, metadata):
    if kind == 'attention':
        return PyramidSparseAttention(int(metadata['dim']), int(metadata['num_heads']))
    return PyramidSparseTransformer(
        int(metadata['in']),
        int(metadata['upper']),
        int(metadata['out']),
        depth=int(metadata['depth']),
        mlp_ratio=float(metadata['mlp_ratio']),
        expansion=float(metadata['expansion']),
    )


@pytest.mark.skipif(not PARITY.is_dir(), reason='the published vectors are not at hand')
@pytest.mark.parametrize('kind', ['attention', 'pst'])
class TestPublishedVectors:

    def test_the_layer_reproduces_them(self, kind):
        weights, tensors, metadata = read_parity(kind)
        layer = build_published(kind, metadata)
        missing, unexpected = layer.load_state_dict(weights, strict=False)
        assert not unexpected and all(k.endswith('num_batches_tracked') for k in missing)
        layer.eval()
        assert len(topks(tensors)) >= 2
        for topk in topks(tensors):
            layer.set_topk(topk, 'gate')
            assert relative_error(layer(tensors['x'], tensors['u']), tensors[f'y_k{topk}']) < 1e-5

    def test_the_oracle_reproduces_them(self, kind):
        weights, tensors, metadata = read_parity(kind)
        w, x, u = oracle.arrays(weights), tensors['x'].double().numpy(), tensors['u'].double().numpy()
        for topk in topks(tensors):
            if kind == 'attention':
                y = oracle.attention(w, x, u, int(metadata['num_heads']), topk)
            else:
                y = oracle.pst(w, x, u, 32, topk)
            assert relative_error(torch.from_numpy(y), tensors[f'y_k{topk}']) < 1e-5

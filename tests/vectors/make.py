"""Recorded vectors of the project's own, made by the oracle in float64: `python -m tests.vectors.make`.

They hold inputs, randomised weights under the package's state-dict names (`w.*`) and expected outputs, so that a change
to layers and oracle alike is seen as well. Run it again only when the mathematics is meant to change.
"""
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pst_timm.layers import PyramidSparseAttention, PyramidSparseTransformer
from tests.helpers import randomize
from tests.layers import oracle

FOLDER = Path(__file__).parent
TOPKS = (0, 2, 5, 100)
FUSIONS = ('gate', 'joint')
HEAD_DIM = 4


def build_attention() -> PyramidSparseAttention:
    return PyramidSparseAttention(8, 8 // HEAD_DIM)


def build_pst() -> PyramidSparseTransformer:
    return PyramidSparseTransformer(6, 10, 16, depth=2, head_dim=HEAD_DIM)


def attention(w, x, u, topk, fusion):
    return oracle.attention(w, x, u, x.shape[1] // HEAD_DIM, topk, fusion)


def pst(w, x, u, topk, fusion):
    return oracle.pst(w, x, u, HEAD_DIM, topk, fusion)


# name of the file: layer, oracle, shapes of x and upper
CASES = {
    'attention': (build_attention, attention, (2, 8, 7, 5), (2, 8, 4, 3)),
    'attention_ratio1': (build_attention, attention, (1, 8, 4, 5), (1, 8, 4, 5)),
    'pst': (build_pst, pst, (1, 6, 6, 7), (1, 10, 3, 4)),
}


def make(name: str) -> None:
    """Write one file of vectors."""
    build, compute, shape, upper_shape = CASES[name]
    weights = randomize(build().double(), seed=7).state_dict()
    weights = {k: v for k, v in weights.items() if not k.endswith('num_batches_tracked')}
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    u = torch.randn(upper_shape, generator=generator, dtype=torch.float64)
    tensors = {'x': x, 'u': u, **{f'w.{k}': v for k, v in weights.items()}}
    for topk in TOPKS:
        for fusion in FUSIONS:
            y = compute(oracle.arrays(weights), x.numpy(), u.numpy(), topk, fusion)
            tensors[f'y_k{topk}_{fusion}'] = torch.from_numpy(np.ascontiguousarray(y))
    save_file(tensors, FOLDER / f'{name}.safetensors')


if __name__ == '__main__':
    for case in CASES:
        make(case)

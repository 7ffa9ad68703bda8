"""Small functions that the tests of several rooms share."""
import re
from pathlib import Path
from typing import Dict, Tuple

import torch
import torch.nn as nn
from safetensors import safe_open


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, batch-norm statistics and gates included, so that no term is hidden by its default."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, std):
        return torch.randn(tensor.shape, generator=generator).to(tensor) * std

    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.copy_(normal(m.weight, 1.2 * m.weight[0].numel() ** -0.5))
            if m.bias is not None:
                m.bias.copy_(normal(m.bias, 0.5))
        elif isinstance(m, nn.BatchNorm2d):
            m.weight.copy_(1. + normal(m.weight, 0.2))
            m.bias.copy_(normal(m.bias, 0.3))
            m.running_mean.copy_(normal(m.running_mean, 0.3))
            m.running_var.copy_(1. + normal(m.running_var, 0.3).abs())
    return module


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# vectors of the published mathematics, which live beside a checkout rather than in it
PARITY = Path(__file__).resolve().parents[2] / 'shared' / 'parity'

PUBLISHED_NAMES = [
    (r'\battnlayer_(\d+)\.', r'blocks.\1.'),
    (r'\bcv1\.', 'conv_in.'),
    (r'\bcvup\.', 'conv_upper.'),
    (r'\bcv2\.', 'conv_out.'),
    (r'\bgate_conv1d\.', 'gate.'),
    (r'^down\.', 'fuse_down.'),
    (r'^merge\.', 'fuse_merge.'),
    (r'^head\.conv\.', 'conv_head.'),
    (r'^head\.linear\.', 'fc.'),
]


def read_parity(kind: str) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor], Dict[str, str]]:
    """Weights under our names, the other tensors, and the metadata of a file of published vectors."""
    weights, tensors = {}, {}
    with safe_open(PARITY / f'{kind}.safetensors', 'pt') as file:
        metadata = file.metadata()
        for key in file.keys():
            tensor = file.get_tensor(key)
            if not key.startswith('w.'):
                tensors[key] = tensor
                continue
            name = key[2:]
            for published, ours in PUBLISHED_NAMES:
                name = re.sub(published, ours, name)
            weights[name] = tensor.squeeze(-1) if name.endswith('gate.weight') else tensor
    return weights, tensors, metadata

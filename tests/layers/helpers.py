"""Layers and inputs for the tests of the layers."""
import torch
from timm.layers import set_layer_config

from pst_timm.layers import PyramidSparseAttention
from tests.helpers import randomize

# fine and coarse sizes: even, odd, one axis odd, non-square, a single token, dilated stages
SIZES = [
    ((4, 4), (2, 2)),
    ((15, 15), (8, 8)),
    ((13, 21), (7, 11)),
    ((6, 5), (3, 3)),
    ((1, 4), (1, 2)),
    ((2, 2), (1, 1)),
    ((1, 1), (1, 1)),
    ((5, 3), (5, 3)),
]


def build_attention(dim=8, num_heads=2, fused=True, seed=0, **kwargs):
    """A randomised float64 attention in eval mode."""
    with set_layer_config(exportable=not fused):  # timm's switch between fused and plain attention
        layer = PyramidSparseAttention(dim, num_heads, **kwargs)
    assert layer.fused_attn == fused
    return randomize(layer, seed).double().eval()


def build_maps(batch=2, channels=8, sizes=((6, 5), (3, 3)), upper_channels=None, seed=1):
    """Random float64 maps x and upper."""
    generator = torch.Generator().manual_seed(seed)
    (H, W), (h, w) = sizes
    x = torch.randn(batch, channels, H, W, generator=generator, dtype=torch.float64)
    upper = torch.randn(batch, upper_channels or channels, h, w, generator=generator, dtype=torch.float64)
    return x, upper

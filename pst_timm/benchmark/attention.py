"""The attention alone, beside the plain formula, which is written here from the equations and stores its logits."""
import statistics
from typing import List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F

from pst_timm.layers import PyramidSparseAttention
from pst_timm.utils.cost import peak_memory
from pst_timm.utils.progress import Steps
from pst_timm.utils.timing import median_ratio, time_in_turn

from .setting import WARMUP, Row, Setting, Tick, no_tick

__all__ = ['attention_memory', 'benchmark_layers', 'compare_attention', 'plain_attention']

DIM = 128  # channels, in heads of 32
MAX_PLAIN_BYTES = 6 * 2 ** 30


def plain_attention(layer: PyramidSparseAttention, x: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """What `layer(x, upper)` computes with 'gate' fusion, the straightforward way.

    All N x M logits are stored, the scores are their mean, and fine keys and values are projected on the whole map.

    Args:
        layer: The layer whose weights and `topk` are used.
        x: Fine map (B, C, 2h, 2w).
        upper: Coarse map (B, C, h, w).

    Returns:
        The attended map (B, C, 2h, 2w).
    """
    heads, d = layer.num_heads, layer.head_dim
    B, C, H, W = x.shape
    h, w = upper.shape[2:]
    q = layer.q(x).reshape(B, heads, d, H * W).transpose(2, 3)
    k, v = layer.kv(upper).reshape(B, heads, 2 * d, h * w).transpose(2, 3).chunk(2, dim=-1)
    logits = (q @ k.transpose(2, 3)) * d ** -0.5
    out = logits.softmax(dim=-1) @ v
    if layer.topk > 0:
        parents = logits.mean(dim=2).topk(min(layer.topk, h * w), dim=-1)[1]
        row, col = 2 * (parents // w), 2 * (parents % w)
        index = torch.stack([(row + i) * W + col + j for i in (0, 1) for j in (0, 1)], dim=-1).flatten(2)
        kv = layer.kv(x).reshape(B, heads, 2 * d, H * W).transpose(2, 3)
        fine_k, fine_v = kv.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 2 * d)).chunk(2, dim=-1)
        fine = ((q @ fine_k.transpose(2, 3)) * d ** -0.5).softmax(dim=-1) @ fine_v
        gate = layer.gate(torch.cat([out, fine], dim=-1)).sigmoid()
        out = gate * fine + (1. - gate) * out
    pe = layer.pe(v.transpose(2, 3).reshape(B, C, h, w))
    out = out.transpose(2, 3).reshape(B, C, H, W)
    return layer.proj(out + F.interpolate(pe, size=(H, W), mode='bilinear', align_corners=False))


def build_layer(
        size: int,
        topk: int,
        fusion: str,
        dim: int,
        setting: Setting,
) -> Tuple[PyramidSparseAttention, torch.Tensor, torch.Tensor]:
    """The attention with random weights, a fine map (B, dim, size, size) and a coarse one of half that size."""
    layer = PyramidSparseAttention(dim, dim // 32, device=setting.device, dtype=setting.dtype).eval()
    layer.set_topk(topk, fusion)
    if setting.reparam:
        layer = timm.models.reparameterize_model(layer, inplace=True)
    x, upper = (
        torch.randn(setting.batch_size, dim, s, s, device=setting.device, dtype=setting.dtype)
        .to(memory_format=setting.memory_format)
        for s in (size, size // 2))
    return layer.to(memory_format=setting.memory_format), x, upper


@torch.inference_mode()
def compare_attention(
        size: int,
        topk: int,
        fusion: str,
        setting: Setting,
        dim: int = DIM,
        max_plain_bytes: int = MAX_PLAIN_BYTES,
        tick: Tick = no_tick,
) -> Row:
    """Time and measure the attention in turn with the plain formula.

    Args:
        size: Side of the fine map, even, in tokens.
        topk: Selected tokens.
        fusion: How the fine attention is added; the plain formula always fuses by 'gate'.
        setting: Device, dtype, batch size, repeats, and whether layers are folded and channels_last, for both sides.
        dim: Channels, in heads of 32.
        max_plain_bytes: The plain formula is left out where its logits alone would take more.
        tick: Called after each round.

    Returns:
        A row, see `benchmark_layers`.
    """
    layer, x, upper = build_layer(size, topk, fusion, dim, setting)
    logits = setting.batch_size * layer.num_heads * size ** 4 // 4
    with_plain = logits * setting.dtype.itemsize <= max_plain_bytes
    calls = {'ours': lambda: layer(x, upper)}
    if with_plain:
        calls['plain'] = lambda: plain_attention(layer, x, upper)
    times = time_in_turn(calls, setting.repeats, WARMUP, tick, setting.device)
    memory = {name: peak_memory(call, setting.device) / 2 ** 20 for name, call in calls.items()}
    return {
        'size': size,
        'topk': topk,
        'fusion': fusion if topk else None,
        'ours_ms': statistics.median(times['ours']) * 1e3,
        'plain_ms': statistics.median(times['plain']) * 1e3 if with_plain else None,
        'speedup': median_ratio(times['plain'], times['ours']) if with_plain else None,
        'ours_mib': memory['ours'],
        'plain_mib': memory.get('plain'),
    }


@torch.inference_mode()
def attention_memory(size: int, topk: int, fusion: str, setting: Setting, dim: int = DIM) -> float:
    """Peak memory of the attention alone in MiB, see `compare_attention`."""
    layer, x, upper = build_layer(size, topk, fusion, dim, setting)
    layer(x, upper)
    return peak_memory(lambda: layer(x, upper), setting.device) / 2 ** 20


def benchmark_layers(
        sizes: Sequence[int] = (14, 40, 80, 160),
        settings: Sequence[Tuple[int, str]] = ((0, 'gate'), (8, 'gate'), (8, 'joint')),
        dim: int = DIM,
        setting: Optional[Setting] = None,
        max_plain_bytes: int = MAX_PLAIN_BYTES,
        progress: bool = True,
) -> List[Row]:
    """Time and measure the attention alone, size x size queries over half that size, beside the plain formula.

    Args:
        sizes: Sides of the fine map, even, in tokens.
        settings: (topk, fusion) pairs. The plain formula always fuses by 'gate'.
        dim: Channels, in heads of 32.
        setting: Device, dtype, batch size, repeats, and whether layers are folded and channels_last, for both sides
            (default: a batch of 2 and 10 rounds).
        max_plain_bytes: The plain formula is left out where its logits alone would take more.
        progress: Say how far it is, on standard error.

    Returns:
        A row for each size and setting: medians in milliseconds, peak memory in MiB, and the median of the paired
        ratios plain / ours (None where the plain formula was left out).
    """
    setting = setting or Setting(batch_size=2, repeats=10)
    cases = [(size, topk, fusion) for size in sizes for topk, fusion in settings]
    rows = []
    # queries times keys, and what a small map costs all the same
    with Steps('benchmark', [size ** 4 + 40. ** 4 for size, _, _ in cases], progress) as steps:
        for case in cases:
            row = compare_attention(*case, setting, dim, max_plain_bytes, steps.ticks(setting.rounds))
            rows.append(row)
            size, topk, fusion = case
            faster = f', {row["speedup"]:.2f} times as fast as the plain formula' if row['speedup'] else ''
            steps.done(f'{size}x{size}, k = {topk}{f" {fusion}" if topk else ""}: {row["ours_ms"]:.1f} ms{faster}')
    return rows

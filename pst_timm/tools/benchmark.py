"""Measure pyramid sparse attention against the plain formula: latency in turn, and peak memory.

The plain formula is written here from the equations, with the N x M logits stored, as a yardstick for
`pst_timm.layers.PyramidSparseAttention`. Times on a shared machine are noise; read the ratios, whose two sides are
measured in turn.
"""
import argparse
import statistics
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from pst_timm.layers import PyramidSparseAttention

__all__ = ['benchmark_layers', 'main', 'peak_memory', 'plain_attention']


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


def peak_memory(fn: Callable[[], object], device: torch.device) -> int:
    """Largest amount of memory, in bytes, that a call holds beyond what was allocated before it."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    held = peak = 0
    # every allocation and release of the CPU allocator, kernels' own scratch space included
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def time_in_turn(fns: Dict[str, Callable[[], object]], repeats: int, device: torch.device) -> Dict[str, List[float]]:
    """Wall seconds of each function, called in turn (A B A B ...) `repeats` times after one warm-up each."""
    times = {name: [] for name in fns}
    for i in range(repeats + 1):
        for name, fn in fns.items():
            start = time.perf_counter()
            fn()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def benchmark_layers(
        sizes: Sequence[int] = (14, 40, 80, 160),
        topks: Sequence[int] = (0, 8),
        batch_size: int = 2,
        dim: int = 128,
        repeats: int = 10,
        max_plain_bytes: int = 6 * 2 ** 30,
        device: Optional[torch.device] = None,
) -> List[Dict[str, object]]:
    """Time and measure the attention alone, size x size queries over half that size, beside the plain formula.

    Args:
        sizes: Sides of the fine map, even, in tokens.
        topks: Selected coarse tokens; 0 is coarse attention.
        batch_size: Images.
        dim: Channels, in heads of 32.
        repeats: Timed calls of each.
        max_plain_bytes: The plain formula is left out where its logits alone would take more.
        device: Where to run.

    Returns:
        A row for each size, topk and fusion: medians in milliseconds, peak memory in MiB, and the median of the
        paired ratios plain / ours (None where the plain formula was left out).
    """
    device = torch.device(device or 'cpu')
    rows = []
    for size in sizes:
        layer = PyramidSparseAttention(dim, dim // 32, device=device).eval()
        x = torch.randn(batch_size, dim, size, size, device=device)
        upper = torch.randn(batch_size, dim, size // 2, size // 2, device=device)
        with_plain = batch_size * layer.num_heads * size ** 4 // 4 * 4 <= max_plain_bytes
        for topk, fusion in _settings(topks):
            layer.set_topk(topk, fusion)
            fns = {'ours': lambda: layer(x, upper)}  # noqa: B023  (called before the loop goes on)
            if with_plain:
                fns['plain'] = lambda: plain_attention(layer, x, upper)  # noqa: B023
            times = time_in_turn(fns, repeats, device)
            memory = {name: peak_memory(fn, device) for name, fn in fns.items()}
            rows.append({
                'size': size,
                'topk': topk,
                'fusion': fusion if topk else '-',
                'ours_ms': statistics.median(times['ours']) * 1e3,
                'plain_ms': statistics.median(times['plain']) * 1e3 if with_plain else None,
                'speedup': statistics.median(
                    p / o for p, o in zip(times['plain'], times['ours'])) if with_plain else None,
                'ours_mib': memory['ours'] / 2 ** 20,
                'plain_mib': memory['plain'] / 2 ** 20 if with_plain else None,
            })
    return rows


def _settings(topks: Sequence[int]) -> List[Tuple[int, str]]:
    return [(k, fusion) for k in topks for fusion in (('gate', 'joint') if k else ('gate',))]


def format_table(rows: Sequence[Dict[str, object]]) -> str:
    """Rows of equal keys as a table of aligned columns."""
    def cell(value):
        return '-' if value is None else f'{value:.2f}' if isinstance(value, float) else str(value)

    lines = [list(rows[0])] + [[cell(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return '\n'.join('  '.join(c.rjust(w) for c, w in zip(line, widths)) for line in lines)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """`python -m pst_timm.tools.benchmark`: print the table of `benchmark_layers`."""
    parser = argparse.ArgumentParser(
        description='Pyramid sparse attention against the plain formula with its N x M logits: time and peak memory.')
    parser.add_argument('--sizes', type=int, nargs='+', default=[14, 40, 80, 160], help='sides of the fine map')
    parser.add_argument('--topk', type=int, nargs='+', default=[0, 8], help='selected coarse tokens')
    parser.add_argument('-b', '--batch-size', type=int, default=2)
    parser.add_argument('--dim', type=int, default=128, help='channels, in heads of 32')
    parser.add_argument('--repeats', type=int, default=10, help='timed calls of each')
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args(argv)
    if any(s < 2 or s % 2 for s in args.sizes):
        parser.error(f'--sizes must be even and at least 2, got {args.sizes}')
    rows = benchmark_layers(args.sizes, args.topk, args.batch_size, args.dim, args.repeats, device=args.device)
    print(f'torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, batch {args.batch_size}, '
          f'{args.dim} channels; medians of {args.repeats}, speedup = median of paired ratios plain / ours')
    print(format_table(rows))


if __name__ == '__main__':
    main()

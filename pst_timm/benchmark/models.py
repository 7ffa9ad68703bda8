"""Measure the models against their plain ResNet twins, and the attention against the plain formula.

Times on a shared machine are noise: every figure is a median of rounds in which both sides run in turn, and is shown as
the ratio of the two. The plain formula is written here from the equations, with its N x M logits stored.
"""
import re
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from pst_timm.layers import PyramidSparseAttention
from pst_timm.models import reparameterize
from pst_timm.utils.cost import count_activations, count_gmacs, peak_memory
from pst_timm.utils.timing import median_ratio, percentile, time_in_turn

__all__ = [
    'Setting',
    'benchmark_figures',
    'benchmark_layers',
    'benchmark_models',
    'benchmark_parts',
    'plain_attention',
]

Row = Dict[str, Any]
PARTS = re.compile(
    r'layer\d|pst|pst\.conv_\w+|pst\.blocks\.\d+\.(mlp|attn|attn\.\w+)|fuse_\w+|conv_head|global_pool|fc')
# flags that a kind of measurement does not read; a user who gives one expects what does not happen
UNREAD = {
    'layers': ('models', 'baselines', 'img_size', 'compile', 'train', 'results_file'),
    'parts': ('baselines', 'sizes', 'compile', 'train', 'results_file'),
    'models': ('sizes',),
    'figures': ('baselines', 'sizes', 'batch_size', 'img_size', 'topk', 'compile', 'train', 'results_file'),
}


@dataclass(frozen=True)
class Setting:
    """How models are built and run for a measurement, the same for both sides of a ratio."""
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    batch_size: int = 8
    img_size: int = 224
    """0 where no images are involved."""
    dtype: torch.dtype = torch.float32
    reparam: bool = False
    compile: bool = False
    channels_last: bool = False
    train: bool = False
    topk: int = 0
    """For the PST models alone, as is the fusion."""
    fine_fusion: str = 'gate'
    repeats: int = 20

    def describe(self) -> str:
        """One line for the head of a table."""
        flags = [f for f in ('reparam', 'compile', 'channels_last', 'train') if getattr(self, f)]
        what = [
            f'torch {torch.__version__}',
            device_name(self.device),
            f'batch {self.batch_size}',
            f'{self.img_size} px' if self.img_size else '',
            str(self.dtype).removeprefix('torch.'),
            *(flags or ['eager']),
            f'medians of {self.repeats} rounds',
        ]
        return ', '.join(w for w in what if w)


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'


def plain_twin(name: str) -> str:
    """The timm ResNet that a PST model extends: its name without `_pst`.

    Raises:
        ValueError: If there is none.
    """
    twin = name.removesuffix('_pst')
    if twin == name or not timm.is_model(twin):
        raise ValueError(f'{name} has no plain twin; name one baseline for each model with --baselines.')
    return twin


def build(name: str, setting: Setting) -> nn.Module:
    """Create a model, folded, cast and compiled as the setting says; random weights."""
    kwargs = dict(topk=setting.topk, fine_fusion=setting.fine_fusion) if name.endswith('_pst') else {}
    model = timm.create_model(name, **kwargs).to(setting.device)
    model = model.train() if setting.train else model.eval()
    if setting.reparam:
        model = reparameterize(model, inplace=True)
    model = model.to(dtype=setting.dtype)
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def make_call(model: nn.Module, setting: Setting) -> Callable[[], object]:
    """One inference, or one training step (forward, loss, backward, SGD), of a batch of random images."""
    x = torch.randn(setting.batch_size, 3, setting.img_size, setting.img_size)
    x = x.to(setting.device, setting.dtype)
    if setting.channels_last:
        x = x.to(memory_format=torch.channels_last)
    runner = torch.compile(model) if setting.compile else model
    if not setting.train:
        def infer():
            with torch.inference_mode():
                return runner(x)
        return infer

    target = torch.randint(model.num_classes, (setting.batch_size,), device=setting.device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(runner(x), target).backward()
        optimizer.step()
    return step


def benchmark_models(
        pairs: Sequence[Tuple[str, str]],
        setting: Setting,
        accuracy: Optional[Mapping[str, float]] = None,
        progress: bool = True,
) -> List[Row]:
    """Measure each model in turn with its baseline.

    Args:
        pairs: (model, baseline) names.
        setting: How both are built and run.
        accuracy: Top-1 by model name, where known.
        progress: Show a bar.

    Returns:
        Two rows for each pair, baseline first: parameters (M), GMACs, activations (M) of one image, peak memory (MiB),
        latency of a batch (p50, p90, ms), images/s, and the model's ratios to the baseline in latency and in MACs.
    """
    rows = []
    bar = tqdm(total=len(pairs) * (setting.repeats + 2), disable=None if progress else True, desc='benchmark')
    for name, baseline in pairs:
        bar.set_postfix_str(name)
        models = {n: build(n, setting) for n in (baseline, name)}
        calls = {n: make_call(m, setting) for n, m in models.items()}
        times = time_in_turn(calls, setting.repeats, tick=bar.update)
        size = (3, setting.img_size, setting.img_size)
        gmacs = {}
        for n, model in models.items():
            image = torch.zeros(1, *size, device=setting.device, dtype=setting.dtype)
            peak = peak_memory(calls[n], setting.device)
            gmacs[n] = count_gmacs(model, size)
            p50 = percentile(times[n], 50)
            rows.append({
                'model': n,
                'params_m': sum(p.numel() for p in model.parameters()) / 1e6,
                'gmacs': gmacs[n],
                'acts_m': count_activations(lambda: model(image)) / 1e6,  # noqa: B023  (called at once)
                'peak_mib': peak / 2 ** 20,
                'p50_ms': p50 * 1e3,
                'p90_ms': percentile(times[n], 90) * 1e3,
                'img_per_s': setting.batch_size / p50,
                'latency_ratio': median_ratio(times[n], times[baseline]) if n != baseline else None,
                'macs_ratio': gmacs[n] / gmacs[baseline] if n != baseline else None,
                'top1': (accuracy or {}).get(n),
            })
    bar.close()
    # columns that nothing on this machine could fill only widen the table
    return [{k: v for k, v in row.items() if any(r[k] is not None for r in rows)} for row in rows]


@torch.inference_mode()
def benchmark_parts(name: str, setting: Setting, progress: bool = True) -> List[Row]:
    """Where the time of a PST model goes: each part alone, on the inputs it has in the whole model.

    Args:
        name: A model of this package.
        setting: How it is built and run; `train` and `compile` are left out of account.
        progress: Show a bar.

    Returns:
        A row for each part: median milliseconds, share of the whole model's, GMACs of the batch and GMACs a second.
    """
    model = build(name, replace(setting, train=False))
    wanted = {'whole model': model}
    wanted.update({n: m for n, m in model.named_modules() if PARTS.fullmatch(n)})
    inputs: Dict[str, Tuple[Any, ...]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, args))
        for n, m in wanted.items()]
    make_call(model, setting)()
    for hook in hooks:
        hook.remove()
    calls = {n: (lambda n=n: wanted[n](*inputs[n])) for n in inputs}
    macs = {}
    for n, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        macs[n] = counter.get_total_flops() / 2e9
    with tqdm(total=setting.repeats + 2, disable=None if progress else True, desc=name) as bar:
        times = time_in_turn(calls, setting.repeats, tick=bar.update)
    whole = statistics.median(times['whole model'])
    return [{
        'part': n,
        'ms': statistics.median(t) * 1e3,
        'share': statistics.median(t) / whole,
        'gmacs': macs[n],
        'gmacs_per_s': macs[n] / statistics.median(t),
    } for n, t in times.items()]


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


@torch.inference_mode()
def benchmark_layers(
        sizes: Sequence[int] = (14, 40, 80, 160),
        settings: Sequence[Tuple[int, str]] = ((0, 'gate'), (8, 'gate'), (8, 'joint')),
        dim: int = 128,
        setting: Setting = Setting(batch_size=2, repeats=10),
        max_plain_bytes: int = 6 * 2 ** 30,
        progress: bool = True,
) -> List[Row]:
    """Time and measure the attention alone, size x size queries over half that size, beside the plain formula.

    Args:
        sizes: Sides of the fine map, even, in tokens.
        settings: (topk, fusion) pairs. The plain formula always fuses by 'gate'.
        dim: Channels, in heads of 32.
        setting: Device, dtype, batch size, repeats, and whether layers are folded and channels_last, for both sides.
        max_plain_bytes: The plain formula is left out where its logits alone would take more.
        progress: Show a bar.

    Returns:
        A row for each size and setting: medians in milliseconds, peak memory in MiB, and the median of the paired
        ratios plain / ours (None where the plain formula was left out).
    """
    rows = []
    bar = tqdm(
        total=len(sizes) * len(settings) * (setting.repeats + 2), disable=None if progress else True, desc='layers')
    memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
    for size in sizes:
        layer = PyramidSparseAttention(dim, dim // 32, device=setting.device, dtype=setting.dtype).eval()
        if setting.reparam:
            layer = timm.models.reparameterize_model(layer, inplace=True)
        layer = layer.to(memory_format=memory_format)
        x, upper = (
            torch.randn(setting.batch_size, dim, s, s, device=setting.device, dtype=setting.dtype)
            .to(memory_format=memory_format)
            for s in (size, size // 2))
        logits = setting.batch_size * layer.num_heads * size ** 4 // 4
        with_plain = logits * setting.dtype.itemsize <= max_plain_bytes
        for topk, fusion in settings:
            layer.set_topk(topk, fusion)
            calls = {'ours': lambda: layer(x, upper)}  # noqa: B023  (called before the loop goes on)
            if with_plain:
                calls['plain'] = lambda: plain_attention(layer, x, upper)  # noqa: B023
            times = time_in_turn(calls, setting.repeats, tick=bar.update)
            memory = {name: peak_memory(call, setting.device) / 2 ** 20 for name, call in calls.items()}
            rows.append({
                'size': size,
                'topk': topk,
                'fusion': fusion if topk else None,
                'ours_ms': statistics.median(times['ours']) * 1e3,
                'plain_ms': statistics.median(times['plain']) * 1e3 if with_plain else None,
                'speedup': median_ratio(times['plain'], times['ours']) if with_plain else None,
                'ours_mib': memory['ours'],
                'plain_mib': memory.get('plain'),
            })
    bar.close()
    return rows


def benchmark_figures(setting: Setting, progress: bool = True) -> List[Row]:
    """The project's headline figures on this machine, each a ratio of medians measured in turn.

    Args:
        setting: Device, dtype and repeats; batch size, folding and layout are those the targets are stated for.
        progress: Show bars.

    Returns:
        A row for each figure: its name, the target, the measured value and whether it is met.
    """
    setting = replace(setting, batch_size=8, img_size=224, reparam=True, channels_last=True, train=False, topk=0)
    rows: List[Row] = []

    def add(figure: str, target: float, value: float, at_least: bool = False) -> None:
        met = value >= target if at_least else value <= target
        rows.append({
            'figure': figure,
            'target': f'{">=" if at_least else "<="} {target:g}',
            'measured': value,
            'met': 'yes' if met else 'no',
        })

    coarse_and_fine = ((0, 'gate'), (8, 'gate'))
    detection = benchmark_layers(
        (80,), coarse_and_fine, setting=replace(setting, batch_size=2), progress=progress)
    small = benchmark_layers((14,), ((8, 'gate'), (8, 'joint')), setting=setting, progress=progress)
    growth = benchmark_layers(
        (40, 160), ((8, 'gate'),), setting=replace(setting, batch_size=2, repeats=1), max_plain_bytes=0,
        progress=progress)
    for row in detection:
        kind = f'k = {row["topk"]}' if row['topk'] else 'coarse'
        add(f'attention 80x80 over 40x40, {kind}: times faster than the plain formula', 4, row['speedup'], True)
    for row in small:
        add(f'attention 14x14 over 7x7, k = 8 {row["fusion"]}: times faster than the plain formula', 2,
            row['speedup'], True)
    add('attention, peak memory from 40x40 to 160x160: times', 18, growth[1]['ours_mib'] / growth[0]['ours_mib'])
    for name, target in (('resnet50_pst', 1.07), ('resnet18_pst', 1.09), ('resnet101_pst', 1.09)):
        row = benchmark_models([(name, plain_twin(name))], setting, progress=progress)[1]
        add(f'{name} over {plain_twin(name)}: latency (MACs: {row["macs_ratio"]:.3f})', target, row['latency_ratio'])
    add('resnet50_pst, k = 8 joint over coarse: latency', 1.02, _fine_over_coarse(setting))
    step = replace(setting, reparam=False, train=True)
    row = benchmark_models([('resnet50_pst', 'resnet50')], step, progress=progress)[1]
    add('resnet50_pst over resnet50: training step', 1.08, row['latency_ratio'])
    return rows


def _fine_over_coarse(setting: Setting) -> float:
    fine = make_call(build('resnet50_pst', replace(setting, topk=8, fine_fusion='joint')), setting)
    coarse = make_call(build('resnet50_pst', setting), setting)
    times = time_in_turn({'coarse': coarse, 'fine': fine}, setting.repeats)
    return median_ratio(times['fine'], times['coarse'])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy where it is known for all models, else GMACs, against latency."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    key, label = ('top1', 'top-1 (%)') if all(r.get('top1') is not None for r in rows) else ('gmacs', 'GMACs')
    figure = Figure(figsize=(6.4, 4.4), layout='constrained')
    axes = figure.subplots()
    for row in rows:
        pst = row.get('latency_ratio') is not None
        axes.scatter(row['p50_ms'], row[key], color='tab:blue' if pst else 'tab:gray', zorder=3)
        axes.annotate(row['model'], (row['p50_ms'], row[key]), xytext=(5, -3 if pst else 5), fontsize=8,
                      textcoords='offset points', va='top' if pst else 'bottom')
    axes.set(xlabel='latency of a batch, median (ms)', ylabel=label)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))

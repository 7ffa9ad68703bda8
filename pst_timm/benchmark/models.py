"""Models in turn with their plain ResNet twins."""
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from pst_timm.checkpoints import load_model
from pst_timm.models import reparameterize
from pst_timm.utils.cost import count_activations, count_gmacs, peak_memory
from pst_timm.utils.errors import PSTError
from pst_timm.utils.progress import Steps
from pst_timm.utils.timing import median_ratio, percentile, time_in_turn

from .setting import WARMUP, Row, Setting, Tick, no_tick

__all__ = ['architecture', 'benchmark_models', 'build', 'compare_models', 'image_size', 'make_call', 'plain_twin']


def architecture(source: str) -> str:
    """The name of the architecture of a source."""
    if timm.is_model(source):
        return source.split('.')[0]
    return load_model(source).pretrained_cfg['architecture']


def image_size(source: str) -> int:
    """The side of the images that a source was trained for, 224 for the name of a model, whose weights are random."""
    return 224 if timm.is_model(source) else load_model(source).pretrained_cfg['input_size'][-1]


def plain_twin(source: str) -> str:
    """The timm ResNet that a PST model extends: the name of its architecture without `_pst`.

    Raises:
        PSTError: If there is none.
    """
    name = architecture(source)
    twin = name.removesuffix('_pst')
    if twin == name or not timm.is_model(twin):
        raise PSTError(f'{name} has no plain twin: name one baseline for each model with --baselines.')
    return twin


def build(source: str, setting: Setting, **kwargs: Any) -> nn.Module:
    """Create a model, folded and cast as the setting says.

    Args:
        source: Model name (random weights), or what else `pst_timm.load_model` takes.
        setting: How it is built.
        kwargs: For `timm.create_model`.
    """
    if timm.is_model(source):  # speed does not depend on weights, nor does it wait for them
        kwargs['pretrained'] = False
    model = load_model(source, **kwargs).to(setting.device)
    if hasattr(model, 'set_topk') and setting.topk is not None:
        model.set_topk(setting.topk, setting.fine_fusion)
    model = model.train() if setting.train else model.eval()
    if setting.reparam:
        model = reparameterize(model, inplace=True)
    return model.to(dtype=setting.dtype, memory_format=setting.memory_format)


def channels_of(model: nn.Module) -> int:
    """Channels of the images; not all timm models tell, and those that do not take three."""
    return getattr(model, 'in_chans', 3)


def make_call(model: nn.Module, setting: Setting) -> Callable[[], object]:
    """One inference, or one training step (forward, loss, backward, SGD), of a batch of random images."""
    x = torch.randn(setting.batch_size, channels_of(model), setting.img_size, setting.img_size)
    x = x.to(setting.device, setting.dtype, memory_format=setting.memory_format)
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


def compare_models(source: str, baseline: str, setting: Setting, tick: Tick = no_tick) -> Tuple[Row, Row]:
    """Measure a model in turn with its baseline.

    Args:
        source: See `build`.
        baseline: Likewise; one that is named gets the classes and channels of the model.
        setting: How both are built and run.
        tick: Called after each round.

    Returns:
        A row for the baseline and one for the model, see `benchmark_models`.
    """
    model = build(source, setting)
    alike = dict(num_classes=model.num_classes, in_chans=channels_of(model)) if timm.is_model(baseline) else {}
    models = {'baseline': build(baseline, setting, **alike), 'model': model}
    calls = {key: make_call(m, setting) for key, m in models.items()}
    times = time_in_turn(calls, setting.repeats, WARMUP, tick, setting.device)
    size = (channels_of(model), setting.img_size, setting.img_size)
    image = torch.zeros(1, *size, device=setting.device, dtype=setting.dtype)
    rows = {}
    for key, name in (('baseline', baseline), ('model', source)):
        m = models[key]
        peak = peak_memory(calls[key], setting.device)
        p50 = percentile(times[key], 50)
        rows[key] = {
            'model': name,
            'params_m': sum(p.numel() for p in m.parameters()) / 1e6,
            'gmacs': count_gmacs(m, size),
            'acts_m': count_activations(lambda: m(image)) / 1e6,  # noqa: B023  (called at once)
            'peak_mib': peak / 2 ** 20,
            'p50_ms': p50 * 1e3,
            'p90_ms': percentile(times[key], 90) * 1e3,
            'img_per_s': setting.batch_size / p50,
            'latency_ratio': None,
            'macs_ratio': None,
        }
    rows['model']['latency_ratio'] = median_ratio(times['model'], times['baseline'])
    rows['model']['macs_ratio'] = rows['model']['gmacs'] / rows['baseline']['gmacs']
    return rows['baseline'], rows['model']


def benchmark_models(
        pairs: Sequence[Tuple[str, str]],
        setting: Setting,
        accuracy: Optional[Mapping[str, float]] = None,
        progress: bool = True,
) -> List[Row]:
    """Measure each model in turn with its baseline.

    Args:
        pairs: (model, baseline): names, or what else `pst_timm.load_model` takes.
        setting: How both are built and run.
        accuracy: Top-1 by model name, where known.
        progress: Say how far it is, on standard error.

    Returns:
        Two rows for each pair, baseline first: parameters (M), GMACs, activations (M) of one image, peak memory (MiB),
        latency of a batch (p50, p90, ms), images/s, and the model's ratios to the baseline in latency and in MACs.
    """
    rows = []
    with Steps('benchmark', [1.] * len(pairs), progress) as steps:
        for source, baseline in pairs:
            rows += compare_models(source, baseline, setting, steps.ticks(setting.rounds))
            steps.done(
                f'{source}: {rows[-1]["p50_ms"]:.1f} ms a batch, {rows[-1]["latency_ratio"]:.3f} times {baseline}')
    if accuracy:
        rows = [dict(row, top1=accuracy.get(row['model'])) for row in rows]
    # columns that nothing on this machine could fill only widen the table
    return [{k: v for k, v in row.items() if any(r[k] is not None for r in rows)} for row in rows]

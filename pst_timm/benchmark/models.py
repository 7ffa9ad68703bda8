"""Models in turn with their plain ResNet twins."""
import copy
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.reading import is_file
from pst_timm.models import reparameterize
from pst_timm.utils.cost import count_activations, count_gmacs, peak_memory
from pst_timm.utils.errors import PSTError
from pst_timm.utils.progress import Steps
from pst_timm.utils.timing import median_ratio, percentile, time_in_turn

from .setting import WARMUP, Row, Setting, Tick, no_tick

__all__ = ['Source', 'benchmark_models', 'build', 'compare_models', 'make_call', 'open_source', 'plain_twin']


class Source(NamedTuple):
    """A model to measure, read once."""
    name: str
    """As it was given."""
    architecture: str
    img_size: int
    """Side of the images that it was trained for; 224 for the name of a model, whose weights are random."""
    model: Optional[nn.Module]
    """With its weights, not to be changed; None for the name of a model."""


def open_source(source: Union[str, Source]) -> Source:
    """Read what is to be measured: a model name, or what else `pst_timm.load_model` takes. What is open stays so.

    Raises:
        PSTError: If it cannot be loaded.
    """
    if isinstance(source, Source):
        return source
    if timm.is_model(source) and not is_file(source):
        return Source(source, source.split('.')[0], 224, None)
    model = load_model(source)
    cfg = model.pretrained_cfg
    return Source(source, cfg['architecture'], cfg['input_size'][-1], model)


def plain_twin(source: Union[str, Source]) -> str:
    """The plain timm model that a PST model extends: that of its trunk, or its architecture without `_pst`.

    Raises:
        PSTError: If there is none.
    """
    source = open_source(source)
    name = source.architecture
    twin = getattr(source.model, 'plain_name', '') or name.removesuffix('_pst')
    if twin == name or not timm.is_model(twin):
        raise PSTError(f'{name} has no plain twin: name one baseline for each model with --baselines.')
    return twin


def build(source: Union[str, Source], setting: Setting, **kwargs: Any) -> nn.Module:
    """Create a model, folded and cast as the setting says.

    Args:
        source: Model name (random weights), or what else `open_source` takes or gives.
        setting: How it is built.
        kwargs: For `timm.create_model`, where a name is given.
    """
    source = open_source(source)
    if source.model is None:  # speed does not depend on weights, nor does it wait for them
        model = load_model(source.name, pretrained=False, **kwargs)
    else:
        model = copy.deepcopy(source.model)
    model = model.to(setting.device)
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


def compare_models(
        source: Union[str, Source],
        baseline: Union[str, Source],
        setting: Setting,
        tick: Tick = no_tick,
) -> Tuple[Row, Row]:
    """Measure a model in turn with its baseline.

    Args:
        source: See `build`.
        baseline: Likewise; one that is named gets the classes and channels of the model.
        setting: How both are built and run.
        tick: Called after each round.

    Returns:
        A row for the baseline and one for the model, see `benchmark_models`.
    """
    source, baseline = open_source(source), open_source(baseline)
    model = build(source, setting)
    alike = dict(num_classes=model.num_classes, in_chans=channels_of(model))
    models = {'baseline': build(baseline, setting, **alike), 'model': model}
    calls = {key: make_call(m, setting) for key, m in models.items()}
    times = time_in_turn(calls, setting.repeats, WARMUP, tick, setting.device)
    size = (channels_of(model), setting.img_size, setting.img_size)
    image = torch.zeros(1, *size, device=setting.device, dtype=setting.dtype)
    rows = {}
    for key, name in (('baseline', baseline.name), ('model', source.name)):
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
        pairs: Sequence[Tuple[Union[str, Source], Union[str, Source]]],
        setting: Setting,
        accuracy: Optional[Mapping[str, float]] = None,
        progress: bool = True,
) -> List[Row]:
    """Measure each model in turn with its baseline.

    Args:
        pairs: (model, baseline): names, or what else `open_source` takes or gives.
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
            plain, row = compare_models(source, baseline, setting, steps.ticks(setting.rounds))
            rows += [plain, row]
            steps.done(
                f'{row["model"]}: {row["p50_ms"]:.1f} ms a batch, {row["latency_ratio"]:.3f} times {plain["model"]}')
    if accuracy:
        rows = [dict(row, top1=accuracy.get(row['model'])) for row in rows]
    # columns that nothing on this machine could fill only widen the table
    return [{k: v for k, v in row.items() if any(r[k] is not None for r in rows)} for row in rows]

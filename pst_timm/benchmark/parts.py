"""Where the time of a model goes."""
import re
import statistics
from dataclasses import replace
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch
from torch.utils.flop_counter import FlopCounterMode

from pst_timm.utils.progress import Steps
from pst_timm.utils.timing import time_in_turn

from .models import Source, build, make_call, open_source
from .setting import WARMUP, Row, Setting, Tick, no_tick

__all__ = ['benchmark_parts', 'take_apart']

PARTS = re.compile(
    r'layer\d|pst|pst\.conv_\w+|pst\.blocks\.\d+\.(mlp|attn|attn\.\w+)|fuse_\w+|conv_head|global_pool|fc')


@torch.inference_mode()
def take_apart(source: Union[str, Source], setting: Setting, tick: Tick = no_tick) -> List[Row]:
    """Measure each part of a PST model alone, on the inputs it has in the whole model.

    Args:
        source: See `build`.
        setting: How it is built and run; `train` and `compile` are left out of account.
        tick: Called after each round.

    Returns:
        A row for each part: median milliseconds, share of the whole model's, GMACs of the batch and GMACs a second.
    """
    setting = replace(setting, train=False, compile=False)
    model = build(source, setting)
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
    times = time_in_turn(calls, setting.repeats, WARMUP, tick, setting.device)
    whole = statistics.median(times['whole model'])
    return [{
        'part': n,
        'ms': statistics.median(t) * 1e3,
        'share': statistics.median(t) / whole,
        'gmacs': macs[n],
        'gmacs_per_s': macs[n] / statistics.median(t),
    } for n, t in times.items()]


def benchmark_parts(sources: Sequence[Union[str, Source]], setting: Setting, progress: bool = True) -> List[Row]:
    """Take models apart, see `take_apart`.

    Args:
        sources: Models of this package, see `build`.
        setting: How they are built and run.
        progress: Say how far it is, on standard error.

    Returns:
        The rows of all of them, with the model.
    """
    rows = []
    with Steps('benchmark', [1.] * len(sources), progress) as steps:
        for source in map(open_source, sources):
            found = take_apart(source, setting, steps.ticks(setting.rounds))
            rows += [dict(model=source.name, **row) for row in found]
            steps.done(f'{source.name}: {found[0]["ms"]:.1f} ms a batch, {len(found) - 1} parts')
    return rows

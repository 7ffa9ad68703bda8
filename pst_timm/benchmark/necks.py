"""Necks over the last three levels of a trunk, measured in turn: PST pyramids beside FPN and PAN."""
import copy
import statistics
import time
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Callable, Dict, List, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FeaturePyramidNetwork

from pst_timm.layers import PANPyramid, PSTPyramid
from pst_timm.models import reparameterize
from pst_timm.utils.cost import peak_memory
from pst_timm.utils.errors import PSTError
from pst_timm.utils.progress import Steps
from pst_timm.utils.timing import median_ratio, time_in_turn

from .setting import WARMUP, Row, Setting, Tick, no_tick

__all__ = ['NECKS', 'benchmark_necks', 'compare_necks']

# from the channels of the maps and the width to a neck; ratios are to the PAN
NECKS: Dict[str, Callable[[List[int], int], nn.Module]] = {
    'FPN': FeaturePyramidNetwork,
    'PAN': PANPyramid,
    'PST': PSTPyramid,
    'PST, k = 8': lambda in_chs, width: PSTPyramid(in_chs, width, topk=8),
    'PST, kv_pool = 2': lambda in_chs, width: PSTPyramid(in_chs, width, kv_pool=2),
    'PST, kv_pool = 2, k = 8': lambda in_chs, width: PSTPyramid(in_chs, width, kv_pool=2, topk=8),
}


def _open_trunk(name: str, setting: Setting) -> nn.Module:
    """A timm model that gives its last three levels, folded if the setting says so.

    Raises:
        PSTError: If timm has no such model, or it has no levels at strides 8, 16 and 32.
    """
    try:
        trunk = timm.create_model(name, pretrained=False, features_only=True, out_indices=(-3, -2, -1))
    except (RuntimeError, ValueError, AssertionError, IndexError) as e:
        raise PSTError(f'{name} gives no three levels: {e}.') from e
    strides = trunk.feature_info.reduction()
    if strides != [8, 16, 32]:
        raise PSTError(f'The last levels of {name} are at strides {strides}, expected 8, 16 and 32.')
    trunk = trunk.eval().to(setting.device, setting.dtype)
    if setting.reparam:
        trunk = reparameterize(trunk, inplace=True)
    return trunk.to(memory_format=setting.memory_format)


def _gmacs(module: nn.Module, inputs: Any) -> float:
    # on this device every operation has a count, whichever kernel would run elsewhere
    module, inputs = copy.deepcopy(module).to('meta'), tree_map(lambda x: x.to('meta'), inputs)
    with FlopCounterMode(display=False) as counter:
        module(inputs)
    return counter.get_total_flops() / 2e9


def _params(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@torch.inference_mode()
def compare_necks(name: str, width: int, setting: Setting, tick: Tick = no_tick) -> List[Row]:
    """Measure the necks over one trunk in turn, on the maps that it gives.

    Args:
        name: Name of a timm model.
        width: Channels of the necks' outputs.
        setting: How all are built and run; its `topk` and `train` are left out of account.
        tick: Called after each round.

    Returns:
        A row for the trunk and each neck, see `benchmark_necks`.

    Raises:
        PSTError: If the model has no levels at strides 8, 16 and 32.
    """
    trunk = _open_trunk(name, setting)
    images = torch.randn(
        setting.batch_size, 3, setting.img_size, setting.img_size, device=setting.device, dtype=setting.dtype)
    images = images.to(memory_format=setting.memory_format)
    maps = OrderedDict(zip(('c3', 'c4', 'c5'), trunk(images)))
    calls = {'trunk': lambda: trunk(images)}
    counts = {'trunk': (_gmacs(trunk, images), _params(trunk))}
    for key, build in NECKS.items():
        neck = build(trunk.feature_info.channels(), width).eval().to(setting.device, setting.dtype)
        counts[key] = (_gmacs(neck, maps), _params(neck))
        if setting.reparam:
            neck = timm.models.reparameterize_model(neck, inplace=True)
        neck = neck.to(memory_format=setting.memory_format)
        calls[key] = lambda neck=neck: neck(maps)
    # one thread's processor time is its own, whatever else the machine does
    alone = setting.device.type == 'cpu' and torch.get_num_threads() == 1
    times = time_in_turn(
        calls, setting.repeats, WARMUP, tick, setting.device, clock=time.process_time if alone else None)
    rows = []
    for key, call in calls.items():
        gmacs, params = counts[key]
        rows.append({
            'trunk': name,
            'px': setting.img_size,
            'width': width,
            'part': key,
            'ms': statistics.median(times[key]) * 1e3,
            'over_pan': median_ratio(times[key], times['PAN']),
            'gmacs': gmacs / setting.batch_size,
            'params_m': params,
            'peak_mib': peak_memory(call, setting.device) / 2 ** 20,
        })
    return rows


def benchmark_necks(
        trunks: Sequence[Tuple[str, int]],
        sizes: Sequence[int],
        setting: Setting,
        progress: bool = True,
) -> List[Row]:
    """Measure the necks over trunks, at several sizes of the images.

    Args:
        trunks: Names of timm models, each with the width of its necks.
        sizes: Heights and widths of the images.
        setting: How all are built and run, at these sizes.
        progress: Say how far it is, on standard error.

    Returns:
        Rows for each trunk, size and part (the trunk alone, then the necks): milliseconds of a batch (with one CPU
        thread its processor time), ratio to the PAN in the same round, both medians; GMACs of one image, parameters
        (M) and peak memory (MiB) beyond the maps given.

    Raises:
        PSTError: If a model has no levels at strides 8, 16 and 32.
    """
    cases = [(name, width, size) for name, width in trunks for size in sizes]
    rows: List[Row] = []
    with Steps('benchmark', [size ** 2. for _, _, size in cases], progress) as steps:
        for name, width, size in cases:
            found = compare_necks(name, width, replace(setting, img_size=size), steps.ticks(setting.rounds))
            rows += found
            ratio = next(row['over_pan'] for row in found if row['part'] == 'PST')
            steps.done(f'{name}, {size} px: PST takes {ratio:.2f} times the time of PAN')
    return rows

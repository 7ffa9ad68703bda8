"""Structured pruning: whole channels cut out of a model, so that it computes less on any processor.

What is cut is what matters least (`score_channels`), as much of it as gives the share of multiply-adds that was asked
for, counted on the model that results. The channels that can be cut, and which of them hang together, are those of
`utils.channels`; the result is the architecture `pruned` (`models.pruned`), an ordinary model for all that follows.
"""
import copy
import logging
import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.models import get_model_input_config
from torch.nn.modules.batchnorm import _BatchNorm

from pst_timm.models.pruned import Kept, cut, layer_of, measured, record_cut, settle, tensors_of, width_of
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.errors import PSTError

from .importance import IMPORTANCES, Batch, Scored, score_channels

__all__ = ['BY', 'SCOPES', 'prune', 'ratio_for_latency', 'reestimate_norms']

_logger = logging.getLogger(__name__)

SCOPES = ('global', 'uniform')
BY = ('macs', 'channels')
LEAST_SHARE = 0.1  # of the channels of a layer that stay in any case: an empty layer would cut the network in two
SEARCH_STEPS = 12
LATENCY_STEPS = 5
LATENCY_ROUNDS = 20
TOLERANCE = 1e-3  # of the largest output, between what is cut and what is masked

Plan = List[torch.Tensor]
"""For each group, which of its units stay (units,)."""


def prune(
        model: nn.Module,
        ratio: float = 0.5,
        importance: str = 'l2',
        scope: str = 'global',
        round_to: int = 16,
        images: Optional[Sequence[Batch]] = None,
        by: str = 'macs',
        steps: int = 1,
        between: Optional[Callable[[nn.Module, int], nn.Module]] = None,
) -> nn.Module:
    """A smaller model, with what matters least cut out of a larger one.

    Its accuracy is not that of the larger one: train it further. With images the statistics of its batch norms are
    estimated anew after each step, which is where most of the loss without training comes from.

    Args:
        model: Any convolutional model of timm, from `timm.create_model` or `pst_timm.load_model`; left as it is.
        ratio: Share of the multiply-adds to remove, from 0 to 1.
        importance: What tells how much a channel matters: 'l2', the size of the weights that make and read it; 'bn',
            that of the scales of its batch norms, for models that were trained with a sparsity penalty; 'taylor', how
            much the loss is expected to change without it, to the first order, on labelled images.
        scope: 'global' compares the channels of all layers, 'uniform' removes the same share of each.
        round_to: Widths become multiples of this, which is what processors are fast with; layers that are not stay as
            they are or become one.
        images: Batches of the training images, labelled; needed for 'taylor'.
        by: What `ratio` is a share of: 'macs', or the 'channels' of the layers that can be cut.
        steps: In how many steps, each of them with an importance of its own.
        between: Called after each step but the last with the model and the number of the step, to train it; returns
            the model to go on with, of the same architecture.

    Returns:
        The pruned model, in eval mode, of the architecture `pruned`.

    Raises:
        PSTError: If the model cannot be pruned, or not so far.
        ValueError: If an option is out of its range.
    """
    _check_options(ratio, importance, scope, round_to, images, by, steps)
    whole = _gmacs(model)
    for step in range(1, steps + 1):
        if by == 'macs':
            target = whole * (1 - ratio * step / steps)
            share = 1 - target / _gmacs(model)
        else:
            share = 1 - (1 - ratio) ** (1 / steps)
        model = _prune_once(model, share, importance, scope, round_to, images, by)
        if between is not None and step < steps:
            model = between(model, step)
    return model.eval()


def ratio_for_latency(
        model: nn.Module,
        share: Optional[float] = None,
        milliseconds: Optional[float] = None,
        measure: Optional[Callable[[nn.Module, nn.Module], Tuple[float, float]]] = None,
        **options: Any,
) -> float:
    """The share of multiply-adds to remove for a latency, measured in turn with the model as it is.

    Args:
        model: The model, as it is to be timed.
        share: The latency to reach, as a share of that of the model.
        milliseconds: Or in milliseconds.
        measure: From the model and a pruned one to the seconds of the pruned one, and its share of those of the model;
            one image at a time in eager mode if None.
        options: Those of `prune`, but for its ratio.

    Returns:
        The ratio for `prune`.

    Raises:
        PSTError: If it cannot be reached.
    """
    measure = measure or _latency
    low, high = 0., 1.
    best = None
    options = {key: value for key, value in options.items() if key not in ('steps', 'between', 'by')}
    for _ in range(LATENCY_STEPS):
        ratio = (low + high) / 2
        try:
            smaller = prune(model, ratio, **options)
        except Unreachable:
            high = ratio
            continue
        seconds, relative = measure(model, smaller)
        reached = relative <= share if share is not None else seconds * 1e3 <= milliseconds
        _logger.info(
            f'{ratio:.0%} of the multiply-adds removed: {seconds * 1e3:.2f} ms, {relative:.2f} of the latency before.')
        if reached:
            best = high = ratio
        else:
            low = ratio
    if best is None:
        target = f'{share:.2f} of the latency' if share is not None else f'{milliseconds:g} ms'
        raise PSTError(
            f'{target} cannot be reached by pruning on this machine: ask for more, begin with a smaller model, or '
            f'quantise it (pst-timm quantize).')
    return best


class Unreachable(PSTError):
    """A model cannot be pruned as far as was asked for."""


def _latency(model: nn.Module, smaller: nn.Module) -> Tuple[float, float]:
    from .latency import compare_latency

    size = get_model_input_config(model)['input_size']
    found = compare_latency({'whole': model, 'pruned': smaller}, size, rounds=LATENCY_ROUNDS, baseline='whole')
    return found['pruned'].seconds, 1 / found['pruned'].ratio


def _check_options(
        ratio: float,
        importance: str,
        scope: str,
        round_to: int,
        images: Optional[Sequence[Batch]],
        by: str,
        steps: int,
) -> None:
    if not 0 < ratio < 1:
        raise ValueError(f'ratio is the share to remove, between 0 and 1; got {ratio!r}.')
    for name, value, choices in (
            ('importance', importance, IMPORTANCES), ('scope', scope, SCOPES), ('by', by, BY)):
        if value not in choices:
            raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}.')
    if importance == 'taylor' and not images:
        raise ValueError("importance='taylor' needs labelled images, of the training split.")
    for name, value in (('round_to', round_to), ('steps', steps)):
        if type(value) is not int or value < 1:
            raise ValueError(f'{name} must be a positive whole number, got {value!r}.')


def _prune_once(
        model: nn.Module,
        share: float,
        importance: str,
        scope: str,
        round_to: int,
        images: Optional[Sequence[Batch]],
        by: str,
) -> nn.Module:
    """One step of `prune`."""
    units = score_channels(model, importance, images)
    plan = _plan_for(model, units, share, scope, round_to, by)
    kept = _kept(model, units, plan)
    smaller = copy.deepcopy(model).eval()
    try:
        before = measured(model)
        cut(smaller, kept)
        settle(smaller, before)
        record_cut(smaller, model)
    except ValueError as e:
        raise PSTError(f'{type(model).__name__} cannot be pruned: {e}') from e
    _check_alike(model, smaller, kept)
    if images:
        reestimate_norms(smaller, [batch for batch, _ in images])
    return smaller.eval()


# how much of it

def _plan_for(
        model: nn.Module,
        units: Sequence[Scored],
        share: float,
        scope: str,
        round_to: int,
        by: str,
) -> Plan:
    """The least that is cut for a share of the multiply-adds."""
    def plan(level: float) -> Plan:
        return _plan(units, level, scope, round_to)

    if by == 'channels':
        return plan(share)
    whole = _gmacs(model)

    def removed(candidate: Plan) -> float:
        return 1 - _gmacs(model, _kept(model, units, candidate)) / whole

    low, high = 0., 1.
    most = plan(high)
    if removed(most) < share:
        raise Unreachable(
            f'At most {removed(most):.1%} of the multiply-adds of {type(model).__name__} can be removed, with '
            f'attention left whole, every width a multiple of {round_to} and {LEAST_SHARE:.0%} of every layer left; '
            f'{share:.1%} were asked for: ask for less, or for finer widths.')
    for _ in range(SEARCH_STEPS):
        level = (low + high) / 2
        low, high = (low, level) if removed(plan(level)) >= share else (level, high)
    # where many layers change at once, as many as are needed do
    less, enough = plan(low), plan(high)
    differing = [i for i, (a, b) in enumerate(zip(less, enough)) if not torch.equal(a, b)]
    first, last = 0, len(differing)
    while first < last:
        middle = (first + last) // 2
        mixed = [enough[i] if i in differing[:middle] else less[i] for i in range(len(units))]
        first, last = (first, middle) if removed(mixed) >= share else (middle + 1, last)
    return [enough[i] if i in differing[:first] else less[i] for i in range(len(units))]


def _plan(units: Sequence[Scored], level: float, scope: str, round_to: int) -> Plan:
    """Which units stay if so much of all goes, from 0 to 1."""
    if scope == 'global':
        scores = torch.cat([unit.scores.repeat_interleave(unit.size) for unit in units]).sort().values
        index = min(int(level * len(scores)), len(scores) - 1)
        wanted = [int((unit.scores > scores[index]).sum()) if level else unit.group.units for unit in units]
    else:
        wanted = [round(unit.group.units * (1 - level)) for unit in units]
    plan = []
    for unit, number in zip(units, wanted):
        keep = torch.zeros(unit.group.units, dtype=torch.bool)
        keep[unit.scores.topk(_rounded(number, unit, round_to)).indices] = True
        plan.append(keep)
    return plan


def _rounded(number: int, unit: Scored, round_to: int) -> int:
    """The nearest number of units whose channels are a multiple of a number; all of them where there is none."""
    every = round_to // math.gcd(round_to, unit.size)  # units that make a multiple
    total = unit.group.units
    least = max(every, math.ceil(LEAST_SHARE * total / every) * every)
    nearest = max(least, round(number / every) * every)
    return nearest if nearest < total else total


def _kept(model: nn.Module, units: Sequence[Scored], plan: Plan) -> Dict[str, Kept]:
    """What each layer keeps by a plan."""
    gone: Dict[Tuple[str, str], List[torch.Tensor]] = {}
    for unit, keep in zip(units, plan):
        if not keep.all():
            for member in unit.group.members:
                gone.setdefault((member.name, member.side), []).append(member.indices[~keep].flatten())
    kept: Dict[str, Kept] = {}
    for (name, side), parts in gone.items():
        stays = torch.ones(width_of(layer_of(model, name), side), dtype=torch.bool)
        stays[torch.cat(parts)] = False
        kept[name] = kept.get(name, Kept())._replace(**{f'{side}s': stays.nonzero().flatten()})
    return kept


def _gmacs(model: nn.Module, kept: Optional[Mapping[str, Kept]] = None) -> float:
    """Multiply-adds of an image in billions, of a model from which something was cut."""
    size = get_model_input_config(model)['input_size']
    if kept is None:
        return count_gmacs(model, size)
    twin = copy.deepcopy(model).to('meta')
    cut(twin, kept)
    if hasattr(twin, 'record_widths'):
        twin.record_widths()
    return count_gmacs(twin, size)


# afterwards

@torch.no_grad()
def _check_alike(model: nn.Module, smaller: nn.Module, kept: Mapping[str, Kept]) -> None:
    """Make sure that a model without channels answers as the one in which nothing reads them.

    Norms over several channels are left out of both: there the channels that remain answer otherwise.

    Raises:
        PSTError: If it does not: some channels hang together that nobody found.
    """
    masked, smaller = copy.deepcopy(model).eval(), copy.deepcopy(smaller).eval()
    for name, (ins, _) in kept.items():
        if ins is not None:
            for _, tensor, dim in tensors_of(masked, name, 'in'):
                stays = torch.zeros(tensor.shape[dim], dtype=tensor.dtype)
                stays[ins] = 1
                tensor.mul_(stays.reshape(-1, *[1] * (tensor.ndim - 1 - dim)))
    for net in (masked, smaller):
        for module in list(net.modules()):
            if _is_over_channels(module):
                module.forward = lambda x: x
    x = torch.randn(2, *get_model_input_config(model)['input_size'], generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()))
    expected, got = masked(x), smaller(x)
    if not (got - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise PSTError(
            f'{type(model).__name__} cannot be pruned: channels of it hang together in a way that cannot be followed.')


def _is_over_channels(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or type(module).__name__ == 'GlobalResponseNorm'


@torch.no_grad()
def reestimate_norms(model: nn.Module, images: Sequence[torch.Tensor]) -> None:
    """Give batch norms the statistics of images, in place; nothing is trained, and no label is needed.

    Args:
        model: The model; a part of it that behaves otherwise in training does not here.
        images: Batches (B, channels, height, width), prepared for the model.
    """
    training = model.training
    norms = [m for m in model.eval().modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for batch in images:
            model(batch.to(next(model.parameters())))
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        model.train(training)

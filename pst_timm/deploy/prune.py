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

from pst_timm.models.pruned import Kept, cut, layer_of, measured, record_cut, settle, tensors_of, width_of, widths
from pst_timm.utils.channels import Member
from pst_timm.utils.cost import count_gmacs, layer_gmacs
from pst_timm.utils.errors import PSTError

from .importance import IMPORTANCES, Batch, Scored, score_channels

__all__ = ['BY', 'SCOPES', 'prune', 'ratio_for_latency', 'reestimate_norms']

_logger = logging.getLogger(__name__)

SCOPES = ('global', 'uniform')
BY = ('macs', 'channels')
LEAST_SHARE = 0.1  # of the channels of a layer that stay in any case: an empty layer would cut the network in two
SEARCH_STEPS = 20
LATENCY_STEPS = 5
LATENCY_ROUNDS = 20
TOLERANCE = 1e-3  # of the largest output, between what is cut and what is masked

Plan = Tuple[int, ...]
"""How many units of each group stay."""


def prune(
        model: nn.Module,
        ratio: float = 0.5,
        importance: str = 'l2',
        scope: str = 'uniform',
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
    first, whole = widths(model), _gmacs(model)
    for step in range(1, steps + 1):
        cutter = _Cutter(model, score_channels(model, importance, images), first, scope, round_to)
        level = ratio * step / steps
        plan = cutter.plan(level) if by == 'channels' else cutter.plan_for(whole * (1 - level))
        model = _pruned(model, cutter.kept(plan))
        if images:
            reestimate_norms(model, [batch for batch, _ in images])
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


# how much is cut of what

class _Cutter:
    """Plans for a model: of each group as many units stay as there are in the plan, the best of them."""

    def __init__(
            self,
            model: nn.Module,
            scored: Sequence[Scored],
            first: Mapping[str, Any],
            scope: str,
            round_to: int,
    ):
        """
        Args:
            model: The model.
            scored: What can be cut of it.
            first: The widths of its layers before anything was cut.
            scope: 'global' or 'uniform'.
            round_to: What widths are multiples of.
        """
        self.model, self.scored, self.scope = model, scored, scope
        now = widths(model)
        self.first: List[float] = []
        """Units of each group before anything was cut."""
        for found in scored:
            then, width = (w[-1] if isinstance(w, list) else w for w in (
                table[_leaving(found).name] for table in (first, now)))
            self.first.append(found.group.units * then / width)
        # units whose channels are a multiple
        self.every = [round_to // math.gcd(round_to, found.size) for found in scored]
        self.round_to = round_to
        self.whole = _gmacs(model)
        self.layers = layer_gmacs(model, get_model_input_config(model)['input_size'])

    def plan(self, level: float) -> Plan:
        """What stays if so much of what there was goes, from 0 to 1."""
        if self.scope == 'uniform':
            wanted = [first * (1 - level) for first in self.first]
        else:
            # by the channel, since a unit may be many
            scores, order = torch.cat([found.scores.repeat_interleave(found.size) for found in self.scored]).sort()
            stays = round((1 - level) * sum(first * found.size for first, found in zip(self.first, self.scored)))
            best = torch.zeros(len(scores), dtype=torch.bool)
            best[order[max(len(scores) - stays, 0):]] = True
            parts = best.split([found.group.units * found.size for found in self.scored])
            wanted = [part.sum().item() / found.size for part, found in zip(parts, self.scored)]
        return tuple(map(self._rounded, range(len(self.scored)), wanted))

    def _rounded(self, i: int, number: float) -> int:
        """The nearest number of units whose channels are a multiple; all of them where there is none."""
        every, units = self.every[i], self.scored[i].group.units
        least = max(every, math.ceil(LEAST_SHARE * self.first[i] / every) * every)
        return min(max(least, round(number / every) * every), units)

    def plan_for(self, gmacs: float) -> Plan:
        """The plan that cuts least of those with at most so many multiply-adds.

        Raises:
            Unreachable: If there is none.
        """
        low, high = 0., 1.
        least = self.gmacs(self.plan(high))
        if least > gmacs:
            raise Unreachable(
                f'{least / self.whole:.1%} of the multiply-adds of this {type(self.model).__name__} are left '
                f'at least, as attention stays whole, widths are multiples of {self.round_to}, and {LEAST_SHARE:.0%} '
                f'of every layer stays: ask for less, or for finer widths (--round-to).')
        for _ in range(SEARCH_STEPS):
            level = (low + high) / 2
            low, high = (low, level) if self.gmacs(self.plan(level)) <= gmacs else (level, high)
        # where many layers change at once, as many as are needed do
        more, enough = self.plan(low), self.plan(high)
        first, last = 0, len(more)
        while first < last:
            middle = (first + last) // 2
            mixed = enough[:middle] + more[middle:]
            first, last = (first, middle) if self.gmacs(mixed) <= gmacs else (middle + 1, last)
        if first == 0:
            return more
        # and the last of them is the one that oversteps least
        begun = enough[:first - 1] + more[first - 1:]
        plans = [begun[:i] + enough[i:i + 1] + begun[i + 1:] for i in range(first - 1, len(more))]
        return max((plan for plan in plans if self.gmacs(plan) <= gmacs), key=self.gmacs)

    def gmacs(self, plan: Plan) -> float:
        """Multiply-adds of an image in billions by a plan."""
        stays: Dict[str, Dict[str, float]] = {}
        for (group, _, _), number in zip(self.scored, plan):
            for member in group.members:
                if member.name in self.layers:
                    gone = (group.units - number) * member.indices.shape[1]
                    sides = stays.setdefault(member.name, {'in': 1., 'out': 1.})
                    sides[member.side] -= gone / width_of(layer_of(self.model, member.name), member.side)
        saved = 0.
        for name, sides in stays.items():
            # each output of a grouped convolution reads as many inputs as before
            grouped = getattr(layer_of(self.model, name), 'groups', 1) > 1
            saved += self.layers[name] * (1 - sides['out'] * (1. if grouped else sides['in']))
        return self.whole - saved

    def kept(self, plan: Plan) -> Dict[str, Kept]:
        """What each layer keeps by a plan."""
        gone: Dict[Tuple[str, str], List[torch.Tensor]] = {}
        for (group, scores, _), number in zip(self.scored, plan):
            worst = scores.argsort(stable=True)[:group.units - number]
            for member in group.members if len(worst) else ():
                gone.setdefault((member.name, member.side), []).append(member.indices[worst].flatten())
        kept: Dict[str, Kept] = {}
        for (name, side), parts in gone.items():
            stays = torch.ones(width_of(layer_of(self.model, name), side), dtype=torch.bool)
            stays[torch.cat(parts)] = False
            kept[name] = kept.get(name, Kept())._replace(**{f'{side}s': stays.nonzero().flatten()})
        return kept


def _leaving(scored: Scored) -> Member:
    """The first layer that the channels leave."""
    return next(member for member in scored.group.members if member.side == 'out')


def _gmacs(model: nn.Module) -> float:
    return count_gmacs(model, get_model_input_config(model)['input_size'])


# the cut itself

def _pruned(model: nn.Module, kept: Mapping[str, Kept]) -> nn.Module:
    """A copy of a model with what it keeps."""
    smaller = copy.deepcopy(model).eval()
    try:
        before = measured(model)
        cut(smaller, kept)
        settle(smaller, before)
        record_cut(smaller, model)
    except ValueError as e:
        raise PSTError(f'{type(model).__name__} cannot be pruned: {e}') from e
    _check_alike(model, smaller, kept)
    return smaller


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
                stays = torch.zeros(tensor.shape[dim], dtype=tensor.dtype, device=tensor.device)
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
        # alone, what one image is pooled to has no variance
        for batch in [batch for batch in images if len(batch) > 1] or images:
            model(batch.to(next(model.parameters())))
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        model.train(training)

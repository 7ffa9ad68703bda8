"""Sparsity training: a group lasso on the scales of batch norms, which empties channels that can then be cut.

Channels that hang together, such as those that a residual connection adds up, are one group, since they can only be cut
together (https://arxiv.org/abs/2301.12900). The penalty is `weight` times the sum over the groups of the norm of their
scales. Its gradient is added as the optimizer steps: to the gradients of all batches and processes together, without a
loss scaler's factor, and after they were clipped.
"""
import copy
import importlib.util
from argparse import Namespace
from contextlib import nullcontext
from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
from timm.optim import get_optimizer_info
from torch.nn.modules.batchnorm import _BatchNorm

from pst_timm.utils.channels import Group, channel_groups
from pst_timm.utils.errors import PSTError

from .protocols import Adjustable, Prunable

__all__ = ['CoupledScales', 'Sparsity', 'check_sparsity', 'coupled_scales', 'cuttable_groups']

MISSING = "--sparsity-weight needs Torch-Pruning, to know which channels hang together: pip install 'pst_timm[prune]'."


class CoupledScales(NamedTuple):
    """Scales of batch norms, as places in the vector of all of them, one after the other."""
    names: List[str]
    """Names of the parameters, in the order of that vector."""
    places: torch.Tensor
    """int64 (groups, scales of the largest group): the scales of each group; -1 where a group has fewer."""


def check_sparsity(args: Namespace) -> None:
    """Make sure, before the work, that a penalty can be had.

    Raises:
        PSTError: If what it needs is not installed, or the optimizer differentiates the gradients again.
    """
    if importlib.util.find_spec('torch_pruning') is None:
        raise PSTError(MISSING)
    if get_optimizer_info(args.opt.lower().split('_')[-1]).second_order:
        raise PSTError(
            f'--opt {args.opt} needs second derivatives, which the penalty of --sparsity-weight does not have: choose '
            f'another optimizer.')


def cuttable_groups(model: nn.Module, input_size: Sequence[int]) -> List[Group]:
    """The channels of a model that can be cut, followed with its attention at its plainest; see `channel_groups`.

    Args:
        model: The model; not changed.
        input_size: Channels, height and width of an image.
    """
    twin = copy.deepcopy(model)
    if hasattr(twin, 'set_grad_checkpointing'):
        twin.set_grad_checkpointing(False)  # it would hide the graph
    plainest = twin.with_settings(**twin.sweep_settings([0])[0]) if isinstance(twin, Adjustable) else nullcontext()
    with plainest:
        return channel_groups(
            twin, torch.empty(1, *input_size), twin.unprunable() if isinstance(twin, Prunable) else ())


def coupled_scales(model: nn.Module, input_size: Sequence[int], name: str) -> CoupledScales:
    """Find the batch norms whose channels can be cut, and which of their channels hang together.

    Args:
        model: The model; not changed.
        input_size: Channels, height and width of an image.
        name: What the user calls the model.

    Raises:
        PSTError: If its channels cannot be followed, or none of those that can be cut has a batch norm that is trained.
    """
    groups = cuttable_groups(model, input_size)
    norms = {
        n: m for n, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.weight is not None and m.weight.requires_grad}
    found = [[member for member in group.members if member.name in norms] for group in groups]
    names = list(dict.fromkeys(member.name for members in found for member in members))
    if not names:
        raise PSTError(
            f'--sparsity-weight shrinks the scales of batch norms, and {name} has none that are trained and whose '
            f'channels can be cut: leave it out, or train another model.')
    start, starts = 0, {}
    for n in names:
        starts[n] = start
        start += norms[n].num_features
    rows = [
        torch.cat([starts[member.name] + member.indices for member in members], dim=1) for members in found if members]
    width = max(row.shape[1] for row in rows)
    places = torch.cat([nn.functional.pad(row, (0, width - row.shape[1]), value=-1) for row in rows])
    return CoupledScales([f'{n}.weight' for n in names], places)


class Sparsity:
    """The penalty on the scales of a model, as a gradient that is added before each step of its optimizer."""

    def __init__(self, scales: CoupledScales, model: nn.Module, weight: float):
        """
        Args:
            scales: From `coupled_scales`, of this model before it was moved or wrapped.
            model: The model, where it is trained.
            weight: Weight of the penalty in the loss.
        """
        parameters = dict(model.named_parameters())
        self.parameters = [parameters[name] for name in scales.names]
        self.weight = weight
        device, total = self.parameters[0].device, sum(p.numel() for p in self.parameters)
        # the last place, beyond all scales, is where a group has fewer than others
        self.places = torch.where(scales.places < 0, total, scales.places).to(device)
        rows = torch.arange(len(scales.places)).unsqueeze(1).expand_as(scales.places)
        group = torch.full((total + 1,), len(scales.places))  # of each scale; one more for those in none
        group[self.places.cpu()] = rows
        self.group = group[:total].to(device)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient before each step of an optimizer from now on."""
        # timm's Lookahead is no optimizer of torch's, and steps one
        getattr(optimizer, '_base_optimizer', optimizer).register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        scales, norms = self._norms()
        norms = torch.cat([norms, norms.new_full((1,), float('inf'))])  # no force on what is in no group
        # zero has no slope to one side: an emptied channel stays so unless the loss says otherwise
        gradient = self.weight * torch.where(scales == 0, 0., scales / norms[self.group])
        factor = getattr(optimizer, 'grad_scale', None)  # of a loss scaler, which a fused optimizer takes out itself
        gradient = gradient if factor is None else gradient * factor
        for p, part in zip(self.parameters, gradient.split([p.numel() for p in self.parameters])):
            if p.requires_grad:
                part = part.to(p.dtype)
                p.grad = part if p.grad is None else p.grad.add_(part)

    def _norms(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """All scales, and the norm of each group."""
        scales = torch.cat([p.detach().float() for p in self.parameters])
        return scales, torch.cat([scales, scales.new_zeros(1)])[self.places].norm(dim=1)

    def report(self) -> str:
        """In a sentence, how far the scales have shrunk."""
        norms = self._norms()[1]
        small = (norms < 0.01 * norms.max()).float().mean().item()
        return f'penalty {self.weight * norms.sum().item():.4g}, {small:.0%} of {len(norms)} channels all but empty'

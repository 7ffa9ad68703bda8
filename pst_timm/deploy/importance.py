"""How much each channel of a model matters, for those that can be cut."""
import copy
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import get_model_input_config
from torch.nn.modules.batchnorm import _BatchNorm

from pst_timm.engine.sparsity import cuttable_groups
from pst_timm.models.pruned import tensors_of
from pst_timm.utils.channels import Group, Member
from pst_timm.utils.errors import PSTError

__all__ = ['IMPORTANCES', 'Batch', 'Scored', 'score_channels']

IMPORTANCES = ('l2', 'bn', 'taylor')

Batch = Tuple[torch.Tensor, torch.Tensor]
"""Images (B, channels, height, width), prepared for the model, and their labels (B,)."""


class Scored(NamedTuple):
    """Channels that can be cut, and how much they matter."""
    group: Group
    scores: torch.Tensor
    """Of each unit (units,)."""
    size: int
    """Channels of a unit, in the layer where it has the most."""


def score_channels(model: nn.Module, importance: str, images: Optional[Sequence[Batch]] = None) -> List[Scored]:
    """The groups of channels that can be cut from a model, with scores.

    Args:
        model: The model; left as it is.
        importance: 'l2', 'bn' or 'taylor', see `prune`.
        images: What 'taylor' is computed on.

    Raises:
        PSTError: If its channels cannot be followed, none can be cut, or it has no batch norms to go by.
    """
    groups = cuttable_groups(model, get_model_input_config(model)['input_size'])
    if not groups:
        raise PSTError(f'{type(model).__name__} has no channels that can be cut.')
    if importance == 'taylor':
        scores = _taylor(copy.deepcopy(model).eval(), groups, images)
    else:
        scores = [_l2(model, group) for group in groups]
        if importance == 'bn':
            scores = _with_norms(model, groups, scores)
    return [
        Scored(group, score, max(member.indices.shape[1] for member in group.members))
        for group, score in zip(groups, scores)]


def _weights(model: nn.Module, group: Group) -> Iterator[Tuple[Member, nn.Parameter, int]]:
    """The weights of a group, without biases and statistics, and which of their dimensions is the channels."""
    for member in group.members:
        for key, tensor, dim in tensors_of(model, member.name, member.side):
            if isinstance(tensor, nn.Parameter) and not key.endswith('.bias'):
                yield member, tensor, dim


def _per_unit(tensor: torch.Tensor, dim: int, indices: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that belongs to each unit (units, numbers)."""
    rows = tensor.movedim(dim, 0).flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)
    return rows[indices.to(rows.device)].flatten(1)


@torch.no_grad()
def _l2(model: nn.Module, group: Group) -> torch.Tensor:
    """The size of the weights of each unit, every layer counted alike."""
    total = torch.zeros(group.units)
    for member, tensor, dim in _weights(model, group):
        sizes = _per_unit(tensor, dim, member.indices).float().square().sum(1).cpu()
        total += sizes / sizes.mean().clamp(min=1e-12)
    return _relative(total.sqrt())


def _relative(scores: torch.Tensor) -> torch.Tensor:
    """Scores of a group over their mean: those of another group are of another size."""
    return scores / scores.mean().clamp(min=1e-12)


@torch.no_grad()
def _with_norms(model: nn.Module, groups: Sequence[Group], others: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """The scales of the batch norms of each unit; for groups without any the other scores, brought to their size."""
    modules = dict(model.named_modules())
    found: List[Optional[torch.Tensor]] = []
    for group in groups:
        squares = [
            modules[m.name].weight.float().square()[m.indices].mean(1).cpu()
            for m in group.members
            if isinstance(modules.get(m.name), _BatchNorm) and modules[m.name].weight is not None]
        found.append(torch.stack(squares).mean(0).sqrt() if squares else None)
    there = [score for score in found if score is not None]
    if not there:
        raise PSTError(
            f"{type(model).__name__} has no batch norms whose scales could tell what matters: choose 'l2' or 'taylor'.")
    usual = torch.cat(there).median()
    return [other * usual if score is None else score for score, other in zip(found, others)]


def _taylor(model: nn.Module, groups: Sequence[Group], images: Sequence[Batch]) -> List[torch.Tensor]:
    """The change of the loss, to the first order, if a unit were not there; root of the mean square over batches."""
    model.requires_grad_(True)
    totals = [torch.zeros(group.units) for group in groups]
    for batch, labels in images:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            logits = model(batch.to(next(model.parameters())))
            F.cross_entropy(logits, labels.to(logits.device)).backward()
        with torch.no_grad():
            for group, total in zip(groups, totals):
                change = torch.zeros(group.units)
                for member, tensor, dim in _weights(model, group):
                    # what makes the channel: the same change again is in what reads it
                    if member.side == 'out' and tensor.grad is not None:
                        change += _per_unit(tensor * tensor.grad, dim, member.indices).float().sum(1).cpu()
                total += change.square()
    return [_relative((total / len(images)).sqrt()) for total in totals]

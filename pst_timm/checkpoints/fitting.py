"""Whether weights are those of a model, and where they are not."""
from typing import Collection, Dict, List

import torch
import torch.nn as nn

from pst_timm.utils.errors import PSTError

__all__ = ['load_weights', 'misfits']


def misfits(
        own: Dict[str, torch.Tensor],
        weights: Dict[str, torch.Tensor],
        optional: Collection[str] = (),
) -> List[str]:
    """What keeps weights from fitting a state dict, in words; empty if they fit.

    Args:
        own: State dict of the model.
        weights: State dict to load.
        optional: Names that need not be there.
    """
    missing = [k for k in own if k not in weights and k not in optional]
    surplus = [k for k in weights if k not in own]
    differ = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    found: List[str] = []
    if missing:
        found.append(f'{len(missing)} tensors are missing (the first: {missing[0]})')
    if surplus:
        found.append(f'{len(surplus)} are unknown to it (the first: {surplus[0]})')
    if differ:
        found.append(
            f'{len(differ)} have another shape (the first: {differ[0]}, {tuple(weights[differ[0]].shape)} where '
            f'{tuple(own[differ[0]].shape)} was expected)')
    return found


def load_weights(
        model: nn.Module,
        weights: Dict[str, torch.Tensor],
        source: str,
        hint: str,
        optional: Collection[str] = (),
) -> None:
    """Load weights into a model; nothing is changed unless all of them fit.

    Args:
        model: The model.
        weights: Its state dict.
        source: What the weights are called in the message.
        hint: The end of the message, what to do.
        optional: Names that need not be there.

    Raises:
        PSTError: If they do not fit.
    """
    found = misfits(model.state_dict(), weights, optional)
    if found:
        raise PSTError(f'{source}: {"; ".join(found)}. {hint}')
    model.load_state_dict(weights, strict=not optional)

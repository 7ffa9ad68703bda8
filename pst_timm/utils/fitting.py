"""Whether weights are those of a model, and where they are not."""
from typing import Collection, Dict, List

import torch
import torch.nn as nn

from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

__all__ = ['check_fit', 'load_weights', 'misfits']

COUNTER = '.num_batches_tracked'


def misfits(
        own: Dict[str, torch.Tensor],
        weights: Dict[str, torch.Tensor],
        optional: Collection[str] = (),
) -> List[str]:
    """What keeps weights from fitting a state dict, in words; empty if they fit.

    Args:
        own: State dict of the model.
        weights: State dict to load.
        optional: Names that need not be there; counters of batch norms, which older files lack, never need to be.
    """
    missing = [k for k in own if k not in weights and k not in optional and not k.endswith(COUNTER)]
    surplus = [k for k in weights if k not in own]
    differ = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    # whole numbers are what a quantised model has, whose scales are elsewhere
    whole = [
        k for k in own if k in weights and own[k].is_floating_point() and not weights[k].is_floating_point()]
    found: List[str] = []
    if missing:
        found.append(f'{len(missing)} tensors are missing (the first: {missing[0]})')
    if surplus:
        found.append(f'{len(surplus)} are unknown to it (the first: {plain(surplus[0], 200)})')
    if differ:
        found.append(
            f'{len(differ)} have another shape (the first: {differ[0]}, {tuple(weights[differ[0]].shape)} where '
            f'{tuple(own[differ[0]].shape)} was expected)')
    if whole:
        found.append(
            f'{len(whole)} have another type (the first: {whole[0]}, {weights[whole[0]].dtype} where '
            f'{own[whole[0]].dtype} was expected)')
    return found


def check_fit(
        own: Dict[str, torch.Tensor],
        weights: Dict[str, torch.Tensor],
        source: str,
        hint: str,
        optional: Collection[str] = (),
) -> None:
    """Make sure that weights fit a state dict; arguments and errors as in `load_weights`."""
    found = misfits(own, weights, optional)
    if found:
        raise PSTError(f'{source}: {"; ".join(found)}. {hint}')


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
    own = model.state_dict()
    check_fit(own, weights, source, hint, optional)
    model.load_state_dict(weights, strict=own.keys() <= weights.keys())

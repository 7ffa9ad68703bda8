"""The weights of a plain timm model, from wherever they are, in the trunk of the model with PST."""
import os
from typing import Dict, Union

import torch
import torch.nn as nn

from pst_timm.models import TrunkLoad, copy_trunk
from pst_timm.utils.errors import PSTError

from .building import plain_weights
from .reading import PathLike, clean_names, find_weights, is_file, read_checkpoint

__all__ = ['load_trunk']


def load_trunk(model: nn.Module, source: Union[PathLike, Dict[str, torch.Tensor]]) -> TrunkLoad:
    """Load the weights of the plain model into the trunk of a model with PST, see `pst_timm.models.copy_trunk`.

    Args:
        model: A model with PST, or the feature extractor that `features_only=True` makes of one.
        source: A timm model name with pretrained weights ('resnet50.a1_in1k'), a file or folder that
            `read_checkpoint` reads, or a state dict.

    Returns:
        The keys loaded, left untouched and ignored.

    Raises:
        ValueError: If the source is not a model of the trunk's depth and width (names the first layer that differs).
        PSTError: If the source is a file that is not there or no checkpoint, or a name whose weights cannot be had.
        TypeError: If the source is none of these.
    """
    weights = _read_source(source, getattr(model, 'model', model))
    whole = [k for k, v in weights.items() if v.ndim and not v.is_floating_point()]
    if whole:
        raise PSTError(f'{whole[0]} in the source holds {weights[whole[0]].dtype}, where a trunk has floating point.')
    return copy_trunk(model, weights)


def _read_source(source: Union[PathLike, Dict[str, torch.Tensor]], net: nn.Module) -> Dict[str, torch.Tensor]:
    if isinstance(source, dict):
        return clean_names(find_weights(source)[0])
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f'source must be a model name, a file or a state dict, got {type(source).__name__}.')
    if is_file(source):
        return read_checkpoint(source).weights
    return plain_weights(net, str(source))

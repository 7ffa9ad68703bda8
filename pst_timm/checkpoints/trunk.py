"""The weights of a plain timm ResNet, from wherever they are, in the trunk of a ResNet-PST."""
import os
from pathlib import Path
from typing import Dict, Union

import torch
import torch.nn as nn
from timm.models import clean_state_dict

from pst_timm.models import TrunkLoad, copy_trunk

from .building import create_model
from .reading import PathLike, is_file_name, pick_weights, read_checkpoint

__all__ = ['load_trunk']


def load_trunk(model: nn.Module, source: Union[PathLike, Dict[str, torch.Tensor]]) -> TrunkLoad:
    """Load the weights of a ResNet of the same trunk into a ResNet-PST, see `pst_timm.models.copy_trunk`.

    Args:
        model: A ResNet-PST, or the feature extractor that `features_only=True` makes of one.
        source: A timm model name with pretrained weights ('resnet50.a1_in1k'), a file or folder that
            `read_checkpoint` reads, or a state dict.

    Returns:
        The keys loaded, left untouched and ignored.

    Raises:
        ValueError: If the source is not a ResNet of the model's depth and width (names the first layer that differs).
        PSTError: If the source is a file that is not there or no checkpoint, or a name whose weights cannot be had.
        TypeError: If the source is none of these.
    """
    return copy_trunk(model, _read_source(source))


def _read_source(source: Union[PathLike, Dict[str, torch.Tensor]]) -> Dict[str, torch.Tensor]:
    if isinstance(source, dict):
        # a training checkpoint keeps its weights one level down
        key = pick_weights(source)
        return clean_state_dict(source[key] if key else source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f'source must be a model name, a file or a state dict, got {type(source).__name__}.')
    if Path(source).exists() or is_file_name(source):
        return read_checkpoint(source).weights
    return create_model(str(source), pretrained=True).state_dict()

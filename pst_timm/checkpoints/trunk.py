"""Load the weights of a plain timm ResNet into the trunk of a ResNet-PST."""
import os
from pathlib import Path
from typing import Dict, Union

import timm
import torch
import torch.nn as nn
from timm.models import clean_state_dict, load_state_dict

from pst_timm.models import TrunkLoad, copy_trunk

__all__ = ['TrunkLoad', 'load_trunk']

# what a name ends with that can only be meant as a file
FILES = ('.safetensors', '.pth', '.pt', '.tar', '.bin', '.ckpt')


def _read_source(source: Union[str, os.PathLike, Dict[str, torch.Tensor]]) -> Dict[str, torch.Tensor]:
    if isinstance(source, dict):
        # a training checkpoint keeps its weights one level down
        for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
            if isinstance(source.get(key), dict):
                return source[key]
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f'source must be a model name, a file or a state dict, got {type(source).__name__}.')
    if os.path.isfile(source):
        try:
            return load_state_dict(os.fspath(source), device='cpu')
        except Exception as e:  # whatever the unpickler says, the file is not a state dict that may be trusted
            raise ValueError(f'{source} cannot be read as a state dict: {e!r}') from e
    if isinstance(source, os.PathLike) or Path(source).suffix in FILES:
        raise FileNotFoundError(f'No checkpoint at {source}.')
    return timm.create_model(source, pretrained=True).state_dict()


def load_trunk(model: nn.Module, source: Union[str, os.PathLike, Dict[str, torch.Tensor]]) -> TrunkLoad:
    """Copy the weights of a ResNet of the same trunk into a ResNet-PST.

    Everything is compared before anything is copied: after an error the model is as it was. A first convolution for
    another number of input channels is adapted as timm does.

    Args:
        model: A ResNet-PST, or the feature extractor that `features_only=True` makes of one.
        source: A timm model name with pretrained weights ('resnet50.a1_in1k'), a file (.safetensors, .pth, ...), or
            a state dict.

    Returns:
        The keys loaded, left untouched and ignored.

    Raises:
        ValueError: If the source is not a ResNet of the model's depth and width (names the first layer that differs),
            or a file that is no state dict.
        FileNotFoundError: If the source is a file that does not exist.
        TypeError: If the source is none of these.
    """
    return copy_trunk(model, clean_state_dict(_read_source(source)))

"""The weights of a plain timm ResNet in the trunk of a ResNet-PST."""
import re
from typing import Dict, List, NamedTuple

import torch
import torch.nn as nn
from timm.models import adapt_input_conv

__all__ = ['TrunkLoad', 'copy_trunk']

TRUNK = re.compile(r'(conv1|bn1|maxpool|layer[1-4])\.')
# a counter that only a cumulative average would read, absent from some converted checkpoints
OPTIONAL = '.num_batches_tracked'


class TrunkLoad(NamedTuple):
    """What `load_trunk` did, as state-dict keys."""
    loaded: List[str]
    """Keys of the model that were given the source's values."""
    untouched: List[str]
    """Keys of the model that kept their values: PST, fusion, head."""
    ignored: List[str]
    """Keys of the source that have no place in the model: its classifier."""

    def __repr__(self) -> str:
        counts = ', '.join(f'{name} {len(keys)}' for name, keys in self._asdict().items())
        return f'{type(self).__name__}({counts})'


def copy_trunk(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> TrunkLoad:
    """Copy the weights of a ResNet of the same trunk into a ResNet-PST; `pst_timm.load_trunk` reads them first.

    Everything is compared before anything is copied: after an error the model is as it was. A first convolution for
    another number of input channels is adapted as timm does.

    Args:
        model: A ResNet-PST, or the feature extractor that `features_only=True` makes of one.
        state_dict: Weights of a plain timm ResNet, under its own names.

    Returns:
        The keys loaded, left untouched and ignored.

    Raises:
        ValueError: If the weights are not those of a ResNet of the model's depth and width (names the first layer that
            differs), or the model has no such trunk.
    """
    net = getattr(model, 'model', model)  # features_only wraps the network under this name
    target = net.state_dict()
    wanted = [k for k in target if TRUNK.match(k)]
    if not wanted:
        raise ValueError(f'{type(net).__name__} has no ResNet trunk (conv1, bn1, layer1 to layer4) to load into.')
    stages = {k.split('.')[0] for k in wanted}
    offered = [k for k in state_dict if TRUNK.match(k) and k.split('.')[0] in stages]

    missing = [k for k in wanted if k not in state_dict and not k.endswith(OPTIONAL)]
    if missing:
        raise ValueError(
            f'The source is not a ResNet of this trunk: the model has {missing[0]}, which the source has not '
            f'({len(missing)} of {len(wanted)} trunk keys are missing). Use weights of the same depth and block.')
    surplus = [k for k in offered if k not in target and not k.endswith(OPTIONAL)]
    if surplus:
        raise ValueError(
            f'The source is not a ResNet of this trunk: it has {surplus[0]}, which the model has not '
            f'({len(surplus)} keys too many). Use weights of the same depth and block.')
    weights = {k: state_dict[k] for k in wanted if k in state_dict}
    first = next(k for k in wanted if target[k].ndim == 4)
    in_chans = target[first].shape[1]
    if weights[first].shape[1] != in_chans:
        weights[first] = adapt_input_conv(in_chans, weights[first])
    for k, v in weights.items():
        if v.shape != target[k].shape:
            raise ValueError(
                f'The source is not a ResNet of this trunk: {k} is {tuple(v.shape)} in the source and '
                f'{tuple(target[k].shape)} in the model. Use weights of the same width.')

    net.load_state_dict(weights, strict=False)
    return TrunkLoad(
        loaded=list(weights),
        untouched=[k for k in target if k not in weights],
        ignored=[k for k in state_dict if k not in weights],
    )

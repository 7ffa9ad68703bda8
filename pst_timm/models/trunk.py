"""The weights of a plain timm model in the trunk of the model with PST that is made of it."""
import re
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.models import adapt_input_conv

from pst_timm.utils.errors import did_you_mean

__all__ = ['PRETRAINED_TRUNK', 'TrunkLoad', 'copy_trunk', 'load_pretrained_trunk', 'pretrained_name']

RESNET = re.compile(r'(conv1|bn1|maxpool|layer[1-4])\.')
NESTED = 'trunk.'  # where a model of any other trunk keeps it
# a counter that only a cumulative average would read, absent from some converted checkpoints
OPTIONAL = '.num_batches_tracked'
# the argument of timm.create_model for what a model begins with; it has no say in what the model is like
PRETRAINED_TRUNK = 'pretrained_trunk'
PREPROCESSING = ('crop_pct', 'interpolation', 'mean', 'std')


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
    """Copy the weights of a plain model into the trunk of a model with PST; `pst_timm.load_trunk` reads them first.

    Everything is compared before anything is copied: after an error the model is as it was. A first convolution for
    another number of input channels is adapted as timm does.

    Args:
        model: A model with PST, or the feature extractor that `features_only=True` makes of one.
        state_dict: Weights of the plain timm model that the trunk is, under its own names; or of a model with PST over
            this trunk.

    Returns:
        The keys loaded, left untouched and ignored.

    Raises:
        ValueError: If the weights are not those of a model of the trunk's depth and width (names the first layer that
            differs), or the model has no such trunk.
    """
    net = getattr(model, 'model', model)  # features_only wraps the network under this name
    target = net.state_dict()
    kind, prefix, wanted = _wanted(net, target)
    # by the names that the plain model has
    nested = any(k.startswith(NESTED) for k in state_dict) if prefix else False
    plain = {k.removeprefix(prefix): k for k in wanted}
    source = {k.removeprefix(NESTED) if nested else k: v for k, v in state_dict.items()}
    known = _names(net, target)

    missing = [k for k in plain if k not in source and not k.endswith(OPTIONAL)]
    if missing:
        raise ValueError(
            f'The source is not a {kind} of this trunk: the model has {missing[0]}, which the source has not '
            f'({len(missing)} of {len(wanted)} trunk keys are missing). Use weights of the same depth and block.')
    surplus = [k for k in source if _of_a_trunk(net, k) and k not in known and not k.endswith(OPTIONAL)]
    if surplus and not nested:
        raise ValueError(
            f'The source is not a {kind} of this trunk: it has {surplus[0]}, which the model has not '
            f'({len(surplus)} keys too many). Use weights of the same depth and block.')
    weights = {k: source[k] for k in plain if k in source}
    _adapt_input(net, weights, {k: target[name] for k, name in plain.items()})
    for k, v in weights.items():
        expected = target[plain[k]]
        if v.shape != expected.shape:
            raise ValueError(
                f'The source is not a {kind} of this trunk: {k} is {tuple(v.shape)} in the source and '
                f'{tuple(expected.shape)} in the model. Use weights of the same width.')

    net.load_state_dict({plain[k]: v for k, v in weights.items()}, strict=False)
    loaded = [plain[k] for k in weights]
    return TrunkLoad(
        loaded=loaded,
        untouched=[k for k in target if k not in set(loaded)],
        ignored=[k for k in state_dict if (k.removeprefix(NESTED) if nested else k) not in weights],
    )


def nests_trunk(net: nn.Module) -> bool:
    """Whether a model with PST keeps its trunk as a module of its own."""
    return bool(getattr(net, 'plain_name', '')) and isinstance(getattr(net, 'trunk', None), nn.Module)


def _wanted(net: nn.Module, target: Dict[str, torch.Tensor]) -> Tuple[str, str, List[str]]:
    """What a trunk is called, what its names begin with, and its keys."""
    if nests_trunk(net):
        return net.plain_name, NESTED, [k for k in target if k.startswith(NESTED)]
    wanted = [k for k in target if RESNET.match(k)]
    if not wanted:
        raise ValueError(
            f'{type(net).__name__} has no trunk to load into: neither that of a ResNet (conv1, bn1, layer1 to layer4) '
            f'nor one under the name trunk.')
    return 'ResNet', '', wanted


def _names(net: nn.Module, target: Dict[str, torch.Tensor]) -> Set[str]:
    """What the plain model may have: all that is in the trunk, and in one that is not pruned."""
    if not nests_trunk(net):
        return set(target)
    with torch.device('meta'):
        return set(timm.create_model(net.plain_name, **net.trunk_kwargs).state_dict())


def _of_a_trunk(net: nn.Module, key: str) -> bool:
    """Whether the name of a weight in the source belongs where the model has its trunk."""
    if nests_trunk(net):
        return True
    stages = {k.split('.')[0] for k in net.state_dict() if RESNET.match(k)}
    return bool(RESNET.match(key)) and key.split('.')[0] in stages


def _adapt_input(net: nn.Module, weights: Dict[str, torch.Tensor], target: Dict[str, torch.Tensor]) -> None:
    """Fit the first convolutions to the model's number of input channels."""
    convs = first_convs(getattr(net, 'trunk', net))
    names = [f'{name}.weight' for name in convs] or [next((k for k, v in target.items() if v.ndim == 4), '')]
    for k in names:
        if k in weights and weights[k].ndim == 4 and weights[k].shape[1] != target[k].shape[1]:
            try:
                weights[k] = adapt_input_conv(target[k].shape[1], weights[k])
            except NotImplementedError:
                raise ValueError(
                    f'{k} reads {weights[k].shape[1]} channels and the model {target[k].shape[1]}: only weights of one '
                    f'or three channels can be fitted to another number.') from None


def first_convs(model: nn.Module) -> Tuple[str, ...]:
    """Names of the convolutions that read the image, of a timm model."""
    found = (getattr(model, 'pretrained_cfg', None) or {}).get('first_conv') or ()
    return (found,) if isinstance(found, str) else tuple(found)


def pretrained_name(trunk: str, which: Union[bool, str]) -> str:
    """The name that timm has for weights of a plain model.

    Args:
        trunk: Name of the plain model.
        which: True for those that timm gives by default, a tag, or the whole name with the tag.

    Raises:
        ValueError: If there are no such weights; names the tags that there are.
    """
    name = trunk
    if isinstance(which, str):
        name = which if which.startswith(f'{trunk}.') else f'{trunk}.{which}'
    cfg = timm.get_pretrained_cfg(trunk) if name == trunk else None
    tags = timm.list_pretrained(f'{trunk}.*')
    if name not in tags and not (cfg is not None and cfg.has_weights):
        raise ValueError(
            f'{PRETRAINED_TRUNK}={which!r}: timm has no weights {name}.{did_you_mean(name, tags)} The tags of {trunk}: '
            f'{", ".join(tag.split(".", 1)[1] for tag in tags) or "none"}.')
    return name


def adopt_preprocessing(model: nn.Module, name: str, *given: Any) -> None:
    """Prepare images as the weights in the trunk know them.

    Args:
        model: The model, or a feature extractor.
        name: The name that timm has for the weights.
        given: Pretrained configurations that the caller gave; what they tell stays as it is.
    """
    told, known = timm.get_pretrained_cfg(name), {key for cfg in given if isinstance(cfg, dict) for key in cfg}
    for part in (model, getattr(model, 'model', model)):
        if getattr(part, 'pretrained_cfg', None):
            part.pretrained_cfg.update({key: getattr(told, key) for key in PREPROCESSING if key not in known})


def load_pretrained_trunk(
        model: nn.Module,
        trunk: str,
        which: Union[bool, str] = True,
        cache_dir: Optional[str] = None,
) -> TrunkLoad:
    """Load weights that timm has for the plain model into the trunk of a model with PST.

    timm fetches them, and reads tensors alone; `pst_timm.load_trunk` looks at what is fetched more closely.

    Args:
        model: The model, or the feature extractor that `features_only=True` makes of one.
        trunk: Name of the plain model.
        which: See `pretrained_name`.
        cache_dir: See `timm.create_model`.

    Returns:
        The keys loaded, left untouched and ignored.

    Raises:
        ValueError: If there are no such weights, or they are not those of the trunk.
    """
    kwargs = getattr(getattr(model, 'model', model), 'trunk_kwargs', {})
    source = timm.create_model(pretrained_name(trunk, which), pretrained=True, cache_dir=cache_dir, **kwargs)
    return copy_trunk(model, source.state_dict())

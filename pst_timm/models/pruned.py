"""Any architecture with some of its channels cut out: rebuilt from plain data, the widths of the layers that changed.

    timm.create_model('pruned', arch='resnet18_pst', channels={'layer1.0.conv1': [64, 32], 'layer1.0.bn1': 32, ...})

is a `ResNetPST` whose layers are narrower; the names in its state dict are those of the architecture.
"""
import copy
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, get_model_input_config, register_model
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pst_timm.utils.errors import did_you_mean

from .digest import check_digest, drop_digest
from .fusion import pst_cfg

__all__ = [
    'Channels', 'Kept', 'cut', 'layer_of', 'measured', 'record_cut', 'settle', 'tensors_of', 'width_of',
    'widths',
]

Channels = Mapping[str, Union[int, Sequence[int]]]
"""Widths by name of the layer: [channels in, channels out] of a convolution or linear layer, else a number."""
PLAIN = 'resnet18_pst'  # where it is not said what was pruned
# what a model tells of images and weights, as the architecture has it
FIELDS = (
    'num_classes', 'input_size', 'pool_size', 'fixed_input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean',
    'std', 'first_conv', 'classifier', 'license')


class Kept(NamedTuple):
    """The channels that a layer keeps, in rising order; None for all."""
    ins: Optional[torch.Tensor] = None
    outs: Optional[torch.Tensor] = None


# cutting

def layer_of(model: nn.Module, name: str) -> Union[nn.Module, nn.Parameter]:
    """A layer, or a parameter, by its name.

    Raises:
        ValueError: If there is none.
    """
    owner, _, key = name.rpartition('.')
    try:
        parent = model.get_submodule(owner)
        return parent._parameters[key] if key in parent._parameters else model.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in model.named_modules()]
        raise ValueError(f'{type(model).__name__} has no layer {name!r}.{did_you_mean(name, names)}') from None


def width_of(layer: Union[nn.Module, torch.Tensor], side: str = 'out') -> int:
    """The channels that enter a layer ('in') or leave it ('out').

    Raises:
        ValueError: If it is none that channels can be cut from.
    """
    if isinstance(layer, torch.Tensor):
        return layer.shape[_dim_of(layer)]
    if isinstance(layer, _ConvTransposeNd):
        pass
    elif isinstance(layer, _ConvNd):
        return layer.in_channels if side == 'in' else layer.out_channels
    elif isinstance(layer, nn.Linear):
        return layer.in_features if side == 'in' else layer.out_features
    elif isinstance(layer, _NormBase):
        return layer.num_features
    elif isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    elif isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        return layer.normalized_shape[0]
    raise ValueError(f'Channels cannot be cut from a {type(layer).__name__}.')


def tensors_of(model: nn.Module, name: str, side: str) -> List[Tuple[str, torch.Tensor, int]]:
    """The weights and statistics of a layer that have a part for each channel.

    Args:
        model: The model.
        name: Name of the layer, or of a parameter that is no convolution's, linear layer's or norm's.
        side: 'in' or 'out': whether the channels enter or leave it.

    Returns:
        Name, tensor and dimension of the channels of each; nothing for what enters a grouped convolution, as that is
        one with what leaves it.

    Raises:
        ValueError: If there is no such layer, or none that channels can be cut from.
    """
    layer = layer_of(model, name)
    width = width_of(layer, side)
    if isinstance(layer, torch.Tensor):
        return [(name, layer, _dim_of(layer))]
    if side == 'in':
        return [(f'{name}.weight', layer.weight, 1)] if getattr(layer, 'groups', 1) == 1 else []
    own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    # a counter has no channels
    return [(f'{name}.{key}', tensor, 0) for key, tensor in own if tensor.ndim and tensor.shape[0] == width]


def cut(model: nn.Module, kept: Mapping[str, Kept]) -> None:
    """Cut channels out of a model in place; every layer that they pass has to be told.

    Args:
        model: The model.
        kept: What is kept, by name of a layer; or of a parameter that is no convolution's, linear layer's or norm's.

    Raises:
        ValueError: If there is no such layer, or a grouped convolution would be left with groups of other sizes.
    """
    for name, (ins, outs) in kept.items():
        layer = layer_of(model, name)
        if getattr(layer, 'groups', 1) > 1:
            _check_groups(name, layer, ins, outs)
        for side, indices in (('in', ins), ('out', outs)):
            if indices is not None:
                for key, tensor, dim in tensors_of(model, name, side):
                    _replace(model, key, tensor.detach().index_select(dim, indices.to(tensor.device)))
                _record_width(layer, side, len(indices))


def _check_groups(
        name: str,
        conv: _ConvNd,
        ins: Optional[torch.Tensor],
        outs: Optional[torch.Tensor],
) -> None:
    in_size, out_size = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    chs_in = conv.in_channels if ins is None else len(ins)
    chs_out = conv.out_channels if outs is None else len(outs)
    if chs_in % in_size or chs_out * in_size != chs_in * out_size:
        raise ValueError(
            f'{name} convolves {in_size} channels to {out_size} in each of its groups, which does not make '
            f'{chs_in} channels {chs_out}.')


def _replace(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, key = name.rpartition('.')
    module = model.get_submodule(owner)
    if key in module._buffers:
        module._buffers[key] = value
    else:
        module._parameters[key] = nn.Parameter(value, module._parameters[key].requires_grad)


def _record_width(layer: Union[nn.Module, torch.Tensor], side: str, width: int) -> None:
    """Have a layer tell the width that it has now."""
    if isinstance(layer, _ConvNd):
        if side == 'out':
            layer.groups = layer.groups * width // layer.out_channels if layer.groups > 1 else 1
        setattr(layer, f'{side}_channels', width)
    elif isinstance(layer, nn.Linear):
        setattr(layer, f'{side}_features', width)
    elif isinstance(layer, _NormBase):
        layer.num_features = width
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = width
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (width,)


def _dim_of(tensor: torch.Tensor) -> int:
    """The dimension of a parameter that is its channels: the last that is not 1."""
    return max((i for i, size in enumerate(tensor.shape) if size > 1), default=tensor.ndim - 1)


def widths(model: nn.Module) -> Dict[str, Union[int, List[int]]]:
    """The widths of all layers that have some, as `Channels`."""
    found: Dict[str, Union[int, List[int]]] = {}
    for name, module in model.named_modules():
        try:
            both = isinstance(module, (_ConvNd, nn.Linear))
            found[name] = [width_of(module, 'in'), width_of(module, 'out')] if both else width_of(module)
        except ValueError:
            parameters = module.named_parameters(prefix=name, recurse=False)
            found.update((key, width_of(parameter)) for key, parameter in parameters if parameter.ndim)
    return found


# rebuilding

class Measured(NamedTuple):
    """Channels of the maps of a model."""
    levels: Sequence[int]
    """Of its feature levels; empty where they are not as many as it tells of."""
    features: int
    """Of what `forward_features` gives."""
    hidden: int
    """Of what the classifier reads; of the output where there is none."""


def narrow(model: nn.Module, channels: Channels) -> None:
    """Make layers of a model narrower, in place; its weights are of no use afterwards.

    Args:
        model: A model of timm.
        channels: The widths that the layers are to have.

    Raises:
        ValueError: If there is no such layer, a width is not one from 1 to what it is, or they do not fit together.
    """
    now = widths(model)
    kept = {}
    for name, width in channels.items():
        if name not in now:
            raise ValueError(f'{type(model).__name__} has no layer {name!r} with channels.{did_you_mean(name, now)}')
        old = now[name] if isinstance(now[name], list) else [now[name]]
        new = list(width) if isinstance(width, (list, tuple)) else [width]
        if len(new) != len(old) or any(type(n) is not int or not 1 <= n <= most for n, most in zip(new, old)):
            most = ' and '.join(map(str, old))
            raise ValueError(f'{name} can have at most {most} channels, and at least one; got {width!r}.')
        kept[name] = Kept(*[None] * (2 - len(new)), *map(torch.arange, new))
    before = measured(model)
    cut(model, kept)
    settle(model, before)


def settle(model: nn.Module, before: Measured) -> None:
    """Have a model that was cut know its new widths, by which it tells its levels and makes other classifiers.

    Args:
        model: The model.
        before: What was measured of it before.

    Raises:
        ValueError: If its layers do not fit together.
    """
    if hasattr(model, 'record_widths'):
        model.record_widths()
    now = measured(model)
    for info, old, new in zip(model.feature_info, before.levels, now.levels):
        if info['num_chs'] == old:
            info['num_chs'] = new
    features, hidden = (before.features, now.features), (before.hidden, now.hidden)
    recorded = [(model, dict(num_features=features, head_hidden_size=hidden))]
    if hasattr(getattr(model, 'head', None), 'reset'):  # one of timm's heads
        recorded.append((model.head, dict(in_features=features, num_features=hidden, hidden_size=hidden)))
    for holder, known in recorded:
        for key, (old, new) in known.items():
            if getattr(holder, key, None) == old:
                setattr(holder, key, new)


@torch.no_grad()
def measured(model: nn.Module) -> Measured:
    """Run a model on shapes alone.

    Raises:
        ValueError: If it cannot be run so, for one because its layers do not fit together.
    """
    twin = copy.deepcopy(model).to('meta').eval()
    size = get_model_input_config(model)['input_size']
    x = torch.empty(1, *size, dtype=next(twin.parameters()).dtype, device='meta')
    for name, module in twin.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear, _NormBase)):
            module.register_forward_pre_hook(_input_check(name))
    try:
        with torch.device('meta'):  # for what a model makes on the way
            features = twin.forward_features(x)
            output = twin.forward_head(features)
            levels = twin.forward_intermediates(x, intermediates_only=True, output_fmt='NCHW')
    except Exception as e:  # whatever a model does with maps of widths that nobody foresaw
        reason = ' '.join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f'The layers of this {type(model).__name__} do not fit together: {reason}.') from e
    classifier = twin.get_classifier()
    hidden = getattr(classifier, 'in_features', getattr(classifier, 'in_channels', output.shape[1]))
    last = getattr(twin, 'output_fmt', 'NCHW') == 'NHWC'
    told = [level.shape[1] for level in levels]
    return Measured(told if len(told) == len(twin.feature_info) else [], features.shape[-1 if last else 1], hidden)


def _input_check(name: str) -> Callable[[nn.Module, Tuple[Any, ...]], None]:
    """A hook that compares what a layer takes with what it is given: what is 1 wide would go with anything."""
    def check(module: nn.Module, args: Tuple[Any, ...]) -> None:
        if isinstance(module, nn.Linear):
            takes, given = module.in_features, args[0].shape[-1]
        else:
            takes = module.in_channels if isinstance(module, _ConvNd) else module.num_features
            given = args[0].shape[1]
        if takes != given:
            raise ValueError(f'{name} takes {takes} channels and is given {given}')
    return check


def record_cut(model: nn.Module, wide: nn.Module) -> None:
    """Have a model that was cut tell its checkpoints how it is made again, as an ordinary architecture.

    Args:
        model: The model, from `timm.create_model`.
        wide: The model as it was; it may have been cut before.

    Raises:
        ValueError: If the architecture has an argument of its own by a name that is needed.
    """
    own = dict(getattr(wide, 'own_args', {}))
    taken = [key for key in ('arch', 'channels') if key in getattr(wide, '_model_args', {}) and key not in own]
    if taken:
        raise ValueError(f'it was made with {taken[0]}={wide._model_args[taken[0]]!r}, which has another meaning here.')
    before = widths(wide)
    changed = {name: width for name, width in widths(model).items() if width != before[name]}
    own.update(
        arch=own.get('arch') or wide.pretrained_cfg['architecture'],
        channels={**own.get('channels', {}), **changed})
    model.own_args = own
    model._model_args = {**getattr(model, '_model_args', {}), **own}
    # these are not the weights of that name, nor at that place
    gone = ('tag', 'file', 'source', 'url', 'hf_hub_id', 'hf_hub_filename', 'state_dict')
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in gone}
    model.pretrained_cfg['architecture'] = 'pruned'
    model.default_cfg = model.pretrained_cfg
    drop_digest(model)


def _make(arch: str, channels: Channels, **kwargs: Any) -> nn.Module:
    """An architecture, narrower."""
    model = timm.create_model(arch, **kwargs)
    narrow(model, channels)
    plain = {name: list(width) if isinstance(width, (list, tuple)) else width for name, width in channels.items()}
    model.own_args = {**getattr(model, 'own_args', {}), 'arch': arch, 'channels': plain}
    return model


def _check_arch(arch: Any) -> None:
    if not isinstance(arch, str) or arch == 'pruned' or '.' in arch or ':' in arch or not timm.is_model(arch):
        hint = did_you_mean(arch.split('.')[0], timm.list_models()) if isinstance(arch, str) else ''
        raise ValueError(f'arch={arch!r} is no architecture of timm that could be pruned, named without a tag.{hint}')


default_cfgs = generate_default_cfgs({'pruned.untrained': pst_cfg()})


@register_model
def pruned(
        pretrained: bool = False,
        arch: str = PLAIN,
        channels: Optional[Channels] = None,
        pretrained_cfg: Optional[Dict[str, Any]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Any architecture with fewer channels, see `pst-timm prune`: `arch` names it, `channels` gives the new widths."""
    _check_arch(arch)
    feature_cfg = dict(feature_cls='getter')
    places = ('cache_dir', 'pretrained_model_args', 'feature_cls')
    if not pretrained_cfg or (kwargs.get('features_only') and 'out_indices' not in kwargs):
        with torch.device('meta'):
            wide = timm.create_model(arch, **{k: v for k, v in kwargs.items() if k not in places})
        if kwargs.get('features_only'):
            kwargs.setdefault('out_indices', tuple(wide.feature_info.out_indices))
        if not pretrained_cfg:
            told = {key: wide.pretrained_cfg[key] for key in FIELDS if key in wide.pretrained_cfg}
            pretrained_cfg, pretrained_cfg_overlay = 'untrained', {**told, **(pretrained_cfg_overlay or {})}
    model = build_model_with_cfg(
        _make,
        'pruned',
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=check_digest,
        feature_cfg=feature_cfg,
        arch=arch,
        channels=channels or {},
        **kwargs,
    )
    drop_digest(model)
    return model

"""The one door from a source (model name, hf-hub: name, folder, file) to a model with weights and preprocessing."""
import dataclasses
import logging
import math
import warnings
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config, resolve_input_data_config
from timm.models import get_pretrained_cfg, get_pretrained_cfg_value, resolve_pretrained_cfg

from pst_timm.models import PRETRAINED_TRUNK, adopt_preprocessing, copy_trunk, pretrained_name, reparameterize
from pst_timm.models.digest import check_digest, drop_digest
from pst_timm.models.fusion import own_location
from pst_timm.utils.errors import PSTError, did_you_mean, unknown_tag
from pst_timm.utils.fitting import check_fit, load_weights

from .facts import complete, first_line, look_up, resolve_origin
from .fetching import check_fetchable, find_pretrained
from .reading import WRAPPER, Checkpoint, PathLike, check_finite, check_folder, is_file, read_checkpoint
from .rules import printable
from .trust import check_model_args, check_size, is_local_arch

__all__ = [
    'build_model', 'check_model_name', 'create_model', 'load_model', 'open_checkpoint', 'plain_weights',
    'preprocessing', 'temperature_of', 'told_args',
]

_logger = logging.getLogger(__name__)

# what timm's factories raise for names, arguments and weights that do not fit
REFUSED = (TypeError, ValueError, RuntimeError, AssertionError, OSError, LookupError, AttributeError, ArithmeticError)
# arguments of timm.create_model that have no say in what a model is like
ELSEWHERE = ('pretrained', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir')
SOURCES = ('local-dir:', 'hf-hub:', 'hf_hub:')


def check_model_name(name: str) -> None:
    """Raise a PSTError with the nearest names unless timm knows a model, and weights of that tag."""
    if ':' in name:
        return
    if timm.is_model(name.split('.')[0]):
        tags = timm.models.get_arch_pretrained_cfgs(name)
        if '.' in name and name not in tags:
            raise PSTError(unknown_tag(name, tags))
        return
    raise PSTError(
        f'Unknown model {name!r}.{did_you_mean(name.split(".")[0], timm.list_models())} '
        f'timm.list_models() lists all; a package with more is imported with --device-modules.')


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with errors for people, and for strangers' folders and repositories as well.

    What a config.json says is checked before timm sees it, see `trust`; what the caller gives is not. The weights of
    `pretrained_trunk` are read as those of a stranger as well.

    Raises:
        PSTError: If there is no such model, it does not take an argument, or its weights cannot be had.
        Unavailable: If that is so because the Hub does not answer.
    """
    check_model_name(name)
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cache_dir = kwargs.get('cache_dir')
    if kwargs.get('pretrained') and not overlay:
        check_fetchable(name, cache_dir=cache_dir)
    which = None if kwargs.get('pretrained') else kwargs.pop(PRETRAINED_TRUNK, None)
    try:
        model = _create_from_config(name, **kwargs) if ':' in name else _create_checked(name, name, **kwargs)
        if which:
            _begin_trunk(model, which, cache_dir)
            if ':' not in name:
                plain = getattr(model, 'model', model).plain_name
                adopt_preprocessing(model, pretrained_name(plain, which), kwargs.get('pretrained_cfg'), overlay)
        return model
    except PSTError as e:
        if str(e).startswith(name):
            raise
        raise type(e)(f'Cannot create {name}: {e}') from e
    except REFUSED as e:
        # a model that lacks all of its weights names each of them
        reason = first_line(e) if isinstance(e, OSError) else ' '.join(str(e).split()) or type(e).__name__
        raise PSTError(f'Cannot create {name}: {printable(reason[:500])}') from e


def _begin_trunk(model: nn.Module, which: Union[bool, str], cache_dir: Optional[PathLike]) -> None:
    """Load the weights that timm has for the plain model into the trunk, see `pretrained_name` and `fetch`."""
    net = getattr(model, 'model', model)
    if not getattr(net, 'plain_name', ''):
        raise TypeError(f'{type(net).__name__} takes no {PRETRAINED_TRUNK}, as it is no model with PST')
    copy_trunk(model, plain_weights(net, pretrained_name(net.plain_name, which), cache_dir))


def plain_weights(net: nn.Module, name: str, cache_dir: Optional[PathLike] = None) -> Dict[str, torch.Tensor]:
    """The published weights of a plain model, by name, in the sizes of a trunk.

    Args:
        net: The model with the trunk.
        name: A timm model name, with or without a tag, or what else names weights.
        cache_dir: See `fetch`.

    Raises:
        PSTError: If they cannot be had.
    """
    same = name.split('.')[0] == getattr(net, 'plain_name', '')
    kwargs = getattr(net, 'trunk_kwargs', {}) if same else {}
    return create_model(name, pretrained=True, cache_dir=cache_dir, **kwargs).state_dict()


def _create_from_config(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A model from a folder or repository that the user has named."""
    arch, told, cfg = look_up(name, cache_dir=kwargs.get('cache_dir'))
    temperature = cfg.pop('temperature', None)  # of which timm knows nothing
    told = {**told, 'pretrained_cfg': cfg, 'pretrained_model_args': told}
    kwargs = {**told, **{k: v for k, v in kwargs.items() if v is not None}}
    if pretrained and name.startswith('local-dir:'):
        check_folder(Path(cfg['file']))
    if not pretrained:
        _check_told(name, arch, told)
    model = _create_checked(name, arch, pretrained=pretrained, told=told, **kwargs)
    if temperature and pretrained and model.num_classes == cfg.get('num_classes'):
        model.pretrained_cfg['temperature'] = temperature
    return model


def _create_checked(
        name: str,
        arch: str,
        /,
        pretrained: bool = False,
        told: Optional[Mapping[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """`timm.create_model`, with weights that were read as those of a stranger before timm reads them.

    Args:
        name: What the user has named.
        arch: Its architecture, or the name again.
        pretrained: Whether it comes with weights.
        told: Those of the arguments that a config.json tells.
        kwargs: All other arguments.
    """
    if not pretrained:
        return timm.create_model(arch, **kwargs)
    overlay = own_location(kwargs.get('pretrained_cfg_overlay') or {})
    cfg = None
    if isinstance(kwargs.get('pretrained_cfg'), (dict, type(None))):
        cfg = resolve_pretrained_cfg(arch, kwargs.get('pretrained_cfg'), overlay).to_dict()
    file = find_pretrained(cfg, kwargs.get('cache_dir')) if cfg is not None else None
    if file is not None:
        weights = read_checkpoint(file).weights
        # the checksum among the notes is that of this file
        notes = {'notes': tuple(cfg['notes'])} if cfg.get('notes') else {}
        kwargs['pretrained_cfg_overlay'] = {**notes, **overlay, 'file': str(file), 'source': '', 'state_dict': None}
        if told is not None:
            _check_told(name, arch, told, weights)
            _check_all_there(arch, {**told, 'pretrained_cfg_overlay': kwargs['pretrained_cfg_overlay']})
        elif overlay.get('file'):
            classes = _size(weights, arch, 'classifier', 0) or 0
            _check_all_there(arch, {
                **kwargs, 'num_classes': classes,
                'pretrained_cfg_overlay': {**kwargs['pretrained_cfg_overlay'], 'num_classes': classes}})
        del weights
    model = timm.create_model(arch, pretrained=True, **kwargs)
    if file is not None:  # where the weights are, as the user knows it
        for key in ('file', 'source'):
            model.pretrained_cfg.pop(key, None)
            if key in cfg:
                model.pretrained_cfg[key] = cfg[key]
    check_finite(Checkpoint(Path(name), model.state_dict()))
    return model


def _check_told(
        name: str,
        arch: str,
        told: Mapping[str, Any],
        weights: Optional[Mapping[str, torch.Tensor]] = None,
) -> None:
    """`check_size`, for what a config.json tells, the class count and input size of its weights among it."""
    check_size(name, arch, {k: v for k, v in told.items() if k != 'pretrained_model_args'}, weights)


def _check_all_there(arch: str, kwargs: Mapping[str, Any]) -> None:
    """Make sure, without a place to put them, that weights are all there: for other classes timm takes what fits."""
    try:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that nothing is copied there
            timm.create_model(arch, pretrained=True, **kwargs)
    except RuntimeError as e:
        if 'Missing key' in str(e) or 'size mismatch' in str(e):  # else it is for the model itself to say
            raise


def build_model(checkpoint: Checkpoint, **model_kwargs: Any) -> nn.Module:
    """The model with its weights, class count, input channels, preprocessing and class names.

    Args:
        checkpoint: From `read_checkpoint`.
        model_kwargs: Passed to `timm.create_model`, before what the checkpoint says.

    Returns:
        The model in eval mode; its `pretrained_cfg` holds preprocessing and, as `label_names`, the class names;
        `checkpoint_cfg` is what of it the checkpoint itself told, `checkpoint_ema` whether its weights are the average.

    Raises:
        PSTError: If the architecture is unknown, or the weights are those of another one.
    """
    if checkpoint.detector:
        raise PSTError(
            f'{checkpoint.path} holds an object detector, no classifier: use pst-timm detect, or '
            f'pst_timm.detection.open_detector.')
    resolve_origin(checkpoint)
    arch, weights = checkpoint.arch, checkpoint.weights
    if not is_local_arch(arch):
        raise PSTError(
            f'{checkpoint.path} does not name a known architecture (arch: {arch!r}). Name it with --model, or use a '
            f'training checkpoint or a .safetensors file beside its config.json.')
    told = {k: v for k, v in told_args(checkpoint).items() if k not in model_kwargs}
    kwargs = {
        'num_classes': _size(weights, arch, 'classifier', 0) or checkpoint.pretrained_cfg.get('num_classes'),
        'in_chans': _size(weights, arch, 'first_conv', 1) or (checkpoint.pretrained_cfg.get('input_size') or [None])[0],
        **check_model_args(checkpoint.path, arch, told, weights),
        **model_kwargs,
    }
    hint = 'It was made by another architecture, or with other arguments than the checkpoint tells.'
    # before anything is made that could be larger than memory
    plan = check_size(checkpoint.path, arch, {k: v for k, v in kwargs.items() if k not in ELSEWHERE}, weights)
    source = f'{checkpoint.path} is not a checkpoint of {arch} ({plan.num_classes} classes)'
    if all(name.startswith(WRAPPER) for name in plan.state_dict()):  # it is its own wrapper, see `clean_names`
        weights = {f'{WRAPPER}{name}': tensor for name, tensor in weights.items()}
    check_fit(plan.state_dict(), weights, source, hint)
    try:
        model = create_model(arch, **kwargs)
    except PSTError as e:
        raise PSTError(f'{checkpoint.path}: {e}') from e
    load_weights(model, weights, source, hint)
    size = tuple(model.pretrained_cfg['input_size'])
    cfg = {**model.pretrained_cfg, **checkpoint.pretrained_cfg}
    cfg.pop('tag', None)  # these are not the weights of that name
    if 'label_names' not in checkpoint.pretrained_cfg:
        cfg.pop('label_names', None)  # nor are their classes
    if checkpoint.ema is not None:
        # a training run measures at its own size, whatever other weights of the architecture are tested at
        cfg = {k: v for k, v in cfg.items() if not k.startswith('test_') or k in checkpoint.pretrained_cfg}
    if cfg.get('test_input_size'):
        cfg['test_input_size'] = tuple(cfg['test_input_size'])
    model.pretrained_cfg = model.default_cfg = cfg
    found = _data_config(checkpoint, model)
    model.checkpoint_cfg = found if checkpoint.pretrained_cfg or checkpoint.args else {}
    model.checkpoint_ema = checkpoint.ema
    cfg.update(found, num_classes=model.num_classes)
    if cfg.get('pool_size') and 'pool_size' not in checkpoint.pretrained_cfg:  # of the last map, at the model's size
        cfg['pool_size'] = tuple(
            math.ceil(p * new / old) for p, new, old in zip(cfg['pool_size'], cfg['input_size'][1:], size[1:]))
    try:
        check_digest(weights, model)
    except RuntimeError as e:
        raise PSTError(f'{checkpoint.path}: {e}') from None
    drop_digest(model)
    return model.eval()


def told_args(checkpoint: Checkpoint) -> Dict[str, Any]:
    """The arguments of `timm.create_model` that a checkpoint tells; unchecked."""
    told = {
        'global_pool': checkpoint.args.get('gp') or None,
        **checkpoint.model_args,
        **(checkpoint.args.get('model_kwargs') or {}),
    }
    # what its trunk began with is long overwritten
    return {k: v for k, v in told.items() if v is not None and k != PRETRAINED_TRUNK}


def _data_config(checkpoint: Checkpoint, model: nn.Module) -> Dict[str, Any]:
    """Preprocessing that the weights were validated with: that of the run, where it differs from the model's own."""
    try:
        return resolve_input_data_config(model, args=checkpoint.args)
    except (ValueError, AssertionError) as e:
        raise PSTError(f'The arguments in {checkpoint.path} do not fit its weights: {e}') from e


def _size(weights: Dict[str, torch.Tensor], arch: str, layer: str, dim: int) -> Optional[int]:
    try:
        name = get_pretrained_cfg_value(arch, layer)
    except RuntimeError:  # a model that is registered without a configuration
        return None
    weight = weights.get(f'{name}.weight')
    return weight.shape[dim] if weight is not None and weight.ndim > dim else None


def preprocessing(
        model: nn.Module,
        source: PathLike,
        flags: Mapping[str, Any],
        use_test_size: bool = False,
) -> Dict[str, Any]:
    """How images are prepared: as the model's weights know it, where no flag says otherwise; a difference is said.

    Args:
        model: From `load_model`.
        source: Where it came from, for the message.
        flags: `img_size`, `crop_pct` and others of `timm.data.resolve_data_config`, None where they are not given.
        use_test_size: Whether to take the larger test size that some published weights have.
    """
    config = resolve_data_config(dict(flags), model=model, use_test_size=use_test_size)
    own = resolve_data_config({}, model=model, use_test_size=use_test_size)
    told = getattr(model, 'checkpoint_cfg', None)
    for key in told or ():
        if config[key] != own[key]:
            _logger.warning(f'{source} knows {key} {own[key]}; it is run with the {config[key]} asked for.')
    if told == {} and config['input_size'] == own['input_size']:
        _logger.warning(
            f'{source} does not tell the image size it was trained at; the {own["input_size"][-1]} px of the '
            f'architecture are taken: say --img-size if it was another.')
    return config


def load_model(
        source: PathLike,
        *,
        arch: Optional[str] = None,
        num_classes: Optional[int] = None,
        pretrained: Optional[bool] = None,
        use_ema: Optional[bool] = None,
        reparam: bool = False,
        **model_kwargs: Any,
) -> nn.Module:
    """A model with its weights, preprocessing and class names, from whatever holds them.

    Args:
        source: A timm model name, 'hf-hub:org/name', 'local-dir:path', or what `read_checkpoint` reads: a file or a
            folder.
        arch: Architecture of a file, where it does not tell it or another one is meant; said if they differ.
        num_classes: Number of classes, an error where the weights have others; 0 for no classifier.
        pretrained: Whether a model name means published weights; None for those there are, with a warning if there are
            none.
        use_ema: Whether to take the moving average of a training checkpoint; None takes it where there is one.
        reparam: Fold the model for inference, see `pst_timm.reparameterize`.
        model_kwargs: Further arguments of `timm.create_model`, before what the source says.

    Returns:
        The model in eval mode on the CPU; its `pretrained_cfg` holds preprocessing and, as `label_names`, the class
        names where they are known.

    Raises:
        PSTError: If the source is none of these, does not hold a model, or does not fit what is asked for.
    """
    if model_kwargs.get('features_only'):
        raise PSTError(
            "load_model gives whole models; for feature maps write the model as a folder (pst-timm publish --dry-run) "
            "and use timm.create_model('local-dir:FOLDER', pretrained=True, features_only=True).")
    if is_file(source):
        model = build_model(open_checkpoint(source, arch, use_ema, model_kwargs.get('cache_dir')), **model_kwargs)
        if num_classes == 0:
            model.reset_classifier(0)
        elif num_classes not in (None, model.num_classes):
            raise PSTError(f'{source} has {model.num_classes} classes, not {num_classes}: leave the number out.')
    else:
        model = _from_name(str(source), arch, pretrained, num_classes, model_kwargs)
    if not reparam:
        return model
    try:
        return reparameterize(model, inplace=True)
    except ValueError as e:
        raise PSTError(f'{source} cannot be folded: {e}') from e


def open_checkpoint(
        source: PathLike,
        arch: Optional[str] = None,
        use_ema: Optional[bool] = None,
        cache_dir: Optional[PathLike] = None,
) -> Checkpoint:
    """Read a checkpoint, as one of another architecture if asked to; a difference is said.

    Args:
        source: What `read_checkpoint` reads.
        arch: Architecture, or what names a model; what the file tells if None.
        use_ema: See `read_checkpoint`.
        cache_dir: See `fetch`.

    Raises:
        PSTError: As `read_checkpoint`, or if there is no such architecture.
    """
    checkpoint = read_checkpoint(source, use_ema)
    if arch is None:
        resolve_origin(checkpoint)
        return checkpoint
    check_model_name(arch)
    found = look_up(arch, cache_dir=cache_dir)
    if checkpoint.arch == arch:  # a run of timm's script, that began with what the user names
        complete(checkpoint, *found)
        return checkpoint
    if is_local_arch(checkpoint.arch):
        resolve_origin(checkpoint)
    if checkpoint.arch and found[0] != checkpoint.arch:
        _logger.warning(f'{source} says that it is a {checkpoint.arch}; it is read as the {found[0]} asked for.')
        checkpoint = dataclasses.replace(checkpoint, args={}, model_args={})  # those of the other one
    checkpoint.arch = found[0]
    return checkpoint


def _from_name(
        name: str,
        arch: Optional[str],
        pretrained: Optional[bool],
        num_classes: Optional[int],
        kwargs: Dict[str, Any],
) -> nn.Module:
    if num_classes is not None:
        kwargs = dict(kwargs, num_classes=num_classes)
    if arch not in (None, name):
        raise PSTError(f'{name} names a model itself: leave {arch} out.')
    if name.startswith(SOURCES):
        model = create_model(name, pretrained=pretrained is not False, **kwargs).eval()
        known = model.pretrained_cfg.get('num_classes')
        if pretrained is not False and num_classes not in (None, 0, known):
            raise PSTError(f'The weights of {name} know {known} classes, not {num_classes}.')
        return model
    if not timm.is_model(name.split('.')[0]):
        raise PSTError(
            f'{name!r} is neither a model, a file nor a folder.{did_you_mean(name.split(".")[0], timm.list_models())}')
    if name == 'pruned':
        raise PSTError('There is no folder pruned here, and the architecture of that name is told by such a folder.')
    check_model_name(name)
    cfg = get_pretrained_cfg(name)
    published = cfg is not None and cfg.has_weights
    if pretrained is None and not published:
        _logger.warning(
            f'{name} has no published weights, so these are random ones: name a checkpoint, or a folder that has some.')
    pretrained = published if pretrained is None else pretrained
    if pretrained and published and num_classes not in (None, 0, cfg.num_classes):
        raise PSTError(f'The weights of {name} know {cfg.num_classes} classes, not {num_classes}.')
    return create_model(name, pretrained=pretrained, **kwargs).eval()


def temperature_of(model: nn.Module) -> Optional[float]:
    """What the logits of a classifier were divided by for calibrated probabilities, in its weights; None if nothing."""
    return model.pretrained_cfg.get('temperature')

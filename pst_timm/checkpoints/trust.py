"""What may be believed of what a file says of its weights.

Checkpoints, headers of safetensors and config.json files come from strangers, and what they say is data: names, numbers
and preprocessing of a model whose code is here already. Nothing of it may open, fetch, write or run anything, take all
memory, or keep the machine busy for ever. `schema.check_facts` holds all that is said to its rules; `check_origin` is
the one gate between it and `timm.create_model`. What a user types does not pass here.
"""
import inspect
import re
import stat
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import timm
import torch
from timm.models import split_model_name_tag
from timm.models._hub import load_model_config_from_path  # timm exports it from here alone

from pst_timm.utils.errors import PSTError

from . import rules
from .schema import CONFIG, MOST_JSON, check_facts, parse_json

__all__ = ['check_model_args', 'check_ordinary', 'check_origin', 'check_size', 'is_local_arch', 'read_model_config']

MOST_BLOCKS = 256  # of one kind, in a model that a file describes
MOST_WIDTH = 8192
TIMES_LARGER = 16  # than the architecture as it is: what a model may become by arguments from a file
FREE_ELEMENTS = 50_000_000  # that any architecture may have


def check_ordinary(path: Path) -> None:
    """Make sure that a path is that of an ordinary file: a pipe or device would keep whoever opens it waiting.

    Raises:
        PSTError: If it is not, or is not there.
    """
    try:
        ordinary = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise PSTError(f'There is no file {path}.') from None
    except (OSError, ValueError) as e:
        raise PSTError(f'{path} cannot be read ({getattr(e, "strerror", None) or e}).') from e
    if not ordinary:
        raise PSTError(f'{path} is not an ordinary file, but a {"folder" if path.is_dir() else "pipe or device"}.')


def read_model_config(folder: Path) -> Tuple[Dict[str, Any], str, Dict[str, Any]]:
    """What timm's config.json in a folder says: preprocessing, architecture and arguments, each as far as it may.

    Raises:
        PSTError: If it cannot be read, is none of timm's, or gives what a file may not give.
    """
    path = folder / 'config.json'
    check_ordinary(path)
    try:
        with open(path, 'rb') as file:
            text = file.read(MOST_JSON + 1)
    except OSError as e:
        raise PSTError(f'{path} cannot be read ({e.strerror}).') from e
    config = parse_json(text, path)
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise PSTError(f'{path} is not a config.json of timm: it names no architecture.')
    check_facts(path, config, CONFIG)
    try:
        cfg, arch, model_args = load_model_config_from_path(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
        raise PSTError(f'{path} is not a config.json of timm ({rules.short(repr(e))}).') from None
    cfg = check_facts(path, {'pretrained_cfg': cfg})['pretrained_cfg']
    if config.get('temperature') is not None:  # beside what is timm's, which takes no other names there
        cfg['temperature'] = config['temperature']
    arch, model_args = check_origin(path, arch, model_args or {})
    classes = model_args.get('num_classes', cfg.get('num_classes'))
    if classes is not None and cfg.setdefault('num_classes', classes) != classes:
        raise PSTError(
            f'{path} is garbled: its weights have {cfg["num_classes"]} classes, and its model {classes}.')
    return cfg, arch, model_args


# arguments of models

def is_local_arch(name: Any) -> bool:
    """Whether a name, with or without a tag, is that of an architecture that is registered here."""
    return isinstance(name, str) and ':' not in name and bool(name) and timm.is_model(split_model_name_tag(name)[0])


# of any timm model; those of its class are added
COMMON_ARGS = {
    'num_classes': rules.whole(0, rules.MOST_CLASSES),
    'in_chans': rules.whole(1, rules.MOST_CHANNELS),
    'global_pool': rules.text(50, r'\w*'),
    'img_size': rules.SIDES,
    'drop_rate': rules.real(0, 1),
    'drop_path_rate': rules.real(0, 1),
    'drop_block_rate': rules.real(0, 1),
    'bn_momentum': rules.real(0, 1),
    'bn_eps': rules.real(0, 1),
    'output_stride': rules.whole(1, 64),
    'topk': rules.whole(0, rules.MOST_PIXELS ** 2),
    'train_topk': rules.whole(0, rules.MOST_PIXELS ** 2),
    'train_fine_prob': rules.real(0, 1),
    'fine_fusion': rules.choice('gate', 'joint'),
    'scriptable': rules.flag,
    'exportable': rules.flag,
    'no_jit': rules.flag,
}
WIDTH = rules.whole(1, 2 ** 16)
# of the layers of a pruned model; what it is made of tells how wide each may be at most
CHANNELS = rules.mapping({}, rules.either(WIDTH, rules.each(lambda n: n if n is None else WIDTH(n), 2, 2)))
# parts of names of arguments that are none of a file's business, whatever a class may mean by them
NEVER = re.compile(r'(^|_)(path|file|filename|url|dir|cache|cfg|cfgs|pretrained|checkpoint|load|device|dtype|fn)(_|$)')


def check_origin(
        source: Union[str, PathLike],
        arch: Any,
        model_args: Mapping[str, Any],
        weights: Optional[Mapping[str, torch.Tensor]] = None,
) -> Tuple[str, Dict[str, Any]]:
    """The gate between what a file says and `timm.create_model`: an architecture from here, with harmless arguments.

    Args:
        source: The file, for the message.
        arch: Architecture that it names, with or without a tag.
        model_args: Arguments of `timm.create_model` that it tells.
        weights: Its weights, if they are known; no number of blocks may be larger than that of their tensors.

    Returns:
        Architecture and arguments.

    Raises:
        PSTError: If the architecture is not registered here, an argument is not allowed to a file, or is out of range.
    """
    if not is_local_arch(arch):
        raise PSTError(
            f'{source} does not name an architecture that is known here (arch: {rules.short(arch)!r}), and what a file '
            f'names is not fetched. Say it with --model (or arch=), or import the package that has it with '
            f'--device-modules.')
    arch = split_model_name_tag(arch)[0]
    return arch, check_model_args(source, arch, model_args, weights)


def check_model_args(
        source: Union[str, PathLike],
        arch: str,
        model_args: Mapping[str, Any],
        weights: Optional[Mapping[str, torch.Tensor]] = None,
) -> Dict[str, Any]:
    """The arguments of `check_origin`, for an architecture that is known to be one."""
    if arch == 'pruned':
        return _check_pruned(source, model_args, weights)
    allowed = dict(COMMON_ARGS)
    if not set(model_args) <= set(allowed):
        tensors = len(weights) if weights else MOST_BLOCKS
        allowed = {**_rules_of(arch, tensors), **allowed}
        trunk = model_args.get('trunk') or _class_of(arch)[2] if 'trunk' in allowed else None
        if is_local_arch(trunk):  # it takes what the plain model takes
            allowed = {**_rules_of(trunk, tensors), **allowed}
    checked = {}
    for name, value in model_args.items():
        if value is None:
            continue
        if name not in allowed:
            raise PSTError(
                f'{source} gives {arch} the argument {rules.short(name)!r}, which a file may not give to a model. If '
                f'you know what it does, give it yourself (--model-kwargs, or a keyword of load_model).')
        try:
            checked[name] = allowed[name](value)
        except rules.Unfit as e:
            got = rules.shown({name: value}, (name, *e.path))
            raise PSTError(
                f'{source}: the model argument {name} must be {e.expected}{got}. If it is right for you, give '
                f'it yourself (--model-kwargs, or a keyword of load_model).') from None
    return checked


def _check_pruned(
        source: Union[str, PathLike],
        model_args: Mapping[str, Any],
        weights: Optional[Mapping[str, torch.Tensor]],
) -> Dict[str, Any]:
    """Those of a pruned architecture: its name, the widths of its layers, and what it takes itself."""
    if not model_args:  # it is the name alone that is asked about
        return {}
    plain = model_args.get('arch')
    if not is_local_arch(plain) or split_model_name_tag(plain) != (plain, '') or plain == 'pruned':
        raise PSTError(
            f'{source} does not name the architecture that was pruned (arch: {rules.short(plain)!r}): expected one '
            f'that is known here, without a tag.')
    try:
        channels = rules.at('channels', CHANNELS, model_args.get('channels'))
    except rules.Unfit as e:
        raise PSTError(
            f'{source}: the model argument {".".join(map(rules.short, e.path))} must be {e.expected}'
            f'{rules.shown(model_args, e.path)}. Prune the model again, or use another file.') from None
    own = {key: value for key, value in model_args.items() if key not in ('arch', 'channels')}
    return {**check_model_args(source, plain, own, weights), 'arch': plain, 'channels': channels}


@lru_cache(maxsize=64)
def _class_of(arch: str) -> Tuple[type, int, str]:
    """The class of an architecture, how many elements it has as it is, and the plain model it is made of, if any."""
    with torch.device('meta'):
        model = timm.create_model(arch)
    return type(model), sum(v.numel() for v in model.state_dict().values()), getattr(model, 'plain_name', '')


def _rules_of(arch: str, tensors: int) -> Dict[str, rules.Rule]:
    """Rules for the arguments of an architecture's class that are plain values."""
    try:
        kind = _class_of(arch)[0]
    except Exception:  # a model of another package, which may do as it likes
        return {}
    found: Dict[str, inspect.Parameter] = {}
    for cls in kind.__mro__:
        if '__init__' in vars(cls) and cls is not torch.nn.Module:
            parameters = inspect.signature(cls.__init__).parameters
            found = {**parameters, **found}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    allowed = {}
    for name, p in found.items():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or name in ('self', 'block') or NEVER.search(name):
            continue
        allowed[name] = _rule_for(name, tensors)
    return allowed


def _rule_for(name: str, tensors: int) -> rules.Rule:
    """What a file may give as an argument of that name: numbers in bounds, words, lists and mappings of them."""
    many = re.search(r'depth|layers|blocks|repeat|stages|levels|(^|_)num_(?!heads|classes|features)', name)
    largest = min(MOST_BLOCKS, max(tensors, 1)) if many else MOST_WIDTH

    def scalar(value: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return rules.whole(-1, largest)(value)
        if isinstance(value, float):
            return rules.real(-1e4, 1e4)(value)
        if isinstance(value, str):
            return rules.IDENTIFIER(value)
        raise rules.Unfit('a plain number or word')

    def rule(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            values = tuple(rules.each(rules.either(scalar, rules.each(scalar, 0, 16)), 0, 64)(value))
            if many and sum(v for v in values if isinstance(v, (int, float))) > MOST_BLOCKS:
                raise rules.Unfit(f'at most {MOST_BLOCKS} in sum')
            return values
        if isinstance(value, dict):
            return rules.mapping({}, scalar)(value)
        return scalar(value)
    return rule


def check_size(
        source: Union[str, PathLike],
        arch: str,
        kwargs: Mapping[str, Any],
        weights: Optional[Mapping[str, torch.Tensor]] = None,
) -> torch.nn.Module:
    """Make sure, without taking any memory, that a model from a stranger's arguments can be built, and how large it is.

    Args:
        source: Who told the arguments, for the message.
        arch: Architecture.
        kwargs: All arguments of `timm.create_model`.
        weights: The weights it is for, if they are known: a model of their size is one that fits into memory.

    Returns:
        The model, of shapes and types alone (on the meta device).

    Raises:
        PSTError: If it cannot be built, or is much larger than both its weights and the architecture as it is.
    """
    try:
        try:
            with torch.device('meta'):
                model = timm.create_model(arch, **kwargs)
            names = arch, kwargs.get('trunk'), kwargs.get('arch')
            usual = max(_class_of(name)[1] for name in names if is_local_arch(name))
        except Exception:
            if not set(kwargs) <= {*COMMON_ARGS, 'pretrained_cfg'}:
                raise
            # a model of another package may not do without memory; what these arguments may ask for is bounded
            return timm.create_model(arch, **kwargs)
    except PSTError:
        raise
    except Exception as e:  # whatever a model may raise on arguments that nobody foresaw
        reason = rules.printable((str(e).splitlines() or [type(e).__name__])[0][:500])
        raise PSTError(f'{source}: Cannot create {arch}: {reason}') from e
    elements = sum(v.numel() for v in model.state_dict().values())
    there = sum(v.numel() for v in (weights or {}).values())
    if elements > max(FREE_ELEMENTS, TIMES_LARGER * usual, 2 * there):
        raise PSTError(
            f'{source}: its arguments make {arch} a model of {elements:,} elements, where it usually has {usual:,}. '
            f'Give them yourself (--model-kwargs, or a keyword of load_model) if that is meant.')
    return model

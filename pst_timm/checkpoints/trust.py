"""What may be believed of what a file says of its weights.

Checkpoints, headers of safetensors and config.json files come from strangers, and what they say is data: names, numbers
and preprocessing of a model whose code is here already. Nothing of it may open, fetch, write or run anything, take all
memory, or keep the machine busy for ever. `check_facts` holds the schema of all that is said; `check_origin` is the one
gate between it and `timm.create_model`. What a user types does not pass here.
"""
import inspect
import json
import math
import re
import stat
from argparse import Namespace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.data.transforms import str_to_interp_mode  # timm exports it from here alone
from timm.models import split_model_name_tag
from timm.models._hub import load_model_config_from_path  # timm exports it from here alone

from pst_timm.utils.errors import PSTError

__all__ = [
    'check_facts', 'check_model_args', 'check_ordinary', 'check_origin', 'check_size', 'is_local_arch',
    'parse_json', 'printable', 'read_config',
]

MOST_JSON = 16 * 2 ** 20  # characters; a config.json with the names of 22,000 classes has one million
MOST_NODES = 1_000_000  # values in all that a file says
MOST_TEXT = 64 * 2 ** 20  # characters in all of these
MOST_DEPTH = 20
MOST_CLASSES = 1_000_000
MOST_CHANNELS = 1024
MOST_PIXELS = 4096  # of a side; timm's largest input is 1024
MOST_BLOCKS = 256  # of one kind, in a model that a file describes
MOST_WIDTH = 8192
TIMES_LARGER = 16  # than the architecture as it is: what a model may become by arguments from a file
FREE_ELEMENTS = 50_000_000  # that any architecture may have

Rule = Callable[[Any], Any]


def printable(text: str) -> str:
    """A text from a file without what would steer a terminal."""
    return text if text.isprintable() else ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text)


class _Unfit(Exception):
    """A value that does not fit; says what was expected, and where."""

    def __init__(self, expected: str, path: Tuple[str, ...] = ()):
        super().__init__(expected)
        self.expected, self.path = expected, path


# rules: a value in, the value to use out

def _whole(low: int, high: int) -> Rule:
    def rule(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _Unfit(f'a whole number from {low} to {high}')
        return value
    return rule


def _real(low: float, high: float) -> Rule:
    def rule(value: Any) -> Union[int, float]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise _Unfit(f'a number from {low:g} to {high:g}')
        return value
    return rule


def _measured(value: Any) -> Optional[float]:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # what a run measured as it diverged
    return _real(-1e12, 1e12)(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Unfit('true or false')
    return value


def _text(most: int = 300, pattern: str = '') -> Rule:
    def rule(value: Any) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise _Unfit(f'a text of at most {most} characters')
        if pattern and not re.fullmatch(pattern, value):
            raise _Unfit('a plain name')
        return printable(value)  # a folder that was a class may have had other characters
    return rule


def _each(rule: Rule, least: int = 0, most: int = MOST_CLASSES) -> Rule:
    def checked(value: Any) -> list:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            raise _Unfit(f'a list of {least if least == most else f"{least} to {most}"} values')
        return [_at(f'[{i}]', rule, v) for i, v in enumerate(value)]
    return checked


def _or(first: Rule, second: Rule) -> Rule:
    def rule(value: Any) -> Any:
        try:
            return first(value)
        except _Unfit as e:
            try:
                return second(value)
            except _Unfit as f:
                raise _Unfit(f'{e.expected}, or {f.expected}', f.path) from None
    return rule


def _mapping(schema: Mapping[str, Rule], others: Optional[Rule] = None) -> Rule:
    """A mapping of names; of those that the schema lacks, `others` decides, or they are left out. None is unset."""
    def rule(value: Any) -> dict:
        if isinstance(value, Namespace):
            value = vars(value)
        if not isinstance(value, dict):
            raise _Unfit('a mapping of names to values')
        checked = {}
        for key, entry in value.items():
            if not isinstance(key, str) or len(key) > 1000:
                raise _Unfit('short names as keys')
            key = printable(key)
            key_rule = schema.get(key, others)
            if key_rule is not None:
                checked[key] = entry if entry is None else _at(key, key_rule, entry)
        return checked
    return rule


def _plain(value: Any) -> Any:
    """Plain values alone, in lists and mappings; the budget of the whole was checked before."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no such number
    if isinstance(value, (bool, type(None))):
        return value
    if isinstance(value, int):
        return _whole(-2 ** 63, 2 ** 63)(value)
    if isinstance(value, str):
        return _text(10_000)(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (dict, Namespace)):
        return _mapping({}, _plain)(value)
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value)
    raise _Unfit(f'plain values, not a {type(value).__name__}')


def _at(key: str, rule: Rule, value: Any) -> Any:
    try:
        return rule(value)
    except _Unfit as e:
        raise _Unfit(e.expected, (key, *e.path)) from None


def _interpolation(value: Any) -> str:
    known = isinstance(value, str) and len(value) < 20
    try:
        if not known or (value != 'random' and str_to_interp_mode(value) is None):
            raise KeyError(value)
    except KeyError:
        raise _Unfit('an interpolation such as bilinear or bicubic') from None
    return value


def _choice(*choices: str) -> Rule:
    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _Unfit(f'one of {", ".join(choices)}')
        return value
    return rule


def _size(value: Any) -> List[int]:
    try:
        channels, height, width = _each(_whole(1, MOST_PIXELS), 3, 3)(value)
        return [_whole(1, MOST_CHANNELS)(channels), height, width]
    except _Unfit:
        raise _Unfit(
            f'channels, height and width, of at most {MOST_CHANNELS}, {MOST_PIXELS} and {MOST_PIXELS}') from None


def _names(value: Any) -> Any:
    if isinstance(value, dict):  # by index, as timm allows
        value = [value.get(str(i), value.get(i)) for i in range(len(value))]
    return _each(_text(1000))(value)


_MODULE = _or(_text(100, r'[\w.]*'), _each(_text(100, r'[\w.]+'), 0, 16))
_SIDES = _or(_whole(1, MOST_PIXELS), _each(_whole(1, MOST_PIXELS), 1, 3))
_MEANS = _each(_real(-1e6, 1e6), 1, MOST_CHANNELS)
_STDS = _each(_real(1e-6, 1e6), 1, MOST_CHANNELS)
_CROP = _real(0.05, 10)

# what of timm's PretrainedCfg is a fact about weights; where they are to be had (url, file, hf_hub_id, custom_load
# and the like) is never taken from a file
PRETRAINED_CFG = {
    'input_size': _size,
    'test_input_size': _size,
    'min_input_size': _size,
    'fixed_input_size': _flag,
    'interpolation': _interpolation,
    'crop_pct': _CROP,
    'test_crop_pct': _CROP,
    'crop_mode': _choice('center', 'squash', 'border'),
    'mean': _or(_MEANS, _real(-1e6, 1e6)),
    'std': _or(_STDS, _real(1e-6, 1e6)),
    'num_classes': _whole(0, MOST_CLASSES),
    'label_offset': _whole(0, MOST_CLASSES),
    'label_names': _names,
    'label_descriptions': _mapping({}, _text(10_000)),
    'pool_size': _each(_whole(1, MOST_PIXELS), 1, 3),
    'test_pool_size': _each(_whole(1, MOST_PIXELS), 1, 3),
    'first_conv': _MODULE,
    'classifier': _MODULE,
    'license': _text(),
    'description': _text(10_000),
    'origin_url': _text(1000),
    'paper_name': _text(1000),
    'paper_ids': _or(_text(1000), _each(_text(1000), 0, 100)),
    'notes': _each(_text(10_000), 0, 1000),
}

# the arguments of a run that are used again; all others are carried along as plain values
ARGS = {
    'model': _text(4096),
    'gp': _text(50, r'\w*'),
    'model_kwargs': _mapping({}, _plain),
    'pretrained': _flag,
    'img_size': _SIDES,
    'input_size': _size,
    'in_chans': _whole(1, MOST_CHANNELS),
    'chans': _whole(1, MOST_CHANNELS),
    'num_classes': _whole(-1, MOST_CLASSES),
    'mean': _MEANS,
    'std': _STDS,
    'crop_pct': _CROP,
    'crop_mode': PRETRAINED_CFG['crop_mode'],
    'interpolation': _or(_interpolation, _choice('')),
    'dataset': _text(1000),
    'data_dir': _text(4096),
    'eval_metric': _text(),
    'model_ema': _flag,
    'model_ema_force_cpu': _flag,
}

# all that is known of weights beside themselves, as `Checkpoint` has it
FACTS = {
    'arch': _text(4096),
    'args': _mapping(ARGS, _plain),
    'model_args': _mapping({}, _plain),
    'pretrained_cfg': _mapping(PRETRAINED_CFG),
    'recipe': _mapping({}, _plain),
    'epoch': _whole(-1, 10 ** 9),
    'metric': _measured,
    'ema': _flag,
}
# what has to be so far right in a config.json that timm can take it apart
CONFIG = {
    'architecture': _text(200),
    'num_classes': _whole(0, MOST_CLASSES),
    'label_names': _names,
    'label_descriptions': PRETRAINED_CFG['label_descriptions'],
    'global_pool': _text(50, r'\w*'),
    'model_args': _mapping({}, _plain),
    'pretrained_cfg': _mapping(PRETRAINED_CFG),
    'labels': _names,
    # as old versions have them, without a `pretrained_cfg`
    **PRETRAINED_CFG,
}


def check_facts(source: Union[str, PathLike], facts: Any, schema: Mapping[str, Rule] = FACTS) -> Dict[str, Any]:
    """What a file says of its weights, as values that fit.

    Args:
        source: The file, for the message.
        facts: What it says: all that may be in a `Checkpoint` but path and weights.
        schema: The rules by name: `FACTS`, or `CONFIG` for a whole config.json.

    Returns:
        A copy, without what is not set.

    Raises:
        PSTError: If a name is unknown or a value does not fit; names the file, the key and what was expected.
    """
    try:
        if not isinstance(facts, dict):
            raise _Unfit(f'a mapping of names to values, not a {type(facts).__name__}')
        unknown = next((k for k in facts if k not in schema), None) if schema is FACTS else None
        if unknown is not None:
            raise _Unfit(f'one of {", ".join(schema)}', (_short(unknown),))
        _check_budget(facts)
        return {k: v for k, v in _mapping(schema)(facts).items() if v is not None}
    except _Unfit as e:
        at = printable('.'.join(e.path).replace('.[', '[')[:200])
        raise PSTError(
            f'{source}: what it tells about its weights is garbled{f" at {at}" if at else ""}: expected {e.expected}'
            f'{_shown(facts, e.path)}. Use another file.') from None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else type(value).__name__
    return printable(text[:60]) + ('...' if len(text) > 60 else '')


def _shown(value: Any, path: Sequence[str]) -> str:
    """The value at a path, where it is short enough for a message."""
    for key in path:
        if isinstance(value, Namespace):
            value = vars(value)
        try:
            value = value[int(key[1:-1])] if key.startswith('[') and isinstance(value, (list, tuple)) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return ''
    if isinstance(value, str):
        return f', got {_short(value)!r}'
    if isinstance(value, bool) or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10 ** 30):
        return f', got {value}'
    return f', got a {type(value).__name__}' if path else ''


def _check_budget(value: Any) -> None:
    """Make sure that values are few, and not nested deeply; a list within itself is both."""
    left, text = MOST_NODES, MOST_TEXT
    level: List[Any] = [value]
    for _ in range(MOST_DEPTH):
        left -= len(level)
        text -= sum(len(v) for v in level if isinstance(v, str))
        if left < 0 or text < 0:
            raise _Unfit(f'at most {MOST_NODES} values, of {MOST_TEXT} characters')
        below: List[Any] = []
        for v in level:
            if isinstance(v, Namespace):
                v = vars(v)
            if isinstance(v, (dict, list, tuple)):
                below += v.values() if isinstance(v, dict) else v
            if len(below) > left:
                raise _Unfit(f'at most {MOST_NODES} values, of {MOST_TEXT} characters')
        level = below
    if level:
        raise _Unfit(f'values nested at most {MOST_DEPTH} deep')


def parse_json(text: Union[str, bytes], source: Union[str, PathLike]) -> Any:
    """The value of a JSON text from a file, strictly: no key twice, no NaN, no numbers without end.

    Raises:
        PSTError: If it is none; names the source.
    """
    def pairs(found: list) -> dict:
        keys = [k for k, _ in found]
        if len(set(keys)) < len(keys):
            raise ValueError(f'the key {_short(next(k for k in keys if keys.count(k) > 1))} is there twice')
        return dict(found)

    def constant(name: str) -> None:
        raise ValueError(f'{name} is no number')

    try:
        if len(text) > MOST_JSON:
            raise ValueError(f'more than {MOST_JSON >> 20} MiB')
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        reason = 'nested too deeply' if isinstance(e, RecursionError) else _short(str(e))
        raise PSTError(
            f'{source} is not JSON as it should be ({reason}). Use another file, or write it again.') from None


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


def read_config(folder: Path) -> Tuple[Dict[str, Any], str, Dict[str, Any]]:
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
        raise PSTError(f'{path} is not a config.json of timm ({_short(repr(e))}).') from None
    cfg = check_facts(path, {'pretrained_cfg': cfg})['pretrained_cfg']
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
    'num_classes': _whole(0, MOST_CLASSES),
    'in_chans': _whole(1, MOST_CHANNELS),
    'global_pool': _text(50, r'\w*'),
    'img_size': _SIDES,
    'drop_rate': _real(0, 1),
    'drop_path_rate': _real(0, 1),
    'drop_block_rate': _real(0, 1),
    'bn_momentum': _real(0, 1),
    'bn_eps': _real(0, 1),
    'output_stride': _whole(1, 64),
    'topk': _whole(0, MOST_PIXELS ** 2),
    'train_topk': _whole(0, MOST_PIXELS ** 2),
    'train_fine_prob': _real(0, 1),
    'fine_fusion': _choice('gate', 'joint'),
    'scriptable': _flag,
    'exportable': _flag,
    'no_jit': _flag,
}
# parts of names of arguments that are none of a file's business, whatever a class may mean by them
NEVER = re.compile(r'(^|_)(path|file|filename|url|dir|cache|cfg|cfgs|pretrained|checkpoint|load|device|dtype|fn)(_|$)')
_IDENTIFIER = _text(50, r'\w*')


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
            f'{source} does not name an architecture that is known here (arch: {_short(arch)!r}), and what a file '
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
    rules = dict(COMMON_ARGS)
    if not set(model_args) <= set(rules):
        rules.update({k: v for k, v in _rules_of(arch, len(weights) if weights else MOST_BLOCKS).items()
                      if k not in rules})
    checked = {}
    for name, value in model_args.items():
        if value is None:
            continue
        if name not in rules:
            raise PSTError(
                f'{source} gives {arch} the argument {_short(name)!r}, which a file may not give to a model. If you '
                f'know what it does, give it yourself (--model-kwargs, or a keyword of load_model).')
        try:
            checked[name] = rules[name](value)
        except _Unfit as e:
            raise PSTError(
                f'{source}: the model argument {name} must be {e.expected}{_shown({name: value}, (name, *e.path))}. '
                f'If it is right for you, give it yourself (--model-kwargs, or a keyword of load_model).') from None
    return checked


@lru_cache(maxsize=64)
def _class_of(arch: str) -> Tuple[type, int]:
    """The class of an architecture, and how many elements it has as it is."""
    with torch.device('meta'):
        model = timm.create_model(arch)
    return type(model), sum(v.numel() for v in model.state_dict().values())


def _rules_of(arch: str, tensors: int) -> Dict[str, Rule]:
    """Rules for the arguments of an architecture's class that are plain values."""
    try:
        kind, _ = _class_of(arch)
    except Exception:  # a model of another package, which may do as it likes
        return {}
    found: Dict[str, inspect.Parameter] = {}
    for cls in kind.__mro__:
        if '__init__' in vars(cls) and cls is not torch.nn.Module:
            parameters = inspect.signature(cls.__init__).parameters
            found = {**parameters, **found}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    rules = {}
    for name, p in found.items():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or name in ('self', 'block') or NEVER.search(name):
            continue
        rules[name] = _rule_for(name, tensors)
    return rules


def _rule_for(name: str, tensors: int) -> Rule:
    """What a file may give as an argument of that name: numbers in bounds, words, lists and mappings of them."""
    many = re.search(r'depth|layers|blocks|repeat|stages|levels|(^|_)num_(?!heads|classes|features)', name)
    largest = min(MOST_BLOCKS, max(tensors, 1)) if many else MOST_WIDTH

    def scalar(value: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return _whole(-1, largest)(value)
        if isinstance(value, float):
            return _real(-1e4, 1e4)(value)
        if isinstance(value, str):
            return _IDENTIFIER(value)
        raise _Unfit('a plain number or word')

    def rule(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            values = tuple(_each(_or(scalar, _each(scalar, 0, 16)), 0, 64)(value))
            if many and sum(v for v in values if isinstance(v, (int, float))) > MOST_BLOCKS:
                raise _Unfit(f'at most {MOST_BLOCKS} in sum')
            return values
        if isinstance(value, dict):
            return _mapping({}, scalar)(value)
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
            usual = _class_of(arch)[1]
        except Exception:
            if not set(kwargs) <= set(COMMON_ARGS):
                raise
            # a model of another package may not do without memory; what these arguments may ask for is bounded
            return timm.create_model(arch, **kwargs)
    except PSTError:
        raise
    except Exception as e:  # whatever a model may raise on arguments that nobody foresaw
        reason = printable((str(e).splitlines() or [type(e).__name__])[0][:500])
        raise PSTError(f'{source}: Cannot create {arch}: {reason}') from e
    elements = sum(v.numel() for v in model.state_dict().values())
    there = sum(v.numel() for v in (weights or {}).values())
    if elements > max(FREE_ELEMENTS, TIMES_LARGER * usual, 2 * there):
        raise PSTError(
            f'{source}: its arguments make {arch} a model of {elements:,} elements, where it usually has {usual:,}. '
            f'Give them yourself (--model-kwargs, or a keyword of load_model) if that is meant.')
    return model

"""Rules for what a file says, each a function of a value: it returns the value to use, or says what was expected."""
import math
import re
from argparse import Namespace
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from timm.data.transforms import str_to_interp_mode  # timm exports it from here alone

__all__ = [
    'CROP', 'IDENTIFIER', 'MEANS', 'MODULE', 'MOST_CHANNELS', 'MOST_CLASSES', 'MOST_PIXELS', 'SIDES', 'STDS', 'Rule',
    'Unfit', 'at', 'choice', 'each', 'either', 'flag', 'interpolation', 'mapping', 'measured', 'names', 'plain',
    'printable', 'real', 'short', 'shown', 'size', 'text', 'whole',
]

MOST_CLASSES = 1_000_000
MOST_CHANNELS = 1024
MOST_PIXELS = 4096  # of a side; timm's largest input is 1024

Rule = Callable[[Any], Any]


def printable(text: str) -> str:
    """A text from a file without what would steer a terminal."""
    return text if text.isprintable() else ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text)


class Unfit(Exception):
    """A value that does not fit; says what was expected, and where."""

    def __init__(self, expected: str, path: Tuple[str, ...] = ()):
        super().__init__(expected)
        self.expected, self.path = expected, path


def whole(low: int, high: int) -> Rule:
    """Whole numbers in a range."""
    def rule(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Unfit(f'a whole number from {low} to {high}')
        return value
    return rule


def real(low: float, high: float) -> Rule:
    """Numbers in a range, never NaN."""
    def rule(value: Any) -> Union[int, float]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise Unfit(f'a number from {low:g} to {high:g}')
        return value
    return rule


def measured(value: Any) -> float:
    """A metric, of a run that diverged too."""
    return value if isinstance(value, float) and not math.isfinite(value) else real(-1e12, 1e12)(value)


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Unfit('true or false')
    return value


def text(most: int = 300, pattern: str = '') -> Rule:
    """Texts of so many characters, that match a pattern if there is one; made printable."""
    def rule(value: Any) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise Unfit(f'a text of at most {most} characters')
        if pattern and not re.fullmatch(pattern, value):
            raise Unfit('a plain name')
        return printable(value)  # a folder that was a class may have had other characters
    return rule


def each(rule: Rule, least: int = 0, most: int = MOST_CLASSES) -> Rule:
    """Lists whose values all keep a rule."""
    def checked(value: Any) -> list:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            raise Unfit(f'a list of {least if least == most else f"{least} to {most}"} values')
        return [at(f'[{i}]', rule, v) for i, v in enumerate(value)]
    return checked


def either(first: Rule, second: Rule) -> Rule:
    """What keeps one of two rules."""
    def rule(value: Any) -> Any:
        try:
            return first(value)
        except Unfit as e:
            try:
                return second(value)
            except Unfit as f:
                raise Unfit(f'{e.expected}, or {f.expected}', f.path) from None
    return rule


def mapping(schema: Mapping[str, Rule], others: Optional[Rule] = None) -> Rule:
    """A mapping of names; of those that the schema lacks, `others` decides, or they are left out. None is unset."""
    def rule(value: Any) -> dict:
        if isinstance(value, Namespace):
            value = vars(value)
        if not isinstance(value, dict):
            raise Unfit('a mapping of names to values')
        checked = {}
        for key, entry in value.items():
            if not isinstance(key, str) or len(key) > 1000:
                raise Unfit('short names as keys')
            key = printable(key)
            key_rule = schema.get(key, others)
            if key_rule is not None:
                checked[key] = entry if entry is None else at(key, key_rule, entry)
        return checked
    return rule


def plain(value: Any) -> Any:
    """Plain values alone, in lists and mappings; the budget of the whole was checked before."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no such number
    if isinstance(value, (bool, type(None))):
        return value
    if isinstance(value, int):
        return whole(-2 ** 63, 2 ** 63)(value)
    if isinstance(value, str):
        return text(10_000)(value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (dict, Namespace)):
        return mapping({}, plain)(value)
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value)
    raise Unfit(f'plain values, not a {type(value).__name__}')


def at(key: str, rule: Rule, value: Any) -> Any:
    """A value by its rule; an error tells the key too."""
    try:
        return rule(value)
    except Unfit as e:
        raise Unfit(e.expected, (key, *e.path)) from None


def interpolation(value: Any) -> str:
    """What timm knows as an interpolation."""
    known = isinstance(value, str) and len(value) < 20
    try:
        if not known or (value != 'random' and str_to_interp_mode(value) is None):
            raise KeyError(value)
    except KeyError:
        raise Unfit('an interpolation such as bilinear or bicubic') from None
    return value


def choice(*choices: str) -> Rule:
    """One of some texts."""
    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise Unfit(f'one of {", ".join(choices)}')
        return value
    return rule


def size(value: Any) -> List[int]:
    """Channels, height and width of an image."""
    try:
        channels, height, width = each(whole(1, MOST_PIXELS), 3, 3)(value)
        return [whole(1, MOST_CHANNELS)(channels), height, width]
    except Unfit:
        raise Unfit(
            f'channels, height and width, of at most {MOST_CHANNELS}, {MOST_PIXELS} and {MOST_PIXELS}') from None


def names(value: Any) -> Any:
    """Names of classes, in order or by index."""
    if isinstance(value, dict):  # by index, as timm allows
        value = [value.get(str(i), value.get(i)) for i in range(len(value))]
    return each(text(1000))(value)


MODULE = either(text(100, r'[\w.]*'), each(text(100, r'[\w.]+'), 0, 16))
SIDES = either(whole(1, MOST_PIXELS), each(whole(1, MOST_PIXELS), 1, 3))
MEANS = each(real(-1e6, 1e6), 1, MOST_CHANNELS)
STDS = each(real(1e-6, 1e6), 1, MOST_CHANNELS)
CROP = real(0.05, 10)
IDENTIFIER = text(50, r'\w*')


def short(value: Any) -> str:
    """The beginning of a text, or the type of another value, for a message."""
    text = value if isinstance(value, str) else type(value).__name__
    return printable(text[:60]) + ('...' if len(text) > 60 else '')


def shown(value: Any, path: Sequence[str]) -> str:
    """The value at a path, where it is short enough for a message."""
    for key in path:
        if isinstance(value, Namespace):
            value = vars(value)
        try:
            value = value[int(key[1:-1])] if key.startswith('[') and isinstance(value, (list, tuple)) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return ''
    if isinstance(value, str):
        return f', got {short(value)!r}'
    if isinstance(value, bool) or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10 ** 30):
        return f', got {value}'
    return f', got a {type(value).__name__}' if path else ''

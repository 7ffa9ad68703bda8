"""YAML files that people write: one mapping each, read with no surprises."""
import codecs
import os
import re
import stat
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import yaml

from .errors import PSTError

__all__ = ['read_config']

LARGEST = 2 ** 20  # bytes; the longest recipe has two thousand
MOST_VALUES = 100_000  # once aliases are written out
DEEPEST = 50
TAGS = {f'tag:yaml.org,2002:{name}' for name in ('map', 'seq', 'str', 'int', 'float', 'bool', 'null', 'merge')}


def read_config(path: os.PathLike) -> Dict[Any, Any]:
    """Read a YAML file that holds one mapping; an empty file is an empty one.

    What YAML would take for something else than a person does is refused rather than read: keys that come twice,
    numbers in base 8 or 60, dates, tags, and aliases that multiply.

    Raises:
        PSTError: If the file cannot be read, or is not such a mapping; names the file and the line.
    """
    text = _read_text(Path(path))
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise PSTError(f'{path} must hold one mapping of names to values, such as "epochs: 10".')
        for line, problem in _surprises(root):
            raise PSTError(f'{path}, line {line}: {problem}')
        loader = yaml.SafeLoader('')
        try:
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f', line {mark.line + 1}' if mark else ''
        raise PSTError(f'{path}{where} is not valid YAML: {e.problem or e.context}.') from None
    except yaml.YAMLError as e:
        raise PSTError(f'{path} is not valid YAML: {str(e).splitlines()[0]}.') from None
    except RecursionError:
        raise PSTError(f'{path} is not a config: it is nested too deeply.') from None
    except ValueError as e:  # a number or a date of impossible digits
        if isinstance(e, PSTError):
            raise
        raise PSTError(f'{path} is not valid YAML: {e}.') from None


def _read_text(path: Path) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise PSTError(f'{path} is a folder, or no ordinary file: name a YAML file.')
        if found.st_size > LARGEST:
            raise PSTError(f'{path} has {found.st_size:,} bytes, which no config needs: name a YAML file.')
        content = path.read_bytes()
    except OSError as e:
        raise PSTError(f'Cannot read the config {path}: {e.strerror}.') from None
    except ValueError as e:  # a NUL in the name
        raise PSTError(f'Cannot read the config {str(path)!r}: {e}.') from None
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode('utf-16' if wide else 'utf-8-sig')
    except UnicodeDecodeError as e:
        line = content.count(b'\n', 0, e.start) + 1
        raise PSTError(f'{path}, line {line} is not text in UTF-8: save the file in that encoding.') from None


def _surprises(root: yaml.MappingNode) -> Iterator[Tuple[int, str]]:
    """Line and problem of everything below a node that YAML and a person read otherwise."""
    sizes: Dict[int, Optional[int]] = {}
    yield from _visit(root, sizes, '', 0)
    if sizes[id(root)] > MOST_VALUES:
        yield 1, f'its aliases (*name) make {sizes[id(root)]:,} values of it, which no config needs.'


def _visit(node: yaml.Node, sizes: Dict[int, Optional[int]], key: str, depth: int) -> Iterator[Tuple[int, str]]:
    """The same of one node; notes, by its id, how many values it holds, None while it is being looked at."""
    line = node.start_mark.line + 1
    if id(node) in sizes:
        if sizes[id(node)] is None:
            yield line, 'an alias (*name) stands inside of what it names.'
        return
    sizes[id(node)] = None
    if depth > DEEPEST:
        yield line, 'it is nested too deeply.'
        return
    if isinstance(node, yaml.ScalarNode):
        problem = _odd_scalar(node)
        if problem:
            yield line, f'{key}: {problem}' if key else problem
        sizes[id(node)] = 1
        return
    if node.tag not in TAGS:
        yield line, f'the tag {node.tag!r} is not for configs: leave it out.'
    if isinstance(node, yaml.MappingNode):
        seen: Dict[Tuple[str, str], int] = {}
        for name, _ in node.value:
            at = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                yield at, 'a list or mapping cannot be a key.'
            elif (name.tag, name.value) in seen:
                yield at, f'{name.value!r} is there twice, first in line {seen[name.tag, name.value]}.'
            else:
                seen[name.tag, name.value] = at
        children = [(child, name.value) for name, value in node.value for child in (name, value)]
    else:
        children = [(child, key) for child in node.value]
    for child, name in children:
        yield from _visit(child, sizes, name, depth + 1)
    sizes[id(node)] = 1 + sum(sizes[id(child)] or 0 for child, _ in children)


def _odd_scalar(node: yaml.ScalarNode) -> Optional[str]:
    text = node.value if len(node.value) < 40 else f'{node.value[:40]}...'
    kind = node.tag.rpartition(':')[2]
    if kind == 'timestamp':
        return f'{text} is a date to YAML: put it in quotes.'
    if node.tag not in TAGS:
        return f'the tag {node.tag!r} is not for configs: leave it out.'
    if kind in ('int', 'float') and ':' in text:
        return f'{text} is a number in base 60 to YAML: put it in quotes, or write the number.'
    if kind == 'int' and re.match(r'[-+]?0[0-9_]', text):
        return f'{text} is a number in base 8 to YAML: put it in quotes, or write it without the leading 0.'
    return None

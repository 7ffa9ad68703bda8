"""Rows as plain text and Markdown tables."""
import math
import re
from decimal import Decimal
from numbers import Real
from typing import Any, Dict, List, Mapping, Sequence

from .files import columns_of

__all__ = ['differing_columns', 'format_table', 'markdown_table']

NUMBER = re.compile(r'[-+]?(\d[\d,]*(\.\d+)?(e[-+]?\d+)?|inf|nan)%?')


def differing_columns(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> List[Dict[str, Any]]:
    """The rows without the columns that are the same in all of them.

    Args:
        rows: The rows.
        first: Columns to put first, such as those of a setting; the others stay in their order.
    """
    columns = columns_of(rows)
    kept = [c for c in columns if len({str(row.get(c)) for row in rows}) > 1]
    kept = [*(c for c in first if c in kept), *(c for c in kept if c not in first)]
    return [{c: row[c] for c in kept if c in row} for row in rows]


def format_table(rows: Sequence[Mapping[str, Any]], decimals: int = 4) -> str:
    """Rows as aligned text: columns in the order in which they first appear, numbers flush right, '-' for None.

    Args:
        rows: The rows.
        decimals: Most decimals of a column with floats; all its floats have as many as the most precise one needs.
    """
    columns = columns_of(rows)
    if not columns:
        return ''
    texts = [_column([row.get(c, '') for row in rows], decimals) for c in columns]
    right = [all(NUMBER.fullmatch(text) or text in ('', '-') for text in column) for column in texts]
    widths = [max(map(len, (c, *column))) for c, column in zip(columns, texts)]

    def line(cells: Sequence[str]) -> str:
        return '  '.join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, right)).rstrip()

    return '\n'.join([line(columns), '  '.join('-' * width for width in widths), *map(line, zip(*texts))])


def _column(values: Sequence[Any], decimals: int) -> List[str]:
    """The cells of a column as text."""
    floats = [float(v) for v in values if isinstance(v, Real) and not hasattr(v, '__index__') and math.isfinite(v)]
    needed = max((-Decimal(repr(v)).normalize().as_tuple().exponent for v in floats), default=0)
    style = f'.{max(1, min(needed, decimals))}f'
    if 0 < max(map(abs, floats), default=0) < 10 ** (1 - decimals):
        style = '.2e'  # or little would be left of them

    def text(value: Any) -> str:
        if value is None:
            return '-'
        whole = hasattr(value, '__index__')
        return format(float(value), style) if isinstance(value, Real) and not whole else str(value)
    return [text(v) for v in values]


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same columns as a Markdown table."""
    lines = [list(rows[0]), ['---'] * len(rows[0]), *(list(row.values()) for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

"""Rows as plain text and Markdown tables."""
from typing import Any, Dict, List, Mapping, Sequence

from .files import columns_of

__all__ = ['differing_columns', 'format_table', 'markdown_table']


def differing_columns(rows: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """The rows without the columns that are the same in all of them."""
    kept = [c for c in columns_of(rows) if len({str(row.get(c)) for row in rows}) > 1]
    return [{c: row[c] for c in kept if c in row} for row in rows]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text; columns in the order in which they first appear."""
    columns = columns_of(rows)
    cells = [[str(c) for c in columns]] + [[str(row.get(c, '')) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return '\n'.join([lines[0], '  '.join('-' * width for width in widths), *lines[1:]])


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same columns as a Markdown table."""
    lines = [list(rows[0]), ['---'] * len(rows[0]), *(list(row.values()) for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

"""Plain text tables, and the table of this package's models."""
import json
from typing import Any, Dict, List, Mapping, Sequence

import timm
import torch

from pst_timm.hub import count_gmacs
from pst_timm.models.resnet_pst import WEIGHTS

__all__ = ['bundled_weights', 'differing_columns', 'format_table', 'model_rows']


def differing_columns(rows: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """The rows without the columns that are the same in all of them."""
    columns = dict.fromkeys(key for row in rows for key in row)
    kept = [c for c in columns if len({str(row.get(c)) for row in rows}) > 1]
    return [{c: row[c] for c in kept if c in row} for row in rows]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(c) for c in columns]] + [[str(row.get(c, '')) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return '\n'.join([lines[0], '  '.join('-' * width for width in widths), *lines[1:]])


def bundled_weights() -> List[Dict[str, Any]]:
    """Records of the weights that come with the package: tag, data set, accuracy in percent, command to make them."""
    return [json.loads(path.read_text()) for path in sorted(WEIGHTS.glob('*.json'))]


def model_rows() -> List[Dict[str, Any]]:
    """One row per model of this package: parameters at 1000 classes, GMACs, input size, published weights."""
    rows = []
    for name in timm.list_models('*resnet*_pst'):
        # no memory is touched, only shapes are followed
        with torch.device('meta'):
            model = timm.create_model(name)
        size = model.default_cfg['input_size']
        tags = [m.split('.', 1)[1] for m in timm.list_pretrained(f'{name}.*')]
        rows.append(dict(
            model=name,
            parameters=f'{sum(p.numel() for p in model.parameters()):,}',
            GMACs=f'{count_gmacs(model, size):.3f}',
            input=size[-1],
            weights=', '.join(tags) or 'not yet trained',
        ))
    return rows

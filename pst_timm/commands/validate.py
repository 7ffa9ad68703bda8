"""`pst-timm validate` and validate.py."""
import json
from typing import Any, Dict, Mapping, Optional, Sequence

from timm.utils import setup_default_logging

from pst_timm.engine import parse_validate_args, validate
from pst_timm.utils.errors import PSTError
from pst_timm.utils.tables import differing_columns, format_table

from .common import fail


def main(argv: Optional[Sequence[str]] = None, prog: str = 'pst-timm validate') -> int:
    """Evaluate from the words of a command line (`sys.argv` if None); returns the exit code."""
    try:
        args = parse_validate_args(argv, prog)
        setup_default_logging()
        results = validate(args)
    except PSTError as e:
        return fail(prog, e)
    if len(results) > 1:
        print(format_table(differing_columns([_readable(row) for row in results])))
    # the marker that timm's own tools look for
    print(f'--result\n{json.dumps(results[0] if len(results) == 1 else results, indent=4)}')
    return 0


def _readable(row: Mapping[str, Any]) -> Dict[str, Any]:
    """A row of results for a table: a k beyond the number of tokens as what it is, answers left to the file."""
    row = {k: v for k, v in row.items() if k not in ('answers', 'top1_err', 'top5_err')}
    selected = row.pop('selected', None)
    if selected is not None and selected < row['topk']:
        row['topk'] = f'{row["topk"]} (all {selected})'
    return row

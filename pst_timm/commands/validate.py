"""`pst-timm validate` and validate.py."""
import json
from argparse import Namespace
from typing import Any, Dict, Mapping, Optional, Sequence

from pst_timm.engine.args import parse_validate_args
from pst_timm.utils.errors import PSTError
from pst_timm.utils.tables import differing_columns, format_table

from .common import run_parsed


def main(argv: Optional[Sequence[str]] = None, prog: str = 'pst-timm validate') -> int:
    """Evaluate from the words of a command line (`sys.argv` if None); returns the exit code."""
    return run_parsed(prog, parse_validate_args, argv, _validate)


def _validate(args: Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.deploy.runtime import is_model_file, open_source
    from pst_timm.engine import validate

    setup_default_logging()
    results = validate(args, open_source, is_model_file)
    if len(results) > 1:
        print(format_table(differing_columns([_readable(row) for row in results], first=('topk', 'fine_fusion'))))
    # the marker that timm's own tools look for
    print(f'--result\n{json.dumps(results[0] if len(results) == 1 else results, indent=4)}')
    failed = [row for row in results if 'error' in row]
    if failed:
        names = ', '.join(str(row['checkpoint'] or row['model']) for row in failed)
        raise PSTError(f'{len(failed)} of {len(results)} evaluations failed, of {names}: the reasons are above.')


def _readable(row: Mapping[str, Any]) -> Dict[str, Any]:
    """A row of results for a table: a k beyond the number of tokens as what it is, answers left to the file."""
    row = {k: v for k, v in row.items() if k not in ('answers', 'top1_err', 'top5_err')}
    selected = row.pop('selected', None)
    if selected is not None and selected < row.get('topk', 0):
        row['topk'] = f'{row["topk"]} (all {selected})'
    return row

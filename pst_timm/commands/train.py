"""`pst-timm train` and train.py."""
from typing import Optional, Sequence

from timm.utils import setup_default_logging

from pst_timm.engine import parse_train_args, train
from pst_timm.utils.errors import PSTError

from .common import fail


def main(argv: Optional[Sequence[str]] = None, prog: str = 'pst-timm train') -> int:
    """Train from the words of a command line (`sys.argv` if None); returns the exit code."""
    try:
        args = parse_train_args(argv, prog)
        setup_default_logging()
        result = train(args)
    except PSTError as e:
        return fail(prog, e)
    if result.best_checkpoint is not None:
        print(f'Best checkpoint: {result.best_checkpoint}')
    return 0

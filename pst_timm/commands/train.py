"""`pst-timm train` and train.py."""
from argparse import Namespace
from typing import Optional, Sequence

from pst_timm.engine.args import parse_train_args
from pst_timm.utils.errors import PSTError

from .common import fail, run


def main(argv: Optional[Sequence[str]] = None, prog: str = 'pst-timm train') -> int:
    """Train from the words of a command line (`sys.argv` if None); returns the exit code."""
    try:
        args = parse_train_args(argv, prog)
    except PSTError as e:
        return fail(prog, e)
    return run(prog, _train, args)


def _train(args: Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.engine import train

    setup_default_logging()
    result = train(args)
    if result.best_checkpoint is not None:
        print(f'Best checkpoint: {result.best_checkpoint}')

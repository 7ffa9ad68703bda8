"""`pst-timm train` and train.py."""
from argparse import Namespace
from typing import Optional, Sequence

from pst_timm.engine.args import parse_train_args

from .common import run_parsed


def main(argv: Optional[Sequence[str]] = None, prog: str = 'pst-timm train') -> int:
    """Train from the words of a command line (`sys.argv` if None); returns the exit code."""
    return run_parsed(prog, parse_train_args, argv, _train)


def _train(args: Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.engine import train

    setup_default_logging()
    result = train(args)
    if result.best_checkpoint is not None:
        print(f'Best checkpoint: {result.best_checkpoint}')

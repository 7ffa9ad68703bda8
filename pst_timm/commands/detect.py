"""`pst-timm detect`: object detectors over a PST pyramid."""
import argparse
from argparse import Namespace
from typing import Any, Dict, Mapping, Optional, Sequence

from pst_timm.utils.errors import PSTError

from .common import ArgumentParser, fail, run

ACTIONS = {
    'train': 'train a detector',
    'validate': 'evaluate one: average precision, and that of each class',
    'predict': 'draw the boxes in images, or write them as JSON',
    'export': 'write one for deployment',
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm detect`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm detect', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Object detection by FCOS or RetinaNet over a PST pyramid, on any timm trunk.',
        epilog='\n'.join(f'  {name:10}{what}' for name, what in ACTIONS.items())
               + '\n\npst-timm detect ACTION --help tells the flags of an action.')
    parser.add_argument('action', choices=[*ACTIONS], help='see below')
    parser.add_argument('words', nargs=argparse.REMAINDER, metavar='...', help='flags of the action')
    args = parser.parse_args(argv)
    return {
        'train': _main_train, 'validate': _main_validate, 'predict': _main_predict, 'export': _main_export,
    }[args.action](args.words)


def _main_train(words: Sequence[str]) -> int:
    from pst_timm.detection.flags import parse_train_args

    prog = 'pst-timm detect train'
    try:
        args = parse_train_args(words, prog)
    except PSTError as e:
        return fail(prog, e)
    return run(prog, _train, args)


def _train(args: Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.detection.job import train

    setup_default_logging()
    result = train(args)
    if result.best_checkpoint is not None:
        print(f'Best checkpoint: {result.best_checkpoint}')


def _main_validate(words: Sequence[str]) -> int:
    from pst_timm.detection.flags import parse_validate_args

    prog = 'pst-timm detect validate'
    try:
        args = parse_validate_args(words, prog)
    except PSTError as e:
        return fail(prog, e)
    return run(prog, _validate, args)


def _validate(args: Namespace) -> None:
    import json

    from timm.utils import setup_default_logging

    from pst_timm.detection.validation import validate
    from pst_timm.utils.tables import format_table

    setup_default_logging()
    rows = validate(args)
    print(format_table([_readable(row) for row in rows]))
    # the marker that timm's own tools look for
    print(f'--result\n{json.dumps(rows[0] if len(rows) == 1 else rows, indent=4)}')


def _readable(row: Mapping[str, Any]) -> Dict[str, Any]:
    """What a person wants to see of a row of results."""
    hidden = ('param_count', 'checkpoint', 'ema', 'selected', 'images')
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items() if k not in hidden}


def _main_predict(words: Sequence[str]) -> int:
    from pst_timm.detection.predict import main_predict

    return main_predict(words)


def _main_export(words: Sequence[str]) -> int:
    raise NotImplementedError

"""The hub's functions as commands."""
import argparse
import logging
import sys
from pathlib import Path
from typing import List, Optional, Sequence

from timm.utils import setup_default_logging

from pst_timm.layers import FINE_FUSIONS

from .conversion import DTYPES, convert
from .errors import HubError
from .publishing import publish

__all__ = ['convert_main', 'publish_main', 'read_class_names']

CHECKPOINT_HELP = 'training checkpoint, run folder, .safetensors file, or folder with config.json'


def _add_ema_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--no-ema', action='store_true', help='the weights as trained, even where there is a moving average')


def _fail(parser: argparse.ArgumentParser, error: HubError) -> int:
    print(f'{parser.prog}: error: {error}', file=sys.stderr)
    return error.exit_code


def convert_main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm convert`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='pst-timm convert',
        description='Write the weights of a checkpoint as .safetensors, or back as a training checkpoint.')
    parser.add_argument('source', help=CHECKPOINT_HELP)
    parser.add_argument('target', help='file to write: .safetensors or .pth.tar')
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='precision (default: %(default)s)')
    _add_ema_flag(parser)
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    try:
        done = convert(args.source, args.target, args.dtype, not args.no_ema)
    except HubError as e:
        return _fail(parser, e)
    print(f'Written: {done.path} ({done.path.stat().st_size / 2 ** 20:.1f} MiB, {args.dtype}, '
          f'{"moving average (EMA)" if done.ema else "no EMA"}).')
    print(f'Logits differ from the source by {done.difference:.1e} of the largest one, top-1 agrees for '
          f'{done.agreement:.0%} of 16 random images.')
    return 0


def publish_main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm publish`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='pst-timm publish',
        description='Publish a checkpoint on the Hub: weights as safetensors, config.json and a model card.')
    parser.add_argument('checkpoint', help=CHECKPOINT_HELP)
    parser.add_argument('--repo-id', required=True, metavar='ORG/NAME', help='repository, made if there is none')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', help='branch, made if there is none (default: the main one)')
    parser.add_argument('--dry-run', action='store_true', help='write the folder to look at, and stop')
    parser.add_argument('--folder', help='where to write the files (default in a dry run: output/publish/NAME)')
    parser.add_argument('--results', help='what validate.py --results-file wrote for these weights')
    parser.add_argument('--topk', type=int, help='fine attention the accuracy was measured with')
    parser.add_argument('--fine-fusion', choices=FINE_FUSIONS)
    parser.add_argument('--data-set', help='name of the data set, for the card')
    parser.add_argument('--class-names', type=Path, help='text file, one name a line')
    parser.add_argument('--license', default='apache-2.0', help='licence of the weights (default: %(default)s)')
    _add_ema_flag(parser)
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    try:
        done = publish(
            args.checkpoint, args.repo_id, private=args.private, revision=args.revision, dry_run=args.dry_run,
            folder=args.folder, use_ema=not args.no_ema, topk=args.topk, fine_fusion=args.fine_fusion,
            results=args.results, class_names=read_class_names(args.class_names), data_set=args.data_set,
            license=args.license)
    except HubError as e:
        return _fail(parser, e)
    print(f'Weights: {"the moving average (EMA)" if done.ema else "no EMA"}. Loaded again, they give the same logits.')
    if done.accuracy is None:
        print('The card tells no accuracy: none was measured for these weights (see --results).')
    if done.folder is not None:
        print(f'Written: {done.folder}')
    print(f'Published: {done.url}' if done.url else 'A dry run: nothing was published.')
    return 0


def read_class_names(path: Optional[Path]) -> Optional[List[str]]:
    """The lines of a text file that are not empty, None for no file.

    Raises:
        HubError: If it cannot be read as text.
    """
    if path is None:
        return None
    try:
        return [name for name in path.read_text(encoding='utf-8').split('\n') if name]
    except (OSError, UnicodeDecodeError) as e:
        raise HubError(f'Cannot read the class names {path}: {e}.') from None

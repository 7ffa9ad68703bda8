"""`pst-timm predict`: the classes of images."""
import argparse
import logging
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, TextIO

from pst_timm.utils.errors import PSTError

from .common import (
    ArgumentParser,
    add_output,
    add_overwrite,
    add_reading_flags,
    add_source,
    at_least,
    files_of,
    open_subject_of,
    positive,
    run,
)

FORMATS = ('table', 'csv', 'jsonl')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm predict`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm predict', intermixed=True,
        description='Tell the most probable classes of images, with probabilities. Results go to standard output, '
                    'all else to standard error.')
    add_source(parser)
    parser.add_argument(
        'images', nargs='*', metavar='IMAGE', help='image, or folder with images in it and in the folders below')
    parser.add_argument(
        '--list', metavar='FILE', help='text file with more of these, one path a line; - for standard input')
    parser.add_argument('--top', type=at_least(1), default=5, metavar='K', help='classes of an image (default: 5)')
    parser.add_argument(
        '--temperature', type=positive, default=1., metavar='T',
        help='divide the logits by T: above 1 for less confidence (default: 1)')
    parser.add_argument(
        '--format', choices=FORMATS,
        help='default: what the ending of --output says, else table in a terminal and csv elsewhere')
    add_output(parser, '.csv, .jsonl or .txt file to write, instead of standard output')
    add_overwrite(parser)
    add_reading_flags(parser)
    args = parser.parse_args(argv)
    if not args.images and args.list is None:
        parser.error('name images or folders, or a list of them with --list')
    if args.output is not None:
        ending = {'.csv': 'csv', '.jsonl': 'jsonl', '.txt': 'table'}.get(args.output.suffix)
        if ending is None and args.format is None:
            parser.error(f'--output {args.output} must end with .csv, .jsonl or .txt, or say --format')
        args.format = args.format or ending
        if ending not in (None, args.format):
            parser.error(f'--output {args.output} is no name for --format {args.format}')
    elif args.format is None:
        args.format = 'table' if sys.stdout is not None and sys.stdout.isatty() else 'csv'
    return run(parser.prog, _predict, args)


def _predict(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.checkpoints import readable_names
    from pst_timm.review.answers import open_loose
    from pst_timm.review.predict import EIGHTHS, calibration_note, heading, predict, render
    from pst_timm.utils.files import check_output
    from pst_timm.utils.markdown import plain

    setup_default_logging(logging.WARNING)
    if args.output is not None:
        check_output(args.output, args.overwrite, [*files_of(args.source), *args.images, *filter(None, [args.list])])
    paths = [*args.images, *_listed(args.list)]
    subject = open_subject_of(args, args.source)
    samples = open_loose(subject, paths)
    size = 'x'.join(map(str, dict.fromkeys(subject.input_size[1:])))
    count = f'{len(samples):,} image{"s" if len(samples) > 1 else ""}'
    print(f'{plain(subject.name)}: {len(subject.class_names)} classes, {count} at {size} px, '
          f'{calibration_note(subject, args.temperature)}.', file=sys.stderr)
    names = subject.class_names
    if args.format == 'table':
        names = readable_names(names, subject.model.pretrained_cfg, subject.knows_names)
    top = min(args.top, len(subject.class_names))
    with _opened(args.output, args.format) as file:
        bars = EIGHTHS if (file.encoding or '').lower().startswith('utf') else '#'
        file.write(heading(args.format, top))
        for batch in predict(
                subject, samples, top, args.temperature, args.batch_size, args.workers,
                show=args.output is not None or not file.isatty()):
            file.write(render(batch, args.format, names, top, bars))
            file.flush()
    if args.output is not None:
        print(f'Written: {args.output}', file=sys.stderr)


def _listed(source: Optional[str]) -> List[str]:
    """The paths in a list of that name; errors as in `listed_paths`."""
    from pst_timm.review.predict import listed_paths

    if source is None:
        return []
    try:
        if source == '-':
            return list(listed_paths(sys.stdin.buffer, 'Standard input'))
        with open(source, 'rb') as file:
            return list(listed_paths(file, source))
    except OSError as e:
        raise PSTError(f'The list {source} cannot be read ({e.strerror}).') from None


@contextmanager
def _opened(path: Optional[Path], format: str) -> Iterator[TextIO]:
    """Where predictions go; paths that are no text are written with the bytes that they have.

    Raises:
        PSTError: If the file cannot be written; what was there before is untouched.
    """
    from pst_timm.utils.files import staged

    if path is None:
        if format == 'csv' and hasattr(sys.stdout, 'reconfigure'):
            sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape', newline='\n')
        yield sys.stdout
        return
    with staged(path) as temporary:
        try:
            with open(temporary, 'w', encoding='utf-8', errors='surrogateescape', newline='\n') as file:
                yield file
        except OSError as e:
            raise PSTError(f'Cannot write {path}: {e.strerror or e}.') from e

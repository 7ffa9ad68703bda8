"""`pst-timm audit`: what is wrong with a folder of images."""
import argparse
from pathlib import Path
from typing import Optional, Sequence

from pst_timm.utils.errors import PSTError

from .common import (
    ArgumentParser,
    add_overwrite,
    add_reading_flags,
    add_source,
    at_least,
    files_of,
    open_subject_of,
    run,
    split_words,
)

RANKINGS = ('self-confidence', 'confident-learning')  # also in a room that needs torch


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm audit`; returns the exit code."""
    words, train_flags = split_words(argv)
    parser = ArgumentParser(
        prog='pst-timm audit', usage='%(prog)s SOURCE --data-dir DATA -o FOLDER [flags] [-- flags of pst-timm train]',
        description='Look for leakage between splits, wrong labels, duplicates, outliers, odd sizes and broken files. '
                    'Nothing is deleted or moved.')
    add_source(parser, nargs='?', metavar='SOURCE')
    parser.add_argument('--data-dir', required=True, help='folder of class folders, or of splits with such, or .tar')
    parser.add_argument('--split', default='validation', help='split to audit (default: %(default)s)')
    parser.add_argument(
        '--against', nargs='*', metavar='SPLIT',
        help='splits in which copies are looked for too, none if empty (default: all that are there)')
    parser.add_argument(
        '--cross', type=at_least(2), metavar='K',
        help='have all images scored by models that have not seen them: train K, each on the others of K folds')
    parser.add_argument('--config', metavar='FILE', help='recipe of --cross, YAML (default: that of SOURCE)')
    parser.add_argument(
        '--repeats', type=at_least(1), default=1, metavar='R',
        help='do that R times, with other folds each time, and take the means (default: 1)')
    parser.add_argument('--seed', type=at_least(0), default=0, help='seed of the folds (default: %(default)s)')
    parser.add_argument('--resume', choices=('auto',), help='go on with folds that are there')
    parser.add_argument(
        '--ranking', choices=RANKINGS, default=RANKINGS[0], help='order of wrong labels (default: %(default)s)')
    parser.add_argument(
        '--mirror', action='store_true', help='score each image with its mirror image: not for letters and digits')
    parser.add_argument(
        '--crops', action='store_true', help='score each image by five crops of it, with --mirror by ten')
    parser.add_argument('-o', '--output', type=Path, required=True, metavar='FOLDER', help='folder to write to')
    parser.add_argument('--sheet', default='sheet.png', metavar='NAME', help='contact sheet, .png or .pdf')
    parser.add_argument('--sheet-images', type=at_least(0), default=48, help='most of a kind on it (default: 48)')
    add_overwrite(parser, 'an audit')
    add_reading_flags(parser)
    args = parser.parse_args(words)
    args.train_flags = train_flags
    if args.cross is None and (args.config or args.train_flags or args.resume or args.repeats > 1):
        parser.error('--config, --repeats, --resume and flags after -- are for --cross K: add it, or leave them out')
    if args.source is None and not args.config:
        parser.error('name a model, or how to train some: --cross K --config FILE')
    return run(parser.prog, _audit, args)


def _audit(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.review.audit import (
        audit,
        check_folder,
        open_others,
        open_split,
        root_of,
        seen_in_training,
        write_report,
    )
    from pst_timm.review.crossing import Cross, input_channels, training_flags
    from pst_timm.utils.locks import Locked, locked

    setup_default_logging()
    read = [*files_of(args.source or ''), *([Path(args.config)] if args.config else [])]
    check_folder(args.output, args.sheet, args.overwrite, read)
    flags = training_flags(args.source, args.config, args.train_flags) if args.cross else {}
    channels = input_channels(flags) if args.cross else None
    subject = open_subject_of(args, args.source) if args.source else None
    samples, mode = open_split(subject, args.data_dir, args.split, channels)
    check_folder(args.output, args.sheet, args.overwrite, read, root_of(samples))
    others = open_others(mode, samples, args.data_dir, args.against)
    note = seen_in_training(args.source, args.split) if args.source and not args.cross else None
    if note:
        print(note, flush=True)
    try:
        args.output.mkdir(exist_ok=True)
        with locked(args.output / 'audit.lock'):
            cross = args.cross and Cross(
                flags, args.cross, args.output / 'folds', args.seed, bool(args.resume),
                args.overwrite and not args.resume, args.device, args.repeats)
            report = audit(
                subject, samples, others, split=args.split, cross=cross or None, ranking=args.ranking,
                batch_size=args.batch_size, workers=args.workers, mirror=args.mirror,
                crops=args.crops)
            report.notes += [note] if note else []
            written = write_report(report, args.output, samples, others, args.sheet, args.sheet_images)
    except Locked as e:
        raise PSTError(f'Another audit is at work in {args.output} ({e}): choose another --output.') from None
    except OSError as e:
        raise PSTError(f'Cannot write to {args.output} ({e.strerror or e}): choose another --output.') from e
    finally:
        remove_empty(args.output)
    print('\n'.join(report.summary()))
    for path in written:
        print(f'Written: {path}')


def remove_empty(folder: Path) -> None:
    """Remove a folder that nothing was written to."""
    try:
        folder.rmdir()
    except OSError:  # not empty, or not there
        pass

"""`pst-timm monitor recalibrate`: a model whose probabilities can be believed."""
import argparse
import logging
import sys
from typing import Optional, Sequence

from .common import ArgumentParser, add_output, add_overwrite, add_reading_flags, add_source, open_subject_of, run


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm monitor recalibrate`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm monitor recalibrate',
        description='Refit the temperature of a model on labelled images that it was not trained on, and write it as a '
                    'new model folder with that in its classifier: what is most probable stays so.')
    add_source(parser)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='labelled images: a folder of class folders')
    parser.add_argument('--split', default='validation', help='split of the data (default: %(default)s)')
    add_output(parser, "folder to write (default: the source's name + -calibrated, next to it)")
    add_overwrite(parser, 'an earlier model in the folder')
    parser.add_argument(
        '--force', action='store_true', help='write it where calibration gets no better, too (default: refuse to)')
    add_reading_flags(parser)
    return run(parser.prog, _recalibrate, parser.parse_args(argv))


def _recalibrate(args: argparse.Namespace) -> None:
    from timm.utils import setup_default_logging

    from pst_timm.review.recalibrate import recalibrate
    from pst_timm.utils.tables import format_table

    setup_default_logging(logging.WARNING)
    subject = open_subject_of(args, args.source)
    done = recalibrate(
        subject, args.data_dir, args.output, args.split, args.force, args.overwrite, args.batch_size, args.workers)
    fit = done.fit
    before = f', {done.temperature:.4g} with that of before' if done.temperature != fit.temperature else ''
    print(f'Temperature {fit.temperature:.4g}{before}, from {done.images:,} images. Each half of them at the '
          f'temperature of the other half:\n')
    print(format_table([
        {'': 'as it was', 'loss': f'{fit.loss:.4f}', 'calibration error': f'{fit.ece:.2%}'},
        {'': 'calibrated', 'loss': f'{fit.loss_refitted:.4f}', 'calibration error': f'{fit.ece_refitted:.2%}'},
    ]))
    if not fit.helps:
        print('\nIt is no better calibrated; written all the same, as --force says.')
    print(f'\nWritten: {done.folder}')
    print(f'Look at its answers: pst-timm predict {done.folder} IMAGE ...', file=sys.stderr)

"""`pst-timm study`: a grid of models and seeds, trained, evaluated and put on record."""
import argparse
import signal
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from timm.utils import setup_default_logging

from pst_timm.study.config import read_study
from pst_timm.study.runner import progress_of, run_one, run_study
from pst_timm.utils.devices import check_device
from pst_timm.utils.errors import PSTError

from .common import fail

STOPPED = 130  # as a shell reports a command that was interrupted


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'expected a whole number from 0 on, got {text!r}')
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='pst-timm study',
        description='Train and evaluate a grid of models and seeds. Start it again to go on after a stop.')
    parser.add_argument('config', help='YAML file of the study, such as configs/study/cpu.yaml')
    parser.add_argument('--data-dir', required=True, help='image folder with the splits')
    parser.add_argument('--output', type=Path, default=Path('output/study'), help='folder for the runs')
    parser.add_argument('--results', type=Path, help='folder for the tables (default: results/study/NAME)')
    parser.add_argument('--device', default='', help='cpu, cuda, ... (default: the best present)')
    parser.add_argument('-j', '--jobs', type=_count, default=0, help='cells at once (default: one per GPU or core)')
    parser.add_argument('--cell', help='run this cell alone, in this process')
    parser.add_argument('--of-study', action='store_true', help=argparse.SUPPRESS)  # stop when the study does
    parser.add_argument('--list', action='store_true', help='show the cells and their state, and run nothing')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm study`; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    setup_default_logging()
    try:
        study = read_study(args.config, args.data_dir)
        if args.list:
            for cell in study.cells:
                print(f'{cell.id}: {progress_of(cell, args.output / study.name)}')
            return 0
        if args.cell:
            run_one(study, args.cell, args.data_dir, args.output, args.device, args.jobs, args.of_study)
            return 0
        results = args.results or Path('results/study') / study.name
        signal.signal(signal.SIGTERM, _interrupt)
        run_study(
            study, args.config, args.data_dir, args.output, results, str(check_device(args.device)), args.jobs)
    except PSTError as e:
        return fail(parser.prog, e)
    except KeyboardInterrupt:
        print('\nStopped. Start the same command again to go on.', file=sys.stderr)
        return STOPPED
    print(f'All {len(study.cells)} cells are finished: {results}/. `pst-timm report` makes tables and plots of them.')
    return 0


def _interrupt(number: int, frame: Any) -> None:
    """End as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some senders say it twice, to the process and to its group
    raise KeyboardInterrupt

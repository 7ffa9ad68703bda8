"""`pst-timm study`: a grid of models and seeds, trained, evaluated and put on record."""
import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from filelock import FileLock, Timeout
from timm.utils import setup_default_logging

from pst_timm.study.cell import run_cell
from pst_timm.study.config import Study, read_study
from pst_timm.study.runner import STOPPED, epochs_done, finished, measure_latency, merge, run_study, stop_with_parent
from pst_timm.utils.devices import best_device, check_device
from pst_timm.utils.errors import PSTError, did_you_mean

_logger = logging.getLogger(__name__)


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
    args = _parser().parse_args(argv)
    setup_default_logging()
    try:
        study = read_study(args.config, args.data_dir)
        if args.list:
            for cell in study.cells:
                state = 'finished' if finished(cell, args.output / study.name) else (
                    f'{epochs_done(cell, args.output / study.name)} of {cell.epochs} epochs')
                print(f'{cell.id}: {state}')
            return 0
        if args.cell:
            return _main_cell(study, args)
        return _main_study(study, args)
    except PSTError as e:
        print(f'pst-timm study: error: {e}', file=sys.stderr)
        return e.exit_code


def _main_cell(study: Study, args: argparse.Namespace) -> int:
    cells = {c.id: c for c in study.cells}
    if args.cell not in cells:
        raise PSTError(f'{args.config} has no cell {args.cell!r}.{did_you_mean(args.cell, cells)}')
    if args.of_study:
        stop_with_parent()
    output = args.output / study.name
    lock = FileLock(output / args.cell / 'cell.lock')
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        # a cell of a study that was killed may still be writing its last checkpoint
        _logger.info(f'{args.cell}: another process is at work on it, waiting for its end.')
        held = lock.acquire()
    with held:
        if not finished(cells[args.cell], output):
            run_cell(cells[args.cell], args.data_dir, output, args.device, args.jobs)
    return 0


def _main_study(study: Study, args: argparse.Namespace) -> int:
    def interrupt(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some senders say it twice, to the process and to its group
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    results = args.results or Path('results/study') / study.name
    device = args.device or best_device()
    check_device(device)
    output = args.output / study.name
    try:
        with FileLock(output / 'study.lock', timeout=0):
            failed = run_study(study, args.config, args.data_dir, args.output, results, device, args.jobs)
            if failed:
                raise PSTError(
                    f'{len(failed)} cells failed: {", ".join(failed)}. Their logs say why; start the study again to '
                    f'run what is missing.')
            merge(results, study, 'latency', measure_latency(study, device))
    except Timeout:
        raise PSTError(f'This study is already at work in {output}: wait, or choose another --output.') from None
    except OSError as e:
        raise PSTError(f'{e}. Make room, or mend the permissions; the same command goes on where it was.') from e
    except KeyboardInterrupt:
        print('\nStopped. Start the same command again to go on.', file=sys.stderr)
        return STOPPED
    print(f'All {len(study.cells)} cells are finished: {results}/. `pst-timm report` makes tables and plots of them.')
    return 0

"""`pst-timm study`: a grid of models and seeds, trained, evaluated and put on record."""
import argparse
import signal
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from .common import INTERRUPTED, ArgumentParser, add_output, at_least, run


def main(argv: Optional[Sequence[str]] = None) -> int:
    """`pst-timm study`; returns the exit code."""
    parser = ArgumentParser(
        prog='pst-timm study',
        description='Train and evaluate a grid of models and seeds. Start it again to go on after a stop.')
    parser.add_argument('config', help='YAML file of the study, such as configs/study/cpu.yaml')
    parser.add_argument('--data-dir', required=True, help='image folder with the splits')
    add_output(parser, 'folder for the runs (default: output/study)', default=Path('output/study'))
    parser.add_argument('--results', type=Path, help='folder for the tables (default: results/study/NAME)')
    parser.add_argument('--device', default='', help='cpu, cuda, ... (default: the best present)')
    parser.add_argument('-j', '--jobs', type=at_least(0), default=0, metavar='N',
                        help='cells at once (default: one per GPU or core)')
    parser.add_argument('--cell', help='run this cell alone, in this process')
    parser.add_argument('--of-study', action='store_true', help=argparse.SUPPRESS)  # stop when the study does
    parser.add_argument('--list', action='store_true', help='show the cells and their state, and run nothing')
    return run(parser.prog, _study, parser.parse_args(argv))


def _study(args: argparse.Namespace) -> Optional[int]:
    from timm.utils import setup_default_logging

    from pst_timm.study.config import read_study
    from pst_timm.study.runner import progress_of, run_one, run_study
    from pst_timm.utils.devices import check_device

    setup_default_logging()
    study = read_study(args.config, args.data_dir)
    if args.list:
        for cell in study.cells:
            print(f'{cell.id}: {progress_of(cell, args.output / study.name)}')
        return None
    if args.cell:
        run_one(study, args.cell, args.data_dir, args.output, args.device, args.jobs, args.of_study)
        return None
    results = args.results or Path('results/study') / study.name
    device = str(check_device(args.device))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_study(study, args.config, args.data_dir, args.output, results, device, args.jobs)
    except KeyboardInterrupt:
        print('\nStopped. Start the same command again to go on.', file=sys.stderr)
        return INTERRUPTED
    print(f'All {len(study.cells)} cells are finished: {results}/. `pst-timm report` makes tables and plots of them.')
    return None


def _interrupt(number: int, frame: Any) -> None:
    """End as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some senders say it twice, to the process and to its group
    raise KeyboardInterrupt

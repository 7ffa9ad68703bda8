"""A study: a grid of models and seeds, trained with one recipe, evaluated alike, and put on record.

    pst-timm study configs/study/cpu.yaml --data-dir data/tiny-imagenet-200

Every cell of the grid is a process of its own that runs the ordinary training engine, one for each GPU, or one for
each core of a CPU. A study that was stopped, in whatever way, goes on where it was: finished cells are not run again,
and those that were at work resume from their last checkpoint.
"""
import argparse
import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from filelock import FileLock, Timeout
from timm.utils import setup_default_logging
from tqdm import tqdm

from pst_timm.engine import EngineError, train_args
from pst_timm.engine.setup import autocast_for, best_device, import_modules, init_device
from pst_timm.hub import count_gmacs, did_you_mean

from .measure import median_ratio, percentile, time_in_turn
from .study_cell import (
    RECORD,
    Row,
    check_packages,
    hardware_name,
    read_csv,
    read_record,
    run_cell,
    settings_of,
    write_whole,
)
from .study_config import Cell, Study, read_study

__all__ = ['main', 'run_study']

_logger = logging.getLogger(__name__)

TABLES = ('cells', 'evaluations', 'curves', 'latency')
STOPPED = 130  # as a shell reports a command that was interrupted


def finished(cell: Cell, output: Path) -> bool:
    """Whether a cell is done.

    Raises:
        EngineError: If it was done, or begun, with other settings.
    """
    folder = output / cell.id
    record = read_record(folder / RECORD)
    begun = settings_of(folder) if record is None else record['settings']
    if begun not in (None, cell.settings):
        raise EngineError(
            f'{folder} was run with other settings than the study now has: choose another --output, or remove that '
            f'folder to run the cell again.')
    return record is not None


def epochs_done(cell: Cell, output: Path) -> int:
    """Epochs that a cell has trained so far."""
    summary = output / cell.id / 'summary.csv'
    return max(0, len(summary.read_text().splitlines()) - 1) if summary.is_file() else 0


@dataclass
class Slot:
    """A place where one cell at a time can run."""
    device: str
    environment: Dict[str, str]
    process: Optional[subprocess.Popen] = None
    cell: Optional[Cell] = None


def check_device(name: str) -> None:
    """Raise an EngineError if there is no such device. A GPU is not touched, its memory is for the cells."""
    try:
        device = torch.device(name)
        if device.type != 'cuda':
            torch.empty(0, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f'torch sees {torch.cuda.device_count()} GPUs.')
    except (AssertionError, NotImplementedError, RuntimeError) as e:
        raise EngineError(f'--device {name} cannot be used here: {str(e).splitlines()[0]}') from None


def make_slots(device: str, jobs: int, cells: int) -> List[Slot]:
    """Places for the cells: one per GPU, or one per core of a CPU.

    Args:
        device: 'cuda', 'mps' or 'cpu', or one GPU as in 'cuda:1'.
        jobs: Places to make, 0 for as many as there are GPUs or cores.
        cells: No more than these are made.
    """
    if device == 'cuda':
        # a visible device may be a number or a name
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        gpus = [v.strip() for v in visible.split(',')] if visible else map(str, range(torch.cuda.device_count()))
        gpus = [gpu for gpu in gpus if gpu]
        count = min(jobs or len(gpus), cells)
        return [Slot('cuda', {'CUDA_VISIBLE_DEVICES': gpus[i % len(gpus)]}) for i in range(count)]
    if device != 'cpu':
        return [Slot(device, {}) for _ in range(min(jobs or 1, cells))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    count = min(jobs or cores, cells)
    threads = os.environ.get('OMP_NUM_THREADS') or str(max(1, cores // count))
    return [Slot('cpu', {'OMP_NUM_THREADS': threads}) for _ in range(count)]


def start(slot: Slot, cell: Cell, config: Path, data_dir: str, output: Path, jobs: int) -> None:
    """Start a cell in a process that ends when this one does."""
    folder = output / cell.id
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        sys.executable, '-m', 'pst_timm.tools.study', str(config), '--cell', cell.id, '--data-dir', data_dir,
        '--output', str(output.parent), '--device', slot.device, '--jobs', str(jobs), '--of-study']
    with open(folder / 'cell.log', 'a') as log:
        slot.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,  # never written: it closes when this process dies, and the cell notices
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the cells
        )
    slot.cell = cell


def stop(slots: Iterable[Slot], patience: float = 120.) -> None:
    """Ask the cells at work to stop, which leaves a checkpoint each, and wait for them; a second Ctrl-C kills them."""
    at_work = [s.process for s in slots if s.process is not None]
    if at_work:
        _logger.info(f'{len(at_work)} cells at work save their state (Ctrl-C again: kill them).')
    for process in at_work:
        process.stdin.close()
    deadline = time.monotonic() + patience
    try:
        for process in at_work:
            process.wait(max(0.1, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in at_work:
            process.kill()
            process.wait()


def stop_with_parent() -> None:
    """Within a cell: stop politely when the study does, even if it was killed."""
    def watch() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock the loader workers would inherit and wait for
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=watch, daemon=True).start()


def last_words(cell: Cell, output: Path) -> str:
    """The last line of a cell's log."""
    lines = (output / cell.id / 'cell.log').read_text(errors='replace').splitlines()
    return next((line for line in reversed(lines) if line.strip()), 'it said nothing')


def run_study(
        study: Study,
        config: str,
        data_dir: str,
        output: Path,
        results: Path,
        device: str,
        jobs: int = 0,
) -> List[str]:
    """Run the cells that are not finished, and collect the results of all that are.

    Args:
        study: The study.
        config: The file it was read from.
        data_dir: Image folder with the splits.
        output: Folder for the runs; each study has a folder in it, each cell one in that.
        results: Folder for the tables.
        device: Device, as in `make_slots`.
        jobs: Cells at once, 0 for one per GPU or core.

    Returns:
        Ids of the cells that failed.
    """
    output = output / study.name
    missing: Deque[Cell] = deque(c for c in study.cells if not finished(c, output))
    done = [c for c in study.cells if c not in missing]
    check_packages(missing)
    for table in TABLES:
        read_rows(results / f'{table}.csv')
    _logger.info(f'{study.name}: {len(done)} of {len(study.cells)} cells are finished, {len(missing)} to run.')
    collect(study, output, results)
    slots = make_slots(device, jobs, len(missing)) if missing else []
    # the cells read a copy, so that the file can be edited meanwhile
    copy = output / 'study.yaml'
    output.mkdir(parents=True, exist_ok=True)
    write_whole(copy, Path(config).read_text(encoding='utf-8'))
    failed: List[str] = []
    epochs = {c.id: c.epochs for c in study.cells}
    with tqdm(total=sum(epochs.values()), desc=study.name, unit='epoch', disable=None) as bar:
        def show() -> None:
            bar.n = sum(epochs[c.id] if c in done else epochs_done(c, output) for c in study.cells)
            at_work = ', '.join(s.cell.id for s in slots if s.cell)
            bar.set_postfix_str(f'{len(done)}/{len(study.cells)} cells; {at_work}')

        try:
            while missing or any(s.process for s in slots):
                for slot in slots:
                    if slot.process is None and missing:
                        start(slot, missing.popleft(), copy, data_dir, output, len(slots))
                        _logger.info(f'{slot.cell.id}: started, log in {output / slot.cell.id / "cell.log"}')
                    elif slot.process is not None and slot.process.poll() is not None:
                        cell, code = slot.cell, slot.process.returncode
                        slot.process.stdin.close()
                        slot.process = slot.cell = None
                        if code == 0 and finished(cell, output):
                            done.append(cell)
                            collect(study, output, results)
                            row = read_record(output / cell.id / RECORD)['cell']
                            _logger.info(
                                f'{cell.id}: top1 {row["top1"]:.2f}, {row["train_seconds"]:.0f} s of training at '
                                f'{row["images_per_second"]:.0f} images/s ({len(done)} of {len(study.cells)} cells)')
                        else:
                            failed.append(cell.id)
                            _logger.error(f'{cell.id} failed (exit code {code}): {last_words(cell, output)}')
                show()
                time.sleep(0.5)
        finally:
            stop(slots)
    return failed


def collect(study: Study, output: Path, results: Path) -> None:
    """Bring the records of the finished cells into the tables of the results; rows of other cells there stay."""
    found = [(c, read_record(output / c.id / RECORD)) for c in study.cells]
    records = [(c, record) for c, record in found if record is not None]
    if not records:
        return
    who = [dict(cell=c.name, model=c.train['model'], seed=c.seed) for c, _ in records]
    merge(results, study, 'cells', [r['cell'] for _, r in records])
    merge(results, study, 'evaluations', [dict(w, **e) for w, (_, r) in zip(who, records) for e in r['evaluations']])
    curves = [dict(cell=w['cell'], seed=w['seed'], **e) for w, (_, r) in zip(who, records) for e in r['curves']]
    merge(results, study, 'curves', curves)
    rows = read_rows(results / 'cells.csv')
    there = {(r['cell'], r['seed']) for r in rows}
    write_whole(results / 'study.json', json.dumps(dict(
        name=study.name,
        setting=describe(study, rows),
        cells=study.names,
        seeds=study.seeds,
        missing=[c.id for c in study.cells if (c.name, str(c.seed)) not in there],
        questions=study.questions,
    ), indent=2) + '\n')


def read_rows(path: Path) -> List[Row]:
    """Rows of a table of the results, none if it is not there.

    Raises:
        EngineError: If it is garbled.
    """
    if not path.is_file():
        return []
    try:
        rows = read_csv(path)
        whole = all(r['cell'] and int(r.get('seed', 0)) >= 0 and None not in (*r, *r.values()) for r in rows)
    except (csv.Error, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise EngineError(f'{path} is garbled: restore it, or remove it to make it anew from the cells in --output.')
    return rows


def merge(results: Path, study: Study, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows into a table of the results, in place of those of the same cells, in the order of the study."""
    path = results / f'{table}.csv'
    results.mkdir(parents=True, exist_ok=True)

    def cell_of(row: Mapping[str, Any]) -> Tuple[str, str]:
        return row['cell'], str(row.get('seed'))

    new = {cell_of(r) for r in rows}
    old = [r for r in read_rows(path) if cell_of(r) not in new]
    order = study.names
    merged = [r for r in old if r['cell'] in order] + list(rows)
    merged.sort(key=lambda r: (order.index(r['cell']), int(r.get('seed', 0))))
    columns = list(dict.fromkeys(k for r in merged for k in r))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(merged)
    write_whole(path, text.getvalue())


def describe(study: Study, rows: Sequence[Mapping[str, str]]) -> str:
    """One sentence on what was run and on what."""
    def some(key: str, joint: str = '; ') -> str:
        return joint.join(dict.fromkeys(r[key] for r in rows))

    first = rows[0]
    seeds = sorted({r['seed'] for r in rows}, key=int)
    return (
        f'{study.title}: {int(first["train_images"]):,} training and {int(first["val_images"]):,} validation images of '
        f'{first["classes"]} classes, {some("img_size", " or ")} px, {some("epochs", " or ")} epochs, '
        f'seeds {", ".join(seeds)}; '
        f'{some("precision")}, {some("hardware")}, torch {some("torch")}, timm {some("timm")}')


def measure_latency(study: Study, device: str, repeats: int = 20, train_repeats: int = 5) -> List[Row]:
    """Time the models of a study in turn, nothing else running: weights do not matter, and are random.

    Args:
        study: The study.
        device: Device.
        repeats: Timed rounds of inference in float32, a validation batch each.
        train_repeats: Timed rounds of forward and backward pass as in training, a training batch each.

    Returns:
        A row per cell name: params, gmacs, img_size, and for both (latency_ms, train_ms) the median of a batch in
        milliseconds and the median of the paired ratios to the first cell (ratio, train_ratio).
    """
    infer, step, rows = {}, {}, []
    for name in study.names:
        cell = next(c for c in study.cells if c.name == name)
        args = train_args(**cell.train, device=device)
        import_modules(args.device_modules)
        place = init_device(args)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        model = timm.create_model(args.model, num_classes=len(cell.classes), **args.model_kwargs)
        model = model.to(device=place, memory_format=memory_format)
        size = args.img_size or model.default_cfg['input_size'][-1]
        batches = args.validation_batch_size or args.batch_size, args.batch_size
        images = [torch.randn(n, 3, size, size, device=place).contiguous(memory_format=memory_format) for n in batches]
        infer[name] = partial(_infer, model, images[0])
        step[name] = partial(_step, model, images[1], autocast_for(args, place))
        rows.append(dict(
            cell=name, params=sum(p.numel() for p in model.parameters()),
            gmacs=round(count_gmacs(model, (3, size, size)), 4), img_size=size, batch_size=batches[0],
            train_batch_size=batches[1]))
    for calls, count, keys in (
            (infer, repeats, ('latency_ms', 'ratio')),
            (step, train_repeats, ('train_ms', 'train_ratio'))):
        times = time_in_turn(calls, count)
        for row in rows:
            mine = times[row['cell']]
            values = 1000 * percentile(mine, 50), median_ratio(mine, times[study.names[0]])
            row.update(zip(keys, (round(v, 4) for v in values)))
    about = dict(device=place.type, hardware=hardware_name(place), threads=torch.get_num_threads())
    return [dict(row, **about) for row in rows]


@torch.inference_mode()
def _infer(model: nn.Module, images: torch.Tensor) -> None:
    model.eval()(images)


def _step(model: nn.Module, images: torch.Tensor, autocast: Callable[[], AbstractContextManager]) -> None:
    with autocast():
        output = model.train()(images)
    output.float().logsumexp(dim=-1).mean().backward()
    model.zero_grad()


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
    except EngineError as e:
        print(f'pst-timm study: error: {e}', file=sys.stderr)
        return e.exit_code


def _main_cell(study: Study, args: argparse.Namespace) -> int:
    cells = {c.id: c for c in study.cells}
    if args.cell not in cells:
        raise EngineError(f'{args.config} has no cell {args.cell!r}{did_you_mean(args.cell, cells)}')
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
                raise EngineError(
                    f'{len(failed)} cells failed: {", ".join(failed)}. Their logs say why; start the study again to '
                    f'run what is missing.')
            merge(results, study, 'latency', measure_latency(study, device))
    except Timeout:
        raise EngineError(f'This study is already at work in {output}: wait, or choose another --output.') from None
    except OSError as e:
        raise EngineError(f'{e}. Make room, or mend the permissions; the same command goes on where it was.') from e
    except KeyboardInterrupt:
        print('\nStopped. Start the same command again to go on.', file=sys.stderr)
        return STOPPED
    print(f'All {len(study.cells)} cells are finished: {results}/. `pst-timm report` makes tables and plots of them.')
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""A study: a grid of models and seeds, trained with one recipe, evaluated alike, and put on record.

    pst-timm study configs/study/cpu.yaml --data-dir data/tiny-imagenet-200

Every cell of the grid is a process of its own that runs the ordinary training engine, one for each GPU, or one for
each core of a CPU. A study that was stopped, in whatever way, goes on where it was: finished cells are not run again,
and those that were at work resume from their last checkpoint.
"""
import csv
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
from tqdm import tqdm

from pst_timm.engine import train_args
from pst_timm.engine.factories import autocast_for, import_modules, init_device
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.devices import hardware_name
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_csv, write_json, write_text
from pst_timm.utils.timing import median_ratio, percentile, time_in_turn

from .cell import RECORD, check_packages, read_record, settings_of
from .config import Cell, Study
from .tables import Row

__all__ = ['run_study']

_logger = logging.getLogger(__name__)

TABLES = ('cells', 'evaluations', 'curves', 'latency')
STOPPED = 130  # as a shell reports a command that was interrupted


def finished(cell: Cell, output: Path) -> bool:
    """Whether a cell is done.

    Raises:
        PSTError: If it was done, or begun, with other settings.
    """
    folder = output / cell.id
    record = read_record(folder / RECORD)
    begun = settings_of(folder) if record is None else record['settings']
    if begun not in (None, cell.settings):
        raise PSTError(
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
        sys.executable, '-m', 'pst_timm', 'study', str(config), '--cell', cell.id, '--data-dir', data_dir,
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
    write_text(copy, Path(config).read_text(encoding='utf-8'))
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
    write_json(results / 'study.json', dict(
        name=study.name,
        setting=describe(study, rows),
        cells=study.names,
        seeds=study.seeds,
        missing=[c.id for c in study.cells if (c.name, str(c.seed)) not in there],
        questions=study.questions,
    ))


def read_rows(path: Path) -> List[Row]:
    """Rows of a table of the results, none if it is not there.

    Raises:
        PSTError: If it is garbled.
    """
    if not path.is_file():
        return []
    try:
        rows = read_csv(path)
        whole = all(r['cell'] and int(r.get('seed', 0)) >= 0 and None not in (*r, *r.values()) for r in rows)
    except (csv.Error, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise PSTError(f'{path} is garbled: restore it, or remove it to make it anew from the cells in --output.')
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
    write_csv(path, merged)


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

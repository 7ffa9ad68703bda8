"""A study: a grid of models and seeds, trained with one recipe, evaluated alike, and put on record.

    pst-timm study configs/study/cpu.yaml --data-dir data/tiny-imagenet-200

Every cell of the grid is a process of its own that runs the ordinary training engine, one for each GPU, or one for
each core of a CPU. A study that was stopped, in whatever way, goes on where it was: finished cells are not run again,
and those that were at work resume from their last checkpoint.
"""
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Deque, Dict, Iterable, List, Optional

import torch
from tqdm import tqdm

from pst_timm.utils.devices import available_cores
from pst_timm.utils.errors import PSTError, did_you_mean
from pst_timm.utils.files import write_text
from pst_timm.utils.locks import Locked, locked

from .cell import RECORD, check_needs, read_record, run_cell, settings_of
from .collection import check_tables, collect, merge
from .config import Cell, Study
from .latency import measure_latency

__all__ = ['progress_of', 'run_one', 'run_study']

_logger = logging.getLogger(__name__)


def finished(cell: Cell, output: Path) -> bool:
    """Whether a cell is done.

    Raises:
        PSTError: If it was done, or begun, with other settings.
    """
    folder = output / cell.id
    record = read_record(folder / RECORD)
    begun = settings_of(folder) if record is None else record['settings']
    if begun is not None and not cell.was_run_with(begun):
        raise PSTError(
            f'{folder} was run with other settings than the study now has: choose another --output, or remove that '
            f'folder to run the cell again.')
    return record is not None


def epochs_done(cell: Cell, output: Path) -> int:
    """Epochs that a cell has trained so far."""
    summary = output / cell.id / 'summary.csv'
    return max(0, len(summary.read_text().splitlines()) - 1) if summary.is_file() else 0


def progress_of(cell: Cell, output: Path) -> str:
    """How far a cell is, in words.

    Args:
        cell: The cell.
        output: Folder of the study.

    Raises:
        PSTError: If it was done, or begun, with other settings.
    """
    return 'finished' if finished(cell, output) else f'{epochs_done(cell, output)} of {cell.epochs} epochs'


@dataclass
class Slot:
    """A GPU, or some cores, where one cell at a time can run."""
    device: str
    environment: Dict[str, str]
    process: Optional[subprocess.Popen] = None
    cell: Optional[Cell] = None


def make_slots(device: str, jobs: int, cells: int) -> List[Slot]:
    """Slots for the cells: one per GPU, or one per core of a CPU.

    Args:
        device: 'cuda', 'mps' or 'cpu', or one GPU as in 'cuda:1'.
        jobs: Slots to make, 0 for as many as there are GPUs or cores.
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
    cores = available_cores()
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


def run_one(
        study: Study,
        id: str,
        data_dir: str,
        output: Path,
        device: str = '',
        jobs: int = 1,
        child: bool = False,
) -> None:
    """Run one cell in this process, unless it is finished.

    Args:
        study: The study.
        id: The cell, as `Cell.id` names it.
        data_dir: Image folder with the splits.
        output: Folder for the runs; each study has a folder in it, each cell one in that.
        device: Device, the best present if empty.
        jobs: Cells that run side by side on this machine, for the record.
        child: Whether a study started this process, which then stops when the study does.

    Raises:
        PSTError: If there is no such cell, or it cannot be run.
    """
    cells = {c.id: c for c in study.cells}
    if id not in cells:
        raise PSTError(f'The study {study.name} has no cell {id!r}.{did_you_mean(id, cells)}')
    if child:
        stop_with_parent()
    output = output / study.name
    lock = output / id / 'cell.lock'
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock))
        except Locked as e:
            # a cell of a study that was killed may still be writing its last checkpoint
            _logger.info(f'{id}: {e} is at work on it, waiting for its end.')
            held.enter_context(locked(lock, wait=True))
        if not finished(cells[id], output):
            run_cell(cells[id], data_dir, output, device, jobs)


def run_study(
        study: Study,
        config: str,
        data_dir: str,
        output: Path,
        results: Path,
        device: str,
        jobs: int = 0,
) -> None:
    """Run the cells that are not finished, collect the results of all that are, and time the models in the end.

    Args:
        study: The study.
        config: The file it was read from.
        data_dir: Image folder with the splits.
        output: Folder for the runs; each study has a folder in it, each cell one in that.
        results: Folder for the tables.
        device: Device, as in `make_slots`.
        jobs: Cells at once, 0 for one per GPU or core.

    Raises:
        PSTError: If a cell failed (the others were run), the same study is at work, or a file is in the way.
        KeyboardInterrupt: After Ctrl-C, when the cells at work have saved their state.
    """
    folder = output / study.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / 'study.lock'):
            failed = run_cells(study, config, data_dir, folder, results, device, jobs)
            if failed:
                raise PSTError(
                    f'{len(failed)} cells failed: {", ".join(failed)}. Their logs say why; start the study again to '
                    f'run what is missing.')
            merge(results, study, 'latency', measure_latency(study, device))
    except Locked as e:
        raise PSTError(f'This study is already at work in {folder} ({e}): wait, or choose another --output.') from None
    except OSError as e:
        raise PSTError(f'{e}. Make room, or mend the permissions; the same command goes on where it was.') from e


def run_cells(
        study: Study,
        config: str,
        data_dir: str,
        output: Path,
        results: Path,
        device: str,
        jobs: int,
) -> List[str]:
    """Run the cells that are not finished; arguments as in `run_study`, but for `output`, the folder of the study.

    Returns:
        Ids of the cells that failed.
    """
    missing: Deque[Cell] = deque(c for c in study.cells if not finished(c, output))
    done = [c for c in study.cells if c not in missing]
    check_needs(missing)
    check_tables(results, study)
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

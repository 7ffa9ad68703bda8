"""Checkpoints: written whole or not at all, found again after a crash, never executed."""
import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, load_checkpoint_metadata, unwrap_model

from pst_timm.checkpoints.reading import (
    FACTS_KEY,
    Damaged,
    check_dense,
    check_numbers,
    check_whole,
    facts_in,
    tensors_in,
)
from pst_timm.checkpoints.rules import Unfit, short
from pst_timm.checkpoints.schema import check_budget
from pst_timm.utils.errors import PSTError
from pst_timm.utils.fitting import misfits
from pst_timm.utils.markdown import plain

__all__ = [
    'STATES', 'AtomicSaver', 'Position', 'check_checkpoint', 'check_there', 'find_newest', 'position_of',
    'read_saved', 'resume', 'states', 'states_beyond',
]

_logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """How far a run has come: this many batches into this epoch."""
    epoch: int = 0
    step: int = 0


class _TaskState:
    """Adds the position of the run, and what it is, to a checkpoint; timm's saver asks it for all."""

    def __init__(self, task: TrainingTask, entries: Dict[str, Any]):
        self.task = task
        self.entries = entries
        self.position = Position()

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn=unwrap_model) -> Dict[str, Any]:
        state = self.task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        return state if ema else {**state, 'position': list(self.position), **self.entries}


class AtomicSaver(CheckpointSaver):
    """timm's saver, with every file written whole or not at all, and the position of the run inside."""

    def __init__(self, task: TrainingTask, folder: Path, entries: Dict[str, Any], **kwargs: Any):
        """
        Args:
            task: The task to save.
            folder: Folder of the run.
            entries: Plain values to save beside it, such as what is known of the model, see `checkpoints.facts`.
            kwargs: Further arguments of timm's saver.
        """
        self._state = _TaskState(task, entries)
        super().__init__(
            model=task.get_eval_model(),
            task=self._state,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            **kwargs,
        )

    # timm unlinks the old file first, and a kill in between would leave none
    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f'{dst}.tmp'
        Path(temporary).unlink(missing_ok=True)
        try:
            os.link(src, temporary)
        except OSError:  # a file system without hard links
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore the history of a run from a checkpoint in its folder, but for what this saver cannot have written.

        Sooner or later timm's saver deletes what its history names, and a checkpoint may name any file.
        """
        state = state_dict if isinstance(state_dict, dict) else {}
        listed = state.get('checkpoint_files')
        listed = list(listed) if isinstance(listed, (list, tuple)) else []
        own = [entry for entry in listed if self._wrote(entry)]
        if len(own) < len(listed):
            _logger.warning(
                f'The history in the checkpoint names {len(listed) - len(own)} files that a run in '
                f'{self.checkpoint_dir} cannot have written: they are left alone.')
        epoch, metric = state.get('best_epoch'), state.get('best_metric')
        best = dict(best_epoch=epoch, best_metric=metric) if _is_count(epoch) and _is_number(metric) else {}
        pending = state.get('pending')
        pending = pending if isinstance(pending, (list, tuple)) and len(pending) == 2 else (None, None)
        saved = _is_count(pending[0]) and self._wrote((f'{self.save_prefix}-{pending[0]}{self.extension}', pending[1]))
        if saved:
            self._complete(pending, own)
        super().load_state_dict(dict(checkpoint_files=own, **best, pending=pending if saved else (None, None)))

    def _complete(self, pending: Sequence[Any], own: Sequence[Any]) -> None:
        """Do what a kill kept the saver from: keep the last checkpoint under its number too, if it has earned it."""
        epoch, metric = pending
        last, numbered = Path(self.checkpoint_dir, f'last{self.extension}'), Path(self._checkpoint_path(epoch))
        kept = [m for name, m in own if Path(self.checkpoint_dir, name).is_file()]
        earned = len(kept) < self.max_history or None in kept or (
            metric is not None and any(self.cmp(metric, m) for m in kept))
        if earned and not numbered.exists() and _epoch_in(last) == epoch:
            self._duplicate(str(last), str(numbered))

    def forget_metrics(self) -> None:
        """Rank what was saved so far behind all that comes: it was measured with another metric."""
        files = [file for file, _ in self.checkpoint_files]
        newest_first = sorted(files, key=lambda file: int(re.findall('[0-9]+', Path(file).name)[0]), reverse=True)
        self.checkpoint_files = [(file, None) for file in newest_first]
        self.best_epoch = self.best_metric = None

    def mend_best(self) -> None:
        """Let model_best be the best checkpoint of the history again, where a kill or the user left another one."""
        best, of_best = (Path(self.checkpoint_dir, f'{name}{self.extension}') for name in (
            'model_best', f'{self.save_prefix}-{self.best_epoch}'))
        epoch = _epoch_in(best)
        if self.best_epoch is None or epoch == self.best_epoch:
            return
        if not of_best.is_file():
            if epoch is not None:
                return
            ranked = [(Path(file), _epoch_in(Path(file)), m) for file, m in self.checkpoint_files if m is not None]
            of_best, self.best_epoch, self.best_metric = next(
                (known for known in ranked if known[1] is not None), (None, None, None))
            if of_best is None:
                return
        self._duplicate(str(of_best), str(best))

    def _wrote(self, entry: Any) -> bool:
        """Whether an entry of the history, the name of a file and its metric, may be one of this saver."""
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)):
            return False
        name, metric = entry
        path = Path(self.checkpoint_dir, name)
        return (
            re.fullmatch(rf'{self.save_prefix}-[0-9]+{re.escape(self.extension)}', name) is not None
            and not path.is_symlink()
            and (path.is_file() or not path.exists())
            and (metric is None or _is_number(metric)))

    def save_epoch(self, epoch: int, metric: Optional[float]) -> tuple:
        """Save the state after an epoch; returns the best metric and its epoch."""
        self._state.position = Position(epoch + 1)
        return self._guard(self.save_checkpoint, epoch, metric=metric)

    def save_step(self, position: Position) -> None:
        """Save the state in the middle of an epoch."""
        self._state.position = position
        self._guard(self.save_recovery, position.epoch, position.step)

    def _guard(self, save: Callable, *args: Any, **kwargs: Any) -> Any:
        folder = Path(self.checkpoint_dir)
        try:
            return save(*args, **kwargs)
        except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
            self._remove_begun()
            check_there(folder)
            raise PSTError(
                f'Cannot write a checkpoint to {folder}: {e}. The last one there is intact: make room, or mend the '
                f'permissions, and start again with --resume auto.') from e
        except KeyboardInterrupt:
            self._remove_begun()
            raise

    def _remove_begun(self) -> None:
        for leftover in Path(self.checkpoint_dir).glob('*tmp*'):
            if leftover.name.endswith(('tmp.pth.tar', '.pth.tar.tmp')):
                leftover.unlink(missing_ok=True)


def _epoch_in(path: Path) -> Optional[int]:
    """The epoch that a checkpoint was saved after, None for no good checkpoint."""
    try:
        return read_saved(path, whole=False).get('epoch')
    except PSTError:
        return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def read_saved(path: Path, whole: bool = True) -> Dict[str, Any]:
    """What a training checkpoint holds, after a check that it is whole and holds nothing but data.

    Args:
        path: The checkpoint.
        whole: Whether to check the sums of all tensors too, which reads the whole file.

    Raises:
        Damaged: If it is truncated, corrupt, would execute code, or says of itself what cannot be.
        PSTError: If it is missing or cannot be opened, which says nothing about what is in it.
    """
    check_whole(path, sums=whole)
    try:
        saved = load_checkpoint_metadata(str(path))
    except RuntimeError as e:
        raise Damaged(
            f'The checkpoint {path} is refused, because it holds more than tensors and plain values and loading it '
            f'could run code: {e}') from None
    except Exception as e:  # whatever a damaged pickle may raise
        raise Damaged(f'The checkpoint {path} cannot be read ({e}): use an earlier one.') from None
    saved = saved if isinstance(saved, dict) else {}
    try:
        check_budget(saved)  # before anything walks through it
        facts_in(saved, path)
        check_dense(tensors_in(saved), path)
    except Unfit as e:
        raise Damaged(f'The checkpoint {path} is garbled: expected {e.expected}. Use another one.') from None
    except PSTError as e:
        raise Damaged(str(e)) from None
    return saved


def check_checkpoint(path: Path) -> None:
    """Make sure that a training checkpoint is whole and holds nothing but data; errors as in `read_saved`."""
    read_saved(path)


def position_of(saved: Dict[str, Any], path: Path) -> Position:
    """Where the run that wrote a checkpoint stood; for a checkpoint of timm's own script, after its epoch.

    Raises:
        Damaged: If it does not tell it in numbers.
    """
    position = saved.get('position', (saved.get('epoch', -1), 0))
    epoch, step = position if isinstance(position, (list, tuple)) and len(position) == 2 else (None, None)
    if 'position' not in saved and isinstance(epoch, int):
        epoch += 1
    if not (_is_count(epoch) and _is_count(step)):
        raise Damaged(f'The checkpoint {path} does not tell in numbers how far its run had come: use an earlier one.')
    return Position(epoch, step)


STATES = re.compile(r'(last|model_best|checkpoint-[0-9]+|recovery-[0-9]+-[0-9]+)\.pth\.tar')


def check_there(folder: Path) -> None:
    """Raise a PSTError if the folder of a run is gone."""
    if not folder.is_dir():
        raise PSTError(
            f'The folder of the run, {folder}, is gone: somebody has moved or removed it while it trained. Put it back '
            f'and start again with --resume auto, or start anew.')


def states(folder: Path) -> List[Path]:
    """The checkpoints in the folder of a run, in order of their names.

    Raises:
        PSTError: If the folder cannot be read.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder) if STATES.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise PSTError(f'{folder} cannot be read ({e.strerror}): mend that, or choose another --experiment.') from None


def states_beyond(folder: Path, position: Optional[Position] = None) -> Tuple[List[Tuple[Position, Path]], List[str]]:
    """The checkpoints of a run that have come further than a position, and what is wrong with those that are no use.

    Args:
        folder: Folder of the run.
        position: The position; None for all checkpoints.

    Returns:
        Positions and paths, the furthest first; complaints.

    Raises:
        PSTError: If a checkpoint cannot be opened.
    """
    found, broken = [], []
    for path in states(folder):
        try:
            reached = position_of(read_saved(path, whole=False), path)
            if position is None or reached > position:
                found.append((reached, path))
        except Damaged as e:
            broken.append(str(e))
    # of equals the one with the newest history, and the best one last
    rank = {'last.pth.tar': 2, 'model_best.pth.tar': 0}
    found.sort(key=lambda state: (state[0], rank.get(state[1].name, 1)), reverse=True)
    return found, broken


def find_newest(folder: Path) -> Optional[Path]:
    """The checkpoint of a folder that has come furthest, None if there is none; damaged ones are named and left out.

    Raises:
        PSTError: If there are checkpoints and none of them is good, or if one cannot be opened.
    """
    found, broken = states_beyond(folder)
    newest = None
    for _, path in found:
        try:
            check_checkpoint(path)
            newest = path
            break
        except Damaged as e:
            broken.append(str(e))
    if broken and newest is None:
        raise PSTError(
            f'None of the {len(broken)} checkpoints in {folder} is good, and a new run would write over them. '
            f'{broken[0]} Restore one of them, name another with --resume FILE, or begin anew with --overwrite '
            f'instead of --resume auto.')
    for complaint in broken:
        _logger.warning(f'{complaint} Looking further.')
    return newest


def resume(
        path: Path,
        saved: Dict[str, Any],
        task: TrainingTask,
        optimizer: Optional[torch.optim.Optimizer],
        loss_scaler: Any,
) -> None:
    """Load a training checkpoint into a task.

    Args:
        path: A checkpoint of this engine or of timm's script.
        saved: Its content, from `read_saved`.
        task: The task, before it is wrapped for several processes.
        optimizer: The optimizer to load, None to leave its state behind.
        loss_scaler: The loss scaler to load, or None.

    Raises:
        PSTError: If the checkpoint is of another model, or what is in it makes no sense.
    """
    loaded = ['state_dict', 'model', 'task_state']
    if task.has_ema():
        loaded += ['state_dict_ema', 'model_ema', 'task_state_ema']
    if optimizer is not None:
        loaded.append('optimizer')
    bare = not saved.keys() & {'state_dict', 'model'}  # the weights alone
    check_numbers(tensors_in({k: v for k, v in saved.items() if bare or k in loaded}), path)
    try:
        if optimizer is not None and 'optimizer' in saved:
            _check_state(saved['optimizer'], optimizer)
        resume_task_checkpoint(task, str(path), optimizer=optimizer, loss_scaler=loss_scaler)
        if task.has_ema():
            load_task_ema_checkpoint(task, str(path))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        if optimizer is not None and FACTS_KEY not in saved and 'parameter group' in str(e):
            # older versions kept the parameters that get no gradient from the optimizer
            _logger.warning(f'{path}: the optimizer of an older version had other parameters; its state starts anew.')
            return resume(path, saved, task, None, loss_scaler)
        raise PSTError(
            f'The checkpoint {path} does not fit this run: {_why(e, saved, task)} Start with the flags of that run; '
            f'--no-resume-opt leaves its optimizer behind.') from e


def _check_state(saved: Dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Make sure that the state of an optimizer is numbers, tensors no larger than it needs, and short lists of them.

    Raises:
        ValueError: If it is not.
    """
    found, own = ([list(group['params']) for group in groups] for groups in (
        saved['param_groups'], optimizer.param_groups))
    sizes = {}
    if [len(params) for params in found] == [len(params) for params in own]:  # torch says if not
        sizes = {i: p.numel() for ids, params in zip(found, own) for i, p in zip(ids, params)}
    for i, entries in saved['state'].items():
        for name, value in entries.items():
            for v in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(v, torch.Tensor):
                    # the square ones belong to a dimension, as those of kron
                    square = v.ndim == 2 and v.shape[0] == v.shape[1] <= sizes.get(i, 0)
                    if i in sizes and v.numel() > max(sizes[i], 1) and not square:
                        raise ValueError(
                            f'in the state of its optimizer, {short(name)} has {v.numel()} values for a parameter of '
                            f'{sizes[i]}')
                elif not isinstance(v, (int, float, type(None))) or (isinstance(v, float) and not math.isfinite(v)):
                    raise ValueError(
                        f'in the state of its optimizer, {short(name)} is neither finite numbers nor tensors')


def _why(error: Exception, saved: Dict[str, Any], task: TrainingTask) -> str:
    """In a sentence, why a checkpoint does not fit; torch names every tensor."""
    weights = saved.get('state_dict', saved.get('model'))
    if isinstance(weights, dict):
        own = unwrap_model(task.get_eval_model()).state_dict()
        found = misfits(own, {k: v for k, v in weights.items() if isinstance(v, torch.Tensor)})
        if found:
            arch = saved.get('arch')
            named = isinstance(arch, str) and arch.isprintable() and len(arch) < 100
            return (f'it is of {arch}, and ' if named else '') + f'{"; ".join(found)}.'
    text = plain(str(error).strip().split('\n')[0] or type(error).__name__, 1000)
    return text if text.endswith('.') else f'{text}.'

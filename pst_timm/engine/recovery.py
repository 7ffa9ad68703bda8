"""Checkpoints: written whole or not at all, found again after a crash, never executed."""
import logging
import math
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

import torch
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, load_checkpoint_metadata, unwrap_model

from pst_timm.checkpoints.reading import FACTS_KEY
from pst_timm.utils.errors import PSTError

__all__ = ['AtomicSaver', 'Position', 'check_checkpoint', 'find_newest', 'resume']

_logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """How far a run has come: this many batches into this epoch."""
    epoch: int = 0
    step: int = 0


class _TaskState:
    """Adds the position of the run, and what its model is, to a checkpoint; timm's saver asks it for all."""

    def __init__(self, task: TrainingTask, facts: Dict[str, Any]):
        self.task = task
        self.facts = facts
        self.position = Position()

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn=unwrap_model) -> Dict[str, Any]:
        state = self.task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        return state if ema else {**state, 'position': list(self.position), FACTS_KEY: self.facts}


class AtomicSaver(CheckpointSaver):
    """timm's saver, with every file written whole or not at all, and the position of the run inside."""

    def __init__(self, task: TrainingTask, folder: Path, facts: Dict[str, Any], **kwargs: Any):
        """
        Args:
            task: The task to save.
            folder: Folder of the run.
            facts: What is known of the model beside its weights, see `checkpoints.facts`.
            kwargs: Further arguments of timm's saver.
        """
        self._state = _TaskState(task, facts)
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
        super().load_state_dict(dict(checkpoint_files=own, **best, pending=pending if saved else (None, None)))

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

    def _guard(self, save, *args: Any, **kwargs: Any) -> Any:
        try:
            return save(*args, **kwargs)
        except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
            for leftover in Path(self.checkpoint_dir).glob('*tmp*.pth.tar'):
                leftover.unlink(missing_ok=True)
            raise PSTError(
                f'Cannot write a checkpoint to {self.checkpoint_dir}: {e}. The last one there is intact: make room, '
                f'or mend the permissions, and start again with --resume auto.') from e


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def check_checkpoint(path: Path) -> None:
    """Make sure that a training checkpoint is whole and holds nothing but data.

    Raises:
        PSTError: If it is missing, truncated, corrupt, or would execute code.
    """
    if not path.is_file():
        raise PSTError(f'There is no checkpoint {path}.')
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as e:
        raise PSTError(
            f'The checkpoint {path} is truncated or not a checkpoint ({e}): use an earlier one.') from None
    if broken:
        raise PSTError(f'The checkpoint {path} is corrupt (checksum of {broken}): use an earlier one.')
    try:
        load_checkpoint_metadata(str(path))
    except RuntimeError as e:
        raise PSTError(
            f'The checkpoint {path} is refused, because it holds more than tensors and plain values and loading it '
            f'could run code: {e}') from None
    except Exception as e:  # whatever a damaged pickle may raise
        raise PSTError(f'The checkpoint {path} cannot be read ({e}): use an earlier one.') from None


def read_position(path: Path) -> Position:
    """Where the run that wrote a checkpoint stood; for a checkpoint of timm's own script, after its epoch."""
    checkpoint = load_checkpoint_metadata(str(path))
    if not isinstance(checkpoint, dict):
        return Position()
    if 'position' in checkpoint:
        return Position(*checkpoint['position'])
    return Position(checkpoint['epoch'] + 1 if 'epoch' in checkpoint else 0)


def find_newest(folder: Path) -> Optional[Path]:
    """The valid checkpoint of a folder that has come furthest, None if there is none; broken ones are named."""
    best, furthest = None, None
    for path in sorted(folder.glob('*.pth.tar')):
        if not re.match(r'(last|checkpoint-\d+|recovery-\d+-\d+)\.pth', path.name):
            continue
        try:
            check_checkpoint(path)
        except PSTError as e:
            _logger.warning(f'{e} Looking further.')
            continue
        position = read_position(path)
        if best is None or position > furthest:
            best, furthest = path, position
    return best


def resume(
        path: Path,
        task: TrainingTask,
        optimizer: Optional[torch.optim.Optimizer],
        loss_scaler: Any,
) -> Position:
    """Load a training checkpoint into a task.

    Args:
        path: A checkpoint of this engine or of timm's script.
        task: The task, before it is wrapped for several processes.
        optimizer: The optimizer to load, None to leave its state behind.
        loss_scaler: The loss scaler to load, or None.

    Returns:
        The position to go on from.

    Raises:
        PSTError: If the checkpoint is broken, unsafe, or of another model.
    """
    check_checkpoint(path)
    older = FACTS_KEY not in load_checkpoint_metadata(str(path))
    try:
        resume_task_checkpoint(task, str(path), optimizer=optimizer, loss_scaler=loss_scaler)
        if task.has_ema():
            load_task_ema_checkpoint(task, str(path))
    except (RuntimeError, ValueError, KeyError) as e:
        if optimizer is not None and older and 'parameter group' in str(e):
            # older versions kept the parameters that get no gradient from the optimizer
            _logger.warning(f'{path}: the optimizer of an older version had other parameters; its state starts anew.')
            return resume(path, task, None, loss_scaler)
        raise PSTError(
            f'The checkpoint {path} does not fit this run: {e} Start with the flags of that run; --no-resume-opt '
            f'leaves its optimizer behind.') from e
    return read_position(path)

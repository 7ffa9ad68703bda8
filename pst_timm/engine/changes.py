"""What a run that goes on does otherwise than the one that wrote its checkpoint: done and said, or refused."""
import logging
import math
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from timm.task import TrainingTask
from timm.utils import NativeScaler, is_primary

from pst_timm.checkpoints.facts import as_plain
from pst_timm.checkpoints.reading import FACTS_KEY
from pst_timm.data.datasets import check_class_names
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

from .flags import TRAIN_FLAGS, FlagGroups, keys_with_role
from .recovery import Position, position_of, resume

__all__ = ['Stream', 'changed_settings', 'check_changes', 'check_resume', 'check_start', 'keep_settings', 'load_run']

_logger = logging.getLogger(__name__)

# weights to begin with mean nothing to a run that goes on, and --lr-base counts in the learning rate it leads to
WITHOUT_EFFECT = {
    'pretrained', 'pretrained_path', 'initial_checkpoint', 'trunk_checkpoint', 'use_ema', 'head_init_scale',
    'head_init_bias', 'lr_base', 'lr_base_size', 'lr_base_scale', 'device_modules',
}
# flags that decide which images a batch of an epoch has
ORDER = ('batch_size', 'grad_accum_steps', 'seed', 'aug_repeats', 'epoch_repeats', 'sampler')
COUNTERS = ('step', 'lookahead_step')  # what optimizers count in their parameter groups


class Stream(NamedTuple):
    """Batches of an epoch, as far as they can be told without reading them."""
    world_size: int
    batches: int
    images: Optional[int]
    """Images of the training split, None where nobody knows."""
    draw: Optional[int] = None
    """What tells their chances to be drawn from others, None where each comes once in an epoch."""


def changed_settings(
        saved: Dict[str, Any],
        args: Namespace,
        groups: FlagGroups = TRAIN_FLAGS,
) -> Dict[str, Any]:
    """Flags about model, data and training whose values are not those that a checkpoint was written with.

    Args:
        saved: Content of the checkpoint.
        args: Arguments of this run, resolved.
        groups: The flags of its command.

    Returns:
        The values in the checkpoint by key.
    """
    then = saved.get('args')
    then = vars(then) if isinstance(then, Namespace) else {}
    decisive = keys_with_role('model', 'preprocessing', 'recipe', 'data', groups=groups)
    keys = [k for k in decisive if k not in WITHOUT_EFFECT]
    return {k: then[k] for k in keys if k in then and as_plain(then[k]) != as_plain(getattr(args, k, None))}


def check_changes(
        saved: Dict[str, Any],
        path: Path,
        args: Namespace,
        position: Position,
        stream: Stream,
        names: Optional[Sequence[str]],
        groups: FlagGroups = TRAIN_FLAGS,
) -> None:
    """Say what a run does otherwise than the one that wrote a checkpoint.

    Args:
        saved: Content of the checkpoint.
        path: The checkpoint.
        args: Arguments of this run, resolved.
        position: Where it goes on.
        stream: The batches of its epochs.
        names: Names of its classes in the order of the labels, if known.
        groups: The flags of its command.

    Raises:
        PSTError: If the run cannot go on like this.
    """
    check_class_names(
        names, _label_names(saved), f'the {args.train_split!r} split', f'the checkpoint {path}',
        'Give the run the folders it began with, or a --class-map.')
    changed = changed_settings(saved, args, groups)
    if 'opt' in changed and not args.no_resume_opt:
        raise PSTError(
            f'--opt {args.opt} cannot go on from {path}, which holds the state of '
            f'{plain(as_plain(changed["opt"]), 60)}: take that one, or add --no-resume-opt to begin afresh.')
    told = [f'--{k.replace("_", "-")} {getattr(args, k)} (was {plain(as_plain(v), 60)})' for k, v in changed.items()]
    other = _other_stream(saved, stream)
    within = [f'--{k.replace("_", "-")}' for k in ORDER if k in changed] + other
    if position.step and within:
        raise PSTError(
            f'{path} stands in the middle of epoch {position.epoch}, whose batches would be other ones now: '
            f'{"; ".join(t for t in told if t.split()[0] in within) or "; ".join(other)}. Go on as that run did, or '
            f'from the end of an epoch: --resume FILE with last.pth.tar, if there is one, and --overwrite.')
    if (told or other) and is_primary(args):
        _logger.warning(f'Going on otherwise than {path} was written: {"; ".join(told + other)}.')


def _other_stream(saved: Dict[str, Any], stream: Stream) -> List[str]:
    """In words, what is not as it was in the batches of an epoch."""
    then = saved.get('stream')
    then = then if isinstance(then, dict) else {}
    words = dict(world_size='processes', batches='batches in an epoch', images='training images')
    # fewer batches follow from the rest, and are told only where the rest is the same
    found = [
        f'{getattr(stream, k)} {what} (were {then[k]})' for k, what in words.items()
        if isinstance(then.get(k), int) and then[k] != getattr(stream, k)]
    found = found if len(found) < 2 else [text for text in found if words['batches'] not in text]
    images, drawn = then.get('images'), then.get('draw')
    same = isinstance(images, int) and images == stream.images  # others have other weights anyway
    if same and (drawn if isinstance(drawn, int) else None) != stream.draw:
        found.append('images drawn with other weights')
    return found


def _label_names(saved: Dict[str, Any]) -> Optional[List[str]]:
    facts = saved.get(FACTS_KEY)
    cfg = facts.get('pretrained_cfg') if isinstance(facts, dict) else None
    names = cfg.get('label_names') if isinstance(cfg, dict) else None
    return names if isinstance(names, list) else None


def keep_settings(
        optimizer: torch.optim.Optimizer,
        changed: Dict[str, Any],
        args: Namespace,
        path: Path,
) -> Callable[[], None]:
    """Note the settings of a fresh optimizer, which loading its state from a checkpoint would undo.

    The state has counters among the settings, which stay; and the learning rate where no schedule leads it.

    Args:
        optimizer: The optimizer, made from the arguments.
        changed: From `changed_settings`.
        args: Arguments of this run.
        path: The checkpoint.

    Returns:
        A function to call once the state is loaded; it raises a PSTError if what stays is no number.
    """
    fresh = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    stay = {*COUNTERS, *(['lr'] if args.sched == 'none' and 'lr' not in changed else [])}

    def restore() -> None:
        for group, settings in zip(optimizer.param_groups, fresh):
            loaded = {k: group[k] for k in stay if k in group}
            wrong = next((k for k, v in loaded.items() if not _is_amount(v)), None)
            if wrong is not None:
                raise PSTError(
                    f'The optimizer in the checkpoint {path} is garbled: its {wrong} is no finite number from '
                    f'zero up. Use another checkpoint; --no-resume-opt leaves its optimizer behind.')
            params = group['params']
            group.clear()  # which the schedule and the saver know
            group.update(settings, **loaded, params=params)

    return restore


def _is_amount(value: Any) -> bool:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def load_run(
        args: Namespace,
        checkpoint: Path,
        saved: Dict[str, Any],
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Optional[NativeScaler],
        stream: Stream,
        names: Optional[List[str]],
        groups: FlagGroups = TRAIN_FLAGS,
) -> Position:
    """Go on from a checkpoint; what is otherwise than in the run that wrote it is done and said, or refused.

    Args:
        args: Arguments of the run, resolved.
        checkpoint: The checkpoint.
        saved: Its content, without the weights.
        task: The task, before it is wrapped for several processes.
        optimizer: The optimizer.
        loss_scaler: The loss scaler, if there is one.
        stream: The batches of an epoch.
        names: Names of the classes in the order of the labels, if known.
        groups: The flags of the run's command.

    Returns:
        Where the checkpoint stands.
    """
    position = position_of(saved, checkpoint)
    begun = position if args.start_epoch is None else Position()
    check_changes(saved, checkpoint, args, begun, stream, names, groups)
    keep = not args.no_resume_opt
    restore = keep_settings(optimizer, changed_settings(saved, args, groups), args, checkpoint)
    resume(checkpoint, saved, task, optimizer if keep else None, loss_scaler if keep else None)
    restore()
    _logger.info(f'Going on from {checkpoint}, epoch {position.epoch}, step {position.step}.')
    return position


def check_resume(args: Namespace) -> None:
    """Make sure that the flags say which run to go on with."""
    if args.resume == 'auto' and not args.experiment:
        raise PSTError('--resume auto needs --experiment, to know which run to go on with.')
    if args.resume == 'auto' and args.overwrite:
        raise PSTError('--resume auto goes on with the run that is there, --overwrite removes it: choose one.')


def check_start(args: Namespace, start: Position, num_epochs: int, checkpoint: Optional[Path]) -> None:
    """Make sure that there is something to train, or that all of it was.

    Raises:
        PSTError: If the run would start behind its end.
    """
    if start > (num_epochs, 0):
        raise PSTError(
            f'{checkpoint} has trained {start.epoch} epochs already, and --epochs asks for {num_epochs}: choose more, '
            f'or another checkpoint.')
    if start == (num_epochs, 0):
        _logger.info(f'{checkpoint} is the end of a run of {num_epochs} epochs: there is nothing left to train.')

"""What the processes of a run tell each other, and what they say when one of them is missing."""
import hashlib
import re
from argparse import Namespace
from typing import Any, Callable, List, Optional

import torch
import torch.distributed as dist
from timm.utils import is_primary
from torch.utils.data import Dataset

from pst_timm.data.datasets import class_names
from pst_timm.data.loaders import TrainSplits, worker_ended
from pst_timm.utils.errors import Interrupted, PSTError

__all__ = ['check_ranks', 'explain', 'leave_group', 'on_first']

# how torch's ways of talking between processes say that there was no answer
LOST = re.compile(r'gloo|nccl|timed out|timeout|connection|broken pipe|socket|process group', re.IGNORECASE)


def on_first(args: Namespace, work: Callable[[], Any]) -> Any:
    """What the first process finds out, told to all of them; so is its error.

    Args:
        args: Arguments of the run.
        work: What the first process does.

    Raises:
        PSTError: In all processes, if the first one did.
    """
    if not args.distributed:
        return work()
    found: List[Any] = [None, None]
    if is_primary(args):
        try:
            found[0] = work()
        except PSTError as e:
            found[1] = e
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def leave_group(args: Namespace) -> None:
    """Leave the process group, if there is one."""
    if getattr(args, 'distributed', False) and dist.is_initialized():
        dist.destroy_process_group()


def check_ranks(args: Namespace, splits: TrainSplits) -> None:
    """Make sure that all processes see the same classes, in the same order, as many images, and weights of them.

    Raises:
        PSTError: In all of them, if they do not.
    """
    if not args.distributed:
        return
    names = class_names(splits.train)
    digest = hashlib.sha256('\n'.join(names).encode(errors='surrogatepass')).hexdigest() if names else None
    everyone: List[Any] = [None] * args.world_size
    draw = splits.images.digest if splits.images is not None else None
    dist.all_gather_object(everyone, (digest, names and len(names), _length(splits.train), draw))
    odd = [rank for rank, seen in enumerate(everyone) if seen != everyone[0]]
    if odd:
        def words(rank: int) -> str:
            return f'{everyone[rank][2]} images of {everyone[rank][1]} classes'

        same = words(0) == words(odd[0])
        if everyone[odd[0]][:3] == everyone[0][:3]:
            raise PSTError(
                f'Process {odd[0]} has other weights of the images than process 0: give all of them the same flags and '
                f'the same --hard-examples.')
        raise PSTError(
            f'Process {odd[0]} sees other training data than process 0: '
            f'{"classes of other names, or in another order" if same else f"{words(odd[0])}, not {words(0)}"}. Let all '
            f'of them read the same folder, or give them a --class-map.')


def _length(dataset: Dataset) -> Optional[int]:
    return len(dataset) if hasattr(dataset, '__len__') else None


def explain(
        error: RuntimeError,
        args: Namespace,
        doing: str,
        go_on: Optional[str],
        stopped: bool = False,
) -> Optional[PSTError]:
    """What torch says when a process or memory is missing, in plain words.

    Args:
        error: The error.
        args: Arguments of the run.
        doing: What the processes were doing together.
        go_on: The flags with which the run goes on, None if it has not begun.
        stopped: Whether this process was asked to stop.

    Returns:
        The error to show, None if it is of another kind.
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip('.')
    safe = 'Nothing was trained yet.' if go_on is None else (
        f'The last checkpoint is intact: start again with {go_on} to go on.')
    if stopped:  # the signal also went to the loader workers or the other processes, and took one from under the step
        return Interrupted(f'Stopped in the middle of a step ({text}). {safe}')
    if told := worker_ended(error):
        return PSTError(f'{told} {safe}')
    if isinstance(error, torch.OutOfMemoryError):
        return PSTError(
            f'The memory of {args.device} is not enough ({text}): try a smaller --batch-size (with --grad-accum-steps '
            f'for the same updates), --amp or --grad-checkpointing. {safe}')
    if not getattr(args, 'distributed', False) or not LOST.search(str(error)):
        return None
    if re.search('timed ?out|timeout', str(error), re.IGNORECASE):
        return PSTError(
            f'Process {args.rank} has waited {args.dist_timeout:g} s for the others at {doing}: one of the '
            f'{args.world_size} has stopped, or is far slower. Its log may say why; --dist-timeout SECONDS waits '
            f'longer. {safe}')
    return PSTError(
        f'Process {args.rank} has lost another of the {args.world_size} at {doing} ({text}): its log says why. {safe}')

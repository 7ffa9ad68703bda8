"""The folder of a run: one run at a time works in it, and it removes nothing but what the engine wrote."""
import logging
import re
from argparse import Namespace
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

from pst_timm.utils.errors import PSTError
from pst_timm.utils.locks import Locked, locked

from .progress import SPEED, SUMMARY
from .recovery import STATES, Position, find_newest, states, states_beyond

__all__ = [
    'check_unused', 'claim_folder', 'claimed', 'free_folder', 'is_in', 'remove_leftovers', 'remove_recovery',
    'remove_run', 'remove_states_beyond',
]

_logger = logging.getLogger(__name__)

# what a process that is killed while it writes leaves
LEFTOVERS = re.compile(
    r'(tmp|recovery_tmp)\.pth\.tar|(model_best|checkpoint-[0-9]+)\.pth\.tar\.tmp|'
    r'\.(args|curve|summary|speed)\.\w+\.[0-9a-f]{8}\.\w+')
RECORDS = re.compile(rf'args\.yaml|{SUMMARY}|{SPEED}|curve\.png|train-batch-[0-9]+-[0-9]+\.jpg')


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Have the folder of a run for oneself as long as the context lasts.

    It is made if it is not there, and goes again if nothing was put into it.

    Raises:
        PSTError: If another run is at work in it, or nobody can write to it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            stack.enter_context(locked(folder / 'run.lock'))
        except Locked as e:
            raise PSTError(
                f'Another run is at work in {folder} ({e}): wait for its end, or choose another --experiment.'
            ) from None
        except OSError as e:
            raise PSTError(f'Cannot write to {folder} ({e.strerror}): choose another --output.') from e
        yield


def _remove_empty(folders: List[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()


def free_folder(folder: Path) -> Path:
    """This folder, or the next one by number that is not there."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f'{folder.name}-{number}')
    return free


def claim_folder(args: Namespace, hold: ExitStack, name: str) -> Tuple[Path, Optional[Path]]:
    """Have the folder of the run, and look what is in it; for the first process alone.

    Args:
        args: Arguments of the run.
        hold: Where the folder is held until the run ends.
        name: Name of the run, if it was given none.

    Returns:
        The folder, and the checkpoint that --resume auto goes on from.

    Raises:
        PSTError: If another run is at work there, or has been.
    """
    output = Path(args.output or 'output/train')
    folder = output / args.experiment if args.experiment else free_folder(output / name)
    hold.enter_context(claimed(folder))
    if args.resume == 'auto':
        newest = find_newest(folder)
        if newest is None:
            check_unused(folder, rows=1)  # the first may have been written before the first checkpoint
            _logger.info('No checkpoint to resume, starting afresh.')
        return folder, newest
    if not args.overwrite and not (args.resume and is_in(Path(args.resume), folder)):
        check_unused(folder)
    return folder, None


def is_in(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder itself."""
    return path.parent.resolve() == folder.resolve()


def check_unused(folder: Path, rows: int = 0) -> None:
    """Make sure that a new run in a folder takes the place of no other.

    Args:
        folder: The folder.
        rows: Rows that its summary may have, below its header; with 0 it may not be there at all.

    Raises:
        PSTError: If there is one.
    """
    found = [path.name for path in states(folder)]
    try:
        lines = (folder / SUMMARY).read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as e:
        raise PSTError(f'{folder / SUMMARY} cannot be read ({e.strerror}): choose another --experiment.') from None
    if not found and len(lines) > (1 + rows if rows else 0):
        found = [SUMMARY]
    if found:
        best = 'last.pth.tar' if 'last.pth.tar' in found else found[0]
        raise PSTError(
            f'{folder} holds an earlier run ({best}): --resume auto goes on with it, --overwrite removes it for a new '
            f'one, and another --experiment leaves it alone.')


def remove_run(folder: Path) -> None:
    """Remove all that an earlier run has written."""
    for path in list(folder.iterdir()):
        if STATES.fullmatch(path.name) or RECORDS.fullmatch(path.name):
            path.unlink()
    for path in (folder / 'tensorboard').glob('events.out.tfevents.*'):
        path.unlink()
    remove_leftovers(folder)


def remove_states_beyond(folder: Path, position: Position) -> None:
    """Remove the checkpoints of a run that have come further than a position."""
    for _, path in states_beyond(folder, position)[0]:
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    for path in list(folder.iterdir()):
        if LEFTOVERS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def remove_recovery(folder: Path) -> None:
    """Remove the recovery checkpoints of a run that has come to its end: nothing will go on from them."""
    for path in folder.glob('recovery-*.pth.tar'):
        path.unlink(missing_ok=True)
    remove_leftovers(folder)

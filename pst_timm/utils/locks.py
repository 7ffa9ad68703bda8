"""A lock on a folder that ends with the process that holds it, however that ends."""
import errno
import logging
import os
import socket
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Set

from .errors import PSTError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['Locked', 'locked']

_logger = logging.getLogger(__name__)
_held: Set[int] = set()  # open files


class Locked(PSTError):
    """Another process holds the lock."""


def _close_in_child() -> None:
    # a lock lasts as long as any process has the file open, and loader workers outlive a run that is killed
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(path: os.PathLike, wait: bool = False) -> Iterator[None]:
    """Hold a lock as long as the context lasts; its file is made before and removed after.

    Where the system or the file system has no locks, a warning says so and nothing is held.

    Args:
        path: File of the lock; its folder must exist.
        wait: Whether to wait for another process that holds it.

    Raises:
        Locked: If another process holds it; the message says which.
        PSTError: If there is something else in its place, such as a link to another file.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    handle = _acquire(path, wait)
    _held.add(handle)
    try:
        with suppress(OSError):  # a full disk: nobody needs to know the owner
            os.ftruncate(handle, 0)
            os.write(handle, f'process {os.getpid()} on {socket.gethostname()}'.encode())
        yield
    finally:
        if handle in _held:  # not in a child
            _held.remove(handle)
            if fcntl is None:  # where nothing is held, an open file may not be removed
                os.close(handle)
                with suppress(OSError):
                    path.unlink()
            else:
                if _is_at(path, handle):  # removed while it is held, or it could be the lock of another
                    path.unlink(missing_ok=True)
                os.close(handle)


def _acquire(path: Path, wait: bool) -> int:
    while True:
        handle = _open(path)
        try:
            if not _lock(handle, path, wait) or _is_at(path, handle):
                return handle
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors='replace') or 'another process'
            os.close(handle)
            raise Locked(owner) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has removed it meanwhile


def _open(path: Path) -> int:
    """Open the file of a lock, which is written over: never what is behind a link."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise _no_lock(path) from None
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # removed meanwhile, it has none
        os.close(handle)
        raise _no_lock(path)
    return handle


def _no_lock(path: Path) -> PSTError:
    return PSTError(
        f'{path} is no file of a lock but a link, or not an ordinary file: remove it, or choose another folder.')


def _lock(handle: int, path: Path, wait: bool) -> bool:
    """Lock an open file; returns whether there are locks here."""
    try:
        if fcntl is None:
            raise OSError('this system has none')
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        raise
    except OSError as e:
        _logger.warning(f'{path.parent} cannot be locked ({e.strerror or e}): start one process at a time there.')
        return False


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False

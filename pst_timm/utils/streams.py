"""Standard output and error that end no finished run: for want of a letter, or because nobody reads them."""
import os
import select
import sys
from typing import TextIO

__all__ = ['flush_output', 'forgive_letters']


def forgive_letters() -> None:
    """Have what a terminal cannot show written as an escape; a letter that it lacks must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


def flush_output() -> bool:
    """Write out what was printed.

    Returns:
        False where its reader has gone, as in `| head`; then it is dropped, and so is what follows.
    """
    try:
        if sys.stdout is None:
            return True
        sys.stdout.flush()
        if not _has_no_reader(sys.stdout):  # without a buffer, there was nothing to flush
            return True
    except BrokenPipeError:
        pass
    # or Python tries again when it ends, and says so
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False


def _has_no_reader(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # not on this system, or no file at all
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))

"""Calls that may never come back."""
import queue
import threading
from typing import Any, Callable

from .errors import Unavailable

__all__ = ['SLOWEST', 'THREAD', 'TIMEOUT', 'Silent', 'in_time']

TIMEOUT = 60  # seconds
SLOWEST = 2 ** 17  # bytes per second of a transfer that is waited for
THREAD = 'ask the Hub'  # name of the thread in which a call runs


class Silent(Unavailable):
    """The Hub did not answer in time; it is not asked again."""


def in_time(call: Callable[[], Any], seconds: float, message: str) -> Any:
    """What a call returns or raises, unless it takes too long.

    The client of the Hub waits without end in some places and tries again in others, so what is measured is the call
    as a whole, in a thread that is left behind.

    Args:
        call: What asks.
        seconds: How long it is waited for.
        message: What is said if that was too short.

    Raises:
        Silent: If it takes longer.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as e:
            answers.put((None, e))

    threading.Thread(target=work, name=THREAD, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise Silent(message) from None
    if error is not None:
        raise error
    return answer

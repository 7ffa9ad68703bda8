"""Errors whose message is meant for the person who converts, publishes or loads."""
import difflib
from typing import Iterable

__all__ = ['HubError', 'HubUnavailable', 'did_you_mean']


class HubError(ValueError):
    """Something the user can mend; the message says what was wrong, what was expected and what to do."""
    exit_code = 1


class HubUnavailable(HubError):
    """The Hub could not be reached or could not answer; the same command may succeed later."""
    exit_code = 75  # "temporary failure, try again" of sysexits.h


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """The end of a sentence that suggests the known names closest to a wrong one, empty if none is close."""
    near = difflib.get_close_matches(name, list(known), most)
    return f'; did you mean {", ".join(near)}?' if near else ''

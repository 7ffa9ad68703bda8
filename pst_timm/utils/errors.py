"""Errors whose message is meant for the person who typed the command, and the hints in them."""
import difflib
from typing import Collection, Iterable

__all__ = ['Interrupted', 'PSTError', 'Unavailable', 'did_you_mean', 'unknown_tag']

TRY_AGAIN = 75  # "temporary failure, try again" of sysexits.h


class PSTError(RuntimeError, ValueError):
    """Something the user can mend; the message says what was wrong, what was expected and what to do.

    A RuntimeError to those who train, a ValueError to those who load and publish.
    """
    exit_code = 1


class Interrupted(PSTError):
    """The run was asked to stop (SIGINT, SIGTERM) and has left a checkpoint to go on from."""
    exit_code = TRY_AGAIN


class Unavailable(PSTError):
    """A server could not be reached or could not answer; the same command may succeed later."""
    exit_code = TRY_AGAIN


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """A sentence, after a space, that suggests the known names closest to a wrong one; empty if none is close."""
    near = difflib.get_close_matches(name, list(known), most)
    return f' Did you mean {" or ".join(near)}?' if near else ''


def unknown_tag(name: str, tags: Collection[str]) -> str:
    """What to say of weights that do not exist, such as 'resnet18_pst.wrong', where those in `tags` do."""
    known = ', '.join(tag for tag in tags if '.' in tag) or 'none'
    return f'There are no weights {name!r}.{did_you_mean(name, tags)} The tags of the model: {known}.'

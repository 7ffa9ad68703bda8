"""Errors whose message is meant for the person who started the run."""

__all__ = ['EngineError', 'Interrupted']


class EngineError(RuntimeError):
    """Something the user can mend; the message says what was wrong, what was expected and what to do."""
    exit_code = 1


class Interrupted(EngineError):
    """The run was asked to stop (SIGINT, SIGTERM) and has left a checkpoint to go on from."""
    exit_code = 75  # "temporary failure, try again" of sysexits.h

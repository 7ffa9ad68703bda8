"""Errors whose message is meant for the person who converts, publishes or loads."""

__all__ = ['HubError', 'HubUnavailable']


class HubError(ValueError):
    """Something the user can mend; the message says what was wrong, what was expected and what to do."""
    exit_code = 1


class HubUnavailable(HubError):
    """The Hub could not be reached or could not answer; the same command may succeed later."""
    exit_code = 75  # "temporary failure, try again" of sysexits.h

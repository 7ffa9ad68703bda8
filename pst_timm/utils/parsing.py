"""The parser of every command."""
import argparse
from typing import Any, NoReturn, Optional, Sequence

from .errors import did_you_mean

__all__ = ['ArgumentParser']


class ArgumentParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and whose errors are one line with the nearest valid spelling."""

    def __init__(self, *args: Any, intermixed: bool = False, **kwargs: Any):
        """
        Args:
            args: For `argparse.ArgumentParser`.
            intermixed: Whether flags may stand between the words of one list.
            kwargs: For `argparse.ArgumentParser`.
        """
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.intermixed = intermixed

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with exit code 2."""
        self.exit(2, f'{self.prog}: error: {message}{"" if message.endswith((".", "?")) else "."}\n')

    def parse_args(
            self,
            args: Optional[Sequence[str]] = None,
            namespace: Optional[argparse.Namespace] = None,
    ) -> argparse.Namespace:
        """Parse the words of a command line (`sys.argv` if None); all of them must be known."""
        parse = self.parse_known_intermixed_args if self.intermixed else self.parse_known_args
        parsed, unknown = parse(args, namespace)
        if unknown:
            # what follows an unknown flag is its value as a rule
            wrong = next((word for word in unknown if word.startswith('-')), unknown[0])
            flags = [name for action in self._actions if action.help != argparse.SUPPRESS
                     for name in action.option_strings]
            # all flags are near each other by their dashes
            hint = did_you_mean(wrong.split('=')[0], flags, most=1)
            self.error(f'unknown argument {wrong!r}.{hint} See {self.prog} --help.')
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f'expected one of {", ".join(known)}, got {value!r}.{did_you_mean(str(value), known)}')

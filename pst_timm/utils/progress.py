"""How far a job is: a bar in a terminal, lines elsewhere."""
import sys
import time
from typing import Any, Callable, Iterable, Sequence

from tqdm import tqdm

__all__ = ['Steps', 'duration', 'progress_bar']


def progress_bar(items: Iterable, total: int, title: str, enabled: bool = True) -> tqdm:
    """A bar over an iterable that shows nothing where standard error is not a terminal."""
    return tqdm(items, total=total, desc=title, leave=False, disable=not (enabled and sys.stderr.isatty()))


def duration(seconds: float) -> str:
    """Seconds as a person says them: '40 s', '6 min', '2.5 h'."""
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


class Steps:
    """A job of several steps, which says what came of each as it ends, and how long the rest may take.

    Everything goes to standard error, so that it does not mix with a result. In a terminal there is a bar as well.
    """

    def __init__(self, title: str, costs: Sequence[float], enabled: bool = True):
        """
        Args:
            title: Name of the job.
            costs: What each step may take, in any unit.
            enabled: Whether to say anything.
        """
        self.costs = list(costs)
        self.ended = 0
        self.enabled = enabled
        self._start = time.monotonic()
        self._bar = tqdm(
            total=sum(self.costs), desc=title, leave=False, disable=not (enabled and sys.stderr.isatty()),
            bar_format='{desc} {percentage:3.0f}%|{bar}| {elapsed}')

    def __enter__(self) -> 'Steps':
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def ticks(self, rounds: int) -> Callable[[], None]:
        """What to call after each of the rounds of the step at work."""
        share = self.costs[self.ended] / rounds

        def tick() -> None:
            self._bar.update(share)
        return tick

    def done(self, result: str) -> None:
        """Say that the step at work has ended, and what came of it."""
        self.ended += 1
        spent, rest = sum(self.costs[:self.ended]), sum(self.costs[self.ended:])
        self._bar.update(spent - self._bar.n)
        left = (time.monotonic() - self._start) / spent * rest
        # a small beginning says little of the rest
        after = f' (about {duration(left)} left)' if 0 < rest < 20 * spent else ''
        self.say(f'[{self.ended}/{len(self.costs)}] {result}{after}')

    def say(self, line: str) -> None:
        """Show a line, above the bar if there is one."""
        if self.enabled:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

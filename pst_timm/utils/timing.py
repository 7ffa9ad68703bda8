"""Wall time of calls, measured in turn so that a machine's drift meets all of them alike."""
import statistics
import time
from functools import partial
from typing import Callable, Dict, List, Mapping, Optional, Sequence

import torch

__all__ = ['Call', 'median_ratio', 'percentile', 'time_in_turn']

Call = Callable[[], object]


def _clock(device: Optional[torch.device]) -> float:
    """Seconds, read when the accelerator, if there is one, has finished."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize(device if device is not None and device.type != 'cpu' else None)
    return time.perf_counter()


def time_in_turn(
        calls: Mapping[str, Call],
        repeats: int,
        warmup: int = 2,
        tick: Callable[[], object] = lambda: None,
        device: Optional[torch.device] = None,
        clock: Optional[Callable[[], float]] = None,
        lead_in: int = 0,
) -> Dict[str, List[float]]:
    """Time several calls A B A B ..., so that a machine's drift meets all of them alike.

    Args:
        calls: The calls by name.
        repeats: Timed rounds.
        warmup: Rounds before them.
        tick: Called after each round, for a progress bar.
        device: The accelerator to wait for before the clock is read (default: the current one).
        clock: What gives the seconds in place of the wall clock, such as `time.process_time`.
        lead_in: Untimed calls right before each timed one, which find what the call before left: caches full of other
            weights, threads of another runtime that still spin.

    Returns:
        Seconds of every timed call, by name, in order.
    """
    clock = clock or partial(_clock, device)
    times = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            for _ in range(lead_in):
                call()
            start = clock()
            call()
            elapsed = clock() - start
            if i >= warmup:
                times[name].append(elapsed)
        tick()
    return times


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a / b, both measured in the same round."""
    return statistics.median(x / y for x, y in zip(a, b))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear percentile of a list of numbers."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100).item()

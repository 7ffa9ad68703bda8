"""Measure a call: wall time in turn with others, peak memory, activations, energy."""
import statistics
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import timer  # perf_counter, after waiting for the accelerator

__all__ = ['EnergyMeter', 'count_activations', 'median_ratio', 'peak_memory', 'percentile', 'time_in_turn']

Call = Callable[[], object]


def time_in_turn(
        calls: Mapping[str, Call],
        repeats: int,
        warmup: int = 2,
        tick: Callable[[], object] = lambda: None,
) -> Dict[str, List[float]]:
    """Time several calls A B A B ..., so that a machine's drift meets all of them alike.

    Args:
        calls: The calls by name.
        repeats: Timed rounds.
        warmup: Rounds before them.
        tick: Called after each round, for a progress bar.

    Returns:
        Wall seconds of every timed call, by name, in order.
    """
    times = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            start = timer()
            call()
            elapsed = timer() - start
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


def peak_memory(call: Call, device: torch.device) -> int:
    """Largest amount of memory, in bytes, that a call holds beyond what was allocated before it."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    held = peak = 0
    # every allocation and release of the CPU allocator, kernels' own scratch space included
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class _CountActivations(TorchDispatchMode):
    """Adds up the outputs of convolutions, matrix products and attention."""
    OPS = ('convolution', 'addmm', 'mm', 'bmm', 'baddbmm', 'scaled_dot_product')

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.lstrip('_')
        if name in self.OPS or name.startswith('scaled_dot_product'):
            self.total += (out[0] if isinstance(out, tuple) else out).numel()
        return out


def count_activations(call: Call) -> int:
    """Elements that the convolutions, matrix products and attentions of a call put out."""
    with torch.no_grad(), _CountActivations() as counter:
        call()
    return counter.total


class EnergyMeter:
    """Energy counter of the device, where there is one: NVML for an NVIDIA GPU, RAPL for an Intel or AMD CPU."""

    def __init__(self, device: torch.device, rapl: Path = Path('/sys/class/powercap')):
        """
        Args:
            device: Where the measured calls run.
            rapl: The kernel's folder of power zones.
        """
        self._read: Optional[Callable[[], float]] = None
        if device.type == 'cuda':
            try:
                import pynvml
                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            except Exception:  # not installed, no driver, or a GPU without the counter: energy stays unknown
                return
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        elif device.type == 'cpu':
            # a package zone is intel-rapl:N; its sub-zones intel-rapl:N:M are part of it
            zones = [z / 'energy_uj' for z in sorted(rapl.glob('intel-rapl:*')) if z.name.count(':') == 1]
            try:
                for zone in zones:
                    zone.read_text()
            except OSError:  # readable by root alone on most systems
                return
            if zones:
                self._read = lambda: sum(int(z.read_text()) for z in zones) / 1e6

    def joules(self, call: Call, repeats: int) -> Optional[float]:
        """Joules per call, averaged over `repeats` calls, or None where no counter can be read."""
        if self._read is None:
            return None
        start = self._read()
        for _ in range(repeats):
            call()
        timer()  # waits for the accelerator
        used = self._read() - start
        return used / repeats if used >= 0 else None  # a counter that wrapped around tells nothing

"""Devices: which one to use, whether it is there, what it is called."""
import logging
import os
import platform
import time
from pathlib import Path
from typing import Tuple

import torch

from .errors import PSTError

__all__ = ['available_cores', 'best_device', 'check_device', 'choose_threads', 'hardware_name', 'total_memory']

_logger = logging.getLogger(__name__)


def best_device() -> str:
    """The accelerator that is present ('cuda', 'mps', ...), else 'cpu'."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else 'cpu'


def check_device(name: str = '') -> torch.device:
    """The device of that name, the best one present if the name is empty. A GPU is not touched.

    Raises:
        PSTError: If there is no such device.
    """
    name = name or best_device()
    try:
        device = torch.device(name)
        if device.type == 'meta':
            raise RuntimeError('its tensors have no content')
        if device.type != 'cuda':
            torch.empty(0, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f'torch sees {torch.cuda.device_count()} GPUs.')
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as e:
        reason = str(e).splitlines()[0].rstrip('.')
        if reason.startswith('Expected one of'):  # all that torch may be built for
            reason = 'no such kind is known; cuda, mps and cpu are the usual ones'
        raise PSTError(f'--device {name} cannot be used here: {reason}. Leave the flag out.') from None
    return device


def hardware_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has: its own, or what this process may use of the machine's."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    try:
        found = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, OSError, ValueError):  # not a Unix
        return 2 ** 62
    try:
        return min(found, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return found


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def busy_cores(seconds: float = 0.2) -> float:
    """Cores that others keep busy just now, as this process, asleep meanwhile, is not at work."""
    try:
        (busy, total), _ = _core_ticks(), time.sleep(seconds)
        busy_after, total_after = _core_ticks()
        return available_cores() * (busy_after - busy) / (total_after - total)
    except (AttributeError, OSError, ValueError, ZeroDivisionError):  # not Linux, or a Linux that does not tell
        return os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0.


def _core_ticks() -> Tuple[int, int]:
    """Busy and all ticks so far of the cores that this process may use."""
    busy = total = 0
    mine = {f'cpu{i}' for i in os.sched_getaffinity(0)}
    for line in Path('/proc/stat').read_text().splitlines():
        name, *ticks = line.split()
        if name in mine:
            # user nice system idle iowait irq softirq steal, then guests, which are users too
            ticks = [int(t) for t in ticks[:8]]
            total += sum(ticks)
            busy += sum(ticks) - ticks[3] - ticks[4]
    return busy, total


def choose_threads() -> int:
    """Let torch use no more threads than there are idle cores; call it before any work on a CPU.

    Threads that wait for each other on a busy machine are many times slower than one thread alone. `OMP_NUM_THREADS`
    and a smaller number that was set before are left as they are.

    Returns:
        The number of threads, at least one.
    """
    before = torch.get_num_threads()
    if 'OMP_NUM_THREADS' in os.environ or before == 1:
        return before
    cores = available_cores()
    threads = min(before, cores, max(1, cores - round(busy_cores())))
    if threads < before:
        torch.set_num_threads(threads)
        _logger.info(
            f'torch takes {threads} of {before} threads, because others keep cores busy; OMP_NUM_THREADS sets another '
            f'number.')
    return threads

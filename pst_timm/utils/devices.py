"""Devices: which one to use, whether it is there, what it is called."""
import platform
from pathlib import Path

import torch

from .errors import PSTError

__all__ = ['best_device', 'check_device', 'hardware_name']


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
        if device.type != 'cuda':
            torch.empty(0, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f'torch sees {torch.cuda.device_count()} GPUs.')
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as e:
        reason = str(e).splitlines()[0].rstrip('.')
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

"""A polite end: SIGINT and SIGTERM are noted, and the loop stops after the step it is in."""
import signal
import threading
from typing import Optional

import torch
import torch.distributed as dist

__all__ = ['StopSignals']


class StopSignals:
    """Within this context the signals set a flag; a second SIGINT interrupts as usual."""

    def __init__(self, distributed: bool = False):
        """
        Args:
            distributed: Whether all processes have to agree before they stop.
        """
        self.received: Optional[int] = None
        self.distributed = distributed
        self._before = {}
        # on the CPU, so that agreeing does not wait for the device
        self._group = dist.new_group(backend='gloo') if distributed else None

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if hasattr(signal, 'SIGCHLD') and signal.SIGCHLD not in self._before:
            # the signal may reach the loader workers too, and torch would raise wherever this process then is
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Whether to stop here; in a distributed run all ranks must ask at the same step and get the same answer."""
        if not self.distributed:
            return self.received is not None
        flag = torch.tensor([self.received is not None], dtype=torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

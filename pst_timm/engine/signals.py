"""A polite end: SIGINT, SIGTERM and SIGHUP are noted, and the loop stops after the step it is in."""
import os
import signal
import threading
from datetime import timedelta
from typing import Optional

import torch
import torch.distributed as dist

__all__ = ['StopSignals']


class StopSignals:
    """Within this context the signals set a flag; a second SIGINT interrupts as usual."""

    def __init__(self, distributed: bool = False, timeout: float = 600.):
        """
        Args:
            distributed: Whether all processes have to agree before they stop.
            timeout: Seconds to wait for the others then.
        """
        self.received: Optional[int] = None
        self.distributed = distributed
        self._before = {}
        # on the CPU, so that agreeing does not wait for the device
        self._group = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout)) if distributed else None

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            # nohup has it ignored, and so it stays
            if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        _leave_terminals()
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


def _leave_terminals() -> None:
    """Let what is said on a terminal that has gone be lost: writing to it would end the run before it is saved."""
    for handle in (1, 2):
        try:
            os.write(handle, b'')
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, handle)
            os.close(nowhere)

"""How something is built and run for a measurement."""
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Optional

import torch

from pst_timm.utils.devices import hardware_name

__all__ = ['WARMUP', 'Row', 'Setting', 'Tick', 'no_tick']

Row = Dict[str, Any]
Tick = Callable[[], object]
WARMUP = 2  # rounds before the timed ones


def no_tick() -> None:
    """For those who do not ask how far it is."""


@dataclass(frozen=True)
class Setting:
    """How models are built and run for a measurement, the same for both sides of a ratio."""
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    batch_size: int = 8
    img_size: int = 224
    """0 where no images are involved."""
    dtype: torch.dtype = torch.float32
    reparam: bool = False
    compile: bool = False
    channels_last: bool = False
    train: bool = False
    topk: Optional[int] = None
    """For the PST models alone, as is the fusion; None for what the model has."""
    fine_fusion: Optional[str] = None
    repeats: int = 20

    @property
    def rounds(self) -> int:
        """Rounds of a measurement, those before the timed ones included."""
        return self.repeats + WARMUP

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of weights and maps."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def describe(self) -> str:
        """One line for the head of a table."""
        flags = [f for f in ('reparam', 'compile', 'channels_last', 'train') if getattr(self, f)]
        what = [
            f'torch {torch.__version__}',
            hardware_name(self.device),
            f'{torch.get_num_threads()} CPU threads' if self.device.type == 'cpu' else '',
            f'batch {self.batch_size}',
            f'{self.img_size} px' if self.img_size else '',
            str(self.dtype).removeprefix('torch.'),
            *(flags or ['eager']),
            f'k = {self.topk}' if self.topk is not None else '',
            self.fine_fusion or '',
            f'medians of {self.repeats} rounds',
        ]
        return ', '.join(w for w in what if w)

"""What every metric of an evaluation offers, fed batch by batch in one pass over the data."""
from typing import Any, Dict

import torch

__all__ = ['Metric']


class Metric:
    """Takes in batches, gives out results."""

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take in logits (B, classes) and labels (B,)."""
        raise NotImplementedError

    def results(self) -> Dict[str, Any]:
        """The results by name."""
        raise NotImplementedError

"""How far the answers of two forms of one model lie apart."""
from typing import NamedTuple

import torch

__all__ = ['Agreement', 'compare_logits']


class Agreement(NamedTuple):
    """How far logits lie from those that were expected."""
    difference: float
    """Largest absolute difference, as a share of the largest absolute logit expected; infinite for another shape."""
    top1: float
    """Share of the rows with the same largest logit."""


def compare_logits(got: torch.Tensor, expected: torch.Tensor) -> Agreement:
    """Compare logits (N, classes) with those expected, in float32; a NaN makes the difference NaN."""
    if got.shape != expected.shape:
        return Agreement(float('inf'), 0.)
    got, expected = got.float(), expected.float()
    largest = expected.abs().max().clamp_min(1e-12)
    return Agreement(
        ((got - expected).abs().max() / largest).item(),
        (got.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean().item(),
    )

"""Whether confidence tells right answers from wrong ones: what routing by confidence lives on."""
from typing import Optional

import torch

__all__ = ['failure_auroc']


def failure_auroc(confidence: torch.Tensor, right: torch.Tensor) -> Optional[float]:
    """The chance that the model is more confident of a right answer than of a wrong one; ties count half.

    It is the area under the ROC curve of confidence as a predictor of failure: 1 for a perfect order, 0.5 for none. A
    temperature changes the calibration error, but hardly this order.

    Args:
        confidence: Confidence (N,).
        right: Which images (N,) were classified right.

    Returns:
        The area, or None where all answers are right, or none.
    """
    right = right.bool()
    positive = int(right.sum())
    negative = len(right) - positive
    if not positive or not negative:
        return None
    _, place, counts = confidence.double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2  # mean rank of equal ones, from 1
    return (ranks[place][right].sum().item() - positive * (positive + 1) / 2) / (positive * negative)

"""How far confidence and accuracy lie apart, and the temperature of the smallest loss, which may mend it."""
import logging
from typing import Any, Dict, List, NamedTuple

import torch
import torch.nn.functional as F

from .base import Metric

__all__ = [
    'Calibration', 'Refit', 'calibration_error', 'confidence_error', 'fit_temperature', 'refit_temperature',
]

_logger = logging.getLogger(__name__)


def calibration_error(logits: torch.Tensor, target: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, from 0 to 1.

    Args:
        logits: Logits (N, classes).
        target: Labels (N,).
        bins: Bins of equal width over the confidence.
    """
    confidence, prediction = logits.softmax(dim=-1).max(dim=-1)
    return confidence_error(confidence, prediction.eq(target), bins)


def confidence_error(confidence: torch.Tensor, right: torch.Tensor, bins: int = 15) -> float:
    """The same, where no more is known than confidence (N,) and which images (N,) were classified right."""
    correct = right.to(confidence.dtype)
    index = (confidence * bins).long().clamp(max=bins - 1)
    # sum over bins of n_b / N * |accuracy - confidence| = |sum of (correct - confidence) in the bin| / N
    gaps = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    gaps.scatter_add_(0, index, correct - confidence)
    return (gaps.abs().sum() / len(right)).item()


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """The temperature by which to divide the logits for the smallest cross-entropy.

    Args:
        logits: Logits (N, classes).
        target: Labels (N,).
    """
    # inference_mode is left, as the fit needs gradients
    with torch.inference_mode(False), torch.enable_grad():
        logits, target = logits.clone(), target.clone()
        log_temperature = torch.zeros((), dtype=logits.dtype, device=logits.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn='strong_wolfe')

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(logits / log_temperature.exp(), target)
            loss.backward()
            return loss

        optimizer.step(closure)
        return log_temperature.exp().item()


class Refit(NamedTuple):
    """A temperature, and what one is worth on images that it was not fitted on."""
    temperature: float
    """Fitted on all images."""
    loss: float
    """Cross-entropy of the logits as they are."""
    ece: float
    """Expected calibration error of the logits as they are, from 0 to 1."""
    loss_refitted: float
    """The same of logits over a temperature; each half of the images has that of the other half."""
    ece_refitted: float

    @property
    def helps(self) -> bool:
        """Whether both are smaller than they were."""
        return self.loss_refitted < self.loss and self.ece_refitted < self.ece


def refit_temperature(logits: torch.Tensor, target: torch.Tensor, seed: int = 0) -> Refit:
    """Fit a temperature, and see on halves of the images that it was not fitted on whether one helps.

    Args:
        logits: Logits (N, classes), of two images or more.
        target: Labels (N,).
        seed: What the halves are drawn with.
    """
    logits = logits.double()
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    halves = order[:len(order) // 2], order[len(order) // 2:]
    refitted = torch.empty_like(logits)
    for fitted, other in (halves, halves[::-1]):
        refitted[other] = logits[other] / fit_temperature(logits[fitted], target[fitted])
    return Refit(
        fit_temperature(logits, target),
        F.cross_entropy(logits, target).item(), calibration_error(logits, target),
        F.cross_entropy(refitted, target).item(), calibration_error(refitted, target))


class Calibration(Metric):
    """Calibration error as it is, and with the temperature of the smallest loss (fitted on these same images)."""

    def __init__(self):
        self.logits: List[torch.Tensor] = []
        self.targets: List[torch.Tensor] = []

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.logits.append(output.cpu().double())  # not every device has double precision
        self.targets.append(target.cpu())

    def results(self) -> Dict[str, Any]:
        """`ece`, `temperature` and `ece_calibrated`; a warning if the temperature makes the error larger."""
        logits, target = torch.cat(self.logits), torch.cat(self.targets)
        temperature = fit_temperature(logits, target)
        before, after = (round(calibration_error(x, target), 5) for x in (logits, logits / temperature))
        if after > before:
            _logger.warning(
                f'A temperature of {temperature:.4g} lowers the loss, but not the calibration error: {after:.5f} with '
                f'it, {before:.5f} without. Use the model without it.')
        return dict(ece=before, temperature=round(temperature, 4), ece_calibrated=after)

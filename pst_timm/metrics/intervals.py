"""Means and paired differences with 95% intervals, over training runs and over images."""
import math
import statistics
from dataclasses import dataclass
from typing import Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from pst_timm.utils.errors import PSTError

__all__ = [
    'Difference', 'Interval', 'image_interval', 'mean_and_sd', 'paired_difference', 'seed_interval',
    'student_quantile']

LEVEL = 0.95


class Interval(NamedTuple):
    """The ends of a confidence interval, both included."""
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """How much one model's metric lies above another's, in the units of the metric."""
    mean: float
    pairs: int
    """Seeds that both models were trained with."""
    seeds: Optional[Interval]
    """What another training run may bring; None with one seed."""
    images: Optional[Interval] = None
    """What other images may bring; None where it is not known which images were classified right."""

    @property
    def is_clear(self) -> bool:
        """Whether both intervals are there and exclude zero."""
        return all(i is not None and i.excludes_zero for i in (self.seeds, self.images))


def mean_and_sd(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Mean, and standard deviation sqrt(sum (x - mean)^2 / (n - 1)), which is None for a single value."""
    return statistics.fmean(values), float(np.std(values, ddof=1)) if len(values) > 1 else None


def student_quantile(level: float, df: int) -> float:
    """The t with P(|T| <= t) = level for Student's t with so many degrees of freedom.

    Raises:
        PSTError: If scipy is not installed.
    """
    try:
        from scipy.stats import t
    except ImportError as e:
        raise PSTError(
            f"Intervals over several seeds need scipy ({e}): pip install 'pst_timm[train]' brings it.") from None
    return float(t.ppf(0.5 + level / 2, df))


def _interval(values: Sequence[float], quantile: float) -> Interval:
    mean, sd = mean_and_sd(values)
    half = quantile * sd / math.sqrt(len(values))
    return Interval(mean - half, mean + half)


def seed_interval(differences: Sequence[float]) -> Optional[Interval]:
    """Interval of the mean over seeds, mean +- t(n - 1) sd / sqrt(n), with Student's t; None for fewer than two.

    Args:
        differences: One difference per seed, between two runs of that seed.
    """
    if len(differences) < 2:
        return None
    return _interval(differences, student_quantile(LEVEL, len(differences) - 1))


def image_interval(right: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Optional[Interval]:
    """Interval of the difference in accuracy over images, in percentage points; None for fewer than two images.

    For each image d is the mean over the seeds of (right - other), from -1 to 1. The interval is the normal one of the
    mean over the images, mean(d) +- z sd(d) / sqrt(images).

    Args:
        right: Per seed, which images (N,) a model classified right.
        other: The same of the other model, same seeds, same images in the same order.
    """
    d = 100 * np.mean([a.astype(float) - b for a, b in zip(right, other)], axis=0)
    return _interval(d, statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2)) if len(d) > 1 else None


def paired_difference(
        values: Mapping[int, float],
        others: Mapping[int, float],
        right: Optional[Mapping[int, np.ndarray]] = None,
        other_right: Optional[Mapping[int, np.ndarray]] = None,
) -> Optional[Difference]:
    """Difference of a metric between two models, paired by seed; seeds that only one of them has are left out.

    Args:
        values: The metric by seed.
        others: The metric of the model to compare with, by seed.
        right: By seed, which images (N,) were classified right, for the interval over images.
        other_right: The same of the other model.

    Returns:
        values - others, or None where no seed is in both.
    """
    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return None
    differences = [values[s] - others[s] for s in seeds]
    images = None
    if right is not None and other_right is not None:
        images = image_interval([right[s] for s in seeds], [other_right[s] for s in seeds])
    return Difference(statistics.fmean(differences), len(seeds), seed_interval(differences), images)

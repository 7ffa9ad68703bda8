"""Means and paired differences with 95% intervals and exact tests, over training runs and over images."""
import math
import statistics
from dataclasses import dataclass
from typing import List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from pst_timm.utils.errors import PSTError

__all__ = [
    'Difference', 'Interval', 'PairedTest', 'detectable_difference', 'holm', 'image_interval', 'mcnemar', 'mean_and_sd',
    'paired_difference', 'paired_interval', 'seed_interval', 'student_quantile']

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


def paired_interval(lost: int, gained: int, images: int) -> Interval:
    """Interval of the difference in accuracy of two models on the same images, in percentage points.

    That of Bonett and Price (2012): the normal interval after one more image of each kind of change, which holds for
    few changes too, where the plain one is too short (and has no length where there is none).

    Args:
        lost: Images that the one model classifies right and the other, new one wrong.
        gained: Images that the new one alone classifies right.
        images: All images.
    """
    count = images + 2
    down, up = (lost + 1) / count, (gained + 1) / count
    z = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2)
    half = z * math.sqrt((down + up - (up - down) ** 2) / count)
    return Interval(100 * max(up - down - half, -1.), 100 * min(up - down + half, 1.))


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


class PairedTest(NamedTuple):
    """How probable it is that chance alone turns as many answers, where neither model is better."""
    worse: float
    """As many losses or more."""
    better: float
    """As many gains or more."""
    different: float
    """A split as uneven or more, to either side."""


def mcnemar(lost: int, gained: int) -> PairedTest:
    """McNemar's exact test of two models on the same images: each change is a loss or a gain with equal chances.

    Args:
        lost: Images that the one model classifies right and the other, new one wrong.
        gained: Images that the new one alone classifies right.
    """
    changes = lost + gained

    def at_least(count: int) -> float:
        # P(X >= count) for X ~ B(changes, 1/2), in whole numbers; the shorter tail is summed
        tail, term = 0, 1
        short = min(changes - count + 1, count)
        for k in range(short):
            tail += term
            term = term * (changes - k) // (k + 1)
        whole = 1 << changes
        return (tail if short == changes - count + 1 else whole - tail) / whole

    worse, better = at_least(lost), at_least(gained)
    return PairedTest(worse, better, min(1., 2 * min(worse, better)))


def holm(p_values: Sequence[float]) -> List[float]:
    """Holm's adjusted p-values: those at most alpha are rejections with at most alpha for any false one among them."""
    adjusted, largest = [0.] * len(p_values), 0.
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1., (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def detectable_difference(images: int, changes: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true loss of accuracy that a one-sided McNemar test finds with some power, in percentage points.

    The normal approximation (z(alpha) + z(power)) sqrt(changes) / images, for as many changed answers as there were,
    and one at least.

    Args:
        images: Images.
        changes: Images that one of the two models alone classifies right.
        alpha: Level of the test.
        power: Share of the cases in which it is found.
    """
    z = statistics.NormalDist().inv_cdf
    return 100 * (z(1 - alpha) + z(power)) * math.sqrt(max(changes, 1)) / images

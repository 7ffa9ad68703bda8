"""Exact binomial tails and bounds, and the exact test that accuracy has fallen by less than so much; without scipy."""
import math
from functools import lru_cache

import numpy as np

from .intervals import LEVEL, Interval

__all__ = ['binomial_interval', 'binomial_tail', 'binomial_upper', 'drop_p_value', 'fewest_images']

SLACK = 0.005  # of the level of `drop_p_value`, spent on the bound of how many answers change


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> np.ndarray:
    return np.array([math.lgamma(k + 1) for k in range(n + 1)])


def _probabilities(n: int, p: float, low: int = 0, high: int = -1) -> np.ndarray:
    """P(X = k) of X ~ B(n, p) for k from low to high, n if negative."""
    k = np.arange(low, (n if high < 0 else high) + 1)
    if p <= 0 or p >= 1:
        return (k == (n if p >= 1 else 0)).astype(float)
    logs = _log_factorials(n)
    return np.exp(logs[n] - logs[k] - logs[n - k] + k * math.log(p) + (n - k) * math.log1p(-p))


def binomial_tail(count: int, n: int, p: float) -> float:
    """P(X >= count) for X ~ B(n, p)."""
    if count <= 0:
        return 1.
    return min(1., float(_probabilities(n, p, count).sum())) if count <= n else 0.


def binomial_upper(count: int, n: int, alpha: float) -> float:
    """The upper bound of Clopper and Pearson: it lies below the true p with a chance of at most alpha.

    Args:
        count: Successes, of which p is the chance.
        n: Trials.
        alpha: Level, of the one side.
    """
    if count >= n:
        return 1.
    low, high = count / n, 1.
    for _ in range(60):  # P(X <= count) falls as p grows
        middle = (low + high) / 2
        if _probabilities(n, middle, 0, count).sum() > alpha:
            low = middle
        else:
            high = middle
    return high


def binomial_interval(count: int, n: int, level: float = LEVEL) -> Interval:
    """The interval of Clopper and Pearson for the chance p of a success, of which there were `count` in n trials."""
    tail = (1 - level) / 2
    return Interval(1 - binomial_upper(n - count, n, tail), binomial_upper(count, n, tail))


def drop_p_value(lost: int, gained: int, images: int, drop: float) -> float:
    """How probable so few losses are, at most, where the accuracy truly falls by `drop` or more.

    An exact test of two models on the same images, which are drawn independently; p <= alpha with a chance of at most
    alpha, for any number of images, as long as the true fall is `drop` or more:

    * Of an image, the answer gets lost with a chance of l, gained with one of g. What is doubted is l - g >= drop; how
      many answers change, q = l + g, is not known. With a chance of 1 - SLACK, q is at most the bound of Clopper and
      Pearson (the p-value of Berger and Boos, 1994: the worst q up to a bound, and the chance of error of the bound).
    * lost - gained + images is then the sum of two binomials (the polynomial l x^2 + (1 - q) x + g has real roots where
      2q <= 1 + drop^2). Such a sum is unimodal, with its mode at its mean or above it, rounded down (Darroch, 1964),
      and more doubtful q make its lower tail larger below the mode. So the worst q is the bound itself.

    Args:
        lost: Images that the old model alone classifies right.
        gained: Images that the new model alone classifies right.
        images: All images.
        drop: Fall of the accuracy, from 0 to 1.
    """
    change = max(binomial_upper(lost + gained, images, SLACK), drop)
    beyond = lost - gained + 1 > math.floor((images - 1) * drop - 1e-9)  # where the tail is no small one anyway
    if beyond or 2 * change > 1 + drop ** 2:
        return 1.
    root = math.sqrt(1 + drop ** 2 - 2 * change)
    first, second = (min((1 + drop + sign * root) / 2, 1.) for sign in (1, -1))
    below = np.cumsum(_probabilities(images, second))
    places = lost - gained + images - np.arange(images + 1)
    reached = np.where(places < 0, 0., below[np.clip(places, 0, images)])
    return min(1., float((_probabilities(images, first) * reached).sum()) + SLACK)


def fewest_images(drop: float, level: float = 0.95, most: int = 2 ** 20) -> int:
    """The fewest images that could tell a fall of `drop`, if none of their answers changed; `most` if more are needed.

    Args:
        drop: Fall of the accuracy, from 0 to 1.
        level: How sure one wants to be.
        most: Where to stop looking.
    """
    if drop <= 0:
        return most  # equal answers alone never tell that not one image in a million is lost
    low, high = 0, 1
    while high < most and drop_p_value(0, 0, high, drop) > 1 - level:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if drop_p_value(0, 0, middle, drop) > 1 - level else (low, middle)
    return min(high, most)

"""Whether images, and a model's answers to them, are still those of before: two-sample tests on arrays, corrected.

Every test compares two finite samples, what was kept of the reference and what is new, and is exact or errs on the side
of silence: where nothing has moved, the chance of one alert or more over all of them is at most the stated rate.
"""
import math
import warnings
from types import ModuleType
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from pst_timm.metrics.intervals import holm
from pst_timm.utils.errors import PSTError

__all__ = [
    'DIMENSIONS', 'MOST_EMBEDDINGS', 'MOST_ROWS', 'Batch', 'Result', 'Summary', 'accuracy_test',
    'atc_threshold', 'distribution_test', 'drift_tests', 'estimated_accuracy', 'ks_resolution',
    'median_distance', 'mmd_test', 'permutation_p', 'projection_to', 'shares_test', 'summarize']

DIMENSIONS = 128  # of the embeddings that are kept: those with more are projected
MOST_EMBEDDINGS = 1000  # kept, and looked at among the new ones: the test takes the square of this
MOST_ROWS = 10_000  # confidences and looks kept
LEAST_PERMUTATIONS = 2000
CHUNK, MOST_AT_ONCE = 2 ** 22, 250  # numbers of permutations at a time, and permutations
ENOUGH = 50  # permutations with a statistic as large: the p-value is known to a seventh of it, and no alert


class Batch(NamedTuple):
    """A model's answers to N images, and how these look; None is not known."""
    confidence: np.ndarray
    """(N,): largest probability."""
    predicted: np.ndarray
    """int64 (N,): its class."""
    labels: Optional[np.ndarray] = None
    """int64 (N,): the true class, -1 where it is not known."""
    looks: Optional[np.ndarray] = None
    """(N, looks)."""
    embeddings: Optional[np.ndarray] = None
    """(N, features)."""

    @property
    def known(self) -> np.ndarray:
        """Which images (N,) have a label."""
        return np.zeros(len(self.confidence), bool) if self.labels is None else self.labels >= 0

    @property
    def right(self) -> np.ndarray:
        """Which of those with a label are classified right."""
        return (self.predicted == self.labels)[self.known] if self.labels is not None else np.zeros(0, bool)


class Summary(NamedTuple):
    """What is kept of the images that later ones are compared with."""
    images: int
    """How many there were."""
    confidence: np.ndarray
    """float32 (rows,): of some of the images, in random order."""
    looks: np.ndarray
    """float32 (rows, looks): of the same images."""
    embeddings: np.ndarray
    """float32 (rows, dimensions): of the first of them, projected."""
    projection: Optional[np.ndarray]
    """float32 (features, dimensions); None where the embeddings are kept as they are."""
    predicted: np.ndarray
    """int64 (classes,): how many of all images were taken for each class."""
    true: Optional[np.ndarray] = None
    """int64 (classes,): how many were of each class; None without labels, as the two below."""
    right: Optional[int] = None
    """How many were classified right."""
    threshold: Optional[float] = None
    """See `atc_threshold`."""


class Result(NamedTuple):
    """What came of a test."""
    name: str
    """What was compared."""
    method: str
    statistic: float
    p: float
    """Chance of such a statistic, or a larger one, if nothing has moved."""
    corrected: float
    """The same, corrected for the number of tests."""
    alert: bool


def summarize(batch: Batch, classes: int, seed: int = 0) -> Summary:
    """What to keep of the answers to N images.

    Args:
        batch: The answers, with looks and embeddings.
        classes: Number of the model's classes.
        seed: Of the choice of rows and the projection.
    """
    rng = np.random.default_rng(seed)
    images, features = batch.embeddings.shape
    rows = rng.permutation(images)[:MOST_ROWS]
    projection = projection_to(features, DIMENSIONS, rng) if features > DIMENSIONS else None
    embeddings = batch.embeddings[rows[:MOST_EMBEDDINGS]]
    labels, true, right, threshold = batch.labels, None, None, None
    if labels is not None:
        hits = batch.predicted == labels
        true, right = np.bincount(labels, minlength=classes), int(hits.sum())
        threshold = atc_threshold(batch.confidence, hits)
    return Summary(
        images,
        batch.confidence[rows].astype(np.float32),
        batch.looks[rows].astype(np.float32),
        _project(embeddings, projection),
        projection,
        np.bincount(batch.predicted, minlength=classes),
        true,
        right,
        threshold,
    )


def projection_to(features: int, dimensions: int, rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal projection, float32 (features, dimensions), which roughly keeps distances.

    It does not look at the data. Principal components do: they fit the images that they were found on better than
    new ones, which a test would take for drift, and leave out directions in which only new images differ.
    """
    basis, _ = np.linalg.qr(rng.standard_normal((features, dimensions)))
    return (basis * math.sqrt(features / dimensions)).astype(np.float32)


def _project(embeddings: np.ndarray, projection: Optional[np.ndarray]) -> np.ndarray:
    return (embeddings if projection is None else embeddings @ projection).astype(np.float32)


def drift_tests(
        reference: Summary,
        batch: Batch,
        names: Sequence[str],
        alpha: float = 0.01,
        seed: int = 0,
) -> List[Result]:
    """Compare new images with those of before, by all that is known of both.

    Args:
        reference: What was kept of those before.
        batch: The new ones.
        names: What the looks are called.
        alpha: Chance of an alert, over all tests, where nothing has moved.
        seed: Of the permutations.

    Returns:
        A result for each test, corrected by Holm's method.

    Raises:
        PSTError: If there are fewer than two images, embeddings of other features, or scipy is not installed.
    """
    if len(batch.confidence) < 2:
        raise PSTError('Two images are the least that can be compared with others; some hundreds show something.')
    tests = 2 + (batch.embeddings is not None) + (len(names) if batch.looks is not None else 0)
    labelled = len(batch.right) > 0 and reference.right is not None
    tests += labelled
    # or not even the smallest p-value would be small enough
    permutations = max(LEAST_PERMUTATIONS, math.ceil(2 * tests / alpha))
    rng = np.random.default_rng(seed)
    found = []
    if batch.embeddings is not None:
        new = batch.embeddings
        if new.shape[1] != len(reference.projection if reference.projection is not None else reference.embeddings.T):
            raise PSTError(f'The reference has embeddings of other features than the {new.shape[1]} of the model.')
        new = _project(new[rng.permutation(len(new))[:MOST_EMBEDDINGS]], reference.projection)
        found.append(('embeddings', 'MMD', *mmd_test(
            reference.embeddings, new, median_distance(reference.embeddings), permutations, rng)))
    found.append(('confidence', 'KS', *distribution_test(reference.confidence, batch.confidence)))
    found.append(('predicted classes', 'chi-squared', *shares_test(
        reference.predicted, np.bincount(batch.predicted, minlength=len(reference.predicted)), permutations, rng)))
    if labelled:
        found.append(('accuracy', 'Fisher', *accuracy_test(
            reference.right, reference.images, int(batch.right.sum()), len(batch.right))))
    if batch.looks is not None:
        found += [(name, 'KS', *distribution_test(reference.looks[:, i], batch.looks[:, i]))
                  for i, name in enumerate(names)]
    corrected = holm([p for *_, p in found])
    return [Result(*test, p, p <= alpha) for test, p in zip(found, corrected)]


def median_distance(points: np.ndarray, most: int = 1000) -> float:
    """Median distance between two points (N, dimensions), of the first `most`; 1 if it is 0."""
    squares = _squared_distances(points[:most].astype(np.float64))
    median = np.median(squares[np.triu_indices(len(squares), 1)]) if len(squares) > 1 else 0.
    return math.sqrt(median) or 1.


def _squared_distances(points: np.ndarray) -> np.ndarray:
    points = points - points.mean(axis=0)  # large means would cost digits
    norms = (points ** 2).sum(axis=1)
    return np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0)


def mmd_test(
        x: np.ndarray,
        y: np.ndarray,
        bandwidth: float,
        permutations: int,
        rng: np.random.Generator,
) -> Tuple[float, float]:
    """Maximum mean discrepancy between two samples, its unbiased estimate, with the kernel exp(-d^2 / (2 bandwidth^2)).

    Args:
        x: A sample (N, dimensions), N >= 2.
        y: Another (M, dimensions), M >= 2.
        bandwidth: Distance at which points are no longer near.
        permutations: Ways to deal the points to both samples, at random, that the estimate is compared with.
        rng: Where they come from.

    Returns:
        The squared discrepancy, and its p-value by `permutation_p`, which is exact: at most a share p of samples from
        one distribution has a p-value of at most p.
    """
    n, m = len(x), len(y)
    points = np.concatenate([x, y]).astype(np.float64)
    kernel = np.exp(_squared_distances(points) / (-2 * bandwidth ** 2)).astype(np.float32)
    np.fill_diagonal(kernel, 0)
    rows = kernel.sum(axis=1, dtype=np.float64)

    def estimates(second: np.ndarray) -> np.ndarray:
        """By which points are in the second sample, float32 (N + M, choices)."""
        within = np.einsum('ij,ij->j', second, kernel @ second, dtype=np.float64)
        across = rows @ second - within
        first = rows.sum() - 2 * across - within
        return first / (n * (n - 1)) + within / (m * (m - 1)) - 2 * across / (n * m)

    seen = np.zeros((n + m, 1), np.float32)
    seen[n:] = 1
    observed = estimates(seen)[0]

    def as_large(count: int) -> np.ndarray:
        second = np.zeros((n + m, count), np.float32)
        chosen = rng.random((count, n + m)).argpartition(m - 1, axis=1)[:, :m]
        second[chosen.T, np.arange(count)] = 1
        # what differs by rounding alone is as large
        return estimates(second) >= observed - 1e-6 * abs(observed) - 1e-9

    return float(observed), permutation_p(as_large, permutations, n + m)


def permutation_p(as_large: Callable[[int], np.ndarray], permutations: int, width: int = 1) -> float:
    """The p-value of a statistic among those of permutations, exact in its level.

    Where it is plain that nothing has moved, not all of them are made (Besag and Clifford, "Sequential Monte Carlo
    p-values", 1991).

    Args:
        as_large: Makes so many permutations; tells which have a statistic as large as the one seen.
        permutations: Most to make.
        width: Numbers of each.

    Returns:
        (1 + those as large) / (1 + permutations); or `ENOUGH` over how many it took to find so many.
    """
    found = made = 0
    while made < permutations:
        hits = found + np.cumsum(as_large(min(max(1, CHUNK // width), MOST_AT_ONCE, permutations - made)))
        if hits[-1] >= ENOUGH:
            return ENOUGH / (made + int(np.searchsorted(hits, ENOUGH)) + 1)
        found, made = int(hits[-1]), made + len(hits)
    return (1 + found) / (1 + permutations)


def shares_test(
        first: np.ndarray,
        second: np.ndarray,
        permutations: int,
        rng: np.random.Generator,
) -> Tuple[float, float]:
    """The chi-squared statistic of two samples' counts by class, with the p-value of `mmd_test`.

    It needs no least count in a class, as the chi-squared distribution does.

    Args:
        first: Counts (classes,).
        second: Counts (classes,).
        permutations: See `mmd_test`.
        rng: Where they come from.
    """
    both = first + second
    first, second = first[both > 0], second[both > 0]
    both = first + second
    n, total = int(second.sum()), int(both.sum())
    expected = both * (n / total)
    weight = 1 / expected + 1 / np.maximum(both - expected, 1e-12)
    observed = float(((second - expected) ** 2 @ weight))

    def as_large(count: int) -> np.ndarray:
        drawn = rng.multivariate_hypergeometric(both, n, count, method='marginals')
        return (drawn - expected) ** 2 @ weight >= observed * (1 - 1e-9) - 1e-9

    return observed, permutation_p(as_large, permutations, len(both))


def distribution_test(first: np.ndarray, second: np.ndarray) -> Tuple[float, float]:
    """The Kolmogorov-Smirnov test of two samples: largest distance of their distributions, and its p-value.

    Equal values, such as sizes of images, make the p-value too large, never too small.

    Raises:
        PSTError: If scipy is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # of large samples, whose exact p-value it gives up
        # rounded alike: the sample that was kept has so many digits
        result = _stats().ks_2samp(np.float32(first), np.float32(second))
    return float(result.statistic), float(result.pvalue)


def ks_resolution(first: int, second: int, alpha: float) -> float:
    """How far two distributions must lie apart, from 0 to 1, for `distribution_test` to tell samples of such sizes."""
    return min(1., math.sqrt(-math.log(alpha / 2) / 2 * (first + second) / (first * second)))


def accuracy_test(right: int, images: int, new_right: int, new_images: int) -> Tuple[float, float]:
    """Fisher's exact test of whether accuracy has fallen: by how much, from -1 to 1, and the p-value.

    Raises:
        PSTError: If scipy is not installed.
    """
    p = _stats().hypergeom.cdf(new_right, images + new_images, right + new_right, new_images)
    return right / images - new_right / new_images, float(p)


def _stats() -> ModuleType:
    try:
        import scipy.stats
    except ImportError as e:
        raise PSTError(f"Drift is tested with scipy ({e}): pip install 'pst_timm[train]' brings it.") from None
    return scipy.stats


def atc_threshold(confidence: np.ndarray, right: np.ndarray) -> float:
    """The confidence below which lie as many images as were classified wrong (average thresholded confidence).

    Garg et al., "Leveraging Unlabeled Data to Predict Out-of-Distribution Performance", 2022.

    Args:
        confidence: (N,).
        right: Which images (N,) were classified right.

    Returns:
        The threshold, 2 where all were wrong.
    """
    wrong = int(len(right) - np.sum(right))
    return float(np.sort(confidence)[wrong]) if wrong < len(right) else 2.


def estimated_accuracy(confidence: np.ndarray, threshold: float) -> float:
    """The share of images whose confidence is at least the threshold: accuracy as it would be, with no label known.

    It takes for granted that confidence means what it meant; where a model errs with confidence, it is too large.
    """
    return float(np.mean(confidence >= threshold))

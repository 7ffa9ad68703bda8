"""What a model's answers tell of labels and images: how hard, likely wrong, unlike the others, of odd size.

All of it is arithmetic on arrays. The answers must be out of sample: a model knows the labels it was trained on by
heart, wrong ones too.
"""
from typing import NamedTuple, Optional, Sequence

import numpy as np
import torch

__all__ = [
    'RANKINGS', 'Scores', 'confident_classes', 'example_weights', 'likely_wrong', 'neighbours', 'odd_sizes',
    'outlier_scores', 'rank_wrong', 'robust_z', 'score_labels', 'share_wrong', 'stratified_folds',
]

RANKINGS = ('self-confidence', 'confident-learning')
LEAST = 1e-12  # probability, so that a loss is finite
BLOCK = 2 ** 25  # similarities at a time: 128 MiB
LEAST_SPREAD = 0.15  # of the logarithm of a size: within a factor of 2 of the median nothing is odd
TEMPERATURES = np.geomspace(0.5, 2, 15)
HEAVIEST = 4.  # weight of a hard image over that of one with no loss


class Scores(NamedTuple):
    """What a model says of N labels."""
    loss: np.ndarray
    """float64 (N,): cross-entropy."""
    margin: np.ndarray
    """float64 (N,): probability of the label minus the largest of the others, from -1 to 1."""
    confidence: np.ndarray
    """float64 (N,): the largest probability."""
    self_confidence: np.ndarray
    """float64 (N,): probability of the label."""
    predicted: np.ndarray
    """int64 (N,): the most probable class."""


def score_labels(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    """Score labels.

    Args:
        probabilities: (N, classes), out of sample.
        labels: Given ones (N,).
    """
    rows = np.arange(len(labels))
    own = probabilities[rows, labels]
    others = probabilities.copy()
    others[rows, labels] = -np.inf if probabilities.shape[1] > 1 else 0.
    return Scores(
        -np.log(np.maximum(own, LEAST)), own - others.max(axis=1), probabilities.max(axis=1), own,
        probabilities.argmax(axis=1))


def confident_classes(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class that each image is confidently counted as, by confident learning (Northcutt et al., 2021).

    An image may be of those classes whose probability is at least what the images labelled with that class get of it on
    average, and of them it is of the most probable one. So a class that the model is rarely sure of needs less.

    Args:
        probabilities: (N, classes), out of sample.
        labels: Given ones (N,).

    Returns:
        int64 (N,), -1 for an image that no class has enough of.
    """
    thresholds = np.full(probabilities.shape[1], np.inf)
    for label in np.unique(labels):
        thresholds[label] = probabilities[labels == label, label].mean()
    enough = np.where(probabilities >= thresholds, probabilities, -1.)
    return np.where(enough.max(axis=1) >= 0, enough.argmax(axis=1), -1)


def likely_wrong(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which labels (N,) confident learning takes for wrong: images that are confidently of another class."""
    found = confident_classes(probabilities, labels)
    return (found >= 0) & (found != labels)


def rank_wrong(probabilities: np.ndarray, labels: np.ndarray, ranking: str = RANKINGS[0]) -> np.ndarray:
    """Images in the order in which a person should look at their labels.

    Args:
        probabilities: (N, classes), out of sample.
        labels: Given ones (N,).
        ranking: 'self-confidence', the least probable label first; or 'confident-learning', those that are confidently
            of another class first, in either part the one whose label falls furthest behind the best other class.

    Returns:
        Indices (N,).
    """
    scores = score_labels(probabilities, labels)
    if ranking == 'self-confidence':
        return np.argsort(scores.self_confidence, kind='stable')
    if ranking == 'confident-learning':
        return np.lexsort((scores.margin, ~likely_wrong(probabilities, labels)))
    raise ValueError(f'ranking must be one of {", ".join(RANKINGS)}, got {ranking!r}')


def share_wrong(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """How many labels are wrong, as a share: what explains them best, if a wrong one is any other class alike.

    Labels are taken to be drawn from the answers, whose temperature is fitted, and then, with the probability that is
    sought, replaced by another class (expectation maximisation). Unlike `likely_wrong`, it does not take the doubts of
    a weak model for faults of the labels.

    Args:
        probabilities: (N, classes), out of sample.
        labels: Given ones (N,).
    """
    rows, others = np.arange(len(labels)), max(probabilities.shape[1] - 1, 1)
    logits = np.log(np.maximum(probabilities, LEAST))
    found = []
    for temperature in TEMPERATURES:
        warm = np.exp(logits / temperature)
        own = warm[rows, labels] / warm.sum(axis=1)
        share = 0.02
        for _ in range(200):
            right, wrong = (1 - share) * own, share * (1 - own) / others
            share = float((wrong / np.maximum(right + wrong, 1e-300)).mean())
        right, wrong = (1 - share) * own, share * (1 - own) / others
        found.append((float(np.log(np.maximum(right + wrong, 1e-300)).sum()), share))
    return max(found)[1]


def example_weights(loss: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Weights of images for a training that should see hard ones more often: hard is not the same as wrong.

    A likely wrong label weighs nothing. Of the others, an image without loss weighs 1, one with the mean loss 2, and
    none more than `HEAVIEST`; then all are divided by their mean.

    Args:
        loss: (N,).
        wrong: Which labels are likely wrong (N,).

    Returns:
        float64 (N,) with mean 1, if not all are wrong.
    """
    kept = ~wrong
    if not kept.any():
        return np.zeros(len(loss))
    mean = loss[kept].mean()
    weights = np.where(kept, np.minimum(1 + loss / max(mean, LEAST), HEAVIEST), 0.)
    return weights / weights.mean()


def stratified_folds(labels: np.ndarray, folds: int, seed: int, groups: Optional[np.ndarray] = None) -> np.ndarray:
    """Deal images into folds, alike in all classes.

    Args:
        labels: (N,).
        folds: Number of folds.
        seed: Of the order in which they are dealt.
        groups: Images that must not be parted (N,), such as copies of one image; -1 for those on their own.

    Returns:
        Fold of each image (N,), from 0.
    """
    rng = np.random.default_rng(seed)
    names = -1 - np.arange(len(labels)) if groups is None else np.where(groups < 0, -1 - np.arange(len(labels)), groups)
    _, first, member = np.unique(names, return_index=True, return_inverse=True)
    dealt, start = np.zeros(len(first), np.int64), 0
    for label in np.unique(labels[first]):
        here = rng.permutation(np.flatnonzero(labels[first] == label))
        dealt[here] = (start + np.arange(len(here))) % folds
        start += len(here)  # the next class goes on where this one ended, so that the folds are of one size
    return dealt[member]


def neighbours(queries: np.ndarray, keys: Optional[np.ndarray] = None, k: int = 5):
    """Nearest vectors by the cosine of the angle between them, a block of queries at a time.

    Args:
        queries: (M, D).
        keys: (N, D); None for the queries themselves, none of which is a neighbour of its own.
        k: How many, at most as many as there are.

    Returns:
        Indices (M, k) of keys and similarities (M, k), the nearest first.
    """
    own = keys is None
    rows = _unit(queries)
    columns = rows if own else _unit(keys)
    k = max(0, min(k, len(columns) - own))
    size = max(1, BLOCK // max(1, len(columns)))
    found, near = [torch.zeros(0, k, dtype=torch.int64)], [torch.zeros(0, k)]
    for start in range(0, len(rows), size):
        similar = rows[start:start + size] @ columns.T
        if own:
            here = torch.arange(len(similar))
            similar[here, here + start] = -torch.inf
        values, indices = similar.topk(k, dim=1)
        found.append(indices)
        near.append(values)
    return torch.cat(found).numpy(), torch.cat(near).numpy()


def _unit(vectors: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(np.ascontiguousarray(vectors), dtype=torch.float32), dim=1)


def outlier_scores(embeddings: np.ndarray, k: int = 5) -> np.ndarray:
    """How far each image is from the others, whatever their labels: one minus the similarity of the k-th neighbour.

    Over all classes, since an image with a wrong label has its neighbours in another one.

    Args:
        embeddings: (N, D); angles are taken around their mean.
        k: The neighbour.

    Returns:
        float64 (N,), from 0 to 2; 0 for a single image.
    """
    _, near = neighbours(embeddings - embeddings.mean(axis=0), k=k)
    return 1. - near[:, -1].astype(np.float64) if near.shape[1] else np.zeros(len(embeddings))


def robust_z(values: np.ndarray, least: float = 0.) -> np.ndarray:
    """How many standard deviations values (N,) are from their median, where most of them decide what that is.

    Args:
        values: (N,).
        least: Standard deviation that is taken if that of most values is smaller.
    """
    away = values - np.median(values)
    spread = max(1.4826 * float(np.median(np.abs(away))), least)
    return away / spread if spread else np.zeros(len(values))


def odd_sizes(widths: Sequence[float], heights: Sequence[float], limit: float = 5.) -> np.ndarray:
    """Which images (N,) are much wider, higher, or of another shape than most: robust z-scores of the logarithms.

    Args:
        widths: (N,) in pixels.
        heights: (N,), likewise.
        limit: Standard deviations from the median.
    """
    width, height = np.log(np.asarray(widths, float)), np.log(np.asarray(heights, float))
    return np.any([np.abs(robust_z(v, LEAST_SPREAD)) > limit for v in (width, height, width - height)], axis=0)

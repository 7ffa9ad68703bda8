"""What answers tell of labels and images, against slow loops over the definitions."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pst_timm.data import scores
from pst_timm.data.scores import (
    RANKINGS,
    confident_classes,
    example_weights,
    likely_wrong,
    neighbours,
    odd_sizes,
    outlier_scores,
    rank_wrong,
    robust_z,
    score_labels,
    share_wrong,
    stratified_folds,
)


def random_answers(seed, count=60, classes=4, certainty=2.):
    """Probabilities of a fair model, and labels of which some are wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), truth] += certainty
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.where(rng.random(count) < 0.1, rng.integers(0, classes, count), truth)
    return probabilities, labels


def slowly_confident(probabilities, labels):
    """Northcutt et al. (2021), section 3.1, equation by equation."""
    classes = probabilities.shape[1]
    thresholds = {}
    for j in range(classes):
        mine = [p[j] for p, y in zip(probabilities, labels) if y == j]
        if mine:
            thresholds[j] = math.fsum(mine) / len(mine)
    found = []
    for p in probabilities:
        enough = [j for j in thresholds if p[j] >= thresholds[j]]
        found.append(max(enough, key=lambda j: (p[j], -j)) if enough else -1)
    return found


@pytest.mark.parametrize('seed', range(20))
def test_confident_learning_is_that_of_its_definition(seed):
    probabilities, labels = random_answers(seed, certainty=seed / 5)
    found = slowly_confident(probabilities, labels)
    assert confident_classes(probabilities, labels).tolist() == found
    wrong = [j >= 0 and j != y for j, y in zip(found, labels)]
    assert likely_wrong(probabilities, labels).tolist() == wrong
    margins = [p[y] - max(p[j] for j in range(4) if j != y) for p, y in zip(probabilities, labels)]
    expected = sorted(range(60), key=lambda i: (not wrong[i], margins[i]))
    assert rank_wrong(probabilities, labels, 'confident-learning').tolist() == expected
    expected = sorted(range(60), key=lambda i: probabilities[i][labels[i]])
    assert rank_wrong(probabilities, labels, 'self-confidence').tolist() == expected


def test_a_class_that_nobody_is_labelled_with_is_never_counted():
    probabilities = np.array([[0.1, 0.1, 0.8], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    assert confident_classes(probabilities, np.array([0, 1, 0])).tolist() == [-1, 1, 0]


def test_scores_of_labels():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0., 1., 0.]])
    found = score_labels(probabilities, np.array([0, 2, 0]))
    assert found.loss == pytest.approx([-math.log(0.7), -math.log(0.1), -math.log(1e-12)])
    assert found.margin == pytest.approx([0.5, -0.6, -1])
    assert found.confidence == pytest.approx([0.7, 0.7, 1])
    assert found.self_confidence == pytest.approx([0.7, 0.1, 0])
    assert found.predicted.tolist() == [0, 0, 1]


def test_a_ranking_that_is_none_is_named():
    with pytest.raises(ValueError, match="one of self-confidence, confident-learning, got 'best'"):
        rank_wrong(*random_answers(0), ranking='best')


@pytest.mark.parametrize('ranking', RANKINGS)
def test_flips_are_found_where_the_model_is_good(ranking):
    rng = np.random.default_rng(0)
    probabilities, _ = random_answers(0, 2000, 10, certainty=6.)
    truth = probabilities.argmax(axis=1)
    flipped = rng.random(2000) < 0.05
    labels = np.where(flipped, (truth + rng.integers(1, 10, 2000)) % 10, truth)
    first = rank_wrong(probabilities, labels, ranking)[:flipped.sum()]
    assert flipped[first].mean() > 0.95
    assert not flipped[rank_wrong(probabilities, truth, ranking)[:100]].mean() > 0.2  # it is the flip that is found


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10 ** 6), st.integers(2, 6))
def test_the_names_of_the_classes_do_not_matter(seed, classes):
    probabilities, labels = random_answers(seed, 40, classes)
    order = np.random.default_rng(seed).permutation(classes)
    renamed = np.argsort(order)[labels]
    for ranking in RANKINGS:
        np.testing.assert_array_equal(
            rank_wrong(probabilities, labels, ranking), rank_wrong(probabilities[:, order], renamed, ranking))
    np.testing.assert_array_equal(
        likely_wrong(probabilities, labels), likely_wrong(probabilities[:, order], renamed))


@pytest.mark.parametrize('certainty', [1., 2., 4.])
@pytest.mark.parametrize('share', [0., 0.05, 0.2])
@pytest.mark.parametrize('temperature', [1., 0.7])
def test_the_share_of_wrong_labels_is_estimated_whatever_the_model_is_worth(certainty, share, temperature):
    """Of a model that says what it knows, and of one that is surer than it should be."""
    rng = np.random.default_rng(0)
    logits = certainty * rng.normal(size=(8000, 10))
    honest = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = (honest.cumsum(axis=1) > rng.random((8000, 1))).argmax(axis=1)
    labels = np.where(rng.random(8000) < share, (truth + rng.integers(1, 10, 8000)) % 10, truth)
    told = np.exp(logits / temperature)
    found = share_wrong(told / told.sum(axis=1, keepdims=True), labels)
    assert found == pytest.approx(share, abs=0.025 if certainty > 1 else 0.06)
    # where confident learning takes doubt for fault
    if certainty == 1 and share < 0.2:
        assert likely_wrong(honest, labels).mean() > 0.25


def test_the_share_is_a_share_even_of_little():
    for probabilities, labels in (([[1., 0.]], [0]), ([[1., 0.]], [1]), ([[0.5, 0.5]] * 3, [0, 1, 1]), ([[1.]], [0])):
        assert 0 <= share_wrong(np.array(probabilities), np.array(labels)) <= 1


# weights

@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 30), st.booleans()), min_size=1, max_size=50))
def test_weights_tell_hard_from_wrong(pairs):
    loss, wrong = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    weights = example_weights(loss, wrong)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert (weights[wrong] == 0).all()
    if wrong.all():
        return
    assert weights.mean() == pytest.approx(1) and (weights[~wrong] > 0).all()
    order = np.argsort(loss[~wrong])
    assert (np.diff(weights[~wrong][order]) >= 0).all()  # harder is not lighter
    assert weights[~wrong].max() <= 4.001 * weights[~wrong].min()


def test_weights_by_hand():
    assert example_weights(np.array([0., 1., 2., 9.]), np.array([False, False, False, True])) == pytest.approx(
        np.array([1, 2, 3, 0]) / 1.5)


# folds

@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(2, 6), st.integers(0, 1000))
def test_folds_are_alike_in_size_and_classes(labels, folds, seed):
    labels = np.array(labels)
    found = stratified_folds(labels, folds, seed)
    np.testing.assert_array_equal(found, stratified_folds(labels, folds, seed))
    assert found.min() >= 0 and found.max() < folds
    for chosen in [np.full(len(labels), True), *(labels == label for label in np.unique(labels))]:
        counts = np.bincount(found[chosen], minlength=folds)
        assert counts.max() - counts.min() <= 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 9)), min_size=1, max_size=60), st.integers(2, 5))
def test_copies_stay_in_one_fold(pairs, folds):
    labels, groups = np.array(pairs).T
    found = stratified_folds(labels, folds, 0, groups)
    for group in set(groups[groups >= 0]):
        assert len(set(found[groups == group])) == 1


def test_the_seed_deals_otherwise():
    labels = np.arange(100) % 3
    assert (stratified_folds(labels, 4, 0) != stratified_folds(labels, 4, 1)).any()


# neighbours

@pytest.mark.parametrize('own', [True, False])
@pytest.mark.parametrize('block', [1, 7, 10 ** 9])
def test_neighbours_are_those_of_a_loop(own, block, monkeypatch):
    monkeypatch.setattr(scores, 'BLOCK', block)
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(23, 5)), rng.normal(size=(17, 5))
    indices, near = neighbours(queries, None if own else keys, k=4)
    others = queries if own else keys
    for i, q in enumerate(queries):
        similar = {
            j: float(q @ v / np.sqrt(q @ q) / np.sqrt(v @ v)) for j, v in enumerate(others) if not own or i != j}
        expected = sorted(similar, key=similar.get, reverse=True)[:4]
        assert indices[i].tolist() == expected
        assert near[i] == pytest.approx([similar[j] for j in expected], abs=1e-5)


@pytest.mark.parametrize('count', [0, 1, 2])
def test_a_few_images_have_few_neighbours(count):
    indices, near = neighbours(np.eye(3)[:count], k=5)
    assert indices.shape == near.shape == (count, max(0, count - 1))
    assert outlier_scores(np.eye(3)[:count] if count else np.zeros((1, 3))).shape == (max(count, 1),)


def test_the_odd_one_out_is_the_farthest():
    rng = np.random.default_rng(0)
    embeddings = np.concatenate([rng.normal(size=(30, 8)) * 0.1 + 5 * np.eye(8)[c] for c in range(3)])
    embeddings = np.concatenate([embeddings, 5 * np.eye(8)[6:7]])
    found = outlier_scores(embeddings)
    assert found.argmax() == 90 and robust_z(found, 1e-6)[90] > 5


# sizes

def test_robust_z_by_hand():
    values = np.array([1., 2., 3., 4., 100.])
    assert robust_z(values) == pytest.approx((values - 3) / 1.4826)
    assert robust_z(np.ones(4)).tolist() == [0] * 4
    assert robust_z(np.array([1., 1., 1., 2.]), least=0.5).tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize('size, odd', [
    ((500, 375), False), ((375, 500), False), ((640, 480), False), ((3000, 2200), True), ((64, 48), True),
    ((500, 40), True), ((2000, 100), True)])
def test_odd_sizes(size, odd):
    widths, heights = [500] * 20 + [480] * 20 + [size[0]], [375] * 20 + [360] * 20 + [size[1]]
    found = odd_sizes(widths, heights)
    assert found[-1] == odd and not found[:-1].any()


def test_images_of_one_size_are_not_odd_for_a_pixel():
    assert not odd_sizes([64] * 50 + [65], [64] * 50 + [60]).any()

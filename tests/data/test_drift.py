"""Two-sample tests against their definitions, what they say where nothing moved, and what where something did."""
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pst_timm.data import drift
from pst_timm.data.drift import Batch, Summary
from pst_timm.metrics.intervals import holm
from pst_timm.utils.errors import PSTError

NAMES = ('brightness', 'width')


def samples(seed, count, features=4, move=0.):
    return np.random.default_rng([seed, 7]).normal(move, 1, (count, features))


def batch(seed, count, features=4, move=0., look=0., confidence=0., labelled=False, classes=5):
    """Answers that are alike but for what is moved; all widths are equal."""
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, classes, count)
    labels = np.where(rng.random(count) < 0.7, predicted, (predicted + 1) % classes) if labelled else None
    looks = np.stack([rng.normal(look, 1, count), np.full(count, 64.)], axis=1)
    confidences = np.clip(rng.beta(5, 2, count) - confidence, 0, 1)
    return Batch(confidences, predicted, labels, looks, rng.normal(move, 1, (count, features)))


# -------------------------------------------------------------------------------- by definition

def mmd_by_definition(x, y, bandwidth):
    """Means of the kernel over pairs of different points, one pair at a time."""
    def kernel(a, b):
        return math.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(a, b)) / (2 * bandwidth ** 2))

    within = [sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
              for z in (x, y)]
    return sum(within) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(2, 9), st.integers(2, 9), st.floats(0.3, 3.), st.floats(0, 2.), st.integers(0, 99))
def test_mmd_is_that_of_the_definition(n, m, bandwidth, move, seed):
    x, y = samples(seed, n), samples(seed + 1, m, move=move) + 100.
    x = x + 100.  # far from the origin, where differences of squares lose their digits
    got, p = drift.mmd_test(x, y, bandwidth, 20, np.random.default_rng(0))
    assert got == pytest.approx(mmd_by_definition(x, y, bandwidth), abs=1e-6)
    assert 1 / 21 <= p <= 1


def test_mmd_tries_permutations_of_the_points(monkeypatch):
    """With few points, every way to deal them can be tried: the share of those as large is the p-value."""
    from itertools import combinations

    monkeypatch.setattr(drift, 'ENOUGH', 20_001)
    x, y = samples(0, 4, 2), samples(1, 3, 2, move=1.)
    points = np.concatenate([x, y])
    observed = mmd_by_definition(x, y, 1.)
    dealt = [set(second) for second in combinations(range(7), 3)]
    share = np.mean([
        mmd_by_definition([points[i] for i in range(7) if i not in second], [points[i] for i in second], 1.)
        >= observed - 1e-9 for second in dealt])
    _, p = drift.mmd_test(x, y, 1., 20_000, np.random.default_rng(0))
    assert 0.02 < share < 0.98 and p == pytest.approx(share, abs=0.015)  # four standard deviations


@pytest.mark.parametrize('chunk', [2 ** 22, 30, 1])
def test_permutations_in_parts_are_as_many(chunk, monkeypatch):
    monkeypatch.setattr(drift, 'CHUNK', chunk)
    made = []

    def as_large(count, every=7):
        made.extend(range(len(made), len(made) + count))
        return np.array(made[-count:]) % every == every - 1

    assert drift.permutation_p(as_large, 340, 10) == 49 / 341 and len(made) == 340
    made.clear()
    # 50 are found: the last of them is the 350th
    assert drift.permutation_p(as_large, 9999, 10) == 50 / 350 and len(made) < 350 + 251
    same = np.ones((5, 2))
    assert drift.mmd_test(same, same, 1., 7, np.random.default_rng(0)) == (0., 1.)


def test_p_values_of_few_permutations_are_uniform_to_the_hundredth():
    """By the exact distribution: of how many permutations are as large, if the statistic has any rank among them."""
    rng = np.random.default_rng(0)
    p = []
    for rank in rng.random(4000):
        p.append(drift.permutation_p(lambda count, rank=rank: rng.random(count) <= rank, 300))
    for rate in (0.01, 0.05, 0.2, 0.5):
        assert most_hits(4000, rate) >= np.sum(np.array(p) <= rate) >= most_hits(4000, 0.7 * rate) - 60


def test_median_distance_is_the_median_of_the_pairs():
    points = samples(3, 30) + 50
    pairs = [math.dist(a, b) for i, a in enumerate(points) for b in points[:i]]
    assert drift.median_distance(points) == pytest.approx(np.sqrt(np.median(np.square(pairs))))
    assert drift.median_distance(np.ones((4, 3))) == drift.median_distance(np.ones((1, 3))) == 1.


def test_a_projection_keeps_distances_roughly():
    x = samples(0, 40, features=400)
    projection = drift.projection_to(400, 128, np.random.default_rng(0))
    assert projection.shape == (400, 128)
    ratios = [math.dist(a @ projection, b @ projection) / math.dist(a, b) for i, a in enumerate(x) for b in x[:i]]
    assert 0.95 < np.mean(ratios) < 1.05 and 0.7 < min(ratios) and max(ratios) < 1.3


@pytest.mark.parametrize('first, second', [(1000, 500), (200, 30), (30, 12_000)])
def test_distributions_are_compared_as_scipy_does(first, second):
    x, y = (np.random.default_rng(i).normal(0.1 * i, 1, n).astype(np.float32) for i, n in enumerate((first, second)))
    found = drift.distribution_test(x, y)
    exact = stats.ks_2samp(x, y, method='exact' if max(first, second) <= 1000 else 'asymp')
    assert found == pytest.approx((exact.statistic, exact.pvalue))


def test_a_sample_that_was_rounded_when_it_was_kept_is_the_same():
    x = np.random.default_rng(0).random(300) + 1 / 3
    assert drift.distribution_test(x.astype(np.float32), x) == (0., 1.)


def test_shares_against_scipys_permutations(monkeypatch):
    monkeypatch.setattr(drift, 'ENOUGH', 20_001)
    first, second = np.array([30, 20, 3, 0, 7]), np.array([12, 14, 3, 0, 1])
    statistic, p = drift.shares_test(first, second, 20_000, np.random.default_rng(0))
    kept = np.stack([first, second])[:, first + second > 0]
    expected = stats.chi2_contingency(kept, correction=False)
    assert statistic == pytest.approx(expected.statistic)
    # the same by dealing out labels one by one
    classes = np.repeat(np.arange(4), kept.sum(axis=0))
    rng = np.random.default_rng(1)
    dealt = [np.bincount(rng.permutation(classes)[:30], minlength=4) for _ in range(1500)]
    tables = [stats.chi2_contingency(np.stack([kept.sum(axis=0) - d, d]), correction=False).statistic for d in dealt]
    assert p == pytest.approx(np.mean(np.array(tables) >= statistic - 1e-9), abs=0.05)


@pytest.mark.parametrize('right, images, new_right, new_images', [(90, 100, 30, 40), (5, 10, 9, 10), (10, 10, 3, 3)])
def test_accuracy_is_compared_by_fishers_exact_test(right, images, new_right, new_images):
    table = [[new_right, new_images - new_right], [right, images - right]]
    fall, p = drift.accuracy_test(right, images, new_right, new_images)
    assert p == pytest.approx(stats.fisher_exact(table, alternative='less').pvalue)
    assert fall == pytest.approx(right / images - new_right / new_images)


def test_estimated_accuracy_by_hand():
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    right = np.array([True, True, False, True, False])
    assert drift.atc_threshold(confidence, right) == 0.7  # two were wrong: two lie below
    assert drift.estimated_accuracy(confidence, 0.7) == 0.6
    assert drift.estimated_accuracy(np.array([0.95, 0.7, 0.69, 0.1]), 0.7) == 0.5
    assert drift.atc_threshold(confidence, right | True) == 0.5
    assert drift.estimated_accuracy(confidence, drift.atc_threshold(confidence, right & False)) == 0


def test_what_can_be_told_is_where_the_test_turns():
    """A step of so much is just seen at that level by samples of such sizes."""
    n, m, alpha = 1000, 500, 0.00125
    step = drift.ks_resolution(n, m, alpha)
    for shift, seen in ((step + 0.006, True), (step - 0.006, False)):
        x = np.arange(n) / n
        y = np.arange(m) / m * (1 - shift)  # lies by at most `shift` higher
        assert (drift.distribution_test(x, y)[1] <= alpha) == seen
    assert drift.ks_resolution(2, 2, 0.001) == 1


# -------------------------------------------------------------------------------- nothing moved

def most_hits(draws, rate):
    """More than so many of the draws are below the rate with a chance of one in 100,000, if the rate is kept."""
    return int(stats.binom.ppf(1 - 1e-5, draws, rate))


@pytest.mark.parametrize('test', ['mmd', 'shares', 'sparse shares', 'ks', 'few ks', 'equal ks'])
@pytest.mark.parametrize('rate', [0.02, 0.1, 0.3])
def test_p_values_are_no_smaller_than_they_should_be(test, rate):
    draws, hits = 300, 0
    for seed in range(draws):
        rng = np.random.default_rng([seed, len(test)])
        if test == 'mmd':
            x, y = rng.normal(size=(25, 3)), rng.normal(size=(15, 3))
            p = drift.mmd_test(x, y, drift.median_distance(x), 99, rng)[1]
        elif 'shares' in test:
            share = np.ones(5) / 5 if test == 'shares' else np.array([0.9, *[0.1 / 60] * 60])
            p = drift.shares_test(rng.multinomial(200, share), rng.multinomial(60, share), 99, rng)[1]
        else:
            x, y = rng.random(400), rng.random(12 if test == 'few ks' else 100)
            if test == 'equal ks':  # three sizes of images
                x, y = x.round(1) // 0.4, y.round(1) // 0.4
            p = drift.distribution_test(x, y)[1]
        hits += p <= rate
    assert hits <= most_hits(draws, rate)


def test_the_simulation_would_notice_a_p_value_that_is_too_small():
    """One-sample KS against a small reference as if it were exact: what is not done here, and why."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        x, y = rng.random(100), rng.random(100)
        hits += stats.kstest(y, lambda v, x=x: np.searchsorted(np.sort(x), v, 'right') / len(x)).pvalue <= 0.1
    assert hits > most_hits(300, 0.1)


def test_alerts_where_nothing_moved_are_as_rare_as_stated(monkeypatch):
    monkeypatch.setattr(drift, 'LEAST_PERMUTATIONS', 100)
    draws, alpha = 120, 0.05
    alerts = 0
    for seed in range(draws):
        reference = drift.summarize(batch(2 * seed, 120, labelled=True), 5)
        found = drift.drift_tests(reference, batch(2 * seed + 1, 60, labelled=True), NAMES, alpha, seed)
        alerts += any(result.alert for result in found)
    assert alerts <= most_hits(draws, alpha)


def test_what_never_changes_never_alerts():
    same = Batch(np.full(80, 0.5), np.zeros(80, int), None, np.full((80, 2), 64.), np.ones((80, 3)))
    found = drift.drift_tests(drift.summarize(same, 1), same._replace(confidence=np.full(80, 0.5)), NAMES)
    assert [result.p for result in found] == [1.] * 5 and not any(result.alert for result in found)


# -------------------------------------------------------------------------------- something moved

@pytest.mark.parametrize('move, moved', [
    ({'move': 0.4}, ['embeddings']), ({'look': 0.6}, ['brightness']), ({'confidence': 0.2}, ['confidence'])])
def test_what_moved_is_named_and_nothing_else(move, moved):
    reference = drift.summarize(batch(0, 500), 5)
    found = drift.drift_tests(reference, batch(1, 200, **move), NAMES)
    assert [result.name for result in found] == ['embeddings', 'confidence', 'predicted classes', *NAMES]
    assert [result.name for result in found if result.alert] == moved
    assert [result.corrected for result in found] == holm([result.p for result in found])


def test_other_classes_and_a_fall_of_accuracy_are_seen():
    reference = drift.summarize(batch(0, 500, labelled=True), 5)
    new = batch(1, 200, labelled=True)
    found = {result.name: result for result in drift.drift_tests(reference, new, NAMES)}
    assert not found['accuracy'].alert
    worse = new._replace(labels=np.where(np.arange(200) < 120, (new.predicted + 1) % 5, new.predicted))
    found = {result.name: result for result in drift.drift_tests(reference, worse, NAMES)}
    assert found['accuracy'].alert and not found['predicted classes'].alert
    one = new._replace(predicted=np.where(np.arange(200) < 80, 2, new.predicted), labels=None)
    found = {result.name: result for result in drift.drift_tests(reference, one, NAMES)}
    assert found['predicted classes'].alert and 'accuracy' not in found


def test_an_alert_is_possible_at_the_smallest_rate():
    """As many permutations as the correction needs."""
    reference = drift.summarize(batch(0, 60, move=0.), 5)
    found = drift.drift_tests(reference, batch(1, 60, move=3.), NAMES, alpha=0.0005)
    assert [result.name for result in found if result.alert] == ['embeddings']


# -------------------------------------------------------------------------------- what is kept

def test_what_is_kept_is_bounded_and_drawn_alike(monkeypatch):
    monkeypatch.setattr(drift, 'MOST_ROWS', 50)
    monkeypatch.setattr(drift, 'MOST_EMBEDDINGS', 20)
    got = batch(0, 300, features=200, labelled=True)
    kept = drift.summarize(got, 7)
    assert isinstance(kept, Summary) and kept.images == 300
    assert kept.confidence.shape == (50,) and kept.looks.shape == (50, 2)
    assert kept.embeddings.shape == (20, 128) and kept.projection.shape == (200, 128)
    assert kept.predicted.tolist() == [int((got.predicted == i).sum()) for i in range(7)] and kept.true.sum() == 300
    assert kept.right == int((got.predicted == got.labels).sum())
    rows = [int(np.flatnonzero(got.confidence.astype(np.float32) == c)[0]) for c in kept.confidence]
    assert len(set(rows)) == 50 and rows != sorted(rows)
    np.testing.assert_allclose(kept.looks[:, 0], got.looks[rows, 0], rtol=1e-6)
    np.testing.assert_allclose(kept.embeddings, got.embeddings[rows[:20]] @ kept.projection, rtol=1e-4, atol=1e-4)
    again = drift.summarize(got, 7)
    assert all(np.array_equal(a, b) for a, b in zip(kept, again))


def test_what_cannot_be_compared_is_refused(monkeypatch):
    reference = drift.summarize(batch(0, 60), 5)
    with pytest.raises(PSTError, match='Two images are the least'):
        drift.drift_tests(reference, batch(1, 1), NAMES)
    with pytest.raises(PSTError, match='other features than the 3'):
        drift.drift_tests(reference, batch(1, 60, features=3), NAMES)
    for name in ('scipy', 'scipy.stats'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PSTError, match=r"pip install 'pst_timm\[train\]'"):
        drift.drift_tests(reference, batch(1, 60), NAMES)

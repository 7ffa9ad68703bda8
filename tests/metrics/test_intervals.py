"""Statistics against hand-worked cases, published tables and computations of another kind."""
import math
import statistics
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pst_timm.metrics.intervals import (
    Difference,
    Interval,
    image_interval,
    mean_and_sd,
    paired_difference,
    seed_interval,
    student_quantile,
)
from pst_timm.utils.errors import PSTError

# two-sided quantiles of Student's t as printed tables have them
TABLE = {
    0.95: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980},
    0.99: {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 9: 3.250, 10: 3.169, 30: 2.750, 120: 2.617},
}


@pytest.mark.parametrize('level', TABLE)
def test_student_quantiles_are_those_of_the_tables(level):
    assert {df: round(student_quantile(level, df), 3) for df in TABLE[level]} == TABLE[level]


def test_without_scipy_it_says_what_to_install(monkeypatch):
    for name in ('scipy', 'scipy.stats'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PSTError, match=r"need scipy .*: pip install 'pst_timm\[train\]'"):
        seed_interval([1., 2., 3.])
    assert seed_interval([1.]) is None and mean_and_sd([1., 3.])[1] == pytest.approx(math.sqrt(2))


def test_mean_and_deviation():
    assert mean_and_sd([1., 2., 6.]) == (3., pytest.approx(math.sqrt(7)))
    assert mean_and_sd([4.]) == (4., None)


def test_interval_over_seeds_by_hand():
    # mean 2, deviation 1, t(2) = 4.3027
    half = 4.30265 / math.sqrt(3)
    assert seed_interval([1., 2., 3.]) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    # mean 1, deviation sqrt(2), t(1) = 12.7062: half of it is 12.7062 sqrt(2) / sqrt(2)
    assert seed_interval([0., 2.]) == pytest.approx((1 - 12.7062, 1 + 12.7062), abs=1e-4)
    assert seed_interval([1.]) is None


def test_interval_over_images_by_hand():
    # differences 0, 1, 1, 0: mean 1/2, deviation sqrt(1/3), over sqrt(4) images
    right, other = np.array([1, 1, 1, 0], bool), np.array([1, 0, 0, 0], bool)
    half = 100 * 1.959964 * math.sqrt(1 / 3) / 2
    assert image_interval([right], [other]) == pytest.approx((50 - half, 50 + half), abs=1e-3)
    # first seed 1, 0; second seed 0, -1: means 1/2 and -1/2, deviation sqrt(1/2)
    first, second = np.array([[1, 0], [0, 0]], bool), np.array([[1, 0], [1, 1]], bool)
    half = 100 * 1.959964 * math.sqrt(1 / 2) / math.sqrt(2)
    assert image_interval([first[0], second[0]], [first[1], second[1]]) == pytest.approx((-half, half), abs=1e-3)
    assert image_interval([right[:1]], [other[:1]]) is None


@settings(deadline=None, derandomize=True)
@given(arrays(bool, st.tuples(st.just(2), st.integers(1, 4), st.integers(2, 30))))
def test_interval_over_images_is_that_of_the_definition(answers):
    differences = [
        sum(100 * (int(a) - int(b)) for a, b in zip(x, y)) / answers.shape[1]
        for x, y in zip(answers[0].T.tolist(), answers[1].T.tolist())]
    half = 1.959963984540054 * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    low, high = image_interval(list(answers[0]), list(answers[1]))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-9)
    assert image_interval(list(answers[1]), list(answers[0])) == pytest.approx((-high, -low), abs=1e-9)


def test_pairing_takes_seeds_that_both_have():
    right = {0: np.array([1, 1, 0, 1], bool), 1: np.array([1, 0, 0, 1], bool), 2: np.array([0, 0, 0, 0], bool)}
    other = {1: np.array([1, 0, 1, 1], bool), 0: np.array([0, 1, 0, 0], bool), 7: np.array([1, 1, 1, 1], bool)}
    found = paired_difference({0: 75., 1: 50., 2: 0.}, {1: 75., 0: 25., 7: 100.}, right, other)
    assert (found.mean, found.pairs) == (12.5, 2)
    assert found.seeds == seed_interval([50., -25.])
    assert found.images == image_interval([right[0], right[1]], [other[0], other[1]])
    assert sum(found.images) / 2 == pytest.approx(found.mean)


def test_pairing_of_few_seeds():
    assert paired_difference({0: 1.}, {1: 2.}) is None
    one = paired_difference({0: 1., 3: 9.}, {0: 4.})
    assert (one.mean, one.pairs, one.seeds, one.images) == (-3., 1, None, None)


@pytest.mark.parametrize('seeds, images, clear', [
    ((1, 2), (0.5, 3), True),
    ((-3, -1), (-2, -0.1), True),
    ((-1, 2), (0.5, 3), False),
    ((1, 2), (-0.5, 3), False),
    ((0, 2), (0.5, 3), False),
    (None, (0.5, 3), False),
    ((1, 2), None, False),
])
def test_clear_differences_have_both_intervals_away_from_zero(seeds, images, clear):
    found = Difference(1., 2, *(ends and Interval(*ends) for ends in (seeds, images)))
    assert found.is_clear is clear

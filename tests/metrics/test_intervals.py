"""Statistics against hand-worked cases, published tables and computations of another kind."""
import itertools
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
    detectable_difference,
    holm,
    image_interval,
    mcnemar,
    mean_and_sd,
    paired_difference,
    paired_interval,
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


@pytest.mark.parametrize('lost, gained', [(a, b) for a in range(7) for b in range(7 - a)])
def test_mcnemar_is_the_count_of_all_ways_that_changes_can_fall(lost, gained):
    ways = [sum(way) for way in itertools.product((0, 1), repeat=lost + gained)]
    found = mcnemar(lost, gained)
    assert found.worse == pytest.approx(sum(losses >= lost for losses in ways) / len(ways), abs=1e-15)
    assert found.better == pytest.approx(sum(losses <= lost for losses in ways) / len(ways), abs=1e-15)
    uneven = abs(lost - gained)
    assert found.different == pytest.approx(
        sum(abs(2 * losses - len(bin(len(ways))[3:])) >= uneven for losses in ways) / len(ways), abs=1e-15)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_a_binomial_test(lost, gained):
    from scipy.stats import binomtest

    found = mcnemar(lost, gained)
    assert mcnemar(gained, lost) == (found.better, found.worse, found.different)
    if lost + gained:
        for alternative, p in (('greater', found.worse), ('less', found.better), ('two-sided', found.different)):
            expected = binomtest(lost, lost + gained, 0.5, alternative).pvalue
            assert p == pytest.approx(expected, rel=1e-8, abs=1e-300), alternative
    assert found.worse + found.better >= 1 and 0 <= min(found) <= max(found) <= 1
    fewer = mcnemar(lost + 1, gained).worse
    assert fewer <= found.worse and (fewer < found.worse or not 1e-300 < found.worse < 0.99)


def test_mcnemar_of_very_many_changes():
    assert mcnemar(0, 0) == (1, 1, 1)
    assert mcnemar(50_000, 50_000).different == 1
    assert mcnemar(3000, 0).worse == 0 and mcnemar(3000, 0).better == 1  # 2 ** -3000


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1] and holm([]) == [] and holm([0.2]) == [0.2]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.5))
def test_holm_rejects_as_the_steps_of_the_procedure_do(p_values, alpha):
    rejected = set()
    for rank, (p, i) in enumerate(sorted((p, i) for i, p in enumerate(p_values))):
        if (len(p_values) - rank) * p > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


@pytest.mark.parametrize('images, rate', [(500, 0.1), (4000, 0.03)])
def test_what_can_be_detected_is_detected(images, rate):
    """Of many draws with such a loss, four of five are found, as well as the approximation has it."""
    drop = detectable_difference(images, round(rate * images)) / 100
    generator = np.random.default_rng(0)
    draws = generator.multinomial(images, [(rate + drop) / 2, (rate - drop) / 2, 1 - rate], 2000)
    found = np.mean([mcnemar(lost, gained).worse <= 0.05 for lost, gained, _ in draws.tolist()])
    assert 0.72 < found < 0.88
    assert detectable_difference(100, 0) == detectable_difference(100, 1) > 0


def test_interval_of_few_changes():
    # Bonett and Price: (1 more of each kind) / (2 more images), by hand
    low, high = paired_interval(3, 1, 38)
    down, up = 4 / 40, 2 / 40
    half = 1.959964 * math.sqrt((down + up - (up - down) ** 2) / 40)
    assert (low, high) == pytest.approx((100 * (up - down - half), 100 * (up - down + half)), abs=1e-4)
    # no change among 40 images does not mean that there is none among others: the rule of three says 7.5 points
    low, high = paired_interval(0, 0, 40)
    assert low == -high and 5 < high < 8


@pytest.mark.parametrize('images, down, up', [(40, 0.05, 0.), (40, 0.1, 0.1), (200, 0.02, 0.), (500, 0.05, 0.08)])
def test_interval_of_changes_holds_its_level(images, down, up):
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(images, [down, up, 1 - down - up], size=2000)
    inside = [low <= 100 * (up - down) <= high for low, high in (
        paired_interval(int(lost), int(gained), images) for lost, gained, _ in drawn)]
    assert np.mean(inside) > 0.935  # 95% less three standard errors


def test_interval_of_changes_is_that_of_the_images_where_there_are_many():
    rng = np.random.default_rng(1)
    old, new = rng.random((2, 20_000)) < 0.7
    expected = image_interval([new], [old])
    got = paired_interval(int((old & ~new).sum()), int((new & ~old).sum()), 20_000)
    assert got == pytest.approx(expected, abs=0.02)

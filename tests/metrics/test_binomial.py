"""Exact tails and bounds against scipy, and the test of a drop against every sample there can be."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest, multinomial

from pst_timm.metrics.binomial import (
    SLACK,
    binomial_interval,
    binomial_tail,
    binomial_upper,
    drop_p_value,
    fewest_images,
)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_tails_are_those_of_scipy(n, share, p):
    count = round(share * n)
    assert binomial_tail(count, n, p) == pytest.approx(binom.sf(count - 1, n, p), rel=1e-7, abs=1e-300)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.5, 0.05, 0.001]))
def test_the_upper_bound_is_that_of_clopper_and_pearson(n, share, alpha):
    count = round(share * n)
    expected = beta.ppf(1 - alpha, count + 1, n - count) if count < n else 1.
    assert binomial_upper(count, n, alpha) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('count, n', [(0, 20), (20, 20), (7, 20), (999, 1000), (1, 1)])
def test_the_interval_is_the_exact_one(count, n):
    for level in (0.95, 0.8):
        expected = binomtest(count, n).proportion_ci(level, 'exact')
        assert binomial_interval(count, n, level) == pytest.approx((expected.low, expected.high), rel=1e-6)


def test_beyond_all_trials_there_is_nothing():
    assert binomial_tail(0, 5, 0.) == binomial_tail(5, 5, 1.) == 1 and binomial_tail(6, 5, 0.5) == 0


def samples(n):
    """Every (lost, gained) of n images."""
    return [(lost, gained) for lost in range(n + 1) for gained in range(n + 1 - lost)]


def chances(n, loss, gain):
    """Of every sample, by scipy."""
    counts = np.array([(lost, gained, n - lost - gained) for lost, gained in samples(n)])
    return multinomial.pmf(counts, n, [loss, gain, max(0., 1 - loss - gain)])


@pytest.mark.parametrize('n, drop', [(16, 0.), (16, 0.3), (30, 0.02), (30, 0.1)])
def test_the_test_of_a_drop_errs_no_more_often_than_it_says(n, drop):
    """Summed over all samples, for every pair of chances on a grid whose drop is as large as what is excluded."""
    p_values = np.array([drop_p_value(lost, gained, n, drop) for lost, gained in samples(n)])
    most = dict.fromkeys((0.05, 0.1, 0.3), 0.)
    for true in (drop, drop + 0.01, drop + 0.1):
        for change in np.linspace(true, 1, 20):
            chance = chances(n, (change + true) / 2, (change - true) / 2)
            for alpha in most:
                most[alpha] = max(most[alpha], chance[p_values <= alpha].sum())
    for alpha, found in most.items():
        assert found <= alpha, (alpha, found)
    assert most[0.3] > 0.05  # it is no empty promise


@pytest.mark.parametrize('lost, gained, drop', [(0, 0, 0.1), (2, 1, 0.15), (0, 4, 0.05), (3, 8, 0.02)])
def test_its_p_value_is_the_worst_over_the_chances_that_are_not_excluded(lost, gained, drop):
    n = 40
    top = binomial_upper(lost + gained, n, SLACK)
    below = np.array([a - b <= lost - gained for a, b in samples(n)])
    tails = [
        chances(n, (change + drop) / 2, (change - drop) / 2)[below].sum()
        for change in np.linspace(drop, max(top, drop), 20)]
    assert drop_p_value(lost, gained, n, drop) == pytest.approx(max(tails) + SLACK, abs=1e-9)


def test_more_losses_and_smaller_drops_are_harder_to_exclude():
    p = [drop_p_value(lost, 5, 2000, 0.01) for lost in range(0, 40, 4)]
    assert p == sorted(p) and p[0] < 0.01 and p[-1] == 1
    p = [drop_p_value(10, 10, 1000, drop) for drop in (0.02, 0.01, 0.005, 0.001, 0.)]
    assert p == sorted(p) and p[0] < 0.05 < p[2]


@pytest.mark.parametrize('drop', [0.005, 0.01, 0.03])
def test_the_fewest_images_are_just_enough(drop):
    n = fewest_images(drop)
    assert drop_p_value(0, 0, n, drop) <= 0.05 < drop_p_value(0, 0, n - 1, drop)
    assert fewest_images(0.) == 2 ** 20  # no number of equal answers proves that there is no loss at all

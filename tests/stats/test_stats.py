"""Intervals and tests against scipy, against slow second implementations, and against what chance must give."""

import itertools

import numpy as np
import pytest
from scipy import stats

from registerlens.stats import intervals, permutation
from registerlens.stats.intervals import mean_intervals, resample
from registerlens.stats.permutation import ENOUGH, LEAST, holm, least_p, n_flips, sign_flip_p


def exact_p(differences):
    """Every pattern of signs, one after the other."""
    d = differences[np.isfinite(differences)]
    observed = abs(d.sum()) - 1e-12 * abs(d).sum()
    return np.mean([abs(np.dot(signs, d)) >= observed for signs in itertools.product((1, -1), repeat=len(d))])


# Intervals ------------------------------------------------------------------------------------------------------------


def test_intervals_are_scipys():
    values = np.random.default_rng(1).exponential(size=(3, 23))
    mean, low, high = mean_intervals(values, resample(23, 400, 7))
    for row in range(3):
        theirs = stats.bootstrap(
            (values[row],), np.mean, n_resamples=400, method="percentile", rng=np.random.default_rng(7)
        ).confidence_interval
        assert (low[row], high[row]) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert mean == pytest.approx(values.mean(1), rel=1e-12)


def test_images_without_a_number_are_left_out_row_by_row(monkeypatch):
    rng = np.random.default_rng(2)
    values = rng.normal(size=(9, 12))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[4], values[5, :], values[5, 3] = np.nan, np.nan, 2.0
    values[6, 0] = np.inf
    drawn = np.random.default_rng(3).integers(0, 12, (200, 12))
    monkeypatch.setattr(intervals, "CHUNK", 400)  # two rows at a time
    mean, low, high = mean_intervals(values, resample(12, 200, 3))
    for row, one in enumerate(values):
        one = np.where(np.isfinite(one), one, np.nan)
        means = [np.nanmean(one[sample]) for sample in drawn if np.isfinite(one[sample]).any()]
        expected = [np.nan] * 3 if row == 4 else [np.nanmean(one), *np.percentile(means, [2.5, 97.5])]
        assert [mean[row], low[row], high[row]] == pytest.approx(expected, nan_ok=True)
    assert (mean[5], low[5], high[5]) == (2.0, 2.0, 2.0)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(4)
    _, low, high = mean_intervals(rng.normal(3.0, 2.0, (1500, 80)), resample(80, 400, 0))
    covered = ((low <= 3.0) & (high >= 3.0)).mean()
    assert 0.92 < covered < 0.965, covered


# Sign flips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_few_images_are_exact_and_scipys(n):
    a, b = np.random.default_rng(n).normal(0.4, 1, (2, 4, n))
    p = sign_flip_p(a - b)
    for row in range(4):
        assert p[row] == pytest.approx(exact_p(a[row] - b[row]))
        if n > 1:
            theirs = stats.permutation_test(
                (a[row], b[row]), lambda x, y, axis: (x - y).mean(axis), vectorized=True, permutation_type="samples",
                n_resamples=np.inf,
            )  # fmt: skip
            assert p[row] == pytest.approx(theirs.pvalue)
    assert (p >= least_p(np.full(4, n))).all()


def test_ties_count_as_extreme_whatever_the_rounding():
    d = np.array([[0.1, 0.2, 0.3, -0.6], [0.1, 0.2, -0.3, 0.7], [1.0, 1.0, -1.0, 1.0]])
    assert sign_flip_p(d) == pytest.approx([1.0, exact_p(d[1]), 10 / 16])


def test_images_without_a_difference_do_not_count():
    d = np.array([[1.0, 2.0, np.nan, 3.0, 0.0], [np.nan] * 5, [0.0] * 5, [np.inf, 1.0, -1.0, 2.0, 0.5]])
    p = sign_flip_p(d)
    assert p[0] == 0.25 and np.isnan(p[1]) and p[2] == 1.0 and p[3] == pytest.approx(exact_p(d[3]))


def test_one_sign_is_exact_for_any_number_of_images():
    d = np.abs(np.random.default_rng(0).normal(size=(3, 40)))
    d[1] *= -1
    d[2, :20] = 0.0
    assert sign_flip_p(d) == pytest.approx([2.0**-39, 2.0**-39, 2.0**-19])
    assert sign_flip_p(np.ones((1, 5000)))[0] == LEAST == least_p(np.array([5000]))[0]


def test_random_patterns_come_near_the_exact_value(monkeypatch):
    d = np.random.default_rng(5).normal(0.35, 1.0, (12, 15))
    exact = np.array([exact_p(row) for row in d])
    assert exact.min() < 0.03 and exact.max() > 0.3
    p = sign_flip_p(d, 20_000, seed=1)
    error = np.sqrt(exact * (1 - exact) / np.minimum(20_000, ENOUGH / exact))
    assert (np.abs(p - exact) < 4 * error).all(), (p, exact)
    monkeypatch.setattr(permutation, "CHUNK", 3000)  # three rows at a time: the same patterns, the same numbers
    assert (sign_flip_p(d, 20_000, seed=1) == p).all()


def test_the_closed_bound_is_never_below_the_exact_value():
    rng = np.random.default_rng(6)
    d = rng.normal(3.0, 1.0, (12, 15))
    d[:, 0] = -0.1  # so that not all have one sign
    p = sign_flip_p(d, flips=99)
    exact = np.array([exact_p(row) for row in d])
    bounded = p < 1 / 100
    assert bounded.sum() > 5 and (p[bounded] >= exact[bounded]).all()


def test_the_smallest_p_of_random_patterns_counts_the_data_among_them():
    d = np.random.default_rng(13).normal(0.5, 1.0, (60, 20))
    bound = 2 * np.exp(-(d.sum(1) ** 2) / (2 * (d**2).sum(1)))
    p = sign_flip_p(d, flips=9)[bound >= 0.1]
    assert len(p) > 20 and (p * 10 == pytest.approx(np.round(p * 10))) and p.min() == pytest.approx(0.1)


def test_a_row_does_not_depend_on_its_neighbours_and_a_seed_repeats():
    d = np.random.default_rng(7).normal(0.3, 1, (30, 25))
    p = sign_flip_p(d, 3000, seed=2)
    assert (sign_flip_p(d[11:12], 3000, seed=2) == p[11]).all() and (sign_flip_p(d, 3000, seed=2) == p).all()
    assert (sign_flip_p(d, 3000, seed=3) != p).any()
    assert (sign_flip_p(-d * 10, 3000, seed=2) == p).all()  # two-sided, without a unit


@pytest.mark.parametrize("draw", ["normal", "heavy", "one outlying image"])
def test_p_is_uniform_where_nothing_happens(draw):
    rng = np.random.default_rng(8)
    d = {
        "normal": lambda: rng.normal(size=(3000, 20)),
        "heavy": lambda: rng.standard_cauchy((3000, 20)),
        "one outlying image": lambda: rng.normal(size=(3000, 20)) * np.r_[30.0, np.ones(19)],
    }[draw]()
    # Patterns are the same for all rows, so rows are drawn anew for several seeds.
    p = np.concatenate([sign_flip_p(part, 1999, seed) for seed, part in enumerate(np.split(d, 10))])
    assert stats.kstest(p, "uniform").statistic < 0.03
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() < level + 3.5 * np.sqrt(level * (1 - level) / len(p))


def test_a_planted_shift_is_found_as_often_as_by_a_t_test():
    d = np.random.default_rng(9).normal(0.5, 1.0, (1000, 40))
    ours, theirs = (sign_flip_p(d) < 0.05).mean(), (stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05).mean()
    assert 0.80 < ours < 0.93 and abs(ours - theirs) < 0.015


# Many tests -----------------------------------------------------------------------------------------------------------


def slow_holm(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    worst, found = 0.0, [0.0] * len(p)
    for step, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - step) * p[i]))
        found[i] = worst
    return found


def test_holm_is_the_slow_one_and_leaves_out_nan():
    p = np.random.default_rng(10).random(50) ** 4
    p[3] = p[7]
    assert holm(p) == pytest.approx(slow_holm(p))
    gappy = np.insert(p, [0, 20], np.nan)
    assert holm(gappy)[np.isfinite(gappy)] == pytest.approx(slow_holm(p)) and np.isnan(holm(gappy)[[0, 21]]).all()
    assert holm(np.full(2, np.nan)).tolist() == pytest.approx([np.nan] * 2, nan_ok=True)


def test_false_alarms_among_many_tests_keep_to_the_level():
    rng = np.random.default_rng(11)
    alarms = [(holm(sign_flip_p(rng.normal(size=(20, 16)), n_flips(20), seed)) < 0.05).any() for seed in range(150)]
    assert np.mean(alarms) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


def test_one_strong_neuron_among_18432_survives_holm():
    rng = np.random.default_rng(12)
    d = rng.normal(size=(18_432, 40)).astype(np.float64)
    d[777] += 1.5
    p = holm(sign_flip_p(d, n_flips(len(d))))
    assert p[777] < 0.05 and (p < 0.05).sum() == 1

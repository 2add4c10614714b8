"""Intervals and tests against scipy, against slow second implementations, and against what chance must give."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from registerlens.stats import permutation
from registerlens.stats.intervals import mean_intervals
from registerlens.stats.permutation import LEAST, holm, least_p, sign_flip_p


def exact_p(differences):
    """Every pattern of signs, one after the other."""
    d = differences[np.isfinite(differences)]
    observed = abs(d.sum()) - 1e-12 * abs(d).sum()
    return np.mean([abs(np.dot(signs, d)) >= observed for signs in itertools.product((1, -1), repeat=len(d))])


# Intervals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 9, 23, 400])
def test_intervals_of_symmetric_values_are_students(n):
    half = np.random.default_rng(n).normal(size=(3, n // 2))
    values = np.concatenate([half, -half, np.zeros((3, n % 2))], 1) + 5.0
    mean, low, high = mean_intervals(values)
    for row, one in enumerate(values):
        theirs = stats.ttest_1samp(one, 0).confidence_interval(0.95)
        assert (low[row], high[row]) == pytest.approx((theirs.low, theirs.high), abs=2e-4 * one.std())
    assert mean == pytest.approx(values.mean(1), rel=1e-12)


def test_intervals_of_skewed_values_solve_halls_equation():
    """At its ends the transformed t statistic is Student's quantile."""
    values = np.random.default_rng(1).exponential(size=(5, 20))
    mean, *ends = mean_intervals(values)
    skew = stats.skew(values, axis=1)
    for end, quantile in zip(ends, stats.t.ppf([0.975, 0.025], 19), strict=True):
        y = (mean - end) / values.std(1, ddof=1)
        transformed = y + skew * y**2 / 3 + skew**2 * y**3 / 27 + skew / (6 * 20)
        assert transformed * np.sqrt(20) == pytest.approx(quantile, abs=2e-4)


def test_images_without_a_number_are_left_out_row_by_row():
    values = np.random.default_rng(2).normal(size=(7, 14))
    values[1, :4], values[2, 0], values[3], values[4, 7:] = np.nan, np.inf, np.nan, np.nan
    values[5] = 2.0
    mean, low, high = mean_intervals(values)
    for row in (0, 1, 2):
        alone = mean_intervals(values[row : row + 1, np.isfinite(values[row])])
        assert [mean[row], low[row], high[row]] == pytest.approx([end[0] for end in alone], rel=1e-12)
    assert np.isnan([mean[3], low[3], high[3], low[4], high[4]]).all() and mean[4] == values[4, :7].mean()
    assert [mean[5], low[5], high[5]] == pytest.approx([2.0] * 3)


DRAWS = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "lognormal": (lambda rng, size: rng.lognormal(sigma=0.5, size=size), math.exp(0.125)),
    "very lognormal": (lambda rng, size: rng.lognormal(size=size), math.exp(0.5)),
    "one in two": (lambda rng, size: rng.binomial(1, 0.5, size).astype(float), 0.5),
    "counts": (lambda rng, size: rng.binomial(36, 0.05, size) / 36, 0.05),
}
COVERED = {
    "normal": (0.94, 0.94, 0.94, 0.94),
    "lognormal": (0.925, 0.925, 0.935, 0.94),
    "very lognormal": (0.885, 0.89, 0.915, 0.93),
    "one in two": (0.94, 0.94, 0.94, 0.94),
    "counts": (0.93, 0.935, 0.935, 0.935),
}
"""At least so often with 8, 10, 30 and 100 images; docs/concepts/ablation.md has what was measured."""


@pytest.mark.parametrize("draw", DRAWS)
def test_intervals_cover_the_mean_as_often_as_is_said(draw):
    make, truth = DRAWS[draw]
    for n, least in zip((8, 10, 30, 100), COVERED[draw], strict=True):
        _, low, high = mean_intervals(make(np.random.default_rng(n), (6000, n)))
        covered = ((low <= truth + 1e-12) & (high >= truth - 1e-12)).mean()
        assert least < covered < 0.9995, (n, covered)


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


@pytest.mark.parametrize("draw", ["normal", "counts", "heavy"])
def test_random_patterns_come_near_the_exact_value(draw, monkeypatch):
    rng = np.random.default_rng(5)
    d = {
        "normal": lambda: rng.normal(0.6, 1.0, (60, 22)),
        "counts": lambda: rng.integers(-2, 5, (60, 22)) / 36,
        "heavy": lambda: rng.standard_cauchy((60, 22)) + 1,
    }[draw]()
    exact = sign_flip_p(d)
    monkeypatch.setattr(permutation, "EXACT", 0)
    p = sign_flip_p(d, seed=1)
    small = exact < 0.07
    assert small.sum() > 10 and exact[small].min() < 1e-3
    relative = p[small] / exact[small] - 1
    assert np.abs(relative).max() < 0.09 and np.sqrt((relative**2).mean()) < 0.025
    assert np.abs(p[~small] - exact[~small]).max(initial=0) < 4 * 0.5 / np.sqrt(permutation.PATTERNS[0])
    monkeypatch.setattr(permutation, "CHUNK", 30_000)  # a part of the patterns at a time
    assert sign_flip_p(d, seed=1) == pytest.approx(p, rel=1e-9)


def test_halves_that_meet_give_what_all_patterns_give():
    d = np.random.default_rng(6).normal(0.35, 1.0, (6, 15))
    assert sign_flip_p(d) == pytest.approx([exact_p(row) for row in d], rel=1e-9)


def test_the_closed_bound_is_never_below_the_exact_value(monkeypatch):
    d = np.random.default_rng(6).normal(3.0, 1.0, (12, 15))
    d[:, 0] = -0.1  # so that not all have one sign
    exact = sign_flip_p(d)
    monkeypatch.setattr(permutation, "EXACT", 0)
    monkeypatch.setattr(permutation, "BEYOND", 1.0)
    assert (sign_flip_p(d) >= exact).all() and exact.max() < 0.01


def test_a_row_does_not_depend_on_its_neighbours_and_a_seed_repeats():
    d = np.random.default_rng(7).normal(0.3, 1, (30, 25))
    p = sign_flip_p(d, seed=2)
    assert (sign_flip_p(d[11:12], seed=2) == p[11]).all() and (sign_flip_p(d, seed=2) == p).all()
    assert (sign_flip_p(d, seed=3) != p).any()
    assert sign_flip_p(-d * 10, seed=2) == pytest.approx(p)  # two-sided, without a unit


@pytest.mark.parametrize("draw", ["normal", "heavy", "one outlying image"])
def test_p_is_uniform_where_nothing_happens(draw):
    rng = np.random.default_rng(8)
    d = {
        "normal": lambda: rng.normal(size=(3000, 20)),
        "heavy": lambda: rng.standard_cauchy((3000, 20)),
        "one outlying image": lambda: rng.normal(size=(3000, 20)) * np.r_[30.0, np.ones(19)],
    }[draw]()
    # Patterns are the same for all rows, so rows are drawn anew for several seeds.
    p = np.concatenate([sign_flip_p(part, seed) for seed, part in enumerate(np.split(d, 10))])
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
    alarms = [(holm(sign_flip_p(rng.normal(size=(20, 24)), seed)) < 0.05).any() for seed in range(150)]
    assert np.mean(alarms) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


def test_one_strong_neuron_among_18432_survives_holm():
    rng = np.random.default_rng(12)
    d = rng.normal(size=(18_432, 40)).astype(np.float64)
    d[777] += 1.5
    p = holm(sign_flip_p(d))
    assert p[777] < 0.05 and (p < 0.05).sum() == 1

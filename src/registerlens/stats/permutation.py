"""Tests for many conditions at once: paired sign-flip permutation tests, and Holm's correction."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from registerlens.stats.intervals import CHUNK

EXACT = 14
"""Up to this many images every pattern of signs is tried."""
FLIPS = 9_999
"""Random patterns of signs at least, where not every one is tried."""
ENOUGH = 100
"""A condition gets no more patterns once this many were as extreme as the data."""
LEAST = 1e-300
"""No p-value is given below this."""
_ROUND = 1_000
_CLOSE = 1e-12
"""Sums that differ by less than this share of the sum of absolute differences are equal up to rounding."""


def n_flips(n_tests: int) -> int:
    """Patterns of signs it takes so that the smallest p-value survives Holm's correction at 0.05, twice over.

    Example:
        >>> n_flips(10), n_flips(18_432)
        (9999, 737279)
    """
    return max(FLIPS, 40 * n_tests - 1)


def sign_flip_p(
    differences: Float[np.ndarray, "row image"], flips: int = FLIPS, seed: int = 0
) -> Float[np.ndarray, " row"]:
    """p-values of a paired two-sided sign-flip permutation test of the mean difference being zero.

    Under the hypothesis each image's difference is as likely as its negative. The p-value is the share of all patterns
    of signs whose sum is at least as far from zero as the sum of the data. It is found, whichever applies first,

    1. exactly, where all differences have one sign: 2 / 2^n for n images that differ;
    2. exactly by trying all patterns, for at most 14 images;
    3. by Hoeffding's bound 2 exp(-sum^2 / (2 sum of squares)), which is never below the exact value, where that lies
       below the smallest p-value that random patterns can give;
    4. from random patterns: at most `flips`, the same for all rows, until 100 were as extreme as the data. The smallest
       p-value so found is 1 / (flips + 1).

    Images without a finite difference are left out.

    Args:
        differences: a number an image.
        flips: random patterns at most.
        seed: of the patterns.

    Returns:
        0 to 1; 1 for a row whose differences are all zero, NaN for one without a finite difference.

    Source: Fisher 1935 for the test; Besag and Clifford 1991 for stopping early; Hoeffding 1963 for the bound.

    Example:
        >>> sign_flip_p(np.array([[1.0, 2.0, 3.0], [1.0, -1.0, 0.5], [0.0, 0.0, 0.0]]))
        array([0.25, 1.  , 1.  ])
    """
    there = np.isfinite(differences)
    filled = np.where(there, differences, 0.0)
    observed, total = np.abs(filled.sum(1)), np.abs(filled).sum(1)
    least = observed - _CLOSE * total
    n_nonzero = (filled != 0).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = 2 * np.exp(-(observed**2) / (2 * (filled**2).sum(1)))
    one_sign = (least >= total * (1 - 2 * _CLOSE)) & (n_nonzero > 0)
    p = np.where(one_sign, 2.0 ** (1.0 - n_nonzero), np.where(n_nonzero == 0, 1.0, bound))
    p = np.where(there.any(1), np.maximum(p, LEAST), np.nan)
    left = (n_nonzero > 0) & ~one_sign
    if differences.shape[1] <= EXACT:
        p[left] = _exact(filled[left], least[left])
        return p
    left &= bound >= 1 / (flips + 1)
    p[left] = _random(filled[left], least[left], flips, seed)
    return p


def _exact(filled: Float[np.ndarray, "row image"], least: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """The share of all patterns; one image keeps its sign, for a pattern and its opposite are equally extreme."""
    n = filled.shape[1]
    signs = 1.0 - 2.0 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1)
    p = np.empty(len(filled))
    step = max(1, CHUNK // len(signs))
    for start in range(0, len(filled), step):
        part = slice(start, start + step)
        p[part] = _as_extreme(filled[part], signs, least[part]).mean(1)
    return p


def _random(
    filled: Float[np.ndarray, "row image"], least: Float[np.ndarray, " row"], flips: int, seed: int
) -> Float[np.ndarray, " row"]:
    """Rounds of random patterns until a row has enough that are as extreme as the data, or there were `flips`."""
    rng = np.random.default_rng(seed)
    p = np.full(len(filled), np.nan)
    hits = np.zeros(len(filled), dtype=np.int64)
    left = np.arange(len(filled))
    tried = 0
    while len(left) and tried < flips:
        n = min(_ROUND, flips - tried)
        signs = 1.0 - 2.0 * rng.integers(0, 2, (n, filled.shape[1]), dtype=np.int8)
        step = max(1, CHUNK // max(n, filled.shape[1]))
        for start in range(0, len(left), step):
            rows = left[start : start + step]
            running = hits[rows, None] + _as_extreme(filled[rows], signs, least[rows]).cumsum(1, dtype=np.int32)
            hits[rows] = running[:, -1]
            done = running[:, -1] >= ENOUGH
            p[rows[done]] = ENOUGH / (tried + 1 + (running[done] >= ENOUGH).argmax(1))
        tried += n
        left = left[hits[left] < ENOUGH]
    p[left] = (hits[left] + 1) / (flips + 1)
    return p


def _as_extreme(
    filled: Float[np.ndarray, "row image"], signs: Float[np.ndarray, "pattern image"], least: Float[np.ndarray, " row"]
) -> Bool[np.ndarray, "row pattern"]:
    """Where a pattern's sum is as far from zero as the data's."""
    return np.abs(filled @ signs.T) >= least[:, None]


def least_p(n_images: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """The smallest p-value that a sign-flip test of so many images can give: 2 / 2^n, at most 1.

    Example:
        >>> least_p(np.array([0, 1, 5]))
        array([1.    , 1.    , 0.0625])
    """
    return np.clip(2.0 ** (1.0 - n_images), LEAST, 1.0)


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Holm's step-down correction: p-values under which the chance of any false alarm keeps to the level.

    NaN counts as no test.

    Source: Holm 1979.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03]))
        array([0.03, 0.06, 0.06])
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p, kind="stable")[: np.isfinite(p).sum()]  # NaN sorts last
    steps = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * steps), 1.0)
    return corrected

"""Tests for many conditions at once: paired sign-flip permutation tests, and Holm's correction."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1 << 22
"""Numbers of an intermediate array at most: 32 MB in float64."""
EXACT = 22
"""Up to this many images every pattern of signs counts."""
CLEAR = 0.075
"""Above this p-value no threshold is near, and fewer patterns suffice."""
PATTERNS = 4_000, 10_000
"""Random patterns of signs of a row that is clearly above every threshold, and of others."""
BEYOND = 1e-12
"""Below this p-value no threshold is near: a bound suffices."""
LEAST = 1e-300
"""No p-value is given below this."""
_CLOSE = 1e-12
"""Sums that differ by less than this share of the sum of absolute differences are equal up to rounding."""


def sign_flip_p(differences: Float[np.ndarray, "row image"], seed: int = 0) -> Float[np.ndarray, " row"]:
    """p-values of a paired two-sided sign-flip permutation test of the mean difference being zero.

    Under the hypothesis each image's difference is as likely as its negative. The p-value is the share of all patterns
    of signs whose sum is at least as far from zero as the sum of the data. It is found, whichever applies first,

    1. exactly, where all differences have one sign (2 / 2^n for n images that differ), and for at most 22 images;
    2. by Hoeffding's bound 2 exp(-sum^2 / (2 sum of squares)), which is never below the exact value, where that is
       below 1e-12;
    3. from 4,000 random patterns, the same for all rows, where their share is above 0.075: to 0.01;
    4. from 10,000 patterns drawn so that their mean sum is the data's, each weighted by how much more likely that makes
       it: to 1 or 2%, however small the p-value is.

    Images without a finite difference are left out.

    Args:
        differences: a number an image.
        seed: of the patterns.

    Returns:
        0 to 1; 1 for a row whose differences are all zero, NaN for one without a finite difference.

    Source: Fisher 1935 for the test; Siegmund 1976 for the weights; Hoeffding 1963 for the bound.

    Example:
        >>> sign_flip_p(np.array([[1.0, 2.0, 3.0], [1.0, -1.0, 0.5], [0.0, 0.0, 0.0]]))
        array([0.25, 1.  , 1.  ])
    """
    there = np.isfinite(differences)
    filled = np.where(there, differences, 0.0)
    filled *= np.where(filled.sum(1) < 0, -1.0, 1.0)[:, None]
    observed, total = filled.sum(1), np.abs(filled).sum(1)
    least = observed - _CLOSE * total
    n_nonzero = (filled != 0).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = 2 * np.exp(-(observed**2) / (2 * (filled**2).sum(1)))
    one_sign = (least >= total * (1 - 2 * _CLOSE)) & (n_nonzero > 0)
    p = np.where(one_sign, 2.0 ** (1.0 - n_nonzero), np.where(n_nonzero == 0, 1.0, bound))
    left = np.flatnonzero((n_nonzero > 0) & ~one_sign)
    if differences.shape[1] <= EXACT:
        p[left] = [_exact(row, at_least) for row, at_least in zip(filled[left], least[left], strict=True)]
    else:
        left = left[bound[left] >= BEYOND]
        p[left] = _random(filled[left], least[left], seed)
        left = left[p[left] < CLEAR]
        p[left] = _tilted(filled[left], least[left], seed)
    return np.where(there.any(1), np.clip(p, LEAST, 1.0), np.nan)


def _exact(row: Float[np.ndarray, " image"], least: float) -> float:
    """The share of all patterns: every sum of one half of the images meets every sum of the other half."""
    first, second = (
        half @ (1.0 - 2.0 * (np.arange(2 ** len(half)) >> np.arange(len(half))[:, None] & 1))
        for half in np.array_split(row, 2)
    )
    below = np.searchsorted(np.sort(second), least - first)
    # A pattern and its opposite are equally extreme.
    return min(1.0, 2 * (1 - below.mean() / len(second)))


def _random(
    filled: Float[np.ndarray, "row image"], least: Float[np.ndarray, " row"], seed: int
) -> Float[np.ndarray, " row"]:
    """The share of random patterns that are as extreme as the data."""
    hits = np.zeros(len(filled))
    for uniform in _uniforms(PATTERNS[0], max(filled.shape), filled.shape[1], seed):
        signs = np.where(uniform < 0.5, -1.0, 1.0)
        hits += (np.abs(filled @ signs.T) >= least[:, None]).sum(1)
    return hits / PATTERNS[0]


def _tilted(
    filled: Float[np.ndarray, "row image"], least: Float[np.ndarray, " row"], seed: int
) -> Float[np.ndarray, " row"]:
    """The same share from patterns in which an image keeps its sign with the odds exp(2 tilt difference)."""
    scale = np.abs(filled).max(1, initial=0.0)
    filled, least = filled / scale[:, None], least / scale
    tilt = np.zeros((len(filled), 1))
    for _ in range(30):  # Newton's method on a concave curve from the left of its root never goes too far
        kept = np.tanh(tilt * filled)
        short = least - (filled * kept).sum(1)
        tilt += (short / (filled**2 * (1 - kept**2)).sum(1))[:, None]
    log_sum = (np.logaddexp(tilt * filled, -tilt * filled) - np.log(2)).sum(1)
    odds = (1 + np.tanh(tilt * filled)) / 2
    weights = np.zeros(len(filled))
    for uniform in _uniforms(PATTERNS[1], filled.shape[1], filled.shape[1], seed):
        for row, differences in enumerate(filled):
            sums = 2 * (uniform < odds[row]) @ differences - differences.sum()
            extreme = sums[sums >= least[row]]
            weights[row] += np.exp(log_sum[row] - tilt[row] * extreme).sum()
    return 2 * weights / PATTERNS[1]


def _uniforms(n: int, width: int, n_images: int, seed: int) -> Iterator[Float[np.ndarray, "pattern image"]]:
    """n rows of random numbers from 0 to 1, no more at once than fit beside `width` numbers each."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // width)
    return (rng.random((min(step, n - start), n_images)) for start in range(0, n, step))


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

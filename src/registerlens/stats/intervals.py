"""Bootstrap intervals of means over images, for many rows of numbers at once."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float

LEVEL = (2.5, 97.5)
"""Percentiles of the bootstrap means that bound a 95% interval."""
CHUNK = 1 << 25
"""Numbers of an intermediate array at most: 256 MB in float64."""


def resample(n_images: int, n_boot: int, seed: int) -> Float[np.ndarray, "image sample"]:
    """How often each image stands in each bootstrap sample.

    The same samples serve every row, so that rows stay paired.

    Example:
        >>> resample(5, 3, 0).sum(0)
        array([5., 5., 5.])
    """
    indices = np.random.default_rng(seed).integers(0, n_images, (n_boot, n_images))
    times = np.zeros((n_boot, n_images))
    for start in range(0, n_boot, 64):  # bounded memory: a sample at a time would be slow, all at once would be large
        part = indices[start : start + 64]
        flat = part + np.arange(len(part))[:, None] * n_images
        counts = np.bincount(flat.ravel(), minlength=len(part) * n_images)
        times[start : start + 64] = counts.reshape(len(part), n_images)
    return np.ascontiguousarray(times.T)


def mean_intervals(
    values: Float[np.ndarray, "row image"], times: Float[np.ndarray, "image sample"]
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Means of rows with their 95% percentile bootstrap intervals.

    Images without a finite value are left out of their row, and samples without any image that has one out of its
    interval.

    Args:
        values: a number an image.
        times: the bootstrap samples, as `resample` makes them.

    Returns:
        mean, low, high; NaN for a row without any finite value.

    Example:
        >>> mean, low, high = mean_intervals(np.array([[1.0, 2.0, 3.0, np.nan]]), resample(4, 200, 0))
        >>> float(mean[0]), bool(low[0] < 2.0 < high[0])
        (2.0, True)
    """
    mean, low, high = (np.full(len(values), np.nan) for _ in range(3))
    step = max(1, CHUNK // max(times.shape))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        there = np.isfinite(values[part])
        whole = there.all()
        filled = values[part] if whole else np.where(there, values[part], 0.0)
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # rows of NaN only
            mean[part] = filled.sum(1) / there.sum(1)
            means = filled @ times / (times.sum(0) if whole else there.astype(np.float64) @ times)
            percentile = np.nanpercentile if np.isnan(means).any() else np.percentile
            low[part], high[part] = percentile(means, LEVEL, axis=1)
    return mean, low, high

"""Intervals of means over images, for many rows of numbers at once, and bootstrap samples for what is no mean."""

import numpy as np
from jaxtyping import Float, Int

LEVEL = (2.5, 97.5)
"""Percentiles that bound a 95% interval."""
LEAST_IMAGES = 8
"""Below so many images there is no interval: whether a distribution is skewed cannot be seen, and none would hold."""


def resample(n_images: int, n_boot: int, seed: int) -> Float[np.ndarray, "image sample"]:
    """How often each image stands in each bootstrap sample.

    Example:
        >>> resample(5, 3, 0).sum(0)
        array([5., 5., 5.])
    """
    samples = np.random.default_rng(seed).integers(0, n_images, (n_boot, n_images))
    return np.stack([np.bincount(sample, minlength=n_images) for sample in samples], 1).astype(np.float64)


def mean_intervals(
    values: Float[np.ndarray, "row image"],
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Means of rows with their 95% intervals: Student's, corrected for skewness.

    Each row's t statistic is transformed by the cubic that takes the skewness of its images out of it; without skewness
    the interval is Student's. Images without a finite value are left out of their row. Where all images have one value
    the interval has no width, which says nothing of images that were not there.

    Args:
        values: a number an image.

    Returns:
        mean, low, high; NaN for a row without any finite value, low and high also for one with fewer than 8.

    Source: Hall 1992, On the removal of skewness by transformation. How often it holds, beside bootstrap intervals:
        docs/concepts/ablation.md.

    Example:
        >>> mean, low, high = mean_intervals(np.array([[1.0, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, *[np.nan] * 5]]))
        >>> mean.tolist(), low.round(2).tolist(), high.round(2).tolist()
        ([4.5, 2.0], [2.45, nan], [6.55, nan])
    """
    there = np.isfinite(values)
    n = there.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, values, 0.0).sum(1) / n
        centred = np.where(there, values - mean[:, None], 0.0)
        variance, third = (centred**2).sum(1) / n, (centred**3).sum(1) / n
        skew = np.where(variance > 0, third / variance**1.5, 0.0)
        spread = np.where(n < LEAST_IMAGES, np.nan, np.sqrt(variance * n / (n - 1)))
        reach = _student(n - 1) / np.sqrt(n)
        low, high = (mean - spread * _without_skew(x - skew / (6 * n), skew) for x in (reach, -reach))
    return mean, low, high


def interval_words(low: float, high: float) -> str:
    """An interval in a sentence, or why there is none.

    Example:
        >>> interval_words(0.25, 1.5), interval_words(np.nan, np.nan)
        ('95% interval 0.25 to 1.5', 'no interval below 8 images')
    """
    return f"no interval below {LEAST_IMAGES} images" if np.isnan(low) else f"95% interval {low:.4g} to {high:.4g}"


def _without_skew(x: Float[np.ndarray, " row"], skew: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """The inverse of y + skew y^2 / 3 + skew^2 y^3 / 27, written so that no skewness divides by nothing."""
    root = np.cbrt(1 + skew * x)
    return 3 * x / (root**2 + root + 1)


def _student(freedom: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """The 97.5th percentile of Student's t, to 1e-4 from 7 degrees of freedom on.

    Source: Abramowitz and Stegun 1964, 26.7.5, at the normal 97.5th percentile.
    """
    return np.polyval([1.5895, 2.5558, 2.8225, 2.3723, 1.95996], 1 / freedom)

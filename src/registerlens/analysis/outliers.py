"""Are there outlier tokens? A verdict with its evidence, from histograms of patch norms.

A fixed cut-off does not carry over from model to model, and mean + 3 sigma flags something in every model. Outliers are
called present only where the norms, relative to each image's median, form a second mode: a gap of sparse values, with
enough images beyond it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.stats.histograms import LOG_HIGH, LOG_LOW, N_BINS, bin_edges, count_bins, medians

MIN_GAP = 1.3
"""The outlier mode starts at least this many times above where the normal mode ends."""
MIN_TYPICAL = 3.0
"""A typical (median) outlier has at least this many times the median norm."""
MIN_IMAGES = 0.1
"""At least this share of images has an outlier."""
MAX_PATCHES = 0.25
"""At most this share of patches are outliers; more would be a second kind of content."""
LEAK = 0.2
"""The gap counts as empty while it holds at most this many tokens per outlier."""
MIN_SURPRISE = 10.0
"""Were the outliers the normal mode's tail, a gap so empty would have a probability of at most e to minus this."""
MIN_HINT = 3.0
"""From this surprise on more images might show a mode; below, a gap is what the largest few of any norms have."""


Answer = Literal["present", "absent", "too few images"]
"""Are there outliers? "too few images": a gap is there, but the patches beyond it are too few to be no tail."""


@dataclass(frozen=True, kw_only=True)
class OutlierEvidence:
    """What the patch norms at one place of the residual stream say."""

    verdict: Answer
    """Whether the norms form a separate outlier mode."""
    reason: str
    """The verdict in words."""
    largest_over_median: float
    """Largest patch norm over the image's median, mean over images."""
    gap: float
    """Lower edge of the upper mode over upper edge of the normal mode; 1 where there is no gap."""
    threshold: float
    """Middle of the gap, in units of the image's median norm; NaN where there is no gap."""
    typical: float
    """Median norm of the tokens beyond the gap, in units of the image's median norm; NaN without a gap."""
    share_of_images: float
    """Share of images with a token beyond the gap."""
    share_of_patches: float
    """Share of patches beyond the gap."""
    more_images: int
    """How many more images like these would make the verdict "present" where these are too few; else 0."""

    @property
    def present(self) -> bool:
        """Whether the verdict is "present"."""
        return self.verdict == "present"

    @property
    def strength(self) -> tuple[int, float]:
        """What orders evidence from different places: present beats too few images beats absent, then the wider gap."""
        return ("absent", "too few images", "present").index(self.verdict), self.gap


def judge(
    counts: Int[np.ndarray, " bins"], largest_counts: Int[np.ndarray, " bins"], largest_over_median: float
) -> OutlierEvidence:
    """The verdict from histograms of relative patch norms.

    Args:
        counts: patches per bin of `bin_edges()`, over all images.
        largest_counts: images per bin of their largest patch.
        largest_over_median: mean over images, for the record.

    Example:
        >>> counts, largest = np.zeros(N_BINS, int), np.zeros(N_BINS, int)
        >>> counts[150], counts[270], largest[270] = 98, 2, 1     # 98 patches at the median, 2 at 11 times it
        >>> judge(counts, largest, 11.0).verdict
        'present'
    """
    edges, beyond = bin_edges(), np.append(counts[::-1].cumsum()[::-1], 0)
    images_beyond = np.append(largest_counts[::-1].cumsum()[::-1], 0)
    n_patches, n_images = max(int(beyond[0]), 1), max(int(images_beyond[0]), 1)
    low, high = np.arange(N_BINS + 1)[:, None], np.arange(N_BINS + 1)[None, :]
    inside = beyond[:, None] - beyond[None, :]
    # Every pair of bins may be the gap: above the median, some patches beyond it but not too many, in enough images,
    # and hardly any inside. Without the limits the widest gap would be that between the last two patches.
    candidate = (
        (edges[:, None] >= 1)
        & (high > low)
        & (beyond[None, :] > 0)
        & (beyond[None, :] <= MAX_PATCHES * n_patches)
        & (images_beyond[None, :] >= MIN_IMAGES * n_images)
        & (inside <= LEAK * beyond[None, :])
    )
    widths = np.where(candidate, edges[None, :] / edges[:, None], 1.0)
    start, stop = np.unravel_index(widths.argmax(), widths.shape)
    gap = float(widths[start, stop])
    if gap <= 1.0:
        return _absent("the norms form one mode", largest_over_median)
    cut = (start + stop) // 2  # bins are logarithmic: the middle bin is the geometric middle of the gap
    upper = counts[cut:]
    typical = float(edges[cut + int(np.searchsorted(upper.cumsum(), upper.sum() / 2))])
    numbers = {
        "largest_over_median": largest_over_median,
        "gap": gap,
        "threshold": float(edges[cut]),
        "typical": typical,
        "share_of_images": float(images_beyond[cut] / n_images),
        "share_of_patches": float(beyond[cut] / n_patches),
        "more_images": 0,
    }
    if gap < MIN_GAP or typical < MIN_TYPICAL:
        reason = f"the largest norms ({typical:.1f} x the median, gap {gap:.2f}) continue the others"
        return OutlierEvidence(verdict="absent", reason=reason, **numbers)
    surprise = _surprise(counts, int(start), int(stop))
    if surprise < MIN_SURPRISE:
        few = surprise >= MIN_HINT
        reason = (
            f"the norms beyond the widest gap ({typical:.1f} x the median, gap {gap:.2f}) are few enough to be the "
            f"tail of the others: {beyond[cut]} of {n_patches} patches"
        )
        # The surprise grows in proportion to the images.
        numbers["more_images"] = math.ceil(n_images * (MIN_SURPRISE / surprise - 1)) if few else 0
        return OutlierEvidence(verdict="too few images" if few else "absent", reason=reason, **numbers)
    reason = (
        f"{numbers['share_of_patches']:.1%} of patches, in {numbers['share_of_images']:.0%} of images, form a mode of "
        f"their own at {typical:.1f} x the median norm (gap {gap:.1f})"
    )
    return OutlierEvidence(verdict="present", reason=reason, **numbers)


RATIOS = ("histogram", "largest_histogram", "largest_over_median")
"""Names of the totals that `count_ratios` makes, in the order in which `judge_each` takes them."""


def count_ratios(norms: Float[Tensor, "place batch patch"]) -> dict[str, Tensor]:
    """Patch norms over their image's median, as totals that add up over batches and that `judge_each` takes."""
    relative = norms / medians(norms)
    largest = relative.amax(-1)
    return dict(zip(RATIOS, (count_bins(relative.flatten(1)), count_bins(largest), largest.sum(1)), strict=True))


def judge_each(
    histogram: Int[np.ndarray, "place bin"],
    largest_histogram: Int[np.ndarray, "place bin"],
    largest_over_median: Float[np.ndarray, " place"],
) -> tuple[OutlierEvidence, ...]:
    """The verdict at every place; arguments as `judge` takes them.

    Example:
        >>> import torch
        >>> counts = count_ratios(torch.cat([torch.ones(1, 8, 98), torch.full((1, 8, 2), 11.0)], 2))
        >>> [one.share_of_patches for one in judge_each(*(total.numpy() for total in counts.values()))]
        [0.02]
    """
    rows = zip(histogram, largest_histogram, largest_over_median, strict=True)
    return tuple(judge(counts, largest, float(ratio)) for counts, largest, ratio in rows)


def _surprise(counts: Int[np.ndarray, " bins"], start: int, stop: int) -> float:
    """-log of the chance (Chernoff's bound) that a tail which merely goes on leaves the bins start to stop so empty.

    The tail is the heaviest plausible one, a power law: beyond the median, log norms fall off exponentially, as fast as
    the patches between the median and the gap say (the maximum-likelihood spread, with those beyond it censored there).
    """
    log_edges = np.linspace(LOG_LOW, LOG_HIGH, N_BINS + 1)
    first = int(np.searchsorted(log_edges, 0.0))
    below, n, beyond = counts[first:start], int(counts[start:].sum()), int(counts[stop:].sum())
    excess = float(below @ log_edges[first + 1 : start + 1] + n * log_edges[start])
    spread = max(excess / max(int(below.sum()), 1), log_edges[1] - log_edges[0])
    share, expected = beyond / n, math.exp((log_edges[start] - log_edges[stop]) / spread)
    if share <= expected:
        return 0.0
    inside = (1 - share) * math.log((1 - share) / (1 - expected)) if share < 1 else 0.0
    return n * (share * math.log(share / expected) + inside)


def _absent(reason: str, largest_over_median: float) -> OutlierEvidence:
    nan = float("nan")
    return OutlierEvidence(
        verdict="absent",
        reason=reason,
        largest_over_median=largest_over_median,
        gap=1.0,
        threshold=nan,
        typical=nan,
        share_of_images=0.0,
        share_of_patches=0.0,
        more_images=0,
    )

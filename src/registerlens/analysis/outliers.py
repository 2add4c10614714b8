"""Are there outlier tokens? A verdict with its evidence, from histograms of patch norms.

A fixed cut-off does not carry over from model to model, and mean + 3 sigma flags something in every model. Outliers are
called present only where the norms, relative to each image's median, form a second mode: a gap of sparse values, with
enough patches beyond it, that had smaller norms earlier in the stream and keep these. `benchmarks/verdicts.py` has the
error rates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.stats.histograms import LOG_HIGH, LOG_LOW, N_BINS, bin_edges, count_bins, medians

MIN_GAP = 1.25
"""The outlier mode starts at least this many times above where the normal mode ends."""
MIN_TYPICAL, MIN_TYPICAL_OF_MANY = 2.0, 3.8
"""A typical (median) outlier has at least this many times the median norm; the second where outliers are many, since
foregrounds have 2.5 to 3.5 times, and at the embedding, which nothing comes before to compare with."""
MANY = 0.07
"""Beyond this share of patches outliers are many."""
MIN_RISE = 1.3
"""A typical outlier has at least this many times what as many patches had at some earlier place, since content is there
from the embedding on; and one of the places beside takes back less than that."""
MIN_IMAGES = 0.05
"""At least this share of images has an outlier; at least two images where there are several."""
MAX_PATCHES = 0.25
"""At most this share of patches are outliers; more would be a second kind of content."""
LEAK = 0.2
"""The gap counts as empty while it holds at most this many tokens per outlier."""
MIN_SURPRISE = 12.0
"""Were the outliers the normal mode's tail, a gap so empty would have a probability of at most e to minus this."""
MIN_HINT = 5.0
"""From this surprise on more images might show a mode; below, a gap is what the largest few of any norms have."""
TAILS = (10, 30, 100)
"""The tail is also measured on so many patches just below the gap, where it may be heavier than in all."""

_FIRST = round(-LOG_LOW / (LOG_HIGH - LOG_LOW) * N_BINS)
"""The bin that starts at the median: gaps are looked for from there on."""

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
    counts: Int[np.ndarray, " bin"],
    largest_counts: Int[np.ndarray, " bin"],
    largest_over_median: float,
    earlier: Sequence[Int[np.ndarray, " bin"]] | None = None,
    beside: Sequence[Int[np.ndarray, " bin"]] = (),
) -> OutlierEvidence:
    """The verdict from histograms of relative patch norms.

    Args:
        counts: patches per bin of `bin_edges()`, over all images.
        largest_counts: images per bin of their largest patch.
        largest_over_median: mean over images, for the record.
        earlier: `counts` at the places before; empty at the embedding, None where nothing is known of other places.
        beside: `counts` at the neighbouring places, at one of which the norms must be large too.

    Example:
        >>> counts, largest = np.zeros(N_BINS, int), np.zeros(N_BINS, int)
        >>> counts[150], counts[270], largest[270] = 98, 2, 1     # 98 patches at the median, 2 at 11 times it
        >>> judge(counts, largest, 11.0).verdict
        'present'
    """
    edges, beyond, images = bin_edges()[_FIRST:], _beyond(counts), _beyond(largest_counts)
    n_patches, n_images = max(int(counts.sum()), 1), max(int(largest_counts.sum()), 1)
    # For every cut: how large the norms beyond it are, and what as many patches have at the other places.
    share = beyond / n_patches
    typical = _reached(counts, share / 2)
    before = np.min([_reached(each, share / 2) for each in earlier], axis=0) if earlier else np.ones(len(edges))
    near = np.max([_reached(each, share / 2) for each in beside], axis=0) if beside else typical
    at_embedding = earlier is not None and not earlier
    floor = np.where((share > MANY) | at_embedding, MIN_TYPICAL_OF_MANY, MIN_TYPICAL)
    tall, rose, lasting = typical >= floor, typical >= MIN_RISE * before, near >= np.maximum(floor, typical / MIN_RISE)
    outlying = tall & rose & lasting
    # Every pair of bins may be the gap: above the median, some patches beyond it but not too many, in enough images,
    # and hardly any inside. Without the limits the widest gap would be that between the last two patches.
    start, stop = np.ogrid[: len(edges), : len(edges)]
    candidate = (
        (stop > start)
        & (beyond[stop] > 0)
        & (beyond[stop] <= MAX_PATCHES * n_patches)
        & (images[stop] >= MIN_IMAGES * n_images)
        & (beyond[start] - beyond[stop] <= LEAK * beyond[stop])
    )
    if not candidate.any():
        return _one_mode(largest_over_median)
    gaps, surprise = edges[stop] / edges[start], _surprise(beyond)
    mode = candidate & (gaps >= MIN_GAP) & outlying[(start + stop) // 2]
    enough = mode & (surprise >= MIN_SURPRISE) & (images[stop] >= min(2, n_images))
    hinted = mode & (surprise >= MIN_HINT)
    if enough.any():
        low, high = _best(gaps, enough)
    else:
        low, high = _best(surprise, hinted) if hinted.any() else _best(gaps, candidate)
    cut, gap = (low + high) // 2, float(gaps[low, high])  # bins are logarithmic: the geometric middle of the gap
    size, more = f"{typical[cut]:.1f} x the median, gap {gap:.2f}", 0
    patches = f"{beyond[cut]} of {n_patches} patches, in {images[cut]} of {n_images} images"
    verdict: Answer = "absent"
    if enough.any():
        verdict, reason = (
            "present",
            (
                f"{share[cut]:.1%} of patches, in {images[cut] / n_images:.0%} of images, form a mode of their own at "
                f"{typical[cut]:.1f} x the median norm (gap {gap:.1f})"
            ),
        )
    elif hinted.any():
        # The surprise grows in proportion to the images, and so does the number of those that have outliers.
        factor = max(MIN_SURPRISE / surprise[low, high], min(2, n_images) / images[high])
        verdict, more = "too few images", max(math.ceil(n_images * (factor - 1)), 1)
        reason = f"{patches}, lie beyond a gap ({size}), so few that they may be the tail of the others"
    elif gap < MIN_GAP:
        reason = f"the largest norms ({size}) continue the others"
    elif not tall[cut]:
        reason = f"the norms beyond the widest gap ({size}; {patches}) are lower than outliers, {floor[cut]} x"
    elif not rose[cut]:
        reason = f"as many norms as lie beyond the widest gap ({size}) were {before[cut]:.1f} x before: content"
    elif not lasting[cut]:
        reason = f"the norms beyond the widest gap ({size}) are {near[cut]:.1f} x next to here: they do not last"
    else:
        reason = f"the norms beyond the widest gap ({size}; {patches}) are few enough to be the tail of the others"
    return OutlierEvidence(
        verdict=verdict,
        reason=reason,
        largest_over_median=largest_over_median,
        gap=gap,
        threshold=float(edges[cut]),
        typical=float(typical[cut]),
        share_of_images=float(images[cut] / n_images),
        share_of_patches=float(share[cut]),
        more_images=more,
    )


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
    """The verdict at every place of the stream, from the embedding on, or at a single place; arguments as `judge`.

    Example:
        >>> import torch
        >>> counts = count_ratios(torch.cat([torch.ones(1, 8, 98), torch.full((1, 8, 2), 11.0)], 2))
        >>> [one.share_of_patches for one in judge_each(*(total.numpy() for total in counts.values()))]
        [0.02]
    """
    rows = list(zip(histogram, largest_histogram, map(float, largest_over_median), strict=True))
    if len(rows) == 1:
        return (judge(*rows[0]),)
    # The embedding is no neighbour: what attention makes of content, and the MLP after it takes back, is no outlier.
    beside = [[*histogram[max(i - 1, 1) : i], *histogram[i + 1 : i + 2]] for i in range(len(rows))]
    return tuple(judge(*row, earlier=list(histogram[:i]), beside=beside[i]) for i, row in enumerate(rows))


def _beyond(counts: Int[np.ndarray, " bin"]) -> Int[np.ndarray, " edge"]:
    """How many lie beyond each edge, from the median on."""
    return np.append(counts[::-1].cumsum()[::-1], 0)[_FIRST:]


def _reached(counts: Int[np.ndarray, " bin"], share: Float[np.ndarray, " cut"]) -> Float[np.ndarray, " cut"]:
    """The ratio that more than each share of the patches reach: the highest edge with so many beyond it."""
    beyond = _beyond(counts) / max(counts.sum(), 1)
    return bin_edges()[::-1][np.searchsorted(beyond[::-1], share, side="right").clip(max=len(beyond) - 1)]


def _best(values: Float[np.ndarray, "edge edge"], among: Bool[np.ndarray, "edge edge"]) -> tuple[int, int]:
    low, high = np.unravel_index(np.where(among, values, -np.inf).argmax(), values.shape)
    return int(low), int(high)


def _surprise(beyond: Int[np.ndarray, " edge"]) -> Float[np.ndarray, "edge edge"]:
    """-log of the chance (Chernoff's bound) that a tail which merely goes on leaves the bins start to stop so empty.

    The tail is the heaviest plausible one, a power law: log norms fall off exponentially, as fast as the patches
    between the median and the gap say, or those next to the gap where they say slower (the maximum-likelihood spread,
    with those beyond the gap censored at its start).
    """
    log_edges = np.linspace(LOG_LOW, LOG_HIGH, N_BINS + 1)[_FIRST:]
    below = beyond[0] - beyond
    sums = np.append(0, (np.diff(below) * log_edges[1:]).cumsum())
    spread = np.full(len(beyond), log_edges[1] - log_edges[0])
    for n in (beyond[0], *TAILS):
        first = (np.searchsorted(below, below - n, side="right") - 1).clip(min=0)
        tail = below - below[first]
        excess = sums - sums[first] - tail * log_edges[first] + beyond * (log_edges - log_edges[first])
        spread = np.maximum(spread, excess / np.maximum(tail, 1))
    share = np.minimum(beyond[None, :] / np.maximum(beyond[:, None], 1), 1)
    expected = np.exp(np.minimum(log_edges[:, None] - log_edges[None, :], 0) / spread[:, None])
    divergence = _relative_entropy(share, expected) + _relative_entropy(1 - share, 1 - expected)
    return beyond[:, None] * np.where(share > expected, divergence, 0.0)


def _relative_entropy(p: Float[np.ndarray, "*n"], q: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """p log(p / q), 0 where p is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0)


def _one_mode(largest_over_median: float) -> OutlierEvidence:
    nan = float("nan")
    return OutlierEvidence(
        verdict="absent",
        reason="the norms form one mode",
        largest_over_median=largest_over_median,
        gap=1.0,
        threshold=nan,
        typical=nan,
        share_of_images=0.0,
        share_of_patches=0.0,
        more_images=0,
    )

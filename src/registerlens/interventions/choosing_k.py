"""How many of the ranked neurons are register neurons: the elbow of their scores, and the paper's sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from registerlens.analysis.detection import Cutoff
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import NormsAndActivations
from registerlens.engine.stream import run_until_seen
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.model.sublayers import Sublayer
from registerlens.model.vit import HookedViT

Cuts = Mapping[Sublayer, Cutoff]
"""Above which norm a patch is an outlier, at each place that has outliers."""

FLOOR = 0.05
"""Scores below this share of the highest count as equal where the elbow is sought: near zero any drop is large."""
MIN_DROP = 1.5
"""A smaller relative drop of the sorted scores is no elbow."""
MOST = 1024
"""The elbow and the sweep consider at most this many neurons."""


def find_elbow(scores: Sequence[float]) -> int | None:
    """After how many of the sorted scores the largest relative drop comes; None where no drop stands out.

    Source: Jiang et al. 2025, A.4 names the sweep; the elbow is ours.

    Scores below 5% of the highest count as 5%: among the many scores near zero, ratios mean nothing. The released
    scores of DINOv2-L's neurons drop by a factor of 1.08 at most: there a place would be one of hundreds.

    Example:
        >>> find_elbow([124.0, 114.0, 107.0, 59.0, 42.0, 38.0, 23.0, 1.9, 1.5, 0.01])
        7
        >>> find_elbow([29.4, 29.3, 28.1, 26.0, 25.1])
    """
    top = np.asarray(scores[: MOST + 1], dtype=float)
    if len(top) < 2 or top[0] <= 0:
        return None
    top = np.maximum(top, FLOOR * top[0])
    drops = top[:-1] / top[1:]
    return int(drops.argmax()) + 1 if drops.max() >= MIN_DROP else None


@dataclass(frozen=True)
class Tried:
    """What was left of outliers by how many neurons."""

    k: int | None
    """The fewest that leave no outlier; None where no number tried did, or there was no sweep."""
    curve: tuple[tuple[int, float], ...]
    """(number of neurons, outliers per image left), 0 neurons first."""
    note: str
    """What happened, in words."""

    @property
    def best(self) -> int:
        """The fewest of those tried that leave the fewest outliers."""
        return min(self.curve, key=lambda point: (point[1], point[0]), default=(0, 0.0))[0]


def sweep(vit: HookedViT, held_out: list[Tensor], ranked: list[tuple[int, int, float]], cuts: Cuts) -> Tried:
    """The fewest neurons whose test-time register leaves no outlier anywhere, by doubling and bisection."""
    if not held_out:
        return Tried(None, (), "no images were held back for a sweep")
    curve: dict[int, float] = {0: outliers_left(vit, held_out, [], cuts)}
    if not curve[0]:
        return Tried(None, ((0, 0.0),), "the held-out images have no outlier, so that there was nothing to sweep for")

    def left(k: int) -> float:
        if k not in curve:
            curve[k] = outliers_left(vit, held_out, ranked[:k], cuts)
        return curve[k]

    most = min(MOST, len(ranked))
    high = 1
    while left(high) and high < most:
        high = min(2 * high, most)
    if left(high):
        note = f"no number of neurons up to {most} leaves no outlier ({curve[high]:.2f} per image left)"
        return Tried(None, tuple(sorted(curve.items())), note)
    low = high // 2  # known to leave some, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) else (low, middle)
    return Tried(high, tuple(sorted(curve.items())), f"from {high} neurons on, no outlier is left")


def drop_needless(
    vit: HookedViT, held_out: list[Tensor], taken: list[tuple[int, int, float]], n: int, cuts: Cuts
) -> list[tuple[int, int, float]]:
    """The first `n` neurons, and of the others those without which more outliers would be left."""
    fewest = outliers_left(vit, held_out, taken, cuts)
    for neuron in taken[: n - 1 : -1]:
        without = [one for one in taken if one is not neuron]
        if outliers_left(vit, held_out, without, cuts) <= fewest:
            taken = without
    return taken


def outliers_left(vit: HookedViT, batches: list[Tensor], ranked: Sequence[tuple[int, int, float]], cuts: Cuts) -> float:
    """Patches per image that are outliers at any of these places once these neurons are shifted to a register."""
    neurons = RegisterNeurons.from_pairs([(layer, n) for layer, n, _ in ranked])
    total = 0
    with torch.inference_mode(), vit.edit(TestTimeRegisters(neurons, n=1 if ranked else 0)):
        for batch in batches:
            seen = NormsAndActivations(vit, vit.layout(batch), (), list(cuts))
            run_until_seen(vit, batch.to(vit.device), seen.hooks)
            beyond = [cutoff.above(seen.norms(place)) for place, cutoff in cuts.items()]
            total += int(torch.stack(beyond).any(0).sum())
    return total / sum(map(len, batches))

"""How many of the ranked neurons are register neurons: the elbow of their scores, and the paper's sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from registerlens.analysis.detection import Detection, patch_norms
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.model.vit import HookedViT

FLOOR = 0.05
"""Scores below this share of the highest count as equal where the elbow is sought: near zero any drop is large."""
MOST = 1024
"""The elbow and the sweep consider at most this many neurons."""


def find_elbow(scores: Sequence[float]) -> int:
    """After how many of the sorted scores the largest relative drop comes.

    Source: Jiang et al. 2025, A.4 names the sweep; the elbow is ours.

    Scores below 5% of the highest count as 5%: among the many scores near zero, ratios mean nothing.

    Example:
        >>> find_elbow([124.0, 114.0, 107.0, 59.0, 42.0, 38.0, 23.0, 1.9, 1.5, 0.01])
        7
    """
    top = np.asarray(scores[: MOST + 1], dtype=float)
    if len(top) < 2 or top[0] <= 0:
        return 1
    top = np.maximum(top, FLOOR * top[0])
    return int((top[:-1] / top[1:]).argmax()) + 1


@dataclass(frozen=True)
class Tried:
    """What was left of outliers by how many neurons."""

    k: int | None
    """The fewest that leave no outlier; None where no number tried did, or there was no sweep."""
    curve: tuple[tuple[int, float], ...]
    """(number of neurons, outliers per image left), 0 neurons first."""
    note: str
    """What happened, in words."""


def sweep(vit: HookedViT, held_out: list[Tensor], ranked: list[tuple[int, int, float]], detection: Detection) -> Tried:
    """The fewest neurons whose test-time register leaves no outlier, by doubling and bisection."""
    if not held_out:
        return Tried(None, (), "no images were held back for a sweep")
    curve: dict[int, float] = {0: outliers_left(vit, held_out, [], detection)}
    if not curve[0]:
        return Tried(None, ((0, 0.0),), "the held-out images have no outlier, so that there was nothing to sweep for")

    def left(k: int) -> float:
        if k not in curve:
            curve[k] = outliers_left(vit, held_out, ranked[:k], detection)
        return curve[k]

    most = min(MOST, len(ranked))
    high = 1
    while left(high) and high < most:
        high = min(2 * high, most)
    if left(high):
        note = f"the sweep found no number up to {most} that leaves no outlier ({curve[high]:.2f} per image left)"
        return Tried(None, tuple(sorted(curve.items())), note)
    low = high // 2  # known to leave some, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) else (low, middle)
    return Tried(high, tuple(sorted(curve.items())), f"from {high} neurons on, no outlier is left")


def outliers_left(
    vit: HookedViT, batches: list[Tensor], ranked: Sequence[tuple[int, int, float]], detection: Detection
) -> float:
    """Outlier patches per image once these neurons are shifted to a test-time register."""
    # Neurons after the place of detection change nothing there.
    neurons = RegisterNeurons.from_pairs([(layer, n) for layer, n, _ in ranked if layer <= detection.layer])
    total = 0
    with torch.inference_mode():
        for batch in batches:
            with vit.edit(TestTimeRegisters(neurons, n=1 if ranked else 0)):
                total += int(detection.cutoff.above(patch_norms(vit, batch, detection.sublayer)).sum())
    return total / sum(map(len, batches))

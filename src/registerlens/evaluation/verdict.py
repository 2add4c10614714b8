"""The verdict on an intervention, in words: it worked, it worked in part, or it did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float

GONE = 0.05
"""Outliers count as gone when at most this share of them is left, and as placed when at most this share is missing."""
SPECIFIC = 0.5
"""A random-neuron control must leave at least this share of the outliers, or the effect is not the neurons'."""
TAKEN = 0.5
"""The register has taken over when it draws at least this share of the attention that outliers drew."""
KEPT = 0.95
"""Below this cosine to the clean run, the output has changed."""


class ConditionKind(StrEnum):
    """What a condition is there for."""

    CLEAN = "clean"
    """The unedited model."""
    TESTED = "tested"
    """An intervention in question."""
    BASELINE = "baseline"
    """Another edit for the same purpose, to compare with."""
    CONTROL = "control"
    """The same edit on other neurons, which must do nothing."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an intervention did what it should."""

    worked: bool | None
    """Outliers are gone from where they were and appear nowhere unasked, the output is kept, random neurons do nothing
    of the kind, and the test-time register or attention bias, if there is one, has taken over. None for an ablation,
    which is an experiment, not a remedy."""
    words: str
    """The same with numbers, and what else a reader should know."""


def judge_effect(
    metrics: Sequence[str],
    values: Float[np.ndarray, "condition metric image"],
    kinds: Mapping[str, ConditionKind],
    name: str,
    ablation: bool = False,
) -> Verdict:
    """The verdict on one condition.

    Args:
        metrics, values: as in `Evaluation`.
        kinds: of the conditions by their names, in the order of `values`.
        name: of the condition to judge.
        ablation: whether it is an ablation, whose effect is told without praise or blame.

    Example:
        >>> metrics = ["outliers", "old_outliers", "new_outliers", "sink_outliers", "sink_elsewhere"]
        >>> clean, after = [[2.0], [2.0], [0.0], [0.9], [0.1]], [[2.0], [2.0], [0.0], [0.9], [0.1]]
        >>> kinds = {"clean": ConditionKind.CLEAN, "mine": ConditionKind.TESTED}
        >>> judge_effect(metrics, np.array([clean, after]), kinds, "mine").worked
        False
    """

    conditions = list(kinds)
    clean = conditions[list(kinds.values()).index(ConditionKind.CLEAN)]

    def mean(metric: str, condition: str = name) -> float:
        if metric not in metrics:
            return float("nan")
        row = values[conditions.index(condition), metrics.index(metric)]
        return float(np.nanmean(row)) if np.isfinite(row).any() else float("nan")

    before = mean("outliers", clean)
    if not before:
        return Verdict(worked=False, words="Nothing to tell: the clean model has no outlier on these images.")
    gone = mean("old_outliers") <= GONE * before
    handed = mean("new_outliers") > GONE * before
    missing = mean("placed") < 1 - GONE
    left = [mean("old_outliers", one) / before for one, kind in kinds.items() if kind is ConditionKind.CONTROL]
    weakest = min(left, default=float("nan"))
    unspecific = weakest < SPECIFIC
    took = mean("sink_register")
    drawn = mean("sink_outliers", clean)
    idle = took < TAKEN * drawn
    elsewhere = mean("sink_elsewhere")
    sink_moved = elsewhere > max(2 * mean("sink_elsewhere", clean), TAKEN * drawn)
    cosine = mean("cos_cls") if np.isfinite(mean("cos_cls")) else mean("cos_normal")
    changed = cosine < KEPT
    worked = gone and not (handed or missing or unspecific or idle or sink_moved or changed)
    parts = [f"outliers per image at their old places {before:.2f} -> {mean('old_outliers'):.2f}"]
    if np.isfinite(mean("placed")):
        parts.append(f"{mean('placed'):.0%} of the patches aimed at have become outliers")
    if mean("new_outliers") > 0:
        parts.append(f"{mean('new_outliers'):.2f} per image at other patches" + (" (handed off)" if handed else ""))
    if np.isfinite(took):
        norm = f" at {mean('register_norm'):.1f} x the median norm" if np.isfinite(mean("register_norm")) else ""
        parts.append(f"the extra key draws {took:.0%} of the attention{norm} (outliers drew {drawn:.0%})")
    if sink_moved:
        parts.append(f"a new sink has appeared at another patch ({elsewhere:.0%} of the attention)")
    if np.isfinite(cosine):
        what = "[CLS]" if np.isfinite(mean("cos_cls")) else "normal patches"
        parts.append(f"cosine of {what} to the clean run {cosine:.3f}" + (" (the output changed)" if changed else ""))
    if np.isfinite(mean("accuracy")):
        parts.append(f"accuracy {mean('accuracy', clean):.1%} -> {mean('accuracy'):.1%}")
    if left:
        doing = "random neurons do it too" if unspecific else "random neurons do not"
        parts.append(f"{doing} (at least {weakest:.0%} of the outliers stay)")
    if ablation:
        return Verdict(worked=None, words=f"Effect: {'; '.join(parts)}.")
    head = "Worked" if worked else "Worked in part" if gone and not unspecific else "Did not work"
    return Verdict(worked=bool(worked), words=f"{head}: {'; '.join(parts)}.")

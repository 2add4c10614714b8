"""Controls: what must do nothing, or do worse, if an edit means what it seems to; and the verdict that weighs them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.detection import Detection
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.outliers import OutlierEvidence
from registerlens.data.batches import Images
from registerlens.engine.stream import MeansAt, stream
from registerlens.errors import InterventionError
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Intervention, neurons_of
from registerlens.interventions.interpolation import InterpolateOutliers
from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
from registerlens.model.vit import HookedViT

DRAWS = 3
"""Draws of each kind of random neurons."""
NEAREST = 10
"""An activation-matched neuron is drawn from this many of nearest activation."""

Activity = dict[int, Float[Tensor, " neuron"]]
"""For each layer, how active its neurons get: the maximum over an image's tokens, mean over images."""


def with_neurons(intervention: Intervention, neurons: RegisterNeurons) -> Intervention:
    """The same intervention on other neurons.

    Raises:
        InterventionError: it is not about neurons, or its reference belongs to the old ones.

    Example:
        >>> first, other = (RegisterNeurons.from_pairs([(1, n)]) for n in (3, 4))
        >>> with_neurons(TestTimeRegisters(first), other).neurons.pairs
        ((1, 4),)
    """
    names = {item.name for item in fields(intervention)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {name: None for name in ("maxima_of", "fitted") if name in names}
    if neurons_of(intervention) is None:
        raise InterventionError(f"{type(intervention).__name__} is not about neurons.")
    if isinstance(intervention, AttentionBias) or getattr(intervention, "reference", None) is not None:
        raise InterventionError(f"This {type(intervention).__name__} was fitted for its own neurons; fit another one.")
    return replace(intervention, **{"neurons" if "neurons" in names else "target": neurons}, **changes)  # type: ignore[type-var]


def random_neurons(neurons: RegisterNeurons, d_mlp: int, generator: torch.Generator) -> RegisterNeurons:
    """As many neurons in each layer, none of them a register neuron.

    Raises:
        InterventionError: a layer has too few others.

    Example:
        >>> chosen = random_neurons(RegisterNeurons.from_pairs([(1, 0), (1, 1)]), 4, torch.Generator().manual_seed(0))
        >>> sorted(chosen.pairs)
        [(1, 2), (1, 3)]
    """

    def draw(layer: int, listed: tuple[int, ...]) -> list[int]:
        others = torch.tensor(sorted(set(range(d_mlp)) - set(listed)))
        return others[torch.randperm(len(others), generator=generator)[: len(listed)]].tolist()

    return _drawn(neurons, d_mlp, draw, "random neurons")


def matched_neurons(neurons: RegisterNeurons, activity: Activity, generator: torch.Generator) -> RegisterNeurons:
    """For each register neuron another of its layer that gets about as active, drawn from the ten nearest.

    Example:
        >>> activity = {1: torch.tensor([9.0, 8.0, 0.0, 0.1])}
        >>> matched_neurons(RegisterNeurons.from_pairs([(1, 0)]), activity, torch.Generator().manual_seed(0)).by_layer()
        {1: (2,)}
    """

    def draw(layer: int, listed: tuple[int, ...]) -> list[int]:
        taken = set(listed)
        chosen = []
        for neuron in listed:
            distance = (activity[layer] - activity[layer][neuron]).abs()
            near = [other for other in distance.argsort(stable=True).tolist() if other not in taken][:NEAREST]
            chosen.append(near[int(torch.randint(len(near), (), generator=generator))])
            taken.add(chosen[-1])
        return chosen

    d_mlp = min((len(row) for row in activity.values()), default=0)
    return _drawn(neurons, d_mlp, draw, "activation-matched random neurons")


def _drawn(
    neurons: RegisterNeurons, d_mlp: int, draw: Callable[[int, tuple[int, ...]], list[int]], source: str
) -> RegisterNeurons:
    pairs = []
    for layer, listed in neurons.by_layer().items():
        if 2 * len(listed) > d_mlp:
            raise InterventionError(
                f"Layer {layer} has {d_mlp} neurons, {len(listed)} of them listed: too few others for a random "
                f"control. Pass controls=False."
            )
        pairs += [(layer, neuron) for neuron in draw(layer, listed)]
    return RegisterNeurons.from_pairs(pairs, source)


def neuron_activity(vit: HookedViT, images: Images, layers: list[int], batch_size: int = 16) -> Activity:
    """How active every neuron of some layers gets: the maximum over an image's tokens, mean over images.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neuron_activity(vit, torch.rand(2, 3, 48, 48), [1])[1].shape
        torch.Size([256])
    """
    if not layers:
        return {}
    points = {layer: f"blocks.{layer}.mlp.hook_post" for layer in layers}
    largest = MeansAt(list(points.values()), lambda post, layout: post.amax(1))
    [means] = stream(vit, images, [largest], batch_size=batch_size, description="measuring activity")
    return {layer: means[point] for layer, point in points.items()}


def build_baselines(
    vit: HookedViT, images: Images, intervention: Intervention, neighbours_at: Detection | None, batch_size: int
) -> dict[str, Intervention]:
    """Other edits against the same outliers, by name: the neurons ablated, the outliers overwritten.

    Args:
        vit: the model.
        images: from which means are taken.
        intervention: what is tested.
        neighbours_at: where outliers are overwritten by their neighbours; None leaves that out.
        batch_size: images at once when a tensor is given.
    """
    baselines: dict[str, Intervention] = {}
    neurons = neurons_of(intervention)
    if neurons is not None and len(neurons):
        itself = intervention.mode if isinstance(intervention, Ablate) else ""
        if itself != "zero":
            baselines["zeroed"] = Ablate(neurons)
        if itself != "mean":
            baselines["mean"] = Ablate.fit(vit, images, neurons, "mean", batch_size=batch_size)
    if neighbours_at is not None:
        baselines["neighbours"] = InterpolateOutliers.at(neighbours_at)
    return baselines


def build_controls(
    vit: HookedViT, images: Images, intervention: Intervention, seed: int, batch_size: int
) -> dict[str, Intervention]:
    """The same intervention on random neurons of the same layers, by name; nothing if it is not about neurons.

    Args:
        vit: the model.
        images: from which activities are taken.
        intervention: what is tested.
        seed: of the random neurons.
        batch_size: images at once when a tensor is given.
    """
    neurons = neurons_of(intervention)
    if neurons is None or not len(neurons):
        return {}
    generator = torch.Generator().manual_seed(seed)
    activity = neuron_activity(vit, images, list(neurons.by_layer()), batch_size)
    sets = {f"random {i}": random_neurons(neurons, vit.cfg.d_mlp, generator) for i in range(1, DRAWS + 1)}
    sets |= {f"matched {i}": matched_neurons(neurons, activity, generator) for i in range(1, DRAWS + 1)}
    controls = {name: _same_on(vit, images, intervention, other, batch_size) for name, other in sets.items()}
    if isinstance(intervention, MoveOutliers | TestTimeRegisters):
        other = random_neurons(neurons, vit.cfg.d_mlp, generator)
        controls["random, copied maxima"] = replace(intervention, neurons=other, maxima_of=neurons)
    return controls


def _same_on(
    vit: HookedViT, images: Images, intervention: Intervention, neurons: RegisterNeurons, batch_size: int
) -> Intervention:
    if isinstance(intervention, Ablate) and intervention.reference is not None:
        return Ablate.fit(vit, images, neurons, intervention.mode, seed=intervention.seed, batch_size=batch_size)
    if isinstance(intervention, AttentionBias):
        return AttentionBias.fit(vit, images, neurons, batch_size=batch_size)
    return with_neurons(intervention, neurons)


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
    """Outliers are gone from where they were and appear nowhere unasked, at no sublayer, the output is kept, random
    neurons do nothing of the kind, and the test-time register or attention bias, if there is one, has taken over. None
    for an ablation, which is an experiment, not a remedy."""
    words: str
    """The same with numbers, and what else a reader should know."""
    left: tuple[str, ...] = ()
    """Sublayers at which the edited model has outliers, old or new, that nobody asked for."""


def judge_effect(
    metrics: Sequence[str],
    values: Float[np.ndarray, "condition metric image"],
    kinds: Mapping[str, ConditionKind],
    name: str,
    evidence: Mapping[str, OutlierEvidence] | None = None,
    ablation: bool = False,
) -> Verdict:
    """The verdict on one condition.

    Args:
        metrics, values: as in `Evaluation`.
        kinds: of the conditions by their names, in the order of `values`.
        name: of the condition to judge.
        evidence: what the norms of the edited model say at each sublayer, patches aimed at left out.
        ablation: whether it is an ablation, whose effect is stated without judging it.

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
    attention = mean("sink_outliers", clean)
    idle = took < TAKEN * attention
    elsewhere = mean("sink_elsewhere")
    sink_moved = elsewhere > max(2 * mean("sink_elsewhere", clean), TAKEN * attention)
    cosine = mean("cos_cls") if np.isfinite(mean("cos_cls")) else mean("cos_normal")
    changed = cosine < KEPT
    at = {place: found for place, found in (evidence or {}).items() if found.present}
    worked = gone and not (at or handed or missing or unspecific or idle or sink_moved or changed)
    parts = [f"outliers per image at their old places {before:.2f} -> {mean('old_outliers'):.2f}"]
    if np.isfinite(mean("placed")):
        parts.append(f"{mean('placed'):.0%} of the patches aimed at have become outliers")
    if mean("new_outliers") > 0:
        parts.append(f"{mean('new_outliers'):.2f} per image at other patches" + (" (handed off)" if handed else ""))
    if at:
        most = max(at, key=lambda place: at[place].typical)
        parts.append(
            f"outliers are left or new from {next(iter(at))} on, {at[most].typical:.1f} x the median at {most}"
        )
    if np.isfinite(took):
        norm = f" at {mean('register_norm'):.1f} x the median norm" if np.isfinite(mean("register_norm")) else ""
        parts.append(f"the extra key draws {took:.0%} of the attention{norm} (outliers drew {attention:.0%})")
    if sink_moved:
        parts.append(f"a new sink has appeared at another patch ({elsewhere:.0%} of the attention)")
    if np.isfinite(cosine):
        what = "[CLS]" if np.isfinite(mean("cos_cls")) else "normal patches"
        parts.append(f"cosine of {what} to the clean run {cosine:.3f}" + (" (the output changed)" if changed else ""))
    if np.isfinite(mean("accuracy")):
        parts.append(f"accuracy {mean('accuracy', clean):.1%} -> {mean('accuracy'):.1%}")
    if left:
        doing = "random neurons do it too" if unspecific else "random neurons do not"
        lost = f"at most {1 - weakest:.0%}" if weakest < 1 else "none"
        parts.append(f"{doing}: the same edit of them takes away {lost} of the outliers")
    controls = [mean("sink_register", one) for one, kind in kinds.items() if kind is ConditionKind.CONTROL]
    if np.isfinite(took) and (most := max(controls, default=0.0)) >= TAKEN * took > 0:
        parts.append(
            f"a register of random neurons draws up to {most:.0%} of the attention, so that this alone proves nothing"
        )
    if ablation:
        return Verdict(worked=None, words=f"Effect: {'; '.join(parts)}.", left=tuple(at))
    head = "Worked" if worked else "Worked in part" if gone and not unspecific else "Did not work"
    return Verdict(worked=bool(worked), words=f"{head}: {'; '.join(parts)}.", left=tuple(at))

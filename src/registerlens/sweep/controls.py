"""Matched controls: the same edit on other neurons of the same layers, beside every condition that is about neurons."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.data.batches import Images
from registerlens.errors import ConfigError, ImageError, InterventionError
from registerlens.evaluation.controls import DRAWS, Activity, neuron_activity, with_neurons
from registerlens.interventions.base import Intervention, neurons_of
from registerlens.model.vit import HookedViT
from registerlens.sweep.axes import matched_sets, random_sets
from registerlens.sweep.conditions import Condition, content_hash
from registerlens.sweep.grid import Conditions, by_name, each_of

Kind = Literal["random", "matched"]
CONTROL = "control"
"""The factor that tells controls apart."""


def with_controls(
    vit: HookedViT | Mapping[str, HookedViT],
    conditions: Conditions,
    *,
    images: Images | Mapping[str, Images] | None = None,
    n: int = DRAWS,
    kinds: Sequence[Kind] = get_args(Kind),
    seed: int = 0,
    batch_size: int = 16,
) -> Conditions:
    """The conditions, each followed by its controls: the same edit on neurons that are not those it is about.

    A control has its condition's factors, one more named "control" ("random 1", "matched 1" and so on), and
    `control_of`, its condition's key. Which neurons are drawn depends on the condition's neurons and the seed alone:
    the same set in several modes or doses has the same controls, and conditions that are added later change none.

    Args:
        vit: the model, or the models by the names that conditions use.
        conditions: those about heads or tokens, the clean one and controls stay as they are.
        images: on which activity is measured, for "matched"; or those of each model by its name.
        n: draws of each kind.
        kinds: "random": any other neurons of the same layers; "matched": such that get about as active.
        seed: of the draws.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: an unknown kind, n below 1, no images for "matched", or a condition about another model.
        InterventionError: no condition is about neurons, a layer has too few others, or an edit was fitted for its
            own neurons only.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.sweep.grid import grid
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
        >>> every = with_controls(vit, grid(rl.Ablate, target={"both": neurons}), images=torch.rand(4, 3, 48, 48), n=1)
        >>> every.labels
        ('target=both', 'target=both control=random 1', 'target=both control=matched 1')
    """
    if wrong := [kind for kind in kinds if kind not in get_args(Kind)]:
        raise ConfigError(f"There are {list(get_args(Kind))} controls, not {wrong[0]!r}.")
    models = by_name(vit)
    wanting = [
        condition for condition in conditions if not condition.control_of and any(map(_about, condition.interventions))
    ]
    if not wanting:
        raise InterventionError(
            "No condition is about neurons, so that none has random neurons for a control."
            " Run them without with_controls."
        )
    if unknown := [condition.model for condition in wanting if condition.model not in models]:
        raise ConfigError(f"A condition is about the model {unknown[0]!r}; there are {list(models)}.")
    activities = _activities(models, images, wanting, batch_size) if "matched" in kinds else {}
    listed: list[Condition] = []
    for condition in conditions:
        listed.append(condition)
        if any(condition is other for other in wanting):
            activity = activities.get(condition.model, {})
            listed += _controls(condition, models[condition.model], activity, n, kinds, seed)
    return Conditions(tuple(listed))


def _controls(
    condition: Condition, vit: HookedViT, activity: Activity, n: int, kinds: Sequence[Kind], seed: int
) -> list[Condition]:
    sets: dict[tuple, dict[str, RegisterNeurons]] = {}
    try:
        for neurons in filter(None, map(_about, condition.interventions)):
            own = int(content_hash([neurons, seed]), 16) % 2**63
            alternatives = sets.setdefault(neurons.pairs, {})
            if "random" in kinds:
                alternatives |= random_sets(neurons, n, vit.cfg.d_mlp, own)
            if "matched" in kinds:
                alternatives |= matched_sets(neurons, n, activity, own)
        names = next(iter(sets.values()))
        return [
            replace(
                condition,
                interventions=tuple(_elsewhere(edit, sets, name) for edit in condition.interventions),
                factors={**condition.factors, CONTROL: name},
                control_of=condition.key,
            )
            for name in names
        ]
    except InterventionError as error:
        raise InterventionError(
            f"'{condition.label}' cannot have controls: {error}"
            " Add it to the others without controls: with_controls(vit, others, ...) + it."
        ) from error


def _about(intervention: Intervention) -> RegisterNeurons | None:
    """The neurons an intervention is about; None where there are none."""
    return neurons_of(intervention) or None


def _elsewhere(
    intervention: Intervention, sets: Mapping[tuple, Mapping[str, RegisterNeurons]], name: str
) -> Intervention:
    neurons = _about(intervention)
    return intervention if neurons is None else with_neurons(intervention, sets[neurons.pairs][name])


def _activities(
    models: Mapping[str, HookedViT],
    images: Images | Mapping[str, Images] | None,
    wanting: Sequence[Condition],
    batch_size: int,
) -> dict[str, Activity]:
    """Activity of the layers that conditions of each model are about."""
    if images is None:
        raise ConfigError('Matched controls need images on which activity is measured; or take kinds=("random",).')
    layers: dict[str, set[int]] = {}
    for condition in wanting:
        for neurons in filter(None, map(_about, condition.interventions)):
            layers.setdefault(condition.model, set()).update(neurons.check(models[condition.model].cfg).by_layer())
    measured_on = each_of(layers, images)
    if len(measured_on) > 1 and isinstance(images, Iterator):
        raise ImageError("An iterator of images lasts for one model; give a tensor or a list of batches.")
    return {
        name: neuron_activity(models[name], measured_on[name], sorted(listed), batch_size)
        for name, listed in layers.items()
    }

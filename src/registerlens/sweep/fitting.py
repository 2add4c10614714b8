"""Fit every planned edit of a sweep: all ablations of a model in one streaming pass over the reference images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from torch import Tensor

from registerlens.data.batches import Images
from registerlens.errors import ConfigError, ImageError
from registerlens.interventions.ablation import NEEDS_BANK, Ablate, Fitter, Reference, fit_references
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.targets import Part, parts_of
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition
from registerlens.sweep.grid import Conditions, by_name, each_of
from registerlens.sweep.planned import Planned, PlannedAblation, PlannedBias


def unfitted(conditions: Iterable[Condition]) -> tuple[Planned, ...]:
    """The interventions that are still to be fitted, each once, in order of appearance.

    Example:
        >>> from registerlens.interventions.targets import Heads
        >>> unfitted([Condition(interventions=(PlannedAblation(Heads([(2, 0)]), "mean"),))] * 2)
        (PlannedAblation(target=Heads(pairs=((2, 0),)), mode='mean', seed=0),)
    """
    every = chain.from_iterable(condition.interventions for condition in conditions)
    return tuple(dict.fromkeys(one for one in every if isinstance(one, Planned) and one.fitted is None))


def n_passes(conditions: Iterable[Condition]) -> int:
    """How many times the reference images go through the model: once for all ablations, once for each attention bias.

    Example:
        >>> n_passes([Condition()])
        0
    """
    waiting = unfitted(conditions)
    n_biases = sum(isinstance(one, PlannedBias) for one in waiting)
    return n_biases + any(isinstance(one, PlannedAblation) for one in waiting)


def fit_planned(
    vit: HookedViT, planned: Sequence[Planned], images: Images, batch_size: int = 16
) -> dict[Planned, Planned]:
    """Each planned edit, fitted: all ablations in one streaming pass, every attention bias in one of its own.

    An ablation comes out as `rl.Ablate.fit` would have made it on its own. What "shuffle" and "resample" draw from
    stays in memory: 32 images' activations of each ablated neuron, head or token.

    Args:
        vit: the model, unedited.
        planned: what is to be fitted; other planned edits are not looked at.
        images: preprocessed, as a tensor or in batches. An iterator that is used up does for ablations alone.
        batch_size: images at once when a tensor is given.

    Raises:
        ImageError: there are no images, or an iterator does not last for all passes.
        InterventionError: the model has not what is to be edited.
        ShapeError: the images differ in size where a mode needs one.
    """
    ablations = [one for one in planned if isinstance(one, PlannedAblation)]
    biases = [one for one in planned if isinstance(one, PlannedBias)]
    if len(biases) + bool(ablations) > 1 and isinstance(images, Iterator):
        raise ImageError(
            f"{len(biases) + bool(ablations)} passes over the reference images are needed, but an iterator lasts for "
            f"one. Give a tensor, a list of batches or rl.load_images(...)."
        )
    fitted: dict[Planned, Planned] = {}
    if ablations:
        references = _fit_together(vit, ablations, images, batch_size)
        for one, reference in zip(ablations, references, strict=True):
            fitted[one] = replace(one, fitted=Ablate(one.target, one.mode, reference=reference, seed=one.seed))
    for one in biases:
        fitted[one] = replace(one, fitted=AttentionBias.fit(vit, one.neurons, images, batch_size=batch_size))
    return fitted


def fit_conditions(
    vit: HookedViT | Mapping[str, HookedViT],
    conditions: Iterable[Condition],
    images: Images | Mapping[str, Images],
    *,
    batch_size: int = 16,
) -> Conditions:
    """The same conditions with every planned edit fitted, on the unedited model; keys, labels and order stay.

    One pass over the reference images for all ablations of a model, and one more for each attention bias.

    Args:
        vit: the model, or the models by the names that conditions use.
        conditions: some of them may be fitted already.
        images: reference images, preprocessed, as a tensor or in batches; or those of each model by its name.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: a condition names another model.
        ImageError: there are no images, or an iterator does not last for all passes.
        InterventionError: a model has not what is to be edited.
        ShapeError: the images differ in size where a mode needs one.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.sweep.grid import grid
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> conditions = grid(rl.Ablate, target=[rl.Heads([(2, 0)]), rl.Heads([(4, 0)])], mode=["zero", "mean"])
        >>> bound = fit_conditions(vit, conditions, torch.rand(4, 3, 48, 48))
        >>> bound.keys == conditions.keys, len(unfitted(conditions)), len(unfitted(bound))
        (True, 2, 0)
    """
    conditions = tuple(conditions)
    models = by_name(vit)
    waiting = {
        name: unfitted(condition for condition in conditions if condition.model == name)
        for name in dict.fromkeys(condition.model for condition in conditions)
    }
    if unknown := [name for name in waiting if name not in models]:
        raise ConfigError(f"A condition is about the model {unknown[0]!r}; there are {list(models)}.")
    seen = each_of((name for name, planned in waiting.items() if planned), images)
    if len(seen) > 1 and isinstance(images, Iterator):
        raise ImageError("An iterator of reference images lasts for one model; give a tensor or a list of batches.")
    fitted = {name: fit_planned(models[name], waiting[name], mine, batch_size) for name, mine in seen.items()}
    return Conditions(tuple(bind(condition, fitted.get(condition.model, {})) for condition in conditions))


def bind(condition: Condition, fitted: Mapping[Planned, Planned]) -> Condition:
    """The condition with its planned edits replaced by the fitted ones; it keeps its key.

    Example:
        >>> bind(Condition(factors={"layer": 1}), {}).factors
        {'layer': 1}
    """
    if not any(isinstance(one, Planned) and one.fitted is None for one in condition.interventions):
        return condition
    edits = tuple(fitted.get(one, one) if isinstance(one, Planned) else one for one in condition.interventions)
    return replace(condition, interventions=edits)


def _fit_together(
    vit: HookedViT, ablations: Sequence[PlannedAblation], images: Images, batch_size: int
) -> list[Reference]:
    """One reference for each, cut out of those of all targets together.

    Means and spreads do not depend on the seed; which images "shuffle" and "resample" keep does, as in Ablate.fit.
    """
    samples = [one.seed if one.mode in NEEDS_BANK else None for one in ablations]
    parts = [parts_of(one.target, vit.cfg) for one in ablations]
    fitters: dict[int | None, Fitter] = {}
    for sample in dict.fromkeys(samples):
        mine = chain.from_iterable(own for own, seed in zip(parts, samples, strict=True) if seed == sample)
        fitters[sample] = Fitter(_union(mine), sample is not None, sample or 0)
    fit_references(vit, list(fitters.values()), images, batch_size)
    whole = {sample: fitter.result() for sample, fitter in fitters.items()}
    places = {sample: _places(fitter.parts) for sample, fitter in fitters.items()}
    return [_cut_out(whole[sample], places[sample], own) for own, sample in zip(parts, samples, strict=True)]


def _union(parts: Iterable[Part]) -> list[Part]:
    """Every hook point once, with all neurons or heads that any part reads there."""
    chosen: dict[str, set[int] | None] = {}
    for part in parts:
        known = chosen.setdefault(part.point, None if part.index is None else set())
        if known is not None and part.index is not None:
            known.update(part.index)
    return [Part(point, None if known is None else tuple(sorted(known))) for point, known in chosen.items()]


def _places(parts: Iterable[Part]) -> dict[str, dict[int, int]]:
    """Where each neuron or head stands among those of its hook point; nothing for points that are read whole."""
    return {part.point: {feature: i for i, feature in enumerate(part.index or ())} for part in parts}


def _cut_out(whole: Reference, places: Mapping[str, Mapping[int, int]], own: Sequence[Part]) -> Reference:
    """The features of some parts, in their order, out of a reference for a union of parts."""

    def cut(part: Part, tensor: Tensor) -> Tensor:
        place = places[part.point]
        if part.index is None:
            return tensor
        width = tensor.shape[-1] // len(place)  # 1 for neurons, d_head for heads
        columns = [place[feature] * width + i for feature in part.index for i in range(width)]
        return tensor[..., columns].clone()

    tensors: dict[str, dict[str, Tensor]] = {
        kind: {part.point: cut(part, every[part.point]) for part in own if part.point in every}
        for kind, every in (("mean", whole.mean), ("std", whole.std), ("bank", whole.bank))
    }
    return Reference(**tensors, n_images=whole.n_images)

"""Fitting planned edits: in as few passes as possible, and once, since a resumed run needs the same bits."""

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from registerlens.data.batches import Images
from registerlens.data.sources import Source, SourceBatches, TensorSource
from registerlens.engine.stream import stream
from registerlens.errors import ConfigError, ImageError
from registerlens.interventions.ablation import NEEDS_BANK, Ablate, Fitter, Reference
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Intervention
from registerlens.interventions.targets import TargetPart, parts_of
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition, Planned, PlannedAblation, PlannedBias, content_hash
from registerlens.sweep.grid import Conditions, by_name, each_of


def unfitted(conditions: Iterable[Condition]) -> tuple[Planned, ...]:
    """The interventions that are still to be fitted, each once, in order of appearance.

    Example:
        >>> from registerlens.interventions.targets import Heads
        >>> unfitted([Condition(interventions=(PlannedAblation(Heads([(2, 0)]), "mean"),))] * 2)
        (PlannedAblation(target=Heads(pairs=((2, 0),)), mode='mean', seed=0),)
    """
    every = chain.from_iterable(condition.interventions for condition in conditions)
    return tuple(dict.fromkeys(edit for edit in every if isinstance(edit, Planned) and edit.fitted is None))


def n_passes(conditions: Iterable[Condition]) -> int:
    """How many times the reference images go through the model: once for all ablations, once for each attention bias.

    Example:
        >>> n_passes([Condition()])
        0
    """
    waiting = unfitted(conditions)
    n_biases = sum(isinstance(edit, PlannedBias) for edit in waiting)
    return n_biases + any(isinstance(edit, PlannedAblation) for edit in waiting)


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
        InterventionError: the model lacks what is to be edited.
        ShapeError: the images differ in size where a mode needs one.
    """
    ablations = [edit for edit in planned if isinstance(edit, PlannedAblation)]
    biases = [edit for edit in planned if isinstance(edit, PlannedBias)]
    if len(biases) + bool(ablations) > 1 and isinstance(images, Iterator):
        raise ImageError(
            f"{len(biases) + bool(ablations)} passes over the reference images are needed, but an iterator lasts for "
            f"one. Give a tensor, a list of batches or rl.load_images(...)."
        )
    fitted: dict[Planned, Planned] = {}
    if ablations:
        references = _fit_together(vit, ablations, images, batch_size)
        for edit, reference in zip(ablations, references, strict=True):
            fitted[edit] = replace(edit, fitted=Ablate(edit.target, edit.mode, reference=reference, seed=edit.seed))
    for edit in biases:
        fitted[edit] = replace(edit, fitted=AttentionBias.fit(vit, images, edit.neurons, batch_size=batch_size))
    return fitted


def fit_conditions(
    vit: HookedViT | Mapping[str, HookedViT],
    images: Images | Mapping[str, Images],
    conditions: Iterable[Condition],
    *,
    batch_size: int = 16,
) -> Conditions:
    """The same conditions with every planned edit fitted, on the unedited model; keys, labels and order stay.

    One pass over the reference images for all ablations of a model, and one more for each attention bias.

    Args:
        vit: the model, or the models by the names that conditions use.
        images: reference images, preprocessed, as a tensor or in batches; or those of each model by its name.
        conditions: some of them may be fitted already.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: a condition names another model.
        ImageError: there are no images, or an iterator does not last for all passes.
        InterventionError: a model lacks what is to be edited.
        ShapeError: the images differ in size where a mode needs one.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.sweep.grid import grid
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> conditions = grid(rl.Ablate, target=[rl.Heads([(2, 0)]), rl.Heads([(4, 0)])], mode=["zero", "mean"])
        >>> bound = fit_conditions(vit, torch.rand(4, 3, 48, 48), conditions)
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
    fitted_on = each_of((name for name, planned in waiting.items() if planned), images)
    if len(fitted_on) > 1 and isinstance(images, Iterator):
        raise ImageError("An iterator of reference images lasts for one model; give a tensor or a list of batches.")
    fitted = {name: fit_planned(models[name], waiting[name], mine, batch_size) for name, mine in fitted_on.items()}
    return Conditions(tuple(bind(condition, fitted.get(condition.model, {})) for condition in conditions))


def bind(condition: Condition, fitted: Mapping[Planned, Planned]) -> Condition:
    """The condition with its planned edits replaced by the fitted ones; it keeps its key.

    Example:
        >>> bind(Condition(factors={"layer": 1}), {}).factors
        {'layer': 1}
    """
    if not any(isinstance(edit, Planned) and edit.fitted is None for edit in condition.interventions):
        return condition
    edits = tuple(fitted.get(edit, edit) if isinstance(edit, Planned) else edit for edit in condition.interventions)
    return replace(condition, interventions=edits)


def _fit_together(
    vit: HookedViT, ablations: Sequence[PlannedAblation], images: Images, batch_size: int
) -> list[Reference]:
    """One reference for each, cut out of those of all targets together.

    Means and spreads do not depend on the seed; which images "shuffle" and "resample" keep does, as in Ablate.fit.
    """
    samples = [edit.seed if edit.mode in NEEDS_BANK else None for edit in ablations]
    parts = [parts_of(edit.target, vit.cfg) for edit in ablations]
    fitters: dict[int | None, Fitter] = {}
    for sample in dict.fromkeys(samples):
        mine = chain.from_iterable(own for own, seed in zip(parts, samples, strict=True) if seed == sample)
        fitters[sample] = Fitter(_union(mine), sample is not None, sample or 0)
    references = stream(vit, images, list(fitters.values()), batch_size=batch_size, description="fitting the ablation")
    whole = dict(zip(fitters, references, strict=True))
    places = {sample: _places(fitter.parts) for sample, fitter in fitters.items()}
    return [_cut_out(whole[sample], places[sample], own) for own, sample in zip(parts, samples, strict=True)]


def _union(parts: Iterable[TargetPart]) -> list[TargetPart]:
    """Every hook point once, with all neurons or heads that any part reads there."""
    chosen: dict[str, set[int] | None] = {}
    for part in parts:
        known = chosen.setdefault(part.point, None if part.index is None else set())
        if known is not None and part.index is not None:
            known.update(part.index)
    return [TargetPart(point, None if known is None else tuple(sorted(known))) for point, known in chosen.items()]


def _places(parts: Iterable[TargetPart]) -> dict[str, dict[int, int]]:
    """Where each neuron or head stands among those of its hook point; nothing for points that are read whole."""
    return {part.point: {feature: i for i, feature in enumerate(part.index or ())} for part in parts}


def _cut_out(whole: Reference, places: Mapping[str, Mapping[int, int]], own: Sequence[TargetPart]) -> Reference:
    """The features of some parts, in their order, out of a reference for a union of parts."""

    def cut(part: TargetPart, tensor: Tensor) -> Tensor:
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


References = Images | Source | Mapping[str, Images | Source]
"""Images to fit on; or those of each model by its name."""
Fits = dict[str, Intervention]
"""Fitted edits by the hash of what was to be fitted, and on which model."""


def fit_missing(
    models: Mapping[str, HookedViT],
    conditions: Iterable[Condition],
    references: References | None,
    batch_size: int,
    known: Mapping[str, Intervention],
) -> tuple[list[Condition], Fits]:
    """The same conditions with every planned edit fitted, and the edits that were not known before.

    Args:
        models: by name.
        conditions: in any order; their keys stay.
        references: images to fit on.
        batch_size: images at once.
        known: edits fitted earlier.

    Raises:
        ConfigError: edits are to be fitted, and there are no reference images.
    """
    bound, new = list(conditions), {}
    for name, vit in models.items():
        planned = {_identity(name, edit): edit for edit in unfitted(own for own in bound if own.model == name)}
        waiting = [edit for identity, edit in planned.items() if identity not in known]
        fits = {edit: _with(edit, known[at]) for at, edit in planned.items() if at in known}
        if waiting:
            fits |= fit_planned(vit, waiting, _batches(references, name, len(waiting), batch_size), batch_size)
            new |= {_identity(name, edit): fits[edit].fitted for edit in waiting}
        bound = [bind(condition, fits) if condition.model == name else condition for condition in bound]
    return bound, new


def identity_of(references: References | None) -> str:
    """A hash of the images to fit on; empty where there are none, or where it cannot be known (a stream)."""
    if isinstance(references, Mapping):
        return content_hash({name: identity_of(images) for name, images in references.items()})
    if isinstance(references, Tensor):
        return TensorSource(references).identity[:16]
    return references.identity[:16] if isinstance(references, Source) else ""


def pack_fits(fits: Fits) -> bytes:
    """Fitted edits as one file: a zip archive of what `save` of each writes."""
    archive = io.BytesIO()
    with TemporaryDirectory() as folder, zipfile.ZipFile(archive, "w") as file:
        for identity, fitted in fits.items():
            for written in sorted(fitted.save(Path(folder) / identity).iterdir()):
                file.write(written, f"{identity}/{written.name}")
    return archive.getvalue()


def unpack_fits(content: bytes) -> Fits:
    """Fitted edits, bit for bit those that were packed."""
    with TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(content)) as file:
        file.extractall(folder)
        return {place.name: Intervention.load(place) for place in sorted(Path(folder).iterdir())}


def _with(planned: Any, fitted: Intervention) -> Planned:
    """A planned edit (a dataclass), fitted."""
    return replace(planned, fitted=fitted)


def _identity(model: str, planned: Planned) -> str:
    return content_hash([model, planned])


def _batches(references: References | None, model: str, n: int, batch_size: int) -> Images:
    """The reference images of a model.

    Raises:
        ConfigError: there are none.
    """
    images: Any = references.get(model) if isinstance(references, Mapping) else references  # type: ignore[arg-type]
    if images is None:
        raise ConfigError(
            f"Fitting is needed for {n} of the edits of the model '{model}' (to means, noise, other images' "
            f"activations, or as an attention bias). Give run_sweep the images to fit on: reference_images=..."
        )
    return SourceBatches(images, batch_size) if isinstance(images, Source) else images

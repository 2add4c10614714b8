"""What `run_sweep` is given, made into what it works with, and checked before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from registerlens.data.sources import Source, TensorSource
from registerlens.engine.backends import check_untouched
from registerlens.errors import ConfigError, ShapeError, close_matches
from registerlens.evaluation.metrics import Metric, check_metrics, default_metrics
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition
from registerlens.sweep.grid import Conditions


def as_models(models: HookedViT | Mapping[str, HookedViT]) -> dict[str, HookedViT]:
    """Models by name; a single one is called "model".

    Raises:
        ConfigError: something else was given, or hooks or edits are in force.
    """
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    for name, vit in named.items():
        if not isinstance(vit, HookedViT):
            raise ConfigError(
                f"The model '{name}' is a {type(vit).__name__}. Load it with rl.HookedViT.from_pretrained(...)."
            )
        check_untouched(vit, f"The model '{name}'")
    if not named:
        raise ConfigError("A sweep needs a model. Give a HookedViT, or several by name.")
    return named


def as_sources(images: Any, labels: Any, shard_size: int) -> dict[str, Source]:
    """Image sets by name; a single one is called "images".

    Args:
        images: a tensor, a Source, or several of these by name.
        labels: one an image, for tensors; by name where there are several image sets.
        shard_size: images a shard, for tensors.

    Raises:
        ConfigError: something else was given, or labels for a source, which has its own.
        ShapeError: not one label an image.
    """
    named = dict(images) if isinstance(images, Mapping) else {"images": images}
    if not named:
        raise ConfigError("A sweep needs images. Give a tensor or a source, or several by name.")
    labelled = dict(labels) if isinstance(labels, Mapping) else {} if labels is None else dict.fromkeys(named, labels)
    if not isinstance(labels, Mapping | None) and len(named) > 1:
        raise ConfigError(f"Labels of several image sets are given by name: labels={{{next(iter(named))!r}: ...}}.")
    if unknown := sorted(set(labelled) - set(named)):
        raise ConfigError(f"There are labels for {unknown}, but image sets {sorted(named)}.")
    return {name: _source(name, value, labelled.get(name), shard_size) for name, value in named.items()}


def _source(name: str, value: Any, labels: Any, shard_size: int) -> Source:
    if isinstance(value, Tensor):
        if value.ndim != 4:
            raise ConfigError(
                f"The images '{name}' have shape {list(value.shape)}, expected [image, channel, height, width]."
            )
        if labels is not None and len(labels) != len(value):
            raise ShapeError(
                f"There are {len(labels)} labels for {len(value)} images ('{name}'); one for each is needed."
            )
        return TensorSource(value, None if labels is None else torch.as_tensor(labels), shard_size)
    if not isinstance(value, Source):
        raise ConfigError(
            f"The images '{name}' are a {type(value).__name__}. Give a tensor of preprocessed images "
            f"(rl.load_images(...)), or a source such as rl.data.FolderSource."
        )
    if labels is not None:
        raise ConfigError(f"The images '{name}' are a source, which has labels of its own: give them to it.")
    return value


def as_conditions(
    conditions: Iterable[Condition], models: Mapping[str, HookedViT], sources: Mapping[str, Source]
) -> Conditions:
    """The conditions, and before them the clean run of every pair of model and images that they lack.

    Raises:
        ConfigError: something else is in the list, the same condition stands there twice, or images were not given.
        InterventionError: a condition does not fit its model; all are counted, the first few told.
        ShapeError: a model cannot take its images.
    """
    given = Conditions.of(conditions).check(models) if (conditions := list(conditions)) else ()
    places = dict.fromkeys((one.model, one.images) for one in given) or {
        (next(iter(models)), next(iter(sources))): None
    }
    has_clean = {(one.model, one.images) for one in given if not one.interventions}
    clean = [Condition(model=model, images=images) for model, images in places if (model, images) not in has_clean]
    for model, images in places:
        if images not in sources:
            raise ConfigError(
                f"Conditions are about the images '{images}', but there are {list(sources)}."
                f"{close_matches(images, sources)}"
            )
        source = sources[images]
        if isinstance(source, TensorSource):  # others are read later
            models[model].layout(source.images[:1])
    return Conditions((*clean, *given))


def as_metrics(
    metrics: Sequence[Metric] | None, models: Mapping[str, HookedViT], sources: Mapping[str, Source]
) -> tuple[Metric, ...]:
    """The metrics, or the built-in ones that all models have alike; outliers and sinks are not among these.

    Raises:
        ConfigError: there is none, the models' built-in ones differ, or as `check_metrics`.
    """
    if metrics is None:
        labels = all(getattr(source, "labels", None) is not None for source in sources.values())
        built_in = [default_metrics(vit, labels=labels) for vit in models.values()]
        if any([one.words for one in own] != [one.words for one in built_in[0]] for own in built_in):
            raise ConfigError("The models' built-in metrics differ (depth, or what comes out): give metrics=[...].")
        metrics = built_in[0]
    if not metrics:
        raise ConfigError("A sweep needs at least one metric; metrics=None takes the built-in ones.")
    for vit in models.values():
        check_metrics(metrics, vit.cfg)
    return tuple(metrics)

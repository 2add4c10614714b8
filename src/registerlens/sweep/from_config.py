"""From a configuration to what `run_sweep` takes: models, image sources, conditions, metrics."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from registerlens.analysis.detection import Cutoff, Detection, detect
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.data.sources import Source, SourceBatches
from registerlens.errors import ConfigError
from registerlens.evaluation.metrics import Metric, default_metrics
from registerlens.interventions.ablation import Scale
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.interpolation import InterpolateOutliers
from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
from registerlens.interventions.search import find_register_neurons
from registerlens.interventions.targets import Heads, Target
from registerlens.model.vit import HookedViT
from registerlens.sweep.axes import (
    Level,
    cumulative,
    every_head,
    every_neuron,
    every_token,
    matched_sets,
    random_sets,
    top_k,
)
from registerlens.sweep.conditions import Condition, ablation
from registerlens.sweep.config_sources import source_of, sources_of
from registerlens.sweep.controls import with_controls
from registerlens.sweep.dry_run import SweepPlan, first_shard, plan_sweep
from registerlens.sweep.grid import Conditions, grid
from registerlens.sweep.result import SweepResult
from registerlens.sweep.run import run_sweep
from registerlens.sweep.yaml_config import Grid, Layers, SweepConfig

Sets = dict[Any, Any]
"""Label -> Level, or what the label stands for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Maker:
    """What the grids of one model are made from."""

    config: SweepConfig
    vit: HookedViT
    images: SourceBatches
    """The images on which neurons are searched for, and activity and outliers measured."""
    lists: dict[str, RegisterNeurons] = field(default_factory=dict)
    """Lists by the name of their source, so that each is read or found once."""

    def neurons(self, source: str) -> RegisterNeurons:
        """The list that a source names."""
        if source not in self.lists:
            kind, _, name = source.partition(":")
            if source == "auto":
                self.lists[source] = find_register_neurons(self.vit, self.images)
            elif kind == "published":
                self.lists[source] = RegisterNeurons.published(name)
            else:
                self.lists[source] = RegisterNeurons.load(self.config.place(source))
        return self.lists[source]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Everything that `run_sweep` needs, as a configuration asks for it."""

    config: SweepConfig
    """The configuration."""
    models: Mapping[str, HookedViT]
    """The models by name."""
    sources: Mapping[str, Source]
    """The image sources, by the names that conditions use."""
    conditions: Conditions
    """The conditions, not fitted yet."""
    metrics: tuple[Metric, ...]
    """The metrics, which are the columns of the result."""
    reference_images: Mapping[str, Source]
    """On which edits are fitted, for each model."""

    def plan(self) -> SweepPlan:
        """What the sweep will cost."""
        return plan_sweep(self.models, self.sources, self.conditions, self.metrics, batch_size=self.config.batch_size)

    def run(self, **how: Any) -> SweepResult:
        """Run it; `how` are `run_sweep`'s store, resume, backend, workers, address."""
        return run_sweep(
            self.models,
            self.sources,
            self.conditions,
            self.metrics,
            reference_images=self.reference_images,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            **how,
        )


def prepare(config: SweepConfig, models: Mapping[str, HookedViT]) -> Prepared:
    """What a configuration asks for: images are found, neurons searched for, conditions made and checked.

    Args:
        config: the configuration.
        models: its models, loaded, by name.

    Raises:
        ConfigError: something in it does not fit a model or cannot be read; the message names the line.
        ImageError: there are no images.
    """
    with config.at("image_sets" if config.image_sets else "images"):
        sources, names = sources_of(config, models)
    references = config.reference_images
    reference = {
        name: sources[next(iter(names[name].values()))] if references is None else source_of(config, references, vit)
        for name, vit in models.items()
    }
    listed: list[Condition] = []
    for name, vit in models.items():
        listed += _conditions(config, name, vit, reference[name], list(names[name].values()))
    return Prepared(
        config=config,
        models=models,
        sources=sources,
        conditions=Conditions(tuple(listed)),
        metrics=_metrics_of(config, models, {name: sources[next(iter(names[name].values()))] for name in models}),
        reference_images=reference,
    )


# Metrics --------------------------------------------------------------------------------------------------------------

_LACKING = {
    "cos_cls": "the model has no [CLS] token",
    "cos_output": "the model pools no output",
    **dict.fromkeys(("outliers", "sink_outliers", "sink_patch"), "the model has no outliers on the first images"),
    **dict.fromkeys(("kl", "agreement"), "the model predicts no classes"),
    **dict.fromkeys(("cross_entropy", "accuracy"), "the images have no labels"),
}
"""Why a model may lack a metric; no model lacks those not listed here."""


def _metrics_of(
    config: SweepConfig, models: Mapping[str, HookedViT], sources: Mapping[str, Source]
) -> tuple[Metric, ...]:
    """The metrics that were asked for, or all that the models have in common.

    Args:
        config: the configuration.
        models: by name.
        sources: images of each model; the first usable shard decides where outliers show, and whether there are labels.

    Raises:
        ConfigError: a model lacks one that was asked for, or models would measure it at different places.
    """
    own = {name: _metrics(vit, sources[name], config.batch_size) for name, vit in models.items()}
    first = next(iter(own.values()))
    alike = {name: first[name] for name in first if all(_same(first[name], other.get(name)) for other in own.values())}
    for name in config.metrics:
        lacking = [model for model, metrics in own.items() if name not in metrics]
        if lacking:
            raise ConfigError(
                f"'{config.path}': the metric {name!r} cannot be measured: {_LACKING[name]} ({lacking[0]})."
            )
        if name not in alike:
            raise ConfigError(
                f"'{config.path}': the models would measure {name!r} at different places ("
                f"{'; '.join(metrics[name].words for metrics in own.values())}). Sweep them one by one."
            )
    return tuple(alike[name] for name in config.metrics or alike)


def _same(mine: Metric, other: Metric | None) -> bool:
    return other is not None and (mine.words, mine.norms, mine.attention) == (other.words, other.norms, other.attention)


def _metrics(vit: HookedViT, source: Source, batch_size: int) -> dict[str, Metric]:
    shard = first_shard(source)
    detection: Detection = detect(vit, shard.images, batch_size=batch_size)
    metrics = default_metrics(vit, detection=detection, labels=shard.labels is not None)
    return {metric.name: metric for metric in metrics}


# Conditions -----------------------------------------------------------------------------------------------------------


def _conditions(
    config: SweepConfig, name: str, vit: HookedViT, reference: Source, images: list[str]
) -> Iterable[Condition]:
    """Every condition of one model, its clean run first."""
    maker = _Maker(config=config, vit=vit, images=SourceBatches(reference, config.batch_size))
    mine = Conditions((Condition(),))
    for i, spec in enumerate(config.conditions):
        with config.at("conditions", i):
            mine = mine + _grid(maker, spec).check(vit)
    return mine.over(models=[name], images=images)


def _grid(maker: _Maker, spec: Grid) -> Conditions:
    conditions = KINDS[spec.kind](maker, spec.axes)
    if not spec.controls.n:
        return conditions
    how = {"n": spec.controls.n, "kinds": spec.controls.kinds, "seed": maker.config.seed}
    return with_controls(maker.vit, conditions, images=maker.images, batch_size=maker.config.batch_size, **how)


# Neurons, heads, tokens -----------------------------------------------------------------------------------------------


def _neurons(maker: _Maker, axes: Mapping[str, Any]) -> Sets:
    """The sets of neurons that an axis stands for, in the layers that were named."""
    how, value = axes["neurons"].given
    return NEURONS[how](maker, value, axes["neurons"].of, axes.get("layers"))


def _listed(maker: _Maker, source: str, layers: Layers) -> RegisterNeurons:
    neurons = maker.neurons(source)
    kept = neurons if layers is None else neurons.filter(layers=layers)
    if not len(kept):
        raise ConfigError(f"No neuron of '{source}' lies in the layers {list(layers or ())}. Name others.")
    return kept


def _each(maker: _Maker, value: Any, of: str, layers: Layers) -> Sets:
    if value == "all":
        return every_neuron(maker.vit, layers)
    pairs = _listed(maker, value, layers).pairs if isinstance(value, str) else value
    singles = {pair: RegisterNeurons.from_pairs([pair]) for pair in pairs}
    return {f"{a}:{b}": Level(neurons, {"layer": a, "neuron": b}) for (a, b), neurons in singles.items()}


def _named(sets: Mapping[str, RegisterNeurons]) -> Sets:
    return {name: Level(neurons, {"neurons": name}) for name, neurons in sets.items()}


def _random(maker: _Maker, n: int, of: str, layers: Layers) -> Sets:
    return _named(random_sets(_listed(maker, of, layers), n, maker.vit.cfg.d_mlp, maker.config.seed))


def _matched(maker: _Maker, n: int, of: str, layers: Layers) -> Sets:
    from registerlens.evaluation.controls import neuron_activity

    listed = _listed(maker, of, layers)
    activity = neuron_activity(maker.vit, maker.images, list(listed.by_layer()), maker.config.batch_size)
    return _named(matched_sets(listed, n, activity, maker.config.seed))


NEURONS: dict[str, Callable[[_Maker, Any, str, Layers], Sets]] = {
    "set": lambda maker, name, of, layers: _named({name: _listed(maker, name, layers)}),
    "each": _each,
    "sets": lambda maker, sets, of, layers: _named(
        {name: RegisterNeurons.from_pairs(pairs, name) for name, pairs in sets.items()}
    ),
    "top_k": lambda maker, k, of, layers: top_k(_listed(maker, of, layers), k),
    "cumulative": lambda maker, name, of, layers: cumulative(_listed(maker, name, layers)),
    "random": _random,
    "matched": _matched,
}
"""How neurons are named -> what makes the sets, of what stands there."""


def _heads(maker: _Maker, axes: Mapping[str, Any]) -> Sets:
    if axes["heads"] == "all":
        return every_head(maker.vit, axes.get("layers"))
    return {f"{a}.{b}": Level(Heads([(a, b)]), {"layer": a, "head": b}) for a, b in axes["heads"]}


def _tokens(maker: _Maker, axes: Mapping[str, Any]) -> Sets:
    wanted = axes["tokens"]
    patches = wanted if isinstance(wanted, Mapping) else None
    every = every_token(maker.vit, axes.get("layers"), patches)
    kinds = list(wanted) if patches is not None or "all" not in wanted else None
    kept = {name: level for name, level in every.items() if kinds is None or level.factors["tokens"] in kinds}
    if not kept:
        raise ConfigError(f"The model has no tokens {list(wanted)}. Leave them out.")
    return kept


TARGETS = {"neurons": _neurons, "heads": _heads, "tokens": _tokens}


def _target(maker: _Maker, axes: Mapping[str, Any]) -> Sets:
    [kind] = [name for name in TARGETS if name in axes]
    return TARGETS[kind](maker, axes)


# Kinds of grids -------------------------------------------------------------------------------------------------------


def _ablate(maker: _Maker, axes: Mapping[str, Any]) -> Conditions:
    modes = {"mode": list(axes["modes"])} if "modes" in axes else {}
    return grid(partial(ablation, seed=maker.config.seed), target=_target(maker, axes), **modes)


def _scaled(target: Target, scale: float) -> Scale:
    return Scale(target, scale)  # the axis is called "scale" in results


def _scale(maker: _Maker, axes: Mapping[str, Any]) -> Conditions:
    return grid(_scaled, target=_target(maker, axes), scale=list(axes["scales"]))


def _registers(maker: _Maker, axes: Mapping[str, Any]) -> Conditions:
    options = {name: list(axes[name]) for name in ("n", "init", "assign", "extreme", "clear") if name in axes}
    return grid(partial(TestTimeRegisters, seed=maker.config.seed), neurons=_neurons(maker, axes), **options)


def _move(maker: _Maker, axes: Mapping[str, Any]) -> Conditions:
    options = {name: list(axes[name]) for name in ("extreme", "clear") if name in axes}
    places = {name: Level(tuple(patches), {"to": name}) for name, patches in axes["to"].items()}
    return grid(MoveOutliers, neurons=_neurons(maker, axes), positions=places, **options)


def _attention_bias(maker: _Maker, axes: Mapping[str, Any]) -> Conditions:
    return grid(AttentionBias, neurons=_neurons(maker, axes))


def _interpolate(maker: _Maker, axes: Mapping[str, Any]) -> Conditions:
    layers, norm = axes.get("layers"), axes.get("cutoff")
    detection = detect(maker.vit, maker.images, batch_size=maker.config.batch_size)
    cutoff = detection.cutoff if norm is None else Cutoff(value=norm, relative=False)
    if layers is None:
        return Conditions.of([("neighbours", InterpolateOutliers(detection.sublayer, cutoff))])
    return grid(lambda layer: InterpolateOutliers(layer, cutoff), layer=list(layers))


KINDS: dict[str, Callable[[_Maker, Mapping[str, Any]], Conditions]] = {
    "ablate": _ablate,
    "scale": _scale,
    "registers": _registers,
    "move": _move,
    "attention_bias": _attention_bias,
    "interpolate": _interpolate,
}
"""Kind of a grid -> what makes its conditions."""

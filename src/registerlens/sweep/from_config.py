"""From a configuration to what `run_sweep` takes: models, image sources, conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from registerlens.analysis.detection import Cutoff, detect
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.data.sources import Source
from registerlens.errors import ConfigError, RegisterLensError
from registerlens.evaluation.metrics import Metric
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.interpolation import InterpolateOutliers
from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
from registerlens.interventions.scaling import Scale
from registerlens.interventions.search import find_register_neurons
from registerlens.interventions.targets import Heads, Target
from registerlens.model.vit import HookedViT
from registerlens.sweep.axes import cumulative, every_head, every_neuron, every_token, matched_sets, random_sets, top_k
from registerlens.sweep.conditions import Condition
from registerlens.sweep.config_metrics import metrics_of
from registerlens.sweep.config_sources import source_of, sources_of
from registerlens.sweep.controls import with_controls
from registerlens.sweep.dry_run import SweepPlan, plan_sweep
from registerlens.sweep.grid import Conditions, grid
from registerlens.sweep.levels import Level
from registerlens.sweep.planned import ablation
from registerlens.sweep.result import SweepResult
from registerlens.sweep.run import run_sweep
from registerlens.sweep.yaml_config import GridSpec, NeuronsSpec, SweepConfig

Sets = dict[Any, Any]
"""Label -> Level, or what the label stands for."""


@dataclass(frozen=True, eq=False)
class Batches:
    """The images of a source, batch by batch, as often as they are needed."""

    source: Source
    batch_size: int

    @property
    def n_images(self) -> int | None:
        """How many there are, where that is known."""
        return self.source.n_images

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.source.n_shards):
            yield from self.source.shard(index).images.split(self.batch_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Maker:
    """What grids of one model are made with."""

    config: SweepConfig
    vit: HookedViT
    images: Batches
    """On which neurons are found, and activity and outliers measured."""
    found: dict[str, RegisterNeurons] = field(default_factory=dict)
    """Lists by the name of their source, so that each is read or found once."""

    def neurons(self, source: str) -> RegisterNeurons:
        """The list that a source names."""
        if source not in self.found:
            kind, _, name = source.partition(":")
            if source == "auto":
                self.found[source] = find_register_neurons(self.vit, self.images)
            elif kind == "published":
                self.found[source] = RegisterNeurons.published(name)
            else:
                self.found[source] = RegisterNeurons.load(self.config.place(source))
        return self.found[source]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Everything that `run_sweep` needs, as a configuration asks for it."""

    config: SweepConfig
    """The configuration."""
    models: Mapping[str, HookedViT]
    """By name."""
    sources: Mapping[str, Source]
    """By the names that conditions use."""
    conditions: Conditions
    """Not fitted yet."""
    metrics: tuple[Metric, ...]
    """The columns."""
    reference_images: Mapping[str, Source]
    """On which edits are fitted, for each model."""

    def plan(self) -> SweepPlan:
        """What it will cost."""
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
    with _at(config, config.images_line):
        sources, names = sources_of(config, models)
    told = config.reference_images
    reference = {
        name: sources[next(iter(names[name].values()))] if told is None else source_of(config, told, vit)
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
        metrics=metrics_of(config, models, {name: sources[next(iter(names[name].values()))] for name in models}),
        reference_images=reference,
    )


def _conditions(
    config: SweepConfig, name: str, vit: HookedViT, reference: Source, images: list[str]
) -> Iterable[Condition]:
    """Every condition of one model, its clean run first."""
    maker = _Maker(config=config, vit=vit, images=Batches(reference, config.batch_size))
    mine = Conditions((Condition(),))
    for spec in config.conditions:
        with _at(config, spec.line):
            mine = mine + _grid(maker, spec).check(vit)
    return mine.over(models=[name], images=images)


def _grid(maker: _Maker, spec: GridSpec) -> Conditions:
    made = KINDS[spec.kind](maker, spec.axes)
    if not spec.controls.n:
        return made
    how = {"n": spec.controls.n, "kinds": spec.controls.kinds, "seed": maker.config.seed}
    return with_controls(made, maker.vit, maker.images, batch_size=maker.config.batch_size, **how)


@contextmanager
def _at(config: SweepConfig, line: int) -> Iterator[None]:
    """Say in which line of the file it went wrong."""
    try:
        yield
    except RegisterLensError as error:
        raise ConfigError(f"'{config.path}', line {line}: {error}") from error


# Neurons, heads, tokens -----------------------------------------------------------------------------------------------


def _neurons(maker: _Maker, axes: Mapping[str, Any]) -> Sets:
    """The sets of neurons that an axis stands for, in the layers that were named."""
    return NEURONS[axes["neurons"].how](maker, axes["neurons"], axes.get("layers"))


def _listed(maker: _Maker, spec: NeuronsSpec, layers: tuple[int, ...] | None) -> RegisterNeurons:
    neurons = maker.neurons(spec.source)
    kept = neurons if layers is None else neurons.filter(layers=layers)
    if not len(kept):
        raise ConfigError(f"No neuron of '{spec.source}' lies in the layers {list(layers or ())}. Name others.")
    return kept


def _each(pairs: tuple[tuple[int, int], ...]) -> Sets:
    singles = {pair: RegisterNeurons.from_pairs([pair]) for pair in pairs}
    return {f"{a}:{b}": Level(one, {"layer": a, "neuron": b}) for (a, b), one in singles.items()}


def _named(sets: Mapping[str, RegisterNeurons]) -> Sets:
    return {name: Level(one, {"neurons": name}) for name, one in sets.items()}


def _drawn(maker: _Maker, spec: NeuronsSpec, layers: tuple[int, ...] | None) -> Sets:
    listed, seed = _listed(maker, spec, layers), maker.config.seed
    if spec.how == "random":
        return _named(random_sets(listed, spec.n, maker.vit.cfg.d_mlp, seed))
    from registerlens.evaluation.controls import neuron_activity  # noqa: PLC0415

    activity = neuron_activity(maker.vit, maker.images, list(listed.by_layer()), maker.config.batch_size)
    return _named(matched_sets(listed, spec.n, activity, seed))


NEURONS: dict[str, Callable[[_Maker, NeuronsSpec, tuple[int, ...] | None], Sets]] = {
    "all": lambda maker, spec, layers: every_neuron(maker.vit, layers),
    "set": lambda maker, spec, layers: _named({spec.source: _listed(maker, spec, layers)}),
    "each": lambda maker, spec, layers: _each(_listed(maker, spec, layers).pairs),
    "listed": lambda maker, spec, layers: _each(spec.pairs),
    "sets": lambda maker, spec, layers: _named(
        {name: RegisterNeurons.from_pairs(pairs, name) for name, pairs in spec.sets.items()}
    ),
    "top_k": lambda maker, spec, layers: top_k(_listed(maker, spec, layers), spec.k),
    "cumulative": lambda maker, spec, layers: cumulative(_listed(maker, spec, layers)),
    "random": _drawn,
    "matched": _drawn,
}
"""How neurons are named -> what makes the sets."""


def _heads(maker: _Maker, axes: Mapping[str, Any]) -> Sets:
    if axes["heads"] == "all":
        return every_head(maker.vit, axes.get("layers"))
    return {f"{a}.{b}": Level(Heads([(a, b)]), {"layer": a, "head": b}) for a, b in axes["heads"]}


def _tokens(maker: _Maker, axes: Mapping[str, Any]) -> Sets:
    told = axes["tokens"]
    patches = told if isinstance(told, Mapping) else None
    every = every_token(maker.vit, axes.get("layers"), patches)
    kinds = list(told) if patches is not None or "all" not in told else None
    kept = {name: level for name, level in every.items() if kinds is None or level.factors["tokens"] in kinds}
    if not kept:
        raise ConfigError(f"The model has no tokens {list(told)}. Leave them out.")
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
    layers, cutoff = axes.get("layers"), axes.get("cutoff")
    if layers is None or cutoff is None:
        detection = detect(maker.vit, maker.images, batch_size=maker.config.batch_size)
        if layers is None:
            edit = InterpolateOutliers(
                detection.sublayer, Cutoff(value=cutoff, relative=False) if cutoff else detection.cutoff
            )
            return Conditions.of([("neighbours", edit)])
        return grid(lambda layer: InterpolateOutliers(layer, detection.cutoff), layer=list(layers))
    return grid(lambda layer: InterpolateOutliers(layer, Cutoff(value=cutoff, relative=False)), layer=list(layers))


KINDS: dict[str, Callable[[_Maker, Mapping[str, Any]], Conditions]] = {
    "ablate": _ablate,
    "scale": _scale,
    "registers": _registers,
    "move": _move,
    "attention_bias": _attention_bias,
    "interpolate": _interpolate,
}
"""Kind of a grid -> what makes its conditions."""

"""Sweeps against the loop of a notebook, which runs every condition from the images and measures the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import torch
from torch import Tensor

import registerlens as rl
from benchmarks.harness import Row, Scale, check_equal, in_pairs
from benchmarks.models import focus_vit, pixels
from registerlens.analysis.detection import detect
from registerlens.data.sources import Shard
from registerlens.engine.views import View, Watched, run_from
from registerlens.evaluation.edit_runs import find_stack
from registerlens.evaluation.metrics import Metric, default_metrics, measured
from registerlens.sweep.conditions import Condition
from registerlens.sweep.job import run_task

IMAGES, CONDITIONS = 4, 36
"""Of a pair: the clean run, which both sides make once, is one of 37."""


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """Ablations of single neurons everywhere, in the last quarter, in the last layer; then what stacking gives."""
    vit, (size, _) = focus_vit(scale), scale.sizes[0]
    images, last = pixels(size, IMAGES), vit.cfg.n_layers
    metrics = default_metrics(vit, detection=detect(vit, images, threshold=1.0))
    n = last if scale.tiny else CONDITIONS
    quarter = range(last - max(1, last // 4), last)
    for where, layers, at_most in (
        ("uniform over layers", range(last), 0.60),
        ("in the last quarter", quarter, 0.25),
        ("in the last layer", range(last - 1, last), 0.15),
    ):
        conditions = [ablation(layers[i % len(layers)], i) for i in range(n)]
        yield _against_naive(vit, images, conditions, metrics, pairs, where, size, at_most)
    yield _stacking(vit, size, [ablation(last - 1, i) for i in range(n)], metrics, pairs)
    if torch.cuda.is_available() and not scale.tiny:
        yield _stacking(vit.to("cuda"), size, [ablation(last // 2, i) for i in range(64)], metrics, pairs, at_least=3.0)
        vit.to("cpu")


def ablation(layer: int, neuron: int) -> Condition:
    """One neuron set to zero."""
    return Condition(interventions=(rl.Ablate(rl.RegisterNeurons.from_pairs([(layer, neuron)])),))


def naive_loop(
    vit: rl.HookedViT, images: Tensor, conditions: Sequence[Condition], metrics: Sequence[Metric]
) -> Callable[[], Tensor]:
    """Every condition in its own `vit.edit`, from the images, beside one clean run: [metric, condition, image]."""
    watched, layout = Watched.by(metrics), vit.layout(images)

    def look() -> View:
        return run_from(vit, images, None, layout, watched)

    def task() -> Tensor:
        clean, rows = look(), []
        for condition in conditions:
            with vit.edit(*condition.interventions):
                rows.append(measured(metrics, look(), clean))
        return torch.stack(rows, 1)

    return task


def swept(
    vit: rl.HookedViT,
    images: Tensor,
    conditions: Sequence[Condition],
    metrics: Sequence[Metric],
    stack: int,
) -> Callable[[], pa.Table]:
    """The same with the runner."""
    n = len(images)
    shard = Shard(names=tuple(map(str, range(n))), images=images)
    return lambda: run_task(vit, shard, conditions, metrics, index=0, batch_size=n, stack=stack)


def _against_naive(
    vit: rl.HookedViT,
    images: Tensor,
    conditions: Sequence[Condition],
    metrics: Sequence[Metric],
    pairs: int,
    where: str,
    size: int,
    at_most: float,
) -> Row:
    stack = find_stack(vit, len(images), size)
    ours, theirs = (
        swept(vit, images, conditions, metrics, stack),
        naive_loop(vit, images, conditions, metrics),
    )
    difference = _check_same(ours(), theirs(), metrics)
    return in_pairs(ours, theirs, pairs, warm_up=0).row(
        benchmark="sweeps",
        what=f"{len(conditions)} ablations {where}, {size} px, {len(images)} images",
        peer="a loop of vit.edit",
        at_most=at_most,
        missed_because="the machine was busy, or blocks that are edited cost more than others",
        details={"largest_relative_difference": difference, "stack": stack, "metrics": [one.name for one in metrics]},
    )


def _stacking(
    vit: rl.HookedViT,
    size: int,
    conditions: Sequence[Condition],
    metrics: Sequence[Metric],
    pairs: int,
    at_least: float | None = None,
) -> Row:
    images, stack = pixels(size, 1), find_stack(vit, 1, size)
    ours, theirs = (swept(vit, images, conditions, metrics, at_once) for at_once in (stack, 1))
    return in_pairs(ours, theirs, pairs).row(
        invert=True,
        benchmark="sweeps",
        what=f"{len(conditions)} ablations of one image, {size} px, {stack} at once on {vit.device.type}",
        peer="one at a time",
        at_least=at_least,
        details={"stack": stack},
    )


def _check_same(ours: pa.Table, theirs: Tensor, metrics: Sequence[Metric]) -> float:
    return max(
        check_equal(one.name, torch.tensor(ours[one.name].to_numpy()), row.ravel())
        for one, row in zip(metrics, theirs, strict=True)
    )

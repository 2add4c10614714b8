"""A sweep before it is run: how many conditions and tasks, what it will cost, how large the result will be."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.data.sources import Shard, Source
from registerlens.display import Shown, size_text
from registerlens.engine.backends import GROUP, Task
from registerlens.engine.store import to_bytes
from registerlens.errors import ImageError
from registerlens.evaluation.metrics import Metric
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition, group_conditions
from registerlens.sweep.fitting import n_passes
from registerlens.sweep.job import part_schema
from registerlens.sweep.run import as_conditions, as_metrics, as_models, as_sources

WIDTH = 40
"""Characters of the longest bar of the histogram."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One model on one set of images."""

    model: str
    """Its name in the sweep."""
    images: str
    """The image set's name in the sweep."""
    n_images: int
    """Images; where the source does not know, shards times the images of the first one."""
    n_layers: int
    """Blocks of the model."""
    first_layers: dict[int, int]
    """Conditions by the first block they edit; the number of blocks for those that edit nothing."""
    n_groups: int
    """Groups of conditions; the clean run is made once for each."""
    n_tasks: int
    """Groups times shards."""
    n_passes: int
    """Passes over the reference images, beforehand, to fit ablations and attention biases."""
    clean_seconds: float
    """A clean forward pass of the whole model, per image, in a batch; measured."""
    device: str
    """The device on which that was measured."""

    @property
    def n_conditions(self) -> int:
        """Conditions."""
        return sum(self.first_layers.values())

    @property
    def forwards(self) -> float:
        """What an image costs, in clean forward passes: one a group, and for each condition the share of its blocks."""
        edited = sum((self.n_layers - first) / self.n_layers * n for first, n in self.first_layers.items())
        return self.n_groups + edited

    @property
    def seconds(self) -> float:
        """Expected seconds."""
        return self.forwards * self.n_images * self.clean_seconds


@dataclass(frozen=True, kw_only=True)
class SweepPlan(Shown):
    """What a sweep will do and cost; made by `plan_sweep`."""

    runs: tuple[PlannedRun, ...]
    """Each model on each of its image sets."""
    n_metrics: int
    """Columns of the result that are metrics."""
    batch_size: int
    """Images of the batch that was timed."""
    raw_row_bytes: float
    """Bytes of a row: key, shard, name of the image, 8 for each metric."""
    stored_row_bytes: float
    """Bytes of a row of one whole Parquet part filled with random float32 numbers, which compress less than metrics."""

    @property
    def n_conditions(self) -> int:
        """Conditions, over all models and image sets."""
        return sum(run.n_conditions for run in self.runs)

    @property
    def n_tasks(self) -> int:
        """Tasks: parts of the store."""
        return sum(run.n_tasks for run in self.runs)

    @property
    def n_rows(self) -> int:
        """Rows of the result: one a condition and image."""
        return sum(run.n_conditions * run.n_images for run in self.runs)

    @property
    def seconds(self) -> float:
        """Expected time of the forward passes; see `describe` for what that leaves out."""
        return sum(run.seconds for run in self.runs)

    @property
    def share(self) -> float:
        """That time over what a loop would take that runs the whole model for every condition."""
        naive = sum(run.n_conditions * run.n_images * run.clean_seconds for run in self.runs)
        return self.seconds / naive if naive else 0.0

    @property
    def raw_bytes(self) -> float:
        """Size of the result in memory."""
        return self.n_rows * self.raw_row_bytes

    @property
    def stored_bytes(self) -> float:
        """Size of the result on disk."""
        return self.n_rows * self.stored_row_bytes

    def to_dataframe(self) -> pd.DataFrame:
        """One row a model, image set and first edited layer: how many conditions, and their expected seconds."""
        rows = [
            {
                "model": run.model,
                "images": run.images,
                "first_layer": first,
                "conditions": n,
                "seconds": (run.n_layers - first) / run.n_layers * n * run.n_images * run.clean_seconds,
            }
            for run in self.runs
            for first, n in sorted(run.first_layers.items())
        ]
        return pd.DataFrame(rows, columns=["model", "images", "first_layer", "conditions", "seconds"])

    def describe(self) -> str:
        """The plan in words, with a histogram of first edited layers."""
        parts = [
            f"Conditions: {self.n_conditions:,}. Tasks: {self.n_tasks:,}. Rows: {self.n_rows:,}.",
            *(_summary(run) for run in self.runs),
            f"Expected: {time_text(self.seconds)}, {self.share:.2f} of running the whole model for every condition. "
            f"Timed: clean forward passes of {self.batch_size} images. A condition is taken to cost its blocks from "
            f"the first edited one on; the edits themselves, extra tokens, metrics, fitting, reading of images, and "
            f"what stacking conditions saves are not in it.",
            f"Result: {size_text(self.raw_bytes)} with {self.n_metrics} metrics "
            f"({self.raw_row_bytes:.0f} bytes a row), about {size_text(self.stored_bytes)} as Parquet "
            f"({self.stored_row_bytes:.1f} bytes a row in a part of random numbers).",
        ]
        return "\n".join(parts)

    def __str__(self) -> str:
        return self.describe()


def plan_sweep(
    vit: HookedViT | Mapping[str, HookedViT],
    images: Tensor | Source | Mapping[str, Tensor | Source],
    conditions: Iterable[Condition],
    metrics: Sequence[Metric] | None = None,
    *,
    batch_size: int = 16,
    shard_size: int = 256,
    group_size: int = GROUP,
) -> SweepPlan:
    """Dry run: what `run_sweep` with the same arguments will do, clean runs included; one batch goes twice through each
    model.

    Args:
        vit: the model, or the models by the names that conditions use.
        images: preprocessed, or a source, or those by the names that conditions use.
        conditions: fitted or not; they are checked against the models.
        metrics: as for `run_sweep`.
        batch_size: images at once.
        shard_size: images of a shard, where a tensor is given.
        group_size: conditions of a task at most.

    Raises:
        ConfigError: what `run_sweep` refuses, such as a condition about images that are not given.
        ImageError: there are no images.
        InterventionError: conditions do not fit their models; all are counted, the first few listed.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.sweep.grid import grid
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> heads = grid(lambda layer: rl.Ablate(rl.Heads([(layer, 0)])), layer=range(6))
        >>> plan = plan_sweep(vit, torch.rand(8, 3, 48, 48), heads)
        >>> plan.n_conditions, plan.n_tasks, plan.n_rows, plan.runs[0].forwards
        (7, 1, 56, 4.5)
    """
    models, sources = as_models(vit), as_sources(images, None, shard_size)
    planned = as_conditions(conditions, models, sources)
    names = [metric.name for metric in as_metrics(metrics, models, sources)]
    by_key = {condition.key: condition for condition in planned}
    groups: dict[tuple[str, str], list[list[Condition]]] = {}
    for keys in group_conditions(planned.listed, models, group_size):
        group = [by_key[key] for key in keys]
        groups.setdefault((group[0].model, group[0].images), []).append(group)
    runs = tuple(_run(place, models, sources, mine, batch_size) for place, mine in groups.items())
    (_, first_images), first_groups = next(iter(groups.items()))
    shard = first_shard(sources[first_images])
    raw, stored = _row_bytes(first_groups[0], shard.names, names)
    return SweepPlan(
        runs=runs,
        n_metrics=len(names),
        batch_size=min(batch_size, len(shard.names)),
        raw_row_bytes=raw,
        stored_row_bytes=stored,
    )


def _run(
    place: tuple[str, str],
    models: Mapping[str, HookedViT],
    sources: Mapping[str, Source],
    groups: Sequence[Sequence[Condition]],
    batch_size: int,
) -> PlannedRun:
    vit, source = models[place[0]], sources[place[1]]
    shard = first_shard(source)
    mine = [condition for group in groups for condition in group]
    return PlannedRun(
        model=place[0],
        images=place[1],
        n_images=source.n_shards * len(shard.names) if source.n_images is None else source.n_images,
        n_layers=vit.cfg.n_layers,
        first_layers=dict(sorted(Counter(condition.first_layer(vit) for condition in mine).items())),
        n_groups=len(groups),
        n_tasks=len(groups) * source.n_shards,
        n_passes=n_passes(mine),
        clean_seconds=time_clean(vit, shard.images[:batch_size]),
        device=str(vit.device),
    )


def first_shard(source: Source) -> Shard:
    """The first shard that has a usable image."""
    for index in range(source.n_shards):
        shard = source.shard(index)
        if len(shard.images):
            return shard
    raise ImageError("No image of this source can be used. Check its paths.")


def time_clean(vit: HookedViT, images: Float[Tensor, "batch channel height width"]) -> float:
    """Seconds per image of one forward pass of this batch, after one that warms up.

    Example:
        >>> import registerlens as rl
        >>> time_clean(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)) > 0
        True
    """
    device = vit.device
    images = images.to(device)
    spent = 0.0
    with torch.inference_mode():
        for _ in range(2):
            _wait(device)
            start = perf_counter()
            vit(images)
            _wait(device)
            spent = perf_counter() - start
    return spent / len(images)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row_bytes(group: Sequence[Condition], names: Sequence[str], metrics: Sequence[str]) -> tuple[float, float]:
    """Bytes of a row, raw and as Parquet, from a part of that group and shard filled with random numbers."""
    n_rows = len(group) * len(names)
    generator = torch.Generator().manual_seed(0)
    columns = [
        [condition.key for condition in group for _ in names],
        [0] * n_rows,
        list(names) * len(group),
        *(torch.rand(n_rows, generator=generator).double().numpy() for _ in metrics),
    ]
    schema = part_schema(metrics)
    table = pa.table([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema)
    return table.nbytes / n_rows, len(to_bytes(table, Task(0, 0))) / n_rows


# Words --------------------------------------------------------------------------------------------------------------


def _summary(run: PlannedRun) -> str:
    """A run in words, with the histogram of its first edited layers."""
    where = f"{run.model} on {run.n_images:,} {run.images}" if run.images != "images" else f"{run.n_images:,} images"
    head = (
        f"{where}: conditions: {run.n_conditions:,}, groups: {run.n_groups:,}; a clean image takes "
        f"{1000 * run.clean_seconds:.2f} ms on {run.device}."
    )
    fits = f"  Passes over the reference images that come first: {run.n_passes:,}." if run.n_passes else ""
    bars = [("first edited block", "conditions", "")]
    most = max(run.first_layers.values())
    for first, n in run.first_layers.items():
        label = "none (clean)" if first == run.n_layers else str(first)
        bars.append((label, f"{n:,}", "#" * max(1, round(WIDTH * n / most))))
    return "\n".join([head, *filter(None, [fits]), *(f"  {a:>18}  {b:>10}  {c}".rstrip() for a, b, c in bars)])


def time_text(seconds: float | int) -> str:
    """Seconds in words.

    Example:
        >>> time_text(0.25), time_text(75), time_text(7300), time_text(200_000)
        ('0.25 s', '1 min 15 s', '2 h 2 min', '2 d 8 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    largest = next(i for i, (_, size) in enumerate(units) if seconds >= size)
    (name, size), (then, smaller) = units[largest : largest + 2]
    whole, rest = divmod(round(seconds / smaller), size // smaller)
    return f"{whole} {name} {rest} {then}" if rest else f"{whole} {name}"

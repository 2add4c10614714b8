"""A sweep's tasks: groups of conditions on shards of images, and the tables they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import torch

from registerlens.data.images import Skipped
from registerlens.data.sources import LastShard, Shard, Source
from registerlens.engine.backends import PackedModel, Task, pack
from registerlens.engine.store import with_skipped
from registerlens.errors import ImageError
from registerlens.evaluation.edit_runs import measure_edits
from registerlens.evaluation.metrics import Metric
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepJob:
    """See `registerlens.engine.backends.Job`."""

    models: Mapping[str, HookedViT | PackedModel]
    """Models by the names that conditions use."""
    sources: Mapping[str, Source]
    """Image sets by the names that conditions use."""
    conditions: Mapping[str, Condition]
    """Fitted conditions by key."""
    groups: tuple[tuple[str, ...], ...]
    """Keys of the conditions of each group; one group has one model and one image set."""
    metrics: tuple[Metric, ...]
    """The columns, in order."""
    batch_size: int
    """Images whose clean run is made at once."""
    stack: int
    """Sequences (images x conditions) that go through the model at once."""
    threads: int
    """Torch threads a worker uses: another number may change the last bit of a sum."""

    def place(self, task: Task) -> tuple[str, int]:
        """Which images a task looks at: the name of their set, and the shard."""
        return self.conditions[self.groups[task.group][0]].images, task.shard

    def packed(self) -> SweepJob:
        """The same job with its models ready to be sent; every worker of every kind takes the same bytes.

        Raises:
            ConfigError: hooks or edits are in force on a model.
        """
        models = {name: pack(vit) if isinstance(vit, HookedViT) else vit for name, vit in self.models.items()}
        return replace(self, models=models)

    def unpacked(self, device: torch.device | str = "cpu") -> SweepJob:
        """The same job, ready to be done: models in this process, on a device; sources keep the shard in use."""
        models = {
            name: vit.unpack(device) if isinstance(vit, PackedModel) else vit for name, vit in self.models.items()
        }
        return replace(self, models=models, sources={name: LastShard(source) for name, source in self.sources.items()})

    def perform(self, task: Task) -> pa.Table:
        """Do one task, from reading its images to its table; images that cannot be used are named in its metadata.

        A shard that cannot be read as images at all gives an empty table and is named itself. Other failures, such as
        a broken connection or a file that changed (SourceError), are raised: they may pass, and a later run does it.
        """
        conditions = [self.conditions[key] for key in self.groups[task.group]]
        vit, source = self.models[conditions[0].model], self.sources[conditions[0].images]
        if isinstance(vit, PackedModel):
            raise TypeError("perform needs job.unpacked(), made once in each worker.")
        nothing = part_schema(metric.name for metric in self.metrics).empty_table()
        try:
            shard = source.shard(task.shard)
        except ImageError as error:
            return with_skipped(nothing, [Skipped(f"shard {task.shard}", str(error))])
        if not shard.names:
            return with_skipped(nothing, shard.skipped)
        table = run_task(
            vit, shard, conditions, self.metrics, index=task.shard, batch_size=self.batch_size, stack=self.stack
        )
        return with_skipped(table, shard.skipped)


def run_task(
    vit: HookedViT,
    shard: Shard,
    conditions: Sequence[Condition],
    metrics: Sequence[Metric],
    *,
    index: int,
    batch_size: int,
    stack: int,
) -> pa.Table:
    """What `measure_edits` finds of a shard, as a table; `index` is the shard's number.

    Returns:
        a row for each condition and image, in the order of both: condition (its key), shard, image (its name), and the
        metrics in float64.
    """
    edits = [condition.interventions for condition in conditions]
    values = measure_edits(
        vit, shard.images, edits, metrics, labels=shard.labels, batch_size=batch_size, stack=stack
    ).numpy()
    n = len(shard.names)
    columns = {
        "condition": pa.array([condition.key for condition in conditions for _ in range(n)], pa.string()),
        "shard": pa.array([index] * (n * len(conditions)), pa.int32()),
        "image": pa.array(list(shard.names) * len(conditions), pa.string()),
    }
    return pa.table(columns | {metric.name: pa.array(values[..., i].ravel()) for i, metric in enumerate(metrics)})


def part_schema(metrics: Iterable[str]) -> pa.Schema:
    """Columns of every part and of the whole table.

    Example:
        >>> part_schema(["drift"]).names
        ['condition', 'shard', 'image', 'drift']
    """
    fixed = [("condition", pa.string()), ("shard", pa.int32()), ("image", pa.string())]
    return pa.schema([*fixed, *((name, pa.float64()) for name in metrics)])

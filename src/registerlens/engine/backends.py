"""What a sweep's workers get and give back, and the simplest of them: this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import pyarrow as pa
import torch

from registerlens.data.images import Skipped
from registerlens.data.sources import LastShard, Source
from registerlens.engine.packing import PackedModel, pack
from registerlens.engine.parts import part_schema, with_skipped
from registerlens.errors import ImageError
from registerlens.evaluation.edit_runs import run_task
from registerlens.evaluation.metrics import Metric
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition
from registerlens.sweep.tasks import Task


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Everything that decides what a task's table holds.

    A backend in the driver's process takes it as it is. Others send `packed()`, once to each worker, which calls
    `unpacked()` once and then `perform(job, task)` for each of its tasks.
    """

    models: Mapping[str, HookedViT | PackedModel]
    """By the names that conditions use."""
    sources: Mapping[str, Source]
    """Image sets by the names that conditions use."""
    conditions: Mapping[str, Condition]
    """By key; fitted."""
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

    def packed(self) -> Job:
        """The same job with its models ready to be sent; every worker of every kind takes the same bytes.

        Raises:
            ConfigError: hooks or edits are in force on a model.
        """
        models = {name: pack(vit) if isinstance(vit, HookedViT) else vit for name, vit in self.models.items()}
        return replace(self, models=models)

    def unpacked(self, device: torch.device | str = "cpu") -> Job:
        """The same job, ready to be done: models in this process, on a device; sources keep the shard in use."""
        models = {
            name: vit.unpack(device) if isinstance(vit, PackedModel) else vit for name, vit in self.models.items()
        }
        return replace(self, models=models, sources={name: LastShard(one) for name, one in self.sources.items()})


@runtime_checkable
class Backend(Protocol):
    """Where tasks are done."""

    def run(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[Task, pa.Table]]:
        """Do the tasks, each once, and give each with its table, in any order.

        Tasks are taken from the iterable as they are needed, and results are not piled up while the driver writes.
        Closing the iterator (or an exception in the driver) stops the workers.
        """
        ...


@dataclass(frozen=True)
class LocalBackend:
    """One task after another in this process, on the device where the model is."""

    def run(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[Task, pa.Table]]:
        """See `Backend`."""
        job = job.unpacked()
        for task in tasks:
            with torch_threads(job.threads):
                table = perform(job, task)
            yield task, table


def perform(job: Job, task: Task) -> pa.Table:
    """One task, from reading its images to its table; images that cannot be used are named in the table's metadata.

    A shard that cannot be read as images at all gives an empty table and is named itself. Other failures, such as a
    broken connection or a file that changed (SourceError), are raised: they may pass, and a later run does the task.

    Args:
        job: with its models unpacked.
        task: which group of conditions, which shard.
    """
    conditions = [job.conditions[key] for key in job.groups[task.group]]
    vit, source = job.models[conditions[0].model], job.sources[conditions[0].images]
    if isinstance(vit, PackedModel):
        raise TypeError("perform needs job.unpacked(), made once in each worker.")
    nothing = part_schema(metric.name for metric in job.metrics).empty_table()
    try:
        shard = source.shard(task.shard)
    except ImageError as error:
        return with_skipped(nothing, [Skipped(f"shard {task.shard}", str(error))])
    if not shard.names:
        return with_skipped(nothing, shard.skipped)
    table = run_task(vit, shard, conditions, job.metrics, index=task.shard, batch_size=job.batch_size, stack=job.stack)
    return with_skipped(table, shard.skipped)


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Torch on so many threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)

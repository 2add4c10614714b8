"""What workers get and give back, and the simplest of them: this process."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import pyarrow as pa
import torch

from registerlens.engine.packing import PackedModel
from registerlens.engine.tasks import Task
from registerlens.model.vit import HookedViT


class Job(Protocol):
    """Everything that decides what a task's table holds.

    A backend in the driver's process takes it as it is. Others send `packed()`, once to each worker, which calls
    `unpacked()` once and then `perform(task)` for each of its tasks.
    """

    @property
    def models(self) -> Mapping[str, HookedViT | PackedModel]:
        """By name."""
        ...

    @property
    def threads(self) -> int:
        """Torch threads a worker uses: another number may change the last bit of a sum."""
        ...

    def place(self, task: Task) -> Hashable:
        """Which images a task looks at."""
        ...

    def packed(self) -> Self:
        """The same job with its models ready to be sent; every worker of every kind takes the same bytes."""
        ...

    def unpacked(self, device: torch.device | str = "cpu") -> Self:
        """The same job, ready to be done: models in this process, on a device."""
        ...

    def perform(self, task: Task) -> pa.Table:
        """Do one task, from reading its images to its table."""
        ...


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
            with _torch_threads(job.threads):
                table = job.perform(task)
            yield task, table


@contextmanager
def _torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)

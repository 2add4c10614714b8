"""Tasks, the job they belong to, models on their way to workers, and the simplest of workers: this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from registerlens.errors import ConfigError
from registerlens.loading import native
from registerlens.model.parts import listening
from registerlens.model.vit import HookedViT

GROUP = 64
"""Runs of a task at most: they share the clean run."""


@dataclass(frozen=True, order=True)
class Task:
    """One group of runs on one shard of images: what a worker does at a time, and one file of the store.

    Example:
        >>> Task(group=3, shard=12).name
        'g00003-s000012'
    """

    group: int
    """Index of the group of runs."""
    shard: int
    """Index of the shard of images."""

    @property
    def name(self) -> str:
        """Its name in the store."""
        return f"g{self.group:05d}-s{self.shard:06d}"


def tasks_of(n_groups: int, n_shards: Mapping[int, int]) -> Iterator[Task]:
    """Every task; `n_shards` says for each group how many shards its image set has.

    Example:
        >>> [task.name for task in tasks_of(2, {0: 1, 1: 2})]
        ['g00000-s000000', 'g00001-s000000', 'g00001-s000001']
    """
    return (Task(group, shard) for group in range(n_groups) for shard in range(n_shards[group]))


class TaskQueue:
    """Tasks that wait to be done, by the images they look at.

    Reading and decoding a shard costs about as much as some conditions on it. So a worker is kept on a shard until no
    task on it is left; then it gets a shard that nobody has begun; and when there is none, it helps where most is left.

    Args:
        tasks: all of them; they are few enough to be listed (docs/scaling.md).
        place: which images a task looks at.

    Example:
        >>> queue = TaskQueue([Task(0, 0), Task(0, 1), Task(1, 0), Task(1, 1)], lambda task: task.shard)
        >>> first, second = queue.take(None), queue.take(None)
        >>> first.name, second.name, queue.take(first.shard).name, len(queue)
        ('g00000-s000000', 'g00000-s000001', 'g00001-s000000', 1)
    """

    def __init__(self, tasks: Iterable[Task], place: Callable[[Task], Hashable]) -> None:
        self.place = place
        self._waiting: dict[Hashable, deque[Task]] = {}
        self._left = 0
        for task in tasks:
            self._waiting.setdefault(place(task), deque()).append(task)
            self._left += 1
        self._fresh = deque(self._waiting)

    def __len__(self) -> int:
        """Tasks that wait."""
        return self._left

    def take(self, place: Hashable) -> Task | None:
        """The next task for a worker that holds the images of `place` (None: of no place); None if none waits."""
        if not self._left:
            return None
        if not self._waiting.get(place):
            place = self._elsewhere()
        self._left -= 1
        return self._waiting[place].popleft()

    def put_back(self, task: Task) -> None:
        """A task that was taken and lost; it is the next one on its images."""
        self._waiting[self.place(task)].appendleft(task)
        self._left += 1

    def _elsewhere(self) -> Hashable:
        while self._fresh:
            if self._waiting[place := self._fresh.popleft()]:
                return place
        return max(self._waiting, key=lambda place: len(self._waiting[place]))


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A HookedViT on its way to a worker: RegisterLens's own folder format, in memory.

    In memory and not in a folder, since workers on other machines see no common disk: what carries the job (a pipe, an
    object store) carries the model with it. Safetensors and not a pickled module, since hooks are closures.
    """

    described: dict[str, Any]
    """What config.json would say."""
    weights: bytes = field(repr=False)
    """What model.safetensors would hold."""

    def unpack(self, device: torch.device | str = "cpu") -> HookedViT:
        """The model, its weights bit for bit those that were packed."""
        return native.build(self.described, from_bytes(self.weights), "a packed model").to(device)


def pack(vit: HookedViT) -> PackedModel:
    """A model, ready to be sent.

    Raises:
        ConfigError: hooks or edits are in force, which would be left behind.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> there = pack(vit).unpack()
        >>> torch.equal(there.blocks[0].mlp.b_in, vit.blocks[0].mlp.b_in)
        True
    """
    check_untouched(vit, "The model")
    return PackedModel(described=native.describe(vit), weights=to_bytes(native.weights_of(vit)))


def check_untouched(vit: HookedViT, name: str) -> None:
    """A sweep measures the model as it is, and no edit that happens to be in force.

    Raises:
        ConfigError: hooks or edits are in force.
    """
    hooked = [point for point, hook in vit.hook_dict.items() if listening(hook)]
    if hooked or vit.n_test_time_registers:
        where = f" at {', '.join(hooked[:3])}" if hooked else ""
        raise ConfigError(
            f"{name} has hooks or edits in force{where}. They would change the clean run and are not part of any "
            f"condition: leave the `with vit.edit(...)` block (or vit.reset_hooks()), and put edits into conditions."
        )


@runtime_checkable
class Job(Protocol):
    """Everything that decides what a task's table holds.

    A backend in the driver's process takes it as it is. Others send `packed()`, once to each worker, which calls
    `unpacked()` once and then `perform(task)` for each of its tasks.
    """

    @property
    def models(self) -> Mapping[str, HookedViT | PackedModel]:
        """The models by name."""
        ...

    @property
    def threads(self) -> int:
        """Torch threads a worker uses: another number may change the last bit of a sum."""
        ...

    def place(self, task: Task) -> Hashable:
        """Which images a task looks at."""
        ...

    def packed(self) -> Job:
        """The same job with its models ready to be sent; every worker of every kind takes the same bytes."""
        ...

    def unpacked(self, device: torch.device | str = "cpu") -> Job:
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

"""Tasks, each small enough to be lost and large enough to share work, and which one a worker does next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

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

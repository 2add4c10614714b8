"""Which task a worker does next: one on images that it already holds, where there is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable

from registerlens.sweep.tasks import Task


class Agenda:
    """Tasks that wait to be done, by the images they look at.

    Reading and decoding a shard costs about as much as some conditions on it. So a worker is kept on a shard until no
    task on it is left; then it gets a shard that nobody has begun; and when there is none, it helps where most is left.

    Args:
        tasks: all of them; they are few enough to be listed (docs/scaling.md).
        place: which images a task looks at.

    Example:
        >>> agenda = Agenda([Task(0, 0), Task(0, 1), Task(1, 0), Task(1, 1)], lambda task: task.shard)
        >>> first, second = agenda.take(None), agenda.take(None)
        >>> first.name, second.name, agenda.take(first.shard).name, len(agenda)
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

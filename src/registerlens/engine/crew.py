"""Workers in other processes: each gets the job once, then task after task; one that dies or hangs is replaced."""

import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from registerlens.engine.backends import Task, TaskQueue
from registerlens.errors import BackendError

WORKED = 1e-3
"""Seconds of processor time between two beats that are a sign of work: to wait takes fewer."""


@dataclass(eq=False)
class Worker:
    """A place for a worker; one that dies leaves it to the next."""

    handle: Any = None
    """What the launcher reaches it by."""
    tasks: list[Task] = field(default_factory=list)
    """Given out and unfinished, in the order in which they are done."""
    place: Hashable = None
    """The images it looked at last, which it still holds."""
    ready: bool = False
    """Whether it takes tasks."""
    last: float = 0.0
    """When it showed life or was given work last, on its launcher's clock."""
    lost_starts: int = 0
    """Workers that died here before they took any."""


@dataclass(frozen=True)
class Started:
    """A worker is ready for tasks."""


@dataclass(frozen=True)
class Lost:
    """A worker died or hangs, or what it computed is gone."""

    why: str
    """Goes on after "the last one"."""
    advice: str = ""
    """What to do about it."""
    how: str = "died"


def hung(patience: float | int) -> Lost:
    """What becomes of a worker that has a task and used no processor for so many seconds."""
    return Lost(
        f"with no sign of work for {patience:g} s",
        "It used no processor, as when images or a metric wait for a server, or it was stopped: look into that with "
        "backend='local', or give the backend more `patience`.",
        how="died or hung",
    )


def beat_of(patience: float | int) -> float:
    """Seconds between two signs of life of a worker, at most."""
    return min(5.0, patience / 4)


Answer = pa.Table | Exception | Started | Lost
"""A worker's answer: a task's table, what the task raised, or what became of the worker."""


@runtime_checkable
class Launcher(Protocol):
    """How workers of one kind are started, reached and stopped."""

    def start(self, worker: Worker) -> None:
        """Start a new worker in a place, and send it the job."""
        ...

    def give(self, worker: Worker, task: Task) -> None:
        """Send a task; a dead worker is reported by `wait`."""
        ...

    def wait(self, workers: Sequence[Worker]) -> tuple[Worker, Task | None, Answer]:
        """What the next of these has to say, and the task it is about: none if it starts, or dies idle."""
        ...

    def stop(self, worker: Worker) -> None:
        """End a worker, whatever it does; it holds nothing that could be lost."""
        ...


@dataclass(eq=False)
class Crew:
    """All workers of a run, which tasks each has, and the tasks that wait.

    Nothing piles up while the driver writes: no more than `limit` tasks are sent out or have a table that waits.
    """

    launcher: Launcher
    queue: TaskQueue
    size: int
    """Workers at most."""
    limit: int
    """Tasks sent out, and tables that wait for the driver, at most."""
    ahead: int = 1
    """Tasks a worker has at most: with two, one waits so that the worker need not."""
    retries: int = 3
    """How often a task is given out again after its worker died, and a worker that dies while it starts is replaced."""
    workers: list[Worker] = field(default_factory=list)
    losses: Counter[Task] = field(default_factory=Counter)
    given: dict[Task, float] = field(default_factory=dict)
    """When each task was given out first."""

    def work(self) -> Iterator[tuple[Task, pa.Table]]:
        """Give out tasks, take in tables; at the end, however it comes, no worker is left.

        Raises:
            BackendError: workers died on one task again and again, or there is none to be had.
            Exception: what a task raised in its worker, with a note that names the task.
        """
        try:
            for _ in range(min(self.size, len(self.queue))):
                self.launcher.start(worker := Worker())
                self.workers.append(worker)
            while self.queue or any(worker.tasks for worker in self.workers):
                self._give_out()
                worker, task, answer = self.launcher.wait(self.workers)
                if task is not None and isinstance(answer, pa.Table):
                    worker.tasks.remove(task)
                    self._give_out(held=1)  # before the driver goes on to write
                    yield task, answer
                else:
                    self._note(worker, task, answer)
        finally:
            for worker in self.workers:
                self.launcher.stop(worker)

    def _give_out(self, held: int = 0) -> None:
        """Tasks for the workers that have too few, while `held` tables wait for the driver."""
        for depth in range(self.ahead):  # nobody gets a second task before everybody has one
            for worker in self.workers:
                in_flight = held + sum(len(other.tasks) for other in self.workers)
                if not worker.ready or len(worker.tasks) != depth or in_flight >= self.limit:
                    continue
                if (task := self.queue.take(worker.place)) is None:
                    return
                worker.tasks.append(task)
                worker.place = self.queue.place(task)
                self.given.setdefault(task, time.monotonic())
                self.launcher.give(worker, task)

    def _note(self, worker: Worker, task: Task | None, answer: Answer) -> None:
        """What a worker says where it gives no table."""
        if isinstance(answer, Started):
            worker.ready, worker.lost_starts = True, 0
        elif isinstance(answer, Lost):
            self._replace(worker, answer)
        elif isinstance(answer, Exception):
            answer.add_note(f"In task {task.name if task else ''}, in a worker process.")
            raise answer

    def _replace(self, worker: Worker, lost: Lost) -> None:
        """A worker is dead: all of its tasks wait again, and a new one is started in its place."""
        if worker.tasks:
            self._blame(worker.tasks[0], lost)
            for task in reversed(worker.tasks):
                self.queue.put_back(task)
        elif not worker.ready:
            worker.lost_starts += 1
        self.launcher.stop(worker)
        worker.tasks, worker.place, worker.ready = [], None, False
        if worker.lost_starts > self.retries:
            self.workers.remove(worker)
        else:
            self.launcher.start(worker)

    def _blame(self, task: Task, lost: Lost) -> None:
        """The task that a worker did when it died.

        Raises:
            BackendError: this has happened too often on this task.
        """
        self.losses[task] += 1
        if self.losses[task] > self.retries:
            times = f"{self.losses[task]} times in {time.monotonic() - self.given[task]:.0f} s"
            raise BackendError(
                f"Worker processes {lost.how} {times} on the task {task.name} (the last one {lost.why}). "
                f"What was stored before is intact. {lost.advice}"
            )

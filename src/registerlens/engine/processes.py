"""Worker processes on this machine's CPUs: each gets the job once, then task after task; one that dies is replaced."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import pyarrow as pa
import torch

from registerlens.engine.agenda import Agenda
from registerlens.engine.backends import Job, perform
from registerlens.errors import BackendError, ConfigError
from registerlens.model.vit import HookedViT
from registerlens.sweep.tasks import Task

RETRIES = 3
"""How often a task is given to a new worker after one died on it."""
GONE = (EOFError, ConnectionError, BrokenPipeError)
"""How a pipe says that there is nobody at its other end."""


@dataclass(frozen=True, kw_only=True)
class ProcessBackend:
    """Worker processes on the CPUs of this machine.

    A worker takes its next task only when its last table has been read, so that no more tables wait than there are
    workers. Workers are forked from a clean server process (spawned where there is none), not from this one, whose
    threads and locks they would inherit: a script needs the usual `if __name__ == "__main__":`.

    Raises:
        ConfigError: fewer than one worker.
    """

    workers: int
    """How many; each uses `Job.threads` torch threads."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"The backend 'processes' needs at least one worker, got workers={self.workers}.")

    def run(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[Task, pa.Table]]:
        """See `Backend`.

        Raises:
            ConfigError: a model is not on the CPU, or the job cannot be sent.
            BackendError: workers died on one task again and again; the message names it.
            Exception: what a task raised in its worker, with a note that names the task.
        """
        pool = _Pool(_bytes_of(job), self.workers, Agenda(tasks, job.place))
        try:
            yield from pool.results()
        finally:
            pool.stop()


def _bytes_of(job: Job) -> bytes:
    """The job as bytes.

    Raises:
        ConfigError: it holds something that pickle cannot send.
    """
    for name, vit in job.models.items():
        if isinstance(vit, HookedViT) and vit.device.type != "cpu":
            raise ConfigError(
                f"The backend 'processes' is for CPUs, but the model '{name}' is on {vit.device}. Use backend='local', "
                f"which stacks conditions, or move it: vit.to('cpu')."
            )
    packed = job.packed()
    try:
        return pickle.dumps(packed)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        with suppress(ImportError):
            import cloudpickle  # noqa: PLC0415  (comes with Ray; sends lambdas and a notebook's functions too)

            return cloudpickle.dumps(packed)
        raise ConfigError(
            f"The sweep cannot be sent to worker processes: {error}. Write a metric's function at the top level of a "
            f"module (no lambda), or install cloudpickle, or use backend='local'."
        ) from error


# The driver's side ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    place: Any = None
    """The images it looked at last, which it still holds."""

    def give(self, task: Task) -> bool:
        """Hand over a task; False if the worker is dead."""
        self.task = task
        try:
            self.pipe.send(task)
        except GONE:
            return False
        return True


@dataclass
class _Pool:
    """Workers, which task each has, and the tasks that wait."""

    job: bytes = field(repr=False)
    size: int
    agenda: Agenda = field(repr=False)
    workers: list[_Worker] = field(default_factory=list)
    deaths: Counter[Task] = field(default_factory=Counter)

    def results(self) -> Iterator[tuple[Task, pa.Table]]:
        """Give out tasks, take in tables."""
        while True:
            self._give_out()
            busy = {worker.pipe: worker for worker in self.workers if worker.task is not None}
            if not busy:
                return
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                task, table = worker.task, self._take(worker)
                if table is not None and task is not None:
                    self._give_out()  # before the driver goes on to write
                    yield task, table

    def stop(self) -> None:
        """End every worker, whatever it does."""
        for worker in self.workers:
            worker.process.kill()  # it holds nothing that could be lost
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join()
        self.workers.clear()

    def _give_out(self) -> None:
        """A task for every idle worker, and new workers up to the limit, while there are tasks."""
        while True:
            idle = next((worker for worker in self.workers if worker.task is None), None)
            if idle is None and len(self.workers) >= self.size:
                return
            place = idle.place if idle else None
            if (task := self.agenda.take(place)) is None:
                return
            worker = idle or self._start()
            worker.place = self.agenda.place(task)
            if not worker.give(task):
                self._bury(worker)

    def _take(self, worker: _Worker) -> pa.Table | None:
        """A worker's table; None if it has died instead.

        Raises:
            Exception: the task failed.
        """
        task = worker.task
        try:
            done, told = worker.pipe.recv()
        except (*GONE, OSError):
            self._bury(worker)
            return None
        worker.task = None
        if not done:
            told.add_note(f"In task {task.name if task else ''}, in a worker process.")
            raise told
        return told

    def _start(self) -> _Worker:
        context = _context()
        mine, its = context.Pipe()
        process = context.Process(target=_work, args=(its,), daemon=True, name="registerlens-worker")
        process.start()
        its.close()  # so that its end is closed when it dies
        worker = _Worker(process, mine)
        self.workers.append(worker)
        with suppress(*GONE):  # noticed when it gets its task
            mine.send_bytes(self.job)
        return worker

    def _bury(self, worker: _Worker) -> None:
        """A worker is dead: its task is for another one.

        Raises:
            BackendError: this has happened too often on this task.
        """
        self.workers.remove(worker)
        worker.pipe.close()
        worker.process.join()
        task = worker.task
        if task is None:
            return
        self.deaths[task] += 1
        if self.deaths[task] > RETRIES:
            raise BackendError(
                f"Worker processes died {self.deaths[task]} times on the task {task.name} (the last one with "
                f"{_fate(worker.process.exitcode)}). What was stored before is intact. Most often memory is the cause: "
                f"use fewer workers or a smaller batch_size. A script also needs `if __name__ == '__main__':`."
            )
        self.agenda.put_back(task)


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _context() -> Any:
    """Where worker processes come from."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo takes seconds to import, which PyTorch does where a model is built without memory for its weights.
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    return context


# The worker's side ---------------------------------------------------------------------------------------------------


def _work(pipe: Connection) -> None:
    """What a worker does until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which ends the workers
    with suppress(*GONE):
        job = pickle.loads(pipe.recv_bytes())
        torch.set_num_threads(job.threads)
        job = job.unpacked()
        while True:
            task = pipe.recv()
            try:
                told = True, perform(job, task)
            except Exception as error:  # whatever it is, the driver tells the user
                told = False, _sendable_error(error)
            pipe.send(told)


def _sendable_error(error: Exception) -> Exception:
    """The error with its traceback in a note; in words where pickle cannot send it."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # what pickle raises is up to the error's class
        return BackendError("".join(traceback.format_exception(error)))
    return error

"""Worker processes on this machine's CPUs: each gets the job once, then tasks; one that dies or hangs is replaced."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

import pyarrow as pa
import torch

from registerlens.engine.agenda import Agenda
from registerlens.engine.backends import Job, perform
from registerlens.errors import BackendError, ConfigError
from registerlens.model.vit import HookedViT
from registerlens.sweep.tasks import Task

RETRIES = 3
"""How often a task is given to a new worker after one died or hung on it."""
BEAT = 5.0
"""Seconds between two signs of life of a worker, at most."""
GRACE = 10.0
"""Seconds in which a process that closed its pipe, or was killed, has to end."""
GONE = (EOFError, ConnectionError, BrokenPipeError)
"""How a pipe says that there is nobody at its other end."""
AT_WORK, DEAD, HUNG = None, "dead", "hung"
"""What is heard of a worker besides what came of its task."""


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
    patience: float | int = 300.0
    """Seconds for which a worker with a task may use no processor. After them it counts as hung, and is killed: it was
    stopped, say, or waits for a server."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"The backend 'processes' needs at least one worker, got workers={self.workers}.")

    def run(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[Task, pa.Table]]:
        """See `Backend`.

        Raises:
            ConfigError: a model is not on the CPU, or the job cannot be sent.
            BackendError: workers died or hung on one task again and again; the message names it.
            Exception: what a task raised in its worker, with a note that names the task.
        """
        pool = _Pool(_bytes_of(job), self.workers, self.patience, Agenda(tasks, job.place))
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
    tasks: SimpleQueue[Task | None] = field(default_factory=SimpleQueue)
    task: Task | None = None
    place: Any = None
    """The images it looked at last, which it still holds."""
    last: float = 0.0
    """When it was heard or given a task last, on the pool's clock."""

    def talk(self, job: bytes, heard: SimpleQueue[tuple[_Worker, Any]]) -> None:
        """All that is said to it and by it, in a thread: the pipe to a process that is stopped may block for ever."""
        with self.pipe, suppress(*GONE, OSError):
            self.pipe.send_bytes(job)
            while (task := self.tasks.get()) is not None:
                self.pipe.send(task)
                while (said := self.pipe.recv()) is AT_WORK:
                    heard.put((self, AT_WORK))
                heard.put((self, said))
        heard.put((self, DEAD))

    def kill(self) -> None:
        """End it, whatever it does; it holds nothing that could be lost."""
        self.process.kill()
        self.tasks.put(None)


@dataclass
class _Pool:
    """Workers, which task each has, and the tasks that wait."""

    job: bytes = field(repr=False)
    size: int
    patience: float | int
    agenda: Agenda = field(repr=False)
    workers: list[_Worker] = field(default_factory=list)
    deaths: Counter[Task] = field(default_factory=Counter)
    heard: SimpleQueue[tuple[_Worker, Any]] = field(default_factory=SimpleQueue)
    clock: float = 0.0
    """Seconds for which it has listened: not those in which the driver writes, or is stopped itself."""

    def results(self) -> Iterator[tuple[Task, pa.Table]]:
        """Give out tasks, take in tables.

        Raises:
            Exception: a task failed.
        """
        while True:
            self._give_out()
            if not any(worker.task for worker in self.workers):
                return
            worker, said = self._listen()
            if worker not in self.workers or said is AT_WORK:
                continue
            if said in (DEAD, HUNG):
                self._bury(worker, said)
                continue
            (done, told), task, worker.task = said, worker.task, None
            if not done:
                told.add_note(f"In task {task.name if task else ''}, in a worker process.")
                raise told
            if task is not None:
                self._give_out()  # before the driver goes on to write
                yield task, told

    def stop(self) -> None:
        """End every worker, whatever it does."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.process.join(GRACE)
        self.workers.clear()

    def _listen(self) -> tuple[_Worker, Any]:
        """Who says something next, and what; of one that has said nothing for too long, that it hangs."""
        beat = _beat(self.patience)
        while True:
            for worker in self.workers:
                if worker.task is not None and self.clock - worker.last > self.patience:
                    return worker, HUNG
            began, said = time.monotonic(), None
            with suppress(Empty):
                said = self.heard.get(timeout=beat)
            self.clock += min(time.monotonic() - began, beat)
            if said is not None:
                said[0].last = self.clock
                return said

    def _give_out(self) -> None:
        """A task for every idle worker, and new workers up to the limit, while there are tasks."""
        while True:
            idle = next((worker for worker in self.workers if worker.task is None), None)
            if idle is None and len(self.workers) >= self.size:
                return
            if (task := self.agenda.take(idle.place if idle else None)) is None:
                return
            worker = idle or self._start()
            worker.task, worker.place, worker.last = task, self.agenda.place(task), self.clock
            worker.tasks.put(task)

    def _start(self) -> _Worker:
        context = _context()
        mine, its = context.Pipe()
        beat = _beat(self.patience)
        process = context.Process(target=_work, args=(its, beat), daemon=True, name="registerlens-worker")
        process.start()
        its.close()  # so that its end is closed when it dies
        worker = _Worker(process, mine)
        self.workers.append(worker)
        Thread(target=worker.talk, args=(self.job, self.heard), daemon=True, name="registerlens-worker").start()
        return worker

    def _bury(self, worker: _Worker, how: str) -> None:
        """A worker is dead, or hangs and is killed: its task is for another one.

        Raises:
            BackendError: this has happened too often on this task.
        """
        self.workers.remove(worker)
        if how is DEAD:
            worker.process.join(GRACE)
        worker.kill()
        worker.process.join(GRACE)
        task = worker.task
        if task is None:
            return
        self.deaths[task] += 1
        if self.deaths[task] > RETRIES:
            fate = _fate(worker.process.exitcode) if how is DEAD else f"no sign of work for {self.patience:g} s"
            raise BackendError(
                f"Worker processes {'died' if how is DEAD else 'died or hung'} {self.deaths[task]} times on the task "
                f"{task.name} (the last one with {fate}). What was stored before is intact. "
                + (_WHY_DEAD if how is DEAD else _WHY_HUNG)
            )
        self.agenda.put_back(task)


_WHY_DEAD = (
    "Most often memory is the cause: use fewer workers or a smaller batch_size. A script also needs "
    "`if __name__ == '__main__':`."
)
_WHY_HUNG = (
    "It used no processor, as when images or a metric wait for a server, or it was stopped: look into that with "
    "backend='local', or give ProcessBackend(workers=..., patience=...) more."
)


def _beat(patience: float | int) -> float:
    """Seconds between two signs of life."""
    return min(BEAT, patience / 4)


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


def _work(pipe: Connection, beat: float) -> None:
    """What a worker does until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which ends the workers
    turn = Lock()
    Thread(target=_live, args=(pipe, turn, beat), daemon=True).start()
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
            with turn:
                pipe.send(told)


def _live(pipe: Connection, turn: Any, beat: float) -> None:
    """Say from time to time that this process works, if it has used the processor for more than to say so."""
    used = time.process_time()
    with suppress(*GONE):
        while True:
            time.sleep(beat)
            before, used = used, time.process_time()
            if used - before > 1e-3:
                with turn:
                    pipe.send(AT_WORK)


def _sendable_error(error: Exception) -> Exception:
    """The error with its traceback in a note; in words where pickle cannot send it."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # what pickle raises is up to the error's class
        return BackendError("".join(traceback.format_exception(error)))
    return error

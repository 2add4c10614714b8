"""Worker processes on this machine's CPUs; one that hangs is replaced like one that is dead."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

import pyarrow as pa
import torch

from registerlens.engine.backends import Job, Task, TaskQueue
from registerlens.engine.crew import WORKED, Answer, Crew, Lost, Worker, beat_of, hung
from registerlens.errors import BackendError, ConfigError
from registerlens.model.vit import HookedViT
from registerlens.waiting import answer

RETRIES = 3
"""How often a task is given to a new worker after one died or hung on it."""
GRACE = 10.0
"""Seconds in which a process that closed its pipe, or was killed, has to end."""
STARTING = 120.0
"""Seconds in which a worker has to start, at least: before the first, the server it is forked from imports torch."""
GONE = (EOFError, ConnectionError, BrokenPipeError)
"""How a pipe says that there is nobody at its other end."""
AT_WORK, DEAD = None, "dead"
"""What a worker sends besides the outcome of its task."""


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
    stopped, say, or waits for a server. A task that computes has no limit, since nobody but you knows how long it may
    take; a run that is interrupted goes on later from what is stored."""

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
        launcher = _Launcher(_bytes_of(job), type(job).__module__, self.patience)
        queue, n = TaskQueue(tasks, job.place), self.workers
        yield from Crew(launcher, queue, size=n, limit=2 * n, retries=RETRIES).work()


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
            import cloudpickle  # comes with Ray; sends lambdas and a notebook's functions too

            return cloudpickle.dumps(packed)
        raise ConfigError(
            f"The sweep cannot be sent to worker processes: {error}. Write a metric's function at the top level of a "
            f"module (no lambda), or install cloudpickle, or use backend='local'."
        ) from error


# The driver's side ---------------------------------------------------------------------------------------------------

_WHY_DEAD = (
    "Most often memory is the cause: use fewer workers or a smaller batch_size. A script also needs "
    "`if __name__ == '__main__':`."
)


@dataclass(eq=False)
class _Process:
    """What a worker is reached by."""

    process: Any
    pipe: Connection
    tasks: SimpleQueue[Task | None] = field(default_factory=SimpleQueue)

    def talk(self, job: bytes, heard: SimpleQueue[tuple[_Process, Any]]) -> None:
        """All traffic with it, in a thread: the pipe to a process that is stopped may block for ever."""
        with self.pipe, suppress(*GONE, OSError):
            self.pipe.send_bytes(job)
            while (task := self.tasks.get()) is not None:
                self.pipe.send(task)
                while (message := self.pipe.recv()) is AT_WORK:
                    heard.put((self, AT_WORK))
                heard.put((self, message))
        heard.put((self, DEAD))


@dataclass(eq=False)
class _Launcher:
    """See `Launcher`."""

    job: bytes
    module: str
    """Where the job's class is: the server imports it once for all workers."""
    patience: float | int
    heard: SimpleQueue[tuple[_Process, Any]] = field(default_factory=SimpleQueue)
    clock: float = 0.0
    """Seconds for which it has listened: not those in which the driver writes, or is stopped itself."""

    def start(self, worker: Worker) -> None:
        context = _context(self.module)
        mine, its = context.Pipe()
        beat, limit = beat_of(self.patience), max(self.patience, STARTING)
        process = context.Process(target=_work, args=(its, beat), daemon=True, name="registerlens-worker")
        _wake_server()
        try:
            answer(process.start, seconds=limit)
        except TimeoutError as error:
            raise BackendError(
                f"No worker process could be started within {limit:g} s: the server that they are forked from "
                "gives no answer. Start this program anew, or give the backend more `patience`."
            ) from error
        its.close()  # so that its end is closed when it dies
        worker.handle, worker.ready = _Process(process, mine), True  # a task waits until the job has been sent
        Thread(target=worker.handle.talk, args=(self.job, self.heard), daemon=True, name="registerlens-worker").start()

    def give(self, worker: Worker, task: Task) -> None:
        worker.last = self.clock
        worker.handle.tasks.put(task)

    def wait(self, workers: Sequence[Worker]) -> tuple[Worker, Task | None, Answer]:
        beat = beat_of(self.patience)
        by_handle = {worker.handle: worker for worker in workers}
        while True:
            for worker in workers:
                if worker.tasks and self.clock - worker.last > self.patience:
                    return worker, worker.tasks[0], hung(self.patience)
            began, heard = time.monotonic(), None
            with suppress(Empty):
                heard = self.heard.get(timeout=beat)
            self.clock += min(time.monotonic() - began, beat)
            if heard is None or heard[0] not in by_handle:  # one that was stopped may have sent something before
                continue
            handle, message = heard
            worker = by_handle[handle]
            worker.last = self.clock
            if message is DEAD:
                handle.process.join(GRACE)
                message = Lost(f"with {_fate(handle.process.exitcode)}", _WHY_DEAD)
            if message is not AT_WORK:
                return worker, worker.tasks[0] if worker.tasks else None, message

    def stop(self, worker: Worker) -> None:
        worker.handle.process.kill()
        worker.handle.tasks.put(None)
        worker.handle.process.join(GRACE)


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _context(*modules: str) -> Any:
    """Where worker processes come from."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo takes seconds to import, which PyTorch does where a model is built without memory for its weights.
    context.set_forkserver_preload([__name__, *modules, "torch._dynamo"])
    return context


def _wake_server() -> None:
    """Let the server that workers are forked from go on if it was stopped; a new one could not end their processes."""
    if (server := forkserver._forkserver._forkserver_pid) is not None:  # type: ignore[attr-defined]
        os.kill(server, signal.SIGCONT)


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
                answer = job.perform(task)
            except Exception as error:  # whatever it is, the driver tells the user
                answer = _sendable_error(error)
            with turn:
                pipe.send(answer)


def _live(pipe: Connection, turn: Any, beat: float) -> None:
    """Say from time to time that this process works, if it has used the processor for more than to say so."""
    used = time.process_time()
    with suppress(*GONE):
        while True:
            time.sleep(beat)
            before, used = used, time.process_time()
            if used - before > WORKED:
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

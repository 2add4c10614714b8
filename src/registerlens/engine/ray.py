"""Workers on a Ray cluster."""

import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import torch

from registerlens.engine.backends import Job, Task, TaskQueue
from registerlens.engine.crew import WORKED, Answer, Crew, Lost, Started, Worker, beat_of, hung
from registerlens.errors import BackendError, ConfigError, check_at_least, needing
from registerlens.waiting import patience

AHEAD = 2
"""Tasks a worker has at most: one it works on, and one that waits so that it need not."""

NOT_SEEN = math.inf
"""When a worker showed life last of which there is no sign yet: the cluster may have no room for it."""


@dataclass(frozen=True, kw_only=True)
class RayBackend:
    """Workers on the nodes of a Ray cluster.

    Every worker is one Ray actor. It is sent the job once (a node fetches it once for all of its workers), loads the
    models, and then gets a task at a time. Tables come back as object references; whoever iterates writes them. When
    a worker or a node dies or hangs, its tasks go to others and a new worker is asked for, which starts as soon as the
    cluster has room for it. The table is that of `LocalBackend` bit for bit where the processors are of one kind.

    RegisterLens has to be installed on every node. To send it along, connect before (`ray.init(runtime_env=...)`):
    a connection that this process already has is used and left open.

    Example:
        >>> RayBackend(address="10.0.0.1:6379", num_gpus=1, num_cpus=8).retries
        3
    """

    address: str | None = None
    """The head node, "host:port"; "auto" for a cluster on this machine; None for the cluster this process is connected
    to, else the one RAY_ADDRESS names, else a new one on this machine."""
    num_cpus: float | int | None = None
    """Cores a worker claims; None means as many as the job has threads."""
    num_gpus: float | int = 0
    """GPUs a worker claims; with any, models run on "cuda"."""
    workers: int | None = None
    """How many; None means as many as the nodes have room for at the start."""
    max_in_flight: int | None = None
    """Tasks that are sent out or whose tables wait for the driver, at most; None means two for each worker. When
    writing is slower than computing, workers wait."""
    retries: int = 3
    """How often a task is given out again after the worker that did it died, and a worker that dies while it starts is
    replaced."""
    patience: float | int = 300.0
    """Seconds to wait for a worker when there is none, and for which one with a task, or that loads the job, may use no
    processor. After them it counts as hung, and is killed: it was stopped, say, or waits for a server. A task that
    computes has no limit, see `ProcessBackend`."""

    def __post_init__(self) -> None:
        check_at_least(1, workers=self.workers, max_in_flight=self.max_in_flight)

    def run(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[Task, pa.Table]]:
        """See `Backend`.

        Raises:
            MissingExtraError: Ray is not installed.
            BackendError: the cluster cannot be reached or has no room, or a task lost worker after worker.
        """
        ray = _ray()
        queue = TaskQueue(tasks, job.place)
        if not queue:
            return
        with _connected(ray, self.address):
            how = replace(self, num_cpus=job.threads if self.num_cpus is None else self.num_cpus)
            size = min(_size(ray, how), len(queue))
            limit = self.max_in_flight or AHEAD * size
            launcher = _Launcher(ray, how, ray.put(job.packed()))
            yield from Crew(launcher, queue, size=size, limit=limit, ahead=AHEAD, retries=self.retries).work()


class _Actor:
    """What runs in a worker's process."""

    clock = time.CLOCK_PROCESS_CPUTIME_ID
    used = 0.0

    def load(self, boxed: list[Any], device: str, versions: dict[str, str]) -> None:
        self.clock = _clock_of_this_thread()
        here = _versions()
        if here != versions:
            raise ConfigError(f"A worker has {here}, but the sweep was started with {versions}: the tables may differ.")
        job = _ray().get(boxed[0])  # boxed, so that it is unpacked here and not before
        torch.set_num_threads(job.threads)
        self.job = job.unpacked(device)

    def perform(self, task: Task) -> pa.Table:
        self.clock = _clock_of_this_thread()
        return self.job.perform(task)

    def pulse(self) -> bool:
        """Whether it has worked since it was asked last; in a thread of its own, beside the task."""
        before, self.used = self.used, time.clock_gettime(self.clock)
        return self.used - before > WORKED


def _clock_of_this_thread() -> int:
    """Of its processor time; of the process it would tell nothing, since Ray's own threads are never at rest."""
    return time.pthread_getcpuclockid(threading.get_ident())


_ADVICE = (
    "If memory is the reason, lower `stack` or `shard_size`, or give a worker more of a node (num_cpus, num_gpus)."
)


class _Launcher:
    """See `Launcher`."""

    def __init__(self, ray: Any, how: RayBackend, job: Any) -> None:
        self.ray, self.how, self.job = ray, how, job
        options = {"max_restarts": 0, "concurrency_groups": {"pulse": 1}}
        self.actor_class = ray.remote(num_cpus=how.num_cpus, num_gpus=how.num_gpus, **options)(_Actor)
        self.awaited: dict[Any, tuple[Worker, Task | None]] = {}
        self.last_loss = ""
        self.pulses: dict[Any, Worker] = {}
        self.hung_after, self.beat = how.patience, beat_of(how.patience)
        self.clock = self.manned = self.felt = 0.0
        """Seconds for which it has listened; when, on this clock, there was a worker last; when pulses were felt."""

    def start(self, worker: Worker) -> None:
        worker.handle, worker.last = self.actor_class.remote(), NOT_SEEN
        device = "cuda" if self.how.num_gpus else "cpu"
        self.awaited[worker.handle.load.remote([self.job], device, _versions())] = worker, None

    def give(self, worker: Worker, task: Task) -> None:
        if worker.tasks == [task]:
            worker.last = self.clock
        self.awaited[worker.handle.perform.remote(task)] = worker, task

    def wait(self, workers: Sequence[Worker]) -> tuple[Worker, Task | None, Answer]:
        while True:
            if (silent := self._feel(workers)) is not None:
                lost = hung(self.hung_after)
                self.last_loss = f" A worker was lost {lost.why}."
                return silent, next(iter(silent.tasks), None), lost
            if any(worker.tasks or worker.last < NOT_SEEN for worker in workers):
                self.manned = self.clock
            elif not self.awaited or self.clock - self.manned > self.how.patience:
                waited = f"for {self.how.patience:g} s" if self.awaited else "and none could be started"
                raise BackendError(
                    f"There was no worker {waited}. The cluster has {self.ray.cluster_resources()}; a worker needs "
                    f"{self.how.num_cpus:g} CPUs and {self.how.num_gpus:g} GPUs.{self.last_loss} What is done is done: "
                    "resume the sweep when the cluster has room."
                )
            began = time.monotonic()
            done = self.ray.wait([*self.awaited, *self.pulses], num_returns=1, timeout=self.beat)[0]
            self.clock += min(time.monotonic() - began, self.beat)
            if done and done[0] in self.awaited:
                worker, task = self.awaited.pop(done[0])
                worker.last = self.clock
                return worker, task, self._answer(done[0], task)
            for ref in done:
                worker = self.pulses.pop(ref)
                with suppress(self.ray.exceptions.RayError):  # it died: what it worked on tells
                    worker.last = self.clock if self.ray.get(ref) or worker.last == NOT_SEEN else worker.last

    def _feel(self, workers: Sequence[Worker]) -> Worker | None:
        """Once a beat ask all that have work for a sign of life; returns one that gave none for too long."""
        if self.clock < self.felt + self.beat:
            return None
        self.felt = self.clock
        for worker in (worker for worker in workers if worker.tasks or not worker.ready):
            if self.clock - worker.last > self.hung_after:
                return worker
            if worker not in self.pulses.values():
                self.pulses[worker.handle.pulse.options(concurrency_group="pulse").remote()] = worker
        return None

    def _answer(self, ref: Any, task: Task | None) -> Answer:
        try:
            table = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if task is None and isinstance(cause, self.ray.exceptions.RayError):
                raise BackendError(
                    f"A worker cannot unpack the job: {cause} Is a module missing there, perhaps that of a metric? "
                    "Install it on every node, or send it along: ray.init(address, runtime_env={'working_dir': '.'}) "
                    "before run_sweep."
                ) from error
            cause.__cause__ = error if cause is not error else None  # where it happened over there
            return cause
        except self.ray.exceptions.RayError as error:
            self.last_loss = f" A worker was lost{'' if task else ' while it started'}: {error}"
            return Lost(f"so: {error}", _ADVICE)
        return Started() if task is None else table

    def stop(self, worker: Worker) -> None:
        self.awaited = {ref: work for ref, work in self.awaited.items() if work[0] is not worker}
        self.pulses = {ref: whose for ref, whose in self.pulses.items() if whose is not worker}
        self.ray.kill(worker.handle)


def _size(ray: Any, how: RayBackend) -> int:
    """How many workers there are to be.

    Raises:
        BackendError: no node has room for one.
    """
    size = how.workers or sum(_room(node["Resources"], how) for node in ray.nodes() if node["Alive"])
    if not size:
        raise BackendError(
            f"No node has room for a worker of {how.num_cpus:g} CPUs and {how.num_gpus:g} GPUs. The cluster has "
            f"{ray.cluster_resources()}. Ask for less (num_cpus, num_gpus), or give `workers` if nodes are to come."
        )
    return size


def _room(resources: Mapping[str, float], how: RayBackend) -> int:
    """Workers that a node can hold."""
    wanted = {"CPU": how.num_cpus, "GPU": how.num_gpus}
    return int(min((resources.get(kind, 0) // n for kind, n in wanted.items() if n), default=1))


def _versions() -> dict[str, str]:
    """What has to be the same everywhere, if tables are to be."""
    return {name: version(name) for name in ("registerlens", "torch")}


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster; closed afterwards if it was made here."""
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", "local", here):
            raise BackendError(
                f"This process is connected to the Ray cluster at '{here}', but '{address}' was asked for. "
                "Leave the address out, or call ray.shutdown() before."
            )
        yield
        return
    _check_reachable(address or os.environ.get("RAY_ADDRESS"))
    chatty = sys.stderr.isatty()
    options = {"log_to_driver": chatty, "logging_level": logging.INFO if chatty else logging.ERROR}
    try:
        ray.init(address=address, include_dashboard=None if address else False, **options)
    except Exception as error:  # Ray raises what it chooses
        raise BackendError(
            f"Ray cannot be reached at '{address or 'this machine'}': {error} Is the cluster up (`ray status`), and of "
            "this version of Ray and Python?"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""With which a connection of HTTP/2, and so of Ray, begins; whoever is awake answers it."""


def _check_reachable(address: str | None) -> None:
    """Ray itself waits long for a head node that is not there, and for ever for one that is stopped."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=5) as head:
            head.settimeout(patience())
            head.sendall(_GREETING)
            head.recv(1)
    except OSError as error:
        raise BackendError(
            f"There is no Ray cluster at '{address}': {error}. Start one (`ray start --head` prints its address), or "
            "leave the address out to use this machine."
        ) from error


def _ray() -> Any:
    with needing("ray", "ray", "run_sweep(backend='ray')"):
        import ray  # an extra
        import ray.exceptions
    return ray

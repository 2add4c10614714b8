"""Tasks on a Ray cluster: workers that get the job once, and are replaced when they die."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import torch

from registerlens.data.sources import LastShard
from registerlens.engine.agenda import Agenda
from registerlens.engine.backends import Job, perform
from registerlens.errors import BackendError, ConfigError, MissingExtraError
from registerlens.sweep.tasks import Task

AHEAD = 2
"""Tasks a worker has at most: one it works on, and one that waits so that it need not."""


@dataclass(frozen=True, kw_only=True)
class RayBackend:
    """Workers on the nodes of a Ray cluster.

    Every worker is one Ray actor. It is sent the job once (a node fetches it once for all of its workers), loads the
    models, and then gets a task at a time. Tables come back as object references; whoever iterates writes them. When
    a worker or a node dies, its tasks go to others and a new worker is asked for, which starts as soon as the cluster
    has room for it. The table is that of `LocalBackend` bit for bit where the processors are of one kind.

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
    patience: float = 300.0
    """Seconds to wait for a worker when there is none."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}.")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ConfigError(f"max_in_flight must be at least 1, got {self.max_in_flight}.")

    def run(self, job: Job, tasks: Iterable[Task]) -> Iterator[tuple[Task, pa.Table]]:
        """See `Backend`.

        Raises:
            MissingExtraError: Ray is not installed.
            BackendError: the cluster cannot be reached or has no room, or a task's workers died again and again.
        """
        ray = _ray()
        agenda = Agenda(tasks, lambda task: (job.conditions[job.groups[task.group][0]].images, task.shard))
        if not agenda:
            return
        with _connected(ray, self.address):
            how = replace(self, num_cpus=job.threads if self.num_cpus is None else self.num_cpus)
            crew = _Crew(ray, how, job, n_tasks=len(agenda))
            try:
                yield from crew.work(agenda)
            finally:
                crew.dismiss()


class _Worker:
    """What runs in a worker's process."""

    def load(self, job: Job, device: str, versions: dict[str, str]) -> None:
        here = _versions()
        if here != versions:
            raise ConfigError(f"A worker has {here}, but the sweep was started with {versions}: the tables may differ.")
        torch.set_num_threads(job.threads)
        kept = {name: LastShard(source) for name, source in job.sources.items()}
        self.job = replace(job.unpacked(device), sources=kept)

    def perform(self, task: Task) -> pa.Table:
        return perform(self.job, task)


@dataclass(eq=False)
class _Slot:
    """A place for a worker; who dies leaves it to the next."""

    actor: Any = None
    tasks: list[Task] = field(default_factory=list)
    """Given out and unfinished, in the order in which they are done."""
    place: Any = None
    """The images it worked on last."""
    ready: bool = False
    lost_starts: int = 0


class _Crew:
    """All workers of a run, and what each is doing."""

    def __init__(self, ray: Any, how: RayBackend, job: Job, n_tasks: int) -> None:
        self.ray, self.how = ray, how
        room = how.workers or sum(_room(node["Resources"], how) for node in ray.nodes() if node["Alive"])
        if not room:
            raise BackendError(
                f"No node has room for a worker of {how.num_cpus:g} CPUs and {how.num_gpus:g} GPUs. The cluster has "
                f"{ray.cluster_resources()}. Ask for less (num_cpus, num_gpus), or give `workers` if nodes are to come."
            )
        n_workers = min(room, n_tasks)
        self.limit = how.max_in_flight or AHEAD * n_workers
        self.actor_class = ray.remote(num_cpus=how.num_cpus, num_gpus=how.num_gpus, max_restarts=0)(_Worker)
        self.job = ray.put(job.packed())
        self.starting: dict[Any, _Slot] = {}
        self.busy: dict[Any, tuple[_Slot, Task]] = {}
        self.losses: Counter[Task] = Counter()
        self.last_loss = ""
        self.slots = [_Slot() for _ in range(n_workers)]
        for slot in self.slots:
            self._start(slot)

    def work(self, agenda: Agenda) -> Iterator[tuple[Task, pa.Table]]:
        """Do all tasks."""
        while agenda or self.busy:
            self._hand_out(agenda)
            ref = self._wait()
            if ref in self.starting:
                self._started(self.starting.pop(ref), ref)
            elif (table := self._finished(ref, agenda)) is not None:
                yield self.busy.pop(ref)[1], table

    def dismiss(self) -> None:
        """Stop every worker, whatever it does."""
        for slot in self.slots:
            self.ray.kill(slot.actor)
        self.slots = []

    def _start(self, slot: _Slot) -> None:
        slot.actor, slot.ready, slot.tasks, slot.place = self.actor_class.remote(), False, [], None
        device = "cuda" if self.how.num_gpus else "cpu"
        self.starting[slot.actor.load.remote(self.job, device, _versions())] = slot

    def _hand_out(self, agenda: Agenda) -> None:
        for depth in range(AHEAD):  # nobody gets a second task before everybody has one
            for slot in self.slots:
                if slot.ready and len(slot.tasks) == depth and len(self.busy) < self.limit:
                    if (task := agenda.take(slot.place)) is None:
                        return
                    slot.tasks.append(task)
                    slot.place = agenda.place(task)
                    self.busy[slot.actor.perform.remote(task)] = slot, task

    def _wait(self) -> Any:
        """The next reference to be there."""
        refs = [*self.busy, *self.starting]
        done = refs and self.ray.wait(refs, num_returns=1, timeout=None if self.busy else self.how.patience)[0]
        if not done:
            waited = f"for {self.how.patience:g} s" if refs else "and none could be started"
            raise BackendError(
                f"There was no worker {waited}. The cluster has {self.ray.cluster_resources()}; a worker needs "
                f"{self.how.num_cpus:g} CPUs and {self.how.num_gpus:g} GPUs.{self.last_loss} What is done is done: "
                "resume the sweep when the cluster has room."
            )
        return done[0]

    def _started(self, slot: _Slot, ref: Any) -> None:
        try:
            self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, self.ray.exceptions.RayError):
                raise BackendError(
                    f"A worker cannot unpack the job: {cause} Is a module missing there, perhaps that of a metric? "
                    "Install it on every node, or send it along: ray.init(address, runtime_env={'working_dir': '.'}) "
                    "before run_sweep."
                ) from error
            raise cause from error
        except self.ray.exceptions.RayError as error:
            self.last_loss = f" A worker died while it started: {error}"
            slot.lost_starts += 1
            if slot.lost_starts > self.how.retries:
                self.slots.remove(slot)
            else:
                self._start(slot)
            return
        slot.ready = True
        slot.lost_starts = 0

    def _finished(self, ref: Any, agenda: Agenda) -> pa.Table | None:
        """A task's table; None if it was lost, and waits again."""
        slot, task = self.busy[ref]
        try:
            table = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            cause.add_note(f"In task {task.name}.")
            raise cause from error
        except self.ray.exceptions.RayError as error:
            self._lost(slot, error, agenda)
            return None
        slot.tasks.remove(task)
        return table

    def _lost(self, slot: _Slot, error: Exception, agenda: Agenda) -> None:
        """A worker died, or what it computed did: all of its tasks wait again, and a new one is started."""
        blamed = slot.tasks[0]
        self.losses[blamed] += 1
        if self.losses[blamed] > self.how.retries:
            raise BackendError(
                f"Task {blamed.name} (condition group {blamed.group} on image shard {blamed.shard}) lost its worker "
                f"{self.losses[blamed]} times, the last time so: {error} If memory is the reason, lower `stack` or "
                "`shard_size`, or give a worker more of a node (num_cpus, num_gpus). What is done is done: the sweep "
                "can be resumed."
            ) from error
        self.last_loss = f" A worker was lost: {error}"
        for task in reversed(slot.tasks):
            agenda.put_back(task)
        self.busy = {ref: (of, task) for ref, (of, task) in self.busy.items() if of is not slot}
        self.ray.kill(slot.actor)
        self._start(slot)


def _room(resources: Mapping[str, float], how: RayBackend) -> int:
    """Workers that a node can hold."""
    wanted = {"CPU": how.num_cpus, "GPU": how.num_gpus}
    return int(min((resources.get(kind, 0) // n for kind, n in wanted.items() if n), default=1))


def _versions() -> dict[str, str]:
    """What has to be the same everywhere, if tables are to be."""
    return {name: version(name) for name in ("registerlens", "torch")}


def _cause(error: Any) -> Exception:
    """What was raised in the worker, as it would have been raised here."""
    return error.cause if isinstance(error.cause, Exception) else error


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


def _check_reachable(address: str | None) -> None:
    """Ray itself waits long for a head node that is not there."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise BackendError(
            f"There is no Ray cluster at '{address}': {error}. Start one (`ray start --head` prints its address), or "
            "leave the address out to use this machine."
        ) from error


def _ray() -> Any:
    try:
        import ray  # noqa: PLC0415  (an extra)
        import ray.exceptions  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "run_sweep(backend='ray')") from error
    return ray

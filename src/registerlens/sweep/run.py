"""`run_sweep`: conditions on images, through a backend, into a store."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch

from registerlens.engine.backends import Backend, LocalBackend
from registerlens.engine.memory import find_stack
from registerlens.engine.processes import ProcessBackend
from registerlens.engine.store import skipped_of
from registerlens.engine.tasks import Task
from registerlens.errors import ConfigError
from registerlens.evaluation.metrics import Metric
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.sweep.conditions import Condition, group_conditions
from registerlens.sweep.fitting import References, fit_missing, identity_of, unfitted
from registerlens.sweep.grid import Conditions
from registerlens.sweep.inputs import as_conditions, as_metrics, as_models, as_sources
from registerlens.sweep.job import SweepJob
from registerlens.sweep.manifest import OWN, Manifest, manifest_of
from registerlens.sweep.records import Swept
from registerlens.sweep.result import SweepResult
from registerlens.sweep.store import MemoryStore, SweepStore, grown, joined, writing


def run_sweep(
    models: HookedViT | Mapping[str, HookedViT],
    images: Any,
    conditions: Iterable[Condition],
    metrics: Sequence[Metric] | None = None,
    *,
    labels: Any = None,
    reference_images: References | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    batch_size: int = 16,
    shard_size: int = 256,
    stack: int | None = None,
    workers: int = 0,
    threads: int | None = None,
    backend: str | Backend = "local",
    address: str | None = None,
    seed: int = 0,
) -> SweepResult:
    """Every condition on every image, beside the clean run, and nothing twice.

    With a store, a run that was killed at any moment goes on where it was when the same call is made again, and ends
    with the same numbers to the last bit; a later call may add conditions.

    Args:
        models: a model, or several by the names that conditions use.
        images: a tensor [image, channel, height, width] of preprocessed images, a `Source`, or several of these by the
            names that conditions use.
        conditions: made by `rl.sweep.grid` and the like; a clean run is added where there is none.
        metrics: what is measured; None is the built-in ones that need no search for outliers. For outliers and sinks
            give `default_metrics(vit, rl.find_outliers(vit, images).detection)`.
        labels: one an image, where the images are a tensor; by name for several image sets.
        reference_images: images on which means, noise, attention biases and the like are fitted, as a tensor, in
            batches, or as a Source; or those of each model by its name. None: the sweep's own, if it has one set.
        store: a folder or fsspec URL; None keeps the numbers in memory alone.
        resume: go on with a sweep that is in the store; False refuses to.
        batch_size: images whose clean run is made at once.
        shard_size: images a part of the store, where the images are a tensor.
        stack: sequences (images x conditions) that go through the model at once; None finds out what fits into memory
            and is fast. A store keeps its number.
        workers: worker processes of the backends "processes" and "ray"; 0 is one a CPU core.
        threads: torch threads of a worker; None shares this process's among the workers. A store keeps its number.
        backend: "local" (this process, on the model's device), "processes" (CPUs of this machine), "ray" (a cluster),
            or a `Backend`.
        address: of the Ray cluster.
        seed: stored with the sweep.

    Returns:
        every number, image by image, and what they amount to.

    Raises:
        ConfigError: something contradictory was asked for; nothing has been computed.
        ImageError: there are no images.
        InterventionError: a condition does not fit its model.
        ShapeError: not one label an image, or images that a model cannot take.
        StoreError: the store is in use, full, damaged, or of another sweep; what was stored before is intact.
        BackendError: a worker process failed or died again and again.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.sweep.grid import grid
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> heads = grid(lambda layer: rl.Ablate(rl.Heads([(layer, 0)])), layer=[4, 5])
        >>> run_sweep(vit, torch.rand(2, 3, 48, 48), heads).table.num_rows  # two images, clean and twice ablated
        6
    """
    models, sources = as_models(models), as_sources(images, labels, shard_size)
    planned = as_conditions(conditions, models, sources)
    measured = as_metrics(metrics, models, sources)
    for name, size in {"batch_size": batch_size, "stack": stack, "threads": threads}.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}.")
    chosen, n_workers = _backend(backend, workers, address)
    asked = manifest_of(
        models,
        sources,
        planned,
        measured,
        reference=_reference(reference_images) if unfitted(planned) else "",
        batch_size=batch_size,
        stack=stack or min(find_stack(vit, batch_size) for vit in models.values()),
        threads=threads or max(1, torch.get_num_threads() // n_workers),
        seed=seed,
    )
    with _opened(store, asked, planned, models, resume) as opened:
        if reference_images is None and opened.manifest.reference == OWN and len(sources) == 1:
            [reference_images] = sources.values()
        bound, new = fit_missing(models, planned, reference_images, batch_size, opened.fits())
        kept = opened.with_fits(new)
        job = SweepJob(
            models=models,
            sources=sources,
            conditions={one.key: one for one in bound},
            groups=kept.manifest.groups,
            metrics=measured,
            batch_size=batch_size,
            stack=kept.manifest.stack,
            threads=kept.manifest.threads,
        )
        _work(chosen, job, kept)
        return _result(kept, planned)


def _reference(images: References | None) -> str:
    """What the manifest says of the images that edits are fitted on."""
    return OWN if images is None else identity_of(images) or "a stream"


def read_sweep(store: str | os.PathLike[str]) -> SweepResult:
    """The result in a store, without the models or the images; of a sweep that is not finished, what is done so far.

    Args:
        store: its folder or fsspec URL.

    Raises:
        StoreError: there is none, it is damaged, or of a newer version.
    """
    opened = SweepStore.open(store)
    names = ("label", "factors", "model", "images", "control_of")
    conditions = [
        Swept(key=key, edited=bool(told["content"]), **{name: told[name] for name in names})
        for key, told in opened.manifest.conditions.items()
    ]
    return _result(opened, conditions)


def _result(store: SweepStore | MemoryStore, conditions: Iterable[Condition | Swept]) -> SweepResult:
    tables = [table for _, table in store.tables()]
    skipped = tuple(dict.fromkeys(one for table in tables for one in skipped_of(table)))
    metrics = {name: told["words"] for name, told in store.manifest.metrics.items()}
    return SweepResult.from_table(joined(tables, list(metrics)), list(conditions), metrics, skipped)


def _opened(
    store: str | os.PathLike[str] | None,
    asked: Manifest,
    conditions: Conditions,
    models: Mapping[str, HookedViT],
    resume: bool,
) -> AbstractContextManager[SweepStore | MemoryStore]:
    """The store for the length of the run."""

    def grouping(keys: Collection[str]) -> Sequence[Sequence[str]]:
        return group_conditions([one for one in conditions if one.key in set(keys)], models)

    if store is None:
        return nullcontext(MemoryStore(grown(None, asked, grouping, "")))
    return writing(store, asked, grouping, resume=resume)


def _work(backend: Backend, job: SweepJob, store: SweepStore | MemoryStore) -> None:
    """Do what is missing; progress counts conditions, a shard of several being a part of one."""
    tasks = store.manifest.tasks()
    # All groups on one shard before the next one: it is read once, and a run that is stopped has all conditions on some
    # images, which says more than some conditions on all.
    missing = sorted(store.missing(), key=lambda task: (job.place(task), task.group))
    n_shards = Counter(task.group for task in tasks)

    def share(task: Task) -> float:
        return len(job.groups[task.group]) / n_shards[task.group]

    total = sum(map(share, tasks))
    done = total - sum(map(share, missing))
    results: Any = backend.run(job, missing)
    with closing(results):
        for task, table in track(results, "sweep", total, lambda made: share(made[0]), done=done, unit="conditions"):
            store.write(task, table)


def _backend(backend: str | Backend, workers: int, address: str | None) -> tuple[Backend, int]:
    """Where tasks are done, and by how many workers on this machine.

    Raises:
        ConfigError: no such backend, or options that are not for it.
    """
    if not isinstance(backend, str):
        return backend, max(1, getattr(backend, "workers", None) or workers)
    if workers < 0:
        raise ConfigError(f"workers must not be negative, got {workers}.")
    if address is not None and backend != "ray":
        raise ConfigError(f"address is that of a Ray cluster; it needs backend='ray', not {backend!r}.")
    if backend == "local":
        if workers > 1:
            raise ConfigError(f"backend='local' is this process alone; workers={workers} needs backend='processes'.")
        return LocalBackend(), 1
    if backend == "processes":
        n = workers or _cores()
        return ProcessBackend(workers=n), n
    if backend == "ray":
        from registerlens.engine.ray import RayBackend  # noqa: PLC0415  (an extra)

        # A worker that is asked for no threads gets one core of its node, whatever this machine has.
        return RayBackend(address=address, workers=workers or None), torch.get_num_threads()
    raise ConfigError(f"backend must be 'local', 'processes' or 'ray', got {backend!r}.")


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

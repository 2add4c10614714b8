"""`run_sweep`: conditions on images, through a backend, into a store."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from registerlens.data.sources import Source, TensorSource
from registerlens.engine.backends import Backend, LocalBackend, Task, check_untouched
from registerlens.engine.processes import ProcessBackend
from registerlens.engine.store import skipped_of
from registerlens.errors import ConfigError, ShapeError, check_at_least, close_matches
from registerlens.evaluation.edit_runs import find_stack
from registerlens.evaluation.metrics import Metric, check_metrics, default_metrics
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.sweep.aggregate import Swept
from registerlens.sweep.conditions import Condition, group_conditions
from registerlens.sweep.fitting import References, fit_missing, identity_of, unfitted
from registerlens.sweep.grid import Conditions
from registerlens.sweep.job import SweepJob
from registerlens.sweep.manifest import OWN, Manifest, manifest_of
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
            give `default_metrics(vit, detection=rl.find_outliers(vit, images).detection)`.
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
    check_at_least(1, batch_size=batch_size, stack=stack, threads=threads)
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
            conditions={condition.key: condition for condition in bound},
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
        Swept(key=key, edited=bool(entry["content"]), **{name: entry[name] for name in names})
        for key, entry in opened.manifest.conditions.items()
    ]
    return _result(opened, conditions)


def _result(store: SweepStore | MemoryStore, conditions: Iterable[Condition | Swept]) -> SweepResult:
    tables = [table for _, table in store.tables()]
    skipped = tuple(dict.fromkeys(image for table in tables for image in skipped_of(table)))
    metrics = {name: entry["words"] for name, entry in store.manifest.metrics.items()}
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
        return group_conditions([condition for condition in conditions if condition.key in set(keys)], models)

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
        for task, table in track(results, "sweep", total, lambda pair: share(pair[0]), done=done, unit="conditions"):
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
        from registerlens.engine.ray import RayBackend  # an extra

        # A worker that is asked for no threads gets one core of its node, whatever this machine has.
        return RayBackend(address=address, workers=workers or None), torch.get_num_threads()
    raise ConfigError(f"backend must be 'local', 'processes' or 'ray', got {backend!r}.")


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_models(models: HookedViT | Mapping[str, HookedViT]) -> dict[str, HookedViT]:
    """Models by name; a single one is called "model".

    Raises:
        ConfigError: something else was given, or hooks or edits are in force.
    """
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    for name, vit in named.items():
        if not isinstance(vit, HookedViT):
            raise ConfigError(
                f"The model '{name}' is a {type(vit).__name__}. Load it with rl.HookedViT.from_pretrained(...)."
            )
        check_untouched(vit, f"The model '{name}'")
    if not named:
        raise ConfigError("A sweep needs a model. Give a HookedViT, or several by name.")
    return named


def as_sources(images: Any, labels: Any, shard_size: int) -> dict[str, Source]:
    """Image sets by name; a single one is called "images".

    Args:
        images: a tensor, a Source, or several of these by name.
        labels: one an image, for tensors; by name where there are several image sets.
        shard_size: images a shard, for tensors.

    Raises:
        ConfigError: something else was given, or labels for a source, which has its own.
        ShapeError: not one label an image.
    """
    named = dict(images) if isinstance(images, Mapping) else {"images": images}
    if not named:
        raise ConfigError("A sweep needs images. Give a tensor or a source, or several by name.")
    labelled = dict(labels) if isinstance(labels, Mapping) else {} if labels is None else dict.fromkeys(named, labels)
    if not isinstance(labels, Mapping | None) and len(named) > 1:
        raise ConfigError(f"Labels of several image sets are given by name: labels={{{next(iter(named))!r}: ...}}.")
    if unknown := sorted(set(labelled) - set(named)):
        raise ConfigError(f"There are labels for {unknown}, but image sets {sorted(named)}.")
    return {name: _source(name, value, labelled.get(name), shard_size) for name, value in named.items()}


def _source(name: str, value: Any, labels: Any, shard_size: int) -> Source:
    if isinstance(value, Tensor):
        if value.ndim != 4:
            raise ConfigError(
                f"The images '{name}' have shape {list(value.shape)}, expected [image, channel, height, width]."
            )
        if labels is not None and len(labels) != len(value):
            raise ShapeError(
                f"There are {len(labels)} labels for {len(value)} images ('{name}'); one for each is needed."
            )
        return TensorSource(value, None if labels is None else torch.as_tensor(labels), shard_size)
    if not isinstance(value, Source):
        raise ConfigError(
            f"The images '{name}' are a {type(value).__name__}. Give a tensor of preprocessed images "
            f"(rl.load_images(...)), or a source such as rl.data.FolderSource."
        )
    if labels is not None:
        raise ConfigError(f"The images '{name}' are a source, which has labels of its own: give them to it.")
    return value


def as_conditions(
    conditions: Iterable[Condition], models: Mapping[str, HookedViT], sources: Mapping[str, Source]
) -> Conditions:
    """The conditions, and before them the clean run of every pair of model and images that they lack.

    Raises:
        ConfigError: something else is in the list, the same condition stands there twice, or images were not given.
        InterventionError: a condition does not fit its model; all are counted, the first few listed.
        ShapeError: a model cannot take its images.
    """
    listed = Conditions.of(conditions).check(models) if (conditions := list(conditions)) else ()
    places = dict.fromkeys((condition.model, condition.images) for condition in listed) or {
        (next(iter(models)), next(iter(sources))): None
    }
    has_clean = {(condition.model, condition.images) for condition in listed if not condition.interventions}
    clean = [Condition(model=model, images=images) for model, images in places if (model, images) not in has_clean]
    for model, images in places:
        if images not in sources:
            raise ConfigError(
                f"Conditions are about the images '{images}', but there are {list(sources)}."
                f"{close_matches(images, sources)}"
            )
        source = sources[images]
        if isinstance(source, TensorSource):  # others are read later
            models[model].layout(source.images[:1])
    return Conditions((*clean, *listed))


def as_metrics(
    metrics: Sequence[Metric] | None, models: Mapping[str, HookedViT], sources: Mapping[str, Source]
) -> tuple[Metric, ...]:
    """The metrics, or the built-in ones that all models have alike; outliers and sinks are not among these.

    Raises:
        ConfigError: there is none, the models' built-in ones differ, or as `check_metrics`.
    """
    if metrics is None:
        labels = all(getattr(source, "labels", None) is not None for source in sources.values())
        built_in = [default_metrics(vit, labels=labels) for vit in models.values()]
        if any([metric.words for metric in own] != [metric.words for metric in built_in[0]] for own in built_in):
            raise ConfigError("The models' built-in metrics differ (depth, or what comes out): give metrics=[...].")
        metrics = built_in[0]
    if not metrics:
        raise ConfigError("A sweep needs at least one metric; metrics=None takes the built-in ones.")
    for vit in models.values():
        check_metrics(metrics, vit.cfg)
    return tuple(metrics)

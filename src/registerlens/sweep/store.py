"""A sweep's store: its parts, its manifest, the edits that were fitted for it, and how far it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime

import pyarrow as pa

from registerlens.data.images import Skipped
from registerlens.display import Shown
from registerlens.engine.backends import Task
from registerlens.engine.folder import Folder, folder_at
from registerlens.engine.lock import Holder, holder_of, locked
from registerlens.engine.store import CORRUPT, MANIFEST, PARTS, SUFFIX, Store, skipped_of, task_of
from registerlens.errors import StoreError
from registerlens.sweep.fitting import Fits, pack_fits, unpack_fits
from registerlens.sweep.job import part_schema
from registerlens.sweep.manifest import Manifest, extended

FITTED = "fitted"
"""The folder of the fitted edits."""
Grouping = Callable[[Collection[str]], Sequence[Sequence[str]]]
"""From the keys of new conditions to groups of them."""


@dataclass(frozen=True)
class SweepStore(Store[Manifest]):
    """What is stored of a sweep."""

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> SweepStore:
        """A store, to be read.

        Args:
            where: a folder or an fsspec URL.

        Raises:
            StoreError: there is none, it is damaged, or of a newer version.
        """
        folder = folder_at(where)
        manifest = _stored(folder)
        if manifest is None:
            raise StoreError(
                f"There is no sweep in '{folder.where}': it has no {MANIFEST}."
                " Check the path; run_sweep(..., store=...) makes one."
            )
        return cls(folder, manifest)

    def fits(self) -> Fits:
        """The fitted edits of its conditions.

        Raises:
            StoreError: a file of them is missing or damaged.
        """
        fits: Fits = {}
        for name, sha256 in self.manifest.fitted.items():
            content = self.folder.read(name)
            if content is None or hashlib.sha256(content).hexdigest() != sha256:
                raise StoreError(
                    f"'{self.folder.where}/{name}' is {'missing' if content is None else 'damaged'}. It holds what "
                    f"edits were fitted to, which later parts need as earlier ones had it: restore it from a copy, or "
                    f"choose another store."
                )
            fits |= unpack_fits(content)
        return fits

    def with_fits(self, fits: Fits) -> SweepStore:
        """The store with more fitted edits in it."""
        if not fits:
            return self
        self.check_held()
        content, name = pack_fits(fits), f"{FITTED}/{len(self.manifest.fitted):05d}.zip"
        self.folder.write(name, content)  # before the manifest, which a killed run leaves without it
        fitted = self.manifest.fitted | {name: hashlib.sha256(content).hexdigest()}
        return self.with_manifest(replace(self.manifest, fitted=fitted))

    def table(self) -> pa.Table:
        """All rows in one table: condition, shard, image and one column a metric."""
        return joined([table for _, table in self.tables()], list(self.manifest.metrics))


@dataclass(frozen=True)
class MemoryStore:
    """The same in memory, for as long as the call lasts."""

    manifest: Manifest
    """What the sweep consists of."""
    held: dict[Task, pa.Table] = field(default_factory=dict, repr=False)

    def missing(self) -> list[Task]:
        """The tasks still to be done."""
        return [task for task in self.manifest.tasks() if task not in self.held]

    def write(self, task: Task, table: pa.Table) -> None:
        """Keep a task's table."""
        self.held[task] = table

    def tables(self) -> Iterator[tuple[Task, pa.Table]]:
        """Every table, in the order of groups and shards."""
        return iter(sorted(self.held.items(), key=lambda item: item[0]))

    def fits(self) -> Fits:
        """None: whatever is fitted is fitted in this call."""
        return {}

    def with_fits(self, fits: Fits) -> MemoryStore:
        """Itself: the conditions have their fitted edits."""
        return self


@contextmanager
def writing(
    where: str | os.PathLike[str], asked: Manifest, grouping: Grouping, *, resume: bool = True
) -> Iterator[SweepStore]:
    """A store that is this run's alone inside the `with` block: begun, resumed, or extended by new conditions.

    Args:
        where: a folder or an fsspec URL.
        asked: the manifest of this call, its conditions not grouped.
        grouping: makes groups of new conditions, given their keys.
        resume: go on with a sweep that is there.

    Raises:
        StoreError: another run holds it; it holds another sweep; it is damaged or newer; it cannot be written.
    """
    folder = folder_at(where)
    with locked(folder) as check_held:
        for under in ("", PARTS, FITTED):
            folder.sweep_up(under)
        stored = _stored(folder)
        if stored is not None and not resume:
            raise StoreError(
                f"'{folder.where}' holds a sweep already. Go on with it (resume=True), or choose another store."
            )
        if stored is None and any(task_of(entry.name) for entry in folder.entries(PARTS)):
            raise StoreError(
                f"'{folder.where}' has parts but no {MANIFEST}, so that nothing says which sweep they belong to. "
                f"Restore the file from a copy, or choose another store."
            )
        manifest = grown(stored, asked, grouping, folder.where)
        if manifest != stored:
            folder.write(MANIFEST, manifest.to_json().encode())
        yield SweepStore(folder, manifest, check_held)


def grown(stored: Manifest | None, asked: Manifest, grouping: Grouping, where: str) -> Manifest:
    """The manifest to work by: conditions that are new stand in new groups behind the old ones.

    Raises:
        StoreError: `stored` belongs to another sweep.
    """
    manifest = asked if stored is None else extended(stored, asked, where)
    grouped = {key for keys in manifest.groups for key in keys}
    new = [key for key in manifest.conditions if key not in grouped]
    return replace(manifest, groups=(*manifest.groups, *map(tuple, grouping(new))))


def joined(tables: Sequence[pa.Table], metrics: Sequence[str]) -> pa.Table:
    """Tables of parts, one below the other; what their metadata says is dropped."""
    schema = part_schema(metrics)
    return pa.concat_tables([schema.empty_table(), *(table.replace_schema_metadata(None) for table in tables)])


def _stored(folder: Folder) -> Manifest | None:
    text = folder.read(MANIFEST)
    return None if text is None else Manifest.from_json(text, f"{folder.where}/{MANIFEST}")


@dataclass(frozen=True, kw_only=True)
class SweepStatus(Shown):
    """How far a stored sweep is."""

    where: str
    """Folder or URL."""
    conditions: int
    """Conditions, clean ones included."""
    conditions_done: int
    """Those measured on every image."""
    tasks: int
    """(group of conditions, shard of images) pairs: one part each."""
    tasks_done: int
    """Whole parts."""
    rows: int
    """(condition, image) pairs stored."""
    n_bytes: int
    """Size of the parts."""
    corrupt: tuple[str, ...]
    """Damaged parts, each with its problem, and those set aside earlier."""
    skipped: tuple[Skipped, ...]
    """Images that could not be used."""
    holder: Holder | None
    """The run at work; None if there is none."""
    last: datetime | None
    """When the last part was written; UTC."""

    @property
    def finished(self) -> bool:
        """Whether every task is done."""
        return self.tasks_done == self.tasks

    def describe(self) -> str:
        """The status in words."""
        last = f", the last at {self.last:%Y-%m-%d %H:%M:%S} UTC" if self.last else ""
        lines = [
            f"{self.where}: {self.conditions_done} of {self.conditions} conditions done",
            f"  {self.tasks_done} of {self.tasks} parts{last}; {self.rows} rows, {self.n_bytes / 1e6:.1f} MB",
            f"  in use by {self.holder}" if self.holder else "  no run is at work",
        ]
        lines += [f"  damaged: {problem}" for problem in self.corrupt]
        lines += [f"  skipped: {image}" for image in self.skipped]
        return "\n".join(lines)


def sweep_status(store: str | os.PathLike[str]) -> SweepStatus:
    """How far a stored sweep is: reads and checks every part, changes nothing, and may be asked while a run is at work.

    Args:
        store: its folder or fsspec URL.

    Raises:
        StoreError: there is no sweep, or its manifest is damaged or newer.

    Example:
        >>> import tempfile, torch, registerlens as rl
        >>> from registerlens.sweep.run import run_sweep
        >>> vit, folder = rl.HookedViT.from_pretrained("registerlens:tiny"), tempfile.mkdtemp()
        >>> _ = run_sweep(vit, torch.rand(2, 3, 48, 48), [], store=folder)
        >>> status = sweep_status(folder)
        >>> status.conditions_done, status.tasks_done, status.rows, status.finished
        (1, 1, 2, True)
    """
    opened = SweepStore.open(store)
    tasks, entries = opened.manifest.tasks(), opened.entries()
    rows, corrupt, skipped = {}, [], {}
    for task in entries:
        try:
            table = opened.read(task)
        except StoreError as error:
            corrupt.append(str(error))
            continue
        rows[task] = table.num_rows
        skipped.update(dict.fromkeys(skipped_of(table)))
    aside = [entry.name for entry in opened.folder.entries(PARTS) if entry.name.endswith(SUFFIX + CORRUPT)]
    open_groups = {task.group for task in tasks if task not in rows}
    return SweepStatus(
        where=opened.folder.where,
        conditions=len(opened.manifest.conditions),
        conditions_done=sum(len(keys) for at, keys in enumerate(opened.manifest.groups) if at not in open_groups),
        tasks=len(tasks),
        tasks_done=len(rows),
        rows=sum(rows.values()),
        n_bytes=sum(entries[task].n_bytes for task in rows),
        corrupt=(*corrupt, *(f"'{name}' was set aside" for name in aside)),
        skipped=tuple(skipped),
        holder=holder_of(opened.folder),
        last=max((entry.modified for entry in entries.values() if entry.modified), default=None),
    )

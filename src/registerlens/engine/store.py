"""A sweep's results in a folder or object store: a Parquet file for each task, and a manifest of what they are of."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pyarrow as pa

from registerlens.engine.folder import Entry, Folder, folder_at
from registerlens.engine.lock import locked
from registerlens.engine.parts import SUFFIX, from_bytes, name_of, to_bytes
from registerlens.engine.tasks import Task
from registerlens.errors import StoreError
from registerlens.sweep import manifest as manifests
from registerlens.sweep.fitted import Fits, pack_fits, unpack_fits
from registerlens.sweep.job import check_table, part_schema
from registerlens.sweep.manifest import Manifest

PARTS, FITTED = "parts", "fitted"
"""Folders of the store."""
CORRUPT = ".corrupt"
"""Added to the name of a damaged part that a run has set aside."""
Grouping = Callable[[Collection[str]], Sequence[Sequence[str]]]
"""From the keys of new conditions to groups of them."""


class CorruptPartWarning(UserWarning):
    """A part of a store was damaged; it was set aside and is computed again."""


@dataclass(frozen=True)
class Store:
    """What is stored of a sweep. Reading needs no lock, and may go on while a run writes.

    The parts are ordinary Parquet files: `pl.read_parquet("store/parts/*.parquet")`, `pd.read_parquet("store/parts")`
    and duckdb's `FROM "store/parts/*.parquet"` read them too.
    """

    folder: Folder
    """Where it is."""
    manifest: Manifest
    """What it is of."""
    check_held: Callable[[], None] = field(default=lambda: None, repr=False)
    """Raises where this run no longer holds the store."""

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> Store:
        """A store, to be read.

        Args:
            where: a folder or an fsspec URL.

        Raises:
            StoreError: there is none, it is damaged, or of a newer version.
        """
        folder = folder_at(where)
        found = _stored(folder)
        if found is None:
            raise StoreError(
                f"There is no sweep in '{folder.where}': it has no {manifests.NAME}."
                " Check the path; run_sweep(..., store=...) makes one."
            )
        return cls(folder, found)

    # Parts -----------------------------------------------------------------------------------------------------------

    def entries(self) -> dict[Task, Entry]:
        """The parts that are there, in order."""
        known = set(self.manifest.tasks())
        found = {task: entry for entry in self.folder.entries(PARTS) if (task := _task_of(entry.name)) in known}
        return dict(sorted(found.items()))

    def write(self, task: Task, table: pa.Table) -> None:
        """Store a task's table, whole or not at all.

        Raises:
            StoreError: it cannot be written (a full disk, no permission), is not this task's, or the lock is lost.
        """
        self.check_held()
        try:
            check_table(table, task, list(self.manifest.metrics), self.manifest.groups[task.group])
        except StoreError as error:
            raise StoreError(f"The table of the task {task.name} {error}.") from error
        self.folder.write(name_of(task), to_bytes(table, task))

    def read(self, task: Task) -> pa.Table:
        """A task's table.

        Raises:
            StoreError: it is missing or damaged; the message names the file.
        """
        content = self.folder.read(name_of(task))
        where = f"'{self.folder.where}/{name_of(task)}'"
        if content is None:
            raise StoreError(f"{where} is missing; run the sweep again to have it made.")
        try:
            table = from_bytes(content, task)
            check_table(table, task, list(self.manifest.metrics), self.manifest.groups[task.group])
            return table
        except StoreError as error:
            raise StoreError(
                f"{where} {error}. Run the sweep again: it sets the file aside and makes it anew."
            ) from error

    def missing(self) -> list[Task]:
        """The tasks still to be done; damaged parts are set aside (renamed to *.corrupt) and are among them.

        Every part that is there is read and its hash checked.

        Warns:
            CorruptPartWarning: names each part that was set aside, and why.
        """
        there = self.entries()
        for task in list(there):
            try:
                self.read(task)
            except StoreError as error:
                self.folder.rename(name_of(task), name_of(task) + CORRUPT)
                warnings.warn(f"{error} (Set aside as *{CORRUPT}.)", CorruptPartWarning, stacklevel=2)
                del there[task]
        return [task for task in self.manifest.tasks() if task not in there]

    # Fitted edits ----------------------------------------------------------------------------------------------------

    def fits(self) -> Fits:
        """The fitted edits of its conditions.

        Raises:
            StoreError: a file of them is missing or damaged.
        """
        found: Fits = {}
        for name, sha256 in self.manifest.fitted.items():
            content = self.folder.read(name)
            if content is None or hashlib.sha256(content).hexdigest() != sha256:
                raise StoreError(
                    f"'{self.folder.where}/{name}' is {'missing' if content is None else 'damaged'}. It holds what "
                    f"edits were fitted to, which later parts need as earlier ones had it: restore it from a copy, or "
                    f"choose another store."
                )
            found |= unpack_fits(content)
        return found

    def with_fits(self, fits: Fits) -> Store:
        """The store with more fitted edits in it."""
        if not fits:
            return self
        self.check_held()
        content, name = pack_fits(fits), f"{FITTED}/{len(self.manifest.fitted):05d}.zip"
        self.folder.write(name, content)  # before the manifest, which a killed run leaves without it
        fitted = self.manifest.fitted | {name: hashlib.sha256(content).hexdigest()}
        made = replace(self.manifest, fitted=fitted)
        self.folder.write(manifests.NAME, made.to_json().encode())
        return replace(self, manifest=made)

    # Reading ---------------------------------------------------------------------------------------------------------

    def tables(self) -> Iterator[tuple[Task, pa.Table]]:
        """Every stored table, in the order of groups and shards; of a sweep that is not finished, those done so far.

        Raises:
            StoreError: a part is damaged.
        """
        return ((task, self.read(task)) for task in self.entries())

    def table(self) -> pa.Table:
        """All rows in one table: condition, shard, image and one column a metric."""
        return joined([table for _, table in self.tables()], list(self.manifest.metrics))


@contextmanager
def writing(
    where: str | os.PathLike[str], asked: Manifest, grouping: Grouping, *, resume: bool = True
) -> Iterator[Store]:
    """A store that is this run's alone inside the `with` block: begun, resumed, or extended by new conditions.

    Args:
        where: a folder or an fsspec URL.
        asked: what the call is of, its conditions not grouped.
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
        if stored is None and any(_task_of(entry.name) for entry in folder.entries(PARTS)):
            raise StoreError(
                f"'{folder.where}' has parts but no {manifests.NAME}, so that it cannot be told what they are of. "
                f"Restore the file from a copy, or choose another store."
            )
        made = grown(stored, asked, grouping, folder.where)
        if made != stored:
            folder.write(manifests.NAME, made.to_json().encode())
        yield Store(folder, made, check_held)


def grown(stored: Manifest | None, asked: Manifest, grouping: Grouping, where: str) -> Manifest:
    """The manifest to work by: conditions that are new stand in new groups behind the old ones.

    Raises:
        StoreError: `stored` is of another sweep.
    """
    made = asked if stored is None else manifests.extended(stored, asked, where)
    grouped = {key for keys in made.groups for key in keys}
    new = [key for key in made.conditions if key not in grouped]
    return replace(made, groups=(*made.groups, *map(tuple, grouping(new))))


def joined(tables: Sequence[pa.Table], metrics: Sequence[str]) -> pa.Table:
    """Tables of parts, one below the other; what their metadata says is dropped."""
    schema = part_schema(metrics)
    return pa.concat_tables([schema.empty_table(), *(table.replace_schema_metadata(None) for table in tables)])


def _stored(folder: Folder) -> Manifest | None:
    text = folder.read(manifests.NAME)
    return None if text is None else Manifest.from_json(text, f"{folder.where}/{manifests.NAME}")


def _task_of(name: str) -> Task | None:
    match = re.fullmatch(rf"g(\d+)-s(\d+){re.escape(SUFFIX)}", name)
    return Task(int(match[1]), int(match[2])) if match else None

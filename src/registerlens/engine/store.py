"""Results in a folder or object store: a Parquet file for each task, and a manifest of what they are of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

import pyarrow as pa

from registerlens.engine.folder import Entry, Folder
from registerlens.engine.parts import SUFFIX, from_bytes, name_of, to_bytes
from registerlens.engine.tasks import Task
from registerlens.errors import StoreError

MANIFEST = "manifest.json"
"""The file that says what the parts are of."""
PARTS = "parts"
"""The folder of the parts."""
CORRUPT = ".corrupt"
"""Added to the name of a damaged part that a run has set aside."""


class CorruptPartWarning(UserWarning):
    """A part of a store was damaged; it was set aside and is computed again."""


@runtime_checkable
class Contents(Protocol):
    """What a manifest says of the tables in its store."""

    def tasks(self) -> list[Task]:
        """Every task, in order."""
        ...

    def check(self, task: Task, table: pa.Table) -> None:
        """Raise StoreError, which goes on after the table's name, where a task cannot have such a table."""
        ...

    def to_json(self) -> str:
        """As it stands in the store."""
        ...


AnyManifest = TypeVar("AnyManifest", bound=Contents)


@dataclass(frozen=True)
class Store(Generic[AnyManifest]):
    """Tables of tasks, and their manifest. Reading needs no lock, and may go on while a run writes.

    The parts are ordinary Parquet files: `pl.read_parquet("store/parts/*.parquet")`, `pd.read_parquet("store/parts")`
    and duckdb's `FROM "store/parts/*.parquet"` read them too.
    """

    folder: Folder
    """Where it is."""
    manifest: AnyManifest
    """What it is of."""
    check_held: Callable[[], None] = field(default=lambda: None, repr=False)
    """Raises where this run no longer holds the store."""

    def entries(self) -> dict[Task, Entry]:
        """The parts that are there, in order."""
        known = set(self.manifest.tasks())
        found = {task: entry for entry in self.folder.entries(PARTS) if (task := task_of(entry.name)) in known}
        return dict(sorted(found.items()))

    def write(self, task: Task, table: pa.Table) -> None:
        """Store a task's table, whole or not at all.

        Raises:
            StoreError: it cannot be written (a full disk, no permission), is not this task's, or the lock is lost.
        """
        self.check_held()
        try:
            self.manifest.check(task, table)
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
            self.manifest.check(task, table)
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

    def tables(self) -> Iterator[tuple[Task, pa.Table]]:
        """Every stored table, in the order of groups and shards; of a sweep that is not finished, those done so far.

        Raises:
            StoreError: a part is damaged.
        """
        return ((task, self.read(task)) for task in self.entries())

    def with_manifest(self, manifest: AnyManifest) -> Self:
        """The store under another manifest, which is written."""
        self.check_held()
        self.folder.write(MANIFEST, manifest.to_json().encode())
        return replace(self, manifest=manifest)


def task_of(name: str) -> Task | None:
    """The task whose part a file of this name is; None for other files."""
    match = re.fullmatch(rf"g(\d+)-s(\d+){re.escape(SUFFIX)}", name)
    return Task(int(match[1]), int(match[2])) if match else None

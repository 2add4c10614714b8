"""Results in a folder or object store: a Parquet file for each task, and a manifest that says what they hold."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from registerlens.data.images import Skipped
from registerlens.engine.backends import Task
from registerlens.engine.folder import Entry, Folder
from registerlens.errors import StoreError

MANIFEST = "manifest.json"
"""The file that says what the parts hold."""
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
AnyStore = TypeVar("AnyStore", bound="Store")


@dataclass(frozen=True)
class Store(Generic[AnyManifest]):
    """Tables of tasks, and their manifest. Reading needs no lock, and may go on while a run writes.

    The parts are ordinary Parquet files: `pl.read_parquet("store/parts/*.parquet")`, `pd.read_parquet("store/parts")`
    and duckdb's `FROM "store/parts/*.parquet"` read them too.
    """

    folder: Folder
    """Where it is."""
    manifest: AnyManifest
    """What the store holds: its tasks, and all that decides their numbers."""
    check_held: Callable[[], None] = field(default=lambda: None, repr=False)
    """Raises where this run no longer holds the store."""

    def entries(self) -> dict[Task, Entry]:
        """The parts that are there, in order."""
        known = set(self.manifest.tasks())
        parts = {task: entry for entry in self.folder.entries(PARTS) if (task := task_of(entry.name)) in known}
        return dict(sorted(parts.items()))

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

    def with_manifest(self: AnyStore, manifest: Contents) -> AnyStore:
        """The store under another manifest, which is written."""
        self.check_held()
        self.folder.write(MANIFEST, manifest.to_json().encode())
        return replace(self, manifest=manifest)


def task_of(name: str) -> Task | None:
    """The task whose part a file of this name is; None for other files."""
    match = re.fullmatch(rf"g(\d+)-s(\d+){re.escape(SUFFIX)}", name)
    return Task(int(match[1]), int(match[2])) if match else None


SUFFIX = ".parquet"
SKIPPED = b"registerlens.skipped"
"""Key of a part's metadata under which the images that could not be used stand, as JSON."""
TASK = b"registerlens.task"
"""Which task it is."""
SHA256 = b"registerlens.sha256"
"""Hash of its rows and its skipped images."""


def with_skipped(table: pa.Table, skipped: Iterable[Skipped]) -> pa.Table:
    """The same table, with the images that could not be used in its metadata."""
    reasons = json.dumps([[image.name, image.reason] for image in skipped])
    return table.replace_schema_metadata({**(table.schema.metadata or {}), SKIPPED: reasons.encode()})


def skipped_of(table: pa.Table) -> tuple[Skipped, ...]:
    """The images that could not be used.

    Example:
        >>> skipped_of(with_skipped(pa.table({"norm": [0.5]}), [Skipped("a.png", "truncated")]))
        (Skipped(name='a.png', reason='truncated'),)
    """
    reasons = (table.schema.metadata or {}).get(SKIPPED, b"[]")
    return tuple(Skipped(name, reason) for name, reason in json.loads(reasons))


def name_of(task: Task) -> str:
    """A task's file in the store.

    Example:
        >>> name_of(Task(group=3, shard=12))
        'parts/g00003-s000012.parquet'
    """
    return f"parts/{task.name}{SUFFIX}"


def to_bytes(table: pa.Table, task: Task) -> bytes:
    """A task's table as a Parquet file."""
    table = table.combine_chunks()
    metadata = {**(table.schema.metadata or {}), TASK: task.name.encode(), SHA256: _hash(table).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def from_bytes(content: bytes, task: Task) -> pa.Table:
    """The table in a part, checked: whatever is changed in the file, the table is the one written or an error.

    Args:
        content: the file.
        task: which task it should be.

    Raises:
        StoreError: it is damaged, or another task's; the message goes on after the file's name.
    """
    try:
        table = pq.read_table(pa.BufferReader(content)).combine_chunks()
        actual = _hash(table)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise StoreError(f"is truncated or damaged ({str(error).splitlines()[0]})") from error
    metadata = table.schema.metadata or {}
    if metadata.get(SHA256) != actual.encode():
        raise StoreError("is damaged: its rows do not have the hash that was stored with them")
    if metadata.get(TASK) != task.name.encode():
        raise StoreError(
            f"is no part of this store: it says that it is {metadata.get(TASK, b'').decode(errors='replace')}"
        )
    return table


def _hash(table: pa.Table) -> str:
    """SHA-256 of names, rows and skipped images, however they are encoded; NaN counts by its bits."""
    digest = hashlib.sha256((table.schema.metadata or {}).get(SKIPPED, b""))
    for name, column in zip(table.schema.names, table.columns, strict=True):
        digest.update(f"\0{name}\0{len(column)}\0".encode())
        text = pa.types.is_string(column.type)
        digest.update("\0".join(column.to_pylist()).encode() if text else column.to_numpy().tobytes())
    return digest.hexdigest()

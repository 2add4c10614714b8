"""A task's table: the images it had to skip, and the Parquet file it becomes, which notices damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from registerlens.data.images import Skipped
from registerlens.engine.tasks import Task
from registerlens.errors import StoreError

SUFFIX = ".parquet"
SKIPPED = b"registerlens.skipped"
"""Key of a part's metadata under which the images that could not be used stand, as JSON."""
TASK = b"registerlens.task"
"""Which task it is."""
SHA256 = b"registerlens.sha256"
"""Hash of its rows and its skipped images."""


def with_skipped(table: pa.Table, skipped: Iterable[Skipped]) -> pa.Table:
    """The same table, with the images that could not be used in its metadata."""
    told = json.dumps([[one.name, one.reason] for one in skipped])
    return table.replace_schema_metadata({**(table.schema.metadata or {}), SKIPPED: told.encode()})


def skipped_of(table: pa.Table) -> tuple[Skipped, ...]:
    """The images that could not be used.

    Example:
        >>> skipped_of(with_skipped(pa.table({"norm": [0.5]}), [Skipped("a.png", "truncated")]))
        (Skipped(name='a.png', reason='truncated'),)
    """
    told = (table.schema.metadata or {}).get(SKIPPED, b"[]")
    return tuple(Skipped(name, reason) for name, reason in json.loads(told))


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
    told = {**(table.schema.metadata or {}), TASK: task.name.encode(), SHA256: _hash(table).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(told), sink, compression="zstd")
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
    told = table.schema.metadata or {}
    if told.get(SHA256) != actual.encode():
        raise StoreError("is damaged: its rows do not have the hash that was stored with them")
    if told.get(TASK) != task.name.encode():
        raise StoreError(f"is no part of this store: it says that it is {told.get(TASK, b'').decode(errors='replace')}")
    return table


def _hash(table: pa.Table) -> str:
    """SHA-256 of names, rows and skipped images, however they are encoded; NaN counts by its bits."""
    digest = hashlib.sha256((table.schema.metadata or {}).get(SKIPPED, b""))
    for name, column in zip(table.schema.names, table.columns, strict=True):
        digest.update(f"\0{name}\0{len(column)}\0".encode())
        text = pa.types.is_string(column.type)
        digest.update("\0".join(column.to_pylist()).encode() if text else column.to_numpy().tobytes())
    return digest.hexdigest()

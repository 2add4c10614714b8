"""A store that lasts as long as the call: what `run_sweep` uses where none is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from registerlens.engine.tasks import Task
from registerlens.sweep.fitted import Fits
from registerlens.sweep.manifest import Manifest


@dataclass(frozen=True)
class MemoryStore:
    """The same as `Store`, in memory."""

    manifest: Manifest
    """What it is of."""
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

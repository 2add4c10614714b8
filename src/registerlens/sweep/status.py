"""How far a stored sweep is, without touching it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime

from registerlens.data.images import Skipped
from registerlens.display import Shown
from registerlens.engine.lock import Holder, holder_of
from registerlens.engine.parts import SUFFIX, skipped_of
from registerlens.engine.store import CORRUPT, PARTS
from registerlens.errors import StoreError
from registerlens.sweep.store import SweepStore


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
        lines += [f"  skipped: {one}" for one in self.skipped]
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

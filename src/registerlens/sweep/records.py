"""What a result remembers of its conditions, and where their numbers stand in its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from registerlens.errors import ConfigError
from registerlens.evaluation.verdict import ConditionKind
from registerlens.sweep.conditions import Condition, Factor


@dataclass(frozen=True, kw_only=True)
class Swept:
    """A condition that was run, without its interventions: what a table and a figure need of it.

    Example:
        >>> Swept.of(Condition(model="small")).kind.value
        'clean'
    """

    key: str
    """Content hash of the condition."""
    label: str
    """The condition's label."""
    factors: dict[str, Factor]
    """What distinguishes it from its neighbours."""
    model: str
    """Which of the sweep's models."""
    images: str
    """Which of the sweep's image sets."""
    control_of: str
    """Key of the condition for which it is a matched control; empty for others."""
    edited: bool
    """Whether it edits anything."""

    @classmethod
    def of(cls, condition: Condition) -> Swept:
        """What a result keeps of a condition."""
        same = {name: getattr(condition, name) for name in ("key", "label", "model", "images", "control_of")}
        return cls(factors=dict(condition.factors), edited=bool(condition.interventions), **same)

    @property
    def kind(self) -> ConditionKind:
        """The clean run, a control of another condition, or what the sweep is about."""
        if not self.edited:
            return ConditionKind.CLEAN
        return ConditionKind.CONTROL if self.control_of else ConditionKind.TESTED


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """The conditions that were run on one set of images, and where each row of the table belongs among them."""

    conditions: Int[np.ndarray, " condition"]
    """Indices into the result's conditions."""
    names: tuple[str, ...]
    """The images, in the order in which they stand in the table first."""
    rows: Int[np.ndarray, " row"] | slice
    """Rows of the table that belong here."""
    cells: Int[np.ndarray, " row"]
    """condition * images + image of each of them."""

    def spread(self, column: Float[np.ndarray, " all_rows"]) -> Float[np.ndarray, "condition image"]:
        """A metric's column as a matrix; NaN where a condition was not run on an image."""
        values = np.full(len(self.conditions) * len(self.names), np.nan)
        values[self.cells] = column[self.rows]
        return values.reshape(len(self.conditions), len(self.names))

    @cached_property
    def place(self) -> dict[int, int]:
        """From an index into the result's conditions to the row of the matrix."""
        return {int(condition): row for row, condition in enumerate(self.conditions)}


def places_of(table: pa.Table, conditions: Sequence[Swept]) -> dict[str, Places]:
    """Where the rows of a table belong, for each set of images.

    Raises:
        ConfigError: a row is of no condition of the list, or stands there twice.
    """
    keys = pa.array([condition.key for condition in conditions], pa.string())
    codes = pc.index_in(table["condition"], keys)  # type: ignore[attr-defined]
    if codes.null_count:
        unknown = pc.is_null(codes)  # type: ignore[attr-defined]
        strange = table["condition"].filter(unknown).unique().to_pylist()
        raise ConfigError(
            f"The table has rows of conditions {strange[:3]} that are not in the list of conditions."
            " Read table and conditions of one sweep."
        )
    which = codes.combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
    sets = list(dict.fromkeys(condition.images for condition in conditions))
    set_of = np.array([sets.index(condition.images) for condition in conditions], dtype=np.int64)
    places = {}
    for number, name in enumerate(sets):
        chosen = np.flatnonzero(set_of == number)
        rows = slice(None) if len(sets) == 1 else np.flatnonzero(set_of[which] == number)
        images = table["image"] if len(sets) == 1 else table["image"].take(pa.array(rows))
        names = images.unique().cast(pa.string())
        image = pc.index_in(images, names)  # type: ignore[attr-defined]
        image = image.combine_chunks().to_numpy(zero_copy_only=False)
        cells = np.searchsorted(chosen, which[rows]) * len(names) + image
        filled = np.zeros(len(chosen) * len(names), dtype=bool)
        filled[cells] = True
        if filled.sum() < len(cells):
            raise ConfigError(
                "The table has two rows of one condition and image; were two parts of one task read? Read each once."
            )
        places[name] = Places(conditions=chosen, names=tuple(names.to_pylist()), rows=rows, cells=cells)
    return places

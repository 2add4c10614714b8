"""What a sweep's numbers amount to, condition by condition: means and paired differences, with their evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from registerlens.display import drawn_by
from registerlens.errors import ConfigError
from registerlens.evaluation.controls import ConditionKind
from registerlens.results import Result
from registerlens.stats.intervals import interval_words, mean_intervals
from registerlens.stats.permutation import CHUNK, holm, least_p, sign_flip_p
from registerlens.sweep.conditions import Condition, Factor

if TYPE_CHECKING:
    from registerlens.sweep.result import SweepResult


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


_MEAN = ("mean", "low", "high")
_DIFFERENCE = ("difference", "difference_low", "difference_high")
_CONTROLS = ("vs_controls", "vs_controls_low", "vs_controls_high")
HEAD = ("condition", "label", "kind", "model", "images", "control_of")
"""Columns that say which condition a row is about; those of its factors follow."""
NUMBERS = (
    *("metric", "n_images", *_MEAN, *_DIFFERENCE, "p", "p_holm", "p_least"),
    *(*_CONTROLS, "p_controls", "p_controls_holm", "n_controls"),
)
"""Columns of numbers, after those."""


def aggregate(result: SweepResult, seed: int) -> pd.DataFrame:
    """The table of `SweepResult.to_dataframe`, which explains it."""
    tested = np.array([condition.kind is ConditionKind.TESTED for condition in result.conditions])
    blocks = []
    for metric in result.metrics:
        columns = {name: np.full(len(result.conditions), np.nan) for name in NUMBERS if name != "metric"}
        for name, places in result.places.items():
            for column, values in _measure(result, places, result.values(metric, name), seed).items():
                columns[column][places.conditions] = values
        for column in ("p", "p_controls"):
            columns[f"{column}_holm"] = holm(np.where(tested, columns[column], np.nan))
        blocks.append(pd.DataFrame({"metric": metric, **columns}))
    about = describe_conditions(result.conditions)
    frame = pd.concat([pd.concat([about, block], axis=1) for block in blocks]) if blocks else about.assign(metric="")
    frame = frame.sort_index(kind="stable").reset_index(drop=True)
    counts = {name: frame[name].fillna(0).astype(int) for name in ("n_images", "n_controls") if name in frame}
    return frame.assign(**counts)


def describe_conditions(conditions: tuple[Swept, ...]) -> pd.DataFrame:
    """One row a condition: what it is, and its factors; a factor called like another column is `factor_NAME`."""
    head = {
        name: [getattr(condition, "key" if name == "condition" else name) for condition in conditions] for name in HEAD
    }
    names = dict.fromkeys(name for condition in conditions for name in condition.factors)
    factors = {}
    for name in names:
        values = [condition.factors.get(name) for condition in conditions]
        if name in head and all(value in (None, own) for value, own in zip(values, head[name], strict=True)):
            continue  # the model, named as a factor too
        taken = name in head or name in NUMBERS
        factors[f"factor_{name}" if taken else name] = _column(values)
    return pd.DataFrame({**head, **factors})


def _column(values: list[Factor]) -> pd.Series:
    """Whole numbers stay whole where a condition has none."""
    kinds = {type(value) for value in values if value is not None}
    return pd.Series(values, dtype="Int64" if kinds == {int} else "float64" if kinds <= {int, float} else object)


def _measure(
    result: SweepResult,
    places: Places,
    values: Float[np.ndarray, "condition image"],
    seed: int,
) -> dict[str, np.ndarray]:
    """Every number of one metric on one set of images, but for Holm's corrections."""
    swept = [result.conditions[i] for i in places.conditions]
    clean = _clean_rows(swept)
    columns: dict[str, np.ndarray] = {"n_images": np.isfinite(values).sum(1)}
    columns |= {
        name: np.full(len(swept), np.nan) for name in (*_MEAN, *_DIFFERENCE, "p", "p_least", *_CONTROLS, "p_controls")
    }

    def average(rows: Int[np.ndarray, " row"], numbers: Float[np.ndarray, "row image"], into: tuple) -> None:
        for name, found in zip(into, mean_intervals(numbers), strict=True):
            columns[name][rows] = found

    def compare(
        rows: Int[np.ndarray, " row"], differences: Float[np.ndarray, "row image"], into: tuple, p: str
    ) -> None:
        average(rows, differences, into)
        columns[p][rows] = sign_flip_p(differences, seed)

    for rows in _chunks(np.arange(len(swept)), values.shape[1]):
        average(rows, values[rows], _MEAN)
    for rows in _chunks(np.flatnonzero(clean >= 0), values.shape[1]):
        differences = values[rows] - values[clean[rows]]
        compare(rows, differences, _DIFFERENCE, "p")
        columns["p_least"][rows] = least_p(np.isfinite(differences).sum(1))
    runs = clean == np.arange(len(swept))
    columns["p"][runs] = columns["p_least"][runs] = np.nan  # the clean run is not tested against itself
    controls = _controls(swept)
    columns["n_controls"] = np.array([len(controls.get(condition.key, ())) for condition in swept])
    for rows in _chunks(
        np.flatnonzero(columns["n_controls"]), values.shape[1] * int(columns["n_controls"].max(initial=1))
    ):
        others = np.stack([values[controls[swept[row].key]].mean(0) for row in rows])
        compare(rows, values[rows] - others, _CONTROLS, "p_controls")
    return columns


def _clean_rows(swept: list[Swept]) -> Int[np.ndarray, " condition"]:
    """For each condition the clean run of its model; -1 where there is none."""
    clean = {condition.model: row for row, condition in enumerate(swept) if condition.kind is ConditionKind.CLEAN}
    return np.array([clean.get(condition.model, -1) for condition in swept], dtype=np.int64)


def _controls(swept: list[Swept]) -> dict[str, list[int]]:
    """From a condition's key to its controls."""
    rows_of: dict[str, list[int]] = {}
    for row, condition in enumerate(swept):
        if condition.kind is ConditionKind.CONTROL:
            rows_of.setdefault(condition.control_of, []).append(row)
    return rows_of


def _chunks(rows: Int[np.ndarray, " row"], width: int) -> Iterator[Int[np.ndarray, " part"]]:
    step = max(1, CHUNK // max(1, width))
    return (rows[start : start + step] for start in range(0, len(rows), step))


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison(Result):
    """Two conditions beside each other, image by image."""

    a: str
    """Label of the first condition."""
    b: str
    """Label of the second condition."""
    metric: str
    """What was measured."""
    names: tuple[str, ...]
    """The images that have a number under both."""
    differences: Float[np.ndarray, " image"]
    """a minus b, of each of them."""
    mean_a: float
    """Mean of a over these images."""
    mean_b: float
    """Mean of b over them."""
    difference: float
    """Mean of a minus b."""
    low: float
    """Lower end of its 95% interval; NaN below 8 images."""
    high: float
    """Upper end."""
    p: float
    """Paired sign-flip permutation test; not corrected for other comparisons."""
    p_least: float
    """The smallest p-value that so many images can give."""

    plot = drawn_by("sweep.comparison_figure")

    @property
    def n_images(self) -> int:
        """Images compared."""
        return len(self.names)

    def describe(self) -> str:
        """The comparison in words."""
        return (
            f"{self.metric}: {self.a} {self.mean_a:.4g}, {self.b} {self.mean_b:.4g}; difference {self.difference:+.4g} "
            f"({interval_words(self.low, self.high)}), p = {self.p:.3g} on {self.n_images} images "
            f"(at least {self.p_least:.2g} is possible)."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row an image: its difference."""
        return pd.DataFrame({"image": self.names, "difference": self.differences})


def compare(result: SweepResult, a: Any, b: Any, metric: str, seed: int) -> Comparison:
    """The comparison of `SweepResult.compare`, which explains it."""
    first, second = (result.conditions[result.index(which)] for which in (a, b))
    series = [pd.Series(result.of(metric, swept), index=result.places[swept.images].names) for swept in (first, second)]
    both: Any = pd.concat(series, axis=1, join="inner")
    both = both[np.isfinite(both).all(axis=1)]
    if both.empty:
        raise ConfigError(
            f"{first.label!r} (images {first.images!r}) and {second.label!r} (images {second.images!r}) have no image "
            f"in common that has a {metric!r}; only conditions on the same images can be compared in pairs."
        )
    differences = (both[0] - both[1]).to_numpy()[None]
    mean, low, high = mean_intervals(differences)
    return Comparison(
        a=first.label,
        b=second.label,
        metric=metric,
        names=tuple(both.index),
        differences=differences[0],
        mean_a=float(both[0].mean()),
        mean_b=float(both[1].mean()),
        difference=float(mean[0]),
        low=float(low[0]),
        high=float(high[0]),
        p=float(sign_flip_p(differences, seed)[0]),
        p_least=float(least_p(np.array([len(both)]))[0]),
    )

"""The result of a sweep: every number of every image, and what they amount to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from registerlens.codecs import own_file
from registerlens.data.images import Skipped
from registerlens.errors import ConfigError, close_matches
from registerlens.evaluation.controls import ConditionKind
from registerlens.evaluation.metrics import COLUMNS, Metric
from registerlens.results import Result
from registerlens.sweep.aggregate import NUMBERS, Comparison, Places, Swept, aggregate, compare, places_of
from registerlens.sweep.conditions import Condition, Factor

if TYPE_CHECKING:
    import plotly.graph_objects as go
_WHY = {
    **dict.fromkeys(("difference", "p", "p_holm"), "the sweep has no clean condition to compare with"),
    **dict.fromkeys(("vs_controls", "p_controls", "p_controls_holm"), "no condition has controls"),
}
"""Why a column may be empty."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult(Result):
    """What every condition of a sweep does, image by image; aggregates are made of it on demand.

    Example:
        >>> table = pa.table({"condition": [Condition().key], "shard": [0], "image": ["a.png"], "norm": [3.0]})
        >>> result = SweepResult.from_table(table, [Condition()], ["norm"])
        >>> result.of("norm", "clean")
        array([3.])
    """

    table: pa.Table = field(metadata=own_file(".parquet", pq.write_table, pq.read_table))
    """One row a condition and image: `condition` (key), `shard`, `image` (name), and a column a metric."""
    conditions: tuple[Swept, ...]
    """What was run, in the order of the sweep."""
    metrics: dict[str, str]
    """Names of the metrics, each with what it is in words."""
    skipped: tuple[Skipped, ...] = ()
    """Images that could not be used."""

    def __post_init__(self) -> None:
        if missing := [name for name in (*COLUMNS, *self.metrics) if name not in self.table.column_names]:
            raise ConfigError(
                f"The table lacks the columns {missing}; it has {self.table.column_names}."
                " Give a table that a sweep has written."
            )
        _ = self.places  # refuses rows of unknown conditions

    @classmethod
    def from_table(
        cls,
        table: pa.Table,
        conditions: Sequence[Condition | Swept],
        metrics: Mapping[str, str] | Sequence[Metric | str],
        skipped: Sequence[Skipped] = (),
    ) -> SweepResult:
        """A result of the parts' tables, put together.

        Args:
            table: the columns `condition`, `shard`, `image`, and one a metric.
            conditions: all that the table has rows of; those without rows count as not yet run.
            metrics: those whose columns are looked at; or their names, or names with words.
            skipped: images that could not be used.

        Raises:
            ConfigError: a column is missing, a row is of an unknown condition, or stands there twice.
        """
        for name in {"condition", "image"} & set(table.column_names):  # names stand there many times
            if not pa.types.is_dictionary(table.schema.field(name).type):
                place = table.column_names.index(name)
                table = table.set_column(place, name, table[name].dictionary_encode().unify_dictionaries())
        swept = tuple(condition if isinstance(condition, Swept) else Swept.of(condition) for condition in conditions)
        return cls(table=table, conditions=swept, metrics=_words(metrics), skipped=tuple(skipped))

    @classmethod
    def from_store(cls, store: str | os.PathLike[str]) -> SweepResult:
        """The result in a store; of a sweep that is not finished, what is done so far.

        Args:
            store: its folder or fsspec URL.

        Raises:
            StoreError: there is none, it is damaged, or of a newer version.
        """
        from registerlens.sweep.run import read_sweep  # stores stand on results

        return read_sweep(store)

    @cached_property
    def places(self) -> dict[str, Places]:
        """Where each row of the table belongs, for each set of images."""
        return places_of(self.table, self.conditions)

    @property
    def n_images(self) -> int:
        """Images that were measured, all sets together."""
        return sum(len(places.names) for places in self.places.values())

    def values(self, metric: str, images: str) -> Float[np.ndarray, "condition image"]:
        """A metric of one set of images: the conditions of `places[images].conditions`, NaN where there is no number.

        Raises:
            ConfigError: there is no such metric, or no such set.
        """
        column = self._column(metric)
        if images not in self.places:
            raise ConfigError(
                f"No set of images {images!r}.{close_matches(images, self.places)} There are {list(self.places)}."
            )
        return self.places[images].spread(column)

    def of(self, metric: str, condition: str | Swept | Condition) -> Float[np.ndarray, " image"]:
        """One metric under one condition, image by image, in the order of `places[images].names`.

        Args:
            metric: its name.
            condition: the condition, its key or its label.

        Raises:
            ConfigError: there is no such metric or condition, or several have that label.
        """
        index = self.index(condition)
        places = self.places[self.conditions[index].images]
        return places.spread(self._column(metric))[places.place[index]]

    def index(self, condition: str | Swept | Condition) -> int:
        """Which of the conditions is meant by a condition, a key or a label.

        Raises:
            ConfigError: none, or several.
        """
        name = condition if isinstance(condition, str) else condition.key
        rows = [i for i, swept in enumerate(self.conditions) if swept.key == name]
        rows = rows or [i for i, swept in enumerate(self.conditions) if swept.label == name]
        if not rows:
            labels = dict.fromkeys(swept.label for swept in self.conditions)
            raise ConfigError(f"No condition {name!r}.{close_matches(name, labels)} `conditions` lists all.")
        if len(rows) > 1:
            keys = [f"{self.conditions[i].key} ({self.conditions[i].model}, {self.conditions[i].images})" for i in rows]
            raise ConfigError(f"{len(rows)} conditions are called {name!r}; give a key: {', '.join(keys[:8])}.")
        return rows[0]

    def images(self) -> pd.DataFrame:
        """The raw numbers: one row a condition and image, with label, model and image set beside the metrics."""
        codes = np.empty(self.table.num_rows, dtype=np.int64)
        for places in self.places.values():
            codes[places.rows] = places.conditions[places.cells // len(places.names)]
        frame = self.table.to_pandas()
        columns = {
            name: [getattr(condition, name) for condition in self.conditions] for name in ("label", "model", "images")
        }
        for place, (name, values) in enumerate(columns.items(), start=1):
            frame.insert(place, name, pd.Categorical(values, categories=list(dict.fromkeys(values))).take(codes))
        return frame

    def describe(self) -> str:
        """What was run, and on how much."""
        counts = ", ".join(
            f"{n} {kind.value}" for kind, n in Counter(condition.kind for condition in self.conditions).items()
        )
        left_out = f" {len(self.skipped)} images could not be used." if self.skipped else ""
        return f"{', '.join(self.metrics)} under {counts} conditions on {self.n_images} images.{left_out}"

    def to_dataframe(self, seed: int = 0) -> pd.DataFrame:
        """One row a condition and metric.

        Columns: what the condition is (`condition` (key), `label`, `kind`: clean, control or tested, `model`, `images`,
        `control_of`), its factors, `metric`, `n_images` with a number; `mean` with its 95% interval `low`, `high`;
        `difference` to the clean run of the same model and images, with `difference_low`, `difference_high`, `p`,
        `p_holm` and `p_least`, the smallest p-value that so many images can give; `vs_controls`, the difference to the
        mean of the condition's controls, with the same columns, and their number `n_controls`.

        All is paired, image by image; an image without a finite number on either side is left out. Intervals are
        those of `mean_intervals` (none below 8 images), p-values those of `sign_flip_p`. `p_holm` is corrected within
        the metric over all tested conditions: neither clean runs nor controls count. NaN stands where there is nothing
        to compare with.

        Args:
            seed: of the permutations.
        """
        return aggregate(self, seed) if seed else self._aggregates.copy()

    @cached_property
    def _aggregates(self) -> pd.DataFrame:
        return aggregate(self, 0)

    def top(self, metric: str, n: int = 10, by: str = "difference") -> pd.DataFrame:
        """The tested conditions that do most, or of which a p-value is lowest.

        Args:
            metric: its name.
            n: how many.
            by: a column of numbers of `to_dataframe`; the farthest from zero come first, of p-values the smallest.

        Returns:
            rows of `to_dataframe`.

        Raises:
            ConfigError: there is no such metric or column, or nothing in it.
        """
        self._column(metric)
        frame: Any = self._aggregates
        rows = frame[(frame["metric"] == metric) & (frame["kind"] == ConditionKind.TESTED)]
        numbers = [name for name in NUMBERS if name not in ("metric", "n_images", "p_least", "n_controls")]
        if by not in numbers:
            raise ConfigError(f"No column {by!r} to order by.{close_matches(by, numbers)} There are {numbers}.")
        rows = rows[rows[by].notna()]
        if rows.empty:
            raise ConfigError(f"No tested condition has a {by!r} of {metric!r}: {_WHY.get(by, 'all of it is NaN')}.")
        key = rows[by] if by.startswith("p") else -rows[by].abs()
        return rows.loc[key.sort_values(kind="stable").index[:n]].reset_index(drop=True)

    def compare(
        self, a: str | Swept | Condition, b: str | Swept | Condition, metric: str, *, seed: int = 0
    ) -> Comparison:
        """Two conditions beside each other, paired by the names of their images.

        Args:
            a, b: conditions, their keys or their labels; they may be of different models.
            metric: its name.
            seed: of the permutations.

        Raises:
            ConfigError: there is no such condition or metric, a label means several, or no image has both numbers.
        """
        return compare(self, a, b, metric, seed)

    def select(self, **factors: Factor | Collection[Factor]) -> SweepResult:
        """The part of the result whose factors have these values, with its clean runs and controls.

        Example:
            `result.select(mode="zero", layer=range(9, 12))`

        Raises:
            ConfigError: no condition is left.
        """
        wanted = {name: [value] if _single(value) else list(value) for name, value in factors.items()}  # type: ignore[arg-type]
        fits = [
            condition
            for condition in self.conditions
            if all(condition.factors.get(name) in values for name, values in wanted.items())
        ]
        tested = {condition.key for condition in fits if condition.kind is ConditionKind.TESTED}
        if not tested:
            known = dict.fromkeys(name for condition in self.conditions for name in condition.factors)
            raise ConfigError(f"No tested condition has {factors}. Factors: {list(known)}.")
        kept = [
            condition
            for condition in self.conditions
            if condition.kind is ConditionKind.CLEAN or condition.key in tested or condition.control_of in tested
        ]
        rows = pc.is_in(self.table["condition"].cast(pa.string()), pa.array([condition.key for condition in kept]))  # type: ignore[attr-defined]
        return self.from_table(self.table.filter(rows), kept, self.metrics, self.skipped)

    def plot(self, kind: str | None = None, metric: str | None = None, *, by: str = "difference") -> go.Figure:
        """A figure of one metric.

        Args:
            kind: "layers" (effect per layer), "dose" (effect by the number of neurons, controls beside it), "heads"
                (heat map layer x head), "volcano" (neurons: effect against -log10 p); None takes the one for which the
                conditions have the factors.
            metric: its name; None takes the first.
            by: "difference" (to the clean run), "vs_controls" or "mean".

        Raises:
            ConfigError: there is no such kind or metric, or the conditions lack the factors that it needs.
        """
        from registerlens.viz.sweep import sweep_figure

        return sweep_figure(self, kind, metric, by)

    def _column(self, metric: str) -> Float[np.ndarray, " row"]:
        if metric not in self.metrics:
            known = list(self.metrics)
            raise ConfigError(f"No metric {metric!r}.{close_matches(metric, known)} There are {known}.")
        return self.table[metric].to_numpy().astype(np.float64, copy=False)


def _words(metrics: Mapping[str, str] | Sequence[Metric | str]) -> dict[str, str]:
    """Names of metrics with their descriptions, as far as there are any."""
    if isinstance(metrics, Mapping):
        return dict(metrics)
    return dict((metric, "") if isinstance(metric, str) else (metric.name, metric.words) for metric in metrics)


def _single(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)

"""What the figures of a sweep draw: one metric's effects, apart by the factors that vary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from registerlens.errors import ConfigError
from registerlens.evaluation.controls import ConditionKind
from registerlens.sweep.aggregate import HEAD, NUMBERS
from registerlens.sweep.result import SweepResult


@dataclass(frozen=True)
class By:
    """What is drawn, and its columns."""

    words: str
    value: str
    low: str
    high: str
    p: str = ""
    zero: float | None = 0.0


BYS = {
    "difference": By("difference to the clean run", "difference", "difference_low", "difference_high", "p"),
    "vs_controls": By(
        "difference to random controls", "vs_controls", "vs_controls_low", "vs_controls_high", "p_controls"
    ),
    "mean": By("mean", "mean", "low", "high", zero=None),
}


@dataclass(frozen=True, eq=False)
class Effects:
    """The rows of one metric, with what is drawn in the columns `value`, `low`, `high`, `p`, `p_holm`."""

    metric: str
    words: str
    by: By
    tested: Any
    controls: Any
    factors: tuple[str, ...]

    def having(self, *factors: str) -> Effects:
        """Only the conditions that have all of these factors."""
        tested = self.tested.dropna(subset=list(factors))
        return replace(self, tested=tested, factors=tuple(n for n in self.factors if tested[n].notna().any()))

    @property
    def title(self) -> str:
        """Title of the axis."""
        return f"{self.metric}: {self.by.words}"

    def series(self, kind: str, most: int, *used: str) -> dict[str, Any]:
        """The tested conditions, apart by every factor that varies and is not `used`; with a name for each part.

        Raises:
            ConfigError: there are more than `most`.
        """
        apart = [name for name in ("model", "images", *self.factors) if name not in used]
        varying = [name for name in apart if self.tested[name].nunique(dropna=False) > 1]
        if not varying:
            return {"": self.tested}
        series = {}
        for values, rows in self.tested.groupby(varying, dropna=False, sort=False):
            labels = zip(varying, values, strict=True)
            series[" ".join(f"{name}={value}" for name, value in labels if not pd.isna(value))] = rows
        if len(series) > most:
            raise ConfigError(
                f"The figure {kind!r} would need {len(series)} series, at most {most} can be told apart: "
                f"{', '.join(list(series)[:3])}, ... Choose with result.select(FACTOR=VALUES).plot({kind!r})."
            )
        return series


def effects_of(result: SweepResult, metric: str, by: By) -> Effects:
    """The effects of one metric.

    Raises:
        ConfigError: there is none to draw.
    """
    frame: Any = result.to_dataframe()
    frame = frame[frame["metric"] == metric]
    columns = {by.value: "value", by.low: "low", by.high: "high"} | (
        {by.p: "p", f"{by.p}_holm": "p_holm"} if by.p else {}
    )
    known = [name for name in frame.columns if name not in (*HEAD, *NUMBERS)]
    kept = ["condition", "label", "kind", "model", "images", "control_of", "n_images", "p_least", *known]
    frame = frame[[*kept, *columns]].rename(columns=columns)
    tested = frame[(frame["kind"] == ConditionKind.TESTED) & frame["value"].notna()]
    if tested.empty:
        raise ConfigError(
            f"Nothing to draw: no tested condition has the {by.words} of {metric!r}. "
            f"Is there a clean condition, are there controls?"
        )
    factors = tuple(name for name in known if tested[name].notna().any())
    words = result.metrics[metric]
    return Effects(metric, words, by, tested, frame[frame["kind"] == ConditionKind.CONTROL], factors)

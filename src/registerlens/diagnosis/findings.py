"""What a diagnosis says: causes, each with its evidence and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import pandas as pd

from registerlens.analysis.massive import MassiveActivations
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.sink_kinds import SinkKinds
from registerlens.analysis.trace import Trace
from registerlens.display import Shown
from registerlens.errors import ConfigError
from registerlens.evaluation.effects import Evaluation
from registerlens.results import ModelResult

if TYPE_CHECKING:
    import plotly.graph_objects as go

Cause = Literal[
    "not finite",
    "untrained weights",
    "other images",
    "wrong preprocessing",
    "position embedding",
    "patch embedding",
    "outliers despite registers",
    "register neurons",
    "too few images",
    "massive channel",
    "sinks without outliers",
    "registers hold the outliers",
    "none",
]
"""What may be found. The first to hold is the headline: each makes what the later ones rest on doubtful, or explains
it."""
SOUND: tuple[Cause, ...] = ("none", "registers hold the outliers")
"""Causes with which a model is as it should be."""


@dataclass(frozen=True, kw_only=True)
class CauseFinding(Shown):
    """One cause, why it is believed, and what to do."""

    cause: Cause
    """What it is."""
    words: str
    """The matter in a sentence or two, with the numbers that tell."""
    evidence: dict[str, float | str]
    """Numbers and places it rests on, by name."""
    advice: str
    """What to do about it."""

    @property
    def title(self) -> str:
        """The cause as a heading."""
        return "Nothing is wrong" if self.cause == "none" else self.cause.capitalize()

    @property
    def sound(self) -> bool:
        """Whether it is no fault."""
        return self.cause in SOUND


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis(ModelResult):
    """What is wrong with a model on some images, the most important first, and what was measured to say so."""

    n_images: int
    """Images that were given; 0 where the weights alone said enough."""
    findings: tuple[CauseFinding, ...]
    """At least one, in the order of `Cause`."""
    trace: Trace | None = None
    """Norms and sinks; None where numbers are not finite, as the two below."""
    massive: MassiveActivations | None = None
    """Magnitudes of the channels."""
    sinks: SinkKinds | None = None
    """Which tokens are sinks; None also where attention is no softmax."""
    neurons: RegisterNeurons | None = None
    """Register neurons, where some were found."""
    evaluation: Evaluation | None = None
    """What a test-time register and an attention bias do to the outliers, beside controls; None without neurons."""
    cure: str | None = None
    """The condition of the evaluation that worked at the least cost; None where none did."""

    @property
    def cause(self) -> Cause:
        """The most important finding's."""
        return self.findings[0].cause

    def describe(self) -> str:
        """Every finding with its advice, the most important first."""
        return "\n".join(f"{one.title}. {one.words} {one.advice}" for one in self.findings)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a finding and piece of evidence."""
        rows = [
            {"cause": one.cause, "evidence": name, "value": value}
            for one in self.findings
            for name, value in (one.evidence or {"": ""}).items()
        ]
        return pd.DataFrame(rows, columns=["cause", "evidence", "value"])

    def plot(self) -> go.Figure:
        """Norms and sinks, place by place.

        Raises:
            ConfigError: nothing could be measured, because numbers are not finite.
        """
        if self.trace is None:
            raise ConfigError(f"There is nothing to draw: {self.findings[0].words}")
        return self.trace.plot()


def by_importance(findings: list[CauseFinding]) -> tuple[CauseFinding, ...]:
    """In the order of `Cause`."""
    return tuple(sorted(findings, key=lambda one: get_args(Cause).index(one.cause)))

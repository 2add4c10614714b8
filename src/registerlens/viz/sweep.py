"""The figures of a sweep: effect per layer, dose response, heat map of heads, volcano of neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plotly.graph_objects as go

from registerlens.errors import ConfigError, close_matches
from registerlens.sweep.result import SweepResult
from registerlens.viz.sweep_curves import DOSES, dose_figure, layers_figure
from registerlens.viz.sweep_effects import BYS, Effects, effects_of
from registerlens.viz.sweep_maps import heads_figure, volcano_figure
from registerlens.viz.theme import Mode


@dataclass(frozen=True)
class _Figure:
    """A kind of figure."""

    needs: tuple[tuple[str, ...], ...]
    """Factors; one of each group must be there."""
    draw: Callable[[Effects, Mode], go.Figure]


def sweep_figure(
    result: SweepResult,
    kind: str | None = None,
    metric: str | None = None,
    by: str = "difference",
    mode: Mode = "light",
) -> go.Figure:
    """One of the figures "volcano", "heads", "dose", "layers"; by default the first for which the factors are there.

    Args:
        result: the sweep.
        kind: of figure.
        metric: its name; None takes the first.
        by: "difference" to the clean run, "vs_controls", or "mean".
        mode: light or dark.

    Raises:
        ConfigError: there is no such kind or metric, or what it needs is missing.
    """
    for what, name, known in (("kind of figure", kind, FIGURES), ("metric", metric, result.metrics), ("by", by, BYS)):
        if name is not None and name not in known:
            raise ConfigError(f"No {what} {name!r}.{close_matches(name, known)} There are {list(known)}.")
    effects = effects_of(result, metric or next(iter(result.metrics)), BYS[by])
    fits = [name for name, figure in FIGURES.items() if not _missing(figure, effects)]
    if kind is None and not fits:
        raise ConfigError(f"No figure fits the factors {list(effects.factors)}. {_needed()}")
    if kind is not None and (missing := _missing(FIGURES[kind], effects)):
        raise ConfigError(
            f"The figure {kind!r} needs the factor {missing}, the tested conditions have {list(effects.factors)}. "
            f"{_needed()}" + (f" Here {fits} can be drawn." if fits else "")
        )
    return FIGURES[kind or fits[0]].draw(effects, mode)


def drawable(result: SweepResult, metric: str, by: str = "difference") -> list[str]:
    """The kinds of figures for which the conditions have the factors, and not too many series."""
    kinds = []
    for kind in FIGURES:
        try:
            sweep_figure(result, kind, metric, by)
        except ConfigError:
            continue
        kinds.append(kind)
    return kinds


def _missing(figure: _Figure, effects: Effects) -> str:
    """The groups of factors that no condition has, or that none has together; empty if some do."""
    lacking = [group for group in figure.needs if not set(group) & set(effects.factors)]
    there = [next(name for name in group if name in effects.factors) for group in figure.needs if group not in lacking]
    if not lacking and effects.having(*there).tested.empty:
        lacking = list(figure.needs)
    return " and ".join(" or ".join(map(repr, group)) for group in lacking)


def _needed() -> str:
    told = [f"{name}: {', '.join(' or '.join(group) for group in one.needs)}" for name, one in FIGURES.items()]
    return f"Figures and their factors: {'; '.join(told)}."


FIGURES: dict[str, _Figure] = {
    "volcano": _Figure((("layer",), ("neuron",)), volcano_figure),
    "heads": _Figure((("layer",), ("head",)), heads_figure),
    "dose": _Figure((tuple(DOSES),), dose_figure),
    "layers": _Figure((("layer",),), layers_figure),
}
"""Kinds of figures; the first whose factors are there is drawn by default."""

"""The figures of a sweep: effect per layer, dose response, heat map of heads, volcano of neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.errors import ConfigError, close_matches
from registerlens.sweep.aggregate import HEAD, NUMBERS
from registerlens.sweep.result import SweepResult
from registerlens.viz.theme import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    OLIVE,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Mode,
    apply_theme,
    ink,
    paper,
)

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BROWN, OLIVE, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross", "star", "hexagon")
_PANELS = 4
"""Heat maps or volcanoes beside each other at most."""
_NAMED = 10
"""Neurons of a volcano that are named."""
_LEVEL = 0.05
"""Of Holm-corrected p-values."""
_DOSES = {
    "k": "neurons, best first",
    "scale": "factor by which it is scaled",
    "factor": "factor by which it is scaled",
    "n": "test-time registers",
}
"""Factors that a dose response may run over, with the title of the axis."""


@dataclass(frozen=True)
class _By:
    """What is drawn, and its columns."""

    words: str
    value: str
    low: str
    high: str
    p: str = ""
    zero: float | None = 0.0


_BYS = {
    "difference": _By("difference to the clean run", "difference", "difference_low", "difference_high", "p"),
    "vs_controls": _By(
        "difference to random controls", "vs_controls", "vs_controls_low", "vs_controls_high", "p_controls"
    ),
    "mean": _By("mean", "mean", "low", "high", zero=None),
}


@dataclass(frozen=True, eq=False)
class _Effects:
    """The rows of one metric, with what is drawn in the columns `value`, `low`, `high`, `p`, `p_holm`."""

    metric: str
    words: str
    by: _By
    tested: pd.DataFrame
    controls: pd.DataFrame
    factors: tuple[str, ...]

    @property
    def title(self) -> str:
        """Of the axis."""
        return f"{self.metric}: {self.by.words}"

    def series(self, *used: str) -> dict[str, pd.DataFrame]:
        """The tested conditions, apart by every factor that varies and is not `used`; with a name for each part."""
        apart = [name for name in ("model", "images", *self.factors) if name not in used]
        varying = [name for name in apart if self.tested[name].nunique(dropna=False) > 1]
        if not varying:
            return {"": self.tested}
        groups = self.tested.groupby(varying, dropna=False, sort=False)
        named = {}
        for values, rows in groups:
            told = zip(varying, values, strict=True)
            named[" ".join(f"{name}={value}" for name, value in told if not pd.isna(value))] = rows
        return named

    def limited(self, kind: str, most: int, *used: str) -> dict[str, pd.DataFrame]:
        """As `series`, if there are not too many.

        Raises:
            ConfigError: there are more than `most`.
        """
        found = self.series(*used)
        if len(found) > most:
            raise ConfigError(
                f"The figure {kind!r} would need {len(found)} series, at most {most} can be told apart: "
                f"{', '.join(list(found)[:3])}, ... Choose with result.select(FACTOR=VALUES).plot({kind!r})."
            )
        return found


@dataclass(frozen=True)
class _Figure:
    """A kind of figure."""

    needs: tuple[tuple[str, ...], ...]
    """Factors; one of each group must be there."""
    draw: Callable[[_Effects, Mode], go.Figure]


def sweep_figure(
    result: SweepResult, kind: str | None = None, metric: str | None = None, by: str = "difference", mode: Mode = "light"
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
    for what, name, known in (("kind of figure", kind, FIGURES), ("metric", metric, result.metrics), ("by", by, _BYS)):
        if name is not None and name not in known:
            raise ConfigError(f"No {what} {name!r}.{close_matches(name, known)} There are {list(known)}.")
    effects = _effects(result, metric or next(iter(result.metrics)), _BYS[by])
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


def _effects(result: SweepResult, metric: str, by: _By) -> _Effects:
    frame = result.to_dataframe()
    frame = frame[frame["metric"] == metric]
    columns = {by.value: "value", by.low: "low", by.high: "high"} | ({by.p: "p", f"{by.p}_holm": "p_holm"} if by.p else {})
    known = [name for name in frame.columns if name not in (*HEAD, *NUMBERS)]
    kept = ["condition", "label", "kind", "model", "images", "control_of", "n_images", "p_least", *known]
    frame = frame[[*kept, *columns]].rename(columns=columns)
    tested = frame[(frame["kind"] == "tested") & frame["value"].notna()]
    if tested.empty:
        raise ConfigError(
            f"Nothing to draw: no tested condition has the {by.words} of {metric!r}. "
            f"Is there a clean condition, are there controls?"
        )
    factors = tuple(name for name in known if tested[name].notna().any())
    words = result.metrics[metric]
    return _Effects(metric, words, by, tested, frame[frame["kind"] == "control"], factors)


def _missing(figure: _Figure, effects: _Effects) -> str:
    lacking = [group for group in figure.needs if not set(group) & set(effects.factors)]
    return " and ".join(" or ".join(map(repr, group)) for group in lacking)


def _needed() -> str:
    told = [f"{name}: {', '.join(' or '.join(group) for group in one.needs)}" for name, one in FIGURES.items()]
    return f"Figures and their factors: {'; '.join(told)}."


# Curves ---------------------------------------------------------------------------------------------------------------


def _curve(rows: pd.DataFrame, x: str, name: str, number: int, label: str) -> go.Scatter:
    value = rows["value"].to_numpy()
    return go.Scatter(
        x=rows[x].to_numpy(),
        y=value,
        error_y={
            "type": "data",
            "array": rows["high"].to_numpy() - value,
            "arrayminus": value - rows["low"].to_numpy(),
            "thickness": 1.2,
            "width": 3,
        },
        name=name,
        mode="lines+markers",
        line={"color": _COLOURS[number]},
        marker={"symbol": _SYMBOLS[number], "size": 7},
        customdata=np.stack([rows["low"], rows["high"], rows["n_images"]], axis=1),
        hovertemplate=f"{label} %{{x}}: %{{y:.4g}} (%{{customdata[0]:.3g}} to %{{customdata[1]:.3g}}), "
        f"%{{customdata[2]}} images<extra>{name}</extra>",
    )


def _layers(effects: _Effects, mode: Mode) -> go.Figure:
    """Effect per layer; where a layer has many conditions, each is a point and the line is their mean."""
    units = ("layer", "neuron", "head", "tokens", "patch")
    many = [name for name in units[1:3] if name in effects.factors]
    series = effects.limited("layers", len(_COLOURS), "layer", *many)
    figure = go.Figure()
    for number, (name, rows) in enumerate(series.items()):
        rows = rows[rows["layer"].notna()].sort_values("layer", kind="stable")
        name = name or "effect"
        if not rows["layer"].duplicated().any():
            figure.add_trace(_curve(rows, "layer", name, number, "layer"))
            continue
        means = rows.groupby("layer")["value"].mean()
        figure.add_trace(
            go.Scattergl(
                x=rows["layer"].to_numpy(np.float32),
                y=rows["value"].to_numpy(np.float32),
                name=f"{name}, each" if len(series) > 1 else "each condition",
                mode="markers",
                marker={"color": _COLOURS[number], "size": 4, "opacity": 0.35},
                text=rows["label"].to_numpy() if len(rows) <= 2000 else None,
                hovertemplate="%{text}: %{y:.4g}<extra></extra>" if len(rows) <= 2000 else "layer %{x}: %{y:.4g}",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=means.index.to_numpy(),
                y=means.to_numpy(),
                name=f"{name}, mean" if len(series) > 1 else "mean of the layer's conditions",
                mode="lines+markers",
                line={"color": _COLOURS[number], "width": 3},
                marker={"symbol": _SYMBOLS[number], "size": 8},
                hovertemplate="layer %{x}, mean: %{y:.4g}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="layer", dtick=max(1, round(effects.tested["layer"].nunique() / 12)))
    return _finish(figure, effects, mode)


def _dose(effects: _Effects, mode: Mode) -> go.Figure:
    """Effect by the dose, with the conditions' controls beside it: each draw a small mark, their mean dotted."""
    varying = [name for name in _DOSES if name in effects.factors]
    dose = max(varying, key=lambda name: effects.tested[name].nunique())
    # A set of neurons is named after its number; such a name is no series of its own.
    names = [one for one in ("neurons", "target") if one in effects.factors and _named_after(effects.tested, one, dose)]
    series = effects.limited("dose", len(_COLOURS), dose, *names)
    figure = go.Figure()
    for number, (name, rows) in enumerate(series.items()):
        rows = rows[rows[dose].notna()].sort_values(dose, kind="stable")
        name = name or "best first"
        figure.add_trace(_curve(rows, dose, name, number, dose))
        if effects.by.value == "vs_controls":
            continue
        doses = rows.set_index("condition")[dose]
        controls = effects.controls[effects.controls["control_of"].isin(doses.index)].dropna(subset=["value"])
        if controls.empty:
            continue
        at = controls["control_of"].map(doses)
        means = controls["value"].groupby(at).mean().sort_index()
        beside = {"legendgroup": f"controls {number}", "name": f"{name}: random controls" if len(series) > 1 else "controls"}
        figure.add_trace(
            go.Scatter(
                x=means.index.to_numpy(),
                y=means.to_numpy(),
                mode="lines",
                line={"color": _COLOURS[number] if len(series) > 1 else GREY, "dash": "dot"},
                hovertemplate=f"{dose} %{{x}}, mean of controls: %{{y:.4g}}<extra></extra>",
                **beside,
            )
        )
        figure.add_trace(
            go.Scatter(
                x=at.to_numpy(),
                y=controls["value"].to_numpy(),
                mode="markers",
                marker={
                    "color": _COLOURS[number] if len(series) > 1 else GREY,
                    "size": 7,
                    "symbol": f"{_SYMBOLS[number]}-open",
                },
                text=controls["label"].to_numpy(),
                hovertemplate="%{text}: %{y:.4g}<extra></extra>",
                showlegend=False,
                **beside,
            )
        )
    doses = np.unique(effects.tested[dose].dropna().to_numpy(np.float64))
    log = len(doses) > 2 and doses[0] > 0 and doses[-1] / doses[0] >= 16
    figure.update_xaxes(title_text=_DOSES[dose] + (" (log)" if log else ""), type="log" if log else "linear")
    if len(doses) <= 12:
        figure.update_xaxes(tickvals=doses, ticktext=[f"{value:g}" for value in doses])
    return _finish(figure, effects, mode)


def _named_after(rows: pd.DataFrame, name: str, dose: str) -> bool:
    return rows.groupby(dose)[name].nunique().max() <= 1 and rows[name].nunique() == rows[dose].nunique()


def _finish(figure: go.Figure, effects: _Effects, mode: Mode) -> go.Figure:
    figure.update_yaxes(title_text=effects.title)
    if effects.by.zero is not None:
        figure.add_hline(y=effects.by.zero, line={"color": GREY, "width": 1})
    n = effects.tested["n_images"]
    images = f"{n.min()} images" if n.min() == n.max() else f"{n.min()} to {n.max()} images"
    title = f"{effects.metric}{f' ({effects.words})' if effects.words else ''}, {images}"
    figure.update_layout(
        height=460, title={"text": title, "font": {"size": 14}}, legend={"orientation": "h", "x": 0, "y": -0.2}
    )
    return apply_theme(figure, mode).update_layout(hovermode="closest")


# Maps -----------------------------------------------------------------------------------------------------------------


def _panels(effects: _Effects, kind: str, *used: str) -> tuple[go.Figure, Iterator[tuple[int, pd.DataFrame]]]:
    """A figure with a panel for each series, and what belongs into each."""
    series = effects.limited(kind, _PANELS, *used)
    titles = tuple(series) if len(series) > 1 else None
    figure = make_subplots(1, len(series), subplot_titles=titles, shared_yaxes="all", horizontal_spacing=0.04)
    return figure, iter(enumerate(series.values(), start=1))


def _heads(effects: _Effects, mode: Mode) -> go.Figure:
    """Heat map layer x head; a dot where the Holm-corrected p-value is below 0.05."""
    figure, panels = _panels(effects, "heads", "layer", "head")
    rows = effects.tested.dropna(subset=["layer", "head"])
    layers, heads = (np.arange(int(rows[name].max()) + 1) for name in ("layer", "head"))
    far = float(rows["value"].abs().max()) or 1.0
    diverging = effects.by.zero is not None
    for column, part in panels:
        part = part.dropna(subset=["layer", "head"])
        z = np.full((len(layers), len(heads)), np.nan)
        extra = np.full((*z.shape, 3), np.nan)
        at = part["layer"].to_numpy(int), part["head"].to_numpy(int)
        z[at] = part["value"]
        holm = part["p_holm"].to_numpy() if "p_holm" in part else np.full(len(part), np.nan)
        extra[at] = np.stack([part["low"], part["high"], holm], axis=1)
        figure.add_trace(
            go.Heatmap(
                z=z,
                x=heads,
                y=layers,
                customdata=extra,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hovertemplate="head %{y}.%{x}: %{z:.4g} (%{customdata[0]:.3g} to %{customdata[1]:.3g})"
                "<br>Holm p %{customdata[2]:.3g}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        sure = holm < _LEVEL
        figure.add_trace(
            go.Scatter(
                x=at[1][sure],
                y=at[0][sure],
                mode="markers",
                name=f"Holm p < {_LEVEL}",
                showlegend=column == 1 and bool(diverging),
                marker={"color": ink("light"), "size": 5, "line": {"color": paper("light"), "width": 1}},
                hoverinfo="skip",
            ),
            row=1,
            col=column,
        )
    colours = [[0, BLUE], [0.5, "#f7f7f7"], [1, RED]] if diverging else "Cividis"
    limits = {"cmin": -far, "cmax": far} if diverging else {}
    figure.update_layout(coloraxis={"colorscale": colours, "colorbar": {"title": effects.by.words, "title_side": "right"}, **limits})
    figure.update_xaxes(title_text="head", dtick=1)
    figure.update_yaxes(dtick=1 if len(layers) <= 24 else 4)
    figure = _finish(figure, effects, mode)
    figure.layout.shapes = ()  # no zero line
    figure.update_yaxes(title_text="")
    figure.update_yaxes(title_text="layer", col=1)
    return figure.update_layout(height=160 + 26 * len(layers), plot_bgcolor="#d9d9d9").update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def _volcano(effects: _Effects, mode: Mode) -> go.Figure:
    """Effect of each neuron against -log10 p; those that pass Holm's correction are coloured, the top ones named."""
    if not effects.by.p:
        raise ConfigError("A volcano shows tests; take by='difference' or by='vs_controls'.")
    figure, panels = _panels(effects, "volcano", "layer", "neuron")
    tested = effects.tested.dropna(subset=["layer", "neuron"])
    told = []
    for column, part in panels:
        part = part.dropna(subset=["layer", "neuron", "p"])
        part = part.assign(height=-np.log10(part["p"].to_numpy()))
        sure = part["p_holm"] < _LEVEL
        groups = (
            ("not significant", part[~sure], GREY, 4, 0.5),
            ("lower, Holm p < 0.05", part[sure & (part["value"] < 0)], BLUE, 6, 0.9),
            ("higher, Holm p < 0.05", part[sure & (part["value"] > 0)], RED, 6, 0.9),
        )
        for name, rows, colour, size, opacity in groups:
            figure.add_trace(_cloud(rows, name, colour, size, opacity, column == 1), row=1, col=column)
        figure.add_trace(_names(part[sure] if sure.any() else part, part), row=1, col=column)
        told.append(f"{int(sure.sum())} of {len(part)} neurons pass Holm's correction")
    figure.update_xaxes(title_text=effects.title, zeroline=True)
    figure.update_yaxes(rangemode="tozero")
    figure = _finish(figure, effects, mode)
    figure.layout.shapes = ()
    figure.update_yaxes(title_text="")
    figure.update_yaxes(title_text="-log10 p (sign-flip permutation)", col=1)
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    least = float(tested["p_least"].min())
    note = "; ".join(told)
    if least * len(tested) > _LEVEL:
        note += f" (none can: {tested['n_images'].max()} images give no p below {least:.2g}, {len(tested)} tests need less)"
    return figure.update_layout(height=520, title={"text": f"{figure.layout.title.text}<br><sup>{note}</sup>"}, margin={"t": 90})


def _cloud(rows: pd.DataFrame, name: str, colour: str, size: int, opacity: float, legend: bool) -> go.Scattergl:
    """Points in single precision and layer.neuron as small integers, so that 18,432 of them take little room."""
    return go.Scattergl(
        x=rows["value"].to_numpy(np.float32),
        y=rows["height"].to_numpy(np.float32),
        customdata=rows[["layer", "neuron"]].to_numpy(np.int16 if rows["neuron"].max() < 2**15 else np.int32),
        name=name,
        legendgroup=name,
        showlegend=legend,
        mode="markers",
        marker={"color": colour, "size": size, "opacity": opacity, "line": {"width": 0}},
        hovertemplate="neuron %{customdata[0]}.%{customdata[1]}: %{x:.4g}, -log10 p %{y:.3g}<extra></extra>",
    )


def _names(candidates: pd.DataFrame, all_rows: pd.DataFrame) -> go.Scatter:
    """The farthest neurons' names, as far as they do not cover each other."""
    wide = float(np.ptp(all_rows["value"])) or 1.0
    high = float(np.ptp(all_rows["height"])) or 1.0
    placed: list[Any] = []
    order = candidates["value"].abs().sort_values(ascending=False, kind="stable").index
    for row in candidates.loc[order[: 4 * _NAMED]].itertuples():
        near = any(abs(row.value - o.value) < 0.1 * wide and abs(row.height - o.height) < 0.05 * high for o in placed)
        if not near and len(placed) < _NAMED:
            placed.append(row)
    return go.Scatter(
        x=[row.value for row in placed],
        y=[row.height for row in placed],
        text=[f"{int(row.layer)}.{int(row.neuron)}" for row in placed],
        mode="text",
        textposition=["middle right" if row.value < 0 else "middle left" for row in placed],
        textfont={"size": 11},
        hoverinfo="skip",
        showlegend=False,
    )


FIGURES: dict[str, _Figure] = {
    "volcano": _Figure((("layer",), ("neuron",)), _volcano),
    "heads": _Figure((("layer",), ("head",)), _heads),
    "dose": _Figure((tuple(_DOSES),), _dose),
    "layers": _Figure((("layer",),), _layers),
}
"""Kinds of figures; the first whose factors are there is drawn by default."""

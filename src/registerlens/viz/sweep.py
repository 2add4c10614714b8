"""The figures of a sweep: effect per layer, dose response with controls, map of heads, volcano of neurons."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.errors import ConfigError, close_matches
from registerlens.stats.intervals import interval_words
from registerlens.sweep.aggregate import Comparison
from registerlens.sweep.result import SweepResult
from registerlens.viz.parts import curve, dots, finished, interval, legend, sentence
from registerlens.viz.sweep_effects import BYS, Effects, effects_of
from registerlens.viz.theme import BLUE, BROWN, GREEN, GREY, OLIVE, ORANGE, PURPLE, RED, SKY, Mode, ink, paper

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BROWN, OLIVE, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross", "star", "hexagon")
DOSES = {
    "k": "neurons, best first",
    "scale": "factor by which it is scaled",
    "factor": "factor by which it is scaled",
    "n": "test-time registers",
}
"""Factors that a dose response may run over, with the title of the axis."""
_PANELS = 4
"""Heat maps or volcanoes beside each other at most."""
_NAMED = 10
"""Neurons of a volcano that are named."""
_LEVEL = 0.05
"""Level of Holm-corrected p-values."""


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
    needs = [f"{name}: {', '.join(' or '.join(group) for group in figure.needs)}" for name, figure in FIGURES.items()]
    return f"Figures and their factors: {'; '.join(needs)}."


def _curve(rows: Any, x: str, name: str, number: int, label: str) -> go.Scatter:
    middle, low, high = (rows[column].to_numpy() for column in ("value", "low", "high"))
    hover = f"{label} %{{x}}: %{{y:.4g}} (%{{customdata[0]}}), %{{customdata[1]}} images"
    line = curve(rows[x].to_numpy(), middle, name, _COLOURS[number], f"{hover}<extra>{name}</extra>")
    line.update(error_y=interval(middle, low, high, thickness=1.2, width=3))
    line.update(marker={"symbol": _SYMBOLS[number], "size": 7})
    return line.update(customdata=list(zip(map(interval_words, low, high), rows["n_images"], strict=True)))


def layers_figure(effects: Effects, mode: Mode) -> go.Figure:
    """Effect per layer; where a layer has many conditions, each is a point and the line is their mean."""
    effects = effects.having("layer")
    many = [name for name in ("neuron", "head") if name in effects.factors]
    of: Any = pd.Series(None, effects.tested.index, dtype=object)
    for name in many:
        of[effects.tested[name].notna()] = f"{name}s"
    effects = replace(effects, tested=effects.tested.assign(of=of), factors=(*effects.factors, "of"))
    series = effects.series("layers", len(_COLOURS), "layer", *many)
    figure = go.Figure()
    for number, (label, part) in enumerate(series.items()):
        rows = part.sort_values("layer", kind="stable")
        name = label or "effect"
        if not rows["layer"].duplicated().any():
            figure.add_trace(_curve(rows, "layer", name, number, "layer"))
            continue
        means = rows.groupby("layer")["value"].mean()
        few = len(rows) <= 2000
        each = go.Scattergl(x=rows["layer"].to_numpy(np.float32), y=rows["value"].to_numpy(np.float32), mode="markers")
        each.update(name=f"{name}, each" if len(series) > 1 else "each condition")
        each.update(marker={"color": _COLOURS[number], "size": 4, "opacity": 0.35})
        each.update(text=rows["label"].to_numpy() if few else None)
        each.update(hovertemplate="%{text}: %{y:.4g}<extra></extra>" if few else "layer %{x}: %{y:.4g}")
        figure.add_trace(each)
        mean = f"{name}, mean" if len(series) > 1 else "mean of the layer's conditions"
        hover = "layer %{x}, mean: %{y:.4g}<extra></extra>"
        line = curve(means.index.to_numpy(), means.to_numpy(), mean, _COLOURS[number], hover)
        figure.add_trace(line.update(line={"width": 2}, marker={"symbol": _SYMBOLS[number], "size": 8}))
    figure.update_xaxes(title_text="layer", dtick=max(1, round(effects.tested["layer"].nunique() / 12)))
    return _finished(_levelled(figure, effects), effects, mode)


def dose_figure(effects: Effects, mode: Mode) -> go.Figure:
    """Effect by the dose, with the conditions' controls beside it: each draw a small mark, their mean dotted."""
    varying = [name for name in DOSES if name in effects.factors]
    dose = max(varying, key=lambda name: effects.tested[name].nunique())
    effects = effects.having(dose)
    # A set of neurons is named after its number; such a name is no series of its own.
    names = [one for one in ("neurons", "target") if one in effects.factors and _named_after(effects.tested, one, dose)]
    series = effects.series("dose", len(_COLOURS), dose, *names)
    figure = go.Figure()
    for number, (label, part) in enumerate(series.items()):
        rows = part.sort_values(dose, kind="stable")
        name = label or "effect"
        figure.add_trace(_curve(rows, dose, name, number, dose))
        if effects.by.value == "vs_controls":
            continue
        doses = rows.set_index("condition")[dose]
        controls = effects.controls[effects.controls["control_of"].isin(doses.index)].dropna(subset=["value"])
        if controls.empty:
            continue
        at = controls["control_of"].map(doses)
        means = controls["value"].groupby(at).mean().sort_index()
        colour = _COLOURS[number] if len(series) > 1 else GREY
        shared = {
            "name": f"{name}: random controls" if len(series) > 1 else "controls",
            "legendgroup": f"controls {number}",
        }
        hover = f"{dose} %{{x}}, mean of controls: %{{y:.4g}}<extra></extra>"
        line = curve(means.index.to_numpy(), means.to_numpy(), None, colour, hover, dash="dot", mode="lines")
        figure.add_trace(line.update(shared))
        values, look = controls["value"].to_numpy(), {"symbol": f"{_SYMBOLS[number]}-open"}
        marks = dots(at.to_numpy(), values, None, colour, 7, "%{text}: %{y:.4g}", look=look, showlegend=False)
        figure.add_trace(marks.update(shared, text=controls["label"].to_numpy()))
    doses = np.unique(effects.tested[dose].to_numpy(np.float64))
    log = len(doses) > 2 and doses[0] > 0 and doses[-1] / doses[0] >= 16
    figure.update_xaxes(title_text=DOSES[dose] + (" (log)" if log else ""), type="log" if log else "linear")
    if len(doses) <= 12:
        figure.update_xaxes(tickvals=doses, ticktext=[f"{value:g}" for value in doses])
    return _finished(_levelled(figure, effects), effects, mode)


def _named_after(rows: Any, name: str, dose: str) -> bool:
    return rows.groupby(dose)[name].nunique().max() <= 1 and rows[name].nunique() == rows[dose].nunique()


def _panels(effects: Effects, kind: str, *used: str) -> tuple[go.Figure, Iterator[tuple[int, tuple[str, Any]]]]:
    """A figure with a panel for each series, and what belongs into each, with its name."""
    series = effects.series(kind, _PANELS, *used)
    titles = tuple(series) if len(series) > 1 else None
    figure = make_subplots(1, len(series), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    return figure, iter(enumerate(series.items(), start=1))


def heads_figure(effects: Effects, mode: Mode) -> go.Figure:
    """Heat map layer x head; a dot where the Holm-corrected p-value is below 0.05."""
    effects = effects.having("layer", "head")
    figure, panels = _panels(effects, "heads", "layer", "head")
    rows = effects.tested
    layers, heads = (np.arange(int(rows[name].max()) + 1) for name in ("layer", "head"))
    far = float(rows["value"].abs().max()) or 1.0
    diverging = effects.by.zero is not None
    for column, (_, part) in panels:
        z = np.full((len(layers), len(heads)), np.nan)
        extra = np.full((*z.shape, 2), None, dtype=object)
        at = part["layer"].to_numpy(int), part["head"].to_numpy(int)
        z[at] = part["value"]
        holm = part["p_holm"].to_numpy() if "p_holm" in part else np.full(len(part), np.nan)
        extra[at] = list(zip(map(interval_words, part["low"], part["high"]), holm, strict=True))
        cells = go.Heatmap(z=z, x=heads, y=layers, customdata=extra, coloraxis="coloraxis", xgap=1, ygap=1)
        hover = "head %{y}.%{x}: %{z:.4g} (%{customdata[0]})<br>Holm p %{customdata[1]:.3g}"
        figure.add_trace(cells.update(hovertemplate=f"{hover}<extra></extra>"), 1, column)
        sure = holm < _LEVEL
        look = {"color": ink("light"), "size": 5, "line": {"color": paper("light"), "width": 1}}
        marks = go.Scatter(x=at[1][sure], y=at[0][sure], mode="markers", marker=look, hoverinfo="skip")
        marks.update(name=f"Holm p < {_LEVEL}", showlegend=column == 1 and diverging)
        figure.add_trace(marks, 1, column)
    colours = [[0, BLUE], [0.5, "#f7f7f7"], [1, RED]] if diverging else "Cividis"
    limits = {"cmin": -far, "cmax": far} if diverging else {}
    bar = {"title": effects.by.words, "title_side": "right"}
    figure.update_layout(coloraxis={"colorscale": colours, "colorbar": bar, **limits})
    figure.update_xaxes(title_text="head", dtick=1, range=[-0.5, len(heads) - 0.5])
    figure.update_yaxes(dtick=1 if len(layers) <= 24 else 4, range=[-0.5, len(layers) - 0.5])
    figure.update_yaxes(title_text="layer", col=1)
    figure = _finished(figure, effects, mode, height=160 + 26 * len(layers), grid=False)
    return figure.update_layout(plot_bgcolor="#d9d9d9")


def volcano_figure(effects: Effects, mode: Mode) -> go.Figure:
    """Effect of each neuron against -log10 p; those that pass Holm's correction are coloured, the top ones named."""
    if not effects.by.p:
        raise ConfigError("A volcano shows tests; take by='difference' or by='vs_controls'.")
    n_tests = len(effects.tested)  # all that Holm's correction counts
    effects = effects.having("layer", "neuron")
    figure, panels = _panels(effects, "volcano", "layer", "neuron")
    texts = []
    for column, (name, every) in panels:
        placed = every.dropna(subset=["p"])
        part = placed.assign(height=-np.log10(placed["p"].to_numpy()))
        sure = part["p_holm"] < _LEVEL
        groups = (
            ("not significant", part[~sure], GREY, 4, 0.5),
            ("lower, Holm p < 0.05", part[sure & (part["value"] < 0)], BLUE, 6, 0.9),
            ("higher, Holm p < 0.05", part[sure & (part["value"] > 0)], RED, 6, 0.9),
        )
        for words, rows, colour, size, opacity in groups:
            figure.add_trace(_cloud(rows, words, colour, size, opacity, column == 1), 1, column)
        figure.add_trace(_names(part[sure] if sure.any() else part, part), 1, column)
        texts.append(f"{name + ': ' if name else ''}{int(sure.sum())} of {len(part)} neurons")
    figure.update_xaxes(title_text=effects.title, zeroline=True)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text="-log10 p (sign-flip permutation)", col=1)
    note = f"{', '.join(texts)} pass Holm's correction"
    least = float(effects.tested["p_least"].min())
    if least * n_tests > _LEVEL:
        n = effects.tested["n_images"].max()
        note += f" (none can: {n} images give no p below {least:.2g}, and {n_tests} tests need less)"
    figure = _finished(figure, effects, mode, below=f"<br><sup>{note}</sup>", height=520, margin={"t": 90})
    return figure.add_vline(x=0, line={"color": GREY, "width": 1})


def comparison_figure(comparison: Comparison, mode: Mode = "light") -> go.Figure:
    """The difference of every image in ascending order, with the mean's interval."""
    order = np.argsort(comparison.differences, kind="stable")
    names, differences = np.array(comparison.names)[order], comparison.differences[order]
    points = dots(np.arange(len(order)), differences, None, BLUE, 6, "%{text}: %{y:.4g}", text=names)
    figure = go.Figure(points).add_hline(y=0, line={"color": GREY, "width": 1})
    if np.isfinite(comparison.low):  # too few images have no interval
        figure.add_hrect(y0=comparison.low, y1=comparison.high, fillcolor=BLUE, opacity=0.15, line_width=0)
    figure.update_xaxes(title_text="images, in ascending order")
    figure.update_yaxes(title_text=f"{comparison.metric}: {comparison.a} minus {comparison.b}")
    return finished(figure, mode, height=420, title=comparison.describe())


def _cloud(rows: Any, name: str, colour: str, size: int, opacity: float, legend: bool) -> go.Scattergl:
    """Points in single precision and layer.neuron as integers, so that 18,432 of them take little room."""
    x, y = (rows[column].to_numpy(np.float32) for column in ("value", "height"))
    points = go.Scattergl(x=x, y=y, name=name, legendgroup=name, showlegend=legend, mode="markers")
    points.update(customdata=rows[["layer", "neuron"]].to_numpy(np.int32))
    points.update(marker={"color": colour, "size": size, "opacity": opacity, "line": {"width": 0}})
    hover = "neuron %{customdata[0]}.%{customdata[1]}: %{x:.4g}, -log10 p %{y:.3g}<extra></extra>"
    return points.update(hovertemplate=hover)


def _names(candidates: pd.DataFrame, all_rows: Any) -> go.Scatter:
    """The farthest neurons' names, as far as they do not cover each other."""
    wide = float(np.ptp(all_rows["value"])) or 1.0
    high = float(np.ptp(all_rows["height"])) or 1.0
    placed: list[Any] = []
    order = candidates.sort_values("value", key=np.abs, ascending=False, kind="stable").index
    for row in candidates.loc[order[: 4 * _NAMED]].itertuples():
        near = any(abs(row.value - o.value) < 0.1 * wide and abs(row.height - o.height) < 0.05 * high for o in placed)
        if not near and len(placed) < _NAMED:
            placed.append(row)
    names = go.Scatter(x=[row.value for row in placed], y=[row.height for row in placed], mode="text")
    names.update(text=[f"{row.layer}.{row.neuron}" for row in placed], textposition="top center")
    return names.update(textfont={"size": 11}, hoverinfo="skip", showlegend=False)


def _levelled(figure: go.Figure, effects: Effects) -> go.Figure:
    """With the title of the level axis, and a line where there is no effect."""
    figure.update_yaxes(title_text=effects.title)
    if effects.by.zero is not None:
        figure.add_hline(y=effects.by.zero, line={"color": GREY, "width": 1})
    return figure


def _finished(figure: go.Figure, effects: Effects, mode: Mode, below: str = "", **look: Any) -> go.Figure:
    """A figure with its title, and what stands below that, in the common look."""
    n = effects.tested["n_images"]
    images = f"{n.min()} images" if n.min() == n.max() else f"{n.min()} to {n.max()} images"
    title = f"{effects.metric}{f' ({effects.words})' if effects.words else ''}, {images}{below}"
    return finished(figure, mode, title=sentence(title), legend=legend(-0.2), **{"height": 460, **look})


FIGURES: dict[str, _Figure] = {
    "volcano": _Figure((("layer",), ("neuron",)), volcano_figure),
    "heads": _Figure((("layer",), ("head",)), heads_figure),
    "dose": _Figure((tuple(DOSES),), dose_figure),
    "layers": _Figure((("layer",),), layers_figure),
}
"""Kinds of figures; the first whose factors are there is drawn by default."""

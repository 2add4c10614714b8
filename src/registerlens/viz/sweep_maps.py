"""Maps of a sweep: heads of all layers, and the volcano of neurons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.errors import ConfigError
from registerlens.viz.sweep_effects import Effects, finished
from registerlens.viz.theme import BLUE, GREY, RED, Mode, ink, paper

_PANELS = 4
"""Heat maps or volcanoes beside each other at most."""
_NAMED = 10
"""Neurons of a volcano that are named."""
LEVEL = 0.05
"""Of Holm-corrected p-values."""


def _panels(effects: Effects, kind: str, *used: str) -> tuple[go.Figure, Iterator[tuple[int, tuple[str, Any]]]]:
    """A figure with a panel for each series, and what belongs into each, with its name."""
    series = effects.limited(kind, _PANELS, *used)
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
        sure = holm < LEVEL
        figure.add_trace(
            go.Scatter(
                x=at[1][sure],
                y=at[0][sure],
                mode="markers",
                name=f"Holm p < {LEVEL}",
                showlegend=column == 1 and bool(diverging),
                marker={"color": ink("light"), "size": 5, "line": {"color": paper("light"), "width": 1}},
                hoverinfo="skip",
            ),
            row=1,
            col=column,
        )
    colours = [[0, BLUE], [0.5, "#f7f7f7"], [1, RED]] if diverging else "Cividis"
    limits = {"cmin": -far, "cmax": far} if diverging else {}
    figure.update_layout(
        coloraxis={"colorscale": colours, "colorbar": {"title": effects.by.words, "title_side": "right"}, **limits}
    )
    figure.update_xaxes(title_text="head", dtick=1, range=[-0.5, len(heads) - 0.5])
    figure.update_yaxes(dtick=1 if len(layers) <= 24 else 4, range=[-0.5, len(layers) - 0.5])
    figure = finished(figure, effects, mode)
    figure.layout.shapes = ()  # no zero line
    figure.update_yaxes(title_text="")
    figure.update_yaxes(title_text="layer", col=1)
    return (
        figure.update_layout(height=160 + 26 * len(layers), plot_bgcolor="#d9d9d9")
        .update_xaxes(showgrid=False)
        .update_yaxes(showgrid=False)
    )


def volcano_figure(effects: Effects, mode: Mode) -> go.Figure:
    """Effect of each neuron against -log10 p; those that pass Holm's correction are coloured, the top ones named."""
    if not effects.by.p:
        raise ConfigError("A volcano shows tests; take by='difference' or by='vs_controls'.")
    n_tests = len(effects.tested)  # all that Holm's correction counts
    effects = effects.having("layer", "neuron")
    figure, panels = _panels(effects, "volcano", "layer", "neuron")
    told = []
    for column, (name, every) in panels:
        placed = every.dropna(subset=["p"])
        part = placed.assign(height=-np.log10(placed["p"].to_numpy()))
        sure = part["p_holm"] < LEVEL
        groups = (
            ("not significant", part[~sure], GREY, 4, 0.5),
            ("lower, Holm p < 0.05", part[sure & (part["value"] < 0)], BLUE, 6, 0.9),
            ("higher, Holm p < 0.05", part[sure & (part["value"] > 0)], RED, 6, 0.9),
        )
        for words, rows, colour, size, opacity in groups:
            figure.add_trace(_cloud(rows, words, colour, size, opacity, column == 1), row=1, col=column)
        figure.add_trace(_names(part[sure] if sure.any() else part, part), row=1, col=column)
        told.append(f"{name + ': ' if name else ''}{int(sure.sum())} of {len(part)} neurons")
    figure.update_xaxes(title_text=effects.title, zeroline=True)
    figure.update_yaxes(rangemode="tozero")
    figure = finished(figure, effects, mode)
    figure.layout.shapes = ()
    figure.update_yaxes(title_text="")
    figure.update_yaxes(title_text="-log10 p (sign-flip permutation)", col=1)
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    layout: Any = figure.layout
    note = f"{', '.join(told)} pass Holm's correction"
    least = float(effects.tested["p_least"].min())
    if least * n_tests > LEVEL:
        n = effects.tested["n_images"].max()
        note += f" (none can: {n} images give no p below {least:.2g}, and {n_tests} tests need less)"
    return figure.update_layout(
        height=520, title={"text": f"{layout.title.text}<br><sup>{note}</sup>"}, margin={"t": 90}
    )


def _cloud(rows: Any, name: str, colour: str, size: int, opacity: float, legend: bool) -> go.Scattergl:
    """Points in single precision and layer.neuron as integers, so that 18,432 of them take little room."""
    return go.Scattergl(
        x=rows["value"].to_numpy(np.float32),
        y=rows["height"].to_numpy(np.float32),
        customdata=rows[["layer", "neuron"]].to_numpy(np.int32),
        name=name,
        legendgroup=name,
        showlegend=legend,
        mode="markers",
        marker={"color": colour, "size": size, "opacity": opacity, "line": {"width": 0}},
        hovertemplate="neuron %{customdata[0]}.%{customdata[1]}: %{x:.4g}, -log10 p %{y:.3g}<extra></extra>",
    )


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
    return go.Scatter(
        x=[row.value for row in placed],
        y=[row.height for row in placed],
        text=[f"{row.layer}.{row.neuron}" for row in placed],
        mode="text",
        textposition="top center",
        textfont={"size": 11},
        hoverinfo="skip",
        showlegend=False,
    )

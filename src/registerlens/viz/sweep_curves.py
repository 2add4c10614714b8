"""Curves of a sweep: effect per layer, and by dose with random controls beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from registerlens.viz.sweep_effects import Effects, finished
from registerlens.viz.theme import BLUE, BROWN, GREEN, GREY, OLIVE, ORANGE, PURPLE, RED, SKY, Mode

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BROWN, OLIVE, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross", "star", "hexagon")
DOSES = {
    "k": "neurons, best first",
    "scale": "factor by which it is scaled",
    "factor": "factor by which it is scaled",
    "n": "test-time registers",
}
"""Factors that a dose response may run over, with the title of the axis."""


def _curve(rows: Any, x: str, name: str, number: int, label: str) -> go.Scatter:
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


def layers_figure(effects: Effects, mode: Mode) -> go.Figure:
    """Effect per layer; where a layer has many conditions, each is a point and the line is their mean."""
    effects = effects.having("layer")
    many = [name for name in ("neuron", "head") if name in effects.factors]
    of: Any = pd.Series(None, effects.tested.index, dtype=object)
    for name in many:
        of[effects.tested[name].notna()] = f"{name}s"
    effects = replace(effects, tested=effects.tested.assign(of=of), factors=(*effects.factors, "of"))
    series = effects.limited("layers", len(_COLOURS), "layer", *many)
    figure = go.Figure()
    for number, (told, part) in enumerate(series.items()):
        rows = part.sort_values("layer", kind="stable")
        name = told or "effect"
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
                line={"color": _COLOURS[number], "width": 2},
                marker={"symbol": _SYMBOLS[number], "size": 8},
                hovertemplate="layer %{x}, mean: %{y:.4g}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="layer", dtick=max(1, round(effects.tested["layer"].nunique() / 12)))
    return finished(figure, effects, mode)


def dose_figure(effects: Effects, mode: Mode) -> go.Figure:
    """Effect by the dose, with the conditions' controls beside it: each draw a small mark, their mean dotted."""
    varying = [name for name in DOSES if name in effects.factors]
    dose = max(varying, key=lambda name: effects.tested[name].nunique())
    effects = effects.having(dose)
    # A set of neurons is named after its number; such a name is no series of its own.
    names = [one for one in ("neurons", "target") if one in effects.factors and _named_after(effects.tested, one, dose)]
    series = effects.limited("dose", len(_COLOURS), dose, *names)
    figure = go.Figure()
    for number, (told, part) in enumerate(series.items()):
        rows = part.sort_values(dose, kind="stable")
        name = told or "effect"
        figure.add_trace(_curve(rows, dose, name, number, dose))
        if effects.by.value == "vs_controls":
            continue
        doses = rows.set_index("condition")[dose]
        controls = effects.controls[effects.controls["control_of"].isin(doses.index)].dropna(subset=["value"])
        if controls.empty:
            continue
        at = controls["control_of"].map(doses)
        means = controls["value"].groupby(at).mean().sort_index()
        beside = {
            "legendgroup": f"controls {number}",
            "name": f"{name}: random controls" if len(series) > 1 else "controls",
        }
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
    doses = np.unique(effects.tested[dose].to_numpy(np.float64))
    log = len(doses) > 2 and doses[0] > 0 and doses[-1] / doses[0] >= 16
    figure.update_xaxes(title_text=DOSES[dose] + (" (log)" if log else ""), type="log" if log else "linear")
    if len(doses) <= 12:
        figure.update_xaxes(tickvals=doses, ticktext=[f"{value:g}" for value in doses])
    return finished(figure, effects, mode)


def _named_after(rows: Any, name: str, dose: str) -> bool:
    return rows.groupby(dose)[name].nunique().max() <= 1 and rows[name].nunique() == rows[dose].nunique()

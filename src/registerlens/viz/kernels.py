"""Kernel checks as pictures: who reads which vector how strongly, whom queries seek, and what neurons write where."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from registerlens.theory.kernels import KernelReport
from registerlens.theory.readers import KERNELS
from registerlens.theory.verdicts import judge, main_rows, select
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
    on_cells,
)

_ROWS = {
    "value": "W_V",
    "ov": "W_V W_O, summed",
    "ov_head": "W_V W_O, per head",
    "mlp": "W_in of the MLP",
    "head": "head",
}
_TITLES = {
    "u2": "u2, what the neurons write",
    "outlier": "The outlier tokens' direction",
    "u1": "u1, what the neurons read",
}
_MARKS = {"holds": "✓", "holds approximately": "≈", "fails": ""}
_CELL = 34
"""Height of a cell in pixels."""
_WIDTH = 660
"""Width of a panel in pixels, about."""
_WEIGHTS = 360
"""Height of the figure of weights, without axis title and legend."""
_BETWEEN = 75
"""Height between panels."""
_LINES = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, OLIVE, BROWN)
_X_TITLE = "who reads it: block (✓ holds, ≈ holds approximately)"
_NAMED = 3
"""Dimensions that get a label."""


def kernel_figure(report: KernelReport, mode: Mode = "light") -> go.Figure:
    """Layer by condition: the violation (0 is an exact kernel, 1 a random direction) of each vector; keys below.

    ✓ marks cells in which the condition holds, ≈ those in which it holds approximately. Cells are root mean squares
    over neurons (and heads); the last panel shows the score of a dominated token over an ordinary key, per head.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.theory.kernels import check_kernels
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
        >>> report = check_kernels(rl.HookedViT.from_pretrained("registerlens:tiny"), neurons)
        >>> len(kernel_figure(report).data)
        3
    """
    main = main_rows(report.table)
    layers = _places(select(main, condition=[*KERNELS, "key"]))
    panels: list[tuple[str, go.Heatmap, int]] = []
    for vector, title in _TITLES.items():
        rows = select(main, condition=list(KERNELS), vector=vector)
        if len(rows):
            words = f"{title}: read at which share of a random direction's strength"
            panels.append(_kernel_panel(report, rows, layers, words, mode))
    for vector in ("outlier", "u2"):
        rows = select(main, condition="key", vector=vector)
        if len(rows):
            words = f"{_TITLES[vector]} as a key: score over an ordinary key, in nats"
            panels.append(_key_panel(report, rows, layers, words, mode))
            break
    if not panels:
        return _empty("No later block or head reads what these neurons write.", mode)
    return apply_theme(_stacked(panels), mode).update_layout(hovermode="closest", margin={"l": 140, "r": 90})


def _stacked(panels: list[tuple[str, go.Heatmap, int]]) -> go.Figure:
    """Heat maps below each other, cells equally high, each with its title and colour bar."""
    height = sum(_CELL * n_rows + _BETWEEN for _, _, n_rows in panels)
    domains, top = [], 1.0
    for _, _, n_rows in panels:
        domains.append((max(0.0, top - _CELL * n_rows / height), top))
        top -= (_CELL * n_rows + _BETWEEN) / height
    figure = go.Figure()
    for i, ((title, heatmap, n_rows), (low, high)) in enumerate(zip(panels, domains, strict=True)):
        axis = str(i + 1) if i else ""
        bar = {"len": high - low, "y": (high + low) / 2, "thickness": 14, "x": 1.01, "nticks": 4}
        figure.add_trace(heatmap.update(xaxis=f"x{axis}", yaxis=f"y{axis}", colorbar=bar, showscale=n_rows > 1))
        figure.add_annotation(
            x=0, y=high, xref="paper", yref="paper", xanchor="left", yanchor="bottom", text=title, showarrow=False
        )
        figure.update_layout(
            {
                f"xaxis{axis}": {
                    "anchor": f"y{axis}",
                    "type": "category",
                    "showgrid": False,
                    "title": {"text": _X_TITLE if heatmap is panels[-1][1] else None},
                },
                f"yaxis{axis}": {
                    "anchor": f"x{axis}",
                    "domain": (low, high),
                    "autorange": "reversed",
                    "showgrid": False,
                },
            }
        )
    figure.update_layout(height=height + 60)
    return figure


def _places(rows: pd.DataFrame) -> list[int]:
    """Every block from the first that reads to the last; the head counts as the block after the last."""
    layers = [int(layer) for layer in rows["layer"]]
    return list(range(min(layers), max(layers) + 1)) if layers else []


def _name(report: KernelReport, layer: int) -> str:
    return "head" if layer == report.config.n_layers else str(layer)


def _kernel_panel(
    report: KernelReport, rows: pd.DataFrame, layers: list[int], title: str, mode: Mode
) -> tuple[str, go.Heatmap, int]:
    conditions = [name for name in KERNELS if name in set(rows["condition"])]
    z = np.full((len(conditions), len(layers)), np.nan)
    text, hover = np.full(z.shape, "", dtype=object), np.full(z.shape, "", dtype=object)
    for i, condition in enumerate(conditions):
        for j, layer in enumerate(layers):
            cell = select(rows, condition=condition, layer=layer)
            if len(cell):
                z[i, j] = np.sqrt(np.mean(cell["effect"].to_numpy() ** 2))
                random_p, neurons_p = (float(np.median(cell[name])) for name in ("random_p", "neurons_p"))
                verdict = judge(condition, z[i, j], random_p, neurons_p, report.n_tokens)
                text[i, j] = f"{z[i, j]:.2f} {_MARKS[verdict]}"
                hover[i, j] = (
                    f"{verdict}<br>relative residual {np.median(cell['value']):.3g}, random "
                    f"{np.median(cell['random']):.3g} (p = {random_p:.2g}), other neurons "
                    f"{np.median(cell['neurons']):.3g} (p = {neurons_p:.2g})"
                )
    heatmap = go.Heatmap(
        z=z,
        x=[_name(report, layer) for layer in layers],
        y=[_ROWS[name] for name in conditions],
        **on_cells(text, z, 0.0, 2.0, "RdBu_r", mode, width=_WIDTH),
        customdata=hover,
        hovertemplate="%{y}, block %{x}: %{z:.3g}<br>%{customdata}<extra></extra>",
        colorscale="RdBu_r",
        zmin=0,
        zmax=2,
        xgap=1,
        ygap=1,
    )
    return title, heatmap, len(conditions)


def _key_panel(
    report: KernelReport, rows: pd.DataFrame, layers: list[int], title: str, mode: Mode
) -> tuple[str, go.Heatmap, int]:
    heads = sorted(set(rows["head"]))
    z = np.full((len(heads), len(layers)), np.nan)
    text, hover = np.full(z.shape, "", dtype=object), np.full(z.shape, "", dtype=object)
    for i, head in enumerate(heads):
        for j, layer in enumerate(layers):
            cell = select(rows, head=head, layer=layer)
            if len(cell):
                z[i, j] = np.median(cell["value"])
                random_p, neurons_p = (float(np.median(cell[name])) for name in ("random_p", "neurons_p"))
                verdict = judge("key", z[i, j], random_p, neurons_p, report.n_tokens)
                text[i, j] = f"{z[i, j]:+.1f} {_MARKS[verdict]}"
                hover[i, j] = f"{verdict}<br>random directions p = {random_p:.2g}, other neurons p = {neurons_p:.2g}"
    reach = max(float(np.nanmax(np.abs(z))), float(np.log(report.n_tokens)))
    heatmap = go.Heatmap(
        z=z,
        x=[_name(report, layer) for layer in layers],
        y=[f"head {head}" for head in heads],
        **on_cells(text, z, -reach, reach, "PRGn", mode, width=_WIDTH),
        customdata=hover,
        hovertemplate="%{y}, block %{x}: %{z:+.3g} nats<br>%{customdata}<extra></extra>",
        colorscale="PRGn",
        zmin=-reach,
        zmax=reach,
        xgap=1,
        ygap=1,
    )
    return title, heatmap, len(heads)


def weight_figure(report: KernelReport, mode: Mode = "light") -> go.Figure:
    """What each neuron writes into each dimension of the stream, over what other neurons of its block usually do.

    The grey band is the root mean square of other neurons' weights; the dimensions that carry most of the neurons'
    squared norms are named.

    Source: Jiang et al. 2025, figure 25.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.theory.kernels import check_kernels
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
        >>> report = check_kernels(rl.HookedViT.from_pretrained("registerlens:tiny"), neurons)
        >>> [curve.name for curve in weight_figure(report).data]
        ['other neurons (root mean square)', 'block 1, neuron 183', 'block 1, neuron 103']
    """
    dimensions = np.arange(report.written.shape[1])
    figure = go.Figure(
        go.Scatter(
            x=np.concatenate([dimensions, dimensions[::-1]]),
            y=np.concatenate([report.usual, -report.usual[::-1]]),
            fill="toself",
            fillcolor=GREY,
            opacity=0.5,
            line={"width": 0},
            mode="lines",
            name="other neurons (root mean square)",
            hoverinfo="skip",
        )
    )
    for (layer, neuron), weights, colour in zip(report.neurons.pairs, report.written, cycle(_LINES), strict=False):
        figure.add_trace(
            go.Scatter(
                x=dimensions,
                y=weights,
                mode="lines",
                line={"color": colour, "width": 1.2},
                name=f"block {layer}, neuron {neuron}",
                hovertemplate="dimension %{x}: %{y:.3g}",
            )
        )
    for dimension in top_dimensions(report):
        column = report.written[:, dimension]
        largest = column[np.abs(column).argmax()]
        figure.add_annotation(
            x=dimension,
            y=largest,
            text=str(dimension),
            showarrow=False,
            yshift=10 if largest > 0 else -10,
            font={"color": ink(mode)},
        )
    figure.update_xaxes(title_text="dimension of the residual stream (LayerScale folded into the weights)")
    figure.update_yaxes(title_text="weight in W_out")
    legend = 22 * -(-(1 + len(report.neurons)) // 4)  # four names a row
    figure.update_layout(
        height=_WEIGHTS + 60 + legend, legend={"orientation": "h", "x": 0, "y": -60 / (_WEIGHTS - 60), "yanchor": "top"}
    )
    return apply_theme(figure, mode).update_layout(hovermode="closest", margin={"b": 60 + legend})


def top_dimensions(report: KernelReport) -> list[int]:
    """The dimensions that carry most of the neurons' squared norms, each neuron counting alike.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.theory.kernels import check_kernels
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
        >>> len(top_dimensions(check_kernels(rl.HookedViT.from_pretrained("registerlens:tiny"), neurons)))
        3
    """
    squares = report.written**2
    shares = squares / np.maximum(squares.sum(1, keepdims=True), np.finfo(squares.dtype).tiny)
    return [int(dimension) for dimension in shares.mean(0).argsort()[::-1][:_NAMED]]


def _empty(words: str, mode: Mode) -> go.Figure:
    figure = go.Figure().add_annotation(text=words, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return apply_theme(figure, mode)

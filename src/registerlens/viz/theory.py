"""The theory as pictures: what was measured beside its bound, who reads which vector, what neurons write where."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from registerlens.theory.generalisation import GeneralReport
from registerlens.theory.kernels import KernelReport
from registerlens.theory.proposition import CorollaryReport, PropositionReport
from registerlens.theory.readers import KERNELS
from registerlens.theory.two_block import CLS
from registerlens.theory.verdicts import judge, main_rows, select
from registerlens.viz.parts import beside, curve, finished, legend, note
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

_FLOOR = 1e-18
"""Nothing below this is drawn: on a log axis it would leave no room for the rest."""
_TOP, _PLOT = 90, 280
"""Pixels above the panels, and of the panels."""
_HEADS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)

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


def proposition_figure(report: PropositionReport, mode: Mode = "light") -> go.Figure:
    """Attention to other tokens than x_s, and how far attention moves the output, against the register activation.

    Source: Jiang et al. 2025, Proposition 1.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.theory.proposition import verify_proposition
        >>> from registerlens.theory.two_block import TwoBlockModel
        >>> len(proposition_figure(verify_proposition(TwoBlockModel.build())).data)
        8
    """
    panels = _Panels(report.activations, "Attention to other tokens than x<sub>s</sub>", "Distance of the output")
    panels.pair(1, report.beside[:, CLS], report.beside_bound[:, CLS], "[CLS]", BLUE)
    panels.pair(1, report.beside.max(1), report.beside_bound.max(1), "worst query", ORANGE)
    panels.pair(2, report.deviation, report.deviation_bound, "from no attention", RED)
    panels.curve(2, report.rounding, "float64's rounding", GREY, "dot")
    panels.curve(2, report.output_norm, "norm of the output", GREY)
    broken = "; ".join(condition.statement for condition in report.conditions if not condition.holds)
    held = f"not so: {broken}" if broken else f"all {len(report.conditions)} conditions hold"
    return panels.finish(f"Proposition 1; {held}", mode)


def corollary_figure(report: CorollaryReport, mode: Mode = "light") -> go.Figure:
    """Left: the two updates' difference, and its distance from the limit; right: the two outputs' difference.

    Left for the worst of the tokens that attend to both the sink and the pair, or of all if none does.

    Source: Jiang et al. 2025, Corollary 1.

    Example:
        >>> from registerlens.theory.proposition import verify_corollary
        >>> from registerlens.theory.two_block import TwoBlockModel
        >>> len(corollary_figure(verify_corollary(TwoBlockModel.build())).data)
        9
    """
    chosen = report.attends if report.attends.any() else np.ones_like(report.attends)
    panels = _Panels(
        report.activations,
        f"Update of a token (worst of {chosen.sum()} in {len(chosen)})",
        "Output: register neuron and attention bias",
        unit="Euclidean length",
    )
    panels.curve(1, report.difference[:, chosen].max(1), "difference", ORANGE)
    panels.curve(1, report.limit, "its limit", ORANGE, "dot")
    from_limit, bound = report.from_limit[:, chosen].max(1), report.from_limit_bound[:, chosen].max(1)
    panels.pair(1, from_limit, bound, "distance from the limit", BLUE)
    panels.curve(1, report.rounding, "float64's rounding", GREY, "dot")
    panels.pair(2, report.output_difference, report.output_bound, "distance", RED)
    panels.curve(2, report.output_rounding, "float64's rounding", GREY, "dot")
    panels.curve(2, report.output_norm, "norm of the output", GREY)
    return panels.finish("Corollary 1: a register neuron against the pair k' = v' = a<sub>s</sub> v<sub>2</sub>", mode)


def generalisation_figure(report: GeneralReport, mode: Mode = "light") -> go.Figure:
    """Left: [CLS]'s attention to x_s per head, with LayerNorm also its limit; right: what x_s brings, and the output.

    Example:
        >>> from registerlens.theory.general import GeneralModel
        >>> from registerlens.theory.generalisation import verify_generalisation
        >>> from registerlens.theory.two_block import TwoBlockModel
        >>> len(generalisation_figure(verify_generalisation(GeneralModel.build(TwoBlockModel.build()))).data)
        8
    """
    panels = _Panels(report.activations, "Attention of [CLS] to x<sub>s</sub>", "Lengths", log_left=False)
    for head in range(report.beside.shape[1]):
        colour = _HEADS[head % len(_HEADS)]
        panels.curve(1, 1 - report.beside[:, head, CLS], f"head {head}", colour)
        if report.limit_sink is not None:
            limit = np.full(len(report.activations), report.limit_sink[head, CLS])
            panels.curve(1, limit, f"head {head}, limit", colour, "dot")
    panels.pair(2, report.brought, report.brought_bound, "brought by x<sub>s</sub>", GREEN)
    panels.pair(2, report.deviation, report.deviation_bound, "output from no attention", RED)
    if report.key_distance is not None and report.key_bound is not None:
        panels.pair(2, report.key_distance, report.key_bound, "key of x<sub>s</sub> from its limit", BLUE)
    panels.curve(2, report.rounding, "float64's rounding", GREY, "dot")
    panels.curve(2, report.output_norm, "norm of the output", GREY)
    norm = "with LayerNorm" if report.setup["norm"] else "without LayerNorm"
    heads = report.setup["n_heads"]
    return panels.finish(f"Proposition 1 with {heads} head{'s' if heads > 1 else ''}, {norm}", mode)


class _Panels:
    """Two panels over the register activation, on log axes."""

    def __init__(
        self, activations: np.ndarray, left: str, right: str, unit: str = "attention (0 to 1)", log_left: bool = True
    ) -> None:
        self.x, self.unit, self.log = activations, unit, {1: log_left, 2: True}
        self.lowest, self.entries = {1: 1.0, 2: 1.0}, {1: 0, 2: 0}
        self.figure = beside(left, right)

    def pair(self, column: int, measured: np.ndarray, bound: np.ndarray, name: str, colour: str) -> None:
        """A measurement and its bound."""
        self.curve(column, measured, name, colour)
        self.curve(column, bound, f"{name}, bound", colour, "dash")

    def curve(self, column: int, y: np.ndarray, name: str, colour: str, dash: str = "solid") -> None:
        """One line."""
        self.entries[column] += 1
        if self.log[column]:
            y = np.where(y >= _FLOOR, y, np.nan)
            self.lowest[column] = min(self.lowest[column], np.nanmin(y, initial=1.0))
        own = {"legend": "legend" if column == 1 else "legend2"}
        self.figure.add_trace(curve(self.x, y, name, colour, "%{y:.2e}", dash=dash, mode="lines", **own), 1, column)

    def finish(self, title: str, mode: Mode) -> go.Figure:
        """Axes, legends and the common look."""
        figure = self.figure
        figure.update_xaxes(title_text="register activation a", type="log", exponentformat="power", dtick=1)
        for column, log in self.log.items():
            if log:
                decades = -np.log10(self.lowest[column])
                step = max(1, int(np.ceil(decades / 6)))
                figure.update_yaxes(type="log", exponentformat="power", dtick=step, row=1, col=column)
            else:
                figure.update_yaxes(range=[0, 1.02], row=1, col=column)
        figure.update_yaxes(title_text=self.unit, row=1, col=1)
        figure.update_yaxes(title_text="Euclidean length", row=1, col=2)
        below = 75 + 21 * max(self.entries.values())
        names = {"y": -60 / _PLOT, "yanchor": "top"}
        look = {"title": title, "legend": {"x": 0, **names}, "legend2": {"x": 0.55, **names}}
        margin = {"t": _TOP, "b": below}
        return finished(figure, mode, height=_TOP + _PLOT + below, margin=margin, closest=False, **look)


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
    figure = _stacked(panels)
    return finished(figure, mode, height=figure.layout.height, margin={"l": 140, "r": 90})  # type: ignore[attr-defined]


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
        note(figure, title, 0, high, "left", xref="paper", yref="paper", yanchor="bottom")
        words = _X_TITLE if heatmap is panels[-1][1] else None
        x = {"anchor": f"y{axis}", "type": "category", "showgrid": False, "title": {"text": words}}
        y = {"anchor": f"x{axis}", "domain": (low, high), "autorange": "reversed", "showgrid": False}
        figure.update_layout({f"xaxis{axis}": x, f"yaxis{axis}": y})
    return figure.update_layout(height=height + 60)


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

    def describe_cell(cell: pd.DataFrame) -> tuple[float, str, str]:
        value = float(np.sqrt(np.mean(cell["effect"].to_numpy() ** 2)))
        verdict, random_p, neurons_p = _verdict(report, cell, value)
        words = (
            f"{verdict}<br>relative residual {np.median(cell['value']):.3g}, random "
            f"{np.median(cell['random']):.3g} (p = {random_p:.2g}), other neurons "
            f"{np.median(cell['neurons']):.3g} (p = {neurons_p:.2g})"
        )
        return value, f"{value:.2f} {_MARKS[verdict]}", words

    z, text, hover = _cells(rows, [{"condition": name} for name in conditions], layers, describe_cell)
    heatmap = go.Heatmap(z=z, x=[_name(report, layer) for layer in layers], y=[_ROWS[name] for name in conditions])
    heatmap.update(customdata=hover, hovertemplate="%{y}, block %{x}: %{z:.3g}<br>%{customdata}<extra></extra>")
    heatmap.update(colorscale="RdBu_r", zmin=0, zmax=2, xgap=1, ygap=1)
    return title, heatmap.update(on_cells(text, z, 0.0, 2.0, "RdBu_r", mode, width=_WIDTH)), len(conditions)


def _key_panel(
    report: KernelReport, rows: pd.DataFrame, layers: list[int], title: str, mode: Mode
) -> tuple[str, go.Heatmap, int]:
    heads = sorted(set(rows["head"]))

    def describe_cell(cell: pd.DataFrame) -> tuple[float, str, str]:
        value = float(np.median(cell["value"]))
        verdict, random_p, neurons_p = _verdict(report, cell, value)
        words = f"{verdict}<br>random directions p = {random_p:.2g}, other neurons p = {neurons_p:.2g}"
        return value, f"{value:+.1f} {_MARKS[verdict]}", words

    z, text, hover = _cells(rows, [{"head": head} for head in heads], layers, describe_cell)
    reach = max(float(np.nanmax(np.abs(z))), float(np.log(report.n_tokens)))
    heatmap = go.Heatmap(z=z, x=[_name(report, layer) for layer in layers], y=[f"head {head}" for head in heads])
    heatmap.update(customdata=hover, hovertemplate="%{y}, block %{x}: %{z:+.3g} nats<br>%{customdata}<extra></extra>")
    heatmap.update(colorscale="PRGn", zmin=-reach, zmax=reach, xgap=1, ygap=1)
    return title, heatmap.update(on_cells(text, z, -reach, reach, "PRGn", mode, width=_WIDTH)), len(heads)


def _cells(
    rows: pd.DataFrame,
    chosen: Sequence[dict[str, Any]],
    layers: Sequence[int],
    describe_cell: Callable[[pd.DataFrame], tuple[float, str, str]],
) -> tuple[Float[np.ndarray, "row layer"], np.ndarray, np.ndarray]:
    """Values, labels and hover texts: what describes the rows of each choice and layer, where there are any."""
    values = np.full((len(chosen), len(layers)), np.nan)
    labels, hovers = np.full(values.shape, "", dtype=object), np.full(values.shape, "", dtype=object)
    for i, which in enumerate(chosen):
        for j, layer in enumerate(layers):
            cell = select(rows, layer=layer, **which)
            if len(cell):
                values[i, j], labels[i, j], hovers[i, j] = describe_cell(cell)
    return values, labels, hovers


def _verdict(report: KernelReport, cell: pd.DataFrame, value: float) -> tuple[str, float, float]:
    """The verdict on a cell, and its p-values against random directions and other neurons."""
    random_p, neurons_p = (float(np.median(cell[name])) for name in ("random_p", "neurons_p"))
    return judge(cell["condition"].iloc[0], value, random_p, neurons_p, report.n_tokens), random_p, neurons_p


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
        ['other neurons (root mean square)', 'neuron 1:183', 'neuron 1:103']
    """
    dimensions = np.arange(report.written.shape[1])
    band = go.Scatter(x=np.concatenate([dimensions, dimensions[::-1]]), mode="lines", line={"width": 0})
    band.update(y=np.concatenate([report.usual, -report.usual[::-1]]), fill="toself", fillcolor=GREY, opacity=0.5)
    figure = go.Figure(band.update(name="other neurons (root mean square)", hoverinfo="skip"))
    for (layer, neuron), weights, colour in zip(report.neurons.pairs, report.written, cycle(_LINES), strict=False):
        name = f"neuron {layer}:{neuron}"
        line = curve(dimensions, weights, name, colour, "dimension %{x}: %{y:.3g}", mode="lines")
        figure.add_trace(line.update(line={"width": 1.2}))
    for dimension in top_dimensions(report):
        column = report.written[:, dimension]
        largest = column[np.abs(column).argmax()]
        place = {"x": dimension, "y": largest, "yshift": 10 if largest > 0 else -10}
        figure.add_annotation(text=str(dimension), showarrow=False, font={"color": ink(mode)}, **place)
    figure.update_xaxes(title_text="dimension of the residual stream (LayerScale folded into the weights)")
    figure.update_yaxes(title_text="weight in W_out")
    names = 22 * -(-(1 + len(report.neurons)) // 4)  # four names a row
    below = legend(-60 / (_WEIGHTS - 60), yanchor="top")
    return finished(figure, mode, height=_WEIGHTS + 60 + names, legend=below, margin={"b": 60 + names})


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

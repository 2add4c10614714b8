"""Convergence curves of the propositions: what was measured, solid, beside its bound, dashed."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.theory.generalisation import GeneralReport
from registerlens.theory.proposition import CorollaryReport, PropositionReport
from registerlens.theory.two_block import CLS
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Mode, apply_theme

_FLOOR = 1e-18
"""Nothing below this is drawn: on a log axis it would leave no room for the rest."""
_TOP, _PLOT = 90, 280
"""Pixels above the panels, and of the panels."""
_HEADS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)


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
    broken = "; ".join(found.statement for found in report.conditions if not found.holds)
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
        self.figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1, subplot_titles=(left, right))

    def pair(self, column: int, measured: np.ndarray, bound: np.ndarray, name: str, colour: str) -> None:
        """A measurement and its bound."""
        self.curve(column, measured, name, colour)
        self.curve(column, bound, f"{name}, bound", colour, "dash")

    def curve(self, column: int, y: np.ndarray, name: str, colour: str, dash: str = "solid") -> None:
        """One line."""
        line: dict[str, Any] = {"color": colour, "dash": dash}
        self.entries[column] += 1
        if self.log[column]:
            y = np.where(y >= _FLOOR, y, np.nan)
            self.lowest[column] = min(self.lowest[column], np.nanmin(y, initial=1.0))
        legend = "legend" if column == 1 else "legend2"
        trace = go.Scatter(x=self.x, y=y, name=name, mode="lines", line=line, hovertemplate="%{y:.2e}", legend=legend)
        self.figure.add_trace(trace, row=1, col=column)

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
        figure.update_layout(
            height=_TOP + _PLOT + below,
            title=title,
            legend={"x": 0, "y": -60 / _PLOT, "yanchor": "top"},
            legend2={"x": 0.55, "y": -60 / _PLOT, "yanchor": "top"},
        )
        return apply_theme(figure, mode).update_layout(margin={"t": _TOP, "b": below})

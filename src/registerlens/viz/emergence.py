"""Figures of training: which sign of register neurons comes first."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.emergence.dynamics import HALFWAY, SIGNS, Dynamics, order_of_signs
from registerlens.errors import ConfigError
from registerlens.viz.theme import BLUE, GREY, ORANGE, RED, Mode, apply_theme

_COLOURS = dict(zip(SIGNS, (RED, ORANGE, BLUE), strict=True))


def dynamics_figure(found: Sequence[Dynamics], mode: Mode = "light") -> go.Figure:
    """Which comes first, run by run: each sign on its way from its first value to its last, and when it was halfway.

    Above, one panel a run, with the neurons' activation at outliers; below, the step at which each sign was first
    halfway, with its 95% interval over images, and (hollow) from when on it was so for good.

    Args:
        found: one a run; three or more seeds say whether an order is the rule.
        mode: "light" or "dark".

    Raises:
        ConfigError: none was given.
    """
    if not found:
        raise ConfigError("Give the dynamics of at least one run.")
    n = len(found)
    figure = make_subplots(
        rows=2,
        cols=n,
        specs=[[{} for _ in found], [{"colspan": n}, *(None for _ in found[1:])]],
        row_heights=[0.6, 0.4],
        vertical_spacing=0.2,
        horizontal_spacing=0.04,
        shared_yaxes=True,
        subplot_titles=[*(f"seed {one.seed} ({one.run})" for one in found), "Step at which each sign is halfway"],
    )
    for column, one in enumerate(found, start=1):
        for sign in SIGNS:
            _curve(figure, column, one, one.share(sign), sign, _COLOURS[sign], "solid")
        active = one.activation.mean(1)
        _curve(figure, column, one, active / active.max(), "neurons' activation", GREY, "dot")
        figure.add_hline(y=HALFWAY, line={"color": GREY, "width": 1, "dash": "dash"}, row=1, col=column)  # type: ignore[arg-type]
    onsets = order_of_signs(found)
    for sign in SIGNS:
        mine = onsets[onsets["sign"] == sign]
        names = [f"seed {seed} ({run})" for seed, run in zip(mine["seed"], mine["run"], strict=True)]
        interval = {"array": mine["high"] - mine["step"], "arrayminus": mine["step"] - mine["low"]}
        for when, symbol, error in (("step", "circle", interval), ("lasting", "circle-open", None)):
            points = go.Scatter(x=mine[when], y=names, error_x=error, mode="markers", name=sign, showlegend=False)
            points.update(marker={"color": _COLOURS[sign], "size": 9, "symbol": symbol})
            words = "first halfway" if when == "step" else "for good"
            points.update(hovertemplate=f"{sign}, {words}: step %{{x:.0f}}<extra></extra>")
            figure.add_trace(points, row=2, col=1)
    figure.update_xaxes(title_text="step", rangemode="tozero")
    figure.update_yaxes(title_text="share of the way", row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=2, col=1)
    figure.update_layout(height=620, legend={"orientation": "h", "x": 0, "y": -0.12})
    return apply_theme(figure, mode)


def _curve(figure: go.Figure, column: int, one: Dynamics, y: object, name: str, colour: str, dash: str) -> None:
    line = {"color": colour, "dash": dash}
    curve = go.Scatter(x=one.steps, y=y, name=name, line=line, legendgroup=name, showlegend=column == 1)
    figure.add_trace(curve.update(hovertemplate="%{y:.2f}"), row=1, col=column)

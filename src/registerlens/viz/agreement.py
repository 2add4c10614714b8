"""The right half of a figure of estimates: those that were checked, against their exact values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from registerlens.viz.theme import GREY


def agreement_panel(figure: go.Figure, estimate: str, line: str, dots: Sequence[go.Scatter], nothing: str) -> None:
    """Draw estimates (x) against exact values (y) into the second of two panels, with the line where they are equal.

    Args:
        figure: with two panels side by side.
        estimate: what an estimate is called.
        line: name of the line.
        dots: a trace a group; all may be empty.
        nothing: what is said where they are.

    Example:
        >>> from plotly.subplots import make_subplots
        >>> figure = make_subplots(rows=1, cols=2)
        >>> agreement_panel(figure, "estimate", "equal", [go.Scatter(x=[1, 3], y=[2, 2])], "none was checked")
        >>> figure.data[0].x
        (1.0, 3.0)
    """
    figure.update_xaxes(title_text=estimate, row=1, col=2)
    figure.update_yaxes(title_text="exact effect", row=1, col=2)
    values = np.concatenate([np.asarray([one.x, one.y], dtype=float).ravel() for one in dots])
    if not len(values):
        domain = {"xref": "x domain", "yref": "y domain"}
        figure.add_annotation(text=nothing, x=0.5, y=0.5, **domain, showarrow=False, row=1, col=2)
        return
    ends = [float(np.nanmin(values)), float(np.nanmax(values))]
    dashed = {"color": GREY, "dash": "dash"}
    figure.add_trace(go.Scatter(x=ends, y=ends, name=line, mode="lines", line=dashed), row=1, col=2)
    for one in dots:
        figure.add_trace(one, row=1, col=2)

"""Curves over the layers."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.analysis.trace import Trace
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, RED, Mode, apply_theme


def trace_figure(trace: Trace, mode: Mode = "light") -> go.Figure:
    """Largest patch norm after attention and after the MLP, and largest attention to a patch, layer by layer.

    Source: Jiang et al. 2025, figures 2 and 26.

    Example:
        >>> import torch, registerlens as rl
        >>> found = rl.trace(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48))
        >>> len(trace_figure(found).data)
        5
    """
    layers = np.arange(trace.n_layers)
    query = "[CLS]" if trace.sink_query == "cls" else "the average query"
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.1,
        subplot_titles=("Patch norms (mean over images)", f"Attention of {query} to its favourite patch"),
    )

    def curve(column: int, y: np.ndarray, name: str, colour: str, dash: str = "solid") -> None:
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=y,
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                hovertemplate="%{y:.3g}",
                legend="legend" if column == 1 else "legend2",
            ),
            row=1,
            col=column,
        )

    curve(1, trace.largest_norm[1::2], "largest, after attention", BLUE)
    curve(1, trace.largest_norm[2::2], "largest, after the MLP", ORANGE)
    curve(1, trace.median_norm[2::2], "median, after the MLP", GREY, "dot")
    curve(2, trace.head_sink.max(1), "strongest head", RED)
    curve(2, trace.mean_sink, "mean of heads", GREEN)
    if trace.onset_layer is not None:
        for column in (1, 2):
            figure.add_vline(x=trace.onset_layer, line={"color": GREY, "dash": "dash", "width": 1}, row=1, col=column)  # type: ignore[arg-type]
        figure.add_annotation(
            x=trace.onset_layer,
            y=1,
            yref="y domain",
            text=f" onset: {trace.onset}",
            showarrow=False,
            xanchor="left",
            yanchor="top",
            row=1,
            col=1,
        )
    step = max(1, trace.n_layers // 12)
    figure.update_xaxes(title_text="block", tick0=0, dtick=step)
    figure.update_yaxes(title_text="norm", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="attention (0 to 1)", rangemode="tozero", row=1, col=2)
    figure.update_layout(
        height=420,
        legend={"orientation": "h", "x": 0, "y": -0.2},
        legend2={"orientation": "h", "x": 0.55, "y": -0.2},
    )
    return apply_theme(figure, mode)

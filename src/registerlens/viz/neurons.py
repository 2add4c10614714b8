"""How register neurons were found: their scores beside all others', and what moving them leaves."""

from __future__ import annotations

import textwrap

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.interventions.search import NeuronSearch
from registerlens.viz.theme import BLUE, GREEN, GREY, RED, Mode, apply_theme

_SCORE_UNITS = {
    "mean": "mean activation at outliers",
    "mean_abs": "mean absolute activation at outliers",
    "contrast": "contrast (standard deviations)",
    "auc": "AUC (0 to 1)",
}
"""What each score measures, and in which unit."""


def search_figure(search: NeuronSearch, mode: Mode = "light") -> go.Figure:
    """Sorted scores with the elbow and the choice, and the outliers left by the number of neurons moved.

    The left panel shows three times as many ranks as were chosen (at least 40); the others are there on zooming out.
    Scores are on a log axis, but for the AUC, which is bounded; scores of zero or less do not show on it.

    Source: Jiang et al. 2025, appendix A.4.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neurons = rl.find_register_neurons(vit, synthetic_images(64, 0).images)
        >>> [curve.name for curve in search_figure(neurons.search).data]
        ['register neurons (7)', 'other neurons', 'outliers left']
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.12,
        subplot_titles=(
            f"Scores of neurons in blocks {search.lowest_layer} to {search.top_layer}",
            "Outliers left, by neurons moved to a test-time register",
        ),
    )
    _scores(figure, search)
    _sweep(figure, search)
    figure.update_layout(height=420, legend={"orientation": "h", "x": 0, "y": -0.2})
    return apply_theme(figure, mode).update_layout(hovermode="closest")


def _scores(figure: go.Figure, search: NeuronSearch) -> None:
    ranked = search.scores.ranked(search.score)[: len(search.sorted_scores)]
    shown = max(40, 3 * search.top_k)
    log = search.score != "auc"
    groups = (
        (f"register neurons ({search.top_k})", 0, search.top_k, RED, 8),
        ("other neurons", search.top_k, len(ranked), BLUE, 5),
    )
    for name, start, stop, colour, size in groups:
        figure.add_trace(
            go.Scatter(
                x=np.arange(start + 1, stop + 1),
                y=[value if value > 0 or not log else None for _, _, value in ranked[start:stop]],
                text=[f"block {layer}, neuron {neuron}" for layer, neuron, _ in ranked[start:stop]],
                name=name,
                mode="markers",
                marker={"color": colour, "size": size},
                hovertemplate="%{text}<br>rank %{x}, score %{y:.4g}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    marks = {"chosen": search.top_k, "elbow": search.elbow, "sweep": search.sweep}
    for place in sorted({k for k in marks.values() if k}):
        names = [name for name, k in marks.items() if k == place]
        dash = "solid" if "chosen" in names else "dash"
        figure.add_vline(x=place + 0.5, line={"color": GREY, "dash": dash, "width": 1}, row=1, col=1)  # type: ignore[arg-type]
        # Each label on a line of its own: elbow and sweep may be neighbours.
        line = ["chosen", "elbow", "sweep"].index(names[0])
        figure.add_annotation(
            x=place + 0.5,
            y=1 - 0.07 * line,
            yref="y domain",
            text=f" {', '.join(names)}: {place}",
            showarrow=False,
            xanchor="left",
            yanchor="top",
            row=1,
            col=1,
        )
    figure.update_xaxes(title_text="rank of the neuron", range=[0, min(shown, len(ranked)) + 1], row=1, col=1)
    figure.update_yaxes(title_text=_SCORE_UNITS[search.score] + (", log" if log else ""), row=1, col=1)
    if log:
        visible = [value for _, _, value in ranked[:shown] if value > 0] or [1.0]
        low, high = np.log10(min(visible)), np.log10(max(visible))
        margin = 0.08 * max(high - low, 0.5)
        figure.update_yaxes(type="log", dtick="D2", range=[low - margin, high + 3 * margin], row=1, col=1)


def _sweep(figure: go.Figure, search: NeuronSearch) -> None:
    moved, left = [k for k, _ in search.sweep_curve], [value for _, value in search.sweep_curve]
    if len(moved) > 1:
        figure.add_trace(
            go.Scatter(
                x=moved,
                y=left,
                name="outliers left",
                mode="lines+markers",
                line={"color": GREEN},
                showlegend=False,
                hovertemplate="%{x} neurons moved: %{y:.3g} outliers per image<extra></extra>",
            ),
            row=1,
            col=2,
        )
    # A note where there was no sweep, or how it ended; above the curve, which falls to the right.
    figure.add_annotation(
        x=1,
        y=1,
        xref="x domain",
        yref="y domain",
        xanchor="right",
        yanchor="top",
        align="right",
        showarrow=False,
        text="<br>".join(textwrap.wrap(search.sweep_note, 48)),
        row=1,
        col=2,
    )
    figure.update_xaxes(title_text="neurons moved, best first", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title_text="outliers per held-out image", rangemode="tozero", row=1, col=2)
    if len(moved) <= 1:  # no curve, only the note: axes without numbers
        figure.update_xaxes(range=[0, 1], showticklabels=False, row=1, col=2)
        figure.update_yaxes(range=[0, 1], showticklabels=False, row=1, col=2)

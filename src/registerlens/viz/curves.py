"""Curves over the layers, and the histogram of patch norms."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.analysis.detection import Outliers
from registerlens.analysis.trace import Trace
from registerlens.stats.histograms import medians
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, RED, Mode, apply_theme

_BINS = 80


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
        subplot_titles=("Patch norms (mean over images)", f"Attention to {query}'s favourite patch"),
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
    figure.update_layout(height=420, legend={"orientation": "h", "x": 0, "y": -0.2})
    return apply_theme(figure, mode)


def norm_histogram(outliers: Outliers, mode: Mode = "light") -> go.Figure:
    """How many patches have which norm, outliers apart, with the cut-off between them.

    Norms are in units of their image's median where the cut-off is. Counts are on a log axis: outliers are few.

    Source: Darcet et al. 2024, figure 3; Jiang et al. 2025, appendix A.4.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> [bars.name for bars in norm_histogram(rl.find_outliers(vit, synthetic_images(16, 0).images)).data]
        ['normal patches (543)', 'outliers (33)']
    """
    cutoff = outliers.detection.cutoff
    norms = outliers.norms.cpu()
    values = (norms / medians(norms) if cutoff.relative else norms).numpy()
    mask = outliers.mask.cpu().numpy()
    unit = "x the image's median" if cutoff.relative else "Euclidean norm"
    edges = np.linspace(0, float(values.max()), _BINS + 1)
    figure = go.Figure()
    above = "outliers" if outliers.verdict == "present" else "above the cut-off"
    for name, chosen, colour in (("normal patches", ~mask, BLUE), (above, mask, RED)):
        counts = np.histogram(values[chosen], edges)[0]
        figure.add_trace(
            go.Bar(
                x=(edges[:-1] + edges[1:]) / 2,
                y=np.where(counts, counts, np.nan),  # a log axis has no zero
                width=edges[1] - edges[0],
                name=f"{name} ({chosen.sum()})",
                marker={"color": colour, "line": {"width": 0}},
                hovertemplate="norm %{x:.3g}: %{y} patches<extra></extra>",
            )
        )
    finite = np.isfinite(cutoff.value)
    if finite:
        figure.add_vline(x=cutoff.value, line={"color": GREY, "dash": "dash", "width": 1})
    figure.add_annotation(
        x=cutoff.value if finite and cutoff.value < edges[-1] else 1,
        xref="x" if finite and cutoff.value < edges[-1] else "x domain",
        xanchor="left" if finite and cutoff.value < edges[-1] / 2 else "right",
        y=1,
        yref="y domain",
        yanchor="top",
        showarrow=False,
        text=f" cut-off: {cutoff.value:.3g} " if finite else "outliers absent: no cut-off ",
    )
    figure.update_xaxes(title_text=f"patch norm at {outliers.sublayer} ({unit})", rangemode="tozero")
    figure.update_yaxes(title_text="patches (log)", type="log", dtick=1)
    figure.update_layout(
        height=400,
        barmode="overlay",
        bargap=0,
        title=f"{outliers.model}: {len(mask)} images, outliers {outliers.verdict}",
        legend={"orientation": "h", "x": 0, "y": -0.25},
    )
    return apply_theme(figure, mode).update_layout(hovermode="closest")

"""How outliers and register neurons were found: curves along the layers, norms and their cut-off, scores of neurons."""

import textwrap

import numpy as np
import plotly.graph_objects as go

from registerlens.analysis.detection import Outliers
from registerlens.analysis.trace import Trace
from registerlens.interventions.search_record import NeuronSearch
from registerlens.stats.histograms import medians
from registerlens.viz.parts import bars, beside, curve, dots, finished, legend, mark, note, ticks_of_blocks
from registerlens.viz.theme import BLUE, GREEN, GREY, ORANGE, RED, Mode

_BINS = 80
_SCORE_UNITS = {
    "mean": "mean activation at outliers",
    "mean_abs": "mean absolute activation at outliers",
    "contrast": "contrast (standard deviations)",
    "auc": "AUC (0 to 1)",
}
"""What each score measures, and in which unit."""


def trace_figure(trace: Trace, mode: Mode = "light") -> go.Figure:
    """Largest patch norm after attention and after the MLP, and largest attention to a patch, layer by layer.

    Source: Jiang et al. 2025, figures 2 and 26.

    Example:
        >>> import torch, registerlens as rl
        >>> found = rl.trace(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48))
        >>> len(trace_figure(found).data)
        5
    """
    query = "[CLS]" if trace.sink_query == "cls" else "the average query"
    figure = beside("Patch norms (mean over images)", f"Attention to {query}'s favourite patch")
    for column, y, name, colour, dash in (
        (1, trace.largest_norm[1::2], "largest, after attention", BLUE, "solid"),
        (1, trace.largest_norm[2::2], "largest, after the MLP", ORANGE, "solid"),
        (1, trace.median_norm[2::2], "median, after the MLP", GREY, "dot"),
        (2, trace.head_sink.max(1), "strongest head", RED, "solid"),
        (2, trace.mean_sink, "mean of heads", GREEN, "solid"),
    ):
        figure.add_trace(curve(np.arange(trace.n_layers), y, name, colour, dash=dash), 1, column)
    if trace.onset_layer is not None:
        for column in (1, 2):
            mark(figure, column, x=trace.onset_layer)
        note(figure, f" onset: {trace.onset}", trace.onset_layer, 1, "left", yref="y domain", row=1, col=1)
    figure.update_xaxes(title_text="block", **ticks_of_blocks(trace.n_layers))
    figure.update_yaxes(title_text="norm", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="attention (0 to 1)", rangemode="tozero", row=1, col=2)
    return finished(figure, mode, height=420, legend=legend(-0.2), closest=False)


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
    middles, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    figure = go.Figure()
    above = "outliers" if outliers.verdict == "present" else "above the cut-off"
    for name, chosen, colour in (("normal patches", ~mask, BLUE), (above, mask, RED)):
        counts = np.histogram(values[chosen], edges)[0]
        positive = np.where(counts, counts, np.nan)  # a log axis has no zero
        hover = "norm %{x:.3g}: %{y} patches<extra></extra>"
        figure.add_trace(bars(middles, positive, f"{name} ({chosen.sum()})", colour, hover, width=width))
    finite = np.isfinite(cutoff.value)
    if finite:
        figure.add_vline(x=cutoff.value, line={"color": GREY, "dash": "dash", "width": 1})
    words = f" cut-off: {cutoff.value:.3g} " if finite else "outliers absent: no cut-off "
    side = "left" if finite and cutoff.value < edges[-1] / 2 else "right"
    if finite and cutoff.value < edges[-1]:
        note(figure, words, cutoff.value, 1, side, xref="x", yref="y domain")
    else:
        note(figure, words, 1, 1, side, xref="x domain", yref="y domain")
    figure.update_xaxes(title_text=f"patch norm at {outliers.sublayer} ({unit})", rangemode="tozero")
    figure.update_yaxes(title_text="patches (log)", type="log", dtick=1)
    title = f"{outliers.model}: {len(mask)} images, outliers {outliers.verdict}"
    return finished(figure, mode, height=400, title=title, legend=legend(-0.25), barmode="overlay", bargap=0)


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
        ['register neurons (7)', 'other candidates', 'outliers left']
    """
    figure = beside(
        f"Scores of neurons in blocks {search.lowest_layer} to {search.top_layer}",
        "Outliers left, by neurons moved to a test-time register",
        gap=0.12,
    )
    _scores(figure, search)
    _sweep(figure, search)
    return finished(figure, mode, height=420, legend=legend(-0.2))


def _scores(figure: go.Figure, search: NeuronSearch) -> None:
    ranked = search.ranked[: len(search.sorted_scores)]
    taken = np.array([(layer, neuron) in search.taken for layer, neuron, _ in ranked])
    n_bars = max(40, 3 * search.top_k)
    log = search.score != "auc"
    groups = (
        (f"register neurons ({search.top_k})", taken, RED, 8),
        ("other candidates", ~taken, BLUE, 5),
    )
    for name, which, colour, size in groups:
        places = which.nonzero()[0]
        values = [ranked[i][2] if ranked[i][2] > 0 or not log else None for i in places]
        text = ["neuron {}:{}".format(*ranked[i]) for i in places]
        hover = "%{text}<br>rank %{x}, score %{y:.4g}"
        figure.add_trace(dots(places + 1, values, name, colour, size, hover, text=text), 1, 1)
    marks = {"chosen": search.top_k, "elbow": search.elbow, "sweep": search.sweep}
    for place in sorted({k for k in marks.values() if k}):
        names = [name for name, k in marks.items() if k == place]
        mark(figure, 1, x=place + 0.5, dash="solid" if "chosen" in names else "dash")
        # Each label on a line of its own: elbow and sweep may be neighbours.
        height = 1 - 0.07 * ["chosen", "elbow", "sweep"].index(names[0])
        words = f" {', '.join(names)}: {place}"
        note(figure, words, place + 0.5, height, "left", yref="y domain", row=1, col=1)
    figure.update_xaxes(title_text="rank among the candidates", range=[0, min(n_bars, len(ranked)) + 1], row=1, col=1)
    figure.update_yaxes(title_text=_SCORE_UNITS[search.score] + (", log" if log else ""), row=1, col=1)
    if log:
        visible = [value for _, _, value in ranked[:n_bars] if value > 0] or [1.0]
        low, high = np.log10(min(visible)), np.log10(max(visible))
        margin = 0.08 * max(high - low, 0.5)
        figure.update_yaxes(type="log", dtick="D2", range=[low - margin, high + 3 * margin], row=1, col=1)


def _sweep(figure: go.Figure, search: NeuronSearch) -> None:
    moved, left = [k for k, _ in search.sweep_curve], [value for _, value in search.sweep_curve]
    if len(moved) > 1:
        hover = "%{x} neurons moved: %{y:.3g} outliers per image<extra></extra>"
        figure.add_trace(curve(moved, left, "outliers left", GREEN, hover, showlegend=False), 1, 2)
    # A note where there was no sweep, or how it ended; above the curve, which falls to the right.
    words = "<br>".join(textwrap.wrap(search.sweep_note, 48))
    note(figure, words, 1, 1, "right", align="right", xref="x domain", yref="y domain", row=1, col=2)
    figure.update_xaxes(title_text="neurons moved, best first", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title_text="outliers per held-out image", rangemode="tozero", row=1, col=2)
    if len(moved) <= 1:  # no curve, only the note: axes without numbers
        figure.update_xaxes(range=[0, 1], showticklabels=False, row=1, col=2)
        figure.update_yaxes(range=[0, 1], showticklabels=False, row=1, col=2)

"""Evidence for register neurons: activations, updates, output weights, and which neurons drive which."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from registerlens.analysis.neuron_evidence import ActivationDistributions
from registerlens.analysis.neuron_updates import COSINE_BINS, NeuronUpdates
from registerlens.analysis.output_weights import OutputWeights
from registerlens.analysis.top_outliers import PLACES
from registerlens.evaluation.causal_order import CONDITIONS, CausalOrder
from registerlens.stats.histograms import ASINH_LIMIT, N_BINS, signed_edges
from registerlens.viz.parts import bars, dots, finished, interval, legend, sentence
from registerlens.viz.theme import BLUE, GREY, RED, Mode, on_cells, paper

_ROW = 250
"""Height of a row of panels in pixels."""
_GAP = 85
"""Room between two rows, for axis titles and headings, in pixels."""
_DECADES = np.array([-1e4, -1e3, -100, -10, -1, 0, 1, 10, 100, 1e3, 1e4])
_THIRDS = np.array([-300, -30, -3, 3, 30, 300])
_NARROW = 6.0
"""Width of an arsinh axis up to which it has ticks between the decades."""
_POOLED = 4
"""Bins of the results drawn as one bar."""
_OVER: Any = {"barmode": "overlay", "bargap": 0}
"""Bars of two groups before each other."""


def distributions_figure(result: ActivationDistributions, mode: Mode = "light") -> go.Figure:
    """A row a layer: all its neurons at both tokens (figures 20 and 27), and the neurons listed one by one.

    Activations are on an arsinh axis: linear near zero, logarithmic beyond. On the right, bars are one standard
    deviation over images to both sides.

    Source: Jiang et al. 2025, figures 20 and 27.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.analysis.neuron_evidence import activation_distributions
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> found = activation_distributions(vit, synthetic_images(16, 0).images, neurons)
        >>> [curve.name for curve in distributions_figure(found).data][::2]
        ['top outlier', 'random normal patch']
    """
    titles = []
    for i, layer in enumerate(result.layers):
        titles += [f"Block {layer}: all neurons (skewness {result.skewness[0, i]:.1f} and {result.skewness[1, i]:.1f})"]
        titles += [f"Block {layer}: neurons listed, mean over images"]
    n = len(result.layers)
    figure = make_subplots(rows=n, cols=2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=_gap(n))
    mean, std = result.listed(result.mean), result.listed(result.std)
    for i, layer in enumerate(result.layers):
        mine = [j for j, (at, _) in enumerate(result.neurons.pairs) if at == layer]
        names = [str(result.neurons.pairs[j][1]) for j in mine]
        for place, colour in enumerate((RED, BLUE)):
            name = PLACES[place]
            histogram = _bars(result.histogram[place, i], name, colour, showlegend=i == 0)
            figure.add_trace(histogram.update(legendgroup=name), i + 1, 1)
            middle = mean[place, mine]
            low, high = middle - std[place, mine], middle + std[place, mine]
            error = interval(*np.arcsinh([middle, low, high]), thickness=1)
            hover = "%{x}: %{customdata[0]:.3g} ± %{customdata[1]:.2g}"
            points = dots(names, np.arcsinh(middle), name, colour, 7, hover, error_y=error, showlegend=False)
            points.update(legendgroup=name, customdata=np.stack([middle, std[place, mine]], 1))
            figure.add_trace(points, i + 1, 2)
        _signed_axis(figure, "x", result.histogram[:, i], row=i + 1, col=1)
        _signed_axis(figure, "y", result.neuron_histogram[:, mine].reshape(-1, N_BINS), row=i + 1, col=2)
        figure.update_yaxes(title_text="neurons x images (log)", type="log", dtick=1, row=i + 1, col=1)
        figure.update_yaxes(title_text="activation", row=i + 1, col=2)
        figure.update_xaxes(title_text="activation", row=i + 1, col=1)
        figure.update_xaxes(title_text="neuron", type="category", row=i + 1, col=2)
    return finished(figure, mode, height=160 + _ROW * n, legend=legend(1 + 0.22 / n), margin={"t": 100}, **_OVER)


def weights_figure(weights: OutputWeights, mode: Mode = "light") -> go.Figure:
    """A panel a neuron: its weights over the residual dimensions against the other neurons' (figure 25).

    Weights are relative: divided by the root mean square of their neuron's row. The grey bars have the same area as the
    red ones. The dimensions that the neurons share are named.

    Source: Jiang et al. 2025, figure 25.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.analysis.output_weights import output_weights
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> [bars.name for bars in weights_figure(output_weights(vit, neurons, draws=10)).data]
        ['other neurons of the layer', 'register neuron']
    """
    n_rows = min(len(weights.neurons), 12)
    columns = min(n_rows, 4)
    rows = -(-n_rows // columns)
    titles = [f"neuron {layer}:{n}" for layer, n in weights.neurons.pairs[:n_rows]]
    spacing: Any = {"horizontal_spacing": 0.06, "vertical_spacing": _gap(rows)}
    figure = make_subplots(rows, columns, subplot_titles=titles, **spacing)
    relative = weights.relative
    edges = signed_edges()
    for j, (layer, _) in enumerate(weights.neurons.pairs[:n_rows]):
        row, col = j // columns + 1, j % columns + 1
        own = np.histogram(relative[j], edges)[0]
        others = weights.others_histogram[weights.layers.index(layer)]
        scaled = others * (own.sum() / max(others.sum(), 1))
        for values, name, colour in ((scaled, "other neurons of the layer", GREY), (own, "register neuron", RED)):
            histogram = _bars(values, name, colour, showlegend=j == 0)
            figure.add_trace(histogram.update(legendgroup=name), row, col)
        for rank, dimension in enumerate(np.argsort(-np.abs(relative[j]), kind="stable")[:2]):
            arrow = {"ax": 0, "ay": -28 - 22 * rank, "arrowcolor": GREY, "bgcolor": paper(mode), "opacity": 0.85}
            place = {"x": np.arcsinh(relative[j, dimension]), "y": 0, "row": row, "col": col}
            figure.add_annotation(text=f"dim {dimension}", **arrow, **place)
        _signed_axis(figure, "x", np.stack([own, others > 0]), row=row, col=col)
        top = np.log10(max(own.max(), scaled.max())) + 0.5
        figure.update_yaxes(type="log", dtick=1, range=[-0.5, top], row=row, col=col)
    figure.update_xaxes(title_text="relative weight", row=rows)
    figure.update_yaxes(title_text="dimensions (log)", col=1)
    left_out = f", the first {n_rows} of {len(weights.neurons)} neurons" if n_rows < len(weights.neurons) else ""
    title = sentence(f"What register neurons write{left_out}")
    above = legend(1.0, yref="container", yanchor="top") | {"x": 0.4}
    return finished(figure, mode, height=150 + _ROW * rows, title=title, legend=above, margin={"t": 90}, **_OVER)


def updates_figure(updates: NeuronUpdates, mode: Mode = "light") -> go.Figure:
    """A row a layer: norms of the summed update, and cosines between images, against random sets (figure 21).

    Source: Jiang et al. 2025, figure 21.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.analysis.neuron_updates import neuron_updates
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> found = neuron_updates(vit, synthetic_images(16, 0).images, neurons, draws=5)
        >>> [bars.name for bars in updates_figure(found).data][::2]
        ['register neurons', 'random sets']
    """
    n = len(updates.layers)
    titles = []
    for i, layer in enumerate(updates.layers):
        titles += [f"Block {layer}: norm of the summed update (mean {updates.norm[i, 0]:.3g})"]
        mean = "no pair writes" if np.isnan(updates.cosine[i, 0]) else f"mean {updates.cosine[i, 0]:.3f}"
        titles += [f"Block {layer}: cosine between images ({mean})"]
    figure = make_subplots(rows=n, cols=2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=_gap(n))
    middles = np.linspace(-1, 1, COSINE_BINS + 1)[:-1] + 1 / COSINE_BINS
    groups = (("register neurons", RED), (f"random sets ({updates.norm.shape[1] - 1} draws)", BLUE))
    for i in range(n):
        for group, (name, colour) in enumerate(groups):
            norms, cosines = _share(updates.norm_histogram[i, group]), _share(updates.cosine_histogram[i, group])
            short = name.partition(" (")[0]
            histogram = _bars(norms, short, colour, showlegend=i == 0)
            figure.add_trace(histogram.update(legendgroup=name), i + 1, 1)
            some, hover = np.where(cosines > 0, cosines, np.nan), "cosine %{x:.2f}: %{y:.1%}<extra></extra>"
            histogram = bars(middles, some, short, colour, hover, width=2 / COSINE_BINS, opacity=0.6, showlegend=False)
            figure.add_trace(histogram.update(legendgroup=name), i + 1, 2)
        _signed_axis(figure, "x", updates.norm_histogram[i], row=i + 1, col=1)
        figure.update_xaxes(title_text="norm", row=i + 1, col=1)
        figure.update_xaxes(title_text="cosine", range=[-1.05, 1.05], row=i + 1, col=2)
    figure.update_yaxes(title_text="share of images", tickformat=".0%", col=1)
    figure.update_yaxes(title_text="share of pairs", tickformat=".0%", range=[0, 1.05], col=2)
    return finished(figure, mode, height=160 + _ROW * n, legend=legend(1 + 0.22 / n), margin={"t": 100}, **_OVER)


def causal_figure(result: CausalOrder, mode: Mode = "light") -> go.Figure:
    """Change of later register neurons (columns) when those of a layer (rows) are edited; one panel a kind of edit.

    Colours end at a loss and a gain of everything.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> from registerlens.evaluation.causal_order import causal_order
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images
        >>> found = causal_order(vit, images, rl.RegisterNeurons.from_pairs([(1, 183), (2, 197)]))
        >>> len(causal_figure(found).data)
        3
    """
    order = sorted(
        (j for j, (at, _) in enumerate(result.neurons.pairs) if at > result.layers[0]),
        key=result.neurons.pairs.__getitem__,
    )
    names = ["{}: {}".format(*result.neurons.pairs[j]) for j in order]
    rows = [f"block {layer}" for layer in result.layers[:-1]]
    titles = [f"Register neurons to {name}" for name in CONDITIONS[:2]] + ["As many random neurons to zero"]
    n = len(CONDITIONS)
    figure = make_subplots(rows=n, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.1)
    change = result.change[:, : len(rows), order]
    for c in range(n):
        text = np.array([["" if np.isnan(v) else f"{v:+.0%}" for v in line] for line in change[c]])
        cells = go.Heatmap(z=change[c], x=names, y=rows, zmin=-1, zmax=1, colorscale="RdBu", showscale=c == 0)
        cells.update(colorbar={"tickformat": "+.0%", "title": "change"}, customdata=text)
        cells.update(hovertemplate="edited %{y}, neuron %{x}: %{customdata}<extra></extra>")
        if len(names) <= 30:
            cells.update(on_cells(text, change[c], -1.0, 1.0, "RdBu", mode, width=740))
        figure.add_trace(cells, c + 1, 1)
        figure.update_xaxes(type="category", row=c + 1, col=1)
        figure.update_yaxes(title_text="edited", autorange="reversed", row=c + 1, col=1)
    figure.update_xaxes(title_text="later register neuron (block: neuron)", row=n, col=1)
    return finished(figure, mode, height=170 + n * (70 + 35 * len(rows)), grid=False)


def _gap(rows: int) -> float:
    return _GAP / (_ROW * rows)


def _bars(
    counts: Float[np.ndarray, " bin"] | Int[np.ndarray, " bin"], name: str, colour: str, *, showlegend: bool
) -> go.Bar:
    """Bars over the arsinh bins, several bins to a bar; empty ones left out, as a log axis has no zero."""
    pooled = counts.reshape(-1, _POOLED).sum(1)
    width = 2 * ASINH_LIMIT / len(pooled)
    middles = np.linspace(-ASINH_LIMIT, ASINH_LIMIT, len(pooled) + 1)[:-1] + ASINH_LIMIT / len(pooled)
    some = pooled > 0
    hover = "%{customdata:.3g}: %{y:.4g}<extra></extra>"
    trace = bars(middles[some], pooled[some], name, colour, hover, width=width, opacity=0.6, showlegend=showlegend)
    return trace.update(customdata=np.sinh(middles[some]))


def _share(counts: Int[np.ndarray, " bin"]) -> Float[np.ndarray, " bin"]:
    return counts / max(int(counts.sum()), 1)


def _signed_axis(figure: go.Figure, axis: str, counts: np.ndarray, *, row: int, col: int) -> None:
    """An arsinh axis that shows every bin with a count, and decades as ticks."""
    used = np.flatnonzero(counts.sum(0))
    edges = np.linspace(-ASINH_LIMIT, ASINH_LIMIT, N_BINS + 1)
    low, high = (edges[used[0]], edges[used[-1] + 1]) if len(used) else (-1.0, 1.0)
    low, high = low - 0.15, high + 0.15
    known = np.sort(np.concatenate([_DECADES, _THIRDS])) if high - low < _NARROW else _DECADES
    ticks = known[(np.arcsinh(known) >= low) & (np.arcsinh(known) <= high)]
    update = figure.update_xaxes if axis == "x" else figure.update_yaxes
    update(range=[low, high], tickvals=np.arcsinh(ticks), ticktext=[f"{t:g}" for t in ticks], row=row, col=col)

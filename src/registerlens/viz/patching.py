"""Effects of patching and ablation: along paths and edges, estimated, and beside exact ones where these are known."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from registerlens.circuits.attributions import Attributions
from registerlens.circuits.edge_attribution import EdgeAttribution
from registerlens.circuits.paths import PathEffects
from registerlens.circuits.screening import METHODS, Screening
from registerlens.stats.moments import RankCorrelation
from registerlens.viz.parts import beside, curve, dots, finished, interval, legend, sentence
from registerlens.viz.theme import BLUE, GREY, ORANGE, RED, Mode, ink

_RECEIVERS = 40
"""Receivers drawn at most, those with the largest effects."""
_NEURONS = 2000
"""Screened neurons drawn at most: those with the largest effects or the largest ratios, of either half."""


def paths_figure(effects: PathEffects, mode: Mode = "light") -> go.Figure:
    """Mean effects with their 95% intervals: a bar a receiver, all of them together, and the whole corrupted image.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.paths import path_patching
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(4, 0).images
        >>> found = path_patching(
        ...     vit, images, images.roll(1, 0), "blocks.1.mlp.hook_post", "blocks.[23].attn.hook_k",
        ...     metric="largest_norm@5.mlp",
        ... )
        >>> len(paths_figure(found).data[0].y)
        4
    """
    table = effects.to_dataframe()
    alone, sums = table.iloc[:-2], table.iloc[-2:]
    left_out = max(0, len(alone) - _RECEIVERS)
    if left_out:
        keep = np.sort(np.argsort(-np.abs(alone["effect"].to_numpy()), kind="stable")[:_RECEIVERS])
        alone = alone.iloc[keep]
    rows = [(alone, BLUE), (sums.iloc[:1], ORANGE), (sums.iloc[1:], GREY)]
    names = [name for some, _ in rows for name in some["receiver"]]
    effect, low, high = (
        np.concatenate([some[column].to_numpy() for some, _ in rows]) for column in ("effect", "low", "high")
    )
    receivers = go.Bar(x=effect, y=names, orientation="h", hovertemplate="%{y}: %{x:.4g}<extra></extra>")
    receivers.update(error_x=interval(effect, low, high, thickness=1.5, width=3, color=ink(mode)))
    receivers.update(marker={"color": [colour for some, colour in rows for _ in range(len(some))]})
    title = f"{effects.sender}, on {len(effects.clean)} pairs"
    title += f" ({left_out} receivers with smaller effects left out)" if left_out else ""
    look = {"title": sentence(title), "margin": {"l": 20}, "showlegend": False, "bargap": 0.35}
    figure = finished(go.Figure(receivers), mode, height=170 + 26 * len(names), **look)
    figure.update_xaxes(title_text=f"change of {effects.words or effects.metric}", zeroline=True, zerolinecolor=GREY)
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True, showgrid=False)


def attributions_figure(attributions: Attributions, mode: Mode = "light") -> go.Figure:
    """Left, each hook point as a whole, estimated and exact; right, single units, estimated against exact.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.attribution_patching import attribution_patching
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(4, 0).images
        >>> found = attribution_patching(
        ...     vit, images, images.roll(1, 0), "blocks.*.attn.hook_z", metric="largest_norm@5.mlp"
        ... )
        >>> [trace.name for trace in attributions_figure(found).data]
        ['attribution', 'exact', 'exact = estimated', 'random units', 'largest attributions']
    """
    known = _correlation(attributions.on_sample, f"random, n = {attributions.on_sample.n}")
    figure = beside("Whole hook points", f"Single units: rank correlation {known}", gap=0.14)
    points = [point.replace("blocks.", "").replace("hook_", "") for point in attributions.names]
    for name, values, colour in (("attribution", attributions.by_name, BLUE), ("exact", attributions.whole, GREY)):
        whole = go.Bar(x=values, y=points, name=name, orientation="h", marker={"color": colour})
        figure.add_trace(whole.update(hovertemplate="%{y}: %{x:.4g}<extra>" + name + "</extra>"), 1, 1)
    _agreement(figure, "attribution", "exact = estimated", _checked_units(attributions), "no unit was patched exactly")
    figure.update_annotations(font_size=13)
    height = 200 + max(260, 30 * len(attributions.names))
    figure = finished(figure, mode, height=height, legend=legend(-100 / height, yanchor="top"))
    figure.update_xaxes(title_text=f"change of {attributions.metric}", row=1, col=1)
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True, row=1, col=1)


def _checked_units(attributions: Attributions) -> list[go.Scatter]:
    """Units that were patched exactly, a trace a group."""
    table = attributions.to_dataframe().iloc[attributions.checked]
    groups = (
        ("random units", ~attributions.is_candidate, ORANGE),
        ("largest attributions", attributions.is_candidate, RED),
    )
    traces = []
    for name, chosen, colour in groups:
        some = table[chosen]
        text = [f"{n} {k} {u}" for n, k, u in zip(some["name"], some["kind"], some["unit"], strict=True)]
        hover = "%{text}<br>attribution %{x:.4g}, exact %{y:.4g}"
        look = {"opacity": 0.8}
        traces.append(dots(some["attribution"], some["exact"], name, colour, 8, hover, look=look, text=text))
    return traces


def screening_figure(screening: Screening, mode: Mode = "light") -> go.Figure:
    """Left, each neuron's effect against effect over standard error; right, screened against exact effects.

    Of many neurons the left panel draws those that stick out, the largest by effect and by certainty. With one image
    there is no standard error, and it shows effects by layer instead.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> from registerlens.circuits.screening import screen_neurons
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images
        >>> found = screen_neurons(vit, images, "largest_norm@1.mlp", exact=3, sample=3)
        >>> [dots.name for dots in screening_figure(found).data]
        ['candidates', 'other neurons', 'exact = screened', 'random neurons', 'candidates']
    """
    random, candidates = (_correlation(rho, f"n = {rho.n}") for rho in (screening.on_sample, screening.on_candidates))
    left = f"{screening.effects.size} neurons, {screening.mode} ablation, {METHODS[screening.method]}"
    figure = beside(left, f"Rank correlation: random {random}, candidates {candidates}", gap=0.12)
    _volcano(figure, screening)
    checked = _checked_neurons(screening)
    _agreement(figure, "screened effect", "exact = screened", checked, "no neuron was ablated exactly")
    figure.update_annotations(font_size=13)
    return finished(figure, mode, height=420, legend=legend(-0.2))


def edges_figure(edges: EdgeAttribution, mode: Mode = "light") -> go.Figure:
    """A heat map of contributions: a row a neuron, a column a head; white is none, grey where there is no edge.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> from registerlens.circuits.edge_attribution import attribute_edges
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images
        >>> edges = attribute_edges(vit, images, rl.RegisterNeurons.from_pairs([(1, 183)]))
        >>> list(edges_figure(edges).data[0].x)
        ['2.0', '3.0', '4.0', '5.0']
    """
    n_heads = edges.effects.shape[2]
    heads = [f"{layer}.{head}" for layer in edges.layers for head in range(n_heads)]
    neurons = [f"{layer}: {neuron}" for layer, neuron in edges.neurons.pairs]
    z = edges.effects.reshape(len(neurons), -1)
    asked = np.atleast_1d(np.isfinite(z).any(0))
    largest = float(np.nanmax(np.abs(z)))
    columns = [head for head, known in zip(heads, asked, strict=True) if known]
    cells = go.Heatmap(z=z[:, asked], x=columns, y=neurons, zmin=-largest, zmax=largest, colorscale="RdBu_r")
    cells.update(colorbar={"title": "contribution"})
    cells.update(hovertemplate="neuron %{y} to head %{x}: %{z:.3g}<extra></extra>")
    figure = go.Figure(cells)
    figure.update_xaxes(type="category", title_text="head (block.head)")
    figure.update_yaxes(type="category", title_text="neuron (block: neuron)", autorange="reversed")
    title = sentence(f"Direct contributions to {edges.words} (LayerNorm {edges.norm})")
    return finished(figure, mode, height=180 + 22 * len(neurons), title=title, grid=False)


def _correlation(rho: RankCorrelation, of: str) -> str:
    return "unknown" if np.isnan(rho.rho) else f"{rho.rho:.2f} ({of})"


def _volcano(figure: go.Figure, screening: Screening) -> None:
    table = screening.to_dataframe()
    table["size"] = table["effect"].abs()
    table["certainty"] = table["size"] / table["standard_error"]
    certain = bool(np.isfinite(table["certainty"]).any())
    candidates = set(map(tuple, screening.checked[screening.is_candidate].tolist()))
    table["candidate"] = [pair in candidates for pair in zip(table["layer"], table["neuron"], strict=True)]
    half = _NEURONS // 2
    rows = table[table["candidate"]].index.union(table.nlargest(half, "size").index)
    if certain:
        rows = rows.union(table.nlargest(half, "certainty").index)
    table = table.loc[rows]
    for name, chosen, colour, size in (("candidates", True, RED, 8), ("other neurons", False, BLUE, 4)):
        some = table[table["candidate"] == chosen]
        text = [f"neuron {a}:{n}" for a, n in zip(some["layer"], some["neuron"], strict=True)]
        y = some["certainty"] if certain else some["layer"]
        hover = "%{text}<br>effect %{x:.3g}, %{y:.3g}"
        points = dots(some["effect"], y, name, colour, size, hover, look={"opacity": 0.8}, text=text)
        figure.add_trace(points.update(legendgroup=name), 1, 1)
    figure.update_xaxes(title_text=f"screened effect on {screening.metric}", row=1, col=1)
    if certain:
        figure.update_yaxes(title_text="effect / standard error, log", type="log", row=1, col=1)
    else:
        figure.update_yaxes(title_text="block", row=1, col=1)


def _checked_neurons(screening: Screening) -> list[go.Scatter]:
    """Neurons that were ablated exactly, a trace a group."""
    table = screening.checked_dataframe()
    groups = (("random neurons", table[table["sample"]], BLUE), ("candidates", table[table["candidate"]], RED))
    traces = []
    for name, some, colour in groups:
        text = [f"neuron {a}:{n}" for a, n in zip(some["layer"], some["neuron"], strict=True)]
        error = {"type": "data", "array": some["exact_standard_error"], "thickness": 1, "width": 0}
        hover = "%{text}<br>screened %{x:.3g}, exact %{y:.3g}"
        points = dots(some["screened"], some["exact"], name, colour, 7, hover, text=text, error_y=error)
        traces.append(points.update(legendgroup=name, showlegend=name != "candidates"))
    return traces


def _agreement(figure: go.Figure, estimate: str, line: str, groups: Sequence[go.Scatter], nothing: str) -> None:
    """Estimates (x) against exact values (y) in the second of two panels, with the line where they are equal.

    Args:
        figure: with two panels beside each other.
        estimate: what an estimate is called.
        line: name of the line.
        groups: a trace a group of those that were checked; all may be empty.
        nothing: what is said where they are.
    """
    figure.update_xaxes(title_text=estimate, row=1, col=2)
    figure.update_yaxes(title_text="exact effect", row=1, col=2)
    values = np.concatenate([np.asarray([trace.x, trace.y], dtype=float).ravel() for trace in groups])
    if not len(values):
        where = {"xref": "x domain", "yref": "y domain", "row": 1, "col": 2}
        figure.add_annotation(text=nothing, x=0.5, y=0.5, showarrow=False, **where)
        return
    ends = [float(np.nanmin(values)), float(np.nanmax(values))]
    figure.add_trace(curve(ends, ends, line, GREY, None, dash="dash", mode="lines"), 1, 2)
    for trace in groups:
        figure.add_trace(trace, 1, 2)

"""Screened neurons: how large and how certain their effects are, whether exact ablation agrees, and whom they feed."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.circuits.edge_attribution import EdgeAttribution
from registerlens.circuits.screening import METHODS, Screening
from registerlens.stats.moments import RankCorrelation
from registerlens.viz.agreement import agreement_panel
from registerlens.viz.theme import BLUE, RED, Mode, apply_theme

_DRAWN = 2000
"""Neurons drawn at most: those with the largest effects or the largest ratios, of either half."""


def screening_figure(found: Screening, mode: Mode = "light") -> go.Figure:
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
    titles = (
        f"{found.effects.size} neurons, {found.mode} ablation, {METHODS[found.method]}",
        f"Rank correlation: random {_short(found.on_sample)}, candidates {_short(found.on_candidates)}",
    )
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12, subplot_titles=titles)
    _volcano(figure, found)
    agreement_panel(figure, "screened effect", "exact = screened", _checked(found), "no neuron was ablated exactly")
    figure.update_annotations(font_size=13)
    figure.update_layout(height=420, legend={"orientation": "h", "x": 0, "y": -0.2})
    return apply_theme(figure, mode).update_layout(hovermode="closest")


def edges_figure(found: EdgeAttribution, mode: Mode = "light") -> go.Figure:
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
    n_heads = found.effects.shape[2]
    heads = [f"{layer}.{head}" for layer in found.layers for head in range(n_heads)]
    neurons = [f"{layer}: {neuron}" for layer, neuron in found.neurons.pairs]
    z = found.effects.reshape(len(neurons), -1)
    asked = np.atleast_1d(np.isfinite(z).any(0))
    largest = float(np.nanmax(np.abs(z)))
    figure = go.Figure(
        go.Heatmap(
            z=z[:, asked],
            x=[head for head, known in zip(heads, asked, strict=True) if known],
            y=neurons,
            zmin=-largest,
            zmax=largest,
            colorscale="RdBu_r",
            colorbar={"title": "contribution"},
            hovertemplate="neuron %{y} to head %{x}: %{z:.3g}<extra></extra>",
        )
    )
    title = {"text": f"Direct contributions to {found.words} (LayerNorm {found.norm})", "font": {"size": 14}}
    figure.update_layout(title=title, height=180 + 22 * len(neurons))
    figure.update_xaxes(type="category", title_text="head (block.head)")
    figure.update_yaxes(type="category", title_text="neuron (block: neuron)", autorange="reversed")
    figure = apply_theme(figure, mode).update_layout(hovermode="closest")
    return figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def _short(rho: RankCorrelation) -> str:
    return "unknown" if np.isnan(rho.rho) else f"{rho.rho:.2f} (n = {rho.n})"


def _volcano(figure: go.Figure, found: Screening) -> None:
    table = found.to_dataframe()
    table["size"] = table["effect"].abs()
    table["certainty"] = table["size"] / table["standard_error"]
    certain = bool(np.isfinite(table["certainty"]).any())
    candidates = set(map(tuple, found.checked[found.is_candidate].tolist()))
    table["candidate"] = [pair in candidates for pair in zip(table["layer"], table["neuron"], strict=True)]
    half = _DRAWN // 2
    drawn = table[table["candidate"]].index.union(table.nlargest(half, "size").index)
    if certain:
        drawn = drawn.union(table.nlargest(half, "certainty").index)
    table = table.loc[drawn]
    for name, chosen, colour, size in (("candidates", True, RED, 8), ("other neurons", False, BLUE, 4)):
        some = table[table["candidate"] == chosen]
        figure.add_trace(
            go.Scatter(
                x=some["effect"],
                y=some["certainty"] if certain else some["layer"],
                text=[f"block {a}, neuron {n}" for a, n in zip(some["layer"], some["neuron"], strict=True)],
                name=name,
                legendgroup=name,
                mode="markers",
                marker={"color": colour, "size": size, "opacity": 0.8},
                hovertemplate="%{text}<br>effect %{x:.3g}, %{y:.3g}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    figure.update_xaxes(title_text=f"screened effect on {found.metric}", row=1, col=1)
    if certain:
        figure.update_yaxes(title_text="effect / standard error, log", type="log", row=1, col=1)
    else:
        figure.update_yaxes(title_text="block", row=1, col=1)


def _checked(found: Screening) -> list[go.Scatter]:
    """Neurons that were ablated exactly, a trace a group."""
    table = found.checked_dataframe()
    groups = (("random neurons", table[table["sample"]], BLUE), ("candidates", table[table["candidate"]], RED))
    return [
        go.Scatter(
            x=some["screened"],
            y=some["exact"],
            error_y={"type": "data", "array": some["exact_standard_error"], "thickness": 1, "width": 0},
            text=[f"block {a}, neuron {n}" for a, n in zip(some["layer"], some["neuron"], strict=True)],
            name=name,
            legendgroup=name,
            showlegend=name != "candidates",
            mode="markers",
            marker={"color": colour, "size": 7},
            hovertemplate="%{text}<br>screened %{x:.3g}, exact %{y:.3g}<extra></extra>",
        )
        for name, some, colour in groups
    ]

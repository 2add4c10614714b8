"""Figures of heads: their circuits from the weights, and what they and neurons write into the output."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from registerlens.circuits.direct import KEYS, DirectContributions
from registerlens.circuits.heads import HeadCircuits
from registerlens.circuits.key_share import KeyShare
from registerlens.viz.theme import BLUE, BROWN, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Mode, apply_theme, ink

_PANELS = {
    "copying": "Copying score of OV",
    "matching": "Matching score of QK",
    "key_gain": "Keys read it (1: random)",
    "query_reading": "Query bias seeks it (score)",
    "ov_gain": "OV passes it on (1: random)",
    "ov_cosine": "OV keeps it (cosine)",
}
_NEUTRAL = {"key_gain": 1.0, "ov_gain": 1.0}
_KEY_COLOURS = dict(zip(KEYS, (BLUE, BROWN, GREEN, RED, GREY, PURPLE, SKY), strict=True))
_NEURONS = 15


def heads_figure(found: HeadCircuits, mode: Mode = "light") -> go.Figure:
    """Maps of layer by head: scores of the circuits, and what they do with the direction; a ring marks what lies beyond
    95% of random directions.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.heads import head_circuits
        >>> len(heads_figure(head_circuits(rl.HookedViT.from_pretrained("registerlens:tiny"))).data)
        2
    """
    names = list(_PANELS) if found.direction else list(_PANELS)[:2]
    columns = min(3, len(names))
    rows = len(names) // columns
    gap = 0.13
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[_PANELS[name] for name in names],
        horizontal_spacing=gap,
        vertical_spacing=0.2,
    )
    width = (1 - gap * (columns - 1)) / columns
    height = (1 - 0.2 * (rows - 1)) / rows
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        values = getattr(found, name) if i < 2 else found.value(name)
        centre = _NEUTRAL.get(name, 0.0)
        reach = float(np.nanmax(np.abs(values - centre), initial=1e-9)) if np.isfinite(values).any() else 1.0
        reach = 1.0 if name in ("copying", "matching", "ov_cosine") else reach
        bar = {"x": column * (width + gap) + width, "len": height, "y": 1 - row * (height + 0.2) - height / 2}
        figure.add_trace(
            go.Heatmap(
                z=values,
                zmin=centre - reach,
                zmax=centre + reach,
                colorscale="RdBu_r",
                colorbar=bar | {"thickness": 10, "xpad": 4},
                hovertemplate="head %{y}.%{x}: %{z:.3g}<extra></extra>",
            ),
            row=row + 1,
            col=column + 1,
        )
        if i >= 2:
            layer, head = np.nonzero(found.beyond_null(name))
            ring = {"symbol": "circle-open", "size": 9, "color": "#1b1f24", "line": {"width": 1.5}}
            rings = go.Scatter(x=head, y=layer, mode="markers", marker=ring, hoverinfo="skip", showlegend=False)
            figure.add_trace(rings, row=row + 1, col=column + 1)
    title = f"Heads of {found.model}" + (f": {found.direction}" if found.direction else "")
    figure.update_layout(title={"text": title, "font": {"size": 14}}, height=150 + rows * 270)
    figure.update_annotations(font_size=13)
    figure = apply_theme(figure, mode).update_layout(hovermode="closest", margin={"t": 90})
    return _layer_by_head(figure, found.copying.shape)


def direct_figure(found: DirectContributions, mode: Mode = "light") -> go.Figure:
    """What heads (by what they attend to) and neurons of each block write along the direction, and the largest neurons.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.circuits.direct import direct_contributions
        >>> found = direct_contributions(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48), 0)
        >>> [bars.name for bars in direct_figure(found).data]
        ['heads: other patches', 'neurons', 'biases', 'largest neurons']
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.14,
        subplot_titles=(f"{found.direction}: {found.value:.3g} in the mean", f"The {_NEURONS} largest neurons"),
    )
    layers = np.arange(found.heads.shape[0])

    def bars(name: str, values: Float[np.ndarray, " layer"], colour: str) -> None:
        figure.add_trace(
            go.Bar(
                x=layers,
                y=values,
                name=name,
                marker={"color": colour, "line": {"width": 0}},
                hovertemplate="block %{x}: %{y:.3g}<extra>" + name + "</extra>",
            ),
            row=1,
            col=1,
        )

    if np.isnan(found.by_key).any():
        bars("heads", found.heads.sum(1), BLUE)
    else:
        for kind, values in zip(KEYS, found.by_key.sum(2), strict=True):
            if values.any():
                bars(f"heads: {kind}", values, _KEY_COLOURS[kind])
    bars("neurons", found.neurons.sum(1), ORANGE)
    bars("biases", found.attn_bias + found.mlp_bias, SKY)
    table = found.top(found.heads.size + found.neurons.size)
    table = table[table["component"] == "neuron"].head(_NEURONS)
    figure.add_trace(
        go.Bar(
            x=table["contribution"],
            y=[f"{layer}: {n}" for layer, n in zip(table["layer"], table["index"], strict=True)],
            error_x={"type": "data", "array": table["standard_error"], "thickness": 1, "width": 2, "color": ink(mode)},
            orientation="h",
            name="largest neurons",
            showlegend=False,
            marker={"color": ORANGE},
            hovertemplate="neuron %{y}: %{x:.3g}<extra></extra>",
        ),
        row=1,
        col=2,
    )
    figure.update_layout(
        barmode="relative", height=460, legend={"orientation": "h", "x": 0, "y": -0.18, "yanchor": "top"}
    )
    figure.update_annotations(font_size=13)
    figure = apply_theme(figure, mode).update_layout(hovermode="closest")
    figure.update_xaxes(title_text="block", dtick=max(1, len(layers) // 12), row=1, col=1)
    figure.update_yaxes(title_text="direct contribution", zeroline=True, zerolinecolor=GREY, row=1, col=1)
    figure.update_xaxes(title_text="direct contribution", row=1, col=2)
    figure.update_yaxes(title_text="block: neuron", type="category", autorange="reversed", row=1, col=2)
    return figure


def key_share_figure(found: KeyShare, mode: Mode = "light") -> go.Figure:
    """Maps of layer by head: how much outliers' keys score above other patches', and how much of it is along u.

    Both maps have one colour scale.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.key_share import key_share
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images
        >>> len(key_share_figure(key_share(vit, images, rl.RegisterNeurons.from_pairs([(1, 183)]))).data)
        2
    """
    titles = ("Advantage of outliers in the score", "Part along the direction")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1, subplot_titles=titles)
    reach = float(np.nanmax(np.abs([found.advantage, found.along])))
    for i, values in enumerate((found.advantage, found.along)):
        figure.add_trace(
            go.Heatmap(
                z=values,
                customdata=found.share,
                zmin=-reach,
                zmax=reach,
                colorscale="RdBu_r",
                showscale=bool(i),
                colorbar={"thickness": 12},
                hovertemplate="head %{y}.%{x}: %{z:.3g} (share along it %{customdata:.0%})<extra></extra>",
            ),
            row=1,
            col=i + 1,
        )
    title = f"Keys of outliers in {found.model}: {found.direction}, {found.n_used} images"
    figure.update_layout(title={"text": title, "font": {"size": 14}}, height=400)
    figure.update_annotations(font_size=13)
    figure = apply_theme(figure, mode).update_layout(hovermode="closest", margin={"t": 90})
    return _layer_by_head(figure, found.along.shape)


def _layer_by_head(figure: go.Figure, shape: tuple[int, ...]) -> go.Figure:
    """Axes of maps with a row a block and a column a head."""
    for update, name, n in ((figure.update_yaxes, "block", shape[0]), (figure.update_xaxes, "head", shape[1])):
        update(title_text=name, showgrid=False, dtick=max(1, n // 6), range=[-0.5, n - 0.5])
    return figure

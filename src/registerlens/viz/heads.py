"""Figures of heads: their circuits from the weights, what they and neurons write; and the logit lens on patches."""

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.circuits.direct import KEYS, DirectContributions
from registerlens.circuits.heads import HeadCircuits
from registerlens.circuits.key_share import KeyShare
from registerlens.circuits.lens import PatchLens
from registerlens.errors import ShapeError
from registerlens.viz.parts import bars, beside, finished, legend, sentence
from registerlens.viz.theme import BLUE, BROWN, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Mode, ink

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
_COLUMNS = 7
"""Maps of the lens beside each other."""


def heads_figure(circuits: HeadCircuits, mode: Mode = "light") -> go.Figure:
    """Maps of layer by head: scores of the circuits, and what they do with the direction; a ring marks what lies beyond
    95% of random directions.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.heads import head_circuits
        >>> len(heads_figure(head_circuits(rl.HookedViT.from_pretrained("registerlens:tiny"))).data)
        2
    """
    names = list(_PANELS) if circuits.direction else list(_PANELS)[:2]
    columns = min(3, len(names))
    rows = len(names) // columns
    gap = 0.13
    titles = [_PANELS[name] for name in names]
    figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=gap, vertical_spacing=0.2)
    width = (1 - gap * (columns - 1)) / columns
    height = (1 - 0.2 * (rows - 1)) / rows
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        values = getattr(circuits, name) if i < 2 else circuits.value(name)
        centre = _NEUTRAL.get(name, 0.0)
        reach = float(np.nanmax(np.abs(values - centre), initial=1e-9)) if np.isfinite(values).any() else 1.0
        reach = 1.0 if name in ("copying", "matching", "ov_cosine") else reach
        bar = {"x": column * (width + gap) + width, "len": height, "y": 1 - row * (height + 0.2) - height / 2}
        cells = go.Heatmap(z=values, zmin=centre - reach, zmax=centre + reach, colorscale="RdBu_r")
        cells.update(colorbar=bar | {"thickness": 10, "xpad": 4})
        cells.update(hovertemplate="head %{y}.%{x}: %{z:.3g}<extra></extra>")
        figure.add_trace(cells, row + 1, column + 1)
        if i >= 2:
            layer, head = np.nonzero(circuits.beyond_null(name))
            ring = {"symbol": "circle-open", "size": 9, "color": "#1b1f24", "line": {"width": 1.5}}
            rings = go.Scatter(x=head, y=layer, mode="markers", marker=ring, hoverinfo="skip", showlegend=False)
            figure.add_trace(rings, row=row + 1, col=column + 1)
    title = f"Heads of {circuits.model}" + (f": {circuits.direction}" if circuits.direction else "")
    figure.update_annotations(font_size=13)
    figure = finished(figure, mode, height=150 + rows * 270, title=sentence(title), margin={"t": 90})
    return _layer_by_head(figure, circuits.copying.shape)


def direct_figure(contributions: DirectContributions, mode: Mode = "light") -> go.Figure:
    """What heads (by what they attend to) and neurons of each block write along the direction, and the largest neurons.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.circuits.direct import direct_contributions
        >>> found = direct_contributions(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48), 0)
        >>> [bars.name for bars in direct_figure(found).data]
        ['heads: other patches', 'neurons', 'biases', 'largest neurons']
    """
    titles = (f"{contributions.direction}: {contributions.value:.3g} in the mean", f"The {_NEURONS} largest neurons")
    figure = beside(*titles, gap=0.14, column_widths=[0.62, 0.38])
    layers = np.arange(contributions.heads.shape[0])
    series = [("heads", contributions.heads.sum(1), BLUE)]
    if not np.isnan(contributions.by_key).any():
        by_kind = zip(KEYS, contributions.by_key.sum(2), strict=True)
        series = [(f"heads: {kind}", values, _KEY_COLOURS[kind]) for kind, values in by_kind if values.any()]
    series.append(("neurons", contributions.neurons.sum(1), ORANGE))
    series.append(("biases", contributions.attn_bias + contributions.mlp_bias, SKY))
    for name, values, colour in series:
        figure.add_trace(bars(layers, values, name, colour, "block %{x}: %{y:.3g}<extra>" + name + "</extra>"), 1, 1)
    table = contributions.top(contributions.heads.size + contributions.neurons.size)
    table = table[table["component"] == "neuron"].head(_NEURONS)
    largest = go.Bar(x=table["contribution"], orientation="h", name="largest neurons", showlegend=False)
    largest.update(y=[f"{layer}: {n}" for layer, n in zip(table["layer"], table["index"], strict=True)])
    error = {"type": "data", "array": table["standard_error"], "thickness": 1, "width": 2, "color": ink(mode)}
    largest.update(error_x=error, marker={"color": ORANGE}, hovertemplate="neuron %{y}: %{x:.3g}<extra></extra>")
    figure.add_trace(largest, 1, 2)
    figure.update_annotations(font_size=13)
    figure = finished(figure, mode, height=460, legend=legend(-0.18, yanchor="top"), barmode="relative")
    figure.update_xaxes(title_text="block", dtick=max(1, len(layers) // 12), row=1, col=1)
    figure.update_yaxes(title_text="direct contribution", zeroline=True, zerolinecolor=GREY, row=1, col=1)
    figure.update_xaxes(title_text="direct contribution", row=1, col=2)
    figure.update_yaxes(title_text="block: neuron", type="category", autorange="reversed", row=1, col=2)
    return figure


def key_share_figure(shares: KeyShare, mode: Mode = "light") -> go.Figure:
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
    figure = beside("Advantage of outliers in the score", "Part along the direction")
    reach = float(np.nanmax(np.abs([shares.advantage, shares.along])))
    for i, values in enumerate((shares.advantage, shares.along)):
        cells = go.Heatmap(z=values, zmin=-reach, zmax=reach, colorscale="RdBu_r", customdata=shares.share)
        cells.update(hovertemplate="head %{y}.%{x}: %{z:.3g} (share along it %{customdata:.0%})<extra></extra>")
        figure.add_trace(cells.update(showscale=bool(i), colorbar={"thickness": 12}), 1, i + 1)
    figure.update_annotations(font_size=13)
    title = f"Keys of outliers in {shares.model}: {shares.direction}, {shares.n_used} images"
    figure = finished(figure, mode, height=400, title=sentence(title), margin={"t": 90})
    return _layer_by_head(figure, shares.along.shape)


def lens_figure(lens: PatchLens, image: int = 0, direction: int | None = None, mode: Mode = "light") -> go.Figure:
    """Maps of one direction on one image, a map a sublayer, all on one colour scale.

    Raises:
        ShapeError: there is no such image, or the direction was not kept.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.circuits.lens import patch_lens
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = patch_lens(vit, torch.rand(2, 3, 48, 48), classes=[3], sublayers=["0.mlp", "5.mlp"])
        >>> len(lens_figure(found, image=1).data)
        2
    """
    if not 0 <= image < lens.values.shape[1]:
        raise ShapeError(f"Image {image} does not exist: there are 0 to {lens.values.shape[1] - 1}.")
    direction = lens.chosen[0] if direction is None else direction
    if direction not in lens.chosen:
        raise ShapeError(f"Direction {direction} was not kept. Name it in classes=; there are {list(lens.chosen)}.")
    maps = lens.values[:, image, lens.chosen.index(direction)].astype(np.float32)
    rows = math.ceil(len(maps) / _COLUMNS)
    columns = min(len(maps), _COLUMNS)
    spacing: Any = {"horizontal_spacing": 0.015, "vertical_spacing": 0.25 / (rows + 1)}
    figure = make_subplots(rows, columns, subplot_titles=lens.sublayers, **spacing)
    for i, values in enumerate(maps):
        cells = go.Heatmap(z=values, customdata=lens.top[i, image], coloraxis="coloraxis")
        hover = f"{lens.sublayers[i]}, row %{{y}}, column %{{x}}: %{{z:.3g}}<br>on top: %{{customdata}}<extra></extra>"
        figure.add_trace(cells.update(hovertemplate=hover), i // _COLUMNS + 1, i % _COLUMNS + 1)
    figure.update_annotations(font_size=12)
    height = 140 + rows * (min(900 / columns, 260) * maps.shape[1] / maps.shape[2] + 40)
    title = sentence(f"Direction {direction} on image {image}, read after each sublayer ({lens.unit})")
    colours = {"colorscale": "Viridis", "colorbar": {"thickness": 14}}
    finished(figure, mode, height=height, title=title, margin={"t": 80}, coloraxis=colours)
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, constrain="domain")
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False, autorange="reversed", constrain="domain")
    for i in range(len(maps)):
        axis = "" if i == 0 else str(i + 1)
        figure.update_layout({f"yaxis{axis}": {"scaleanchor": f"x{axis}"}})
    return figure


def _layer_by_head(figure: go.Figure, shape: tuple[int, ...]) -> go.Figure:
    """Axes of maps with a row a block and a column a head."""
    for update, name, n in ((figure.update_yaxes, "block", shape[0]), (figure.update_xaxes, "head", shape[1])):
        update(title_text=name, showgrid=False, dtick=max(1, n // 6), range=[-0.5, n - 0.5])
    return figure

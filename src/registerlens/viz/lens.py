"""The logit lens on patches: one map a sublayer."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.circuits.lens import PatchLens
from registerlens.errors import ShapeError
from registerlens.viz.theme import Mode, apply_theme

_COLUMNS = 7


def lens_figure(found: PatchLens, image: int = 0, direction: int | None = None, mode: Mode = "light") -> go.Figure:
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
    if not 0 <= image < found.values.shape[1]:
        raise ShapeError(f"Image {image} does not exist: there are 0 to {found.values.shape[1] - 1}.")
    direction = found.chosen[0] if direction is None else direction
    if direction not in found.chosen:
        raise ShapeError(f"Direction {direction} was not kept. Name it in classes=; there are {list(found.chosen)}.")
    maps = found.values[:, image, found.chosen.index(direction)].astype(np.float32)
    rows = math.ceil(len(maps) / _COLUMNS)
    columns = min(len(maps), _COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=found.sublayers,
        horizontal_spacing=0.015,
        vertical_spacing=0.25 / (rows + 1),
    )
    for i, values in enumerate(maps):
        figure.add_trace(
            go.Heatmap(
                z=values,
                customdata=found.top[i, image],
                coloraxis="coloraxis",
                hovertemplate=f"{found.sublayers[i]}, row %{{y}}, column %{{x}}: %{{z:.3g}}"
                "<br>on top: %{customdata}<extra></extra>",
            ),
            row=i // _COLUMNS + 1,
            col=i % _COLUMNS + 1,
        )
    side = 900 / columns
    shape = maps.shape[1] / maps.shape[2]
    title = f"Direction {direction} on image {image}, read after each sublayer ({found.unit})"
    figure.update_layout(
        title={"text": title, "font": {"size": 14}},
        height=140 + rows * (min(side, 260) * shape + 40),
        coloraxis={"colorscale": "Viridis", "colorbar": {"thickness": 14}},
    )
    figure.update_annotations(font_size=12)
    figure = apply_theme(figure, mode).update_layout(hovermode="closest", margin={"t": 80})
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, constrain="domain")
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False, autorange="reversed", constrain="domain")
    for i in range(len(maps)):
        axis = "" if i == 0 else str(i + 1)
        figure.update_layout({f"yaxis{axis}": {"scaleanchor": f"x{axis}"}})
    return figure

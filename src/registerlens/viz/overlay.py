"""A patch map over its photograph, or a row or grid of them, of any values by patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from registerlens.errors import ConfigError, ShapeError
from registerlens.viz.panels import OPACITY, Panel, Scale, panel_figure
from registerlens.viz.theme import Mode, Size


def overlay(
    photographs: UInt8[np.ndarray, "*photograph height width 3"],
    maps: Float[np.ndarray, "*panel grid_h grid_w"]
    | Int[np.ndarray, "*panel grid_h grid_w"]
    | Bool[np.ndarray, "*panel grid_h grid_w"]
    | Float[Tensor, "*panel grid_h grid_w"],
    *,
    patch_size: int | tuple[int, int] | None = None,
    name: str = "value",
    titles: Sequence[str] = (),
    title: str | None = None,
    low: float | int | None = None,
    high: float | int | None = None,
    log: bool = False,
    colours: str = "Viridis",
    columns: int | None = None,
    show_photograph: bool = True,
    opacity: float | int = OPACITY,
    size: Size = "cell",
    mode: Mode = "light",
) -> go.Figure:
    """A patch map over its photograph, or a row or grid of them with one shared colour scale.

    Args:
        photographs: pixels; one for all maps [height, width, 3], or one for each [panel, height, width, 3].
        maps: any values by patch: [grid_h, grid_w], or several [panel, grid_h, grid_w].
        patch_size: height and width of a patch in pixels (an int for a square one), if the photograph has pixels beyond
            the last whole patch; they are not shown. None: the grid divides the photograph.
        name: what the values are, with their unit; for the colour bar and the hover.
        titles: one a map.
        title: of the whole figure.
        low, high: values of the first and last colour; None is zero (or the lowest value) and the highest value.
        log: whether colours go by the logarithm (of positive values); then `low` must be positive.
        colours: a plotly colour scale.
        columns: panels beside each other; None chooses.
        show_photograph: whether the photograph comes first, in colour.
        opacity: of the map: at 1 the photograph is hidden.
        size: "cell" for a notebook; "page" or "column" for a paper.
        mode: light or dark.

    Raises:
        ShapeError: a map has another grid than its photograph has patches, there is not one whole patch, or the number
            of photographs or titles does not fit.
        NonFiniteError: no value is finite.
        ConfigError: more than 128 panels, no column, or colours that do not go up.

    Example:
        >>> photograph = np.zeros((28, 42, 3), np.uint8)
        >>> figure = overlay(photograph, np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), patch_size=14, name="norm")
        >>> figure.data[0].z.shape, figure.layout.coloraxis.colorbar.title.text
        ((2, 3), 'norm')
    """
    values = np.asarray(maps.detach().cpu().float() if isinstance(maps, Tensor) else maps, np.float32)
    values = values[None] if values.ndim == 2 else values
    pictures = photographs[None] if photographs.ndim == 3 else photographs
    if values.ndim != 3 or pictures.ndim != 4 or len(pictures) not in (1, len(values)):
        raise ShapeError(
            f"Got photographs of the shape {list(photographs.shape)} and maps of the shape {list(maps.shape)}; "
            f"expected maps [panel, grid_h, grid_w], and one photograph [height, width, 3] or one for each map."
        )
    if titles and len(titles) != len(values):
        raise ShapeError(f"{len(titles)} titles for {len(values)} maps; one for each is needed.")
    if columns is not None and columns < 1:
        raise ConfigError(f"columns={columns} has no place for a panel. Give at least 1, or None.")
    pictures = whole_patches(pictures, values.shape[1:], patch_size)
    scale = Scale.over(name, [values], log=log, colours=colours)
    scale = replace(scale, low=scale.low if low is None else low, high=scale.high if high is None else high)
    if scale.low >= scale.high or (scale.log and scale.low <= 0):
        raise ConfigError(
            f"The colours would go from {scale.low:g} to {scale.high:g}. Choose low below high, above 0 for log."
        )
    labels = list(titles) or [""] * len(values)
    every: list[Panel] = []
    for i, one in enumerate(values):
        if show_photograph and (i == 0 or len(pictures) > 1):
            every.append(Panel(photograph=pictures[i if len(pictures) > 1 else 0], title="image"))
        every.append(Panel(photograph=pictures[i if len(pictures) > 1 else 0], values=one, title=labels[i]))
    wide = columns or (2 * min(2, len(pictures)) if show_photograph and len(pictures) > 1 else min(len(every), 6))
    rows = [every[i : i + wide] for i in range(0, len(every), wide)]
    return panel_figure(rows, [scale], title=title, opacity=opacity, size=size, mode=mode)


def whole_patches(
    photographs: UInt8[np.ndarray, "panel height width 3"],
    grid: tuple[int, ...],
    patch_size: int | tuple[int, int] | None,
) -> UInt8[np.ndarray, "panel seen_h seen_w 3"]:
    """The pixels that belong to whole patches, if there are as many as the grid says.

    Raises:
        ShapeError: there are others, or none.
    """
    size = photographs.shape[1:3]
    if patch_size is None:
        if any(n < 1 or pixels % n or pixels < n for pixels, n in zip(size, grid, strict=True)):
            raise ShapeError(
                f"A map of {grid[0]} x {grid[1]} patches does not divide a photograph of {size[0]} x {size[1]} pixels. "
                f"Pass patch_size, or the photograph at the size at which the model saw it."
            )
        return photographs
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if min(patch) < 1:
        raise ShapeError(f"patch_size={patch_size} is no patch. Give its height and width in pixels, at least 1.")
    has = tuple(pixels // side for pixels, side in zip(size, patch, strict=True))
    if min(has) < 1:
        raise ShapeError(
            f"A photograph of {size[0]} x {size[1]} pixels has not one whole patch of {patch[0]} x {patch[1]}. "
            f"Take a larger one."
        )
    if has != tuple(grid):
        raise ShapeError(
            f"The map has {grid[0]} x {grid[1]} patches, but a photograph of {size[0]} x {size[1]} pixels has "
            f"{has[0]} x {has[1]} of {patch[0]} x {patch[1]} pixels. Is the map of another image or size?"
        )
    return photographs[:, : has[0] * patch[0], : has[1] * patch[1]]

"""Patch maps over photographs, as one plotly figure: shared colour scales with one bar each, exact values on hover."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from registerlens.errors import ConfigError, NonFiniteError, ShapeError
from registerlens.viz.theme import Mode, Size, apply_theme, width_of

Photograph = UInt8[np.ndarray, "height width 3"]
Grid = Float[np.ndarray, "grid_h grid_w"]

OPACITY = 0.72
"""Of a map over its photograph, which is grey there: hues stay those of the colour bar."""
MOST_PANELS = 256
"""A figure with more of them is slow to draw and large."""
WIDEST = 300
"""Widest panel in pixels."""
_GAP = 6
"""Room between panels in pixels."""
_BAR, _EDGE = 92, 12
"""Room for a colour bar, and the margin, in pixels."""
_UPRIGHT, _LEVEL = 30, 92
"""Room for a row's title, upright beside high panels or level beside low ones, in pixels."""
_LINE, _LETTER = 14, 6.4
"""Height of a line and width of a letter of small text, in pixels."""
_HIGHEST_BAR = 280
"""Of colour bars, in pixels."""
_QUALITY = 82
"""Of JPEG."""
_DECADES = 1e-3
"""Lowest colour of a logarithmic scale over its highest, at least."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What colours mean; shared by all panels that refer to it."""

    name: str
    """What is measured."""
    low: float
    """Value of the lowest colour."""
    high: float
    """Value of the highest colour; what is above has it too."""
    colours: str = "Viridis"
    """A plotly colour scale."""
    log: bool = False
    """Whether colours go by the logarithm."""

    @classmethod
    def over(cls, name: str, values: Sequence[np.ndarray], *, log: bool = False, colours: str = "Viridis") -> Scale:
        """From zero (or the lowest value, if negative) to the highest value; with `log`, over three decades at most.

        Raises:
            NonFiniteError: none of them is finite.

        Example:
            >>> Scale.over("norm", [np.array([[0.5, 2.0]])]).high
            2.0
        """
        every = np.concatenate([np.ravel(one) for one in values])
        every = every[np.isfinite(every)]
        if not len(every):
            raise NonFiniteError(f"There is no finite {name} to draw.")
        high, low = float(every.max()), min(0.0, float(every.min()))
        if log and high > 0:
            low = max(high * _DECADES, float(np.quantile(every[every > 0], 0.01)))
        return cls(name=name, low=low, high=high if high > low else low + 1.0, colours=colours, log=log and high > 0)

    def place(self, values: np.ndarray) -> Float[np.ndarray, "..."]:
        """Values as they are coloured: their logarithms if colours go by it, the lowest colour for zero."""
        values = np.asarray(values, np.float32)
        return np.log10(np.maximum(values, np.float32(self.low))) if self.log else values


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One photograph, alone or under a map."""

    photograph: Photograph
    """Whole patches only."""
    values: Grid | None = None
    """The map; None shows the photograph in colour."""
    scale: int = 0
    """Which of the figure's scales its colours follow."""
    beside: tuple[str, Grid] | None = None
    """Another measure of the same patches, for the hover, with its name."""
    title: str = ""
    """Above the panel."""
    hover: str = "value"
    """What the map shows, for the hover."""
    note: str = ""
    """A few words inside the panel, if it is wide enough."""


def overlay(
    photographs: UInt8[np.ndarray, "*panel height width 3"],
    maps: Float[np.ndarray, "*panel grid_h grid_w"]
    | Int[np.ndarray, "*panel grid_h grid_w"]
    | Bool[np.ndarray, "*panel grid_h grid_w"]
    | Float[Tensor, "*panel grid_h grid_w"],
    *,
    patch_size: int | tuple[int, int] | None = None,
    name: str = "value",
    titles: Sequence[str] = (),
    title: str | None = None,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    colours: str = "Viridis",
    columns: int | None = None,
    show_photograph: bool = True,
    opacity: float = OPACITY,
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
        ConfigError: more than 256 panels.

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
            every.append(Panel(photograph=pictures[i if len(pictures) > 1 else 0], title="photograph"))
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
        if any(pixels % n or pixels < n for pixels, n in zip(size, grid, strict=True)):
            raise ShapeError(
                f"A map of {grid[0]} x {grid[1]} patches does not divide a photograph of {size[0]} x {size[1]} pixels. "
                f"Pass patch_size, or the photograph at the size at which the model saw it."
            )
        return photographs
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
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


def panel_figure(
    rows: Sequence[Sequence[Panel | None]],
    scales: Sequence[Scale],
    *,
    row_titles: Sequence[str] = (),
    title: str | None = None,
    widest: float = WIDEST,
    opacity: float = OPACITY,
    size: Size = "cell",
    mode: Mode = "light",
) -> go.Figure:
    """Panels in rows, none wider than `widest` pixels; None leaves a place empty.

    Raises:
        ConfigError: more panels than `MOST_PANELS`.
    """
    n = sum(panel is not None for row in rows for panel in row)
    if n > MOST_PANELS:
        raise ConfigError(
            f"This figure would have {n} panels, at most {MOST_PANELS} can be drawn. Choose fewer images, layers or "
            f"conditions."
        )
    place = _Places(rows, len(scales), bool(row_titles), title, width_of(size), widest)
    figure = go.Figure()
    figure.update_layout(width=place.width, height=place.height, title=title)
    axis = 0
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            if panel is not None:
                axis += 1
                _draw(figure, panel, axis, place.domain(i, j), place.panel_width, scales[panel.scale], opacity)
        if row_titles:
            figure.add_annotation(**place.row_title(i, row_titles[i]))
    for k, scale in enumerate(scales):
        figure.update_layout(
            {
                f"coloraxis{k + 1 if k else ''}": _colour_axis(
                    scale, k, place.inner_height / len(scales), place.inner_height
                )
            }
        )
    figure = apply_theme(figure, mode).update_layout(hovermode="closest", margin=place.margin)
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)


class _Places:
    """Where everything stands, in pixels and shares of the plot area."""

    def __init__(
        self,
        rows: Sequence[Sequence[Panel | None]],
        n_scales: int,
        row_titles: bool,
        title: str | None,
        width: int,
        widest: float,
    ) -> None:
        n = max(len(row) for row in rows)
        ratios = [max(_ratio(panel) for panel in row if panel is not None) for row in rows]
        for side in (_UPRIGHT, _LEVEL):  # upright titles, unless the panels are too low for them
            self.left = side if row_titles else _EDGE
            self.panel_width = min(widest, (width - self.left - _BAR - _GAP * (n - 1)) / n)
            self.heights = [self.panel_width * ratio for ratio in ratios]
            self.upright = side == _UPRIGHT
            if min(self.heights) >= _LEVEL:
                break
        lines = [max(len(wrapped(panel, self.panel_width)) for panel in row if panel is not None) for row in rows]
        self.above = [_GAP + _LINE * n_lines for n_lines in lines]
        self.inner_width = self.panel_width * n + _GAP * (n - 1)
        self.inner_height = max(sum(self.heights) + sum(self.above), 130.0 * n_scales)
        top = (44 if title else 0) + _EDGE
        self.margin = {"l": self.left, "r": _BAR, "t": top, "b": _EDGE}
        self.width = round(self.inner_width + self.left + _BAR)
        self.height = round(self.inner_height + top + _EDGE)

    def domain(self, row: int, column: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Shares of the plot area, from left to right and from below."""
        x = column * (self.panel_width + _GAP)
        y = sum(self.heights[:row]) + sum(self.above[: row + 1])
        low = 1 - (y + self.heights[row]) / self.inner_height
        return (
            (x / self.inner_width, min(1.0, (x + self.panel_width) / self.inner_width)),
            (max(0.0, low), 1 - y / self.inner_height),
        )

    def row_title(self, row: int, text: str) -> dict[str, Any]:
        """An annotation left of the row."""
        low, high = self.domain(row, 0)[1]
        room = self.heights[row] if self.upright else _LEVEL - _EDGE
        lines = _lines(text, room, 2 if self.upright else max(1, int(self.heights[row] / _LINE)))
        shared = {"xref": "paper", "yref": "paper", "showarrow": False, "font": {"size": 12}}
        where = {"x": 0, "xanchor": "right", "xshift": -4, "y": (low + high) / 2, "yanchor": "middle"}
        return {"text": "<br>".join(lines), "textangle": -90 if self.upright else 0, **shared, **where}


def wrapped(panel: Panel, width: float) -> list[str]:
    """A panel's title in lines that fit above it, two at most."""
    return _lines(panel.title, width, 2)


def _lines(text: str, room: float, most: int) -> list[str]:
    return textwrap.wrap(html.escape(text, quote=False), max(4, int(room / _LETTER)), max_lines=most, placeholder="…")


def _ratio(panel: Panel) -> float:
    height, width = panel.photograph.shape[:2]
    return height / width


def _draw(
    figure: go.Figure,
    panel: Panel,
    number: int,
    domain: tuple[tuple[float, float], tuple[float, float]],
    width: float,
    scale: Scale,
    opacity: float,
) -> None:
    """One panel on axes of its own, in units of patches, so that the hover says row and column."""
    axis = "" if number == 1 else str(number)
    height, wide = panel.photograph.shape[:2]
    grid_h, grid_w = (1, 1) if panel.values is None else panel.values.shape
    (left, right), (bottom, top) = domain
    figure.update_layout(
        {
            f"xaxis{axis}": {"domain": [left, right], "anchor": f"y{axis}", "range": [-0.5, grid_w - 0.5]}
            | {"constrain": "domain"},
            f"yaxis{axis}": {"domain": [bottom, top], "anchor": f"x{axis}", "range": [grid_h - 0.5, -0.5]}
            | {"scaleanchor": f"x{axis}", "scaleratio": (height / grid_h) / (wide / grid_w), "constrain": "domain"},
        }
    )
    figure.add_layout_image(
        source=picture(panel.photograph, width, grey=panel.values is not None),
        xref=f"x{axis}",
        yref=f"y{axis}",
        x=-0.5,
        y=-0.5,
        sizex=grid_w,
        sizey=grid_h,
        xanchor="left",
        yanchor="top",
        sizing="stretch",
        layer="below",
    )
    small = {"xref": "paper", "yref": "paper", "showarrow": False}
    if panel.title:
        text = "<br>".join(wrapped(panel, width))
        above = {"x": (left + right) / 2, "y": top, "xanchor": "center", "yanchor": "bottom", "font": {"size": 12}}
        figure.add_annotation(text=text, **above, **small)
    if panel.note and len(panel.note) * _LETTER < width:
        inside = {"x": right, "y": bottom, "xanchor": "right", "yanchor": "bottom", "borderpad": 2}
        look = {"font": {"size": 10, "color": "#ffffff"}, "bgcolor": "rgba(0,0,0,0.75)"}
        figure.add_annotation(text=panel.note, **inside, **look, **small)
    if panel.values is not None:
        figure.add_trace(_heat_map(panel, panel.values, axis, scale, opacity))


def _heat_map(panel: Panel, values: Grid, axis: str, scale: Scale, opacity: float) -> go.Heatmap:
    """Colours and, in single precision, the exact values for the hover."""
    told = f"patch in row %{{y}}, column %{{x}}<br>{panel.hover}: %{{customdata[0]:.4g}}"
    exact = [values]
    if panel.beside is not None:
        told += f"<br>{panel.beside[0]}: %{{customdata[1]:.4g}}"
        exact.append(panel.beside[1])
    return go.Heatmap(
        z=scale.place(values),
        customdata=np.stack(exact, -1).astype(np.float32),
        name=panel.title,
        coloraxis=f"coloraxis{panel.scale + 1 if panel.scale else ''}",
        xaxis=f"x{axis}",
        yaxis=f"y{axis}",
        opacity=opacity,
        hovertemplate=told + "<extra></extra>",
    )


def _colour_axis(scale: Scale, index: int, room: float, height: float) -> dict[str, Any]:
    """One colour bar a scale, one above the other at the right."""
    name = "<br>".join(textwrap.wrap(scale.name, 14))
    low, high = (float(np.log10(end)) for end in (scale.low, scale.high)) if scale.log else (scale.low, scale.high)
    bar: dict[str, Any] = {
        "title": {"text": name, "font": {"size": 12}},
        "len": min(room, _HIGHEST_BAR),
        "lenmode": "pixels",
        "y": 1 - index * min(room, _HIGHEST_BAR) / height,
        "yanchor": "top",
        "x": 1.0,
        "xpad": 8,
        "thickness": 12,
        "nticks": 5,
        "tickfont": {"size": 11},
        "outlinewidth": 0,
    }
    if scale.log:
        ticks = [m * 10.0**e for e in range(-12, 12) for m in (1, 3) if scale.low <= m * 10.0**e <= scale.high]
        bar |= {"tickvals": np.log10(ticks).tolist(), "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"cmin": low, "cmax": high, "colorscale": scale.colours, "colorbar": bar}


def picture(pixels: Photograph, width: float, *, grey: bool = False) -> str:
    """A JPEG as a data: address, at most twice as wide as it is shown; few pixels become squares, not a blur.

    Example:
        >>> picture(np.zeros((8, 8, 3), np.uint8), 100.0)[:23]
        'data:image/jpeg;base64,'
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if grey:
        image = image.convert("L")
    wanted = 2 * width
    if image.width > wanted:
        image = image.resize((round(wanted), max(1, round(image.height * wanted / image.width))), Image.Resampling.BOX)
    elif image.width * 2 <= wanted:
        times = int(wanted // image.width)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

"""Panels of photographs under patch maps: shared colour scales with one bar each, exact values on hover."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8
from PIL import Image

from registerlens.errors import ConfigError, NonFiniteError
from registerlens.pictures import jpeg_uri
from registerlens.viz.theme import Mode, Size, apply_theme, width_of

Photograph = UInt8[np.ndarray, "height width 3"]
Grid = Float[np.ndarray, "grid_h grid_w"]

OPACITY = 0.72
"""Opacity of a map over its photograph, which is grey there: hues stay those of the colour bar."""
MOST_PANELS = 128
"""A figure with more of them is slow to draw, and larger than 2 MB for 256 patches or 5 MB for 1369."""
WIDEST = 300.0
"""Widest panel in pixels."""
_GAP = 6
"""Room between panels in pixels."""
_BAR, _EDGE = 92, 12
"""Room for a colour bar, and the margin, in pixels."""
_UPRIGHT, _LEVEL = 30, 88
"""Room for a row's title, upright beside high panels or level beside low ones, in pixels."""
_LINE, _LETTER = 14, 6.4
"""Height of a line and width of a letter of small text, in pixels."""
_HIGHEST_BAR = 280
"""Length of the longest colour bar, in pixels."""
_NARROW, _BELOW = 600, 54
"""Below this width colour bars lie under the panels, each so high, in pixels."""
_QUALITY = 82
"""Quality of JPEG pictures."""
_DECADES = 1e-3
"""Lowest colour of a logarithmic scale over its highest, at least."""


@dataclass(frozen=True, kw_only=True)
class ColourScale:
    """What colours mean; shared by all panels that refer to it."""

    name: str
    """What is measured."""
    low: float | int
    """Value of the lowest colour."""
    high: float | int
    """Value of the highest colour; what is above has it too."""
    colours: str = "Viridis"
    """A plotly colour scale."""
    log: bool = False
    """Whether colours go by the logarithm."""

    @classmethod
    def over(
        cls, name: str, values: Sequence[np.ndarray], *, log: bool = False, colours: str = "Viridis"
    ) -> ColourScale:
        """From zero (or the lowest value, if negative) to the highest value; with `log`, over three decades at most.

        Raises:
            NonFiniteError: none of them is finite.

        Example:
            >>> ColourScale.over("norm", [np.array([[0.5, 2.0]])]).high
            2.0
        """
        every = np.concatenate([np.ravel(grid) for grid in values])
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


def panel_figure(
    rows: Sequence[Sequence[Panel | None]],
    scales: Sequence[ColourScale],
    *,
    row_titles: Sequence[str] = (),
    title: str | None = None,
    widest: float | int = WIDEST,
    opacity: float | int = OPACITY,
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
    # Collected first: adding to a figure one by one takes time in the square of their number.
    layout: dict[str, Any] = {"width": place.width, "height": place.height, "images": [], "annotations": []}
    data: list[go.Heatmap] = []
    if title:
        words = "<br>".join(_lines(title, place.width - _EDGE, 2))
        layout["title"] = {"text": words, "font": {"size": 15}}
    axis = 0
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            if panel is not None:
                axis += 1
                suffix = "" if axis == 1 else str(axis)
                _lay_out(layout, panel, suffix, place.domain(i, j), place.panel_width)
                if panel.values is not None:
                    data.append(_heat_map(panel, panel.values, suffix, scales[panel.scale], opacity))
        if row_titles:
            layout["annotations"].append(place.row_title(i, row_titles[i]))
    for k, scale in enumerate(scales):
        layout[f"coloraxis{k + 1 if k else ''}"] = _colour_axis(scale, place.bar(k))
    figure = apply_theme(go.Figure(data, layout), mode)
    return figure.update_layout(hovermode="closest", margin=place.margin)


class _Places:
    """Where everything stands, in pixels and shares of the plot area."""

    def __init__(
        self,
        rows: Sequence[Sequence[Panel | None]],
        n_scales: int,
        row_titles: bool,
        title: str | None,
        width: int,
        widest: float | int,
    ) -> None:
        n = max(len(row) for row in rows)
        ratios = [max(_ratio(panel) for panel in row if panel is not None) for row in rows]
        self.n_scales, self.narrow = n_scales, width < _NARROW
        right, below = (_EDGE, _BELOW * n_scales) if self.narrow else (_BAR, 0)
        for side in (_UPRIGHT, _LEVEL):  # upright titles, unless the panels are too low for them
            left = side if row_titles else _EDGE
            self.panel_width = min(widest, (width - left - right - _GAP * (n - 1)) / n)
            self.heights = [self.panel_width * ratio for ratio in ratios]
            self.upright = side == _UPRIGHT
            if min(self.heights) >= _LEVEL:
                break
        lines = [max(len(wrapped(panel, self.panel_width)) for panel in row if panel is not None) for row in rows]
        self.above = [_GAP + _LINE * n_lines for n_lines in lines]
        self.inner_width = self.panel_width * n + _GAP * (n - 1)
        self.inner_height = max(sum(self.heights) + sum(self.above), 0.0 if self.narrow else 130.0 * n_scales)
        top = (46 if title else 28) + _EDGE  # without a title too, plotly's row of buttons needs a place
        self.margin = {"l": left, "r": right, "t": top, "b": _EDGE + below}
        self.width = round(self.inner_width + left + right)
        self.height = round(self.inner_height + top + _EDGE + below)

    def domain(self, row: int, column: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Shares of the plot area, from left to right and from below."""
        x = column * (self.panel_width + _GAP)
        y = sum(self.heights[:row]) + sum(self.above[: row + 1])
        low = 1 - (y + self.heights[row]) / self.inner_height
        return (
            (x / self.inner_width, min(1.0, (x + self.panel_width) / self.inner_width)),
            (max(0.0, low), 1 - y / self.inner_height),
        )

    def bar(self, index: int) -> dict[str, Any]:
        """Where a colour bar stands: one above the other at the right, or below the panels."""
        if self.narrow:
            y = -(_EDGE + index * _BELOW) / self.inner_height
            return {"orientation": "h", "x": 0.5, "xanchor": "center", "y": y, "yanchor": "top", "len": 0.9}
        room = min(self.inner_height / self.n_scales, _HIGHEST_BAR)
        where = {"x": 1.0, "xpad": 8, "y": 1 - index * room / self.inner_height, "yanchor": "top"}
        return {"len": room, "lenmode": "pixels", **where}

    def row_title(self, row: int, text: str) -> dict[str, Any]:
        """An annotation left of the row."""
        low, high = self.domain(row, 0)[1]
        room = self.heights[row] if self.upright else _LEVEL - _EDGE
        lines = _lines(text, room, 2 if self.upright else max(1, int(self.heights[row] / _LINE)))
        shared = {"xref": "paper", "yref": "paper", "showarrow": False, "font": {"size": 12}}
        where = {"x": 0, "xanchor": "right", "xshift": -4, "y": (low + high) / 2, "yanchor": "middle"}
        return {"text": "<br>".join(lines), "textangle": -90 if self.upright else 0, **shared, **where}


def wrapped(panel: Panel, width: float | int) -> list[str]:
    """A panel's title in lines that fit above it, three at most."""
    return _lines(panel.title, width, 3)


def _lines(text: str, room: float | int, most: int) -> list[str]:
    return textwrap.wrap(html.escape(text, quote=False), max(4, int(room / _LETTER)), max_lines=most, placeholder="…")


def _ratio(panel: Panel) -> float:
    height, width = panel.photograph.shape[:2]
    return height / width


def _lay_out(
    layout: dict[str, Any],
    panel: Panel,
    axis: str,
    domain: tuple[tuple[float, float], tuple[float, float]],
    width: float | int,
) -> None:
    """One panel's axes, in units of patches, so that the hover says row and column; its photograph and its words."""
    height, wide = panel.photograph.shape[:2]
    grid_h, grid_w = (1, 1) if panel.values is None else panel.values.shape
    (left, right), (bottom, top) = domain
    shared = {"constrain": "domain", "visible": False}
    layout[f"xaxis{axis}"] = {"domain": [left, right], "anchor": f"y{axis}", "range": [-0.5, grid_w - 0.5]} | shared
    layout[f"yaxis{axis}"] = {"domain": [bottom, top], "anchor": f"x{axis}", "range": [grid_h - 0.5, -0.5]} | shared
    layout[f"yaxis{axis}"] |= {"scaleanchor": f"x{axis}", "scaleratio": (height / grid_h) / (wide / grid_w)}
    layout["images"].append(
        {
            "source": picture(panel.photograph, width, grey=panel.values is not None),
            "xref": f"x{axis}",
            "yref": f"y{axis}",
            "x": -0.5,
            "y": -0.5,
            "sizex": grid_w,
            "sizey": grid_h,
            "xanchor": "left",
            "yanchor": "top",
            "sizing": "stretch",
            "layer": "below",
        }
    )
    small = {"xref": "paper", "yref": "paper", "showarrow": False}
    if panel.title:
        above = {"x": (left + right) / 2, "y": top, "xanchor": "center", "yanchor": "bottom", "font": {"size": 12}}
        layout["annotations"].append({"text": "<br>".join(wrapped(panel, width)), **above, **small})
    if panel.note and len(panel.note) * _LETTER < width:
        inside = {"x": right, "y": bottom, "xanchor": "right", "yanchor": "bottom", "borderpad": 2}
        look = {"font": {"size": 10, "color": "#ffffff"}, "bgcolor": "rgba(0,0,0,0.75)"}
        layout["annotations"].append({"text": panel.note, **inside, **look, **small})


def _heat_map(panel: Panel, values: Grid, axis: str, scale: ColourScale, opacity: float | int) -> go.Heatmap:
    """Colours and, in single precision, the exact values for the hover."""
    hover = f"patch in row %{{y}}, column %{{x}}<br>{panel.hover}: %{{customdata[0]:.4g}}"
    exact = [values]
    if panel.beside is not None:
        hover += f"<br>{panel.beside[0]}: %{{customdata[1]:.4g}}"
        exact.append(panel.beside[1])
    return go.Heatmap(
        z=scale.place(values),
        customdata=np.stack(exact, -1).astype(np.float32),
        name=panel.title,
        coloraxis=f"coloraxis{panel.scale + 1 if panel.scale else ''}",
        xaxis=f"x{axis}",
        yaxis=f"y{axis}",
        opacity=opacity,
        hovertemplate=hover + "<extra></extra>",
    )


def _colour_axis(scale: ColourScale, place: dict[str, Any]) -> dict[str, Any]:
    """Colours with their bar."""
    level = place.get("orientation") == "h"
    name = scale.name if level else "<br>".join(textwrap.wrap(scale.name, 14))
    low, high = (float(np.log10(end)) for end in (scale.low, scale.high)) if scale.log else (scale.low, scale.high)
    bar: dict[str, Any] = {
        "title": {"text": name, "font": {"size": 12}, "side": "top"},
        "thickness": 10 if level else 12,
        "nticks": 5,
        "tickfont": {"size": 11},
        "outlinewidth": 0,
        **place,
    }
    if scale.log:
        ticks = [m * 10.0**e for e in range(-12, 12) for m in (1, 3) if scale.low <= m * 10.0**e <= scale.high]
        bar |= {"tickvals": np.log10(ticks).tolist(), "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"cmin": low, "cmax": high, "colorscale": scale.colours, "colorbar": bar}


def picture(pixels: Photograph, width: float | int, *, grey: bool = False) -> str:
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
    return jpeg_uri(image, _QUALITY, optimize=True)

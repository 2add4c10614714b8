"""One look for every figure, light or dark: a colour-blind-safe palette (Okabe and Ito), plain axes, three sizes."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go

from registerlens.errors import ConfigError

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
SKY, PURPLE, OLIVE, BROWN = "#56B4E9", "#CC79A7", "#9A9200", "#8C564B"

Mode = Literal["light", "dark"]
Size = Literal["cell", "page", "column"]

CELL = 900
"""Width in pixels of a figure in a notebook's cell."""
MILLIMETRES = {"page": 178.0, "column": 85.0}
"""Widths on paper: of the text, and of one of two columns."""
_FONT, _POINTS = 13, 8
"""Size of text in pixels as drawn, and in points as it shall be printed."""
PRINTED = _POINTS / 72 * 96 / _FONT
"""Size on paper over size as drawn."""

_INK: dict[str, tuple[str, str, str]] = {
    "light": ("#1b1f24", "#ffffff", "#e3e6ea"),
    "dark": ("#e6e8eb", "#15181c", "#31363d"),
}


def ink(mode: Mode = "light") -> str:
    """The colour of text.

    Example:
        >>> ink("dark")
        '#e6e8eb'
    """
    return _INK[mode][0]


def paper(mode: Mode = "light") -> str:
    """The colour of the ground.

    Example:
        >>> paper("dark")
        '#15181c'
    """
    return _INK[mode][1]


def width_of(size: Size) -> int:
    """Width in pixels at which a figure is drawn.

    On paper it is printed at `MILLIMETRES`, which makes its text eight points high; `save_figure` writes PDF and SVG at
    that size.

    Raises:
        ConfigError: there is no such size.

    Example:
        >>> width_of("cell"), width_of("page"), width_of("column")
        (900, 820, 392)
    """
    if size == "cell":
        return CELL
    if size not in MILLIMETRES:
        raise ConfigError(f"size must be one of {['cell', *MILLIMETRES]}, got {size!r}.")
    return round(MILLIMETRES[size] / 25.4 * 96 / PRINTED)


def apply_theme(figure: go.Figure, mode: Mode = "light") -> go.Figure:
    """The same figure in the common look, light or dark.

    Example:
        >>> apply_theme(go.Figure(), "dark").layout.paper_bgcolor
        '#15181c'
    """
    text, paper, grid = _INK[mode]
    figure.update_layout(
        font={"family": "system-ui, sans-serif", "size": 13, "color": text},
        paper_bgcolor=paper,
        plot_bgcolor=paper,
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        hovermode="x unified",
    )
    figure.update_xaxes(gridcolor=grid, zeroline=False, linecolor=grid, ticks="outside", tickcolor=grid)
    figure.update_yaxes(gridcolor=grid, zeroline=False, linecolor=grid)
    return figure

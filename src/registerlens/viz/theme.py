"""One look for every figure, light or dark: a colour-blind-safe palette (Okabe and Ito), plain axes, three sizes."""

import textwrap
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, UInt8

from registerlens.errors import check_choice
from registerlens.pictures import colour

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#5C5C5C"
SKY, PURPLE, OLIVE, BROWN = "#56B4E9", "#CC79A7", "#A4B46C", "#743C17"
_IN_DARK = {BLUE: "#2F7FFF", SKY: "#A0D8FF", GREY: "#C4C4C4", OLIVE: "#F0F040", BROWN: "#855D35"}
"""What stands for colours that a dark ground would swallow, chosen so that all nine stay apart."""
PALETTE = {
    "light": (BLUE, ORANGE, GREEN, RED, GREY, SKY, PURPLE, OLIVE, BROWN),
    "dark": tuple(_IN_DARK.get(one, one) for one in (BLUE, ORANGE, GREEN, RED, GREY, SKY, PURPLE, OLIVE, BROWN)),
}
"""The nine colours of categories in both modes."""

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

_LABEL, _LETTER = 12, 0.62
"""Largest size of labels on cells in pixels; width of a letter over its size, about."""
_BETWEEN, _ENTRY, _TITLE_LETTER = 92, 22, 7.0
"""Room between panels, height of a legend's entry, and width of a letter, in pixels."""

_INK: dict[str, tuple[str, str, str]] = {
    "light": ("#1b1f24", "#ffffff", "#e3e6ea"),
    "dark": ("#e6e8eb", "#15181c", "#31363d"),
}


def look_of(mode: str) -> tuple[str, str, str]:
    """Colours of text, ground and grid.

    Raises:
        ConfigError: there is no such mode.

    Example:
        >>> look_of("light")[1]
        '#ffffff'
    """
    check_choice("mode", mode, _INK)
    return _INK[mode]


def ink(mode: Mode = "light") -> str:
    """The colour of text.

    Example:
        >>> ink("dark")
        '#e6e8eb'
    """
    return look_of(mode)[0]


def paper(mode: Mode = "light") -> str:
    """The colour of the ground.

    Example:
        >>> paper("dark")
        '#15181c'
    """
    return look_of(mode)[1]


def width_of(size: str) -> int:
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
    check_choice("size", size, ["cell", *MILLIMETRES])
    return round(MILLIMETRES[size] / 25.4 * 96 / PRINTED)


def apply_theme(figure: go.Figure, mode: Mode = "light") -> go.Figure:
    """The same figure in the common look, light or dark.

    Raises:
        ConfigError: there is no such mode.

    Example:
        >>> apply_theme(go.Figure(), "dark").layout.paper_bgcolor
        '#15181c'
    """
    text, paper, grid = look_of(mode)
    if mode == "dark":
        _recolour(figure)
    figure.update_layout(
        font={"family": "system-ui, sans-serif", "size": _FONT, "color": text},
        paper_bgcolor=paper,
        plot_bgcolor=paper,
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        hovermode="x unified",
    )
    figure.update_xaxes(gridcolor=grid, zeroline=False, linecolor=grid, ticks="outside", tickcolor=grid)
    figure.update_yaxes(gridcolor=grid, zeroline=False, linecolor=grid)
    return figure


def on_cells(
    text: np.ndarray,
    values: Float[np.ndarray, "row column"],
    low: float,
    high: float,
    scale: str,
    mode: Mode = "light",
    *,
    width: float | int,
) -> dict[str, Any]:
    """Labels of a heat map, each black or white, whichever stands out more from the colour of its cell.

    Plotly would take white or a grey, which do not always reach the contrast that readers need. Where there is no
    value the ground shows, and the label is of the colour of other text. Their size fits the narrow cells of large
    models; plotly would count the markup as letters.

    Args:
        text: a label a cell, of the shape of `values`; empty ones stay empty. Hover labels need their own: their
            ground is another.
        values: what the colours mean, NaN where there is nothing.
        low, high: where the colours end.
        scale: plotly's name of the colours.
        mode: of the figure.
        width: of the map in pixels, about.

    Returns:
        options of `go.Heatmap`.

    Example:
        >>> options = on_cells(np.array([["a", "b"]]), np.array([[0.0, 1.0]]), 0.0, 1.0, "Viridis", width=400)
        >>> options["text"].tolist(), options["textfont"]["size"]
        ([['<span style="color:#ffffff">a</span>', '<span style="color:#000000">b</span>']], 12)
    """
    known = ~np.isnan(values)
    white = _wants_white(colour(np.where(known, values, low), low, high, scale))
    inks = np.where(known, np.where(white, "#ffffff", "#000000"), ink(mode))
    labels = np.array(text, dtype=object)
    for at in zip(*np.nonzero(labels != ""), strict=True):
        labels[at] = f'<span style="color:{inks[at]}">{labels[at]}</span>'
    letters = max(map(len, np.ravel(text)), default=0) * values.shape[1]
    size = max(1, min(_LABEL, width / (_LETTER * max(letters, 1))))
    return {"text": labels, "texttemplate": "%{text}", "textfont": {"size": size}}


def _wants_white(ground: UInt8[np.ndarray, "*cell rgb"]) -> Bool[np.ndarray, "*cell"]:
    """Whether white stands out more than black, by the relative luminance of WCAG 2; one of them always has 4.5."""
    share = ground / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05


def _recolour(figure: go.Figure) -> None:
    """Colours of lines, marks and fills as they are on a dark ground."""
    layout: Any = figure.layout
    traces: Any = figure.data
    for trace in traces:
        for owner in (trace, *(trace[part] for part in ("line", "marker") if part in trace)):
            for name in ("color", "fillcolor"):
                if name in owner and owner[name] is not None:
                    owner[name] = _dark(owner[name])
    for shape in layout.shapes:
        shape.line.color = _dark(shape.line.color)
    for note in layout.annotations:
        note.arrowcolor = _dark(note.arrowcolor)


def _dark(colour: Any) -> Any:
    if isinstance(colour, str):
        return _IN_DARK.get(colour, colour)
    return [_dark(part) for part in colour] if isinstance(colour, (list, tuple)) else colour


def sized(figure: go.Figure, size: Size) -> go.Figure:
    """The same figure for a notebook's cell, whose width it takes, or for a page or a column of a paper.

    In a column, panels that stand side by side are put below each other. Map figures are drawn for their size from the
    start; this is for figures with axes.

    Raises:
        ConfigError: there is no such size.

    Example:
        >>> sized(go.Figure(), "page").layout.width
        820
    """
    width = width_of(size)
    if size == "cell":
        return figure
    figure = go.Figure(figure).update_layout(width=width)
    layout: Any = figure.layout
    if size == "column":
        _stack(figure)
    if layout.title.text:
        lines = textwrap.wrap(layout.title.text, int(width / 8.5))
        figure.update_layout(title={"text": "<br>".join(lines), "font": {"size": 14}})
    return figure


def _stack(figure: go.Figure) -> None:
    """Panels below each other, with their titles, and the legends below them."""
    layout: Any = figure.layout
    traces: Any = figure.data
    panels = _panels(figure)
    if len({round(y.domain[1], 6) for _, y in panels}) == len(panels):
        return
    margin = layout.margin
    inner = layout.height - margin.t - margin.b
    heights = [(y.domain[1] - y.domain[0]) * inner for _, y in panels]
    total = sum(heights) + _BETWEEN * (len(panels) - 1)
    titles = {id(note): i for note in layout.annotations for i, (x, y) in enumerate(panels) if _is_title(note, x, y)}
    top = 1.0
    tops = []
    for (x, y), height in zip(panels, heights, strict=True):
        x.domain, y.domain = (0, 1), (max(0.0, top - height / total), top)
        y.showticklabels = True
        tops.append(top)
        top -= (height + _BETWEEN) / total
    width = layout.width - margin.l - margin.r
    for note in layout.annotations:
        if id(note) in titles:
            text = "<br>".join(textwrap.wrap(note.text.replace("<br>", " "), int(width / _TITLE_LETTER)))
            note.update(x=0.5, y=tops[titles[id(note)]], text=text, font={"size": 13})
    below = 60.0
    for name in ("legend", "legend2"):
        entries = sum(trace.showlegend is not False and (trace.legend or "legend") == name for trace in traces)
        if entries:
            layout[name].update(x=0, y=-below / total, xanchor="left", yanchor="top", yref="paper", orientation="v")
            below += _ENTRY * entries + 8
    figure.update_layout(height=round(total + margin.t + below), margin={"b": below})


def _panels(figure: go.Figure) -> list[tuple[Any, Any]]:
    """Pairs of axes, from the top left to the bottom right; those without a trace are taken out of sight."""
    layout: Any = figure.layout
    traces: Any = figure.data
    pairs = {name[1:]: (layout[name], layout["y" + name[1:]]) for name in layout if name.startswith("xaxis")}
    used = {(trace.yaxis or "y").replace("y", "axis") for trace in traces}
    for name in set(pairs) - used:
        x, y = pairs.pop(name)
        x.visible = y.visible = False
        for note in layout.annotations:
            if x.domain is not None and y.domain is not None and _is_title(note, x, y):
                note.visible = False
    pairs = [(x, y) for x, y in pairs.values() if x.domain is not None and y.domain is not None]
    return sorted(pairs, key=lambda pair: (-round(pair[1].domain[1], 3), pair[0].domain[0]))


def _is_title(note: Any, x: Any, y: Any) -> bool:
    if (note.xref, note.yref) != ("paper", "paper"):
        return False
    return abs(note.x - sum(x.domain) / 2) < 1e-3 and abs(note.y - y.domain[1]) < 1e-3

"""What figures are made of: panels, curves, dots, bars, intervals, notes, and the last strokes that all have in common.

Colours are the light palette's; `finished` puts the dark ones in their place.
"""

from typing import Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from registerlens.viz.theme import GREY, Mode, apply_theme

SMALL = 14
"""Size of a title that is a sentence, in pixels."""


def beside(*titles: str, gap: float = 0.1, **more: Any) -> go.Figure:
    """Panels beside each other, each under its title.

    Example:
        >>> beside("left", "right").layout.annotations[1].text
        'right'
    """
    return make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=gap, **more)


def curve(
    x: Any,
    y: Any,
    name: str | None,
    colour: str,
    hover: str | None = "%{y:.3g}",
    *,
    dash: str | None = None,
    mode: str | None = "lines+markers",
    **more: Any,
) -> go.Scatter:
    """A line, with a mark at every value unless `mode` is another.

    Example:
        >>> curve([0, 1], [2, 3], "norm", GREY, dash="dot").line.dash
        'dot'
    """
    line = {"color": colour, "dash": dash}
    return go.Scatter(x=x, y=y, name=name, mode=mode, line=line, hovertemplate=hover, **more)


def dots(
    x: Any, y: Any, name: str | None, colour: Any, size: int, hover: str, *, look: Any = (), **more: Any
) -> go.Scatter:
    """Single values; `look` is what else marks have, such as a symbol.

    Example:
        >>> dots([0], [1], "heads", GREY, 5, "%{y}").hovertemplate
        '%{y}<extra></extra>'
    """
    marker = {"color": colour, "size": size, **dict(look)}
    return go.Scatter(
        x=x, y=y, name=name, mode="markers", marker=marker, hovertemplate=f"{hover}<extra></extra>", **more
    )


def bars(x: Any, y: Any, name: str | None, colour: Any, hover: str, **more: Any) -> go.Bar:
    """Bars without an edge, so that narrow ones keep their colour.

    Example:
        >>> bars([0], [1], "images", GREY, "%{y}").marker.line.width
        0
    """
    return go.Bar(x=x, y=y, name=name, marker={"color": colour, "line": {"width": 0}}, hovertemplate=hover, **more)


def interval(middle: Any, low: Any, high: Any, **look: Any) -> dict[str, Any]:
    """Error bars from low to high.

    Example:
        >>> interval(1.0, 0.5, 3.0, width=3)
        {'type': 'data', 'array': 2.0, 'arrayminus': 0.5, 'width': 3}
    """
    return {"type": "data", "array": high - middle, "arrayminus": middle - low, **look}


def note(figure: go.Figure, text: str, x: Any, y: Any, side: Literal["left", "center", "right"], **where: Any) -> None:
    """Words in a panel, below their height and beginning, centred or ending at `x`.

    Args:
        figure: that gets them.
        text: what they say.
        x, y: where, in units of the axes unless `where` has `xref` or `yref`.
        side: which of theirs stands there.
        where: the panel's row and column, and further options of an annotation.

    Example:
        >>> figure = go.Figure()
        >>> note(figure, "onset", 2, 1, "left", yref="y domain")
        >>> figure.layout.annotations[0].yanchor
        'top'
    """
    figure.add_annotation(text=text, x=x, y=y, xanchor=side, **{"yanchor": "top", "showarrow": False, **where})


def mark(figure: go.Figure, column: int, *, x: Any = None, y: Any = None, dash: str = "dash", row: int = 1) -> None:
    """A thin grey line through a panel with something in it, upright at `x` or level at `y`.

    Example:
        >>> figure = beside("left", "right").add_trace(curve([2, 4], [0, 1], "norm", GREY), 1, 2)
        >>> mark(figure, 2, x=3)
        >>> figure.layout.shapes[0].xref
        'x2'
    """
    style: Any = {"color": GREY, "dash": dash, "width": 1}
    where: Any = {"line": style, "row": row, "col": column}
    figure.add_vline(x=x, **where) if y is None else figure.add_hline(y=y, **where)


def legend(y: float, **more: Any) -> dict[str, Any]:
    """A level legend at that height, in units of the panels': below 0 it stands under them, above 1 over them.

    Example:
        >>> legend(-0.2)["orientation"]
        'h'
    """
    return {"orientation": "h", "x": 0, "y": y, **more}


def sentence(text: str, **more: Any) -> dict[str, Any]:
    """A title that is long, in smaller letters.

    Example:
        >>> sentence("8 images")["font"]
        {'size': 14}
    """
    return {"text": text, "font": {"size": SMALL}, **more}


def finished(
    figure: go.Figure,
    mode: Mode,
    *,
    height: float | int,
    closest: bool = True,
    margin: dict[str, int] | None = None,
    grid: bool = True,
    **layout: Any,
) -> go.Figure:
    """The figure with its height, title and legend, in the common look.

    Args:
        figure: with all that it shows.
        mode: light or dark.
        height: in pixels, at the width of a notebook's cell.
        closest: whether hovering tells of the nearest point alone, not of all curves at that place.
        margin: where it is not the common one, in pixels.
        grid: False for maps, whose cells would lie over it.
        layout: title, legend and more, as plotly names them.

    Example:
        >>> finished(beside("left"), "light", height=420, legend=legend(-0.2)).layout.hovermode
        'closest'
    """
    apply_theme(figure.update_layout(height=height, **layout), mode).update_layout(margin=margin or {})
    if closest:
        figure.update_layout(hovermode="closest")
    if not grid:
        figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)
    return figure


def ticks_of_blocks(n: int, most: int = 12) -> dict[str, Any]:
    """Ticks at some `most` of n blocks, the first among them: options of an axis.

    Example:
        >>> ticks_of_blocks(40)
        {'tick0': 0, 'dtick': 3}
    """
    return {"tick0": 0, "dtick": max(1, n // most)}

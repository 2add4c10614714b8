"""Figures for a notebook's cell, a page or a column of a paper."""

from __future__ import annotations

import textwrap
from typing import Any

import plotly.graph_objects as go

from registerlens.viz.theme import Size, width_of

_BETWEEN, _ENTRY, _LETTER = 92, 22, 7.0
"""Room between panels, height of a legend's entry, and width of a letter, in pixels."""


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
            text = "<br>".join(textwrap.wrap(note.text.replace("<br>", " "), int(width / _LETTER)))
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

"""A figure for those who do not see it: what is drawn, and its numbers in words."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go

_MOST = 12
"""Series told; the rest is counted."""


def in_words(figure: go.Figure) -> str:
    """Title, axes, and of each series its range and its end, as plain text.

    Example:
        >>> in_words(go.Figure(go.Scatter(x=[0, 1, 2], y=[1.0, 9.0, 4.0], name="norm"), {"title": "T & <b>U</b>"}))
        'T & U. 1 series. norm: from 1 (at 0) to 9 (at 1), last 4.'
    """
    axes = [f"{axis}: {', '.join(titles)}" for axis in "xy" if (titles := _axis_titles(figure, axis))]
    told = [words for trace in figure.data if (words := _series(trace))]
    more = [f"And {len(told) - _MOST} more"] if len(told) > _MOST else []
    title = [_plain(figure.layout.title.text)] if figure.layout.title.text else []
    number = [f"{len(told)} series"] if told else []
    return " ".join(f"{part.rstrip('.')}." for part in (*title, *axes, *number, *told[:_MOST], *more))


def _axis_titles(figure: go.Figure, axis: str) -> list[str]:
    titles = (figure.layout[key].title.text for key in figure.layout if re.fullmatch(f"{axis}axis\\d*", key))
    return list(dict.fromkeys(_plain(title) for title in titles if title))


def _series(trace: Any) -> str:
    """One series: nothing for a drawn line without numbers of its own."""
    name = _plain(trace.name or "") or {"heatmap": "map", "histogram": "histogram"}.get(trace.type, "series")
    values, places = (trace.z, None) if trace.type == "heatmap" else (trace.y, trace.x)
    if trace.type in ("bar", "scatter") and getattr(trace, "orientation", None) == "h":
        values, places = trace.x, trace.y
    numbers = _numbers(values)
    if numbers is None or not np.isfinite(numbers).any():
        return ""
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    if numbers.ndim != 1 or places is None or len(places) != len(numbers):
        return f"{name}: from {low:.3g} to {high:.3g}"
    lowest, highest = (_plain(str(places[int(find(numbers))])) for find in (np.nanargmin, np.nanargmax))
    last = numbers[np.isfinite(numbers)][-1]
    return f"{name}: from {low:.3g} (at {lowest}) to {high:.3g} (at {highest}), last {last:.3g}"


def _numbers(values: Iterable[Any] | None) -> np.ndarray | None:
    """As floats; gaps are NaN. None for words."""
    if values is None:
        return None
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        return None


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<br ?/?>", " ", re.sub(r"</?(b|i|sup|sub|em)>", "", text))))

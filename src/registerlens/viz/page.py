"""The frame of a page that needs no other file, and what stands in it: sections, figures, maps."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from registerlens.markup import asset, policy, render, write_html
from registerlens.pictures import colour, data_uri

_MARKUP = re.compile(r'<(?!/?(br|b|i|em|sub|sup|extra|span)\s*/?>|span style="color:#[0-9a-f]{6}">)')
"""A `<` that begins none of the tags our figures use."""
_MOST = 12
"""Series of a figure that are put into words; the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page with a heading, listed in the table of contents."""

    id: str
    """Where links lead: letters, digits, hyphens."""
    title: str
    """The heading, plain text."""
    body: Markup
    """What follows it."""
    scripts: tuple[str, ...] = ()
    """Scripts in it, which the page lets run."""

    def to_html(self) -> Markup:
        """The section as HTML.

        Example:
            >>> Section(id="a", title="T & U", body=Markup("<p>x</p>")).to_html()
            Markup('<section aria-labelledby="a"><h2 id="a">T &amp; U</h2><p>x</p></section>')
        """
        return render("report/section.html", **vars(self))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small picture with its caption."""

    source: str
    """A data: address."""
    caption: tuple[str, ...]
    """Lines of plain text."""
    words: str
    """What is seen, for those who do not see it."""
    width: int
    """Together with the height: the shape in which it is shown."""
    height: int
    """See width."""
    kind: str = ""
    """"map" where each pixel is a patch."""


def write_page(
    path: str | Path, title: str, facts: Sequence[str], sections: Sequence[Section], footer: str = ""
) -> Path:
    """Write the page, whole or not at all, plotly's script inside; it opens from disk and can ask no network.

    Args:
        path: the HTML file.
        title: the heading, plain text.
        facts: plain text below it, set apart by dots.
        sections: the page; where they are several, a table of contents lists them.
        footer: plain text.

    Returns:
        the path.

    Example:
        >>> import tempfile
        >>> hello = Section(id="hello", title="Hello", body=Markup("<p>hello</p>"))
        >>> page = write_page(Path(tempfile.mkdtemp()) / "page.html", "T & U", ["tiny"], [hello])
        >>> "<h1>T &amp; U</h1>" in page.read_text()
        True
    """
    more = [script for section in sections for script in section.scripts]
    about = {"facts": facts, "sections": sections, "footer": footer, "style": asset("page/page.css")}
    return _write(path, "report/page.html", asset("page/plots.js", "page/page.js"), more, title=title, **about)


def write_figure(path: str | Path, figure: go.Figure) -> Path:
    """Write a page with one figure and nothing else, whole or not at all; returns the path."""
    layout: Any = figure.layout
    title = _plain(layout.title.text or "Figure")
    return _write(path, "figure.html", asset("page/plots.js"), figure=plotted(figure), title=title)


def _write(path: str | Path, template: str, script: str, more: Sequence[str] = (), **values: Any) -> Path:
    plotly = Markup(get_plotlyjs())
    # Plotly draws many points with WebGL, and makes the functions that feed it from text.
    allowed = policy([plotly, script, *more], compiles=True)
    return write_html(path, render(template, plotly=plotly, script=script, policy=allowed, **values))


# Pictures ------------------------------------------------------------------------------------------------------------


def photograph(pixels: UInt8[np.ndarray, "height width rgb"], name: str) -> Picture:
    """An image as the model sees it, with its name below."""
    name, (height, width) = Path(name).name, pixels.shape[:2]
    source, words = data_uri(np.ascontiguousarray(pixels)), f"The image {name} itself"
    return Picture(source=source, caption=(name,), words=words, width=width, height=height)


def map_picture(
    values: Float[np.ndarray, "grid_h grid_w"],
    highest: float,
    caption: Sequence[str],
    like: UInt8[np.ndarray, "height width rgb"],
    what: str = "Map",
) -> Picture:
    """A map from 0 to `highest` in the shape of its image; `what` says in words what is seen."""
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    words = (
        f"{what}: largest {values.max():.3g}, at row {row + 1} of {values.shape[0]} and column {column + 1} of "
        f"{values.shape[1]}; median {np.median(values):.2g}"
    )
    (height, width), source = like.shape[:2], data_uri(colour(values, 0.0, highest))
    return Picture(source=source, caption=tuple(caption), words=words, width=width, height=height, kind="map")


# Figures -------------------------------------------------------------------------------------------------------------


def plotted(figure: go.Figure, words: str = "") -> Markup:
    """A figure for a page that has plotly's script, with its numbers in words for those who do not see it.

    Where its curves are no series of numbers, give better words.

    Names in it are shown as text: plotly would read `<a href=...>` in them as a link.

    Example:
        >>> page = plotted(go.Figure(layout={"title": "<a href='x'>b</a>"}))
        >>> "cdn.plot.ly" in page, "u003ca href" in page, "lt;a href" in page
        (False, False, True)
    """
    layout: Any = figure.layout
    about = {"words": words or in_words(figure), "width": layout.width, "height": layout.height}
    return render("report/plot.html", figure=_as_text(json.loads(figure.to_json() or "{}")), **about)


def _as_text(value: Any) -> Any:
    """The same figure, in which no text has other markup than our own."""
    if isinstance(value, dict):
        return {key: _as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_text(inner) for inner in value]
    return _MARKUP.sub("&lt;", value) if isinstance(value, str) else value


def in_words(figure: go.Figure) -> str:
    """Title, axes, and of each series its range and its end, as plain text.

    Example:
        >>> in_words(go.Figure(go.Scatter(x=[0, 1, 2], y=[1.0, 9.0, 4.0], name="norm"), {"title": "T & <b>U</b>"}))
        'T & U. 1 series. norm: from 1 (at 0) to 9 (at 1), last 4.'
    """
    layout: Any = figure.layout
    axes = [f"{axis}: {', '.join(titles)}" for axis in "xy" if (titles := _axis_titles(layout, axis))]
    sentences = [words for trace in figure.data if (words := _series(trace))]
    more = [f"And {len(sentences) - _MOST} more"] if len(sentences) > _MOST else []
    title = [_plain(layout.title.text)] if layout.title.text else []
    number = [f"{len(sentences)} series"] if sentences else []
    return " ".join(f"{part.rstrip('.')}." for part in (*title, *axes, *number, *sentences[:_MOST], *more))


def _axis_titles(layout: Any, axis: str) -> list[str]:
    keys = [key for key in layout if re.fullmatch(f"{axis}axis\\d*", key)]
    titles = (layout[key].title.text for key in sorted(keys, key=lambda key: (len(key), key)))  # plotly's are a set
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

"""The frame of a page that needs no other file, and its building blocks: text, figures, tables, rows of pictures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
from jaxtyping import Float, UInt8
from plotly.offline import get_plotlyjs

from registerlens.files import whole_file
from registerlens.viz.alternative import in_words
from registerlens.viz.maps import colour, colour_bar, data_uri

_ASSETS = files("registerlens") / "assets" / "page"
_MARKUP = re.compile(r'<(?!/?(br|b|i|em|sub|sup|extra|span)\s*/?>|span style="color:#[0-9a-f]{6}">)')
"""A `<` that begins none of the tags our figures use."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page with a heading, listed in the table of contents."""

    id: str
    """Where links lead: letters, digits, hyphens."""
    title: str
    """The heading, plain text."""
    body: str
    """What follows it, HTML."""

    def to_html(self) -> str:
        """The section as HTML.

        Example:
            >>> Section(id="a", title="T & U", body="<p>x</p>").to_html()
            '<section aria-labelledby="a"><h2 id="a">T &amp; U</h2><p>x</p></section>'
        """
        title = f'<h2 id="{self.id}">{html.escape(self.title)}</h2>'
        return f'<section aria-labelledby="{self.id}">{title}{self.body}</section>'


def write_page(
    path: str | Path, title: str, facts: Sequence[str], body: Sequence[Section | str], footer: str = ""
) -> Path:
    """Write the page, whole or not at all, plotly's script inside; it opens from disk without a network.

    Args:
        path: the HTML file.
        title: the heading, plain text.
        facts: plain text below it, set apart by dots.
        body: sections, which are listed in the table of contents, and HTML, which is not.
        footer: HTML.

    Returns:
        the path.

    Example:
        >>> import tempfile
        >>> page = write_page(Path(tempfile.mkdtemp()) / "page.html", "T & U", ["tiny"], ["<p>hello</p>"])
        >>> "<h1>T &amp; U</h1>" in page.read_text()
        True
    """
    path = Path(path)
    style, script = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    contents = _contents([part for part in body if isinstance(part, Section)])
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{style}</style><script>{get_plotlyjs()}</script></head><body>
<a class="skip" href="#main">Skip to the content</a>
<header><h1>{html.escape(title)}</h1>
<p class="sub">{html.escape(" · ".join(facts))}</p></header>
<div class="columns">{contents}<main id="main" tabindex="-1">
{"".join(part.to_html() if isinstance(part, Section) else part for part in body)}
</main></div>
<footer>{footer} Made with RegisterLens.</footer><script>{script}</script>
</body></html>
"""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _contents(sections: Sequence[Section]) -> str:
    """The table of contents; a page of one section needs none."""
    if len(sections) < 2:
        return ""
    items = "".join(f'<li><a href="#{part.id}">{html.escape(part.title)}</a></li>' for part in sections)
    return f'<nav aria-label="Contents"><details open><summary>Contents</summary><ol>{items}</ol></details></nav>'


def plotted(figure: go.Figure, words: str = "") -> str:
    """A figure for a page that has plotly's script, with its numbers in words for those who do not see it.

    Where its curves are no series of numbers, give better words.

    Names in it are shown as text: plotly would read `<a href=...>` in them as a link.

    Example:
        >>> page = plotted(go.Figure(layout={"title": "<a href='x'>b</a>"}))
        >>> "cdn.plot.ly" in page, "003ca href" in page  # plotly writes < as its code
        (False, False)
    """
    told = html.escape(words or in_words(figure))
    drawn = plotly.io.to_html(
        _as_text(json.loads(figure.to_json() or "{}")),
        full_html=False,
        include_plotlyjs=False,
        config={"displaylogo": False, "responsive": True},
        validate=False,
    )
    return (
        f'<figure class="plot"><div class="wide" role="group" tabindex="0" aria-label="{told}">{drawn}</div>'
        f"<details><summary>This figure in words</summary><p>{told}</p></details></figure>"
    )


def _as_text(value: Any) -> Any:
    """The same figure, in which no text has other markup than our own."""
    if isinstance(value, dict):
        return {key: _as_text(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    return _MARKUP.sub("&lt;", value) if isinstance(value, str) else value


def heading(title: str, at: str) -> str:
    """A heading inside a section, plain text, which can be linked to; `at` is the section's id.

    Example:
        >>> heading("Who reads it?", "kernels")
        '<h3 id="kernels-who-reads-it">Who reads it?</h3>'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return f'<h3 id="{at}-{slug}">{html.escape(title)}</h3>'


def answer(kind: str, head: str, words: str) -> str:
    """A box with the answer in a word, and what it rests on; `kind` is "good", "bad" or "calm", `words` is HTML."""
    return f'<div class="verdict {kind}"><strong>{html.escape(head)}</strong><br>{words}</div>'


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], marked: Collection[int] = (), caption: str = ""
) -> str:
    """A table of HTML cells, the first of each row its heading; the rows of these indices stand out.

    Args:
        headers: HTML.
        rows: HTML.
        marked: indices.
        caption: what the table shows, plain text.

    Example:
        >>> table(["a"], [["1"], ["2"]], marked=[1]).count('class="marked"')
        1
    """
    head = "".join(f'<th scope="col">{header}</th>' for header in headers)
    body = ""
    for i, (first, *others) in enumerate(rows):
        mark = ' class="marked"' if i in marked else ""
        body += f'<tr{mark}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'
    told = html.escape(caption)
    label = f' role="region" aria-label="{told}"' if caption else ""
    above = f"<caption>{told}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0"{label}><table>{above}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def scale_bar() -> str:
    """The colour scale of all maps, for running text."""
    return f'<img class="bar" alt="dark violet over green to yellow" src="{data_uri(colour_bar())}">'


def photograph(pixels: UInt8[np.ndarray, "height width rgb"], name: str) -> str:
    """An image as the model sees it, with its name below."""
    name = Path(name).name
    return _figure(
        data_uri(np.ascontiguousarray(pixels)), html.escape(name), _ratio(pixels), "", f"The image {name} itself"
    )


def map_picture(
    values: Float[np.ndarray, "grid_h grid_w"],
    highest: float,
    caption: str,
    like: UInt8[np.ndarray, "height width rgb"],
    what: str = "Map",
) -> str:
    """A map from 0 to `highest` in the shape of its image; the caption is HTML, `what` plain text."""
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    seen = (
        f"{what}: largest {values.max():.3g}, at row {row + 1} of {values.shape[0]} and column {column + 1} of "
        f"{values.shape[1]}; median {np.median(values):.2g}"
    )
    return _figure(data_uri(colour(values, 0.0, highest)), caption, _ratio(like), "map", seen)


def beside(pictures: Sequence[str], columns: int) -> str:
    """Pictures side by side, in a grid of so many columns; fewer where the window is narrow."""
    return f'<div class="maps" style="--columns:{columns}">{"".join(pictures)}</div>'


def _ratio(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    return f"aspect-ratio:{width}/{height}"


def _figure(source: str, caption: str, style: str, kind: str, seen: str) -> str:
    return (
        f'<figure><img class="{kind}" style="{style}" src="{source}" alt="{html.escape(seen)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )

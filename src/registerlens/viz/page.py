"""The frame of a page that needs no other file, and its building blocks: text, figures, tables, rows of pictures."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8
from plotly.offline import get_plotlyjs

from registerlens.files import whole_file
from registerlens.viz.maps import colour, colour_bar, data_uri

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } .sub { color: #57606a; margin-top: .2rem; } h2 { margin-top: 2.4rem; }
.verdict { border-left: 6px solid; padding: .6rem 1rem; margin: .8rem 0; background: #f6f8fa; }
.bad { border-color: #D55E00; } .calm { border-color: #0072B2; } .good { border-color: #009E73; }
.verdict strong { font-size: 1.25rem; } a { color: #0072B2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e6ea; vertical-align: top; }
th { vertical-align: bottom; font-weight: 600; max-width: 9em; }
th:first-child, td:first-child { text-align: left; } tr.marked td { background: #fff1e0; font-weight: 600; }
td small { display: block; color: #57606a; font-size: 11px; font-weight: 400; white-space: nowrap; }
.maps { display: grid; gap: .5rem .8rem; align-items: start; margin: 1rem 0 1.6rem; }
.maps figure { margin: 0; } .maps img { width: 100%; display: block; border-radius: 3px; }
.maps .map { image-rendering: pixelated; } figcaption { font-size: 12px; line-height: 1.35; color: #57606a; }
.reason { color: #57606a; font-style: italic; } details li { margin: .4rem 0; }
.bar { height: 8px; width: 100px; vertical-align: middle; }
footer { color: #57606a; font-size: 13px; border-top: 1px solid #e3e6ea; margin-top: 2rem; padding-top: .6rem; }
"""


def write_page(path: str | Path, title: str, facts: Sequence[str], body: Sequence[str], footer: str = "") -> Path:
    """Write the page, whole or not at all, plotly's script inside; it opens from disk without a network.

    Args:
        path: the HTML file.
        title: the heading, plain text.
        facts: plain text below it, set apart by dots.
        body: the sections as HTML.
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
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>
<h1>{html.escape(title)}</h1>
<p class="sub">{html.escape(" · ".join(facts))}</p>
{"".join(body)}
<footer>{footer} Made with RegisterLens.</footer>
</body></html>
"""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def plotted(figure: go.Figure) -> str:
    """A figure for a page that has plotly's script.

    Example:
        >>> "<script" in plotted(go.Figure()), "cdn.plot.ly" in plotted(go.Figure())
        (True, False)
    """
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})


def answer(kind: str, head: str, words: str) -> str:
    """A box with the answer in a word, and what it rests on; `kind` is "good", "bad" or "calm", `words` is HTML."""
    return f'<div class="verdict {kind}"><strong>{html.escape(head)}</strong><br>{words}</div>'


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], marked: Collection[int] = ()) -> str:
    """A table of HTML cells; the rows of these indices stand out.

    Example:
        >>> table(["a"], [["1"], ["2"]], marked=[1]).count('class="marked"')
        1
    """
    head = "".join(f"<th>{header}</th>" for header in headers)
    body = ""
    for i, row in enumerate(rows):
        mark = ' class="marked"' if i in marked else ""
        body += f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def scale_bar() -> str:
    """The colour scale of all maps, for running text."""
    return f'<img class="bar" alt="colour scale" src="{data_uri(colour_bar())}">'


def photograph(pixels: UInt8[np.ndarray, "height width rgb"], name: str) -> str:
    """An image as the model sees it, with its name below."""
    return _figure(data_uri(np.ascontiguousarray(pixels)), html.escape(Path(name).name), _ratio(pixels), "")


def map_picture(
    values: Float[np.ndarray, "grid_h grid_w"],
    highest: float,
    caption: str,
    like: UInt8[np.ndarray, "height width rgb"],
) -> str:
    """A map from 0 to `highest` in the shape of its image; the caption is HTML."""
    return _figure(data_uri(colour(values, 0.0, highest)), caption, _ratio(like), "map")


def beside(pictures: Sequence[str], columns: int) -> str:
    """Pictures side by side, in a grid of so many columns."""
    return f'<div class="maps" style="grid-template-columns:repeat({columns},1fr)">{"".join(pictures)}</div>'


def _ratio(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    return f"aspect-ratio:{width}/{height}"


def _figure(source: str, caption: str, style: str, kind: str) -> str:
    return (
        f'<figure><img class="{kind}" style="{style}" src="{source}" alt=""><figcaption>{caption}</figcaption></figure>'
    )

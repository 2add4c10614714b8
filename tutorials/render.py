"""`python tutorials/render.py OUT_DIR [NOTEBOOK ...]`: run notebooks and write them as HTML that needs no network.

plotly.js lies once beside the pages, not in every cell. A notebook that fails leaves no page, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nbformat
import plotly
import plotly.graph_objects as go
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode, v4

FOLDER = Path(__file__).parent
PLOTLY = "plotly.min.js"
FIGURE = "application/vnd.plotly.v1+json"
WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")
TIMEOUT = 600
"""Seconds a cell may take."""
_CDN = ("require_js_url", "jquery_url", "mathjax_url", "mermaid_js_url", "mermaid_layout_elk_js_url")
"""What nbconvert's template loads from the network; none of it is needed here."""
_STYLE = ".jp-RenderedText pre { word-break: normal !important; overflow-wrap: anywhere; }"
"""Lines of text break between words."""
_EXPLORER = """
from registerlens.explorer.explorer import Explorer
Explorer._repr_mimebundle_ = lambda self, **options: {"text/html": self.section(max_bytes=1_500_000)}
"""
"""Run before a notebook with an explorer: a page has no Python to answer the widget, so it shows one with its data."""


def notebooks(names: list[str]) -> list[Path]:
    """Those named (by file or number), or all of them in order.

    Raises:
        SystemExit: one of them does not exist.
    """
    every = sorted(FOLDER.glob("*.ipynb"))
    chosen = [path for path in every if not names or any(path.name.startswith(Path(name).name) for name in names)]
    if lost := [name for name in names if not any(path.name.startswith(Path(name).name) for path in every)]:
        sys.exit(f"There is no notebook {', '.join(lost)} in {FOLDER}.")
    return chosen


def executed(path: Path) -> NotebookNode:
    """The notebook with its output.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    hidden = _EXPLORER if any("explore(" in cell.source for cell in notebook.cells) else ""
    notebook.cells.insert(0, v4.new_code_cell(hidden))
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # figures as data: this file draws them
    NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(FOLDER)}}).execute()
    del notebook.cells[0]
    return notebook


def drawable(notebook: NotebookNode) -> NotebookNode:
    """The same with figures as HTML that the one plotly.js beside the page draws, and without live widgets."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if FIGURE in data:
                figure = go.Figure(data[FIGURE]["data"], data[FIGURE]["layout"])
                output["data"] = {"text/html": figure.to_html(full_html=False, include_plotlyjs=False)}
            for kind in WIDGETS:
                data.pop(kind, None)
    notebook.metadata.pop("widgets", None)
    return notebook


def page(notebook: NotebookNode, title: str) -> str:
    """The whole HTML page."""
    exporter = HTMLExporter(**dict.fromkeys(_CDN, ""), exclude_input_prompt=True, exclude_output_prompt=True)
    text, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": html.escape(title)}})
    head, end, body = text.partition("</head>")
    head = re.sub(r"<script.*?</script>", "", head, flags=re.DOTALL)  # for mathematics and diagrams; there are none
    links = body.replace(".ipynb", ".html")  # between the tutorials
    return f'{head}<style>{_STYLE}</style>\n<script src="{PLOTLY}"></script>\n{end}{links}'


def render(folder: Path, names: list[str]) -> int:
    """Write the pages; returns how many notebooks failed."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(plotly.__file__).parent / "package_data" / PLOTLY, folder / PLOTLY)
    failed = 0
    for path in notebooks(names):
        start = time.perf_counter()
        try:
            notebook = executed(path)
        except CellExecutionError as error:
            failed += 1
            print(f"{path.name} failed:\n{error}", file=sys.stderr)
            continue
        target = folder / f"{path.stem}.html"
        target.write_text(page(drawable(notebook), path.stem), encoding="utf-8")
        print(f"{target} {target.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path, help="folder for the pages")
    parser.add_argument("notebooks", nargs="*", help="file names or numbers, such as 03; default: all")
    given = parser.parse_args()
    sys.exit(min(1, render(given.out_dir, given.notebooks)))

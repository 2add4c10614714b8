"""Figures in files; still pictures are drawn in processes of their own, killed with their browser if they hang."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import plotly.graph_objects as go

from registerlens.errors import ConfigError, DrawingError, MissingExtraError
from registerlens.files import whole_file
from registerlens.viz import drawing_process
from registerlens.viz.page import write_figure
from registerlens.viz.theme import PRINTED

PICTURES = ("png", "jpeg", "webp", "svg", "pdf")
"""Formats that kaleido draws with a Chrome or Chromium."""
PATIENCE = 90.0
"""Seconds for a browser to start and draw a picture; a few are usual."""
_PRINT, _SCREEN = ("svg", "pdf"), 3.0
"""Formats whose unit is a length on paper; and pixels of the others for each pixel of the figure."""


def save_figure(
    figure: go.Figure, path: str | Path, *, scale: float | int | None = None, patience: float | int = PATIENCE
) -> Path:
    """Write a figure as .html, .png, .jpeg, .webp, .svg or .pdf, whole or not at all.

    A page is complete and needs no network. Still pictures are drawn by kaleido with a Chrome or Chromium on this
    machine. SVG and PDF have the size on paper for which the figure was made: a "column" is 85 mm, text eight points.

    Args:
        figure: any plotly figure.
        path: the file; its suffix says which format.
        scale: pixels for each pixel of the figure, or for SVG and PDF its size; None chooses.
        patience: seconds that a browser gets for a still picture; if it drew nothing, it is killed and a new one tries.

    Raises:
        ConfigError: the suffix is of no such format.
        MissingExtraError: kaleido is not installed.
        DrawingError: there is no Chrome or Chromium, it failed, or it drew nothing in time.

    Example:
        >>> save_figure(go.Figure(), Path(tempfile.mkdtemp()) / "empty.html").stat().st_size > 1e6
        True
    """
    path = Path(path)
    kind = {"jpg": "jpeg", "htm": "html"}.get(path.suffix[1:].lower(), path.suffix[1:].lower())
    if kind not in ("html", *PICTURES):
        known = [".html", *(f".{kind}" for kind in PICTURES)]
        raise ConfigError(f"'{path.name}' ends in {path.suffix!r}; figures are saved as {known}.")
    if kind == "html":
        return write_figure(path, figure)
    picture = _drawn(figure, kind, scale or (PRINTED if kind in _PRINT else _SCREEN), patience)
    with whole_file(path) as temporary:
        temporary.write_bytes(picture)
    return path


def _drawn(figure: go.Figure, kind: str, scale: float | int, patience: float | int) -> bytes:
    if find_spec("kaleido") is None:
        raise MissingExtraError("kaleido", "pictures", "Saving a still picture of a figure")
    problem, asked = "", json.dumps({"figure": figure.to_json(), "options": {"format": kind, "scale": scale}})
    for _ in range(2):  # a browser that came to nothing mostly does when it is started anew
        with tempfile.TemporaryDirectory(prefix="registerlens-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            (folder / "asked").write_text(asked)
            problem = _draw(folder, patience)
            if (folder / "picture").exists():
                return (folder / "picture").read_bytes()
        if "ChromeNotFoundError" in problem:
            problem = "found no Chrome or Chromium"
            break
    raise DrawingError(
        f"kaleido {problem}. Install a browser (Debian: apt-get install chromium; elsewhere: plotly_get_chrome), or "
        "set BROWSER_PATH to it; on a machine that is busy give more `patience`; or save the figure as .html, which "
        "needs no browser."
    )


def _draw(folder: Path, patience: float | int) -> str:
    """Let a process draw, and end it with its browser; returns what went wrong if there is no picture then."""
    with (folder / "log").open("w+") as log:  # no pipe: a browser could keep it open
        process = subprocess.Popen(
            [sys.executable, "-P", drawing_process.__file__, folder, str(patience)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            return f"drew nothing within {patience:g} s, nor did a second process: its browser gave no answer"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = log.read().split("\n")
    return f"failed ({next((line for line in reversed(lines) if line), process.returncode)})"

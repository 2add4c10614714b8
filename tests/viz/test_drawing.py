"""Figures in files: whole or not at all, and no browser that hangs is waited for, or outlives the call."""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import plotly.graph_objects as go
import pytest
from PIL import Image

from registerlens.errors import ConfigError, DrawingError, MissingExtraError
from registerlens.viz import drawing
from registerlens.viz.drawing import save_figure
from registerlens.viz.theme import sized
from tests.browser import chromium

FIGURE = go.Figure(go.Scatter(y=[3, 1, 2]), layout={"width": 300, "height": 200})


def test_a_page_is_complete(tmp_path):
    text = save_figure(go.Figure(go.Scatter(y=[3])), tmp_path / "sub" / "a.html").read_text()
    assert "Plotly.newPlot" in text and "cdn.plot.ly" not in text.split("</head>")[0].split("<script>")[0]
    assert '<script src="http' not in text.replace("charset", "")


def test_what_cannot_be_saved_is_said(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"'\.gif'.*\.html.*\.png.*\.pdf"):
        save_figure(go.Figure(), tmp_path / "a.gif")
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"kaleido.*registerlens\[pictures\]"):
        save_figure(go.Figure(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "old.png").write_bytes(b"old")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    with pytest.raises(DrawingError, match=r"no Chrome or Chromium.*BROWSER_PATH.*html"):
        save_figure(go.Figure(), tmp_path / "new.pdf")
    with pytest.raises(DrawingError, match=r"drew nothing within 0\.1 s, nor did a second process.*patience.*html"):
        save_figure(go.Figure(), tmp_path / "old.png", patience=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_bytes() == b"old"


# Browsers ------------------------------------------------------------------------------------------------------------


def running(room):
    """Processes that were told of this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"ROOM={room}".encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Where pictures are drawn; after the test nothing is there, and nothing that began there runs."""
    if not Path("/proc").is_dir():
        pytest.skip("runs on Linux: it looks at processes through /proc")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("ROOM", str(folder))
    yield folder
    until = time.monotonic() + 60
    while running(folder):  # who was killed takes a moment to be gone
        assert time.monotonic() < until, "something was left running"
        time.sleep(0.02)
    assert not list(folder.iterdir())


def browser(path, *lines):
    """A program that stands in for a browser."""
    path.write_text("\n".join(["#!/bin/sh", f"echo $$ >> {path}.started", *lines]))
    path.chmod(0o755)
    return str(path)


HANGS = {"silent": "exec sleep 1000", "stopped": "kill -STOP 0"}
"""A browser that lives and says nothing; one that is stopped, and who waits for it too."""


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_a_browser_that_never_answers_is_killed(tmp_path, room, monkeypatch, how):
    monkeypatch.setenv("BROWSER_PATH", browser(tmp_path / "browser", HANGS[how]))
    with pytest.raises(DrawingError, match=r"drew nothing within 8 s, nor did a second process"):
        save_figure(FIGURE, tmp_path / "a.png", patience=8)
    assert (tmp_path / "browser.started").exists() and not (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_what_hangs_once_is_drawn_by_a_second_browser(tmp_path, room, monkeypatch):
    once = f"mkdir {tmp_path}/once && {HANGS['silent']}"
    monkeypatch.setenv("BROWSER_PATH", browser(tmp_path / "browser", once, f'exec {chromium()} "$@"'))
    with Image.open(save_figure(FIGURE, tmp_path / "a.png", scale=1, patience=20)) as picture:
        assert picture.size == (300, 200)
    assert len((tmp_path / "browser.started").read_text().split()) == 2


@pytest.mark.slow
def test_a_browser_that_fails_is_quoted(tmp_path, room, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", browser(tmp_path / "browser", "exit 3"))
    with pytest.raises(DrawingError, match=r"kaleido failed \(BrowserFailedError: .*\)\. Install"):
        save_figure(FIGURE, tmp_path / "a.png", patience=60)


@pytest.mark.slow
def test_no_browser_outlives_its_caller_for_long(tmp_path, room):
    code = f"""
import os, tempfile, plotly.graph_objects as go
from registerlens.viz.drawing import save_figure
tempfile.tempdir, os.environ["BROWSER_PATH"] = {str(room)!r}, {browser(tmp_path / "browser", HANGS["silent"])!r}
save_figure(go.Figure(), {str(tmp_path / "a.png")!r}, patience=8)"""
    caller = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "browser.started").exists():
        assert caller.poll() is None
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    until = time.monotonic() + 100
    while running(room):
        assert time.monotonic() < until, "a browser was left behind"
        time.sleep(0.05)
    for folder in room.iterdir():  # what a killed caller cannot sweep up
        subprocess.run(["rm", "-r", folder], check=True)


@pytest.mark.slow
def test_pictures_have_their_size(tmp_path, room):
    chromium()  # skips where there is none
    with Image.open(save_figure(FIGURE, tmp_path / "a.png", scale=2)) as picture:
        assert picture.size == (600, 400)
    box = save_figure(sized(FIGURE, "column"), tmp_path / "a.pdf").read_bytes().split(b"/MediaBox")[1].split(b"]")[0]
    assert float(box.split()[2]) == pytest.approx(85 / 25.4 * 72, abs=1)  # points


@contextmanager
def busy():
    """A machine with more to do than it has cores."""
    loads = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for load in loads:
            load.kill()
            load.wait()


@pytest.mark.slow
def test_three_at_once_on_a_busy_machine(tmp_path, room):
    chromium()
    with busy(), ThreadPoolExecutor(3) as pool:
        for path in pool.map(lambda name: save_figure(FIGURE, tmp_path / name, scale=1), ["a.png", "b.png", "c.png"]):
            with Image.open(path) as picture:
                assert picture.size == (300, 200)


@pytest.mark.slow
def test_many_in_a_row_leave_nothing_behind(tmp_path, room):
    chromium()
    files = len(list(Path("/proc/self/fd").iterdir()))
    pictures = {save_figure(FIGURE, tmp_path / "a.png", scale=1).read_bytes() for _ in range(10)}
    assert len(pictures) == 1 and len(list(Path("/proc/self/fd").iterdir())) == files

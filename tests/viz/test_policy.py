"""Pages in Chromium under their Content-Security-Policy: they work, they ask nobody, and no script but theirs runs."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from browser import opened
from markupsafe import Markup

import registerlens as rl
from registerlens.explorer.explorer import explore
from registerlens.viz.attention import attention_heads
from registerlens.viz.drawing import save_figure
from registerlens.viz.page import Section, plotted, write_page

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("policy")]

HOSTILE = (
    """'"><script>window.ran = 1</script><img src=x onerror="window.ran = 2">"""
    """<a href="javascript:window.ran = 3" onclick="window.ran = 3">"""
)
ASK = """async (address) => {
  const add = (tag, fields) => document.body.append(Object.assign(document.createElement(tag), fields));
  add("img", { src: address });
  add("script", { src: address });
  add("script", { textContent: `window.ran = 4; fetch("${address}")` });
  add("link", { rel: "stylesheet", href: address });
  add("iframe", { src: address });
  add("video", { src: address });
  add("div", { style: `background: url(${address})`, innerHTML: "&nbsp;" });
  add("style", { textContent: `@font-face { font-family: f; src: url(${address}) } body { font-family: f }` });
  add("form", { action: address, id: "leaving", target: "_blank" });
  document.getElementById("leaving").submit();
  navigator.sendBeacon(address);
  try { new WebSocket(address.replace("http", "ws")); } catch {}
  try { await fetch(address); } catch {}
  await new Promise((done) => setTimeout(done, 500));
}"""


@contextmanager
def listening():
    """A server on this machine, and the list of what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/asked", asked
    server.shutdown()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One of each kind, every name in it hostile."""
    folder = tmp_path_factory.mktemp("pages")
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    vit.source, images = HOSTILE, torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    figure = go.Figure(go.Scatter(x=[0, 1], y=[HOSTILE, "b"], name=HOSTILE, text=HOSTILE), {"title": HOSTILE})
    figure.add_trace(go.Scattergl(x=np.arange(99.0), y=np.arange(99.0), name="many", mode="markers", yaxis="y2"))
    figure.update_layout(yaxis2={"overlaying": "y", "side": "right"})
    explorer = explore(vit, images, names=[HOSTILE], interventions={HOSTILE: None})
    section = Section(id="plot", title=HOSTILE, body=plotted(figure))
    _, cache = vit.run_with_cache(images, names_filter="blocks.3.attn.hook_pattern")
    view = attention_heads(cache, 3, images=images)
    return {
        "page": write_page(folder / "page.html", HOSTILE, [HOSTILE], [section]),
        "figure": save_figure(figure, folder / "figure.html"),
        "explorer": explorer.to_html(folder / "explorer.html"),
        "heads": view.save(folder / "heads.html"),
    }


DRAWN = {
    "page": "document.querySelectorAll('.js-plotly-plot .main-svg').length > 0",
    "figure": "document.querySelectorAll('.js-plotly-plot .main-svg').length > 0",
    "explorer": "document.querySelectorAll('.rl-explorer[data-answered]').length === 1",
    "heads": "document.querySelectorAll('canvas').length > 0",
}


@pytest.mark.parametrize("kind", DRAWN)
def test_a_page_works_and_names_are_text(pages, kind):
    with opened(pages[kind].as_uri()) as seen:
        seen.page.wait_for_function(f"() => {DRAWN[kind]}")
        seen.page.wait_for_timeout(300)
        assert seen.errors == [] and seen.requests == []
        assert seen.page.evaluate("window.ran") is None
        assert seen.page.locator("img[src=x], a[href^=javascript], [onerror]").count() == 0
        if kind in ("page", "figure"):  # WebGL, for which plotly makes functions from text
            assert seen.page.locator(".gl-canvas").count() > 0 and seen.page.locator(".no-webgl").count() == 0
            with seen.page.expect_download() as saved:
                seen.page.locator(".modebar-btn").first.dispatch_event("click")
            assert saved.value.suggested_filename.endswith(".png")
        if kind == "page":
            assert seen.page.locator("h1").text_content() == seen.page.locator("h2").text_content() == HOSTILE
        assert seen.errors == []


@pytest.mark.parametrize("kind", ["page", "explorer", "heads"])
def test_whatever_got_into_a_page_asks_nobody_and_runs_nothing(pages, kind, tmp_path):
    text = pages[kind].read_text()
    bare = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    slipped = "<script>window.ran = 5</script>"
    for name, page, stopped in (("kept", text, True), ("bare", bare, False)):
        path = tmp_path / f"{name}.html"
        path.write_text(page.replace("</body>", f"{slipped}</body>"))
        with listening() as (address, asked), opened(path.as_uri()) as seen:
            seen.page.evaluate(ASK, address)
            ran = seen.page.evaluate("window.ran")
        assert (asked == [], ran is None) == (stopped, stopped), (name, asked, ran)


def test_a_page_says_exactly_what_may_run(tmp_path):
    path = write_page(tmp_path / "page.html", "t", [], [Section(id="a", title="b", body=Markup("c"))])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', path.read_text())[1].replace("&#39;", "'")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.keys() == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert [rules[name] for name in ("default-src", "base-uri", "form-action")] == ["'none'"] * 3
    assert len(re.findall("'sha256-[^']+'", rules["script-src"])) == 2 and "unsafe-inline" not in rules["script-src"]

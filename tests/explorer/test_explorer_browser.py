"""The explorer in Chromium: a page from disk, sections on a page, and the widget in a real marimo server."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from browser import opened
from conftest import NASTY
from helpers import decoding_error

from registerlens.explorer.tokens import token_index

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("explorer")]  # what they share is made once


@pytest.fixture(scope="module")
def patterns(explorer, vit, images):
    """[block][head, query, key] of the first image, from the model itself, by condition."""
    found = {}
    for name, edits in explorer.conditions.items():
        with torch.no_grad(), vit.edit(*edits):
            cache = vit.run_with_cache(images[:1], names_filter="blocks.*.attn.hook_pattern")[1]
        found[name] = [cache[f"blocks.{layer}.attn.hook_pattern"][0] for layer in range(vit.cfg.n_layers)]
    return found


def settled(page):
    """Wait until every explorer has the answer to its last question; a busy machine may start slowly."""
    explorers = page.locator(".rl-explorer")  # a locator looks into marimo's shadow roots, a selector in the page not
    explorers.first.wait_for(timeout=240_000)
    for _ in range(1200):
        if explorers.evaluate_all("all => all.every(({ dataset: d }) => d.asked && d.asked === d.answered)"):
            return
        page.wait_for_timeout(50)
    pytest.fail("The explorer has no answer to its last question.")


def click_patch(page, row, column, grid=(6, 6)):
    cells = page.locator(".rlx-cells").first
    box = cells.bounding_box()
    cells.click(position={"x": (column + 0.5) / grid[1] * box["width"], "y": (row + 0.5) / grid[0] * box["height"]})
    settled(page)


def press(page, key):
    page.keyboard.press(key)
    settled(page)


def choose(page, field, **option):
    page.locator(f"select[data-field={field}]").select_option(**option)
    settled(page)


def check_numbers(page, condition, whole, index, role, layout):
    """The values a panel shows for its strongest tokens, against those of the model, as near as the code allows."""
    limits = decoding_error(whole.numpy())
    expected, limit = (whole[index], limits[index]) if role == "query" else (whole[:, index], limits[:, index])
    shown = page.locator(f".rlx-panel[data-condition='{condition}'] .rlx-most [data-token]").evaluate_all(
        "nodes => nodes.map(node => [node.dataset.token, Number(node.dataset.value)])"
    )
    assert len(shown) == 4
    for name, value in shown:
        at = token_index(layout, name)
        assert value == pytest.approx(float(expected[at]), abs=float(limit[at]) + 1e-6), (name, role)
    highest = int(expected.argmax())
    assert shown[0][1] == pytest.approx(float(expected[highest]), abs=float(limit[highest]) + 1e-6)


def test_a_page_answers_clicks_and_keys_with_the_models_numbers(explorer, vit, patterns, tmp_path):
    plain = vit.cfg.layout()
    more = vit.cfg.layout(n_test_time_registers=1)
    with opened(explorer.to_html(tmp_path / "tiny.html").as_uri(), 1280, 1000) as seen:
        page = seen.page
        settled(page)
        choose(page, "role", index=0)
        click_patch(page, 4, 1)
        for condition, layout in (("clean", plain), ("test-time register", more)):
            check_numbers(page, condition, patterns[condition][2].mean(0), 4 * 6 + 1, "query", layout)
        page.locator(".rlx-picture").first.focus()
        press(page, "ArrowRight")
        press(page, "ArrowUp")
        check_numbers(page, "clean", patterns["clean"][2].mean(0), 3 * 6 + 2, "query", plain)
        press(page, "k")
        check_numbers(page, "clean", patterns["clean"][2].mean(0), 3 * 6 + 2, "key", plain)
        assert "(3,2) as key, block 2" in page.locator(".rlx-status").inner_text()
        press(page, "q")
        page.locator("input[data-field=block]").focus()
        press(page, "ArrowRight")
        check_numbers(page, "test-time register", patterns["test-time register"][3].mean(0), 3 * 6 + 2, "query", more)
        choose(page, "head", index=1)
        check_numbers(page, "clean", explorer.attention(0, "clean").whole(3, "rollout"), 3 * 6 + 2, "query", plain)
        assert seen.errors == [] and seen.requests == []


def test_tokens_without_a_place_can_be_chosen_and_conditions_compared(explorer, patterns, tmp_path):
    with opened(explorer.to_html(tmp_path / "tiny.html").as_uri()) as seen:
        page = seen.page
        settled(page)
        page.get_by_role("button", name="test-time register 0").click()
        settled(page)
        assert "no such token" in page.locator(".rlx-panel[data-condition=clean] figcaption").first.inner_text()
        choose(page, "compare", label="attention bias")
        page.get_by_role("button", name="attention bias").click()
        settled(page)
        expected = patterns["attention bias"][2].mean(0)[:, 36]
        shown = page.locator(".rlx-panel[data-condition='attention bias'] .rlx-most [data-value]").first
        assert float(shown.get_attribute("data-value")) == pytest.approx(float(expected.max()), rel=0.01)
        assert "no norm" in page.locator(".rlx-below").inner_text()
        assert seen.errors == [] and seen.requests == []


def test_names_are_text_and_outliers_are_named(explorer, tmp_path):
    with opened(explorer.to_html(tmp_path / "tiny.html").as_uri()) as seen:
        page = seen.page
        page.on("dialog", lambda dialog: seen.errors.append("a script of a name ran"))
        settled(page)
        verdicts = page.locator(".rlx-verdict").all_inner_texts()
        assert "clean: an outlier" in verdicts[0] and "test-time register: not an outlier" in verdicts[1]
        choose(page, "image", index=1)
        assert page.locator("select[data-field=image] option").nth(1).inner_text() == NASTY
        assert page.locator("img[src=x]").count() == 0
        assert NASTY in page.locator(".rlx-picture").first.get_attribute("aria-label")
        assert seen.errors == []


@pytest.mark.parametrize(("scheme", "ground"), [("dark", "#111"), ("light", "color(srgb 0.98 0.98 0.99)")])
def test_sections_share_a_page_and_take_its_shade(explorer, tmp_path, scheme, ground):
    path = tmp_path / "two.html"
    path.write_text(f"<body style='background:{ground}'>{explorer.section()}{explorer.section()}</body>")
    with opened(path.as_uri(), 400, 800) as seen:  # a narrow window, as on a telephone
        page = seen.page
        page.wait_for_function("() => document.querySelectorAll('.rl-explorer[data-answered]').length === 2")
        themes = page.locator(".rl-explorer").evaluate_all("nodes => nodes.map(node => node.dataset.theme)")
        assert themes == [scheme, scheme]
        untouched = page.locator(".rlx-status").nth(1).inner_text()
        click_patch(page, 5, 5)
        assert page.locator(".rlx-status").nth(0).inner_text().startswith("(5,5)")
        assert page.locator(".rlx-status").nth(1).inner_text() == untouched
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert seen.errors == []


NOTEBOOK = """
import marimo

app = marimo.App()


@app.cell
def _():
    import registerlens as rl
    from registerlens.data.synthetic import synthetic_images
    from registerlens.explorer.explorer import explore

    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
    explore(vit, synthetic_images(2, 0).images, neurons)
    return


if __name__ == "__main__":
    app.run()
"""


@contextmanager
def marimo_server(notebook):
    """A marimo server for one notebook; it and its children end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "marimo", "run", str(notebook), "--headless", "--no-token"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(notebook.parent)}
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "marimo did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=20)


def test_the_widget_in_marimo_is_answered_by_python(vit, patterns, tmp_path):
    notebook = tmp_path / "notebook.py"
    notebook.write_text(NOTEBOOK)
    with marimo_server(notebook) as address, opened(address, 1280, 1000) as seen:
        page = seen.page
        settled(page)
        choose(page, "role", index=0)
        click_patch(page, 4, 1)
        check_numbers(page, "clean", patterns["clean"][2].mean(0), 4 * 6 + 1, "query", vit.cfg.layout())
        press(page, "ArrowLeft")
        check_numbers(page, "clean", patterns["clean"][2].mean(0), 4 * 6, "query", vit.cfg.layout())
        assert page.locator(".rl-explorer").get_attribute("data-theme") == "light"
        outside = [url for url in seen.requests if not re.match(r"(http|ws)://127\.0\.0\.1[:/]", url)]
        assert outside == [] and seen.errors == []

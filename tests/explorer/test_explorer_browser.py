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

from registerlens.config import TokenLayout
from registerlens.explorer.codes import LEVELS
from registerlens.explorer.tokens import token_index

pytestmark = pytest.mark.slow

PATTERN = "blocks.{}.attn.hook_pattern"


@pytest.fixture(scope="module")
def patterns(explorer, vit, images):
    """[block][head, query, key] of the first image, from the model itself, by condition."""
    found = {}
    for name, edits in explorer.conditions.items():
        with torch.no_grad(), vit.edit(*edits):
            cache = vit.run_with_cache(images[:1], names_filter="blocks.*.attn.hook_pattern")[1]
        found[name] = [cache[PATTERN.format(layer)][0] for layer in range(vit.cfg.n_layers)]
    return found


def answered(page, than="0"):
    """Wait for the answer to a later question than this one; its number."""
    page.wait_for_function(
        f"() => Number(document.querySelector('.rl-explorer')?.dataset.answered ?? 0) > {than}", timeout=60_000
    )
    return page.locator(".rl-explorer").first.get_attribute("data-answered")


def click_patch(page, row, column, grid=(6, 6)):
    before = page.locator(".rl-explorer").first.get_attribute("data-answered")
    box = page.locator(".rlx-cells").first.bounding_box()
    x, y = (column + 0.5) / grid[1] * box["width"], (row + 0.5) / grid[0] * box["height"]
    page.locator(".rlx-cells").first.click(position={"x": x, "y": y})
    answered(page, before)


def press(page, key):
    before = page.locator(".rl-explorer").first.get_attribute("data-answered")
    page.keyboard.press(key)
    answered(page, before)


def check_numbers(page, condition, expected, layout):
    """The values a panel shows for its strongest tokens, against those of the model."""
    panel = page.locator(f".rlx-panel[data-condition='{condition}']")
    shown = panel.locator(".rlx-most [data-token]").evaluate_all(
        "nodes => nodes.map(node => [node.dataset.token, Number(node.dataset.value)])"
    )
    assert len(shown) == 4
    for name, value in shown:
        index = token_index(layout, name, len(expected) if "bias" in name else None)
        assert value == pytest.approx(float(expected[index]), abs=float(expected.max()) / LEVELS + 1e-6)
    assert shown[0][1] == pytest.approx(float(expected.max()), rel=0.01)


def test_a_page_answers_clicks_and_keys_with_the_models_numbers(explorer, vit, patterns, tmp_path):
    address = explorer.to_html(tmp_path / "tiny.html").as_uri()
    plain = vit.cfg.layout()
    more = TokenLayout(**{**plain.__dict__, "n_test_time_registers": 1})
    with opened(address, 1280, 1000) as seen:
        page = seen.page
        answered(page)
        page.locator("select[data-field=role]").select_option(index=0)  # looks
        click_patch(page, 4, 1)
        for condition, layout in (("clean", plain), ("test-time register", more)):
            check_numbers(page, condition, patterns[condition][2].mean(0)[4 * 6 + 1], layout)
        page.locator(".rlx-picture").first.focus()
        press(page, "ArrowRight")
        press(page, "ArrowUp")
        check_numbers(page, "clean", patterns["clean"][2].mean(0)[3 * 6 + 2], plain)
        press(page, "k")
        check_numbers(page, "clean", patterns["clean"][2].mean(0)[:, 3 * 6 + 2], plain)
        assert "(3,2) as key, block 2" in page.locator(".rlx-status").inner_text()
        press(page, "q")
        before = page.locator(".rl-explorer").get_attribute("data-answered")
        page.locator("input[data-field=block]").focus()
        page.keyboard.press("ArrowRight")
        answered(page, before)
        check_numbers(page, "test-time register", patterns["test-time register"][3].mean(0)[3 * 6 + 2], more)
        page.locator("select[data-field=head]").select_option(index=1)
        answered(page, str(int(before) + 1))
        rollout = explorer.attention(0, "clean").whole(3, "rollout")[3 * 6 + 2]
        check_numbers(page, "clean", rollout, plain)
        assert seen.errors == [] and seen.requests == []


def test_tokens_without_a_place_can_be_chosen_and_conditions_compared(explorer, patterns, tmp_path):
    with opened(explorer.to_html(tmp_path / "tiny.html").as_uri()) as seen:
        page = seen.page
        before = answered(page)
        page.get_by_role("button", name="test-time register 0").click()
        before = answered(page, before)
        assert "no such token" in page.locator(".rlx-panel[data-condition=clean] figcaption").first.inner_text()
        page.locator("select[data-field=compare]").select_option("attention bias")
        before = answered(page, before)
        page.get_by_role("button", name="attention bias").click()
        answered(page, before)
        expected = patterns["attention bias"][2].mean(0)[:, 36]
        shown = page.locator(".rlx-panel[data-condition='attention bias'] .rlx-most [data-value]").first
        assert float(shown.get_attribute("data-value")) == pytest.approx(float(expected.max()), rel=0.01)
        assert "no norm" in page.locator(".rlx-below").inner_text()
        assert seen.errors == [] and seen.requests == []


def test_names_are_text_and_outliers_are_named(explorer, tmp_path):
    with opened(explorer.to_html(tmp_path / "tiny.html").as_uri()) as seen:
        page = seen.page
        seen.page.on("dialog", lambda dialog: seen.errors.append("a script of a name ran"))
        before = answered(page)
        verdicts = page.locator(".rlx-verdict").all_inner_texts()
        assert "clean: an outlier" in verdicts[0] and "test-time register: not an outlier" in verdicts[1]
        page.locator("select[data-field=image]").select_option(index=1)
        answered(page, before)
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
        answered(page)
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
        for _ in range(600):
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
        before = answered(page)
        page.locator("select[data-field=role]").select_option(index=0)
        answered(page, before)
        click_patch(page, 4, 1)
        check_numbers(page, "clean", patterns["clean"][2].mean(0)[4 * 6 + 1], vit.cfg.layout())
        press(page, "ArrowLeft")
        check_numbers(page, "clean", patterns["clean"][2].mean(0)[4 * 6], vit.cfg.layout())
        assert page.locator(".rl-explorer").get_attribute("data-theme") == "light"
        outside = [url for url in seen.requests if not re.match(r"(http|ws)://127\.0\.0\.1[:/]", url)]
        assert outside == [] and seen.errors == []

"""The page carries the model's numbers, keeps to its budget, says what it left out, and shows names as text."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch
from conftest import NASTY
from helpers import decode, decoding_error

import registerlens as rl
from registerlens.config import TokenLayout
from registerlens.errors import ConfigError
from registerlens.explorer import page as module
from registerlens.explorer.explorer import explore
from registerlens.explorer.page import Cells, collect, order
from registerlens.explorer.recording import record


def data_of(text):
    return json.loads(re.search(r'-data">(.*?)</script>', text, re.S)[1])


def unpacked(text):
    return gzip.decompress(base64.b64decode(text))


def map_of(data, key, n_tokens):
    raw = unpacked(data["maps"][key])
    largest = np.frombuffer(raw, "<f4", n_tokens)
    return decode(np.frombuffer(raw, np.uint8, offset=4 * n_tokens).reshape(n_tokens, -1), largest)


@pytest.fixture(scope="module")
def page(explorer, tmp_path_factory):
    return explorer.to_html(tmp_path_factory.mktemp("page") / "tiny.html").read_text()


def test_every_map_of_a_small_model_is_there(page, explorer):
    data = data_of(page)
    assert data["manifest"]["left_out"] == ""
    assert len(data["maps"]) == 2 * 4 * 6 * 2  # images, conditions, blocks, mean and rollout
    for index, condition in enumerate(explorer.conditions):
        attention = explorer.attention(1, condition)
        for layer, head in ((2, "mean"), (5, "rollout")):
            expected = attention.whole(layer, head).numpy()
            got = map_of(data, f"1/{index}/{layer}/{head}", len(expected))
            assert (np.abs(got - expected) <= decoding_error(expected) + 1e-6).all()


def test_facts_are_exact(page, explorer):
    data, found = data_of(page), explorer.attention(1, "test-time register").recording
    values = np.frombuffer(unpacked(data["facts"]["1/2"]), "<f4")
    norms, medians, table, chosen = np.split(values, np.cumsum([13 * 37, 13, 37 * 8 * 4]))
    assert np.array_equal(norms.reshape(13, 37), found.norms.numpy())
    assert np.allclose(medians, np.quantile(found.norms[:, :36].numpy(), 0.5, axis=1))
    assert np.array_equal(table.reshape(37, 8, 4)[..., :2], found.strongest.numpy())
    assert np.array_equal(table.reshape(37, 8, 4)[..., 3], found.strongest_written.numpy())
    assert np.array_equal(chosen.reshape(37, 7), found.chosen_activation.numpy())


def test_nothing_comes_from_elsewhere_and_names_are_text(page, explorer):
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert "<img src=x" not in page and page.count("</script>") == 2
    assert data_of(page)["manifest"]["images"][1]["name"] == NASTY
    assert explorer.section().count("<script") == 2


def test_sections_on_one_page_have_their_own_names(explorer):
    ids = [set(re.findall(r'id="([^"]+)"', explorer.section())) for _ in range(2)]
    assert all(len(found) == 2 for found in ids) and not ids[0] & ids[1]


@pytest.mark.parametrize("max_bytes", [80_000, 180_000])
def test_a_page_keeps_to_its_budget_and_says_what_is_missing(explorer, tmp_path, max_bytes):
    path = explorer.to_html(tmp_path / "small.html", max_bytes=max_bytes)
    assert 0.5 * max_bytes < path.stat().st_size <= max_bytes
    told = data_of(path.read_text())["manifest"]
    assert "Left out" in told["left_out"]
    kept = {tuple(kind) for kind in told["kept"]}
    assert (told["start"]["layer"], "mean") in kept
    expected = {f"{i}/{c}/{layer}/{head}" for i in range(len(told["images"])) for c in range(4) for layer, head in kept}
    assert set(data_of(path.read_text())["maps"]) == expected


def test_no_room_for_a_single_map_is_an_error_and_no_file(explorer, tmp_path):
    with pytest.raises(ConfigError, match="larger max_bytes"):
        explorer.to_html(tmp_path / "none.html", max_bytes=60_000)
    assert not list(tmp_path.iterdir())


def test_a_page_takes_one_pass_for_each_image_and_condition(vit, images, neurons, monkeypatch):
    from registerlens.explorer import explorer as module

    passes = []
    monkeypatch.setattr(module, "KEPT", 2)  # fewer than the page shows
    monkeypatch.setattr(module, "record", lambda *given: (passes.append(1), record(*given))[1])
    found = explore(vit, images.repeat(2, 1, 1, 1), interventions={"zeroed": rl.Ablate(neurons)})
    assert len(collect(found, 2_000_000)["facts"]) == 8
    assert len(passes) == 8


def test_the_block_that_reads_outliers_comes_first(explorer):
    kinds = order(explorer)
    assert kinds[:4] == [(2, "mean"), (5, "mean"), (1, "mean"), (5, "rollout")]
    assert len(set(kinds)) == len(kinds) == 12


def test_cells_add_up():
    layout = TokenLayout(grid=(3, 5), n_prefix=1, n_test_time_registers=1)
    cells = Cells(side=2, patches=layout)
    pattern = torch.rand(17, 18, generator=torch.Generator().manual_seed(0)).softmax(-1)  # and an attention bias
    got = cells.pool(pattern)
    assert cells.layout.grid == (2, 3) and got.shape == (8, 9)
    assert torch.allclose(got.sum(1), torch.ones(8))
    corner = [1 + row * 5 + column for row in (0, 1) for column in (0, 1)]  # cell (0,0)
    cut = [1 + 2 * 5 + 4]  # cell (1,2) holds one patch only
    assert got[1, 6].item() == pytest.approx(pattern[corner][:, cut].sum(1).mean().item())
    assert got[6, 1].item() == pytest.approx(pattern[cut][:, corner].sum().item())
    assert torch.allclose(got[0, 7:], pattern[0, 16:])
    norms = torch.arange(17.0)
    assert cells.largest(norms).tolist() == [0, 7, 9, 10, 12, 14, 15, 16]


def test_many_patches_are_pooled_on_a_page(explorer, monkeypatch):
    monkeypatch.setattr(module, "MOST_PATCHES", 10)
    data = collect(explorer, 1_000_000)
    told = data["manifest"]
    assert (told["grid"]["rows"], told["grid"]["columns"]) == (3, 3) and "2 x 2 patches" in told["left_out"]
    assert [len(condition["tokens"]) for condition in told["conditions"]] == [9, 9, 10, 10]
    row, column = json.loads(told["start"]["token"].replace("(", "[").replace(")", "]"))
    found = explorer.attention(0, "clean").recording.norms
    block = found[-1].reshape(6, 6)[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    values = np.frombuffer(unpacked(data["facts"]["0/0"]), "<f4")
    assert (
        values[12 * 9 + 3 * row + column] == pytest.approx(float(block.max())) == pytest.approx(float(found[-1].max()))
    )
    assert map_of(data, "0/3/2/mean", 9).sum(1) == pytest.approx(1, abs=0.05)


def test_a_remainder_of_pixels_is_not_covered(vit):
    data = collect(explore(vit, torch.rand(1, 3, 52, 100)), 1_000_000)
    assert data["manifest"]["grid"]["covered"] == [96 / 100, 48 / 52]

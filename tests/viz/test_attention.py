"""Attention heads through CircuitsVis: which tokens are shown, that rows add up, that nothing comes from outside."""

import json
import re
import urllib.request

import numpy as np
import pytest
import torch
from browser import opened
from helpers import randomise

import registerlens as rl
from registerlens.config import TokenLayout, ViTConfig
from registerlens.errors import HookNameError, MissingExtraError, ShapeError
from registerlens.viz import attention as module
from registerlens.viz.attention import MOST_BYTES, attention_heads

NAME = "blocks.1.attn.hook_pattern"


@pytest.fixture(scope="module")
def vit():
    sizes = {"n_layers": 2, "d_model": 24, "n_heads": 3, "d_mlp": 20, "image_size": (24, 32), "patch_size": (4, 4)}
    return randomise(rl.HookedViT(ViTConfig(**sizes, n_trained_registers=1)))


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def cache(vit, images):
    with torch.no_grad():
        return vit.run_with_cache(images, names_filter=NAME)[1]


def test_the_patches_a_query_looks_at_most_are_shown_and_the_rest_is_pooled(cache, images):
    view = attention_heads(cache, 1, query=(2, 5), image=1, tokens=6, images=images)
    pattern = cache[NAME][1]
    query = 2 + 2 * 8 + 5
    ranked = sorted(range(2, 50), key=lambda key: -pattern.mean(0)[query, key].item())
    chosen = sorted({query, *[key for key in ranked if key != query][:5]})
    assert view.tokens[:2] == ("[CLS]", "trained register 0") and view.tokens[-1] == "others(42)"
    assert list(view.tokens[2:-1]) == [f"({(i - 2) // 8},{(i - 2) % 8})" for i in chosen]
    assert view.heads == ("mean", "1.0", "1.1", "1.2")
    rows = [0, 1, *chosen]
    others = [i for i in range(50) if i not in rows]
    got = torch.from_numpy(view.attention)
    assert torch.allclose(got[2, :8, :8], pattern[1][rows][:, rows], atol=1e-6)
    assert torch.allclose(got[2, :8, 8], pattern[1][rows][:, others].sum(1), atol=1e-6)
    assert torch.allclose(got[2, 8, :8], pattern[1][others][:, rows].mean(0), atol=1e-6)
    assert torch.allclose(got[0], got[1:].mean(0), atol=1e-6)
    assert torch.allclose(got.sum(2), torch.ones(4, 9), atol=1e-5)
    assert view.highest == pytest.approx(got[:, :, :8].max().item())
    assert "of 48 patches the 6 to which (2,5) pay most" in view.caption and "other 42" in view.caption
    assert [bool(src) for src in view.thumbnails] == [False, False, *[True] * 6]


def test_a_pattern_alone_and_all_tokens(cache):
    layout = TokenLayout(grid=(6, 8), n_prefix=1, n_trained_registers=1)
    view = attention_heads(cache[NAME], 1, heads=[2], layout=layout, tokens=48)
    assert view.heads == ("1.2",) and len(view.tokens) == 50 and view.thumbnails == ()
    assert torch.allclose(torch.from_numpy(view.attention[0]), cache[NAME][0, 2], atol=1e-6)
    same = attention_heads(cache[NAME][0], 1, heads=[2], layout=layout, tokens=48)
    assert (same.attention == view.attention).all()


def test_registers_and_the_key_of_a_bias_are_kept():
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
    images = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for edit, name in (
        (rl.TestTimeRegisters(neurons), "test-time register 0"),
        (rl.AttentionBias.fit(vit, images, neurons), "attention bias"),
    ):
        with torch.no_grad(), vit.edit(edit):
            _, cache = vit.run_with_cache(images, names_filter="blocks.3.attn.hook_pattern")
        view = attention_heads(cache, 3, query=["(0,0)", 7], tokens=3)
        assert view.tokens[-2:] == (name, "others(33)") and {"(0,0)", "(1,1)"} <= set(view.tokens)
        assert view.attention[0].sum(1)[:3] == pytest.approx(1)
    with pytest.raises(ShapeError, match="names no token that looks"):
        attention_heads(cache, 3, query="attention bias")


def test_views_stay_small_however_many_tokens_are_asked_for():
    one = torch.rand(785, 785, generator=torch.Generator().manual_seed(0)).softmax(-1)
    view = attention_heads(one.expand(16, -1, -1), 0, layout=TokenLayout(grid=(28, 28), n_prefix=1), tokens=784)
    assert len(view.html()) < MOST_BYTES
    assert f"of 784 patches the {len(view.tokens) - 2}" in view.caption and len(view.tokens) > 50
    asked = {"layout": TokenLayout(grid=(28, 28), n_prefix=1), "query": list(range(700))}
    with pytest.raises(ShapeError, match=rf"700 patches .* 3 MB with 17 heads: {len(view.tokens) - 2} do"):
        attention_heads(one.expand(16, -1, -1), 0, **asked)
    twice = attention_heads(one[None], 0, **(asked | {"query": [3] * 700}), tokens=1)  # one patch, however often
    assert twice.tokens == ("[CLS]", "(0,3)", "others(783)")


def test_queries_may_be_numpy_integers(cache):
    row, column = np.unravel_index(21, (6, 8))
    for query in ((row, column), np.int64(21), [np.int64(21)]):
        assert "(2,5) pay most" in attention_heads(cache, 1, query=query).caption


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"layer": 2}, ShapeError, "blocks 0 to 1"),
        ({"layer": 0}, HookNameError, r"no blocks\.0\.attn\.hook_pattern, only .*names_filter"),
        ({"heads": [3]}, ShapeError, "heads 0 to 2"),
        ({"heads": []}, ShapeError, "heads 0 to 2"),
        ({"query": (6, 0)}, ShapeError, "outside the grid of 6 x 8"),
        ({"query": "test-time register 0"}, ShapeError, "no token"),
        ({"image": 2}, ShapeError, "images 0 to 1"),
        ({"image": 1, "images": torch.zeros(1, 3, 24, 32)}, ShapeError, "images has 1 images, and image 1 is shown"),
        ({"tokens": 0}, ShapeError, "at least 1"),
        ({"images": torch.zeros(2, 3, 24, 64)}, ShapeError, "50 queries"),
        ({"layout": TokenLayout(grid=(6, 9), n_prefix=1)}, ShapeError, "50 queries"),
    ],
)
def test_bad_input(cache, wrong, error, words):
    with pytest.raises(error, match=words):
        attention_heads(cache, **({"layer": 1} | wrong))


def test_a_plain_dictionary_needs_a_layout(cache):
    with pytest.raises(ShapeError, match=r"layout=vit\.layout"):
        attention_heads(dict(cache.items()), 1)


def test_showing_a_view_asks_nobody(cache, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    text = attention_heads(cache, 1)._repr_html_()
    assert not re.search(r"(from |import |src=|href=)[\"']https?:", text)
    told = json.loads(re.search(r'-data">(.*?)</script>', text, re.S)[1])
    assert told["maskUpperTri"] is False and len(told["tokens"]) == 27
    assert len(attention_heads(cache, 1, script=False).html()) < len(text) - 300_000


def test_without_circuitsvis_the_error_names_the_extra(cache, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"registerlens\[notebooks\]"):
        attention_heads(cache, 1)


@pytest.mark.slow
def test_a_page_of_two_views_draws_both_without_a_request(cache, images, tmp_path):
    first, second = (attention_heads(cache, 1, images=images, script=script) for script in (True, False))
    path = first.save(tmp_path / "heads.html")
    path.write_text(path.read_text().replace("</body>", second.html() + "</body>"))
    with opened(path.as_uri()) as seen:
        seen.page.wait_for_function("() => document.querySelectorAll('canvas').length === 10", timeout=60_000)
        assert seen.page.get_by_text("mean Zoomed").count() == 2
        assert seen.page.locator("figcaption").first.inner_text() == first.tokens[2]
        pixels = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
        ink = f"c => {pixels}.some((value, i) => i % 4 < 3 && value > 0 && value < 200)"
        assert seen.page.locator("canvas").first.evaluate(ink)
        assert seen.errors == [] and seen.requests == []

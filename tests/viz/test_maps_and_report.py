"""Maps put every value at its patch; the page holds them, whole or not at all."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import registerlens as rl
from registerlens.analysis.maps import patch_maps
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ShapeError
from registerlens.viz import report
from registerlens.viz.maps import colour, colour_bar, data_uri


def decode(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_colours_run_from_low_to_high_and_clip():
    values = np.array([[-1.0, 0.0], [1.0, 2.0]])
    painted = colour(values, 0.0, 1.0)
    assert (painted[0, 0] == painted[0, 1]).all() and (painted[1, 0] == painted[1, 1]).all()
    assert (painted[0, 0] != painted[1, 1]).any()
    np.testing.assert_array_equal(colour_bar(7, 2)[0, 0], painted[0, 0])
    np.testing.assert_array_equal(colour_bar(7, 2)[0, -1], painted[1, 1])


def test_a_picture_survives_the_page():
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(decode(data_uri(pixels)), pixels)


@pytest.mark.parametrize("class_token", [True, False])
def test_maps_equal_the_cache(class_token):
    torch.manual_seed(0)
    cfg = rl.ViTConfig(
        n_layers=3,
        d_model=24,
        n_heads=2,
        d_mlp=32,
        image_size=(32, 48),
        patch_size=(8, 8),
        class_token=class_token,
        n_trained_registers=2,
        pooling=(),
    )
    vit, images = rl.HookedViT(cfg), torch.randn(2, 3, 40, 24)
    layout = vit.layout(images)
    maps = patch_maps(vit, images, [2, 0])
    _, cache = vit.run_with_cache(images)
    for row, layer in enumerate(maps.layers):
        norms = cache[f"blocks.{layer}.hook_resid_post"].norm(dim=-1)
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].mean(1)
        drawn = pattern[:, 0] if class_token else pattern.mean(1)
        for mine, theirs in ((maps.norms[row], norms), (maps.attention[row], drawn)):
            expected = layout.to_grid(theirs).detach().numpy()
            assert mine.shape == (2, 5, 3)
            np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-6)


def test_maps_refuse_layers_that_do_not_exist():
    vit = rl.from_pretrained("registerlens:tiny")
    with pytest.raises(ShapeError, match=r"\[6\].*0 to 5"):
        patch_maps(vit, torch.rand(1, 3, 48, 48), [0, 6])


@pytest.fixture(scope="module")
def tiny():
    vit, batch = rl.from_pretrained("registerlens:tiny"), synthetic_images(16, 2)
    return vit, batch, rl.trace(vit, batch.images)


def test_the_page_shows_the_outliers_where_they_are(tiny, tmp_path):
    vit, batch, found = tiny
    display = batch.images[:1].clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    page = report.write_report(
        tmp_path / "new" / "page.html", vit, batch.images[:1], display, found, names=["<one>.png"], title="T & U"
    )
    text = page.read_text()
    assert "T &amp; U" in text and "&lt;one&gt;.png" in text and "block 1, after its MLP" in text
    pictures = re.findall(r'<img class="map"[^>]*src="([^"]+)"', text)
    assert len(pictures) == 6  # norm and attention at the onset, the next block and the last
    norm_after_onset = decode(pictures[0]).astype(int)
    bright = (norm_after_onset[..., 1] > 150).reshape(-1)  # the bright end of viridis is green
    np.testing.assert_array_equal(bright, (batch.roles[0] == FLAT).numpy())


def test_map_layers_without_outliers_are_first_middle_last(tiny):
    vit, batch, found = tiny
    assert report.map_layers(found) == (1, 2, 5)
    torch.manual_seed(0)
    assert report.map_layers(rl.trace(rl.HookedViT(vit.cfg), batch.images)) == (0, 2, 5)


def test_an_interrupted_page_leaves_nothing(tiny, tmp_path, monkeypatch):
    vit, batch, found = tiny
    display = np.zeros((1, 48, 48, 3), np.uint8)

    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_table", broken)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(tmp_path / "p.html", vit, batch.images[:1], display, found, names=["x"], title="t")
    assert list(tmp_path.iterdir()) == []

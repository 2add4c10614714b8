"""Every value lies over its patch, in the photograph's own shape; what does not fit is refused."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from registerlens.errors import ConfigError, NonFiniteError, ShapeError
from registerlens.evaluation.comparison import InterventionMaps
from registerlens.viz.maps import layers_figure, overlay
from registerlens.viz.panels import MOST_PANELS, ColourScale, Panel, panel_figure


def decoded(source):
    assert source.startswith("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def test_a_map_keeps_its_values_and_the_photograph_its_shape():
    photograph = np.full((45, 60, 3), (200, 30, 40), np.uint8)  # 5 rows of pixels beyond the last whole patch
    values = np.arange(8.0).reshape(2, 4)
    figure = overlay(photograph, values, patch_size=(20, 15), name="norm (no unit)", titles=["mine"])
    panel = figure.data[0]
    np.testing.assert_array_equal(panel.z, values.astype(np.float32))
    np.testing.assert_array_equal(panel.customdata[..., 0], values)
    assert "row %{y}, column %{x}" in panel.hovertemplate and panel.name == "mine"
    bar = figure.layout.coloraxis
    assert (bar.cmin, bar.cmax, bar.colorbar.title.text) == (0, 7, "norm (no unit)")
    assert panel.coloraxis == "coloraxis"
    y = figure.layout.yaxis2
    assert (y.scaleanchor, y.scaleratio, tuple(y.range)) == ("x2", 20 / 15, (1.5, -0.5))
    assert tuple(figure.layout.xaxis2.range) == (-0.5, 3.5)
    alone, under = (decoded(image.source) for image in figure.layout.images)
    assert alone.shape[:2] == under.shape[:2] and alone.shape[0] / alone.shape[1] == pytest.approx(40 / 60)
    assert np.abs(alone.reshape(-1, 3).mean(0) - (200, 30, 40)).max() < 4 and under.ndim == 2  # grey under the map
    x = figure.layout.xaxis2.domain
    width = (x[1] - x[0]) * (figure.layout.width - figure.layout.margin.l - figure.layout.margin.r)
    height = (y.domain[1] - y.domain[0]) * (figure.layout.height - figure.layout.margin.t - figure.layout.margin.b)
    assert height / width == pytest.approx(40 / 60, rel=0.02)


def test_panels_share_one_scale():
    maps = np.stack([np.full((3, 3), 1.0), np.full((3, 3), 9.0)])
    figure = overlay(np.zeros((2, 6, 6, 3), np.uint8), torch.tensor(maps), low=-1.0)
    assert [one.coloraxis for one in figure.data] == ["coloraxis"] * 2
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1, 9)
    assert len(figure.layout.images) == 4  # two photographs alone, two under their maps
    assert len(overlay(np.zeros((6, 6, 3), np.uint8), maps > 2).layout.images) == 3  # one for all; booleans too


def test_logarithmic_colours_show_decades_and_exact_values_on_hover():
    values = np.array([[1.0, 0.1], [0.01, 0.0]])
    figure = overlay(np.zeros((4, 4, 3), np.uint8), values, log=True, low=0.001)
    np.testing.assert_allclose(figure.data[0].z, [[0, -1], [-2, -3]], atol=1e-6)  # nothing is at the lowest colour
    np.testing.assert_array_equal(figure.data[0].customdata[..., 0], values.astype(np.float32))
    bar = figure.layout.coloraxis
    assert (bar.cmin, bar.cmax) == (-3, 0)
    np.testing.assert_allclose(10 ** np.array(bar.colorbar.tickvals), [float(t) for t in bar.colorbar.ticktext])


def test_what_does_not_fit_is_refused():
    photograph, values = np.zeros((28, 42, 3), np.uint8), np.ones((2, 3))
    overlay(photograph, values, patch_size=14)
    with pytest.raises(ShapeError, match=r"3 x 2 patches.*28 x 42 pixels has 2 x 3"):
        overlay(photograph, values.T, patch_size=14)
    with pytest.raises(ShapeError, match="not one whole patch of 50 x 50"):
        overlay(photograph, values, patch_size=50)
    with pytest.raises(ShapeError, match=r"does not divide a photograph of 28 x 42.*patch_size"):
        overlay(photograph, np.ones((2, 4)))
    with pytest.raises(ShapeError, match="one for each"):
        overlay(np.zeros((3, 28, 42, 3), np.uint8), np.ones((2, 2, 3)))
    with pytest.raises(ShapeError, match="1 titles for 2 maps"):
        overlay(photograph, np.ones((2, 2, 3)), titles=["one"])
    with pytest.raises(NonFiniteError, match="no finite value"):
        overlay(photograph, values * np.nan)
    with pytest.raises(ConfigError, match="low below high"):
        overlay(photograph, values, low=2.0, high=1.0)
    with pytest.raises(ShapeError, match="0 x 3 patches does not divide"):
        overlay(photograph, np.ones((0, 3)))
    with pytest.raises(ShapeError, match="patch_size=0 is no patch"):
        overlay(photograph, values, patch_size=0)
    with pytest.raises(ConfigError, match=r"columns=-1 .* at least 1"):
        overlay(photograph, values, columns=-1)
    with pytest.raises(ConfigError, match=f"{MOST_PANELS + 1} panels"):
        overlay(photograph, np.ones((MOST_PANELS, 2, 3)))


def test_titles_are_shown_as_text():
    figure = overlay(np.zeros((4, 4, 3), np.uint8), np.ones((2, 2)), titles=["<b>x</b>"], title="<i>y</i>")
    assert any("&lt;b&gt;" in note.text for note in figure.layout.annotations)
    assert "<i>" not in figure.layout.title.text


def test_nothing_lies_over_anything_else():
    rng = np.random.default_rng(0)
    shapes = [(30, 60, 3), (60, 30, 3), (40, 40, 3)]
    row = [Panel(photograph=rng.integers(0, 255, s, np.uint8), values=rng.random((3, 3)), title="t") for s in shapes]
    figure = panel_figure([row, [None, row[1]]], [ColourScale.over("a", [np.ones(1)])], row_titles=["one", "two"])
    boxes = [(figure.layout[f"xaxis{i}"].domain, figure.layout[f"yaxis{i}"].domain) for i in ("", 2, 3, 4)]
    for i, (x, y) in enumerate(boxes):
        for other_x, other_y in boxes[:i]:
            assert x[0] >= other_x[1] or y[1] <= other_y[0]
    assert boxes[3][0] == boxes[1][0]  # the empty place is kept


def maps_of(layers, side, pixels, images=1, conditions=("original", "with register")):
    rng = np.random.default_rng(0)
    shape = (len(conditions), layers, images, side, side)
    return InterventionMaps(
        model="random",
        fingerprint="",
        conditions=conditions,
        interventions=("",) * len(conditions),
        layers=tuple(range(layers)),
        sink_query="cls",
        names=tuple(map(str, range(images))),
        display=rng.integers(0, 255, (images, pixels, pixels, 3), np.uint8),
        norms=rng.random(shape, np.float32),
        attention=rng.random(shape, np.float32),
        register_norm=np.full(shape[:3], np.nan, np.float32),
        register_attention=np.full(shape[:3], np.nan, np.float32),
    )


@pytest.mark.parametrize(("side", "pixels", "images", "most"), [(16, 224, 2, 2e6), (37, 518, 2, 5e6)])
def test_figures_of_24_layers_stay_small(side, pixels, images, most):
    text = layers_figure(maps_of(24, side, pixels, images)).to_json()
    assert len(text) < most
    assert text.count('"bdata"') >= 2 * 48 * images  # typed arrays


@pytest.mark.slow
def test_pixels_are_where_they_belong(tmp_path):
    from registerlens.viz.drawing import save_figure
    from tests.browser import chromium

    chromium()
    photograph = np.zeros((40, 80, 3), np.uint8)
    photograph[:20, :, 0] = 255  # red above, blue below
    photograph[20:, :, 2] = 255
    values = np.zeros((2, 4))
    values[0, 3] = 1.0  # the upper right patch
    figure = overlay(photograph, values, opacity=1.0, colours="Greys")
    with Image.open(save_figure(figure, tmp_path / "a.png", scale=1)) as picture:
        seen = np.asarray(picture.convert("RGB")).astype(int)
    layout = figure.layout
    inner_w, inner_h = (
        layout.width - layout.margin.l - layout.margin.r,
        layout.height - layout.margin.t - layout.margin.b,
    )

    def at(panel, across, down):
        x, y = (layout[f"{kind}axis{panel}"].domain for kind in "xy")
        left = layout.margin.l + inner_w * (x[0] + (x[1] - x[0]) * across)
        top = layout.margin.t + inner_h * (1 - y[1] + (y[1] - y[0]) * down)
        return seen[round(top), round(left)]

    assert at("", 0.5, 0.2)[0] > 200 > 60 > at("", 0.5, 0.2)[2]
    assert at("", 0.5, 0.8)[2] > 200 > 60 > at("", 0.5, 0.8)[0]
    grey = {(a, d): at("2", a, d).mean() for a in (0.125, 0.375, 0.625, 0.875) for d in (0.25, 0.75)}
    darkest = min(grey, key=grey.get)
    assert darkest == (0.875, 0.25) and grey[darkest] < 30 and sorted(grey.values())[1] > 225

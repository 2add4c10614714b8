"""Colours stay apart for colour-blind readers and text stands out, in both modes; figures fit."""

from itertools import combinations, pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from registerlens.errors import ConfigError
from registerlens.pictures import colour
from registerlens.viz import theme
from registerlens.viz.theme import BLUE, GREY, PALETTE, apply_theme, ink, look_of, on_cells, paper, sized

# Machado, Oliveira and Fernandes 2009: complete dichromacy, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)


def linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colour, vision):
    xyz = TO_XYZ @ np.clip(np.array(VISION[vision]) @ linear(colour), 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    """WCAG 2's formula."""
    low, high = sorted(linear(colour) @ TO_XYZ[1] for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_the_rulers_themselves():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the known greyest text
    np.testing.assert_allclose(lab("#ffffff", "normal"), [100, 0, 0], atol=0.02)
    red, green = (lab(colour, "deuteranopia") for colour in ("#9d5c00", "#5c7a00"))
    confused = np.linalg.norm(red - green)
    assert confused < np.linalg.norm(lab("#9d5c00", "normal") - lab("#5c7a00", "normal")) / 2


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_categories_stay_apart(mode, vision):
    seen = {colour: lab(colour, vision) for colour in PALETTE[mode]}
    assert len(seen) == 9
    apart, pair = min((np.linalg.norm(seen[a] - seen[b]), (a, b)) for a, b in combinations(seen, 2))
    assert apart >= 15, pair
    assert all(contrast(colour, paper(mode)) >= 2.2 for colour in seen)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out(mode):
    layout = apply_theme(go.Figure(), mode).layout
    assert layout.font.color == ink(mode)
    for ground in (layout.paper_bgcolor, layout.plot_bgcolor):
        assert contrast(layout.font.color, ground) >= 4.5


def test_a_dark_ground_lightens_what_it_would_swallow():
    def figure():
        found = go.Figure(go.Scatter(y=[1, 2], line={"color": BLUE}, marker={"color": [BLUE, "#123456"]}))
        return found.add_hline(y=1, line={"color": GREY})

    light, dark = apply_theme(figure(), "light"), apply_theme(figure(), "dark")
    assert light.data[0].line.color == light.data[0].marker.color[0] == BLUE
    assert (
        dark.data[0].line.color == dark.data[0].marker.color[0] == PALETTE["dark"][PALETTE["light"].index(BLUE)] != BLUE
    )
    assert dark.data[0].marker.color[1] == "#123456"  # not one of ours
    assert light.layout.shapes[0].line.color == GREY != dark.layout.shapes[0].line.color


# Sizes ---------------------------------------------------------------------------------------------------------------


def panels():
    figure = make_subplots(rows=2, cols=2, subplot_titles=["a", "b", "c", "d"], shared_yaxes=True)
    for i in range(3):  # the last place stays empty
        figure.add_trace(go.Scatter(y=[i], name=str(i)), row=i // 2 + 1, col=i % 2 + 1)
    return apply_theme(figure.update_layout(height=500, title="a title"))


def test_a_page_is_as_wide_as_asked():
    given = panels()
    page = sized(given, "page")
    assert page.layout.width == round(178 / 25.4 * 72 * 13 / 8)  # thirteen pixels become eight points
    assert page.layout.xaxis2.domain == given.layout.xaxis2.domain and given.layout.width is None
    assert sized(given, "cell") is given
    with pytest.raises(ConfigError, match=r"'light', 'dark'.*'grey'"):
        look_of("grey")
    with pytest.raises(ConfigError, match="'cell', 'page', 'column'"):
        theme.width_of("poster")


def test_a_column_has_its_panels_below_each_other():
    given = panels()
    column = sized(given, "column")
    assert column.layout.width == round(85 / 25.4 * 72 * 13 / 8)
    found = [(column.layout[f"xaxis{i}"].domain, column.layout[f"yaxis{i}"].domain) for i in ("", "2", "3")]
    assert all(x == (0, 1) for x, _ in found)
    assert all(above[0] > below[1] for (_, above), (_, below) in pairwise(found))
    inner = column.layout.height - column.layout.margin.t - column.layout.margin.b
    before = given.layout.yaxis.domain
    high = (before[1] - before[0]) * (500 - given.layout.margin.t - given.layout.margin.b)
    assert [(y[1] - y[0]) * inner for _, y in found] == pytest.approx([high] * 3, rel=0.01)
    tops = {note.text: note.y for note in column.layout.annotations if note.visible is not False}
    assert list(tops) == ["a", "b", "c"]
    assert [tops[name] for name in "abc"] == pytest.approx([y[1] for _, y in found])
    assert column.layout.yaxis2.showticklabels and not column.layout.xaxis4.visible
    assert given.layout.yaxis2.domain == before  # the given figure is as it was


def test_the_modes_are_those_of_the_palette():
    assert set(PALETTE) == {"light", "dark"} and len(set(theme.PALETTE["dark"])) == 9


@pytest.mark.parametrize("scale", ["Viridis", "RdBu_r", "PRGn", "RdBu"])
def test_labels_stand_out_from_every_colour(scale):
    values = np.linspace(-1, 1, 256)[None]
    options = on_cells(np.full(values.shape, "x", dtype=object), values, -1.0, 1.0, scale, width=1e6)
    grounds = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colour(values, -1.0, 1.0, scale)[0]]
    inks = [label.partition("color:")[2][:7] for label in options["text"][0]]
    assert min(map(contrast, grounds, inks)) >= 4.5 and len(set(inks)) == 2


def test_labels_without_a_value_are_of_the_colour_of_text_and_all_fit():
    options = on_cells(np.array([["none", ""]]), np.array([[np.nan, 1.0]]), 0.0, 1.0, "Viridis", "dark", width=31)
    assert options["text"].tolist() == [[f'<span style="color:{ink("dark")}">none</span>', ""]]
    assert options["textfont"]["size"] == pytest.approx(31 / 2 / 4 / 0.62)

"""The figures of kernel checks show the numbers of the report."""

import numpy as np
import pytest

import registerlens as rl
from registerlens.data.synthetic import synthetic_images
from registerlens.theory.kernels import check_kernels
from registerlens.theory.verdicts import select
from registerlens.viz.theory import kernel_figure, top_dimensions, weight_figure

NEURONS = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103), (0, 7)])


@pytest.fixture(scope="module")
def report():
    return check_kernels(rl.from_pretrained("registerlens:tiny"), NEURONS, images=synthetic_images(16, 1).images)


def test_cells_are_root_mean_squares_over_neurons_with_their_verdict(report):
    u2, outlier, u1, key = report.plot().data
    assert list(u2.x) == ["1", "2", "3", "4", "5", "head"] and u2.y[0] == "W_V"
    for vector, panel in (("u2", u2), ("u1", u1), ("outlier", outlier)):
        for i, condition in enumerate(["value", "ov", "mlp", "head"]):
            for j, layer in enumerate(range(1, 7)):
                cell = select(report.table, condition=condition, layer=layer, vector=vector, quantity="residual")
                expected = np.sqrt(np.mean((cell["value"] / cell["random"]) ** 2)) if len(cell) else np.nan
                np.testing.assert_allclose(panel.z[i][j], expected)
                assert len(cell) or not panel.text[i][j]
    # The outlier direction is there after block 1 only.
    assert np.isnan(outlier.z[0][0]) and np.isfinite(outlier.z[0][1])
    assert "≈" in outlier.text[0][2] and "holds approximately" in outlier.customdata[0][2]
    [lead] = select(report.table, condition="key", layer=3, vector="outlier")["value"]
    assert key.z[0][2] == lead and f">{lead:+.1f} ✓<" in key.text[0][2]
    titles = [note.text for note in report.plot().layout.annotations]
    assert len(titles) == 4 and titles[-1].startswith("The outlier tokens' direction as a key")


def test_weights_are_those_of_the_rows_and_their_largest_dimensions_are_named(report):
    figure = weight_figure(report, "dark")
    band, *curves = figure.data
    assert [curve.name for curve in curves] == [f"neuron {layer}:{neuron}" for layer, neuron in NEURONS.pairs]
    for curve, written in zip(curves, report.written, strict=True):
        np.testing.assert_array_equal(curve.y, written)
    assert max(band.y) == report.usual.max() and min(band.y) == -report.usual.max()
    assert [note.text for note in figure.layout.annotations] == [str(d) for d in top_dimensions(report)]
    assert top_dimensions(report)[0] == np.abs(report.written[0]).argmax()


def test_without_a_reader_the_figure_says_so():
    tiny = rl.from_pretrained("registerlens:tiny")
    cfg = rl.ViTConfig(**tiny.cfg.to_dict() | {"d_out": None})
    figure = kernel_figure(check_kernels(rl.HookedViT(cfg), rl.RegisterNeurons.from_pairs([(5, 1)])))
    assert not figure.data and "No later block or head reads" in figure.layout.annotations[0].text

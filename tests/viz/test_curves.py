"""The figure shows the numbers of the trace."""

import numpy as np
import pytest
import torch

import registerlens as rl
from registerlens.data.synthetic import synthetic_images
from registerlens.viz.detection import trace_figure


@pytest.fixture(scope="module")
def found():
    return rl.trace(rl.from_pretrained("registerlens:tiny"), synthetic_images(8, 1).images)


def test_curves_are_the_trace(found):
    curves = {curve.name: np.asarray(curve.y, float) for curve in found.plot().data}
    np.testing.assert_array_equal(curves["largest, after attention"], found.largest_norm[1::2])
    np.testing.assert_array_equal(curves["largest, after the MLP"], found.largest_norm[2::2])
    np.testing.assert_array_equal(curves["median, after the MLP"], found.median_norm[2::2])
    np.testing.assert_array_equal(curves["strongest head"], found.head_sink.max(1))
    np.testing.assert_array_equal(curves["mean of heads"], found.mean_sink)


def test_the_onset_is_marked_where_there_is_one(found):
    figure = trace_figure(found)
    assert [shape.x0 for shape in figure.layout.shapes] == [1, 1]
    assert any("onset: 1.mlp" in note.text for note in figure.layout.annotations)
    torch.manual_seed(0)
    untrained = rl.trace(rl.HookedViT(rl.from_pretrained("registerlens:tiny").cfg), synthetic_images(8, 1).images)
    assert not trace_figure(untrained).layout.shapes


def test_dark_and_light_differ_only_in_looks(found):
    light, dark = trace_figure(found), trace_figure(found, "dark")
    assert light.layout.paper_bgcolor != dark.layout.paper_bgcolor
    for one, other in zip(light.data, dark.data, strict=True):
        assert (one.name, one.mode, one.line.dash) == (other.name, other.mode, other.line.dash)
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.y, other.y)

"""The figures of observables and of neuron evidence show the numbers of their results."""

import numpy as np
import pytest

import registerlens as rl
from registerlens.analysis.massive import massive_activations
from registerlens.analysis.neuron_evidence import activation_distributions
from registerlens.analysis.neuron_updates import neuron_updates
from registerlens.analysis.output_weights import output_weights
from registerlens.analysis.overlap import observable_overlap
from registerlens.analysis.singular_defects import singular_defects
from registerlens.data.synthetic import synthetic_images
from registerlens.evaluation.causal_order import CONDITIONS, causal_order
from registerlens.viz.neuron_evidence import causal_figure, distributions_figure, updates_figure, weights_figure
from registerlens.viz.observables import defects_figure, massive_figure, overlap_figure


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def images():
    return synthetic_images(24, 0).images


@pytest.fixture(scope="module")
def neurons():
    return rl.RegisterNeurons.from_pairs([(1, 183), (0, 214), (1, 103), (2, 119)])


def words(figure):
    return " ".join(note.text or "" for note in figure.layout.annotations)


def named(figure, name):
    return [curve for curve in figure.data if curve.name == name]


def test_massive_activations_are_drawn_place_by_place(tiny, images):
    found = massive_activations(tiny, images)
    figure = massive_figure(found, "dark")
    for name, values in (("largest magnitude", found.largest), ("largest / median", found.ratio)):
        np.testing.assert_array_equal(named(figure, name)[0].y, values)
    bars = figure.data[-1]
    assert (np.diff(bars.y) <= 0).all() and bars.text[0] == f"channel {found.top_channels[6, 0]}"
    assert f"channel {found.top_channels[6, 0]}: {found.largest[6]:.3g}" in words(figure)
    assert found.plot().layout.yaxis.type == "log"


def test_overlaps_are_drawn_with_none_where_there_is_none(tiny, images):
    found = observable_overlap(tiny, images)
    conditional, jaccard, matched = overlap_figure(found).data
    np.testing.assert_array_equal(np.array(conditional.z, float), found.conditional)
    np.testing.assert_array_equal(np.array(jaccard.z, float), found.jaccard)
    np.testing.assert_array_equal(np.array(matched.z, float), found.matched_share)
    assert list(conditional.customdata[1]) == ["none"] * 3 and all(">none<" in label for label in conditional.text[1])
    assert f"unrelated: {found.chance:.2f}" in words(found.plot())


def test_defects_are_drawn_with_and_without_images(tiny, images):
    for found in (singular_defects(tiny, images), singular_defects(tiny)):
        figure = defects_figure(found)
        every, best = figure.data[-2:]
        np.testing.assert_array_equal(every.y, found.alignment.ravel())
        np.testing.assert_array_equal(best.y, found.neurons(top=5)["alignment"])
        np.testing.assert_array_equal(best.customdata, found.neurons(top=5)[["layer", "neuron"]].values)
        assert (np.round(np.asarray(every.x)) == np.repeat(np.arange(6), 256)).all()
        if found.n_images:
            np.testing.assert_array_equal(named(figure, "outliers")[0].y, found.outlier_angle)
            assert "one random direction in 20 is below" in words(figure)
        else:
            np.testing.assert_array_equal(figure.data[0].y, found.dominance)
        assert found.plot().data


def test_distributions_count_every_activation(tiny, images, neurons):
    found = activation_distributions(tiny, images, neurons)
    figure = distributions_figure(found)
    bars = [curve for curve in figure.data if curve.type == "bar"]
    assert [sum(curve.y) for curve in bars] == [found.n_with_outliers * 256] * 6
    dots = [curve for curve in figure.data if curve.type == "scatter"]
    mean, std = found.listed(found.mean), found.listed(found.std)
    by_layer = {0: [1], 1: [0, 2], 2: [3]}
    for i, rows in enumerate(by_layer.values()):
        for place in (0, 1):
            curve = dots[2 * i + place]
            np.testing.assert_allclose(np.sinh(curve.y), mean[place, rows], rtol=1e-9, atol=1e-12)
            top = np.sinh(np.asarray(curve.y) + curve.error_y.array)
            np.testing.assert_allclose(top, mean[place, rows] + std[place, rows], rtol=1e-9, atol=1e-12)
            assert list(curve.x) == [str(neurons.pairs[j][1]) for j in rows]
    assert f"skewness {found.skewness[0, 1]:.1f} and {found.skewness[1, 1]:.1f}" in words(found.plot())


def test_weights_count_every_dimension_and_name_the_largest(tiny, neurons):
    found = output_weights(tiny, neurons, draws=5)
    figure = weights_figure(found)
    for curve in figure.data:
        assert sum(curve.y) == pytest.approx(64)
    for (layer, neuron), row in zip(neurons.pairs, found.rows, strict=True):
        assert f"neuron {layer}:{neuron}" in words(figure) and f"dim {np.abs(row).argmax()}" in words(figure)
    many = rl.RegisterNeurons.from_pairs([(1, n) for n in range(15)])
    shown = output_weights(tiny, many, draws=5).plot()
    assert "the first 12 of 15 neurons" in shown.layout.title.text and len(shown.data) == 24


def test_updates_are_drawn_as_shares(tiny, images, neurons):
    found = neuron_updates(tiny, images, neurons, draws=4)
    figure = updates_figure(found)
    assert len(figure.data) == 3 * 4
    for curve in figure.data:
        assert np.nansum(curve.y) == pytest.approx(1) or not np.isfinite(np.asarray(curve.y, float)).any()
    assert f"mean {found.norm[1, 0]:.3g}" in words(found.plot())


def test_the_causal_order_has_a_panel_a_condition_and_sorted_columns(tiny, images, neurons):
    found = causal_order(tiny, images, neurons)
    figure = causal_figure(found)
    assert len(figure.data) == len(CONDITIONS)
    for c, panel in enumerate(figure.data):
        assert list(panel.x) == ["1: 103", "1: 183", "2: 119"] and list(panel.y) == ["block 0", "block 1"]
        np.testing.assert_array_equal(np.array(panel.z, float), found.change[c, :2][:, [2, 0, 3]])
    assert found.plot().layout.height == figure.layout.height

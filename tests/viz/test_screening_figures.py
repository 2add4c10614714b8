"""The figures of screened neurons and edges show the numbers of their results."""

import dataclasses

import numpy as np
import pytest

import registerlens as rl
from registerlens.circuits.edge_attribution import attribute_edges
from registerlens.circuits.screening import screen_neurons
from registerlens.data.synthetic import synthetic_images
from registerlens.viz.patching import edges_figure, screening_figure
from registerlens.viz.theme import ink, paper


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def found(tiny):
    return screen_neurons(tiny, synthetic_images(16, 0).images, "largest_norm@1.mlp", exact=7, sample=20)


def test_candidates_and_others_stand_at_effect_and_certainty(found):
    candidates, others, diagonal, random, checked = screening_figure(found).data
    names = [f"neuron {layer}:{neuron}" for layer, neuron in found.checked[:7].tolist()]
    assert sorted(candidates.text) == sorted(names) and list(checked.text) == names
    row = list(candidates.text).index("neuron 1:183")
    effect, error = found.effects[1, 183], found.standard_error[1, 183]
    assert candidates.x[row] == effect and candidates.y[row] == pytest.approx(abs(effect) / error)
    assert 900 <= len(others.x) <= 2000 and not set(names) & set(others.text)
    np.testing.assert_array_equal(checked.x, found.screened[:7])
    np.testing.assert_array_equal(checked.y, found.exact[:7])
    np.testing.assert_array_equal(random.y, found.exact[found.is_sample])
    assert diagonal.x == diagonal.y and min(diagonal.x) <= min(found.exact) and max(diagonal.x) >= max(found.screened)


def test_titles_carry_the_rank_correlations(found):
    words = " ".join(note.text for note in screening_figure(found).layout.annotations)
    assert f"random {found.on_sample.rho:.2f} (n = 20)" in words
    assert f"candidates {found.on_candidates.rho:.2f} (n = 7)" in words and "first order" in words


def test_one_image_has_no_certainty_and_no_check_leaves_a_note(tiny):
    found = screen_neurons(tiny, synthetic_images(1, 0).images, "largest_norm@1.mlp", exact=0, sample=0)
    figure = found.plot()
    assert set(figure.data[1].y) <= set(range(6)) and figure.layout.yaxis.type != "log"
    words = " ".join(note.text for note in figure.layout.annotations)
    assert "no neuron was ablated exactly" in words and "random unknown" in words


def test_edges_are_rows_of_neurons_and_columns_of_heads(tiny):
    neurons = rl.RegisterNeurons.from_pairs([(1, 183), (3, 5)])
    edges = attribute_edges(tiny, synthetic_images(32, 0).images, neurons)
    (cells,) = edges.plot().data
    assert list(cells.y) == ["1: 183", "3: 5"] and list(cells.x) == ["2.0", "3.0", "4.0", "5.0"]
    np.testing.assert_array_equal(cells.z, edges.effects[:, :, 0])
    assert cells.zmax == -cells.zmin == np.nanmax(np.abs(edges.effects)) and np.isnan(cells.z[1, :2]).all()
    some = dataclasses.replace(edges, effects=np.where(np.arange(4)[:, None] == 1, np.nan, edges.effects))
    assert list(edges_figure(some).data[0].x) == ["2.0", "4.0", "5.0"]


def test_both_come_in_the_dark(found, tiny):
    edges = attribute_edges(tiny, synthetic_images(32, 0).images, rl.RegisterNeurons.from_pairs([(1, 183)]))
    for figure in (screening_figure(found, "dark"), edges_figure(edges, "dark")):
        assert figure.layout.paper_bgcolor == paper("dark") and figure.layout.font.color == ink("dark")

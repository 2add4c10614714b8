"""Every figure of the paper draws from results made by the call that it names, and shows these results' numbers."""

import re

import numpy as np
import pytest
import torch

import registerlens as rl
from registerlens.analysis import maps as analysis_maps
from registerlens.analysis.maps import patch_maps
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, InterventionError, NonFiniteError, ShapeError
from registerlens.evaluation import comparison, shifts
from registerlens.evaluation.comparison import InterventionMaps, compare_maps
from registerlens.evaluation.controls import random_neurons
from registerlens.evaluation.shifts import OutlierShift, RandomPatches, measure_shift
from registerlens.viz.paper import FIGURES, NOT_DRAWN, paper_figure, paper_figures
from registerlens.viz.tables import styled

NEURONS = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
ASKED = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, *range(16, 30))
MAPS = [number for number, one in FIGURES.items() if list(one.takes) == [InterventionMaps]]
WITH_NEURONS = [3, 19, 28]
SHIFTS = [4, 22, 23, 24, 29]


class Calls:
    """What `rl` is, with what this change adds to it."""

    compare_maps, measure_shift, RandomPatches = map(
        staticmethod, (comparison.compare_maps, shifts.measure_shift, shifts.RandomPatches)
    )
    neuron_maps = staticmethod(analysis_maps.neuron_maps)

    def __getattr__(self, name):
        return getattr(rl, name)


SHARED = pytest.mark.xdist_group("paper")  # what they share is made once


@pytest.fixture(scope="module")
def vit():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def results(vit):
    """For every number, what the calls in the registry give."""
    names = {"vit": vit, "images": synthetic_images(6, 3).images, "neurons": NEURONS, "torch": torch, "rl": Calls()}
    names |= {"positions": [0, 7], "positions_of_text": [3], "random_neurons": random_neurons}
    made = {}

    def result(call):
        call = re.sub(r"images, \[\(.*\)\]\)", "images, [(1, 183), (1, 103)])", call)  # the tiny model's own neurons
        if call not in made:
            torch.manual_seed(0)
            made[call] = eval(call, names)
        return made[call]

    return {number: [result(call) for call in one.takes.values()] for number, one in FIGURES.items()}


def test_every_figure_asked_for_is_there():
    assert set(ASKED) <= set(FIGURES) and set(FIGURES) | set(NOT_DRAWN) == set(range(1, 33))
    assert list(paper_figures()["figure"]) == list(FIGURES)


def shown(trace, scale):
    """A map's values, as coloured and as told on hover."""
    coloured = 10**trace.z if scale.cmin < 0 else trace.z
    np.testing.assert_allclose(
        np.maximum(coloured, 0),
        np.maximum(trace.customdata[..., 0], 10**scale.cmin if scale.cmin < 0 else 0),
        rtol=1e-4,
    )
    return trace.customdata


@pytest.mark.slow
@SHARED
@pytest.mark.parametrize("number", MAPS)
def test_maps_show_their_results(results, number):
    (found,) = results[number]
    images = [4, 1]
    figure = paper_figure(number, found, images=images)
    layers = found.layers if number in (16, 17, 18) else found.layers[-1:]
    layers = {17: layers[:3], 18: layers[3:]}.get(number, layers)
    measures = {1: ("norms", "attention"), 15: ("norms",)}.get(number, ("attention",))
    if number in (16, 17, 18):
        expected = [("attention", c, layer, i) for i in images for c in found.conditions for layer in layers]
    else:
        expected = [(m, c, layers[0], i) for i in images for m in measures for c in found.conditions]
    assert len(figure.data) == len(expected)
    for trace, (measure, condition, layer, image) in zip(figure.data, expected, strict=True):
        told = shown(trace, figure.layout[trace.coloraxis])
        other = "norms" if measure == "attention" else "attention"
        np.testing.assert_array_equal(told[..., 0], found.at(measure, condition, layer)[image])
        np.testing.assert_array_equal(told[..., 1], found.at(other, condition, layer)[image])
    names = [name for name in figure.layout if name.startswith("coloraxis")]
    assert len(names) == len(measures) and {trace.coloraxis for trace in figure.data} == set(names)
    assert all(figure.layout[name].colorbar.title.text for name in names)


@pytest.mark.slow
@SHARED
@pytest.mark.parametrize("number", WITH_NEURONS)
def test_neurons_show_their_results(results, number):
    maps, neurons = results[number]
    figure = paper_figure(number, neurons, maps, images=[2])  # in any order
    np.testing.assert_array_equal(shown(figure.data[0], figure.layout.coloraxis)[..., 0], maps.norms[0, -1, 2])
    for trace, activations in zip(figure.data[1:], neurons.activations, strict=True):
        np.testing.assert_array_equal(shown(trace, figure.layout.coloraxis2)[..., 0], activations[2])


@pytest.mark.slow
@SHARED
@pytest.mark.parametrize("number", SHIFTS)
def test_histograms_count_their_results(results, number):
    (found,) = results[number]
    pairs = [(found.other_norm, found.target_norm), (found.other_attention, found.target_attention)]
    figure = paper_figure(number, found)
    for bars, values in zip(figure.data, [one for pair in pairs for one in pair], strict=True):
        edges = np.append(bars.x - bars.width / 2, bars.x[-1] + bars.width / 2)
        for low, high, counted in zip(edges[:-1], edges[1:], bars.y, strict=True):
            inside = (values >= low - 1e-9) & (values < high - 1e-9 if high < edges[-1] else values <= high + 1e-6)
            assert abs(int(inside.sum()) - counted) <= 1  # a value at an edge may fall to either side
        assert sum(bars.y) == found.n_images


@pytest.mark.slow
@SHARED
def test_other_figures_show_their_results(results):
    for number in (2, 26):
        (trace,) = results[number]
        curves = {one.name: one.y for one in paper_figure(number, trace).data}
        np.testing.assert_array_equal(curves["largest, after the MLP"], trace.largest_norm[2::2])
        np.testing.assert_array_equal(curves["mean of heads"], trace.mean_sink)
    (evaluation,) = results[8]
    curves = {one.name: one.y for one in paper_figure(8, evaluation).data}
    assert list(curves) == ["clean", "attention bias"]  # no controls
    np.testing.assert_array_equal(curves["attention bias"], evaluation.norm_curve[1])
    for number in (20, 27):
        (found,) = results[number]
        figure = paper_figure(number, found)
        assert [sum(bars.y) for bars in figure.data[:4:2]] == [one[0].sum() for one in found.histogram]
    (updates,) = results[21]
    np.testing.assert_allclose(sum(paper_figure(21, updates).data[0].y), 1.0)  # shares of images
    (weights,) = results[25]
    bars = [one for one in paper_figure(25, weights).data if one.name == "register neuron"]
    assert [sum(one.y) for one in bars] == [weights.relative.shape[1]] * len(NEURONS)


@pytest.mark.slow
@SHARED
@pytest.mark.parametrize(("mode", "size"), [("light", "page"), ("dark", "column")])
def test_every_figure_is_drawn_in_every_look(results, mode, size):
    widths = {"page": 820, "column": 392}
    for number in (1, 2, 16, 20):
        options = {"images": [0]} if "images" in FIGURES[number].options else {}
        figure = paper_figure(number, *results[number], mode=mode, size=size, **options)
        assert figure.layout.paper_bgcolor == {"light": "#ffffff", "dark": "#15181c"}[mode]
        assert figure.layout.width <= widths[size] + 1


@pytest.mark.slow
@SHARED
def test_mistakes_say_what_to_do(results):
    with pytest.raises(ConfigError, match=r"(?s)no figure 77.*1: Outliers.*29: DINOv2") as caught:
        paper_figure(77)
    assert len(str(caught.value).splitlines()) == 1 + len(FIGURES)
    with pytest.raises(ConfigError, match="Figure 11 is not drawn here: a drawing of algorithm 2"):
        paper_figure(11)
    with pytest.raises(
        ConfigError, match=r"Figure 2 .* takes a Trace, from rl.trace\(vit, images\); got InterventionMaps"
    ):
        paper_figure(2, *results[1])
    with pytest.raises(ConfigError, match=r"and a NeuronMaps, from rl.analysis.neuron_maps.*got nothing"):
        paper_figure(3)
    with pytest.raises(ConfigError, match=r"no option \['layer'\]"):
        paper_figure(2, *results[2], layer=1)
    with pytest.raises(ConfigError, match="images 0 to 5"):
        paper_figure(5, *results[5], images=[6])
    with pytest.raises(ConfigError, match=r"at the blocks \[0, 1, 2, 3, 4, 5\]"):
        paper_figure(5, *results[5], layer=6)
    with pytest.raises(ConfigError, match="Choose fewer images"):
        paper_figure(16, *results[12])


# The results themselves ----------------------------------------------------------------------------------------------


def odd():
    """Not square: neither the images nor the patches; pixels beyond the last patch; [CLS] and a trained register."""
    torch.manual_seed(0)
    cfg = rl.ViTConfig(
        n_layers=2, d_model=24, n_heads=2, d_mlp=32, image_size=(40, 36), patch_size=(8, 12), n_trained_registers=1
    )
    return rl.HookedViT(cfg), torch.randn(3, 3, 44, 38)


def test_maps_equal_those_of_the_edited_model():
    vit, images = odd()
    neurons = rl.RegisterNeurons.from_pairs([(0, 3), (0, 4)])
    register = rl.TestTimeRegisters(neurons)
    maps = compare_maps(vit, images, {"a": None, "b": register, "c": [rl.Ablate(neurons), rl.MoveOutliers(neurons, 2)]})
    assert maps.norms.shape == (3, 2, 3, 5, 3) and maps.display.shape == (3, 40, 36, 3) and maps.sink_query == "cls"
    layout = vit.layout(images)
    for condition, edits in (("a", []), ("b", [register])):
        with vit.edit(*edits), torch.no_grad():
            _, cache = vit.run_with_cache(images)
        norms = cache["blocks.1.hook_resid_post"].norm(dim=-1)
        drawn = cache["blocks.1.attn.hook_pattern"].mean(1)[:, 0]
        for measure, values in (("norms", norms), ("attention", drawn)):
            expected = layout.to_grid(values[:, layout.patches]).numpy()
            np.testing.assert_allclose(maps.at(measure, condition, 1), expected, rtol=1e-5)
    np.testing.assert_allclose(maps.register_norm[1, 1], norms[:, -1], rtol=1e-5)
    assert np.isnan(maps.register_norm[0]).all()
    with vit.edit(rl.Ablate(neurons), rl.MoveOutliers(neurons, 2)):
        np.testing.assert_array_equal(maps.norms[2, 0], patch_maps(vit, images, [0]).norms[0])
    figure = maps.plot(images=[1])
    assert figure.data[0].z.shape == (5, 3) and figure.layout.yaxis2.scaleratio == pytest.approx(8 / 12)
    assert maps.plot_layers(layers=[1]).data[0].z.shape == (5, 3)


def test_maps_are_kept_and_joined(tmp_path):
    vit, images = odd()
    one = compare_maps(vit, images, {"a": None}, layers=[1], names=["x", "y", "z"])
    loaded = InterventionMaps.load(one.save(tmp_path))
    for name in ("norms", "attention", "display", "register_norm", "register_attention"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(one, name))
    assert (loaded.names, loaded.layers, loaded.conditions) == (("x", "y", "z"), (1,), ("a",))
    other = compare_maps(odd()[0], images, {"b": None}, layers=[1])
    both = one | other
    assert both.conditions == ("a", "b") and both.norms.shape[0] == 2
    for wrong, words in (
        (one, "Both have the conditions"),
        (compare_maps(vit, images, {"b": None}), "same blocks"),
        (compare_maps(vit, images + 1, {"b": None}, layers=[1]), "same images"),
    ):
        with pytest.raises(ConfigError, match=words):
            one | wrong
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"result\.json"):
        InterventionMaps.load(tmp_path)


def test_what_cannot_be_compared_is_refused():
    vit, images = odd()
    with pytest.raises(ConfigError, match="Nothing to compare"):
        compare_maps(vit, images, {})
    with pytest.raises(ConfigError, match="2 names for 3 images"):
        compare_maps(vit, images, {"a": None}, names=["x", "y"])
    with pytest.raises(ShapeError, match=r"\[3, 8, 8, 3\], expected \[3, 44, 38, 3\]"):
        compare_maps(vit, images, {"a": None}, display=np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ShapeError, match="smaller than one patch"):
        compare_maps(vit, images[:, :, :7], {"a": None})
    with pytest.raises(ShapeError, match="blocks 0 to 1"):
        compare_maps(vit, images, {"a": None}, layers=[2])
    with pytest.raises(ConfigError, match="no measure to show"):
        compare_maps(vit, images, {"a": None}, layers=[0]).plot(measures=())


def test_shifts_equal_the_cache():
    vit, images = odd()
    neurons = rl.RegisterNeurons.from_pairs([(0, 3)])
    layout = vit.layout(images)
    for edit, target in ((rl.MoveOutliers(neurons, [4, 5]), [4, 5]), (rl.TestTimeRegisters(neurons), [15])):
        found = measure_shift(vit, images, edit, batch_size=2)
        with vit.edit(edit), torch.no_grad():
            _, cache = vit.run_with_cache(images)
        start = layout.patches.start
        others = [i for i in range(15) if i not in target]
        norms = cache["blocks.1.hook_resid_post"].norm(dim=-1)[:, start:].numpy()
        drawn = cache["blocks.1.attn.hook_pattern"].mean(1)[:, 0, start:].numpy()
        for name, values in (("norm", norms), ("attention", drawn)):
            np.testing.assert_allclose(getattr(found, f"target_{name}"), values[:, target].max(1), rtol=1e-5)
            np.testing.assert_allclose(getattr(found, f"other_{name}"), values[:, others].max(1), rtol=1e-5)


@pytest.mark.slow
@SHARED
def test_register_neurons_shift_outliers_and_random_ones_do_not(vit, results, tmp_path):
    assert [results[number][0].taken for number in (4, 22, 23, 24)] == [1, 1, 0, 0]
    found = results[4][0]
    loaded = OutlierShift.load(found.save(tmp_path))
    np.testing.assert_array_equal(loaded.to_dataframe(), found.to_dataframe())
    assert "chosen patches had the largest norm in 100% of 6 images" in loaded.describe()
    images = synthetic_images(2, 0).images
    with pytest.raises(NonFiniteError, match="NaN or infinite after block 5"):
        measure_shift(vit, images * torch.nan, rl.TestTimeRegisters(NEURONS))
    with pytest.raises(InterventionError, match="has no target"):
        measure_shift(vit, images, rl.Ablate(NEURONS))
    with pytest.raises(ShapeError, match="a block from 0 to 5"):
        measure_shift(vit, images, rl.TestTimeRegisters(NEURONS), layer=6)
    with pytest.raises(ShapeError, match="37 patches were asked for"):
        RandomPatches((8, 8), n=37)(images)
    draws = RandomPatches((8, 8))(synthetic_images(40, 1).images)
    assert len(draws.unique()) > 15  # not one place for all


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@SHARED
def test_tables_say_what_results_hold(vit, results):
    images = synthetic_images(4, 0).images
    updates = rl.theory.value_update(vit, images, NEURONS, registers=[1, 2])
    text = styled(updates).to_html()
    assert f"{updates.cosine[1]:.3f}" in text and "2 test-time registers" in text and "block 5" in text
    assert (
        "183" in styled(NEURONS, caption="my <neurons>").to_html()
        and "my &lt;neurons&gt;" in styled(NEURONS, "my <neurons>").to_html()
    )
    evaluation = results[8][0]
    assert f"{evaluation.mean('outliers', 'clean'):.3f}" in styled(evaluation).to_html()
    assert "fails" in styled(rl.check_kernels(vit, NEURONS)).to_html()
    import pandas as pd

    text = styled(pd.DataFrame({"<b>a</b>": ["<script>x</script>"], "b": [0.12345]})).to_html()
    assert "<script>" not in text and "<b>a" not in text and "0.123" in text
    assert "color:" not in text.replace("currentColor", "").replace("border-color", "")  # the notebook's theme decides
    with pytest.raises(ConfigError, match=r"no table of Trace.*to_dataframe"):
        styled(results[2][0])

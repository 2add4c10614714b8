"""The figures of searches, histograms and evaluations show the numbers of their results."""

import dataclasses

import numpy as np
import pytest
import torch

import registerlens as rl
from registerlens.data.synthetic import synthetic_images
from registerlens.viz.detection import search_figure
from registerlens.viz.evaluation import FOREST, evaluation_figure, groups_of


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def neurons(tiny):
    return rl.find_register_neurons(tiny, synthetic_images(64, 0).images)


@pytest.fixture(scope="module")
def done(tiny, neurons):
    images = synthetic_images(16, 1).images
    bias = rl.AttentionBias.fit(tiny, images, neurons)
    return rl.evaluate_intervention(tiny, images, {"register": rl.TestTimeRegisters(neurons), "bias": bias})


def axis_lines(figure):
    return sorted(shape.x0 for shape in figure.layout.shapes)


def words(figure):
    return " ".join(note.text for note in figure.layout.annotations)


def test_the_histogram_counts_every_patch_once_and_marks_the_cut_off(tiny):
    outliers = rl.find_outliers(tiny, synthetic_images(16, 1).images)
    normal, outlying = outliers.plot().data
    assert np.nansum(normal.y) == (~outliers.mask).sum() and np.nansum(outlying.y) == outliers.mask.sum()
    assert np.asarray(normal.x)[np.isfinite(normal.y)].max() < outliers.threshold
    assert outliers.threshold < np.asarray(outlying.x)[np.isfinite(outlying.y)].min()
    assert axis_lines(outliers.plot()) == [outliers.threshold]
    assert outliers.plot().layout.yaxis.type == "log"


def test_the_histogram_of_a_model_without_outliers_says_so(tiny):
    torch.manual_seed(0)
    outliers = rl.find_outliers(rl.HookedViT(tiny.cfg), synthetic_images(8, 1).images)
    figure = outliers.plot()
    assert not figure.layout.shapes and "outliers absent" in words(figure)
    assert np.nansum(figure.data[0].y) == outliers.norms.numel() and not np.nansum(figure.data[1].y)


def test_an_absolute_cut_off_is_drawn_in_norms(tiny):
    outliers = rl.find_outliers(tiny, synthetic_images(8, 1).images, threshold=300.0)
    assert axis_lines(outliers.plot()) == [300.0] and "Euclidean norm" in outliers.plot().layout.xaxis.title.text


def test_scores_are_those_of_the_search_with_the_neuron_on_hover(neurons):
    search = neurons.search
    chosen, others, sweep = search_figure(search).data
    assert [f"neuron {layer}:{neuron}" for layer, neuron in neurons.pairs] == list(chosen.text)
    np.testing.assert_array_equal(chosen.y, neurons.scores)
    assert (len(chosen.y), others.x[0]) == (search.top_k, search.top_k + 1)
    assert list(zip(sweep.x, sweep.y, strict=True)) == list(search.sweep_curve)
    assert search_figure(search).layout.yaxis.type == "log"


def test_elbow_sweep_and_choice_are_marked(neurons):
    search = dataclasses.replace(
        neurons.search, elbow=5, sweep=9, taken=tuple((a, b) for a, b, _ in neurons.search.ranked[:9])
    )
    figure = search_figure(search)
    assert axis_lines(figure) == [5.5, 9.5]
    assert "chosen, sweep: 9" in words(figure) and "elbow: 5" in words(figure)


def test_without_a_sweep_the_figure_says_why(neurons):
    search = dataclasses.replace(neurons.search, sweep=None, sweep_curve=(), sweep_note="no images were held back")
    figure = search_figure(search)
    assert "no images were held back" in words(figure).replace("<br>", " ")
    assert [curve.name for curve in figure.data] == ["register neurons (7)", "other candidates"]


def test_the_auc_is_on_a_linear_axis(neurons):
    search = dataclasses.replace(neurons.search, score="auc", elbow=None, sweep=6)
    figure = search_figure(search)
    assert figure.layout.yaxis.type != "log" and axis_lines(figure) == [6.5, 7.5]


def lines(figure, axis, dash):
    return {
        curve.hovertemplate.partition("<br>")[0]: np.asarray(curve.y, float)
        for curve in figure.data
        if curve.mode == "lines" and curve.yaxis == axis and curve.line.dash == dash and curve.x[0] is not None
    }


def test_curves_are_those_of_the_evaluation(done):
    figure = done.plot()
    for axis, patches, extra in (
        ("y", done.norm_curve, done.register_curve),
        ("y2", done.sink_curve, done.register_sink_curve),
    ):
        solid, dashed = lines(figure, axis, "solid"), lines(figure, axis, "dash")
        assert set(solid) == set(done.conditions)
        for i, name in enumerate(done.conditions):
            np.testing.assert_array_equal(solid[name], patches[i])
            assert (f"{name}, register or bias" in dashed) == np.isfinite(extra[i]).any()
    assert "bias, register or bias" in dashed and "bias, register or bias" not in lines(figure, "y", "dash")


def test_dots_and_intervals_are_those_of_the_table(done):
    frame = done.to_dataframe()
    figure = evaluation_figure(done)
    outliers = frame[frame["metric"] == "outliers"].set_index("condition")
    dots = {
        text.partition(":")[0]: (x, *band)
        for curve in figure.data
        if curve.yaxis == "y3"
        for text, x, *band in zip(curve.text, curve.x, curve.error_x.arrayminus, curve.error_x.array, strict=True)
    }
    assert set(dots) == set(done.conditions)
    for name, (x, below, above) in dots.items():
        np.testing.assert_allclose((x, x - below, x + above), outliers.loc[name, ["mean", "low", "high"]].astype(float))
    shown = [figure.layout[f"xaxis{i}"].title.text for i in range(3, 3 + 3)]
    assert shown == [FOREST[name] for name in ("outliers", "cos_normal", "kl")]


def test_draws_of_one_control_share_a_colour_and_a_legend_entry(done):
    groups = {group.name: group for group in groups_of(done)}
    assert [done.conditions[i] for i in groups["random (3 draws)"].members] == ["random 1", "random 2", "random 3"]
    assert len({group.colour for group in groups.values()}) == len(groups)
    named = [curve.name for curve in done.plot().data if curve.showlegend is None and curve.name]
    assert named == list(groups)


def test_an_evaluation_without_controls_or_register_draws(tiny, neurons):
    done = rl.evaluate_intervention(tiny, synthetic_images(8, 1).images, rl.Ablate(neurons), controls=False)
    figure = done.plot()
    assert not lines(figure, "y", "dash") and "dashed" not in words(figure)
    assert list(figure.layout.yaxis3.ticktext) == ["clean", "Ablate"]

"""Built-in metrics against the evaluation of interventions, closed forms and hand-made views; and what is refused."""

import math
import pickle

import numpy as np
import pytest
import torch
from runner_cases import edits_of, metrics_of, model, naive_view, neurons, shard_of

import registerlens as rl
from registerlens.analysis.detection import Cutoff, after_onset, detect
from registerlens.config import TokenLayout
from registerlens.engine.views import View
from registerlens.errors import ConfigError, ShapeError
from registerlens.evaluation.metrics import (
    Metric,
    check_metrics,
    default_metrics,
    largest_norm,
    measured,
    metric,
    outliers,
    sink_outliers,
    sink_patch,
)
from registerlens.evaluation.observe import Yardstick, accuracy, agreement, cross_entropy, divergence, observe

LAYOUT = TokenLayout(grid=(1, 4), n_prefix=1)


def view(norms=None, attention=None, layout=LAYOUT, output=((1.0, 2.0),), labels=None, tokens=None):
    """One image with these numbers."""
    output = torch.tensor(output)
    return View(
        layout=layout,
        tokens=torch.ones(len(output), layout.n_tokens, 2) if tokens is None else torch.tensor(tokens),
        output=output,
        norms={} if norms is None else {"3.mlp": torch.tensor([norms])},
        attention={} if attention is None else {at: torch.tensor([rows]) for at, rows in attention.items()},
        labels=None if labels is None else torch.tensor(labels),
    )


def number(one, edited, clean):
    [[value]] = measured([one], edited, clean).tolist()
    return value


# Built in ------------------------------------------------------------------------------------------------------------


def test_norms_count_in_the_clean_median_and_patches_alone():
    with_register = TokenLayout(grid=(1, 4), n_prefix=1, n_test_time_registers=1)
    clean, edited = view([90.0, 1.0, 2.0, 4.0, 90.0]), view([900.0, 30.0, 1.0, 33.0, 8.0, 500.0], layout=with_register)
    assert number(largest_norm("3.mlp"), edited, clean) == 33 / 3
    relative, fixed = (Cutoff(value=10.0, relative=kind) for kind in (True, False))
    assert number(outliers("3.mlp", relative), edited, clean) == 1  # above 30: the one of 33
    assert number(outliers("3.mlp", fixed), edited, clean) == 2
    assert number(outliers("3.mlp", relative), clean, clean) == 1
    assert number(outliers("3.mlp", Cutoff(value=math.inf, relative=True)), edited, clean) == 0


def test_sinks_are_attention_to_the_clean_runs_outliers():
    clean = view([1.0, 1.0, 1.0, 1.0, 40.0])
    heads = {2: [[0.1, 0.2, 0.3, 0.0, 0.4], [0.1, 0.4, 0.3, 0.2, 0.0]], 3: [[0.5, 0.5, 0.0, 0.0, 0.0]] * 2}
    edited, cutoff = view([1.0, 50.0, 1.0, 1.0, 1.0], heads), Cutoff(value=5.0, relative=True)
    assert number(sink_outliers("3.mlp", cutoff, [2]), edited, clean) == pytest.approx(0.2)
    assert number(sink_outliers("3.mlp", cutoff, [2, 3]), edited, clean) == pytest.approx(0.1)
    assert number(sink_patch([2, 3]), edited, clean) == pytest.approx((0.3 + 0.5) / 2)
    none = view([1.0, 1.0, 1.0, 1.0, 1.0])
    assert math.isnan(number(sink_outliers("3.mlp", cutoff, [2]), edited, none))


def test_what_is_not_a_number_gives_no_number():
    cutoff, clean = Cutoff(value=5.0, relative=True), view([1.0, 1.0, 1.0, 1.0, 40.0])
    spoilt = view([1.0, math.nan, 1.0, 1.0, 40.0], output=((math.nan, 1.0),), labels=[0])
    for one in (largest_norm("3.mlp"), outliers("3.mlp", cutoff)):
        assert math.isnan(number(one, spoilt, clean))
    for name in ("kl", "agreement", "cross_entropy", "accuracy"):
        [one] = [one for one in metrics_of("planted") if one.name == name]
        assert math.isnan(number(one, spoilt, view(labels=[0])))


@pytest.mark.parametrize("name", ["tiny", "planted"])
@pytest.mark.parametrize("edit", ["registers", "zero neurons", "bias"])
def test_the_built_in_ones_are_those_of_evaluate_intervention(name, edit):
    vit, detection = model(name)
    shard = shard_of(name, 4, vit.cfg.image_size, seed=1)
    made = edits_of(name, vit.cfg.image_size)[edit]
    places = rl.analysis.trace.sublayers(vit.cfg.n_layers)
    layers = after_onset(detection, vit.cfg.n_layers)
    with torch.no_grad():
        clean = observe(vit, shard.images)
        ruler = Yardstick(clean, places.index(detection.sublayer), detection.cutoff, layers, shard.labels, vit.cfg)
        with vit.edit(made):
            expected = ruler.measure(observe(vit, shard.images))
    metrics = default_metrics(vit, detection=detection, labels=True)
    views = [naive_view(vit, shard.images, shard.labels, edits) for edits in ((made,), ())]
    found = dict(zip([one.name for one in metrics], measured(metrics, *views), strict=True))
    shared = set(found) & set(expected)
    assert {"largest_norm", "outliers", "sink_outliers", "sink_patch", "cos_patches", "kl", "accuracy"} <= shared
    for one in shared:
        got, want = found[one], expected[one].double()
        if one == "sink_outliers":  # here there is no such number for an image without outliers
            want = want.where(ruler.mask.any(1), torch.nan)
        assert torch.allclose(got, want, atol=1e-5, equal_nan=True), one


def test_a_model_has_the_metrics_that_make_sense_for_it():
    vit, detection = model("planted")
    outlier = ["outliers", "sink_outliers", "sink_patch"]
    moved = ["cos_cls", "cos_patches", "cos_output", "kl", "agreement"]
    names = [one.name for one in default_metrics(vit, detection=detection, labels=True)]
    assert names == ["largest_norm", *outlier, *moved, "cross_entropy", "accuracy"]
    assert [one.name for one in default_metrics(vit)] == ["largest_norm", *moved]
    assert default_metrics(vit)[0].norms == ("3.mlp",)
    assert default_metrics(vit, detection=detection)[0].norms == (detection.sublayer,)
    without = rl.HookedViT(rl.ViTConfig(**{**vit.cfg.to_dict(), "d_out": None}))
    absent = detect(without, shard_of("planted", 8, (32, 32)).images)
    assert not absent.evidence.present
    assert [one.name for one in default_metrics(without, detection=absent)] == [
        "largest_norm",
        "cos_cls",
        "cos_patches",
        "cos_output",
    ]
    insisted = detect(without, shard_of("planted", 8, (32, 32)).images, threshold=3.0)
    assert "outliers" in [one.name for one in default_metrics(without, detection=insisted)]


def test_the_built_in_ones_can_be_sent_to_a_worker_and_say_what_they_are():
    vit, detection = model("planted")
    metrics = default_metrics(vit, detection=detection, labels=True)
    views = [naive_view(vit, *shard_with_labels(), edits) for edits in ((rl.Ablate(neurons((2, 3))),), ())]
    again = pickle.loads(pickle.dumps(metrics))
    assert np.array_equal(measured(again, *views), measured(metrics, *views), equal_nan=True)
    assert all(one.words for one in metrics)
    assert f"{detection.cutoff.value:.6g}" in metrics[1].words


def shard_with_labels():
    shard = shard_of("planted", 3, (32, 32))
    return shard.images, shard.labels


# Predictions ---------------------------------------------------------------------------------------------------------


def test_predictions_in_closed_form():
    sure, other = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(3.0), 0.0]])
    assert divergence(sure, other).item() == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1 / 3))
    assert agreement(sure, other).item() == 0
    assert cross_entropy(sure, torch.tensor([0])).item() == pytest.approx(math.log(4))
    assert accuracy(sure, torch.tensor([1])).item() == 1


def test_predictions_of_groups_and_patches_one_by_one():
    generator = torch.Generator().manual_seed(0)
    now, then = torch.randn(2, 3, 4, 6, generator=generator)  # 3 images, 4 patches, two groups of 3 classes
    labels = torch.randint(-1, 3, (3, 4, 2), generator=generator)
    labels[2] = -1
    for i in range(3):
        kl, same, loss, right = [], [], [], []  # the first two of all predictions, the others of the labelled
        for patch in range(4):
            for group in range(2):
                p, q = (x[i, patch, 3 * group : 3 * group + 3].double().softmax(0) for x in (then, now))
                label = int(labels[i, patch, group])
                kl.append(float((p * (p / q).log()).sum()))
                same.append(float(p.argmax() == q.argmax()))
                if label >= 0:
                    loss.append(-math.log(q[label]))
                    right.append(float(q.argmax() == label))
        got = [
            divergence(now, then, 2),
            agreement(now, then, 2),
            cross_entropy(now, labels),
            accuracy(now, labels),
        ]
        want = [np.mean(values) if values else math.nan for values in (kl, same, loss, right)]
        assert np.allclose([x[i] for x in got], want, atol=1e-5, equal_nan=True)
    assert torch.allclose(divergence(now, then)[0], divergence(now[:1], then[:1])[0])


def test_labels_that_do_not_fit_are_refused():
    logits = torch.zeros(2, 6)
    for labels in (torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 3, 1)):
        with pytest.raises(ShapeError, match="Labels of shape"):
            accuracy(logits, labels.long())
    with pytest.raises(ShapeError, match="Label 6 does not exist: the output has classes 0 to 5"):
        cross_entropy(logits, torch.tensor([6, 0]))


# Your own ------------------------------------------------------------------------------------------------------------


def test_a_plain_function_becomes_a_metric():
    def shift(edited, clean, layout):
        """How far patches moved.

        And more."""
        return (edited.norms["3.mlp"] - clean.norms["3.mlp"])[:, layout.patches].abs().amax(1)

    made = metric(shift, norms=["3.mlp"], attention=range(2))
    assert (made.name, made.words, made.norms, made.attention) == (
        "shift",
        "How far patches moved.",
        ("3.mlp",),
        (0, 1),
    )
    assert number(made, view([9.0, 1.0, 2.0, 3.0, 4.0]), view([0.0, 1.0, 2.0, 3.0, 9.0])) == 5
    assert metric(shift, name="other", words="x").name == "other"


def test_whole_numbers_and_booleans_are_numbers():
    for values in (torch.tensor([3]), torch.tensor([True]), torch.tensor([0.5], dtype=torch.float64)):
        assert number(Metric(name="x", measure=lambda edited, clean, v=values: v), view(), view()) == float(values)


@pytest.mark.parametrize("wrong", [1.0, torch.ones(2, 1), torch.tensor(1.0), torch.ones(3), None])
def test_what_is_no_number_an_image_is_refused_by_name(wrong):
    with pytest.raises(ShapeError, match=r"Metric 'x' gave a .* for a batch of 2.*shape \[2\]"):
        measured([Metric(name="x", measure=lambda edited, clean: wrong)], *[view(output=((1.0,), (2.0,)))] * 2)


def test_an_error_in_a_metric_says_in_which():
    with pytest.raises(ZeroDivisionError) as caught:
        number(metric(lambda edited, clean, layout: 1 / 0, name="broken"), view(), view())
    assert caught.value.__notes__ == ["This happened in the metric 'broken'."]


def test_metrics_that_cannot_be_are_refused():
    cfg = model("planted")[0].cfg

    def refused(match, *metrics):
        with pytest.raises(ConfigError, match=match):
            check_metrics(metrics, cfg)

    one = Metric(name="x", measure=lambda edited, clean: edited.output[:, 0])
    refused("Two metrics are named 'x'", one, one)
    for taken in ("", "image"):
        refused("a name of its own", Metric(name=taken, measure=one.measure))
    refused(
        r"'x' looks at the norms of '4.mlp'.*blocks 0 to 3.*Did you mean",
        Metric(name="x", measure=one.measure, norms=("4.mlp",)),
    )
    refused(r"'x' looks at the attention of layers \[4\]", Metric(name="x", measure=one.measure, attention=(0, 4)))
    refused(r"attention of layers \[-1\]", Metric(name="x", measure=one.measure, attention=(-1,)))
    check_metrics(metrics_of("planted"), cfg)

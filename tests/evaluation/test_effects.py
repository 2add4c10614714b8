"""Evaluations: metrics against their definitions, controls that behave, verdicts that can be "no"."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError

import registerlens as rl
from registerlens.analysis.detection import Cutoff
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ConfigError, ImageError, InterventionError, NoOutliersError, ShapeError
from registerlens.evaluation.controls import (
    SPECIFIC,
    ConditionKind,
    judge_effect,
    matched_neurons,
    neuron_activity,
    random_neurons,
    with_neurons,
)
from registerlens.evaluation.effects import Evaluation, evaluate_intervention
from registerlens.evaluation.observe import METRICS
from registerlens.interventions.ablation import Scale
from registerlens.interventions.base import Edit, Intervention

NEURONS = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
NONE = rl.RegisterNeurons.from_pairs([])
MADE_UP = (ConditionKind.CLEAN, ConditionKind.TESTED, ConditionKind.CONTROL)


@pytest.fixture(scope="module")
def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def batch():
    return synthetic_images(64, 11)


@pytest.fixture(scope="module")
def labels(batch):
    return batch.labels.masked_fill((batch.roles == FLAT)[..., None], -1)


@pytest.fixture(scope="module")
def done(tiny, batch, labels):
    tested = {
        "register": rl.TestTimeRegisters(NEURONS),
        "bias": rl.AttentionBias.fit(tiny, synthetic_images(64, 3).images, NEURONS),
        "unedited": rl.TestTimeRegisters(NONE),
        "zero": rl.Ablate(NEURONS),
        "move": rl.MoveOutliers(NEURONS, [3, 4]),
    }
    return evaluate_intervention(tiny, batch.images, tested, labels=labels, batch_size=24)


def naive(vit, images, intervention, labels):
    """The definitions, from a cache of everything; outliers at 5.mlp, sinks after block 1."""
    names = ["blocks.5.hook_resid_post", "blocks.*.attn.hook_pattern"]
    seen = []
    with torch.no_grad():
        for edits in ([], [intervention]):
            with vit.edit(*edits):
                tokens, cache = vit.run_with_cache(images, names_filter=names, return_type="tokens")
            seen.append((tokens, cache))
    (clean_tokens, clean), (tokens, cache) = seen
    norms, clean_norms = (c[names[0]].norm(dim=-1) for c in (cache, clean))
    median = clean_norms.quantile(0.5, dim=1, keepdim=True)
    old = clean_norms > 6.3 * median
    now = norms[:, :36] > 6.3 * median
    aimed = torch.zeros_like(old)
    if isinstance(intervention, rl.MoveOutliers):
        aimed[:, [3, 4]] = True
    other, before = ~old & ~aimed, old
    old = old & ~aimed
    drawn = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"].mean((1, 2)) for i in range(2, 6)]).mean(0)
    cosine = F.cosine_similarity(tokens[:, :36], clean_tokens, dim=-1)
    output, clean_output = (
        vit.head.linear(t[:, :36]).unflatten(-1, (4, 13)).log_softmax(-1) for t in (tokens, clean_tokens)
    )
    there = labels >= 0
    divergence = F.kl_div(output, clean_output, log_target=True, reduction="none").sum(-1)
    found = {
        "largest_norm": (norms[:, :36] / median).amax(1),
        "outliers": now.sum(1),
        "old_outliers": (now & old).sum(1),
        "new_outliers": (now & other).sum(1),
        "sink_patch": drawn[:, :36].amax(1),
        "sink_outliers": torch.where(old, drawn[:, :36], 0).sum(1),
        "sink_elsewhere": torch.where(other, drawn[:, :36], 0).amax(1),
        "cos_patches": cosine.mean(1),
        "cos_normal": torch.stack([row[~mask].mean() for row, mask in zip(cosine, before | now, strict=True)]),
        "kl": divergence.mean((1, 2)),  # flat patches, which have no label, among them
        "accuracy": torch.stack(
            [(o.argmax(-1) == y)[t].float().mean() for o, y, t in zip(output, labels, there, strict=True)]
        ),
    }
    if aimed.any():
        found["placed"] = (now & aimed).sum(1) / 2
        found["sink_aimed"] = drawn[:, [3, 4]].sum(1)
    if norms.shape[1] > 36:
        found["register_norm"] = (norms[:, 36:] / median).amax(1)
    if drawn.shape[1] > 36:
        found["sink_register"] = drawn[:, 36:].sum(1)
    return found


@pytest.mark.parametrize("name", ["register", "zero", "move"])
def test_every_metric_is_what_it_says(done, tiny, batch, labels, name):
    intervention = {
        "register": rl.TestTimeRegisters(NEURONS),
        "zero": rl.Ablate(NEURONS),
        "move": rl.MoveOutliers(NEURONS, [3, 4]),
    }[name]
    expected = naive(tiny, batch.images, intervention, labels)
    assert set(expected) <= set(done.metrics) <= set(METRICS)
    for metric, values in expected.items():
        np.testing.assert_allclose(done.of(metric, name), values.detach().numpy(), rtol=2e-3, atol=2e-5, err_msg=metric)
    for metric in set(done.metrics) - set(expected):
        assert np.isnan(done.of(metric, name)).all(), metric


def test_the_clean_condition_is_clean(done, tiny, batch):
    found = rl.find_outliers(tiny, batch.images)
    assert (done.of("outliers", "clean") == found.mask.sum(1).numpy()).all()
    assert done.mean("cos_patches", "clean") == pytest.approx(1, abs=1e-6)
    assert done.mean("kl", "clean") == pytest.approx(0, abs=1e-6)
    assert done.mean("accuracy", "clean") > 0.99
    trace = rl.trace(tiny, batch.images)
    np.testing.assert_allclose(done.norm_curve[0], trace.largest_norm, rtol=1e-5)
    np.testing.assert_allclose(done.sink_curve[0], trace.mean_sink, rtol=1e-5)
    assert np.isnan(done.register_curve[0]).all()


def test_controls_behave(done):
    outliers = done.mean("outliers", "clean")
    assert outliers > 1.8
    kinds = dict(zip(done.conditions, done.kinds, strict=True))
    random = [name for name, kind in kinds.items() if kind is ConditionKind.CONTROL]
    assert len(random) == 7 and {name for name, kind in kinds.items() if kind is ConditionKind.BASELINE} == {
        *("zeroed", "mean", "neighbours")
    }
    for condition in random:
        assert done.mean("outliers", condition) == pytest.approx(outliers, abs=0.05), condition
        assert done.mean("sink_register", condition) < 0.05
    assert done.mean("outliers", "zeroed") == done.mean("outliers", "mean") == 0
    assert done.mean("accuracy", "zeroed") < 0.96 < 0.995 < done.mean("accuracy", "register")
    assert done.mean("outliers", "neighbours") == 0
    assert done.mean("accuracy", "neighbours") < 0.99
    assert done.mean("sink_register", "register") > 0.6
    assert done.mean("sink_register", "bias") > 0.6
    assert done.norm_curve[done.conditions.index("bias")].max() < 0.4 * done.norm_curve[0].max()  # figure 8
    assert kinds["clean"] is ConditionKind.CLEAN and kinds["bias"] is ConditionKind.TESTED


def test_verdicts(done):
    told = {name: verdict.worked for name, verdict in done.verdicts.items()}
    assert told == {"register": True, "bias": True, "unedited": False, "zero": None, "move": True}
    assert done.verdicts["unedited"].words.startswith("Did not work")
    assert done.verdicts["zero"].words.startswith("Effect") and "changed" in done.verdicts["zero"].words
    assert "register: Worked" in done.describe()


def test_intervals_cover_and_differences_are_paired(done):
    frame = done.to_dataframe().set_index(["condition", "metric"])
    assert (frame["low"] <= frame["mean"] + 1e-9).all() and (frame["mean"] <= frame["high"] + 1e-9).all()
    row = frame.loc["zeroed", "accuracy"]
    assert row["mean"] == pytest.approx(done.mean("accuracy", "zeroed"))
    assert row["difference_high"] < 0
    # The normal approximation of the same interval, a second way to it.
    difference = done.of("accuracy", "zeroed") - done.of("accuracy", "clean")
    half = 1.96 * difference.std() / np.sqrt(len(difference))
    assert row["difference_low"] == pytest.approx(difference.mean() - half, abs=0.2 * half)
    assert frame.loc["clean", "accuracy"]["difference"] == 0
    assert done.to_dataframe().equals(done.to_dataframe())


def test_save_and_load(done, tmp_path):
    again = Evaluation.load(done.save(tmp_path))
    assert again.conditions == done.conditions and again.kinds == done.kinds and again.verdicts == done.verdicts
    assert again.detection == done.detection
    np.testing.assert_array_equal(again.values, done.values)
    assert again.to_dataframe().equals(done.to_dataframe())
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="valid JSON"):
        Evaluation.load(tmp_path)


def test_batches_of_several_sizes_equal_singles(tiny):
    images = synthetic_images(6, 0).images
    batches = [images[:2], images[2:, :, :40]]
    intervention = rl.TestTimeRegisters(NEURONS)
    options = {"controls": False, "threshold": 100.0, "layer": 1}
    together = evaluate_intervention(tiny, batches, intervention, **options)
    singles = [evaluate_intervention(tiny, part[None], intervention, **options) for b in batches for part in b]
    np.testing.assert_allclose(together.values, np.concatenate([s.values for s in singles], 2), rtol=1e-3, atol=1e-5)


def test_a_model_with_a_classifier_and_cls():
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8), d_out=7)
    torch.manual_seed(0)
    planted, truth = rl.plant_register_neurons(rl.HookedViT(cfg).eval(), layer=1, n=3)
    images = truth.calibration[:12]
    labels = planted(images).argmax(-1)
    neurons = rl.RegisterNeurons.from_pairs([(layer, neuron) for layer, neuron, *_ in truth.neurons])
    done = evaluate_intervention(planted, images, rl.TestTimeRegisters(neurons), labels=labels)
    assert done.mean("accuracy", "clean") == 1
    assert {"cos_cls", "cos_output", "kl"} <= set(done.metrics)
    assert done.mean("outliers", "clean") > 0.5 and done.mean("outliers", "TestTimeRegisters") == 0
    # [CLS] is the query whose attention counts
    with torch.no_grad(), planted.edit(rl.TestTimeRegisters(neurons)):
        _, cache = planted.run_with_cache(images, names_filter="blocks.*.attn.hook_pattern")
    drawn = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][:, :, 0, -1].mean(1) for i in (2, 3)]).mean(0)
    np.testing.assert_allclose(done.of("sink_register", "TestTimeRegisters"), drawn.numpy(), rtol=1e-4)


@pytest.fixture(scope="module")
def six():
    """A model with [CLS] and two trained registers, planted with six neurons, each for patches of its own."""
    cfg = rl.ViTConfig(
        n_layers=4, d_model=48, n_heads=4, d_mlp=12, image_size=(64, 64), patch_size=(8, 8), n_trained_registers=2
    )
    torch.manual_seed(0)
    vit = rl.HookedViT(cfg).eval()
    with torch.no_grad():  # drawn here: torch's own initialisation draws other numbers from version to version
        for weight in vit.parameters():
            weight.copy_(0.02 * torch.randn(weight.shape) if weight.ndim > 1 else weight)
    return rl.plant_register_neurons(vit, layer=1, n=6, firing="alone", share=0.05)


@pytest.fixture(scope="module")
def with_two_registers(six):
    """Two test-time registers; the controls are those of the weakest two neurons, and meet some of the others."""
    planted, truth = six
    weakest = truth.fires.sum((1, 2)).argsort()[:2].tolist()
    two = rl.RegisterNeurons.from_pairs([truth.neurons.pairs[i] for i in weakest])
    tested = {"two": rl.TestTimeRegisters(two, n=2), "all": rl.TestTimeRegisters(truth.neurons, n=2)}
    return evaluate_intervention(planted, truth.calibration[:12], tested)


def test_the_control_that_removes_most_decides_whether_an_effect_is_the_neurons_own(with_two_registers):
    done = with_two_registers
    kinds = zip(done.conditions, done.kinds, strict=True)
    controls = [name for name, kind in kinds if kind is ConditionKind.CONTROL]
    left = sorted(done.mean("old_outliers", name) / done.mean("outliers", "clean") for name in controls)
    assert left[0] < SPECIFIC < left[-1] and len({*left}) >= 3
    assert done.mean("old_outliers", "all") == 0  # it works, and cannot be told from a lucky draw
    verdict = done.verdicts["all"]
    assert (
        not verdict.worked
        and f"random neurons do it too: the same edit of them takes away at most {1 - left[0]:.0%} of" in verdict.words
    )


def test_curves_are_of_patches_and_of_all_registers_together(six, with_two_registers):
    (planted, truth), done = six, with_two_registers
    images, names = truth.calibration[:12], ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"]
    with torch.no_grad(), planted.edit(rl.TestTimeRegisters(truth.neurons, n=2)):
        _, cache = planted.run_with_cache(images, names_filter=names)
    norms = torch.stack([cache[f"blocks.{i}.hook_resid_post"].norm(dim=-1) for i in range(4)])
    assert norms[-1, :, -2:].amin() > 2 * norms[-1, :, 3:-2].amax()  # else no curve could take one for the other
    expected = {
        "norm_curve": norms[:, :, 3:-2].amax(-1).mean(1),
        "register_curve": norms[:, :, -2:].amax(-1).mean(1),
    }
    row = done.conditions.index("all")
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(done, name)[row, 2::2], values, rtol=1e-5)
    drawn = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][:, :, 0].mean(1) for i in range(4)])  # [CLS] asks
    assert drawn[-1, :, -2:].amin() > 0.01  # both draw something
    np.testing.assert_allclose(done.register_sink_curve[row], drawn[..., -2:].sum(-1).mean(1), rtol=1e-5)
    np.testing.assert_allclose(done.sink_curve[row], drawn[..., 3:-2].amax(-1).mean(1), rtol=1e-5)


def test_outliers_after_an_edit_are_those_above_the_clean_medians(six):
    planted, truth = six
    louder = Scale(rl.Tokens(1, list(range(64))), 30.0)  # of every patch, so that none stands out from the others
    done = evaluate_intervention(planted, truth.calibration[:12], {"louder": louder}, controls=False)
    assert done.mean("outliers", "louder") == 64 > 10 * done.mean("outliers", "clean")


def test_an_intervention_may_be_named_like_a_control(tiny, batch):
    done = evaluate_intervention(tiny, batch.images[:16], {"random assignment": rl.TestTimeRegisters(NEURONS)})
    verdict = done.verdicts["random assignment"]
    assert verdict.worked and "random neurons do not" in verdict.words


class _Flipped(Intervention):
    """Sends the outliers elsewhere: what a hand-off looks like."""

    def edits(self, host, first_register):
        def change(x, scene):
            at = scene.layout.patches
            return torch.cat([x[:, : at.start], x[:, at].flip(1), x[:, at.stop :]], 1)

        return [Edit("blocks.4.hook_resid_post", change)]


def test_a_hand_off_is_called_one(tiny, batch):
    done = evaluate_intervention(tiny, batch.images, {"flip": _Flipped()}, controls=False)
    verdict = done.verdicts["flip"]
    assert not verdict.worked and "handed off" in verdict.words
    assert done.mean("new_outliers", "flip") > 1.5


def test_verdict_on_made_up_numbers():
    metrics = [
        "outliers",
        "old_outliers",
        "new_outliers",
        "sink_outliers",
        "sink_elsewhere",
        "sink_register",
        "cos_cls",
    ]
    clean = [2, 2, 0, 0.8, 0.05, np.nan, 1]
    good = [0, 0, 0, 0.0, 0.05, 0.7, 0.99]

    kinds = dict(zip(("clean", "mine", "other neurons"), MADE_UP, strict=True))

    def verdict(after, control=clean, placed=np.nan):
        rows = [[*clean, np.nan], [*after, placed], [*control, np.nan]]
        values = np.array(rows, dtype=float)[..., None]
        return judge_effect([*metrics, "placed"], values, kinds, "mine")

    assert verdict(good).worked
    assert not verdict([2, 2, 0, 0.8, 0.05, 0.0, 1.0]).worked  # nothing happened
    assert not verdict([0, 0, 0, 0.0, 0.05, 0.1, 0.99]).worked  # the register stays idle
    assert not verdict([0, 0, 0, 0.0, 0.05, 0.7, 0.5]).worked  # the output changed
    assert not verdict([0, 0, 0, 0.0, 0.6, 0.7, 0.99]).worked  # a new sink
    assert not verdict([1, 0, 1, 0.0, 0.05, 0.7, 0.99]).worked  # handed off
    assert verdict([1, 0, 0, 0.0, 0.05, np.nan, 0.99], placed=1.0).worked
    assert not verdict([0, 0, 0, 0.0, 0.05, np.nan, 0.99], placed=0.5).worked  # not where they were wanted
    assert "random neurons do it too" in verdict(good, control=good).words and not verdict(good, control=good).worked
    nothing = judge_effect(metrics, np.zeros((3, 7, 1)), kinds, "mine")
    assert not nothing.worked and "no outlier" in nothing.words


def test_random_and_matched_neurons():
    neurons = rl.RegisterNeurons.from_pairs([(2, 5), (2, 6), (4, 0)])
    generator = torch.Generator().manual_seed(0)
    drawn = [random_neurons(neurons, 12, generator) for _ in range(50)]
    for one in drawn:
        assert {layer: len(n) for layer, n in one.by_layer().items()} == {2: 2, 4: 1}
        assert not set(one.pairs) & set(neurons.pairs)
    assert len({one.pairs for one in drawn}) > 20
    activity = {2: torch.arange(40.0), 4: torch.arange(40.0).flip(0)}
    matched = matched_neurons(neurons, activity, generator)
    assert not set(matched.pairs) & set(neurons.pairs)
    assert all(abs(n - 5.5) <= 7 for n in matched.by_layer()[2])
    assert 1 <= matched.by_layer()[4][0] <= 10
    with pytest.raises(InterventionError, match="too few others"):
        random_neurons(rl.RegisterNeurons.from_pairs([(0, 0), (0, 1)]), 3, generator)


def test_activity_is_the_mean_over_images_of_the_maximum_over_tokens(tiny, batch):
    _, cache = tiny.run_with_cache(batch.images, names_filter="blocks.1.mlp.hook_post")
    expected = cache["blocks.1.mlp.hook_post"].amax(1).mean(0)
    torch.testing.assert_close(neuron_activity(tiny, batch.images, [1], batch_size=7)[1], expected.detach())


def test_with_neurons_keeps_every_other_option(tiny, batch):
    other = rl.RegisterNeurons.from_pairs([(1, n) for n in range(7)])
    register = rl.TestTimeRegisters(NEURONS, n=2, clear="patches", maxima_of=other)
    swapped = with_neurons(register, other)
    assert (swapped.neurons, swapped.n, swapped.clear, swapped.maxima_of) == (other, 2, "patches", None)
    assert with_neurons(rl.Ablate(NEURONS), other).target == other
    with pytest.raises(InterventionError, match="fit another"):
        with_neurons(rl.Ablate.fit(tiny, batch.images[:4], NEURONS), other)
    with pytest.raises(InterventionError, match="fit another"):
        with_neurons(rl.AttentionBias.fit(tiny, batch.images[:4], NEURONS), other)
    with pytest.raises(InterventionError, match="not about neurons"):
        with_neurons(rl.InterpolateOutliers(1, Cutoff(value=6.0, relative=True)), other)


def test_a_fitted_ablation_gets_fitted_controls(tiny, batch):
    ablation = rl.Ablate.fit(tiny, batch.images[:16], NEURONS, "mean")
    done = evaluate_intervention(tiny, batch.images[:16], ablation)
    assert done.mean("outliers", "random 1") == pytest.approx(done.mean("outliers", "clean"), abs=0.1)
    assert done.mean("outliers", "Ablate") < 0.2
    assert "random, copied maxima" not in done.conditions
    assert "zeroed" in done.conditions and "mean" not in done.conditions  # the latter is what is tested


def test_the_controls_of_a_bias_are_fitted_for_their_own_neurons(tiny, batch):
    images = batch.images[:16]
    done = evaluate_intervention(tiny, images, rl.AttentionBias.fit(tiny, images, NEURONS))
    assert done.mean("sink_register", "AttentionBias") > 0.6
    assert done.mean("sink_register", "random 1") < 0.05
    assert done.verdicts["AttentionBias"].worked


def test_errors(tiny, batch, focus_vit):
    images, register = batch.images[:8], rl.TestTimeRegisters(NEURONS)
    with pytest.raises(NoOutliersError) as error:
        evaluate_intervention(tiny, torch.rand(8, 3, 48, 48) * 0.1 + torch.randn(8, 3, 48, 48), register)
    assert error.value.evidence.verdict == "absent"
    with pytest.raises(ShapeError, match="labels"):
        evaluate_intervention(tiny, images, register, labels=torch.zeros(5, 36, 4, dtype=torch.long), controls=False)
    with pytest.raises(ShapeError, match="do not fit"):
        evaluate_intervention(tiny, images, register, labels=torch.zeros(8, dtype=torch.long), controls=False)
    with pytest.raises(ImageError, match="used once"):
        evaluate_intervention(tiny, iter([images]), register)
    with pytest.raises(ConfigError, match="No intervention"):
        evaluate_intervention(tiny, images, {})
    with pytest.raises(ConfigError, match="name of the unedited"):
        evaluate_intervention(tiny, images, {"clean": register})
    with pytest.raises(ConfigError, match=r"named \['mean', 'zeroed'\], as baselines or controls are"):
        evaluate_intervention(tiny, images, {"mean": register, "register": register, "zeroed": register})
    with pytest.raises(InterventionError, match="do not exist"):
        evaluate_intervention(tiny, images, rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(1, 999)])))
    done = evaluate_intervention(tiny, images, register, controls=False)
    with pytest.raises(ConfigError, match="Metrics"):
        done.of("nonsense", "clean")
    with pytest.raises((TypeCheckError, ImageError, ShapeError)):
        evaluate_intervention(tiny, images[:0], register, threshold=100.0)

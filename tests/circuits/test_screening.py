"""Screened effects are the derivatives they claim to be, and known answers come out first."""

import dataclasses
import gc
import math

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import randomise, relative
from jaxtyping import TypeCheckError

import registerlens as rl
from registerlens.circuits.differentiable import largest_norm
from registerlens.circuits.neuron_effects import Replacement, exact_effects, frozen_weights
from registerlens.circuits.screening import Screening, screen_neurons
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, ImageError, NonFiniteError, ShapeError
from registerlens.evaluation.metrics import Metric
from registerlens.stats.moments import Moments, rank_correlation

CFG = rl.ViTConfig(
    n_layers=4,
    d_model=24,
    n_heads=3,
    d_mlp=20,
    image_size=(24, 32),
    patch_size=(8, 8),
    n_trained_registers=2,
    layer_scale=True,
    ln_pre=True,
    d_out=5,
)
QUICK = {"exact": 0, "sample": 0}
EMERGED = {(1, neuron) for neuron in (183, 103, 219, 125, 55, 128, 177)}


def build(seed=0, dtype=torch.float64, **changes):
    return randomise(rl.HookedViT(dataclasses.replace(CFG, **changes)), seed).to(dtype)


def pixels(n, size=(24, 32), seed=0, dtype=torch.float64):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_and_norms(edited, clean):
    """Nonlinear, of everything a view has; float64 throughout where the model is."""
    drawn = edited.attention[2][:, :, edited.layout.patches].square().sum((1, 2))
    return edited.output[:, 1].sin() + drawn + edited.norms["1.attn"].log().mean(1) + edited.norms["3.mlp"].amax(1)


EVERYTHING = Metric(name="everything", measure=attention_and_norms, norms=("1.attn", "3.mlp"), attention=(2,))


def values_when(vit, images, change, measure):
    """Second implementation: the metric of the output alone, with `change(layer, post)` in every MLP."""
    with vit.hooks([("blocks.*.mlp.hook_post", lambda post, hook: change(hook.layer(), post))]):
        return measure(vit(images))


def logit(out):
    return out[:, 2].sin()


LOGIT = Metric(name="logit", measure=lambda edited, clean: logit(edited.output))


# The derivative ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_it_is_the_derivative_along_each_neuron_alone(mode):
    """In float64, one neuron and one image at a time, by the derivative of one number: how far the neuron has gone."""
    vit, images = build(), pixels(3)
    found = screen_neurons(vit, images, LOGIT, mode=mode, **QUICK)
    _, cache = vit.run_with_cache(images, names_filter="blocks.*.mlp.hook_post")
    start = vit.layout(images).patches.start
    for layer, neuron in [(0, 3), (1, 19), (2, 0), (3, 7)]:
        post = cache[f"blocks.{layer}.mlp.hook_post"][..., neuron]
        goal = torch.zeros_like(post[0])
        if mode == "mean":
            goal = torch.cat([post[:, :start].mean(0), post[:, start:].mean().expand(len(goal) - start)])
        slopes = []
        for image in images:

            def one(share, image=image, layer=layer, neuron=neuron, goal=goal):
                def change(at, x):
                    chosen = (torch.arange(x.shape[-1]) == neuron) if at == layer else torch.zeros(x.shape[-1]).bool()
                    return torch.where(chosen, x + share * (goal[:, None] - x), x)

                return values_when(vit, image[None], change, logit)[0]

            share = torch.zeros((), dtype=torch.float64, requires_grad=True)
            [slope] = torch.autograd.grad(one(share), [share])
            slopes.append(slope.item())
        assert found.effects[layer, neuron] == pytest.approx(np.mean(slopes), rel=2e-5, abs=1e-9)
        assert found.magnitude[layer, neuron] == pytest.approx(np.mean(np.abs(slopes)), rel=2e-5)
        assert found.standard_error[layer, neuron] == pytest.approx(scipy.stats.sem(slopes), rel=2e-5)


def test_it_agrees_with_finite_differences_on_a_metric_of_norms_and_attention():
    vit, images = build(1), pixels(2, (20, 43))
    found = screen_neurons(vit, images, EVERYTHING, **QUICK)
    step = 1e-2  # norms and attention are float32
    for layer, neuron in [(0, 5), (1, 11), (2, 2), (3, 9)]:
        nudged = []
        for sign in (1, -1):

            def nudge(post, hook, neuron=neuron, share=sign * step):
                post = post.clone()
                post[..., neuron] *= 1 - share
                return post

            with vit.hooks([(f"blocks.{layer}.mlp.hook_post", nudge)]):
                nudged.append(screen_neurons(vit, images, EVERYTHING, **QUICK).clean)
        slope = (nudged[0] - nudged[1]) / (2 * step)
        assert found.effects[layer, neuron] == pytest.approx(slope, rel=5e-3, abs=2e-5)


def test_first_order_is_exact_where_the_metric_is_linear():
    vit, images = build(2, final_norm=False, dtype=torch.float32), pixels(5, dtype=torch.float32)
    found = screen_neurons(vit, images, "class_logit", labels=torch.tensor([0, 1, 2, 3, 4]), layers=[3], exact=20)
    np.testing.assert_allclose(found.screened, found.exact, rtol=1e-4, atol=1e-5)
    assert found.on_candidates.rho == pytest.approx(1)
    assert found.effects.shape == (1, 20) and np.abs(found.effects).min() > 1e-4


def test_what_comes_after_the_metric_has_no_effect():
    found = screen_neurons(build(), pixels(2), "largest_norm@1.attn", exact=4, sample=40)
    assert (found.effects[1:] == 0).all() and (found.effects[0] != 0).all()
    later = found.checked[:, 0] >= 1
    assert later.any() and (found.exact[later] == 0).all() and (found.exact[~later] != 0).all()


# Known answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_planted_neurons_rank_first(mode):
    torch.manual_seed(0)
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=2, d_mlp=96, image_size=(64, 64), patch_size=(8, 8))
    planted, truth = rl.plant_register_neurons(rl.HookedViT(cfg), layer=1, n=3)
    found = screen_neurons(planted, truth.calibration, mode=mode, exact=8, sample=16)
    assert set(found.neurons(3).pairs) == set(truth.neurons.pairs)
    exact = found.checked_dataframe().sort_values("exact")[:3]
    assert set(zip(exact["layer"], exact["neuron"], strict=True)) == set(truth.neurons.pairs)
    assert (found.exact[:3] < 0).all()


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def on_tiny(tiny):
    return screen_neurons(tiny, synthetic_images(16, 0).images, "largest_norm@1.mlp", exact=12, sample=32)


def test_the_neurons_that_emerged_rank_first(on_tiny):
    """In their block. Of all blocks too few neurons of block 0 come between: they feed the seven, as ablating shows."""
    in_block = np.argsort(-np.abs(on_tiny.effects[1]))[:7]
    assert {(1, int(neuron)) for neuron in in_block} == EMERGED
    order = on_tiny.neurons(12).pairs
    assert set(order) > EMERGED and order[:4] == ((1, 183), (1, 103), (1, 219), (1, 125))
    exact = on_tiny.checked_dataframe().set_index(["layer", "neuron"])["exact"]
    between = set(order[: 1 + max(map(order.index, EMERGED))]) - EMERGED
    assert all(layer == 0 and exact[layer, neuron] < -20 for layer, neuron in between)
    assert on_tiny.on_candidates.low > 0 and on_tiny.on_sample.low > 0.7


# Integrated gradients ------------------------------------------------------------------------------------------------


def distance(edited, clean):
    return (edited.output - clean.output).square().sum(1)


@pytest.mark.parametrize(
    ("mode", "measure"), [("zero", distance), ("mean", lambda edited, clean: edited.output[:, 1].exp())]
)
def test_the_shares_of_a_layer_add_up_to_ablating_it(measure, mode):
    vit, images = build(3), pixels(4)
    found = screen_neurons(
        vit, images, measure, mode=mode, method="integrated_gradients", steps=24, layers=[1, 3], **QUICK
    )
    assert found.layers == (1, 3) and found.steps == 24
    clean = vit(images)
    for row, layer in enumerate(found.layers):
        every = rl.RegisterNeurons.from_pairs([(layer, neuron) for neuron in range(20)])
        ablation = rl.Ablate.fit(vit, images, every, mode) if mode == "mean" else rl.Ablate(every)
        with torch.no_grad(), vit.edit(ablation):
            output = vit(images)
        edited, unedited = (dataclasses.make_dataclass("V", ["output"])(out) for out in (output, clean))
        whole = (measure(edited, unedited) - measure(unedited, unedited)).mean().item()
        assert found.effects[row].sum() == pytest.approx(whole, rel=1e-4)


def test_both_methods_agree_where_the_metric_is_linear():
    vit, images = build(2, final_norm=False), pixels(3)
    options = {"layers": [3], "labels": torch.tensor([0, 1, 2]), **QUICK}
    one, other = (
        screen_neurons(vit, images, "class_logit", method=method, steps=2, **options)
        for method in ("first_order", "integrated_gradients")
    )
    np.testing.assert_allclose(one.effects, other.effects, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "measure",
    [
        distance,
        lambda edited, clean: torch.cosine_similarity(edited.output.float(), clean.output.float()),
        lambda edited, clean: torch.nn.functional.kl_div(
            edited.output.float().log_softmax(1), clean.output.float().softmax(1), reduction="none"
        ).sum(1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_to_the_clean_run_are_refused_by_first_order(measure, dtype):
    with pytest.raises(ConfigError, match=r"gradient vanishes at the clean run.*integrated_gradients"):
        screen_neurons(build(dtype=dtype), pixels(3, dtype=dtype), measure, **QUICK)


def test_cls_has_a_slope_after_a_norm_without_weights_of_its_own():
    """There [CLS] has a constant norm, and a projection on itself would be a cosine."""
    vit, images = build(6), pixels(3)
    with torch.no_grad():
        vit.ln_final.w.fill_(1.0)
        vit.ln_final.b.fill_(0.0)
    found = screen_neurons(vit, images, "cls", exact=0, sample=80)
    assert found.on_sample.low > 0.7

    def on_itself(edited, clean):
        return (edited.tokens[:, 0] * clean.tokens[:, 0]).sum(1)

    with pytest.raises(ConfigError, match="gradient vanishes"):
        screen_neurons(vit, images, on_itself, **QUICK)


# Exact effects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "stack"), [("zero", 1), ("zero", 7), ("mean", 64)])
def test_exact_effects_are_those_of_ablate(mode, stack):
    vit, images = build(4), pixels(5, (20, 43))
    pairs = [(2, 7), (0, 1), (3, 19), (2, 8), (0, 0), (2, 1)]
    labels = torch.tensor([0, 4, 1, 1, 3])
    ablations = [
        rl.Ablate.fit(vit, images, rl.RegisterNeurons.from_pairs([pair]), "mean")
        if mode == "mean"
        else rl.Ablate(rl.RegisterNeurons.from_pairs([pair]))
        for pair in pairs
    ]
    every = rl.RegisterNeurons.from_pairs([(layer, neuron) for layer in range(4) for neuron in range(20)])
    replacement = Replacement(rl.Ablate.fit(vit, images, every).reference if mode == "mean" else None)
    metric = Metric(name="loss", measure=lambda edited, clean: edited.output.gather(1, edited.labels[:, None])[:, 0])
    found = exact_effects(vit, images, metric, pairs, replacement, labels=labels, batch_size=2, stack=stack)
    with torch.no_grad():
        clean = vit(images).gather(1, labels[:, None])
        for i, ablation in enumerate(ablations):
            with vit.edit(ablation):
                change = (vit(images).gather(1, labels[:, None]) - clean)[:, 0]
            assert found.mean[i] == pytest.approx(change.mean().item(), rel=1e-4)
            assert found.standard_error[i] == pytest.approx(scipy.stats.sem(change.numpy()), rel=1e-4)


# The model, its weights, its edits -----------------------------------------------------------------------------------


def test_weights_get_no_gradient_and_keep_their_flags():
    vit, images = build(dtype=torch.float32), pixels(2, dtype=torch.float32)
    vit.ln_final.w.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in vit.named_parameters()}
    screen_neurons(vit, images, "cls", **QUICK)
    with pytest.raises(ShapeError):
        screen_neurons(vit, images, lambda edited, clean: edited.output, **QUICK)
    assert before == {name: parameter.requires_grad for name, parameter in vit.named_parameters()}
    assert all(parameter.grad is None for parameter in vit.parameters())
    with frozen_weights(vit):
        assert not vit(images).requires_grad


def test_inference_mode_outside_and_images_made_in_it_do_no_harm():
    vit = build(dtype=torch.float32)
    with torch.inference_mode():
        images = pixels(3, dtype=torch.float32)
        inside = screen_neurons(vit, images, "cls", exact=2, sample=2, mode="mean")
    outside = screen_neurons(vit, images.clone(), "cls", exact=2, sample=2, mode="mean")
    np.testing.assert_array_equal(inside.effects, outside.effects)


def test_bfloat16_comes_close():
    vit, images = build(dtype=torch.float32), pixels(4, dtype=torch.float32)
    exact = screen_neurons(vit, images, "cls", **QUICK)
    coarse = screen_neurons(vit.to(torch.bfloat16), images, "cls", **QUICK)
    assert relative(torch.tensor(coarse.effects), torch.tensor(exact.effects)) < 0.05


def test_inside_an_edit_the_edited_model_is_screened():
    vit, images = build(5, dtype=torch.float32), pixels(3, dtype=torch.float32)
    gone = rl.RegisterNeurons.from_pairs([(1, 4)])
    register = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(1, 2), (2, 3)]))
    plain = screen_neurons(vit, images, "cls", **QUICK)
    with vit.edit(rl.Ablate(gone), register):
        found = screen_neurons(vit, images, "cls", exact=3, sample=80)
        with torch.no_grad():
            tokens = vit(images, return_type="tokens")
            cls, patches = tokens[:, 0], tokens[:, vit.layout(images).patches]
            with vit.edit(rl.Ablate(rl.RegisterNeurons.from_pairs([(2, 3)]))):
                edited = vit(images, return_type="tokens")[:, 0]
    direction = torch.nn.functional.normalize(cls - patches.mean(1), dim=1)
    change = ((edited - cls) * direction).sum(1).mean().item()
    table = found.checked_dataframe().set_index(["layer", "neuron"])
    assert table.loc[(2, 3), "exact"] == pytest.approx(change, rel=1e-3)
    assert plain.effects[1, 4] != 0 == found.effects[1, 4] and table.loc[(1, 4), "exact"] == 0
    assert not np.allclose(plain.effects[3], found.effects[3])


def test_batches_of_any_size_give_the_same():
    vit, images = build(), pixels(5)
    labels = torch.tensor([0, 1, -1, 3, 4])
    whole, pieces = (
        screen_neurons(vit, some, "cross_entropy", labels=labels, mode="mean", sample=8, exact=2)
        for some in (images, list(images.split((1, 3, 1))))
    )
    for name in ("effects", "magnitude", "standard_error", "exact"):
        np.testing.assert_allclose(getattr(whole, name), getattr(pieces, name), rtol=1e-5, atol=1e-9)
    assert (whole.n_images, whole.n_without) == (4, 1) and "1 more without a value" in whole.describe()
    kept = labels >= 0
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(vit(images[kept]), labels[kept])
    assert whole.clean == pytest.approx(loss.item(), rel=1e-6)


def test_nothing_grows_with_the_number_of_images():
    vit = build(dtype=torch.float32)
    alive = []

    def stream():
        for i in range(8):
            yield pixels(2, seed=i, dtype=torch.float32)
            if i in (2, 7):
                gc.collect()
                alive.append(sum(one.numel() for one in gc.get_objects() if type(one) is torch.Tensor))

    screen_neurons(vit, stream(), "largest_norm@3.mlp", **QUICK)
    assert len(alive) == 2 and alive[1] <= alive[0]


# Bad input -----------------------------------------------------------------------------------------------------------


BAD = [
    (dict(metric="largest_nrom"), ConfigError, "Did you mean 'largest_norm'"),
    (dict(metric="largest_norm@9.mlp"), ShapeError, "9.mlp"),
    (dict(metric="cross_entropy"), ShapeError, "pass labels="),
    (dict(metric="cross_entropy", labels=torch.tensor([0, 9])), ShapeError, "Label 9 does not exist"),
    (dict(metric="cross_entropy", labels=torch.tensor([0])), ShapeError, "1 labels for 2 images"),
    (dict(metric=lambda e, c: (e.output > 0).sum(1)), ShapeError, r"floating-point.*\[2\].*int64 \[2\]"),
    (dict(metric=lambda e, c: (e.output > 0).float().sum(1)), ConfigError, "not differentiable"),
    (dict(metric=lambda e, c: e.output.detach().sum(1)), ConfigError, "not differentiable"),
    (dict(metric=lambda e, c: e.output), ShapeError, r"\[2, 5\]"),
    (dict(metric=lambda e, c: e.output.sum()), ShapeError, r"\[2\]"),
    (dict(metric=lambda e, c: 1.0), ShapeError, "float"),
    (dict(metric=lambda e, c: e.output.sum(1) * torch.nan), NonFiniteError, "each of the 2 images"),
    (dict(metric=lambda e, c: (e.output - c.output).square().sum(1).sqrt()), NonFiniteError, "gradient"),
    (dict(metric="largest_norm@0.attn"), ConfigError, "earlier layers only"),
    (dict(metric="largest_norm@0.attn", method="integrated_gradients"), ConfigError, "earlier layers only"),
    (dict(layers=[4]), ShapeError, "Layers .4. do not exist"),
    (dict(layers=[]), ConfigError, "empty"),
    (dict(mode="noise"), (ConfigError, TypeCheckError), "zero"),
    (dict(method="second_order"), (ConfigError, TypeCheckError), "first_order"),
    (dict(steps=0), ConfigError, "steps"),
    (dict(exact=-1), ConfigError, "exact"),
    (dict(images=pixels(0)), ImageError, "empty"),
    (dict(images=iter([pixels(2)]), exact=2), ImageError, "only once"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_input_is_told(options, error, words):
    options = {"images": pixels(2), "metric": "cls", **QUICK} | options
    with pytest.raises(error, match=words):
        screen_neurons(build(class_token=True), options.pop("images"), **{"layers": [1, 2]} | options)


def test_labels_that_run_out_or_are_left_over_are_told():
    vit, batches = build(), [pixels(2), pixels(2)]
    for n in (3, 5):
        with pytest.raises(ShapeError, match=f"{n} labels for 4 images"):
            screen_neurons(vit, batches, "class_logit", labels=torch.zeros(n, dtype=torch.long), **QUICK)


def test_models_without_cls_or_logits_are_told():
    vit = build(class_token=False, pooling=())
    for metric, error, words in (("cls", ConfigError, r"\[CLS\]"), ("class_logit", ShapeError, "logits")):
        with pytest.raises(error, match=words):
            screen_neurons(vit, pixels(2), metric, **QUICK)


# The result ----------------------------------------------------------------------------------------------------------


def test_the_result_goes_through_files(on_tiny, tmp_path):
    again = Screening.load(on_tiny.save(tmp_path))
    assert again.to_dataframe().equals(on_tiny.to_dataframe())
    assert again.describe() == on_tiny.describe() and again.layers == on_tiny.layers


def test_tables_name_every_neuron(on_tiny):
    table = on_tiny.to_dataframe()
    assert len(table) == 6 * 256 and table["exact"].notna().sum() == len(on_tiny.checked)
    row = table[(table["layer"] == 1) & (table["neuron"] == 183)].iloc[0]
    assert row["effect"] == on_tiny.effects[1, 183] and row["magnitude"] == on_tiny.magnitude[1, 183]
    checked = on_tiny.checked_dataframe()
    assert checked["candidate"].sum() == 12 and checked["sample"].sum() == 32
    top = on_tiny.neurons(12)
    assert list(zip(checked["layer"][:12], checked["neuron"][:12], strict=True)) == list(top.pairs)
    assert list(top.scores) == sorted(np.abs(on_tiny.effects).ravel(), reverse=True)[:12]
    with pytest.raises(ConfigError, match="k must be"):
        on_tiny.neurons(0)


def test_the_words_say_how_far_to_trust_it(on_tiny):
    assert "on random neurons" in on_tiny.describe() and "is poor here" not in on_tiny.trust()
    n = len(on_tiny.checked)
    rng = np.random.default_rng(0)
    poor = dataclasses.replace(on_tiny, exact=rng.permutation(on_tiny.exact))
    assert "is poor here" in poor.trust() and "method='integrated_gradients'" in poor.trust()
    missed = dataclasses.replace(on_tiny, exact=np.where(np.arange(n) == n - 1, 1e3, on_tiny.exact))
    assert missed.n_missed == 1 and "1 of the random neurons" in missed.trust() and on_tiny.n_missed == 0
    none = np.zeros(0, dtype=bool)
    unchecked = dataclasses.replace(
        on_tiny,
        checked=on_tiny.checked[:0],
        is_candidate=none,
        is_sample=none,
        exact=np.zeros(0),
        exact_standard_error=np.zeros(0),
    )
    assert "Nothing was ablated" in unchecked.describe()


def test_equal_seeds_check_the_same_neurons(tiny, on_tiny):
    images = synthetic_images(4, 0).images
    one, same, other = (
        screen_neurons(tiny, images, "largest_norm@1.mlp", exact=1, sample=9, seed=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(one.checked, same.checked) and not np.array_equal(one.checked, other.checked)
    assert np.array_equal(one.exact, same.exact)


def test_rank_correlation_is_scipys_with_ties_and_gaps():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    b += a / 2
    found = rank_correlation(np.append(a, np.nan), np.append(b, 1.0))
    assert found.n == 40 and found.rho == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    half = 1.959964 * math.sqrt((1 + found.rho**2 / 2) / 37)
    assert (math.atanh(found.high), math.atanh(found.low)) == pytest.approx(
        (math.atanh(found.rho) + half, math.atanh(found.rho) - half)
    )
    tied = rank_correlation(np.ones(5), b[:5])
    assert math.isnan(tied.rho) and "undefined" in str(tied)


def test_moments_are_those_of_all_images_at_once():
    values = torch.randn(9, 2, 3)
    values[2, 1, 1] = torch.nan
    seen = Moments(2, 3)
    for batch in values.split(4):
        seen.add(batch)
    array = values.double().numpy()
    np.testing.assert_allclose(seen.mean, np.nanmean(array, 0))
    np.testing.assert_allclose(seen.magnitude, np.nanmean(np.abs(array), 0))
    np.testing.assert_allclose(seen.standard_error, scipy.stats.sem(array, axis=0, nan_policy="omit"))


def test_the_default_place_of_the_largest_norm_is_where_outliers_are_clearest(tiny):
    images = synthetic_images(16, 0).images
    found = screen_neurons(tiny, images, **QUICK)
    assert found.words == largest_norm(rl.find_outliers(tiny, images).sublayer).words

"""Algorithm 1's averages and the other scores, against whole caches of one image at a time."""

import dataclasses
import gc
import weakref
from inspect import unwrap

import numpy as np
import pytest
import torch
from helpers import randomise

import registerlens as rl
from registerlens.analysis.detection import Cutoff, detect
from registerlens.analysis.scores import SCORES, NeuronScores, normal_patches, score_neurons
from registerlens.analysis.top_outliers import NormsAndActivations
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ConfigError, ImageError, NonFiniteError, ShapeError

CFG = rl.ViTConfig(n_layers=3, d_model=32, n_heads=4, d_mlp=40, image_size=(40, 48), patch_size=(8, 8))
CFGS = {
    "cls": CFG,
    "registers, layer scale, ln_pre": dataclasses.replace(
        CFG, distillation_token=True, n_trained_registers=3, ln_pre=True, layer_scale=True, act_fn="quick_gelu"
    ),
    "no cls, ties": dataclasses.replace(CFG, class_token=False, pooling=("mean",), act_fn="relu"),
    "few patches": dataclasses.replace(CFG, image_size=(24, 32)),  # 12, fewer than the sample of normal ones
}


def model(name="cls", seed=0):
    return randomise(rl.HookedViT(CFGS[name]), seed)


def noise(n, height=40, width=48, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def detection_at(vit, images, sublayer, value, relative=True):
    return dataclasses.replace(
        detect(vit, images, layer=sublayer), cutoff=Cutoff(value=value, relative=relative), rule="fixed"
    )


def naive(vit, batches, detection, layers):
    """Everything from whole caches, image by image, neuron sums in float64; scores and what they were made of."""
    images = []
    for batch in batches:
        for image in batch:
            with torch.no_grad():
                _, cache = vit.run_with_cache(image[None])
            patches = vit.layout(image[None]).patches
            norms = cache[detection.hook_name][0, patches].double().norm(dim=-1).numpy()
            cut = detection.cutoff.value * (np.median(norms) if detection.cutoff.relative else 1)
            post = np.stack([cache[f"blocks.{i}.mlp.hook_post"][0, patches].double().numpy() for i in layers])
            outlying = norms > cut
            ordered = [p for p in np.argsort(norms, kind="stable") if not outlying[p]]
            m = len(ordered)
            sample = ordered if m <= 16 else [ordered[int((i + 0.5) * m / 16)] for i in range(16)]
            images.append((post[:, outlying], post[:, sample], norms))

    def scores(chosen):
        chosen = [(out, normal) for out, normal, _ in chosen if out.shape[1]]
        mean = np.mean([out.mean(1) for out, _ in chosen], axis=0)
        mean_abs = np.mean([np.abs(out).mean(1) for out, _ in chosen], axis=0)
        normal = np.concatenate([normal for _, normal in chosen], axis=1)
        spread = normal.std(1)
        contrast = (mean - normal.mean(1)) / np.maximum(spread, 1e-3 * spread.mean() + 1e-12)
        auc = []
        for out, normal in chosen:
            pairs = out[:, :, None] - normal[:, None]  # layer, outlier, normal, neuron
            auc.append(((pairs > 0) + 0.5 * (pairs == 0)).mean((1, 2)))
        return np.stack([mean, mean_abs, contrast, np.mean(auc, axis=0)])

    return scores(images), np.stack([scores(images[0::2]), scores(images[1::2])]), images


def assert_equal(got, vit, batches, detection, layers):
    expected, halves, images = naive(vit, batches, detection, layers)
    for every, naive_every in zip((got.scores, *got.halves), (expected, *halves), strict=True):
        for name, a, b in zip(SCORES, every, naive_every, strict=True):
            if name == "auc":  # a pair that differs by rounding alone may go either way
                assert np.abs(a - b).max() < 0.02 and np.abs(a - b).mean() < 2e-4
            else:
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4, err_msg=name)
    assert all(
        got.of(name) is not None and (got.of(name) == a).all() for name, a in zip(SCORES, got.scores, strict=True)
    )
    normal = np.concatenate([normal for out, normal, _ in images if out.shape[1]], axis=1)
    np.testing.assert_allclose(got.normal_abs, np.abs(normal).mean(1), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(got.quiet, (normal < 0.5).mean(1), atol=1e-3)
    assert got.n_images == len(images)
    assert got.n_with_outliers == sum(out.shape[1] > 0 for out, *_ in images)
    assert got.n_outliers == sum(out.shape[1] for out, *_ in images)
    assert got.first_layer == layers[0]
    return images


@pytest.mark.parametrize("name", CFGS)
@pytest.mark.parametrize("sublayer", ["1.mlp", "2.attn"])
def test_all_scores_equal_whole_caches(name, sublayer):
    vit = model(name)
    images = noise(9, *vit.cfg.image_size)
    detection = detection_at(vit, images, sublayer, 1.1)
    got = score_neurons(vit, images.split(4), detection, top_layer=2)
    parts = assert_equal(got, vit, [images], detection, [0, 1, 2])
    sizes = [out.shape[1] for out, *_ in parts]
    assert got.n_outliers > 0 and len(set(sizes)) > 1  # different numbers, so that per-image averages matter
    if "ties" in name:
        assert (got.of("mean_abs") == got.of("mean")).all()
    else:
        assert (got.of("mean_abs") > got.of("mean") + 1e-6).any()


def test_an_image_without_outliers_does_not_count_and_a_fixed_norm_is_one():
    vit = model()
    images = noise(8)
    with torch.no_grad():
        norms = vit(images, stop_at_layer=2)[:, vit.layout(images).patches].norm(dim=-1)
    cut = float(norms.amax(1).sort().values[4]) * 0.999  # four images have one above it
    detection = detection_at(vit, images, "1.mlp", cut, relative=False)
    got = score_neurons(vit, [images], detection, lowest_layer=1, top_layer=1)
    assert_equal(got, vit, [images], detection, [1])
    assert got.n_with_outliers == 4 and got.n_images == 8


def test_an_image_without_normal_patches_does_not_count_for_the_auc():
    """There is nothing to compare its outliers with; for the averages it counts as any other."""
    vit, images = model(), noise(8)
    with torch.no_grad():
        norms = vit(images, stop_at_layer=2)[:, vit.layout(images).patches].norm(dim=-1)
    cut = float(norms.amin(1).sort().values[5]) * 0.999  # in three images every patch lies above
    mixed = detection_at(vit, images, "1.mlp", cut, relative=False)
    whole = norms.amin(1) > cut
    assert whole.sum() == 3
    got, without = (score_neurons(vit, [part], mixed, lowest_layer=1, top_layer=1) for part in (images, images[~whole]))
    assert got.n_with_outliers == 8 and without.n_with_outliers == 5
    np.testing.assert_allclose(got.of("auc"), without.of("auc"), atol=2e-3)
    assert np.abs(got.of("mean") - without.of("mean")).max() > 0.01
    every = score_neurons(vit, [images[whole]], mixed, lowest_layer=1, top_layer=1)
    assert (every.of("auc") == 0.5).all() and (every.of("mean") != 0).any()


def test_images_of_different_sizes_and_any_batching():
    vit = model("registers, layer scale, ln_pre")
    parts = [noise(2), noise(3, 24, 72, 1), noise(1, 16, 40, 2), noise(3)]
    detection = detection_at(vit, parts[0], "1.mlp", 1.15)
    whole = score_neurons(vit, iter(parts), detection, top_layer=2)
    assert_equal(whole, vit, parts, detection, [0, 1, 2])
    single = score_neurons(vit, (image[None] for part in parts for image in part), detection, top_layer=2)
    np.testing.assert_allclose(single.scores, whole.scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(single.halves, whole.halves, rtol=1e-4, atol=1e-6)
    assert (single.n_images, single.n_outliers) == (whole.n_images, whole.n_outliers)


@pytest.mark.parametrize(
    ("sublayer", "top", "last"),
    [("embed", 0, "0.attn"), ("1.mlp", 0, "1.mlp"), ("0.mlp", 1, "1.attn"), ("1.attn", 1, "1.attn")],
)
def test_stopping_early_changes_nothing(sublayer, top, last):
    vit, images = model(), noise(5)
    detection = detection_at(vit, images, sublayer, 1.1)
    early, late = (
        score_neurons(vit, images.split(2), detection, top_layer=top, early_stop=stop) for stop in (True, False)
    )
    np.testing.assert_array_equal(early.scores, late.scores)
    np.testing.assert_array_equal(early.halves, late.halves)
    assert_equal(early, vit, [images], detection, list(range(top + 1)))
    ran = []
    for i, block in enumerate(vit.blocks):
        for kind in ("attn", "mlp"):
            getattr(block, kind).register_forward_pre_hook(lambda *a, name=f"{i}.{kind}": ran.append(name))
    score_neurons(vit, [images], detection, top_layer=top)
    every = ["0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp"]
    assert ran == every[: every.index(last) + 1]
    ran.clear()
    score_neurons(vit, [images], detection, top_layer=top, early_stop=False)
    assert ran == every


def test_a_batch_seen_before_counts_as_the_first():
    """What the hooks of a `NormsAndActivations` keep of another pass gives the same bits as a pass of its own."""
    vit, images = model("registers, layer scale, ln_pre"), noise(7)
    detection = detection_at(vit, images, "1.attn", 1.1)
    seen = NormsAndActivations(vit, vit.layout(images), range(3), ["embed", "1.attn", "2.mlp"])
    with torch.inference_mode(), vit.hooks(seen.hooks):
        vit(images[:3])
        vit(images[:3] + 1)  # the first pass counts
    parts = images.split([3, 4])
    got = score_neurons(vit, parts[1:], detection, lowest_layer=1, top_layer=2, seen=seen)
    expected = score_neurons(vit, parts, detection, lowest_layer=1, top_layer=2)
    np.testing.assert_array_equal(got.scores, expected.scores)
    np.testing.assert_array_equal(got.halves, expected.halves)
    assert (got.n_images, got.n_outliers, got.evidence) == (7, expected.n_outliers, expected.evidence)
    with pytest.raises(KeyError):
        seen.norms("1.attn")  # used up


def edits(vit, images):
    neurons = rl.RegisterNeurons.from_pairs([(0, 3), (1, 7), (1, 8)])
    return {
        "ablated": rl.Ablate(neurons),
        "mean": rl.Ablate.fit(vit, images, neurons),
        "test-time register": rl.TestTimeRegisters(neurons, n=2),
        "moved": rl.MoveOutliers(neurons, 4),
        "attention bias": rl.AttentionBias.fit(vit, images, neurons),
    }


@pytest.mark.parametrize("name", ["ablated", "mean", "test-time register", "moved", "attention bias"])
def test_edits_are_respected(name):
    vit, images = model(), noise(6)
    plain = detection_at(vit, images, "2.mlp", 1.15)
    with vit.edit(edits(vit, images)[name]):
        got = score_neurons(vit, images.split(4), plain, top_layer=2)
        assert_equal(got, vit, [images], plain, [0, 1, 2])
    unedited = score_neurons(vit, [images], plain, top_layer=2)
    assert np.abs(got.of("mean") - unedited.of("mean"))[[0, 1, 1], [3, 7, 8]].min() > 1e-4
    if name == "ablated":
        assert (got.scores[:2, [0, 1, 1], [3, 7, 8]] == 0).all()


@pytest.mark.parametrize("point", ["blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post", "blocks.1.ln2.hook_normalized"])
def test_a_users_hooks_are_respected(point):
    vit, images = model(), noise(4)
    detection = detection_at(vit, images, "0.mlp", 1.1)
    with vit.hooks([(point, lambda x, hook: x * 1.5 + 0.3)]):
        got = score_neurons(vit, [images], detection, top_layer=2)
        assert_equal(got, vit, [images], detection, [0, 1, 2])
    assert np.abs(got.of("mean")[1] - score_neurons(vit, [images], detection, top_layer=2).of("mean")[1]).max() > 0.1


def test_no_hidden_layer_is_ever_kept(monkeypatch):
    """Nobody listens where hidden layers pass, and nothing of a batch outlives it, not even in a cycle."""
    vit = model()
    listened = []
    for block in vit.blocks:
        block.mlp.register_forward_pre_hook(
            lambda mlp, x: listened.append(mlp.hook_post.has_hooks() or mlp.hook_pre.has_hooks())
        )
    alive = []

    def batches():
        for i in range(5):
            batch = noise(2, seed=i)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(reference() is not None for reference in alive) <= 2
            assert sum(type(thing) is NormsAndActivations for thing in gc.get_objects()) <= 1

    detection = detection_at(vit, noise(2), "1.mlp", 1.1)
    listened.clear()
    gc.collect()
    gc.disable()
    try:
        score_neurons(vit, batches(), detection, top_layer=2)
        assert not [thing for thing in gc.get_objects() if type(thing) is NormsAndActivations]
    finally:
        gc.enable()
    assert listened == [False] * 10  # the third MLP's input ends the pass
    assert not any(point.has_hooks() for point in vit.hook_dict.values())


def test_the_evidence_is_that_of_the_trace():
    tiny, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(48, 3).images
    traced = rl.trace(tiny, images)
    for place in ("1.mlp", "3.attn", "0.mlp"):
        got = score_neurons(tiny, images.split(20), detection_at(tiny, images, place, 1.2), top_layer=0)
        expected = traced.evidence[traced.sublayers.index(place)]
        assert (got.evidence.verdict, got.evidence.reason) == (expected.verdict, expected.reason)
        assert got.evidence.largest_over_median == pytest.approx(expected.largest_over_median, rel=1e-5)
        assert got.evidence.gap == pytest.approx(expected.gap)


def test_the_emergent_neurons_score_as_written():
    """The table that came with the embedded model: seven neurons of block 1, and the next best far below."""
    tiny, batch = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(256, 1001)
    got = score_neurons(tiny, batch.images.split(64), detect(tiny, batch.images), lowest_layer=1, top_layer=1)
    ranked = got.ranked()
    assert [(a, b) for a, b, _ in ranked[:7]] == [(1, n) for n in (183, 103, 219, 125, 55, 128, 177)]
    np.testing.assert_allclose([s for *_, s in ranked[:7]], [124, 114, 107, 59, 42, 38, 23], rtol=0.05)
    assert 1 < ranked[7][2] < 2.5
    assert got.n_outliers == int((batch.roles == FLAT).sum()) and got.n_with_outliers == 256
    top = [n for _, n, _ in ranked[:7]]
    np.testing.assert_allclose(got.of("auc")[0, top], 1.0, atol=2e-3)
    np.testing.assert_array_equal(got.of("mean_abs"), got.of("mean"))  # ReLU squared
    assert set(np.argsort(-got.of("contrast")[0])[:3]) & set(top)
    np.testing.assert_allclose(got.halves[0, 0, 0, top], got.halves[1, 0, 0, top], rtol=0.05)


def test_half_precision():
    images = synthetic_images(32, 2).images
    tiny = rl.HookedViT.from_pretrained("registerlens:tiny")
    detection = detect(tiny, images)
    full = score_neurons(tiny, [images], detection, top_layer=1)
    half = score_neurons(tiny.to(torch.bfloat16), [images], detection, top_layer=1)
    assert half.scores.dtype == np.float64
    assert [(a, b) for a, b, _ in half.ranked()[:7]] == [(a, b) for a, b, _ in full.ranked()[:7]]
    np.testing.assert_allclose(half.of("mean")[1, 183], full.of("mean")[1, 183], rtol=0.02)


@pytest.mark.parametrize("n_patches", [3, 16, 17, 40, 100])
def test_normal_patches_are_spread_over_the_norms(n_patches):
    generator = torch.Generator().manual_seed(n_patches)
    norms = torch.rand(20, n_patches, generator=generator)
    mask = torch.rand(20, n_patches, generator=generator) < 0.2
    mask[0] = True  # no normal patch at all
    index, valid = normal_patches(norms, mask, 16)
    assert index.shape == valid.shape == (20, 16)
    for row in range(20):
        ordered = sorted((float(norms[row, p]), p) for p in range(n_patches) if not mask[row, p])
        chosen = index[row][valid[row]].tolist()
        assert not mask[row, chosen].any()
        if len(ordered) <= 16:
            assert sorted(chosen) == sorted(p for _, p in ordered)
        else:
            assert chosen == [ordered[int((i + 0.5) * len(ordered) / 16)][1] for i in range(16)]
            assert len(set(chosen)) == 16


def scores_of(values):
    """NeuronScores of one layer from [score, neuron]."""
    scores = np.array(values, dtype=float)[:, None]
    tiny = rl.HookedViT.from_pretrained("registerlens:tiny")
    evidence = detect(tiny, synthetic_images(8, 0).images).evidence
    return NeuronScores(
        first_layer=4,
        scores=scores,
        halves=np.stack([scores, -scores]),
        normal_abs=np.array([[9.0, 0.2, 0.4, 1.1]]),
        quiet=np.array([[0.0, 0.4, 0.5, 1.0]]),
        n_images=8,
        n_with_outliers=8,
        n_outliers=8,
        evidence=evidence,
    )


def test_ranks_and_ties():
    got = scores_of([[3, 1, 2, 5], [9, 1, 2, 5], [0, 0, 0, 1], [1, 1, 1, 0.5]])
    assert got.ranked() == [(4, 3, 5.0), (4, 0, 3.0), (4, 2, 2.0), (4, 1, 1.0)]
    assert [n for _, n, _ in got.ranked("mean_abs")] == [0, 3, 2, 1]
    assert [n for _, n, _ in got.ranked("auc")] == [0, 2, 1, 3]  # equal ones by their mean activation
    assert [n for _, n, _ in got.ranked("contrast")] == [3, 0, 2, 1]
    assert [n for _, n, _ in got.ranked("mean", half=1)] == [1, 2, 0, 3]
    assert [n for _, n, _ in got.ranked(keep="telling")] == [2, 1]  # as large as five times their normal magnitude
    assert [n for _, n, _ in got.ranked(keep="sparse")] == [3, 2]  # quiet on at least half of the normal patches
    with pytest.raises(ConfigError, match="keep must be one of"):
        unwrap(NeuronScores.candidates)(got, "most")
    table = got.to_dataframe()
    assert list(table.columns) == ["layer", "neuron", *SCORES]
    assert table["neuron"].tolist() == [3, 0, 2, 1] and set(table["layer"]) == {4}
    assert table["auc"].tolist() == [0.5, 1, 1, 1]
    with pytest.raises(ConfigError, match=r"one of \['mean', 'mean_abs', 'contrast', 'auc'\], got 'median'"):
        unwrap(NeuronScores.of)(got, "median")


def test_several_layers_are_numbered_from_the_first():
    vit, images = model(), noise(4)
    got = score_neurons(vit, [images], detection_at(vit, images, "2.mlp", 1.1), lowest_layer=1, top_layer=2)
    table = got.to_dataframe()
    assert got.scores.shape == (4, 2, 40) and set(table["layer"]) == {1, 2} and len(table) == 80
    for layer, neuron, value in got.ranked("contrast")[:50]:
        assert got.of("contrast")[layer - 1, neuron] == value
        row = table[(table["layer"] == layer) & (table["neuron"] == neuron)]
        assert row["contrast"].item() == value


def test_errors():
    vit, images = model(), noise(3)
    detection = detection_at(vit, images, "1.mlp", 1.1)
    with pytest.raises(ImageError, match="No image came for scoring neurons"):
        score_neurons(vit, [], detection, top_layer=1)
    none = dataclasses.replace(detection, cutoff=Cutoff(value=1e9, relative=True))
    with pytest.raises(ImageError, match="None of the 3 images has an outlier patch above the threshold"):
        score_neurons(vit, [images], none, top_layer=1)
    broken = images.clone()
    broken[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or infinite at 1\.mlp"):
        score_neurons(vit, [broken], detection, top_layer=1)
    with pytest.raises(ShapeError, match=r"\[batch, 3, height, width\]"):
        score_neurons(vit, [images[0]], detection, top_layer=1)
    assert not any(point.has_hooks() for point in vit.hook_dict.values())

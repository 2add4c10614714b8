"""The overlap of the four observables: masks made by hand, planted models, and whole caches."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import registerlens as rl
from registerlens.analysis.detection import Cutoff, detect
from registerlens.analysis.overlap import (
    CLOSE,
    MASSIVE,
    NORM,
    SINKS,
    Overlap,
    closeness,
    count_overlaps,
    first_by,
    observable_overlap,
)
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ImageError, NonFiniteError, NoOutliersError
from registerlens.model.sublayers import Sublayer
from registerlens.theory.planted import plant_register_neurons

CFG = rl.ViTConfig(
    n_layers=4, d_model=32, n_heads=4, d_mlp=40, image_size=(40, 48), patch_size=(8, 8), n_trained_registers=2
)


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def planted():
    torch.manual_seed(0)
    return plant_register_neurons(rl.HookedViT(CFG).eval(), layer=1, n=3)


def noise(n, seed=0):
    return torch.randn(n, 3, 40, 48, generator=torch.Generator().manual_seed(seed))


def test_masks_made_by_hand():
    flags = torch.tensor(
        [
            [[1, 1, 0, 0], [1, 0, 0, 0]],
            [[1, 0, 1, 0], [0, 0, 0, 0]],
            [[0, 0, 0, 0], [0, 0, 0, 0]],
        ]
    ).bool()
    assert count_overlaps(flags).tolist() == [[3, 1, 0], [1, 2, 0], [0, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
def test_counts_and_first_k_equal_a_loop(seed, n_images, n_patches):
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(3, n_images, n_patches, generator=generator) > 0.5
    expected = [[sum(bool(a & b) for a, b in zip(x.flatten(), y.flatten(), strict=True)) for y in flags] for x in flags]
    assert count_overlaps(flags).tolist() == expected
    scores = torch.randint(0, 4, (3, n_images, n_patches), generator=generator).float()  # with ties
    k = torch.randint(0, n_patches + 1, (n_images,), generator=generator)
    first = first_by(scores, k)
    for observable in range(3):
        for image in range(n_images):
            order = sorted(range(n_patches), key=lambda p: (-scores[observable, image, p], p))
            assert set(first[observable, image].nonzero()[:, 0].tolist()) == set(order[: k[image]])


def test_closeness_is_a_difference_of_cosines():
    generator = torch.Generator().manual_seed(0)
    patches, cls = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 7, generator=generator)
    got = closeness(patches, cls)
    for image in range(2):
        unit = [p / p.norm() for p in patches[image].double()]
        average = sum(unit) / 5
        for i, u in enumerate(unit):
            to_cls = float(u @ cls[image].double() / cls[image].double().norm())
            assert float(got[image, i]) == pytest.approx(to_cls - float(u @ average / average.norm()), abs=1e-5)
    scales = torch.rand(2, 5, 1, generator=generator) + 0.1
    torch.testing.assert_close(closeness(patches * scales, cls * 9), got, rtol=1e-4, atol=1e-5)  # directions only


def test_the_table_equals_whole_caches(planted):
    """Everything anew from caches of single images, with patterns instead of queries and keys."""
    vit, truth = planted
    images = truth.calibration
    detection = detect(vit, images, layer="2.mlp")
    found = observable_overlap(vit, images, detection=detection, batch_size=5)
    assert found.observables == (NORM, MASSIVE, SINKS, CLOSE)
    counts, matched, by_chance = np.zeros((4, 4), int), np.zeros((4, 4), int), 0.0
    for image in images:
        with torch.no_grad():
            _, cache = vit.run_with_cache(image[None])
        layout = vit.layout(image[None])
        stream = cache["blocks.2.hook_resid_post"][0].double()
        patches = stream[layout.patches]
        norms = patches.norm(dim=-1)
        middle = stream.abs().flatten().sort().values[(stream.numel() - 1) // 2]
        drawn = [cache[f"blocks.{i}.attn.hook_pattern"][0, :, layout.cls, layout.patches].amax(0) for i in (2, 3)]
        drawn = torch.stack(drawn).amax(0)
        unit = patches / norms[:, None]
        average = unit.mean(0)
        cls = stream[layout.cls]
        close = unit @ cls / cls.norm() - unit @ average / average.norm()
        largest = patches.abs().amax(-1)
        flags = [
            norms > detection.cutoff.value * np.median(norms),
            (largest > 100) & (largest > 1000 * middle),
            drawn > 0.3,
            close > 0,
        ]
        k = int(flags[0].sum())
        firsts = [set(np.argsort(-np.asarray(s), kind="stable")[:k].tolist()) for s in (norms, largest, drawn, close)]
        for i in range(4):
            for j in range(4):
                counts[i, j] += int((flags[i] & flags[j]).sum())
                matched[i, j] += len(firsts[i] & firsts[j])
        by_chance += k * k / layout.n_patches
    assert (found.counts == counts).all() and counts[0, 0] and counts[2, 2] and counts[3, 3]
    assert (found.matched == matched).all()
    assert found.chance == pytest.approx(by_chance / matched[0, 0])
    assert found.n_patches == len(images) * 30 and found.n_with_outliers <= found.n_images == len(images)


def test_jaccard_and_conditional_shares_follow_from_the_counts(planted):
    vit, truth = planted
    found = dataclasses.replace(
        observable_overlap(vit, truth.calibration),
        observables=(NORM, MASSIVE, SINKS),
        cutoffs=("a", "b", "c"),
        n_patches=100,
        counts=np.array([[10, 0, 4], [0, 0, 0], [4, 0, 8]]),
        matched=np.array([[10, 9, 5], [9, 10, 4], [5, 4, 10]]),
        chance=0.1,
    )
    np.testing.assert_allclose(found.jaccard, [[1, 0, 4 / 14], [0, np.nan, 0], [4 / 14, 0, 1]])
    np.testing.assert_allclose(found.conditional, [[1, 0, 0.4], [np.nan] * 3, [0.5, 0, 1]])
    table = found.to_dataframe().set_index(["first", "second"])
    row = table.loc[NORM, SINKS]
    assert (row["n_first"], row["n_second"], row["n_both"]) == (10, 8, 4)
    assert (row["second_given_first"], row["first_given_second"], row["matched_share"]) == (0.4, 0.5, 0.5)
    assert table.loc[(MASSIVE, SINKS), "jaccard"] == 0 and np.isnan(table.loc[(MASSIVE, SINKS), "second_given_first"])
    words = found.describe()
    assert "40% of the norm outliers are sinks, and 50% the other way round" in words
    assert "massive channel 0.00%" in words and "Ranked by 'massive channel' 90%" in words and "10.0%" in words


def test_planted_outliers_are_sinks_and_the_tiny_model_has_no_cls(planted, tiny):
    vit, truth = planted
    found = observable_overlap(vit, truth.calibration, layer=1)
    i = found.observables.index(SINKS)
    assert found.conditional[0, i] > 0.9 and found.conditional[i, 0] > 0.9 and found.matched_share[0, i] > 0.9
    batch = synthetic_images(32, 0)
    of_tiny = observable_overlap(tiny, batch.images, layer=1)
    assert of_tiny.observables == (NORM, MASSIVE, SINKS) and of_tiny.counts[0, 0] == (batch.roles == FLAT).sum()
    assert of_tiny.counts[1, 1] == 0 and of_tiny.matched_share.min() == 1.0
    assert (of_tiny.conditional[2, 0], of_tiny.chance < 0.1) == (1.0, True)


def test_without_a_block_after_the_onset_there_is_no_sink_observable(planted):
    vit, truth = planted
    detection = dataclasses.replace(detect(vit, truth.calibration, layer=3), onset=Sublayer("3.mlp"))
    assert observable_overlap(vit, truth.calibration, detection=detection).observables == (NORM, MASSIVE, CLOSE)


def test_batching_and_registers_at_test_time_do_not_disturb(planted):
    vit, truth = planted
    images = truth.calibration
    detection = detect(vit, images)
    one = observable_overlap(vit, images, detection=detection, batch_size=1)
    other = observable_overlap(vit, [images[:20], images[20:]], detection=detection)
    assert (one.counts == other.counts).all() and (one.matched == other.matched).all()
    with vit.edit(rl.TestTimeRegisters(truth.neurons, n=1, clear="none")):
        edited = observable_overlap(vit, images, detection=detection)
    assert edited.n_patches == one.n_patches


def test_without_outliers_it_is_refused_with_the_evidence_unless_a_norm_is_given(focus_vit):
    images = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NoOutliersError, match="The overlap of the observables") as caught:
        observable_overlap(focus_vit, images)
    assert caught.value.evidence.verdict == "absent"
    found = observable_overlap(focus_vit, images, threshold=1.0, layer=9)
    assert found.counts[0, 0] == 50 and found.matched_share.min() == 1.0  # every patch
    with pytest.raises(ImageError, match="None of the 2 images has a norm outlier"):
        observable_overlap(focus_vit, images, threshold=1e9, layer=9)


def test_bad_input_is_named(planted):
    vit, truth = planted
    detection = detect(vit, truth.calibration)
    with pytest.raises(ImageError, match="or it could be iterated only once"):
        observable_overlap(vit, iter([]), detection=detection)
    broken = randomise(rl.HookedViT(CFG), 0)
    with torch.no_grad():
        broken.blocks[0].mlp.out.bias[0] = float("nan")
    fixed = dataclasses.replace(detection, rule="fixed", cutoff=Cutoff(value=1.0, relative=False))
    with pytest.raises(NonFiniteError, match="NaN or infinite at"):
        observable_overlap(broken, noise(2), detection=fixed)


def test_saved_and_loaded_it_is_the_same(planted, tmp_path):
    vit, truth = planted
    found = observable_overlap(vit, truth.calibration)
    back = Overlap.load(found.save(tmp_path))
    assert back.describe() == found.describe() and back.to_dataframe().equals(found.to_dataframe())
    assert back.detection == found.detection and back.config == CFG

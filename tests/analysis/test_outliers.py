"""The verdict on distributions whose answer is known, and on those that fool simpler rules."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registerlens.analysis.outliers import MIN_GAP, MIN_TYPICAL, judge
from registerlens.stats.histograms import LOG_HIGH, LOG_LOW, N_BINS, bin_edges


def evidence_of(norms):
    """Judge patch norms [image, patch] by way of numpy's own histogram."""
    relative = norms / np.median(norms, axis=1, keepdims=True)
    largest = relative.max(1)

    def histogram(values):
        inside = np.clip(np.log(values), LOG_LOW + 1e-9, LOG_HIGH - 1e-9)
        return np.histogram(inside, bins=N_BINS, range=(LOG_LOW, LOG_HIGH))[0]

    return judge(histogram(relative.ravel()), histogram(largest), float(largest.mean()))


def bimodal(rng, size, share, ratio, spread=0.2, outlier_spread=0.15):
    """Lognormal norms around 10 with a share of outliers around 10 * ratio; at least one. Returns norms and mask."""
    norms = 10 * np.exp(spread * rng.standard_normal(size))
    mask = rng.random(size) < share
    mask.flat[rng.integers(mask.size)] = True
    norms[mask] = 10 * ratio * np.exp(outlier_spread * rng.standard_normal(mask.sum()))
    return norms, mask


def widest_gap(relative):
    """From sorted values: the k highest, at most k / 5 inside the gap, the rest below it."""
    ordered = np.sort(relative.ravel())[::-1]
    enough = np.sort(relative.max(1))[::-1][math.ceil(0.1 * len(relative)) - 1]  # a tenth of the images reach this
    return max(
        ordered[k - 1] / max(ordered[k + k // 5], 1.0)
        for k in range(1, len(ordered) // 4 + 1)
        if ordered[k - 1] <= enough
    )


UNIMODAL = {
    "lognormal 0.1": lambda rng, size: np.exp(0.1 * rng.standard_normal(size)),
    "lognormal 0.3": lambda rng, size: np.exp(0.3 * rng.standard_normal(size)),
    "lognormal 0.5": lambda rng, size: np.exp(0.5 * rng.standard_normal(size)),
    "chi 3": lambda rng, size: np.sqrt(rng.chisquare(3, size)),
    "chi 64": lambda rng, size: np.sqrt(rng.chisquare(64, size)),
    "gaussian": lambda rng, size: np.abs(50 + 15 * rng.standard_normal(size)),
    "exponential": lambda rng, size: rng.exponential(1, size) + 0.05,
}
SIZES = [(1, 36), (1, 256), (1, 1369), (4, 256), (16, 196), (100, 256), (400, 64)]


@pytest.mark.parametrize("name", UNIMODAL)
def test_one_mode_is_absent_at_every_sample_size(name):
    for size in SIZES:
        for seed in range(8):
            found = evidence_of(UNIMODAL[name](np.random.default_rng(seed), size))
            assert found.verdict == "absent", (size, seed, found)
            assert not found.present


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_a_heavy_tail_that_goes_on_is_absent(alpha):
    # Gaps between the largest few values are wide in such a tail, however many values there are.
    for size in [(1, 256), (4, 256), (16, 256), (100, 256), (500, 196)]:
        for seed in range(8):
            norms = 1 + np.random.default_rng(seed).pareto(alpha, size)
            found = evidence_of(norms)
            assert not found.present, (size, seed, found)
            assert (norms > norms.mean() + 3 * norms.std()).any()  # where mean + 3 sigma flags something


@pytest.mark.parametrize("share", [0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("ratio", [4.0, 8.0, 20.0])
def test_two_modes_are_present_with_the_threshold_between(share, ratio):
    for seed in range(6):
        norms, mask = bimodal(np.random.default_rng(seed), (40, 256), share, ratio)
        found = evidence_of(norms)
        assert found.present, found
        relative = norms / np.median(norms, axis=1, keepdims=True)
        called = relative > found.threshold
        assert (called != mask).mean() < 0.0005
        assert found.share_of_patches == pytest.approx(called.mean(), abs=1e-4)
        assert found.share_of_images == pytest.approx(called.any(1).mean(), abs=0.03)
        assert found.typical == pytest.approx(np.quantile(relative[called], 0.5, method="lower"), rel=0.03)
        assert found.gap == pytest.approx(widest_gap(relative), rel=0.05)
        assert math.sqrt(ratio) * 0.7 < found.threshold < math.sqrt(ratio) * 1.5
        assert found.largest_over_median == pytest.approx(relative.max(1).mean())


def test_a_single_image_with_a_few_clear_outliers_is_present():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        norms = 40 * np.exp(0.2 * rng.standard_normal((1, 256)))
        norms[0, rng.permutation(256)[:3]] = 300 * np.exp(0.2 * rng.standard_normal(3))
        assert evidence_of(norms).present


def test_norms_as_reported_for_dinov2_are_present_despite_tokens_in_the_valley():
    # DINOv2-L and g: most norms 20 to 100, outliers 150 to 600, and a few tokens between.
    for seed in range(10):
        rng = np.random.default_rng(seed)
        norms, mask = bimodal(rng, (50, 256), 0.02, 300 / 45, spread=0.3, outlier_spread=0.3)
        valley = mask & (rng.random(mask.shape) < 0.05)
        norms[valley] = 10 * rng.uniform(1.5, 4, valley.sum())
        found = evidence_of(norms)
        assert found.present, found
        assert 2 < found.threshold < 5


def test_norms_as_reported_for_openclip_are_present():
    # OpenCLIP-B: typical norms 10 to 25, outliers from 40 on.
    for seed in range(10):
        norms, _ = bimodal(np.random.default_rng(seed), (50, 196), 0.01, 4.5, spread=0.2, outlier_spread=0.2)
        assert evidence_of(norms).present


@pytest.mark.parametrize("level", [3.0, 20.0, 1e6])
def test_one_stray_token_in_a_thousand_images_is_absent(level):
    norms = 10 * np.exp(0.1 * np.random.default_rng(0).standard_normal((1000, 64)))
    norms[17, 5] = 10 * level
    found = evidence_of(norms)
    assert not found.present
    assert norms[17, 5] > norms.mean() + 3 * norms.std()


def test_a_second_kind_of_content_is_absent():
    rng = np.random.default_rng(0)
    content = rng.random((60, 256)) < 0.4
    norms = np.where(content, 50, 10) * np.exp(0.1 * rng.standard_normal(content.shape))
    assert not evidence_of(norms).present
    outliers = rng.random((60, 256)) < 0.05  # the same two modes are outliers where few patches are in the upper
    norms = np.where(outliers, 50, 10) * np.exp(0.1 * rng.standard_normal(content.shape))
    assert evidence_of(norms).present


def test_a_mode_close_to_the_others_is_absent():
    rng = np.random.default_rng(0)
    upper = rng.random((60, 256)) < 0.1
    norms = np.where(upper, 20, 10) * np.exp(0.03 * rng.standard_normal(upper.shape))
    found = evidence_of(norms)
    assert not found.present  # twice the median is no outlier, however clean the gap
    assert found.gap > 1.5
    assert "are lower than outliers, 3.8 x" in found.reason


def test_mean_plus_three_sigma_flags_where_the_verdict_is_absent():
    norms = np.exp(0.3 * np.random.default_rng(1).standard_normal((100, 256)))
    flagged = (norms > norms.mean() + 3 * norms.std()).mean()
    assert 0.002 < flagged < 0.02
    assert not evidence_of(norms).present


def test_each_images_own_scale_does_not_matter():
    norms, _ = bimodal(np.random.default_rng(3), (20, 256), 0.02, 10.0)
    per_image = np.random.default_rng(4).uniform(0.01, 100, (20, 1))
    one, other = evidence_of(norms), evidence_of(norms * per_image)
    assert other.verdict == one.verdict == "present"
    assert other.threshold == pytest.approx(one.threshold, rel=0.03)
    assert other.share_of_patches == pytest.approx(one.share_of_patches, rel=1e-3)


def test_the_reasons_carry_their_numbers():
    counts, largest = np.zeros(N_BINS, int), np.zeros(N_BINS, int)
    counts[150], counts[270], largest[270] = 96, 4, 1
    present = judge(counts, largest, 11.0)
    assert present.reason == (
        "4.0% of patches, in 100% of images, form a mode of their own at 11.0 x the median norm (gap 10.8)"
    )
    assert present.threshold == pytest.approx(math.exp(0.02 * (150 + 60.5) - 3), rel=0.02)
    counts[270], largest[270], counts[180], largest[180] = 0, 0, 4, 1
    assert judge(counts, largest, 1.8).reason == (
        "the norms beyond the widest gap (1.8 x the median, gap 1.79; 4 of 100 patches, in 1 of 1 images) are lower "
        "than outliers, 2.0 x"
    )
    flat = np.exp(np.linspace(-1, 1.2, 40))[None]
    assert "continue the others" in evidence_of(flat).reason
    flat[0, -1] = 6.0
    assert evidence_of(flat).reason.endswith("are few enough to be the tail of the others")
    none = judge(np.eye(N_BINS, dtype=int)[150] * 100, np.eye(N_BINS, dtype=int)[150], 1.0)
    assert none.reason == "the norms form one mode"
    assert none.gap == 1.0
    assert math.isnan(none.threshold) and math.isnan(none.typical)


def test_edges_step_by_two_percent():
    edges = bin_edges()
    assert len(edges) == N_BINS + 1
    assert edges[0] == pytest.approx(math.exp(-3)) and edges[-1] == pytest.approx(math.exp(7))
    assert np.allclose(edges[1:] / edges[:-1], math.exp(0.02))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    st.integers(0, N_BINS - 40),
    st.integers(1, 20),
)
def test_any_histogram_gets_a_consistent_answer(heights, first, n_images):
    counts, largest = np.zeros(N_BINS, int), np.zeros(N_BINS, int)
    counts[first : first + len(heights)] = heights
    largest[first + len(heights) - 1] = n_images
    found = judge(counts, largest, 2.0)
    assert 0 <= found.share_of_images <= 1 and 0 <= found.share_of_patches <= 0.25 * 1.2 + 1e-9
    assert found.gap >= 1
    if found.present:
        assert found.gap >= MIN_GAP and found.typical >= MIN_TYPICAL and found.threshold > 1
        assert found.typical >= found.threshold


PUBLISHED = Path(__file__).parent.parent / "published"
"""Norms read off published colour maps, one photograph each, last block; see docs/concepts/verdict.md."""


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("openclip_vitb16", "present"), ("openclip_vitb16_with_register", "absent"), ("dinov2_vitl14", "absent")],
)
def test_norms_of_published_models(name, verdict):
    norms = np.loadtxt(PUBLISHED / f"{name}_last_block_norms.csv", delimiter=",").reshape(1, -1)
    found = evidence_of(norms)
    assert found.verdict == verdict
    if found.present:
        assert round(found.share_of_patches * norms.size) == 12 and 3.4 < found.typical < 6.1


def counts_of(norms):
    relative = norms / np.median(norms, axis=1, keepdims=True)
    return np.histogram(np.log(relative), bins=N_BINS, range=(LOG_LOW, LOG_HIGH))[0], np.histogram(
        np.log(relative.max(1)), bins=N_BINS, range=(LOG_LOW, LOG_HIGH)
    )[0]


def test_what_was_there_before_or_does_not_last_is_absent():
    norms, _ = bimodal(np.random.default_rng(0), (40, 256), 0.02, 5.0)
    body = 10 * np.exp(0.2 * np.random.default_rng(1).standard_normal((40, 256)))
    (large, largest), (small, _) = counts_of(norms), counts_of(body)
    assert judge(large, largest, 5.0, earlier=[small], beside=[small, large]).present
    assert judge(large, largest, 5.0, earlier=[large, small], beside=[large]).present  # it had gone in between
    assert judge(large, largest, 5.0, earlier=[large, large], beside=[large]).reason.endswith("x before: content")
    assert judge(large, largest, 5.0, earlier=[small], beside=[small]).reason.endswith("they do not last")


def test_at_the_embedding_only_a_clear_mode_counts():
    for ratio, present in ((3.0, False), (5.0, True)):
        norms, _ = bimodal(np.random.default_rng(0), (40, 256), 0.02, ratio, spread=0.1)
        counts, largest = counts_of(norms)
        assert judge(counts, largest, ratio).present
        assert judge(counts, largest, ratio, earlier=[], beside=[counts]).present == present


@pytest.mark.parametrize("ratio", [2.2, 2.6, 3.0])
def test_a_low_mode_is_found_with_enough_images(ratio):
    for seed in range(10):
        norms, _ = bimodal(np.random.default_rng(seed), (64, 196), 0.02, ratio, spread=0.09, outlier_spread=0.05)
        assert evidence_of(norms).present


def test_outliers_in_one_image_of_several_are_too_few():
    norms = 10 * np.exp(0.1 * np.random.default_rng(0).standard_normal((8, 196)))
    norms[3, :6] *= 12
    found = evidence_of(norms)
    assert found.verdict == "too few images" and found.more_images == 8  # so that two images have some
    assert evidence_of(norms[3:4]).present  # one image alone is judged for itself
    assert evidence_of(np.concatenate([norms, norms])).present


def test_a_tail_that_is_heavier_than_the_body_is_absent():
    """Three patches in a hundred fall off slowly from where the others end: gaps in so thin a tail are chance."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        body = np.exp(0.05 * rng.standard_normal((16, 196)))
        tail = np.exp(0.05 + 0.25 * rng.standard_exponential((16, 196)))
        assert not evidence_of(np.where(rng.random((16, 196)) < 0.03, tail, body)).present, seed


def test_so_many_more_images_tell():
    told = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        norms = np.exp(0.25 * rng.standard_normal((400, 196)))
        norms[np.arange(400), rng.integers(0, 196, 400)] = 4
        found = evidence_of(norms[:2])
        if found.verdict == "too few images":
            told += 1
            assert 0 < found.more_images <= 6
            assert evidence_of(norms[: 2 + 4 * found.more_images]).present  # with a margin: the surprise is random
        else:
            assert found.more_images == 0
    assert told > 20


def test_an_empty_histogram_is_absent():
    assert judge(np.zeros(N_BINS, int), np.zeros(N_BINS, int), float("nan")).verdict == "absent"

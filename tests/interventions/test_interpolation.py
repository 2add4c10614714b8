"""Outliers overwritten by their neighbours: cell by cell, and in the embedded model."""

import numpy as np
import pytest
import torch
from edited_vits import build, pixels
from helpers import relative

import registerlens as rl
from registerlens.analysis.detection import Cutoff
from registerlens.config import TokenLayout
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ConfigError
from registerlens.interventions.interpolation import fill_from_neighbours


def naive_fill(patches, missing, height, width):
    """One cell at a time, in rounds: a missing cell becomes the mean of the neighbours that are there."""
    values = {(p // width, p % width): patches[p].double() for p in range(len(patches)) if not missing[p]}
    while len(values) < len(patches) and values:
        new = {}
        for r in range(height):
            for c in range(width):
                around = [
                    values[r + i, c + j]
                    for i in (-1, 0, 1)
                    for j in (-1, 0, 1)
                    if (i or j) and (r + i, c + j) in values
                ]
                if (r, c) not in values and around:
                    new[r, c] = sum(around) / len(around)
        values |= new
    if not values:
        return patches
    return torch.stack([values[p // width, p % width] for p in range(len(patches))]).to(patches)


@pytest.mark.parametrize("grid", [(5, 6), (1, 9), (7, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 0.97, 1.0])
def test_neighbours_fill_in(grid, share):
    height, width = grid
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(6, height * width, 3, generator=generator)
    missing = torch.rand(6, height * width, generator=generator) < share
    got = fill_from_neighbours(patches, missing, TokenLayout(grid=grid, n_prefix=1))
    for i in range(6):
        expected = naive_fill(patches[i], missing[i].tolist(), height, width)
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(got[i][~missing[i]], patches[i][~missing[i]])


@pytest.mark.parametrize(("place", "point"), [(1, "blocks.1.hook_resid_post"), ("2.attn", "blocks.2.hook_resid_mid")])
@pytest.mark.parametrize("relative_cut", [True, False])
def test_only_outlying_patches_change(place, point, relative_cut):
    vit, images = build("clip"), pixels(4, (40, 48))
    with torch.no_grad():
        before = vit.run_with_cache(images, names_filter=point)[1][point]
        norms = before[:, 3:].norm(dim=-1).numpy()
        cut = 1.1 if relative_cut else float(np.quantile(norms, 0.8))
        outlying = norms > (cut * np.median(norms, axis=1, keepdims=True) if relative_cut else cut)
        with vit.edit(rl.InterpolateOutliers(place, Cutoff(value=cut, relative=relative_cut))):
            after = vit.run_with_cache(images, names_filter=point)[1][point]
    assert 0.02 < outlying.mean() < 0.6
    assert torch.equal(after[:, :3], before[:, :3])
    for i in range(4):
        expected = naive_fill(before[i, 3:], outlying[i].tolist(), 5, 6)
        assert relative(after[i, 3:], expected) < 1e-5


def test_test_time_registers_are_no_neighbours():
    vit, images = build("plain"), pixels(2)
    register = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(1, 0)]), n=2)
    point = "blocks.2.hook_resid_post"
    with torch.no_grad(), vit.edit(register):
        before = vit.run_with_cache(images, names_filter=point)[1][point]
        with vit.edit(rl.InterpolateOutliers(2, Cutoff(value=1.05, relative=True))):
            after = vit.run_with_cache(images, names_filter=point)[1][point]
    assert torch.equal(after[:, 12:], before[:, 12:]) and relative(after[:, :12], before[:, :12]) > 0.01


def test_in_the_embedded_model_no_outlier_is_left():
    tiny, batch = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(64, 4)
    with tiny.edit(rl.InterpolateOutliers.at(rl.find_outliers(tiny, batch.images, layer=1).detection)):
        found = rl.find_outliers(tiny, batch.images, layer=1, threshold=100.0)
    assert found.verdict == "absent" and not found.mask.any()
    plain = rl.find_outliers(tiny, batch.images, layer=1, threshold=100.0)
    assert torch.equal(plain.mask, batch.roles == FLAT)
    torch.testing.assert_close(found.norms[~plain.mask], plain.norms[~plain.mask])


def test_where_outliers_are_absent_nothing_is_done():
    vit, images = build("clip"), pixels(8)
    detection = rl.find_outliers(vit, images).detection
    assert detection.evidence.verdict == "absent"
    with torch.no_grad():
        expected = vit(images)
        with vit.edit(rl.InterpolateOutliers.at(detection)):
            assert torch.equal(vit(images), expected)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_cutoff_is_above_zero(value):
    with pytest.raises(ConfigError, match="must be above 0"):
        rl.InterpolateOutliers(1, Cutoff(value=value, relative=True))

"""Pixels read from tokens: against scikit-learn's ridge regression, on content that is there and that is not."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import registerlens as rl
from registerlens.analysis.local_information import PENALTIES, LocalInformation, patch_pixels
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ImageError, NoOutliersError, ShapeError
from registerlens.model.sublayers import Sublayer

N = 288


@pytest.fixture(scope="module")
def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def images():
    return synthetic_images(N, 5).images


@pytest.fixture(scope="module")
def found(tiny, images):
    return rl.analysis.local_information(tiny, images, batch_size=64)


def test_it_is_ridge_regression_on_the_tokens(tiny, images):
    """Written again with all tokens in memory, and scikit-learn's solver.

    In float64: tokens are nearly singular, so that the last bits of float32, which differ with the size of a batch and
    the processor, come out a hundred times larger.
    """
    tiny, images = copy.deepcopy(tiny).double(), images.double()
    found = rl.analysis.local_information(tiny, images, batch_size=64)
    with torch.inference_mode():
        _, cache = tiny.run_with_cache(images)
    place = found.detection.sublayer
    mask = found.detection.cutoff.above(cache["resid_post", int(place[0])].norm(dim=-1))
    pixels = patch_pixels(images, (8, 8)).double()
    use = torch.arange(N)[:, None].expand(mask.shape) % 3
    for at, stream in (
        (0, "blocks.0.hook_resid_pre"),
        (3, "blocks.1.hook_resid_mid"),
        (12, "blocks.5.hook_resid_post"),
    ):
        tokens = torch.nn.functional.layer_norm(cache[stream].double(), (64,), eps=0)
        parts = [(tokens[mask & (use == k)].numpy(), pixels[mask & (use == k)].numpy()) for k in range(3)]
        (fit, fit_pixels), (choose, choose_pixels), (test, test_pixels) = parts
        unit = (fit**2).sum(0).mean()
        maps = [Ridge(alpha=penalty * unit, solver="svd").fit(fit, fit_pixels) for penalty in PENALTIES]
        errors = [((one.predict(choose) - choose_pixels) ** 2).sum() for one in maps]
        left = ((maps[int(np.argmin(errors))].predict(test) - test_pixels) ** 2).sum()
        alone = ((test_pixels - fit_pixels.mean(0)) ** 2).sum()
        assert found.readable[0, at] == pytest.approx(1 - left / alone, abs=1e-9)
        everywhere = torch.nn.functional.normalize(tokens[mask], dim=-1)
        cosines = everywhere @ everywhere.T
        n = len(everywhere)
        assert found.likeness[0, at] == pytest.approx(float((cosines.sum() - n) / (n * (n - 1))), abs=1e-9)
        assert found.n_tokens[0].tolist() == found.n_tokens[1].tolist() == [len(fit), len(choose), len(test)]


def test_batches_and_order_of_reading_change_nothing(tiny, images, found):
    again = rl.analysis.local_information(tiny, [images[:40], images[40:]], batch_size=7)
    assert again.likeness == pytest.approx(found.likeness, abs=1e-6)
    assert again.readable == pytest.approx(found.readable, abs=1e-5)


def test_normal_patches_are_not_drawn_as_the_images_were(tiny):
    """From the seed of the images, the same numbers would place roles and choose patches: always plain ones."""
    images = synthetic_images(N, 0).images  # both seeds are 0
    likeness = [rl.analysis.local_information(tiny, images, seed=seed).likeness[1] for seed in (0, 1)]
    assert likeness[0] == pytest.approx(likeness[1], abs=0.05)


def test_what_is_not_there_is_not_read(tiny, images, found):
    """Every token is that of another image: nothing of its own patch is left in it."""
    hook = ("blocks.0.hook_resid_pre", lambda resid, hook: resid.roll(1, 0))
    with tiny.hooks([hook]):
        lost = rl.analysis.local_information(tiny, images, detection=found.detection, batch_size=N)
    assert lost.readable.max() < 0.1 < 0.3 < found.readable[1].min()


def test_words_file_figure_and_refusals(tiny, images, found, tmp_path):
    assert "Outliers: R squared" in found.describe() and "after 1.mlp" in found.describe()
    assert len(found.to_dataframe()) == 13
    again = LocalInformation.load(found.save(tmp_path))
    assert np.array_equal(again.readable, found.readable) and again.describe() == found.describe()
    assert len(found.plot().data) == 4
    with pytest.raises(ImageError, match=r"each must have 128, 2 for each of 64 dimensions\. Give more images"):
        rl.analysis.local_information(tiny, images[:6], detection=found.detection)
    elsewhere = replace(found.detection, sublayer=Sublayer("7.mlp"))
    with pytest.raises(ShapeError, match="7"):
        rl.analysis.local_information(tiny, images[:6], detection=elsewhere)
    with pytest.raises(NoOutliersError):
        rl.analysis.local_information(rl.HookedViT(tiny.cfg).eval(), images)

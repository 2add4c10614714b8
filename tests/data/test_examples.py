import numpy as np
import pytest
import torch
from PIL import Image

import registerlens as rl
from registerlens.data import examples
from registerlens.data.examples import example_images, example_pictures
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ImageError, MissingExtraError


@pytest.fixture(scope="module")
def vit():
    cfg = rl.ViTConfig(n_layers=1, d_model=16, n_heads=1, d_mlp=16, image_size=(16, 24), patch_size=(8, 8))
    preprocess = rl.config.Preprocess(resize=(16, 24), fit="exact", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    return rl.HookedViT(cfg, preprocess)


@pytest.fixture
def photographs(tmp_path):
    """Two pictures: one red on the left and blue on the right, one plain green."""
    half = np.zeros((64, 96, 3), np.uint8)
    half[:, :48, 0], half[:, 48:, 2] = 255, 255
    green = np.zeros((64, 96, 3), np.uint8)
    green[..., 1] = 255
    files = [tmp_path / "half.png", tmp_path / "green.png"]
    for file, pixels in zip(files, (half, green), strict=True):
        Image.fromarray(pixels).save(file)
    return files


def test_the_embedded_model_gets_what_it_was_trained_on():
    tiny = rl.HookedViT.from_pretrained("registerlens:tiny")
    assert torch.equal(example_images(tiny, 5, seed=3), synthetic_images(5, 3).images)
    assert len(example_images(tiny)) == examples.SYNTHETIC


def test_views_take_turns_differ_by_seed_and_are_cut_out_of_the_photographs(vit, photographs):
    first, again, other = (example_images(vit, 40, seed=seed, photographs=photographs) for seed in (0, 0, 1))
    assert first.shape == (40, 3, 16, 24) and torch.equal(first, again) and not torch.equal(first, other)
    pictures = example_pictures(vit, first)
    assert (pictures[1::2, ..., 1] == 255).all() and (pictures[1::2, ..., 0] == 0).all()  # every second view is green
    halves = pictures[::2].astype(int)
    red_first = halves[:, 8, 0, 0] > halves[:, 8, -1, 0]
    assert 5 <= red_first.sum() <= 15  # mirrored in about half of the cases
    border = (halves[..., 0] > 128).sum(2)  # where red ends differs with the place of the cut
    assert len(np.unique(border[:, 8])) >= 4


def test_by_default_every_photograph_is_seen_four_times(vit, photographs):
    assert len(example_images(vit, photographs=photographs)) == 8


def test_pictures_undo_the_preprocessing_of_photographs_and_stretch_synthetic_images(vit, photographs):
    whole = rl.load_images(photographs, vit)
    assert (example_pictures(vit, whole)[1] == [0, 255, 0]).all()
    tiny = rl.HookedViT.from_pretrained("registerlens:tiny")
    batch = synthetic_images(64, 0)
    pictures = example_pictures(tiny, batch.images)
    assert pictures.dtype == np.uint8 and abs((pictures == 0).mean() - 0.01) < 0.003
    assert abs((pictures == 255).mean() - 0.01) < 0.003
    patches = pictures.reshape(64, 6, 8, 6, 8, 3).swapaxes(2, 3).reshape(64, 36, 64, 3)
    flat = batch.roles.numpy() == FLAT
    spread = patches.astype(float).std(2).mean(-1)  # of one colour, but for noise
    assert spread[flat].max() < spread[~flat].min()


def test_bad_input_is_told(vit, monkeypatch):
    with pytest.raises(ImageError, match="at least 1, got 0"):
        example_images(vit, 0)
    with pytest.raises(ImageError, match="no photographs in the list"):
        example_images(vit, 2, photographs=[])
    monkeypatch.setattr(examples, "shipped_photographs", list)
    with pytest.raises(MissingExtraError, match=r"registerlens\[demo\]"):
        example_images(vit, 2)

"""What one pass shows: whose attention is meant."""

import pytest
import torch

import registerlens as rl
from registerlens.evaluation.observe import observe
from tests.helpers import randomise, relative


@pytest.mark.parametrize("attention", ["softmax", "sigmoid"])
def test_attention_is_that_of_cls_or_the_mean_over_all_queries(attention):
    torch.manual_seed(0)
    size = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_mlp": 40, "image_size": (24, 32), "patch_size": (8, 8)}
    vit, images = randomise(rl.HookedViT(rl.ViTConfig(**size, attention=attention))), torch.randn(3, 3, 24, 32)
    with torch.no_grad():
        _, cache = vit.run_with_cache(images)
        pattern = torch.stack([cache["pattern", layer] for layer in range(2)])
        pattern = (pattern / pattern.sum(-1, keepdim=True)).mean(2)  # of the heads; rows of sigmoids have any sum
        assert relative(observe(vit, images).attention, pattern[:, :, 0]) < 1e-5
        assert relative(observe(vit, images, "all").attention, pattern.mean(2)) < 1e-5
        assert observe(vit, images, "all").layout.cls == 0  # which token is which does not change

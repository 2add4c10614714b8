"""What is recorded and computed from it equals what `run_with_cache` gives, under every condition."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import randomise

import registerlens as rl
from registerlens.config import ViTConfig
from registerlens.config_parts import QKNormConfig, RopeConfig
from registerlens.explorer.attention import RecordedAttention
from registerlens.explorer.recording import STRONGEST, record
from registerlens.explorer.widget import token_view
from registerlens.interventions.base import Edit, Intervention


@dataclass(frozen=True)
class Sharpen(Intervention):
    """An edit of the scores themselves, which queries and keys do not tell."""

    def edits(self, host, first_register):
        return [Edit("blocks.1.attn.hook_attn_scores", lambda scores, scene: scores * 3)]


@pytest.fixture(scope="module")
def other():
    """[CLS], registers, several heads, rotary positions and normed queries and keys; every weight random."""
    cfg = ViTConfig(
        n_layers=3,
        d_model=24,
        n_heads=3,
        d_mlp=20,
        image_size=(12, 16),
        patch_size=(4, 4),
        n_trained_registers=2,
        rope=RopeConfig(),
        qk_norm=QKNormConfig(),
        layer_scale=True,
    )
    return randomise(rl.HookedViT(cfg))


def cached(vit, image, edits=()):
    with torch.no_grad(), vit.edit(*edits):
        return vit.run_with_cache(image, names_filter=["blocks.*"])[1]


def check_patterns_and_norms(vit, image, edits):
    found, cache = record(vit, image, edits), cached(vit, image, edits)
    for layer in range(vit.cfg.n_layers):
        expected = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        assert torch.allclose(found.pattern(layer), expected, atol=1e-6), layer
        assert torch.allclose(found.head(layer, 0), expected[0], atol=1e-6)
        for i, place in ((1, "mid"), (2, "post")):
            norms = cache[f"blocks.{layer}.hook_resid_{place}"][0].norm(dim=-1)
            assert torch.allclose(found.norms[2 * layer + i], norms, rtol=1e-5)
    assert torch.allclose(found.norms[0], cache["blocks.0.hook_resid_pre"][0].norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("condition", ["clean", "zeroed", "test-time register", "attention bias"])
def test_patterns_and_norms_are_the_models_own(explorer, vit, images, condition):
    check_patterns_and_norms(vit, images[:1], explorer.conditions[condition])


@pytest.mark.parametrize("edits", [(), (Sharpen(),)], ids=["as it is", "edited scores"])
def test_another_architecture(other, edits):
    image = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    check_patterns_and_norms(other, image, edits)
    assert set(record(other, image, edits).patterns) == ({1} if edits else set())


def test_the_strongest_neurons_are_those_that_write_most(other):
    image = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    found, cache = record(other, image, chosen=[(2, 7), (0, 1)]), cached(other, image)
    post = torch.stack([cache[f"blocks.{layer}.mlp.hook_post"][0] for layer in range(3)])  # layer pos neuron
    writes = torch.stack([block.mlp.W_out.detach() for block in other.blocks]).norm(dim=-1)
    for pos in range(post.shape[1]):
        written = {
            (layer, n): abs(post[layer, pos, n].item()) * writes[layer, n].item()
            for layer in range(3)
            for n in range(20)
        }
        best = sorted(written, key=written.get, reverse=True)[:STRONGEST]
        assert [tuple(pair) for pair in found.strongest[pos].tolist()] == best
        assert found.strongest_written[pos].tolist() == pytest.approx([written[pair] for pair in best], rel=1e-5)
        signed = [post[layer, pos, n].item() for layer, n in best]
        assert found.strongest_activation[pos].tolist() == pytest.approx(signed, rel=1e-5)
    assert torch.allclose(found.chosen_activation, torch.stack([post[2, :, 7], post[0, :, 1]], 1), atol=1e-6)


def rollout_by_hand(patterns, layer):
    """The product of whole matrices in float64, the keys of an attention bias as tokens that keep what they get."""
    n_tokens, n_keys = patterns[0].shape[1:]
    product = np.eye(n_keys)
    for pattern in patterns[: layer + 1]:
        step = np.eye(n_keys)
        step[:n_tokens] = 0.5 * pattern.double().mean(0).numpy() + 0.5 * np.eye(n_keys)[:n_tokens]
        product = step @ product
    return product[:n_tokens]


@pytest.mark.parametrize("condition", ["clean", "test-time register", "attention bias"])
def test_rollout_is_the_product_of_mixed_patterns(explorer, vit, images, condition):
    cache = cached(vit, images[:1], explorer.conditions[condition])
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"][0] for layer in range(6)]
    attention = explorer.attention(0, condition)
    for layer in (0, 4):
        expected = rollout_by_hand(patterns, layer)
        assert np.allclose(attention.whole(layer, "rollout").numpy(), expected, atol=1e-6)
        assert np.allclose(attention.of(9, "query", layer, "rollout").numpy(), expected[9], atol=1e-6)
        last = expected.shape[1] - 1
        assert np.allclose(attention.of(last, "key", layer, "rollout").numpy(), expected[:, last], atol=1e-6)
        assert np.allclose(attention.reference(layer, "rollout").numpy(), expected.mean(0), atol=1e-6)
        assert expected.sum(1) == pytest.approx(1)


def test_rows_columns_means_and_the_cls_map(other):
    image = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    attention, cache = RecordedAttention(record(other, image)), cached(other, image)
    pattern = cache["blocks.1.attn.hook_pattern"][0]
    assert torch.allclose(attention.of(5, "query", 1, 2), pattern[2, 5], atol=1e-6)
    assert torch.allclose(attention.of(5, "key", 1, 2), pattern[2, :, 5], atol=1e-6)
    assert torch.allclose(attention.of(5, "query", 1, "mean"), pattern.mean(0)[5], atol=1e-6)
    assert torch.allclose(attention.reference(1, 0), pattern[0, 0], atol=1e-6)
    about = token_view(attention, 5, "key", 1, 2)
    patches = cache["blocks.2.hook_resid_post"][0, other.layout(image).patches].norm(dim=-1)
    assert about.medians[-1].item() == pytest.approx(patches.quantile(0.5).item(), rel=1e-5)
    assert torch.equal(about.medians, attention.recording.patch_medians)


def test_without_cls_the_average_query_stands_in(explorer, vit, images):
    pattern = cached(vit, images[:1])["blocks.2.attn.hook_pattern"][0]
    assert torch.allclose(explorer.attention(0, "clean").reference(2, "mean"), pattern.mean((0, 1)), atol=1e-6)


def test_the_key_of_a_bias_has_no_norm_and_no_neurons(explorer):
    about = token_view(explorer.attention(0, "attention bias"), 36, "key", 3, "mean")
    assert about.attention.shape == (36,) and not len(about.norms) and not about.strongest and not len(about.chosen)


def test_recordings_are_made_once_and_the_oldest_goes(vit, images, monkeypatch):
    from registerlens.explorer import explorer as module

    monkeypatch.setattr(module, "KEPT", 1)
    found = module.explore(vit, images)
    first = found.attention(0, "clean")
    assert found.attention(0, "clean") is first
    found.attention(1, "clean")
    assert found.attention(0, "clean") is not first

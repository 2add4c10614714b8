"""Received attention against the whole pattern, naively, and without ever holding it."""

import pytest
import torch
from helpers import randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import registerlens as rl
from registerlens.config import TokenLayout
from registerlens.config_parts import QKNormConfig, RopeConfig
from registerlens.engine import attention_received
from registerlens.engine.attention_received import attention_hooks, received_attention


def naive(q, k, layout):
    """The full pattern in float64; [CLS]'s row of it, or the mean over queries."""
    q, k = q.double(), k.double()
    rows = []
    for image in range(q.shape[0]):
        heads = []
        for head in range(q.shape[2]):
            pattern = (q[image, :, head] @ k[image, :, head].T / q.shape[-1] ** 0.5).softmax(-1)
            heads.append(pattern[layout.cls] if layout.cls is not None else pattern.mean(0))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def random_qk(batch, n, heads, width, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, batch, n, heads, width, generator=generator)).unbind(0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8), st.booleans())
def test_equals_the_whole_pattern(batch, height, width, heads, d_head, class_token):
    layout = TokenLayout(grid=(height, width), n_prefix=int(class_token), class_token=class_token)
    q, k = random_qk(batch, layout.n_tokens, heads, d_head)
    got = received_attention(q, k, layout)
    assert got.shape == (batch, heads, layout.n_tokens)
    assert torch.allclose(got.double(), naive(q, k, layout), atol=1e-6)
    assert torch.allclose(got.sum(-1), torch.ones(batch, heads), atol=1e-5)


def test_only_the_class_query_counts_where_there_is_one():
    layout = TokenLayout(grid=(3, 3), n_prefix=2, n_trained_registers=2)
    q, k = random_qk(2, layout.n_tokens, 2, 4)
    expected = received_attention(q, k, layout)
    q = q.clone()
    q[:, 1:] = float("nan")
    assert torch.equal(received_attention(q, k, layout), expected)


@pytest.mark.parametrize("limit", [1, 7 * 2 * 50, 10**9])
def test_pieces_of_any_size_give_the_same_mean(monkeypatch, limit):
    layout = TokenLayout(grid=(5, 10), n_prefix=0, class_token=False)
    q, k = random_qk(3, 50, 2, 4)
    monkeypatch.setattr(attention_received, "_SCORES_AT_ONCE", limit)
    assert torch.allclose(received_attention(q, k, layout).double(), naive(q, k, layout), atol=1e-6)


@pytest.mark.parametrize("class_token", [True, False])
def test_the_whole_pattern_is_never_held(monkeypatch, class_token):
    layout = TokenLayout(grid=(40, 40), n_prefix=int(class_token), class_token=class_token)
    n = layout.n_tokens
    q, k = random_qk(2, n, 2, 4)
    sizes = []
    softmax = torch.Tensor.softmax

    def recording(self, *args, **kwargs):
        sizes.append(self.numel())
        return softmax(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", recording)
    got = received_attention(q, k, layout)
    monkeypatch.undo()
    assert torch.allclose(got.double(), naive(q, k, layout), atol=1e-6)
    if class_token:
        assert sizes == [2 * 2 * n]
    else:
        assert sum(sizes) == 2 * 2 * n * n  # every score once,
        assert max(sizes) <= attention_received._SCORES_AT_ONCE < 2 * 2 * n * n / 8  # few at a time


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("class_token", [True, False])
def test_half_precision_is_summed_in_float32(dtype, class_token):
    layout = TokenLayout(grid=(30, 30), n_prefix=int(class_token), class_token=class_token)
    q, k = (x.to(dtype) for x in random_qk(1, layout.n_tokens, 1, 8, scale=0.3))
    got = received_attention(q, k, layout)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), naive(q, k, layout), rtol=0.03, atol=1e-6)
    assert got.sum().item() == pytest.approx(1, abs=1e-4)


def test_batches_are_independent():
    for class_token in (True, False):
        layout = TokenLayout(grid=(4, 4), n_prefix=int(class_token), class_token=class_token)
        q, k = random_qk(3, layout.n_tokens, 2, 4)
        singles = torch.cat([received_attention(q[i : i + 1], k[i : i + 1], layout) for i in range(3)])
        assert torch.allclose(received_attention(q, k, layout), singles, atol=1e-6)


@pytest.mark.parametrize("rope", [None, RopeConfig()])
@pytest.mark.parametrize("qk_norm", [None, QKNormConfig()])
@pytest.mark.parametrize("class_token", [True, False])
def test_hooks_see_queries_and_keys_normalised_and_turned_as_the_scores_do(rope, qk_norm, class_token):
    size = {"n_layers": 2, "d_model": 24, "n_heads": 3, "d_mlp": 20, "image_size": (24, 32), "patch_size": (8, 8)}
    options = {"class_token": class_token, "pooling": (), "rope": rope, "qk_norm": qk_norm}
    vit = randomise(rl.HookedViT(rl.ViTConfig(**size, **options)))
    images, seen = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)), {}
    with (
        torch.no_grad(),
        vit.hooks(attention_hooks(vit, vit.layout(images), [0, 1], seen.__setitem__)),
    ):
        vit(images)
    with torch.no_grad():
        _, cache = vit.run_with_cache(images, names_filter="blocks.*.attn.hook_pattern")
    for layer, drawn in seen.items():
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        expected = pattern[:, :, 0] if class_token else pattern.mean(2)
        assert torch.allclose(drawn, expected, atol=1e-5)
    strongest = torch.stack([pattern.mean(2).amax(-1).mean(0) for pattern in cache.values()])
    assert torch.allclose(
        torch.from_numpy(rl.analysis.classify_sinks(vit, images).received).float(), strongest, atol=1e-5
    )

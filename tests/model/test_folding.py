"""Folding norms into the weights that read them: the same function, and weights that tell the truth."""

import pytest
import torch
from helpers import relative
from small_vits import CONFIGS, build, images

from registerlens.config_parts import AttentionPoolConfig
from registerlens.model.norms import Norm

VARIANTS = [(name, {}) for name in CONFIGS]
VARIANTS += [("full", {"pooling": pooling}) for pooling in (("cls",), ("cls", "mean"), ("cls", "distillation"))]
VARIANTS += [("full", {"pooling": ("mean",), "pool_norm": True, "head_bias": False, "head_act": None})]
VARIANTS += [("full", {"pooling": ("cls",), "d_out": None, "head_act": None})]
COCA = AttentionPoolConfig(n_heads=2, d_attn=16, norm_inputs=True, qkv_bias=False, over="all")
VARIANTS += [("full", {"pooling": ("attention",), "attn_pool": COCA, "final_norm": False})]
VARIANTS += [("attention-pooled", {"norm": "rms"})]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_a_folded_model_computes_the_same(name, changes):
    vit = build(name, **changes)
    before = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    folded = vit.fold_layer_norm()
    for size in (vit.cfg.image_size, (40, 24)):
        x = images(vit, size=size)
        with torch.no_grad():
            assert relative(folded(x), vit(x)) <= 1e-5
            for layer in range(vit.cfg.n_layers):
                assert relative(folded(x, stop_at_layer=layer), vit(x, stop_at_layer=layer)) <= 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in vit.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_weights_read_the_stream_directly(name):
    """Queries are W_Q^T times the normalised stream x / scale: no weight of the norm, and no mean, comes in between."""
    vit = build(name)
    folded = vit.fold_layer_norm()
    x = images(vit)
    with torch.no_grad():
        _, cache = vit.run_with_cache(x)
    for layer, block in enumerate(folded.blocks):
        stream, scale = cache[f"blocks.{layer}.hook_resid_pre"], cache[f"blocks.{layer}.ln1.hook_scale"]
        queries = torch.einsum("bpd,hde->bphe", stream / scale, block.attn.W_Q) + block.attn.b_Q
        assert relative(queries, cache[f"blocks.{layer}.attn.hook_q"]) <= 1e-5
        stream, scale = cache[f"blocks.{layer}.hook_resid_mid"], cache[f"blocks.{layer}.ln2.hook_scale"]
        pre = stream / scale @ block.mlp.W_in + block.mlp.b_in
        assert relative(pre, cache[f"blocks.{layer}.mlp.{block.mlp.points[-1]}"]) <= 1e-5


def test_the_norms_left_are_those_that_are_added_to_the_stream_or_act_on_queries_and_keys():
    kept = {"full": {"ln_pre"}, "rotary": {"ln_pre"}, "plain": {"ln_final"}, "attention-pooled": {"embed.norm"}}
    for name, expected in kept.items():
        folded = build(name).fold_layer_norm()
        norms = {key: part for key, part in folded.named_modules() if isinstance(part, Norm)}
        assert {key for key, norm in norms.items() if not (norm.w == 1).all() and "_norm" not in key} == expected


def test_class_directions_are_the_heads_rows_after_folding():
    vit = build("full", pooling=("cls",))
    directions = vit.tokens_to_residual_directions(torch.arange(5))
    centred = directions - directions.mean(-1, keepdim=True)
    assert relative(vit.fold_layer_norm().head.linear.weight, centred) <= 1e-6

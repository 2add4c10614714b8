"""timm's VisionTransformer and Eva beyond parity: what is refused and why, the registry, and several ways to store."""

import random
from functools import partial

import pytest
import timm
import torch
from families import RMS, SQUARE, TIMM, TINY, eva, timmed
from helpers import randomise, relative
from safetensors.torch import save_file
from timm.layers import GluMlp, SimpleNorm
from timm.models import vision_transformer as timm_vit
from timm_registry import names, outcome
from torch import nn

from registerlens import HookedViT
from registerlens.errors import UnsupportedArchitectureError, WeightsError
from registerlens.loading.keymap import export
from registerlens.loading.registry import FAMILIES


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", **TINY | {"depth": 2, "img_size": 32} | options)


def rope(name="vit_small_patch16_rope_224", **options):
    return timm.create_model(name, **TINY | {"depth": 2, "img_size": 32} | options)


def several_queries():
    module = vit(global_pool="map")
    module.attn_pool = timm.layers.AttentionPoolLatent(32, num_heads=4, latent_len=2)
    return module


def gated():
    module = vit()
    module.blocks[0].attn.gate = nn.Linear(32, 32)
    return module


def other_epsilon():
    module = vit()
    module.norm.eps = 1e-4
    return module


REFUSED = {
    "convolutional stem": (
        lambda: timm.create_model("vit_base_r50_s16_224", embed_dim=32, depth=1, num_heads=2, img_size=32),
        "convolutional stem",
    ),
    "parallel": (lambda: vit(block_fn=timm_vit.ParallelScalingBlock), "attention and MLP in parallel"),
    "parallel, differential": (lambda: vit(block_fn=timm_vit.DiffParallelScalingBlock), "in parallel"),
    "parallel things": (lambda: vit(block_fn=timm_vit.ParallelThingsBlock), "several attentions and MLPs in parallel"),
    "res-post-norm": (lambda: vit(block_fn=timm_vit.ResPostBlock), "post-norm"),
    "post-norm": (lambda: rope(use_post_norm=True), "post-norm"),
    "differential": (lambda: vit(attn_layer="diff"), "differential attention"),
    "gated attention": (gated, "gated attention"),
    "gate last": (lambda: vit(mlp_layer=GluMlp), "gate comes last"),
    "grouped keys": (
        lambda: rope(num_kv_heads=2, qkv_fused=False),
        r"fewer keys and values than queries \(grouped-query attention\)",
    ),
    "SimpleNorm": (lambda: vit(norm_layer=SimpleNorm), "other than LayerNorm and RMSNorm"),
    "norm without weight": (
        lambda: vit(norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
        "other than LayerNorm and RMSNorm with weights",
    ),
    "two norms": (lambda: vit(embed_norm_layer=RMS), "norms of several kinds"),
    "two epsilons": (other_epsilon, "norms of several kinds or epsilons"),
    "several queries": (several_queries, "several queries"),
    "maximum": (lambda: vit(global_pool="max"), "global_pool='max'"),
    "average and maximum": (lambda: rope(global_pool="avgmax"), "global_pool='avgmax'"),
    "refined patches": (lambda: vit(global_pool="prr"), "global_pool='prr'"),
    "padding": (lambda: vit(dynamic_img_size=True, dynamic_img_pad=True), "dynamic_img_pad"),
    "several modalities": (
        lambda: rope(rope_type="mrope", rope_mrope_section=(2, 1, 1), rope_grid_indexing="ij"),
        "several modalities",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        HookedViT.from_module(make())


FIXED = {
    "vit_tiny_patch16_224": "",
    "deit3_small_patch16_224": "",
    "vit_so150m_patch16_reg4_map_256": "",
    "vit_small_patch16_dinov3_qkvb": "",
    "vit_pe_core_tiny_patch16_384": "",
    "eva02_tiny_patch14_336": "",
    "eva02_enormous_patch14_clip_224": "post-norm",
    "vit_base_patch16_18x2_224": "several attentions",
    "vit_dwee_patch16_reg1_gap_256": "differential",
    "vit_base_patch16_sapiens2": "",
    "vit_large_patch16_sapiens2": "grouped-query",
}


@pytest.mark.parametrize("name", [*FIXED, *random.Random(0).sample(names(), 16)])
def test_registered_models_find_a_place_for_every_weight_or_are_refused_with_a_reason(name):
    reason = outcome(name)
    assert name not in FIXED or (FIXED[name] in reason and bool(FIXED[name]) == bool(reason))
    assert not reason or "not supported" in reason


# Several ways to store a weight --------------------------------------------------------------------------------------


def state_of(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", [name for name in TIMM if "distilled" not in name])
def test_the_names_a_model_was_read_from_are_written_back_also_by_way_of_disk(name, zero, tmp_path):
    case = TIMM[name]
    module = randomise(case.make(case.native))
    if zero and case.source_class == "VisionTransformer":  # a bias that is zero is a bias all the same
        for key, parameter in module.named_parameters():
            parameter.data *= not key.endswith("bias")
    state, family = module.state_dict(), FAMILIES["timm", case.source_class]
    again = HookedViT.from_pretrained(HookedViT.from_module(module).save_pretrained(tmp_path))
    written = export(family, again)
    assert set(written) == set(state)
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())


def test_a_model_from_elsewhere_is_written_in_the_first_way():
    source = HookedViT.from_module(randomise(timmed(mlp_layer=timm.layers.SwiGLU).make(SQUARE)))
    vit = HookedViT(source.cfg)
    vit.load_state_dict(source.state_dict())
    written = export(FAMILIES["timm", "VisionTransformer"], vit)
    packed = timmed(mlp_layer=partial(timm.layers.SwiGLUPacked, hidden_features=256)).make(SQUARE)
    assert not any("fc1_g" in key for key in written)
    mlp = source.blocks[0].mlp
    assert torch.equal(written["blocks.0.mlp.fc1.weight"], torch.cat([mlp.gate.weight, mlp.up.weight]))
    assert torch.equal(written["blocks.0.mlp.fc1.bias"], torch.cat([mlp.gate.bias, mlp.up.bias]))
    assert {key for key in packed.state_dict() if "blocks" in key} == {key for key in written if "blocks" in key}


def test_a_bias_that_the_source_has_no_name_for_is_not_lost_in_silence():
    vit = HookedViT.from_module(randomise(timmed(proj_bias=False).make(SQUARE)))
    vit.blocks[1].attn.out.bias.data += 1
    with pytest.raises(WeightsError, match="does not have has been changed"):
        export(FAMILIES["timm", "VisionTransformer"], vit)


@pytest.mark.parametrize(
    "key", ["blocks.1.mlp.fc1.bias", "blocks.1.attn.proj.bias", "blocks.0.attn.qkv.weight", "cls_token", "head.bias"]
)
def test_a_file_that_lacks_a_weight_the_model_has_is_refused(key, tmp_path):
    options = TINY | {"depth": 2, "img_size": 32}
    del options["norm_layer"]
    state = state_of(timm.create_model("vit_tiny_patch16_224", **options))
    del state[key]
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError, match=f"missing: '{key}'"):
        HookedViT.from_pretrained("timm:vit_tiny_patch16_224", weights=tmp_path / "vit.safetensors", **options)


def test_three_maps_of_which_one_is_missing_are_named(tmp_path):
    options = TINY | {"depth": 2, "img_size": 32}
    del options["norm_layer"]
    state = state_of(timm.create_model("eva02_base_patch14_224", **options))
    del state["blocks.1.attn.k_proj.weight"]
    save_file(state, tmp_path / "eva.safetensors")
    with pytest.raises(WeightsError, match=r"missing: 'blocks\.1\.attn\.k_proj\.weight'"):
        HookedViT.from_pretrained("timm:eva02_base_patch14_224", weights=tmp_path / "eva.safetensors", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_missing_biases_take_the_number_type_of_the_weights(dtype):
    vit = HookedViT.from_module(randomise(eva("eva02_tiny_patch14_224").make(SQUARE)).to(dtype))
    assert {parameter.dtype for parameter in vit.parameters()} == {dtype}


# Rotary positions ----------------------------------------------------------------------------------------------------


def test_a_model_without_dynamic_size_turns_as_its_cached_angles():
    module = randomise(rope("vit_small_patch16_dinov3", dynamic_img_size=False))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative(HookedViT.from_module(module)(images), module(images)) <= 1e-5


def test_rows_and_columns_are_not_exchanged():
    """A picture and its transpose are different pictures for learned frequencies that differ between the axes."""
    module = randomise(eva("vit_small_patch16_rope_mixed_224").make(SQUARE))
    vit = HookedViT.from_module(module)
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        wrong = HookedViT.from_module(module)
        wrong.rotary.frequencies.data = wrong.rotary.frequencies.flip(2)
        assert relative(vit(images), module(images)) <= 1e-5 < relative(wrong(images), module(images))

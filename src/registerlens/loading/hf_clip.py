"""Towers of transformers' models of images and texts: CLIP and what is built like it, SigLIP and SigLIP 2, AIMv2."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING, Any

from einops import rearrange

from registerlens.config import ViTConfig
from registerlens.config_parts import AttentionPoolConfig
from registerlens.errors import InterventionError
from registerlens.loading.family import (
    CLIP,
    HALF,
    Family,
    Refusal,
    Sites,
    SourceModel,
    activation,
    fixed,
    read,
    rows_of,
)
from registerlens.loading.hf_rules import COMMON, FC, block, square, with_classifier
from registerlens.loading.weights import bias, concat, linear, norm, part, patch_rows, positions, rows, take, tokens

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
"""Names of query, key, value and output maps in the families around CLIP and SigLIP."""
_NORMS = ("layer_norm1", "layer_norm2")
_TEXT_SIDE = ("text_model.*", "text_projection.*", "logit_scale")
"""What a model of images and texts has beside its tower."""

_TOWER = {
    "embed.W_pos": positions("embeddings.position_embedding.weight", flat=True),
    **norm("ln_final", "post_layernorm"),
    **block("encoder.layers.{i}", _NORMS, _ATTENTION, FC),
}
"""What CLIP and SigLIP call the same."""
_CLIP = Family(
    library="transformers",
    source_class="CLIPVisionModel",
    example="openai/clip-vit-large-patch14",
    prefixes=("vision_model.",),
    config=COMMON | {"patch_bias": fixed(False), "ln_pre": fixed(True)},
    weights=_TOWER
    | {
        "embed.patch.weight": take("embeddings.patch_embedding.weight"),
        "embed.prefix": tokens("embeddings.class_embedding", flat=True),
        **norm("ln_pre", "pre_layrnorm"),
    },
    sites=Sites(
        images="embeddings",
        ln_pre="pre_layrnorm",
        blocks="encoder.layers",
        norm="layer_norm1",
        attention="self_attn",
        mlp_out="mlp.fc2",
    ),
    ignore=("embeddings.position_ids",),
    preprocess=square(224, crop=(224, 224), **CLIP),
    note="the normalised [CLS]",
)
_CLIP_PROJECTED = replace(
    _CLIP,
    source_class="CLIPVisionModelWithProjection",
    config=_CLIP.config | {"d_out": rows_of("visual_projection.weight"), "head_bias": fixed(False)},
    weights=_CLIP.weights | {"head.linear.weight": take("visual_projection.weight")},
    written_prefix="vision_model.",
    unprefixed=("visual_projection.*",),
    note="",
)
_CLIP_WHOLE = replace(
    _CLIP_PROJECTED,
    source_class="CLIPModel",
    example="openai/clip-vit-base-patch16",
    described_at="vision_config",
    ignore=(*_CLIP.ignore, *_TEXT_SIDE),
    note="the vision tower with its projection",
)
_CLIP_CLASSIFIER = with_classifier(
    _CLIP,
    "CLIPForImageClassification",
    {"final_norm": fixed(False), "pooling": fixed(("mean",))},
    example="openai/clip-vit-base-patch32",
    described_at="vision_config",
    ignore=("post_layernorm.*",),
    note="logits from the mean over patches, which no norm precedes",
)

# MetaCLIP 2 and CLIPSeg: the same modules under other names ----------------------------------------------------------

_META = "facebook/metaclip-2-worldwide-huge-quickgelu"
_METACLIP = tuple(
    replace(family, source_class=family.source_class.replace("CLIP", "MetaClip2"), example=_META)
    for family in (_CLIP, _CLIP_PROJECTED, _CLIP_WHOLE, _CLIP_CLASSIFIER)
)
_SEG = "CIDAS/clipseg-rd64-refined"
_CLIPSEG = (
    replace(_CLIP, source_class="CLIPSegVisionModel", example=_SEG),
    replace(_CLIP_WHOLE, source_class="CLIPSegModel", example=_SEG),
    replace(
        _CLIP,
        source_class="CLIPSegForImageSegmentation",
        example=_SEG,
        prefixes=("clip.", "vision_model."),
        described_at="vision_config",
        ignore=(*_CLIP.ignore, *_TEXT_SIDE, "visual_projection.*", "decoder.*"),
        written_prefix="clip.vision_model.",
        note="the vision tower, whose normalised [CLS] comes out",
    ),
)

# SigLIP: no [CLS], a learned query that pools -------------------------------------------------------------------------


def _siglip_pool(source: SourceModel) -> AttentionPoolConfig | None:
    if not source.get("vision_use_head", True):
        return None
    return AttentionPoolConfig(
        n_heads=source.get("num_attention_heads"),
        d_attn=source.get("hidden_size"),
        d_mlp=source.get("intermediate_size"),
        act_fn=activation("hidden_act")(source),
    )


_POOL_WEIGHTS = (
    {"head.attn.queries": rows("head.probe")}
    | {f"head.attn.q.{kind}": part(f"head.attention.in_proj_{kind}", 0, 3) for kind in ("weight", "bias")}
    | {f"head.attn.kv.{kind}": part(f"head.attention.in_proj_{kind}", 1, 3, count=2) for kind in ("weight", "bias")}
    | linear("head.attn.out", "head.attention.out_proj")
    | norm("head.attn.mlp.ln", "head.layernorm")
    | linear("head.attn.mlp.up", "head.mlp.fc1")
    | linear("head.attn.mlp.out", "head.mlp.fc2")
)
_POOLED = "the pooling head's output if the model has one, else the mean over normalised patches"
_SIGLIP = replace(
    _CLIP,
    source_class="SiglipVisionModel",
    example="google/siglip-base-patch16-224",
    config=COMMON
    | {
        "class_token": fixed(False),
        "attn_pool": _siglip_pool,
        "pooling": lambda source: ("attention",) if source.get("vision_use_head", True) else ("mean",),
    },
    weights=_TOWER | {"embed.prefix": tokens()} | linear("embed.patch", "embeddings.patch_embedding") | _POOL_WEIGHTS,
    sites=replace(_CLIP.sites, ln_pre=None),
    preprocess=square(224, fit="exact", interpolation="bicubic", **HALF),
    note=_POOLED,
)
_SIGLIP_WHOLE = replace(
    _SIGLIP,
    source_class="SiglipModel",
    described_at="vision_config",
    ignore=(*_SIGLIP.ignore, *_TEXT_SIDE, "logit_bias"),
    written_prefix="vision_model.",
    note="the vision tower with its pooling head",
)
_SIGLIP_CLASSIFIER = with_classifier(
    _SIGLIP,
    "SiglipForImageClassification",
    {"attn_pool": fixed(None), "pooling": fixed(("mean",))},
    described_at="vision_config",
    ignore=("head.*",),
    note="logits from the mean over patches",
)

# SigLIP 2 (naflex): the images come as patches -----------------------------------------------------------------------


def _native(source: SourceModel) -> tuple[int, int]:
    side = isqrt(source.get("num_patches")) * source.get("patch_size")
    return side, side


def _from_patches(cfg: ViTConfig, pixel_values: Tensor, spatial_shapes: Tensor, **options: Any) -> Tensor:
    """Images from patches [batch, patch, (row column channel)] of grids that are all the same and fill the sequence.

    Raises:
        InterventionError: they are not, or are padded.
    """
    grids = {tuple(grid) for grid in spatial_shapes.tolist()}
    h, w = next(iter(grids))
    if len(grids) != 1 or h * w != pixel_values.shape[1]:
        raise InterventionError(
            f"Edits need images of one size without padding; these have the grids {sorted(grids)} in "
            f"{pixel_values.shape[1]} places. Call the model once per size, with max_num_patches = rows * columns."
        )
    y, x = cfg.patch_size
    return rearrange(pixel_values, "b (h w) (y x c) -> b c (h y) (w x)", h=h, w=w, y=y, x=x)


def _naflex(family: Family, name: str) -> Family:
    """The same for SigLIP 2's class."""
    return replace(
        family,
        source_class=name,
        example="google/siglip2-base-patch16-naflex",
        config=family.config | {"image_size": _native, "pos_interpolation": fixed("bilinear_antialias")},
        weights=family.weights | {"embed.patch.weight": patch_rows("embeddings.patch_embedding.weight")},
        sites=replace(family.sites, read_images=_from_patches),
        preprocess=square(256, fit="exact", interpolation="bilinear", **HALF),
        note=f"{family.note}; images of any size, padding left out",
    )


_SIGLIP2 = (
    _naflex(_SIGLIP, "Siglip2VisionModel"),
    _naflex(_SIGLIP_WHOLE, "Siglip2Model"),
    _naflex(_SIGLIP_CLASSIFIER, "Siglip2ForImageClassification"),
)

# AIMv2 ---------------------------------------------------------------------------------------------------------------


def _aimv2_pool(source: SourceModel) -> AttentionPoolConfig | None:
    if not source.get("use_head"):
        return None
    return AttentionPoolConfig(
        n_heads=source.get("num_attention_heads"),
        d_attn=source.get("hidden_size"),
        project_query=False,
        qkv_bias=source.get("qkv_bias"),
    )


_AT = "encoder.layers.{i}"
_AIMV2 = replace(
    _CLIP,
    source_class="Aimv2VisionModel",
    example="apple/aimv2-large-patch14-224",
    config=COMMON
    | {
        "norm": fixed("rms"),
        "norm_eps": read("rms_norm_eps"),
        "patch_norm": fixed(True),
        "gated_mlp": fixed(True),
        "class_token": fixed(False),
        "qkv_bias": read("qkv_bias"),
        "positions": lambda source: "sincos" if source.get("is_native") else "learned",
        "attn_pool": _aimv2_pool,
        "pooling": lambda source: ("attention",) if source.get("use_head") else ("mean",),
    },
    weights={
        **linear("embed.patch", "embeddings.patch_embed"),
        **norm("embed.norm", "embeddings.rms_norm"),
        "embed.prefix": tokens(),
        "embed.W_pos": positions("embeddings.position_embedding.weight", flat=True),
        **norm("ln_final", "rms_norm"),
        "head.attn.queries": rows("head.cls_token"),
        "head.attn.kv.weight": concat("head.k_proj.weight", "head.v_proj.weight"),
        "head.attn.kv.bias": concat("head.k_proj.bias", "head.v_proj.bias"),
        **linear("head.attn.out", "head.output_proj"),
    }
    | block(
        _AT,
        ("rms_norm1", "rms_norm2"),
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"),
        ("ffn.up_proj", "ffn.down_proj"),
        {"mlp.gate.weight": "ffn.gate_proj.weight"},
    )
    | {
        "blocks.{i}.attn.out.bias": bias(f"{_AT}.attention.out_proj.bias", "d_model"),
        "blocks.{i}.mlp.gate.bias": bias(f"{_AT}.ffn.gate_proj.bias", "d_mlp"),
        "blocks.{i}.mlp.up.bias": bias(f"{_AT}.ffn.up_proj.bias", "d_mlp"),
        "blocks.{i}.mlp.out.bias": bias(f"{_AT}.ffn.down_proj.bias", "d_model"),
    },
    sites=replace(_CLIP.sites, ln_pre=None, norm="rms_norm1", attention="attention", mlp_out="ffn.down_proj"),
    note=_POOLED,
)
_AIMV2_WHOLE = replace(
    _AIMV2,
    source_class="Aimv2Model",
    example="apple/aimv2-large-patch14-224-lit",
    described_at="vision_config",
    config=_AIMV2.config | {"d_out": rows_of("visual_projection.weight"), "head_bias": fixed(False)},
    weights=_AIMV2.weights | {"head.linear.weight": take("visual_projection.weight")},
    ignore=(*_AIMV2.ignore, *_TEXT_SIDE),
    refuse=(Refusal("a projection but no pooling head", lambda source: not source.get("use_head")),),
    written_prefix="vision_model.",
    unprefixed=("visual_projection.*",),
    note="the vision tower with its projection",
)

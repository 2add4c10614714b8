"""InternVL's vision model and AIMv2 in transformers."""

from __future__ import annotations

from dataclasses import replace

from registerlens.config_parts import AttentionPoolConfig, QKNormConfig
from registerlens.loading.family import Family, Refusal, Sites, Source, fixed, read, rows_of
from registerlens.loading.hf_clip import TEXT_SIDE
from registerlens.loading.hf_rules import CLIP_STATISTICS, COMMON, FC, IMAGENET, PATCH, block, norms, square
from registerlens.loading.weights import bias, concat, positions, rows, take, tokens

# InternVL ------------------------------------------------------------------------------------------------------------

_INTERNVL = Family(
    library="transformers",
    source_class="InternVLVisionModel",
    example="OpenGVLab/InternVL3-1B-hf",
    config=COMMON
    | {
        "d_mlp": read("intermediate_size"),
        "norm": lambda source: {"layer_norm": "layer", "rms_norm": "rms"}[source.get("norm_type")],
        "final_norm_kind": fixed("layer"),
        "final_norm": lambda source: not source.get("use_mean_pooling"),
        "pooling": lambda source: ("mean",) if source.get("use_mean_pooling") else ("cls",),
        "qkv_bias": read("attention_bias"),
        "qk_norm": lambda source: QKNormConfig(kind="rms", over="all") if source.get("use_qk_norm") else None,
        "positions": lambda source: "learned" if source.get("use_absolute_position_embeddings") else "none",
        "layer_scale": fixed(True),
    },
    weights=PATCH
    | block(
        "encoder.layer.{i}",
        norms("layernorm_before", "layernorm_after")
        | {
            "attn.out.gamma": "lambda_1",
            "mlp.out.gamma": "lambda_2",
            "attn.q_norm.norm.w": "attention.q_norm.weight",
            "attn.k_norm.norm.w": "attention.k_norm.weight",
        },
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer"),
        FC,
    ),
    sites=Sites(
        images="embeddings", blocks="encoder.layer", norm="layernorm_before", attention="attention", mlp_out="mlp.fc2"
    ),
    ignore=("embeddings.mask_token",),
    preprocess=square(448, fit="exact", interpolation="bicubic", **IMAGENET),
    note="the mean over patches or the normalised [CLS], as use_mean_pooling says; the library pools nothing",
)

# AIMv2 ---------------------------------------------------------------------------------------------------------------


def _pool(source: Source) -> AttentionPoolConfig | None:
    if not source.get("use_head"):
        return None
    return AttentionPoolConfig(
        n_heads=source.get("num_attention_heads"),
        d_attn=source.get("hidden_size"),
        project_query=False,
        qkv_bias=source.get("qkv_bias"),
    )


_AT = "encoder.layers.{i}"
_AIMV2 = Family(
    library="transformers",
    source_class="Aimv2VisionModel",
    example="apple/aimv2-large-patch14-224",
    prefixes=("vision_model.",),
    config=COMMON
    | {
        "d_mlp": read("intermediate_size"),
        "norm": fixed("rms"),
        "norm_eps": read("rms_norm_eps"),
        "patch_norm": fixed(True),
        "gated_mlp": fixed(True),
        "class_token": fixed(False),
        "qkv_bias": read("qkv_bias"),
        "positions": lambda source: "sincos" if source.get("is_native") else "learned",
        "attn_pool": _pool,
        "pooling": lambda source: ("attention",) if source.get("use_head") else ("mean",),
    },
    weights={
        "embed.patch.weight": take("embeddings.patch_embed.weight"),
        "embed.patch.bias": take("embeddings.patch_embed.bias"),
        "embed.norm.w": take("embeddings.rms_norm.weight"),
        "embed.prefix": tokens(),
        "embed.W_pos": positions("embeddings.position_embedding.weight", flat=True),
        "ln_final.w": take("rms_norm.weight"),
        "head.attn.queries": rows("head.cls_token"),
        "head.attn.kv.weight": concat("head.k_proj.weight", "head.v_proj.weight"),
        "head.attn.kv.bias": concat("head.k_proj.bias", "head.v_proj.bias"),
        "head.attn.out.weight": take("head.output_proj.weight"),
        "head.attn.out.bias": take("head.output_proj.bias"),
    }
    | block(
        _AT,
        {"ln1.w": "rms_norm1.weight", "ln2.w": "rms_norm2.weight", "mlp.gate.weight": "ffn.gate_proj.weight"},
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"),
        ("ffn.up_proj", "ffn.down_proj"),
    )
    | {
        "blocks.{i}.attn.out.bias": bias(f"{_AT}.attention.out_proj.bias", "d_model"),
        "blocks.{i}.mlp.gate.bias": bias(f"{_AT}.ffn.gate_proj.bias", "d_mlp"),
        "blocks.{i}.mlp.up.bias": bias(f"{_AT}.ffn.up_proj.bias", "d_mlp"),
        "blocks.{i}.mlp.out.bias": bias(f"{_AT}.ffn.down_proj.bias", "d_model"),
    },
    sites=Sites(
        images="embeddings", blocks="encoder.layers", norm="rms_norm1", attention="attention", mlp_out="ffn.down_proj"
    ),
    ignore=("embeddings.position_ids",),
    preprocess=square(224, crop=(224, 224), **CLIP_STATISTICS),
    note="the pooling head's output if the model has one, else the mean over normalised patches",
)
_AIMV2_WHOLE = replace(
    _AIMV2,
    source_class="Aimv2Model",
    example="apple/aimv2-large-patch14-224-lit",
    described_at="vision_config",
    config=_AIMV2.config | {"d_out": rows_of("visual_projection.weight"), "head_bias": fixed(False)},
    weights=_AIMV2.weights | {"head.linear.weight": take("visual_projection.weight")},
    ignore=(*_AIMV2.ignore, *TEXT_SIDE),
    refuse=(Refusal("a projection but no pooling head", lambda source: not source.get("use_head")),),
    written_prefix="vision_model.",
    unprefixed=("visual_projection.*",),
    note="the vision tower with its projection",
)

FAMILIES = (_INTERNVL, _AIMV2, _AIMV2_WHOLE)

"""CLIP and what is built like it in transformers: MetaCLIP 2 and CLIPSeg."""

from __future__ import annotations

from dataclasses import replace

from registerlens.loading.family import Family, Sites, fixed, read, rows_of
from registerlens.loading.hf_rules import (
    CLASSIFIER,
    CLASSIFIER_CONFIG,
    CLIP_STATISTICS,
    COMMON,
    FC,
    block,
    norms,
    square,
)
from registerlens.loading.weights import positions, take, tokens

SELF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
"""Names of query, key, value and output maps in the families around CLIP and SigLIP."""
TEXT_SIDE = ("text_model.*", "text_projection.*", "logit_scale")
"""What a model of images and texts has beside its tower."""

_VISION = Family(
    library="transformers",
    source_class="CLIPVisionModel",
    example="openai/clip-vit-large-patch14",
    prefixes=("vision_model.",),
    config=COMMON | {"d_mlp": read("intermediate_size"), "patch_bias": fixed(False), "ln_pre": fixed(True)},
    weights={
        "embed.patch.weight": take("embeddings.patch_embedding.weight"),
        "embed.prefix": tokens("embeddings.class_embedding", flat=True),
        "embed.W_pos": positions("embeddings.position_embedding.weight", flat=True),
        "ln_pre.w": take("pre_layrnorm.weight"),
        "ln_pre.b": take("pre_layrnorm.bias"),
        "ln_final.w": take("post_layernorm.weight"),
        "ln_final.b": take("post_layernorm.bias"),
    }
    | block("encoder.layers.{i}", norms("layer_norm1", "layer_norm2"), SELF_ATTENTION, FC),
    sites=Sites(
        images="embeddings",
        ln_pre="pre_layrnorm",
        blocks="encoder.layers",
        norm="layer_norm1",
        attention="self_attn",
        mlp_out="mlp.fc2",
    ),
    ignore=("embeddings.position_ids",),
    preprocess=square(224, crop=(224, 224), **CLIP_STATISTICS),
    note="the normalised [CLS]",
)
_PROJECTED = replace(
    _VISION,
    source_class="CLIPVisionModelWithProjection",
    config=_VISION.config | {"d_out": rows_of("visual_projection.weight"), "head_bias": fixed(False)},
    weights=_VISION.weights | {"head.linear.weight": take("visual_projection.weight")},
    written_prefix="vision_model.",
    unprefixed=("visual_projection.*",),
    note="",
)
_WHOLE = replace(
    _PROJECTED,
    source_class="CLIPModel",
    example="openai/clip-vit-base-patch16",
    described_at="vision_config",
    ignore=(*_VISION.ignore, *TEXT_SIDE),
    note="the vision tower with its projection",
)
_CLASSIFIER = replace(
    _VISION,
    source_class="CLIPForImageClassification",
    example="openai/clip-vit-base-patch32",
    described_at="vision_config",
    config=_VISION.config | CLASSIFIER_CONFIG | {"final_norm": fixed(False), "pooling": fixed(("mean",))},
    weights=_VISION.weights | CLASSIFIER,
    ignore=(*_VISION.ignore, "post_layernorm.*"),
    written_prefix="vision_model.",
    unprefixed=("classifier.*",),
    note="logits from the mean over patches, which no norm precedes",
)

# MetaCLIP 2 and CLIPSeg: the same modules under other names ----------------------------------------------------------

_META = "facebook/metaclip-2-worldwide-huge-quickgelu"
_METACLIP = tuple(
    replace(family, source_class=family.source_class.replace("CLIP", "MetaClip2"), example=_META)
    for family in (_VISION, _PROJECTED, _WHOLE, _CLASSIFIER)
)
_SEG = "CIDAS/clipseg-rd64-refined"
_CLIPSEG = (
    replace(_VISION, source_class="CLIPSegVisionModel", example=_SEG),
    replace(_WHOLE, source_class="CLIPSegModel", example=_SEG),
    replace(
        _VISION,
        source_class="CLIPSegForImageSegmentation",
        example=_SEG,
        prefixes=("clip.", "vision_model."),
        described_at="vision_config",
        ignore=(*_VISION.ignore, *TEXT_SIDE, "visual_projection.*", "decoder.*"),
        written_prefix="clip.vision_model.",
        note="the vision tower, whose normalised [CLS] comes out",
    ),
)

FAMILIES = (_VISION, _PROJECTED, _WHOLE, _CLASSIFIER, *_METACLIP, *_CLIPSEG)

"""SigLIP and SigLIP 2 in transformers: no [CLS], a learned query that pools."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING, Any

from einops import rearrange

from registerlens.config import ViTConfig
from registerlens.config_parts import AttentionPoolConfig
from registerlens.errors import InterventionError
from registerlens.loading.family import Family, Sites, Source, activation, fixed, read
from registerlens.loading.hf_clip import SELF_ATTENTION, TEXT_SIDE
from registerlens.loading.hf_rules import (
    ACTIVATION_NAMES,
    CLASSIFIER,
    CLASSIFIER_CONFIG,
    COMMON,
    FC,
    HALF,
    block,
    norms,
    square,
)
from registerlens.loading.weights import part, patch_rows, positions, rows, take, tokens

if TYPE_CHECKING:
    from torch import Tensor


def _pool(source: Source) -> AttentionPoolConfig | None:
    if not source.get("vision_use_head", True):
        return None
    return AttentionPoolConfig(
        n_heads=source.get("num_attention_heads"),
        d_attn=source.get("hidden_size"),
        d_mlp=source.get("intermediate_size"),
        act_fn=activation("hidden_act", ACTIVATION_NAMES)(source),
    )


_POOL_WEIGHTS = {
    "head.attn.queries": rows("head.probe"),
    "head.attn.mlp.ln.w": take("head.layernorm.weight"),
    "head.attn.mlp.ln.b": take("head.layernorm.bias"),
}
for _kind in ("weight", "bias"):
    _POOL_WEIGHTS |= {
        f"head.attn.q.{_kind}": part(f"head.attention.in_proj_{_kind}", 0, 3),
        f"head.attn.kv.{_kind}": part(f"head.attention.in_proj_{_kind}", 1, 3, count=2),
        f"head.attn.out.{_kind}": take(f"head.attention.out_proj.{_kind}"),
        f"head.attn.mlp.up.{_kind}": take(f"head.mlp.fc1.{_kind}"),
        f"head.attn.mlp.out.{_kind}": take(f"head.mlp.fc2.{_kind}"),
    }

_NO_HEAD = "the pooling head's output if the model has one, else the mean over normalised patches"
_VISION = Family(
    library="transformers",
    source_class="SiglipVisionModel",
    example="google/siglip-base-patch16-224",
    prefixes=("vision_model.",),
    config=COMMON
    | {
        "d_mlp": read("intermediate_size"),
        "class_token": fixed(False),
        "attn_pool": _pool,
        "pooling": lambda source: ("attention",) if source.get("vision_use_head", True) else ("mean",),
    },
    weights={
        "embed.patch.weight": take("embeddings.patch_embedding.weight"),
        "embed.patch.bias": take("embeddings.patch_embedding.bias"),
        "embed.prefix": tokens(),
        "embed.W_pos": positions("embeddings.position_embedding.weight", flat=True),
        "ln_final.w": take("post_layernorm.weight"),
        "ln_final.b": take("post_layernorm.bias"),
    }
    | _POOL_WEIGHTS
    | block("encoder.layers.{i}", norms("layer_norm1", "layer_norm2"), SELF_ATTENTION, FC),
    sites=Sites(
        images="embeddings", blocks="encoder.layers", norm="layer_norm1", attention="self_attn", mlp_out="mlp.fc2"
    ),
    ignore=("embeddings.position_ids",),
    preprocess=square(224, fit="exact", interpolation="bicubic", **HALF),
    note=_NO_HEAD,
)
_WHOLE = replace(
    _VISION,
    source_class="SiglipModel",
    described_at="vision_config",
    ignore=(*_VISION.ignore, *TEXT_SIDE, "logit_bias"),
    written_prefix="vision_model.",
    note="the vision tower with its pooling head",
)
_CLASSIFIER = replace(
    _VISION,
    source_class="SiglipForImageClassification",
    described_at="vision_config",
    config=_VISION.config | CLASSIFIER_CONFIG | {"attn_pool": fixed(None), "pooling": fixed(("mean",))},
    weights=_VISION.weights | CLASSIFIER,
    ignore=(*_VISION.ignore, "head.*"),
    written_prefix="vision_model.",
    unprefixed=("classifier.*",),
    note="logits from the mean over patches",
)

# SigLIP 2 (naflex): the images come as patches -----------------------------------------------------------------------


def _native(source: Source) -> tuple[int, int]:
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
    _naflex(_VISION, "Siglip2VisionModel"),
    _naflex(_WHOLE, "Siglip2Model"),
    _naflex(_CLASSIFIER, "Siglip2ForImageClassification"),
)

FAMILIES = (_VISION, _WHOLE, _CLASSIFIER, *_SIGLIP2)

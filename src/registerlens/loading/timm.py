"""timm's families as data: VisionTransformer, and Eva, whose positions are rotary (EVA-02, DINOv3, RoPE-ViT)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from registerlens.config import Preprocess, ViTConfig
from registerlens.config_parts import RopeConfig
from registerlens.errors import UnsupportedArchitectureError
from registerlens.loading.family import HALF, Family, Refusal, SourceModel, fixed, has_weight
from registerlens.loading.timm_parts import CONFIG, SITES, WEIGHTS, attn_pool, kind_of, refusals
from registerlens.loading.weights import Weight, alternatives, averaged, concat, made_of, ones, qkv_biases, take

if TYPE_CHECKING:
    from torch import Tensor

_COORDINATES = {"RotaryEmbeddingCat": "index", "RotaryEmbeddingMixed": "index", "RotaryEmbeddingDinoV3": "centred"}


def _rope(source: SourceModel) -> RopeConfig | None:
    rope: Any = source.get("rope")
    if rope is None:
        return None
    kind = type(rope).__name__
    reference = getattr(rope, "ref_feat_shape", None)
    return RopeConfig(
        theta=float(rope.temperature),
        coordinates=_COORDINATES[kind],  # type: ignore[arg-type]
        offset=float(getattr(rope, "grid_offset", 0.0)),
        reference_grid=None if reference is None else (reference[0], reference[1]),
        x_first=rope.grid_indexing == "xy",
        pairs="halves" if getattr(source.get("blocks.0.attn"), "rotate_half", False) else "interleaved",
        learned=kind == "RotaryEmbeddingMixed",
    )


def _odd_rope(source: SourceModel) -> bool:
    rope: Any = source.get("rope", None)
    return rope is not None and (
        kind_of("rope")(source) not in _COORDINATES
        or getattr(rope, "in_pixels", False)
        or getattr(rope, "normalize_coords", "separate") != "separate"
        or getattr(rope, "min_period", None) is not None
    )


def _frequencies(key: str) -> Weight:
    """Learned frequencies [layer, head, 2, d_head / 2], row then column. In timm the axis of the two comes first, and
    the column before the row where its grid has it so."""

    def turned(tensor: Tensor, cfg: ViTConfig) -> Tensor:
        return tensor.flip(0) if cfg.rope is not None and cfg.rope.x_first else tensor

    return made_of(
        key,
        lambda tensor, cfg: turned(tensor, cfg).movedim(0, 2).contiguous(),
        lambda tensor, cfg: turned(tensor.movedim(2, 0), cfg).contiguous(),
    )


def _attention(kind: str) -> tuple[str, str, str]:
    q, k, v = (f"blocks.{{i}}.attn.{name}_proj.{kind}" for name in "qkv")
    return q, k, v


_BIASES = tuple(f"blocks.0.attn.{name}" for name in ("qkv.bias", "q_bias", "q_proj.bias"))

EVA = Family(
    library="timm",
    source_class="Eva",
    example="timm:vit_small_patch16_dinov3.lvd1689m",
    config=CONFIG
    | {
        "qkv_bias": lambda source: any(key in source.state for key in _BIASES),
        "layer_scale": has_weight("blocks.0.gamma_1"),
        "attn_pool": attn_pool(fixed("all")),
        "rope": _rope,
    },
    weights=WEIGHTS
    | {
        "rotary.frequencies": _frequencies("rope.freqs"),
        "blocks.{i}.attn.qkv.weight": alternatives(take("blocks.{i}.attn.qkv.weight"), concat(*_attention("weight"))),
        # EvaAttention's keys have no bias; AttentionRope's have.
        "blocks.{i}.attn.qkv.bias": alternatives(
            take("blocks.{i}.attn.qkv.bias"),
            concat(*_attention("bias")),
            qkv_biases("blocks.{i}.attn.q_bias", None, "blocks.{i}.attn.v_bias"),
            qkv_biases(_attention("bias")[0], None, _attention("bias")[2]),
        ),
        "blocks.{i}.attn.out.gamma": take("blocks.{i}.gamma_1"),
        "blocks.{i}.mlp.out.gamma": alternatives(take("blocks.{i}.gamma_2"), ones()),
    },
    sites=SITES,
    refuse=(
        *refusals("EvaBlock", ("EvaAttention", "AttentionRope")),
        Refusal("rotary positions in pixels, with given periods, or for several modalities (mrope)", _odd_rope),
    ),
    preprocess=Preprocess(resize=(224, 224), crop=(224, 224), **HALF),
    note="EVA-02, DINOv3, Perception Encoder, RoPE-ViT",
)


_VIT = Family(
    library="timm",
    source_class="VisionTransformer",
    example="timm:vit_base_patch16_clip_224.openai",
    config=CONFIG
    | {
        "qkv_bias": has_weight("blocks.0.attn.qkv.bias"),
        "layer_scale": has_weight("blocks.0.ls1.gamma"),
        "attn_pool": attn_pool(lambda source: "all" if source.get("pool_include_prefix", False) else "patches"),
    },
    weights=WEIGHTS
    | {
        "blocks.{i}.attn.out.gamma": take("blocks.{i}.ls1.gamma"),
        "blocks.{i}.mlp.out.gamma": take("blocks.{i}.ls2.gamma"),
    },
    sites=SITES,
    refuse=refusals("Block", ("Attention",)),
    preprocess=Preprocess(resize=(224, 224), crop=(224, 224), **HALF),
    note="supervised, AugReg, DeiT, DeiT-III, CLIP, SigLIP, DINO, DINOv2, AIMv2, BEiT-3, registers without [CLS] too",
)
_DISTILLED = replace(
    _VIT,
    source_class="VisionTransformerDistilled",
    example="timm:deit_base_distilled_patch16_224.fb_in1k",
    config=_VIT.config
    | {
        "distillation_token": fixed(True),
        "n_trained_registers": fixed(0),
        # without a classifier timm averages the two tokens themselves
        "pooling": fixed(("cls", "distillation")),
    },
    weights=_VIT.weights
    | {
        "head.linear.weight": averaged("head.weight", "head_dist.weight"),
        "head.linear.bias": averaged("head.bias", "head_dist.bias"),
    },
    refuse=(*_VIT.refuse, Refusal("no classifier", lambda source: "head.weight" not in source.state)),
    note="the average of both heads",
)

FAMILIES = (_VIT, _DISTILLED, EVA)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""What `timm.models.save_for_hf` writes, safest first."""

_STEPS = {"center": "cover", "squash": "exact"}


def read_preprocess(module: Any) -> Preprocess | None:
    """timm's evaluation steps for a model, from its pretrained configuration; None if it has none.

    Raises:
        UnsupportedArchitectureError: a crop mode we cannot reproduce.
    """
    if not getattr(module, "pretrained_cfg", None):
        return None
    from timm.data.config import resolve_model_data_config  # optional dependency

    data = resolve_model_data_config(module)
    if data["crop_mode"] not in _STEPS:
        raise UnsupportedArchitectureError(f"timm's crop_mode={data['crop_mode']!r} is not supported.")
    size = data["input_size"][-2:]
    resize = tuple(int(side / data["crop_pct"]) for side in size)
    return Preprocess(
        resize=(resize[0], resize[1]),
        fit=_STEPS[data["crop_mode"]],  # type: ignore[arg-type]
        crop=(size[0], size[1]),
        interpolation=data["interpolation"] if data["interpolation"] != "random" else "bilinear",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )

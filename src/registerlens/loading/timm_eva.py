"""timm's Eva as data: EVA-02, DINOv3, Perception Encoder and RoPE-ViT, all with rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from registerlens.config import Preprocess, ViTConfig
from registerlens.config_parts import RopeConfig
from registerlens.loading.family import Family, Refusal, Source, fixed, has_weight
from registerlens.loading.timm_parts import CONFIG, SITES, WEIGHTS, attn_pool, kind_of, refusals
from registerlens.loading.weights import Piece, Weight, alternatives, concat, ones, qkv_biases, take

if TYPE_CHECKING:
    from torch import Tensor

_COORDINATES = {"RotaryEmbeddingCat": "index", "RotaryEmbeddingMixed": "index", "RotaryEmbeddingDinoV3": "centred"}


def _rope(source: Source) -> RopeConfig | None:
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


def _odd_rope(source: Source) -> bool:
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

    def turned(tensor: Any, cfg: ViTConfig) -> Tensor:
        return tensor.flip(0) if cfg.rope is not None and cfg.rope.x_first else tensor

    def build(tensors: Sequence[Tensor | None], cfg: ViTConfig) -> Tensor:
        return turned(tensors[0], cfg).movedim(0, 2).contiguous()

    def undo(keys: Sequence[str], tensor: Tensor, cfg: ViTConfig) -> list[Piece]:
        return [Piece(keys[0], turned(tensor.movedim(2, 0), cfg).contiguous())]

    return Weight((key,), build, undo)


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
    preprocess=Preprocess(resize=(224, 224), crop=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    note="EVA-02, DINOv3, Perception Encoder, RoPE-ViT",
)

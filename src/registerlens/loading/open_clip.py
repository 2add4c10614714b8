"""open_clip's VisionTransformer as data, and how its preprocessing is read."""

from __future__ import annotations

from typing import Any

from registerlens.config import Activation, Preprocess
from registerlens.errors import UnsupportedArchitectureError
from registerlens.loading.hf_rules import CLIP_STATISTICS
from registerlens.loading.keymap import Family, Refusal, Sites, Source, activation, fixed, has_weight, read, rows_of
from registerlens.loading.timm import name_of_activation, present
from registerlens.loading.weights import positions, take, tokens, transpose

ACTIVATION_NAMES: dict[str, Activation] = {"GELU": "gelu", "GELU tanh": "gelu_tanh", "QuickGELU": "quick_gelu"}

_POOLING = {"tok": ("cls",), "avg": ("mean",)}


def _width_out(source: Source) -> int | None:
    return source.state["proj"].shape[1] if "proj" in source.state else None


_VISUAL = Family(
    library="open_clip",
    source_class="VisionTransformer",
    example="open_clip:ViT-B-16/laion2b_s34b_b88k",
    prefixes=("visual.",),
    config={
        "n_layers": lambda source: len(source.get("transformer.resblocks")),
        "d_model": lambda source: source.state["class_embedding"].shape[0],
        "n_heads": read("transformer.resblocks.0.attn.num_heads"),
        "d_mlp": rows_of("transformer.resblocks.0.mlp.c_fc.weight"),
        "image_size": read("image_size"),
        "patch_size": read("patch_size"),
        "n_channels": read("conv1.in_channels"),
        "act_fn": activation("transformer.resblocks.0.mlp.gelu", ACTIVATION_NAMES, name_of_activation),
        "norm_eps": read("transformer.resblocks.0.ln_1.eps"),
        "patch_bias": fixed(False),
        "pos_interpolation": fixed("bicubic_antialias"),
        "ln_pre": has_weight("ln_pre.weight"),
        "qkv_bias": has_weight("transformer.resblocks.0.attn.in_proj_bias"),
        "layer_scale": has_weight("transformer.resblocks.0.ls_1.gamma"),
        "pooling": lambda source: _POOLING[source.get("pool_type")],
        "d_out": _width_out,
        "head_bias": fixed(False),
    },
    weights={
        "embed.patch.weight": take("conv1.weight"),
        "embed.prefix": tokens("class_embedding", flat=True),
        "embed.W_pos": positions("positional_embedding", flat=True),
        "ln_pre.w": take("ln_pre.weight"),
        "ln_pre.b": take("ln_pre.bias"),
        "blocks.{i}.ln1.w": take("transformer.resblocks.{i}.ln_1.weight"),
        "blocks.{i}.ln1.b": take("transformer.resblocks.{i}.ln_1.bias"),
        "blocks.{i}.attn.qkv.weight": take("transformer.resblocks.{i}.attn.in_proj_weight"),
        "blocks.{i}.attn.qkv.bias": take("transformer.resblocks.{i}.attn.in_proj_bias"),
        "blocks.{i}.attn.out.weight": take("transformer.resblocks.{i}.attn.out_proj.weight"),
        "blocks.{i}.attn.out.bias": take("transformer.resblocks.{i}.attn.out_proj.bias"),
        "blocks.{i}.attn.out.gamma": take("transformer.resblocks.{i}.ls_1.gamma"),
        "blocks.{i}.ln2.w": take("transformer.resblocks.{i}.ln_2.weight"),
        "blocks.{i}.ln2.b": take("transformer.resblocks.{i}.ln_2.bias"),
        "blocks.{i}.mlp.up.weight": take("transformer.resblocks.{i}.mlp.c_fc.weight"),
        "blocks.{i}.mlp.up.bias": take("transformer.resblocks.{i}.mlp.c_fc.bias"),
        "blocks.{i}.mlp.out.weight": take("transformer.resblocks.{i}.mlp.c_proj.weight"),
        "blocks.{i}.mlp.out.bias": take("transformer.resblocks.{i}.mlp.c_proj.bias"),
        "blocks.{i}.mlp.out.gamma": take("transformer.resblocks.{i}.ls_2.gamma"),
        "ln_final.w": take("ln_post.weight"),
        "ln_final.b": take("ln_post.bias"),
        "head.linear.weight": transpose("proj"),
    },
    sites=Sites(
        images="conv1",
        ln_pre="ln_pre",
        blocks="transformer.resblocks",
        norm="ln_1",
        attention="attn",
        mlp_out="mlp.c_proj",
    ),
    refuse=(
        Refusal("attentional pooling", present("attn_pool")),
        Refusal("a norm after pooling (final_ln_after_pool)", read("final_ln_after_pool", False)),
        Refusal("no pooling (pool_type='none')", lambda source: source.get("pool_type") not in _POOLING),
        Refusal(
            "custom residual blocks (qk_norm, scaled cosine attention, scaled heads)",
            lambda source: type(source.get("transformer.resblocks.0")).__name__ != "ResidualAttentionBlock",
        ),
    ),
    preprocess=Preprocess(resize=(224, 224), crop=(224, 224), **CLIP_STATISTICS),
    note="OpenAI's (quick_gelu) and LAION's (GELU) vision towers",
)

FAMILIES = (_VISUAL,)

WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)
"""What open_clip's folders call their weights, safest first."""

_STEPS = {"shortest": "cover", "squash": "exact"}


def read_preprocess(visual: Any) -> Preprocess | None:
    """open_clip's evaluation steps for a vision tower, or None if it carries none.

    Raises:
        UnsupportedArchitectureError: a resize mode we cannot reproduce.
    """
    steps = getattr(visual, "preprocess_cfg", None)
    if not steps:
        return None
    mode = steps.get("resize_mode") or "shortest"
    if mode not in _STEPS:
        raise UnsupportedArchitectureError(f"open_clip's resize_mode={mode!r} is not supported.")
    size = steps["size"] if not isinstance(steps["size"], int) else (steps["size"],) * 2
    return Preprocess(
        resize=tuple(size),  # type: ignore[arg-type]
        fit=_STEPS[mode],  # type: ignore[arg-type]
        crop=tuple(size) if mode == "shortest" else None,
        interpolation=steps.get("interpolation") or "bicubic",
        mean=tuple(steps["mean"]),
        std=tuple(steps["std"]),
    )

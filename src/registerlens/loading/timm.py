"""timm's VisionTransformer as data, and how timm names and folders are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from registerlens.config import Activation, Preprocess
from registerlens.errors import UnsupportedArchitectureError
from registerlens.loading.keymap import (
    Family,
    Reader,
    Refusal,
    Sites,
    Source,
    activation,
    fixed,
    has_weight,
    read,
    rows_of,
)
from registerlens.loading.weights import averaged, positions, take, tokens

ACTIVATION_NAMES: dict[str, Activation] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "GELU tanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
}

_POOLING = {"token": ("cls",), "avg": ("mean",), "": ()}


def name_of_activation(module: nn.Module) -> str:
    """The nonlinearity's class name, with its approximation where it has one."""
    tanh = getattr(module, "approximate", "none") == "tanh"
    return f"{type(module).__name__}{' tanh' if tanh else ''}"


def present(path: str) -> Reader:
    """Whether a module stands at this path, rather than nothing or an Identity."""
    return lambda source: not isinstance(source.get(path, None), nn.Identity | None)


def _plain_block(source: Source) -> bool:
    block, attn, mlp = (type(source.get(f"blocks.0{part}", None)).__name__ for part in ("", ".attn", ".mlp"))
    return (block, attn, mlp) == ("Block", "Attention", "Mlp")


def _pooling(source: Source) -> tuple[str, ...]:
    pool = source.get("global_pool")
    if pool not in _POOLING:
        raise UnsupportedArchitectureError(f"timm's global_pool={pool!r} is not supported; known: {sorted(_POOLING)}.")
    return _POOLING[pool]


_VIT = Family(
    library="timm",
    source_class="VisionTransformer",
    example="timm:vit_base_patch16_clip_224.openai",
    config={
        "n_layers": lambda source: len(source.get("blocks")),
        "d_model": read("embed_dim"),
        "n_heads": read("blocks.0.attn.num_heads"),
        "d_head": read("blocks.0.attn.head_dim"),
        "d_mlp": rows_of("blocks.0.mlp.fc1.weight"),
        "image_size": read("patch_embed.img_size"),
        "patch_size": read("patch_embed.patch_size"),
        "n_channels": read("patch_embed.proj.in_channels"),
        "act_fn": activation("blocks.0.mlp.act", ACTIVATION_NAMES, name_of_activation),
        "norm_eps": read("blocks.0.norm1.eps"),
        "patch_bias": has_weight("patch_embed.proj.bias"),
        "class_token": read("has_class_token"),
        "n_trained_registers": read("num_reg_tokens"),
        "pos_interpolation": fixed("bicubic_antialias"),
        "ln_pre": has_weight("norm_pre.weight"),
        "qkv_bias": has_weight("blocks.0.attn.qkv.bias"),
        "layer_scale": has_weight("blocks.0.ls1.gamma"),
        "final_norm": has_weight("norm.weight"),
        "pooling": _pooling,
        "d_out": rows_of("head.weight"),
        "head_bias": has_weight("head.bias"),
    },
    weights={
        "embed.patch.weight": take("patch_embed.proj.weight"),
        "embed.patch.bias": take("patch_embed.proj.bias"),
        "embed.prefix": tokens("cls_token", "dist_token", "reg_token"),
        "embed.W_pos": positions("pos_embed"),
        "ln_pre.w": take("norm_pre.weight"),
        "ln_pre.b": take("norm_pre.bias"),
        "blocks.{i}.ln1.w": take("blocks.{i}.norm1.weight"),
        "blocks.{i}.ln1.b": take("blocks.{i}.norm1.bias"),
        "blocks.{i}.attn.qkv.weight": take("blocks.{i}.attn.qkv.weight"),
        "blocks.{i}.attn.qkv.bias": take("blocks.{i}.attn.qkv.bias"),
        "blocks.{i}.attn.out.weight": take("blocks.{i}.attn.proj.weight"),
        "blocks.{i}.attn.out.bias": take("blocks.{i}.attn.proj.bias"),
        "blocks.{i}.attn.out.gamma": take("blocks.{i}.ls1.gamma"),
        "blocks.{i}.ln2.w": take("blocks.{i}.norm2.weight"),
        "blocks.{i}.ln2.b": take("blocks.{i}.norm2.bias"),
        "blocks.{i}.mlp.up.weight": take("blocks.{i}.mlp.fc1.weight"),
        "blocks.{i}.mlp.up.bias": take("blocks.{i}.mlp.fc1.bias"),
        "blocks.{i}.mlp.out.weight": take("blocks.{i}.mlp.fc2.weight"),
        "blocks.{i}.mlp.out.bias": take("blocks.{i}.mlp.fc2.bias"),
        "blocks.{i}.mlp.out.gamma": take("blocks.{i}.ls2.gamma"),
        "ln_final.w": take("norm.weight"),
        "ln_final.b": take("norm.bias"),
        "head.linear.weight": take("head.weight"),
        "head.linear.bias": take("head.bias"),
    },
    sites=Sites(
        images="patch_embed",
        ln_pre="norm_pre",
        blocks="blocks",
        norm="norm1",
        attention="attn",
        mlp_out="mlp.fc2",
    ),
    refuse=(
        Refusal(
            "a convolutional stem, or another patch embedding than one strided convolution",
            lambda source: type(source.get("patch_embed")).__name__ != "PatchEmbed",
        ),
        Refusal("blocks other than timm's plain Block, Attention and Mlp", lambda source: not _plain_block(source)),
        Refusal(
            "a normalisation other than LayerNorm (as RMSNorm)",
            lambda source: not isinstance(source.get("blocks.0.norm1"), nn.LayerNorm),
        ),
        Refusal(
            "no bias after attention (proj_bias=False)", lambda source: source.get("blocks.0.attn.proj.bias") is None
        ),
        Refusal("attention pooling (global_pool='map')", present("attn_pool")),
        Refusal("a norm after pooling (fc_norm)", present("fc_norm")),
        Refusal("normalised queries and keys (qk_norm)", present("blocks.0.attn.q_norm")),
        Refusal("a norm inside attention", present("blocks.0.attn.norm")),
        Refusal("gated attention", present("blocks.0.attn.gate")),
        Refusal("a norm inside the MLP", present("blocks.0.mlp.norm")),
        Refusal("a norm in the patch embedding", present("patch_embed.norm")),
        Refusal("no learned position embedding", lambda source: "pos_embed" not in source.state),
        Refusal("pooling that includes prefix tokens", read("pool_include_prefix", False)),
        Refusal("padding of the image (dynamic_img_pad)", read("patch_embed.dynamic_img_pad", False)),
    ),
    preprocess=Preprocess(resize=(224, 224), crop=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    note="supervised, DeiT, CLIP, DINO, DINOv2 with and without reg4",
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

FAMILIES = (_VIT, _DISTILLED)

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
    from timm.data.config import resolve_model_data_config  # noqa: PLC0415  (optional dependency)

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

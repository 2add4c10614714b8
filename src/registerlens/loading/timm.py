"""timm's VisionTransformer as data, and how timm names and folders are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from registerlens.config import Preprocess
from registerlens.errors import UnsupportedArchitectureError
from registerlens.loading.family import Family, Refusal, fixed, has_weight
from registerlens.loading.timm_eva import EVA
from registerlens.loading.timm_parts import CONFIG, SITES, WEIGHTS, attn_pool, refusals
from registerlens.loading.weights import averaged, take

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
    preprocess=Preprocess(resize=(224, 224), crop=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
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

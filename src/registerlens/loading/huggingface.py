"""transformers' ViT families as data, and how its folders and hub repositories are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from registerlens.config import Activation, Preprocess
from registerlens.errors import ConfigError, UnsupportedArchitectureError
from registerlens.files import read_json
from registerlens.loading.files import Fetch
from registerlens.loading.keymap import Family, Refusal, Sites, activation, fixed, pair, read, rows_of
from registerlens.loading.weights import Weight, averaged, concat, positions, take, tokens

ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP_STATISTICS: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


def _square(size: int, **steps: Any) -> Preprocess:
    return Preprocess(resize=(size, size), arithmetic="transformers", **steps)


_COMMON = {
    "n_layers": read("num_hidden_layers"),
    "d_model": read("hidden_size"),
    "n_heads": read("num_attention_heads"),
    "image_size": pair("image_size"),
    "patch_size": pair("patch_size"),
    "n_channels": read("num_channels"),
    "act_fn": activation("hidden_act", ACTIVATION_NAMES),
    "norm_eps": read("layer_norm_eps"),
}

_PATCH = {
    "embed.patch.weight": take("embeddings.patch_embeddings.projection.weight"),
    "embed.patch.bias": take("embeddings.patch_embeddings.projection.bias"),
    "embed.prefix": tokens("embeddings.cls_token", "embeddings.distillation_token", "embeddings.register_tokens"),
    "embed.W_pos": positions("embeddings.position_embeddings"),
    "ln_final.w": take("layernorm.weight"),
    "ln_final.b": take("layernorm.bias"),
}

_CLASSIFIER = {"head.linear.weight": take("classifier.weight"), "head.linear.bias": take("classifier.bias")}
_CLASSIFIER_CONFIG = {"d_out": rows_of("classifier.weight")}


def _block(parts: Mapping[str, str], attention: tuple[str, str, str, str], mlp: tuple[str, str]) -> dict[str, Weight]:
    """The rules of one block from the source's names: its norms, q, k, v, output, and the two MLP maps."""
    q, k, v, out = attention
    rules = {f"blocks.{{i}}.{ours}": take(theirs) for ours, theirs in parts.items()}
    for kind in ("weight", "bias"):
        rules[f"blocks.{{i}}.attn.qkv.{kind}"] = concat(f"{q}.{kind}", f"{k}.{kind}", f"{v}.{kind}")
        rules[f"blocks.{{i}}.attn.out.{kind}"] = take(f"{out}.{kind}")
        rules[f"blocks.{{i}}.mlp.up.{kind}"] = take(f"{mlp[0]}.{kind}")
        rules[f"blocks.{{i}}.mlp.out.{kind}"] = take(f"{mlp[1]}.{kind}")
    return rules


def _norms(first: str, second: str) -> dict[str, str]:
    return {
        "ln1.w": f"{first}.weight",
        "ln1.b": f"{first}.bias",
        "ln2.w": f"{second}.weight",
        "ln2.b": f"{second}.bias",
    }


# ViT and DeiT --------------------------------------------------------------------------------------------------------

_VIT = Family(
    library="transformers",
    source_class="ViTModel",
    example="google/vit-base-patch16-224-in21k",
    prefixes=("vit.",),
    config=_COMMON
    | {
        "d_mlp": read("intermediate_size"),
        "qkv_bias": read("qkv_bias"),
        "d_out": rows_of("pooler.dense.weight"),
        "head_act": lambda source: "tanh" if "pooler.dense.weight" in source.state else None,
    },
    weights=_PATCH
    | _block(
        _norms("layers.{i}.layernorm_before", "layers.{i}.layernorm_after"),
        (
            "layers.{i}.attention.q_proj",
            "layers.{i}.attention.k_proj",
            "layers.{i}.attention.v_proj",
            "layers.{i}.attention.o_proj",
        ),
        ("layers.{i}.mlp.fc1", "layers.{i}.mlp.fc2"),
    )
    | {"head.linear.weight": take("pooler.dense.weight"), "head.linear.bias": take("pooler.dense.bias")},
    renames=(
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.query\.", ".attention.q_proj."),
        (r"\.attention\.attention\.key\.", ".attention.k_proj."),
        (r"\.attention\.attention\.value\.", ".attention.v_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ),
    sites=Sites(
        images="embeddings",
        blocks="layers",
        norm="layernorm_before",
        attention="attention",
        mlp_out="mlp.fc2",
    ),
    ignore=("embeddings.mask_token",),
    refuse=(
        Refusal(
            "a pooler nonlinearity other than tanh",
            lambda source: "pooler.dense.weight" in source.state and source.get("pooler_act", "tanh") != "tanh",
        ),
    ),
    preprocess=_square(224, fit="exact", interpolation="bilinear", **_HALF),
    note="the pooler's output if the checkpoint has one, else the normalised [CLS]",
)
_VIT_CLASSIFIER_CONFIG = _VIT.config | _CLASSIFIER_CONFIG | {"head_act": fixed(None)}
_VIT_CLASSIFIER = replace(
    _VIT,
    source_class="ViTForImageClassification",
    example="google/vit-base-patch16-224",
    config=_VIT_CLASSIFIER_CONFIG,
    weights=_VIT.weights | _CLASSIFIER,
    ignore=(*_VIT.ignore, "pooler.*"),
    refuse=(),
    note="",
)
_DEIT_PREPROCESS = _square(224, **_IMAGENET)
_DEIT = replace(
    _VIT,
    source_class="DeiTModel",
    example="facebook/deit-base-distilled-patch16-224",
    prefixes=("deit.",),
    config=_VIT.config | {"distillation_token": fixed(True)},
    preprocess=_DEIT_PREPROCESS,
)
_DEIT_CLASSIFIER = replace(
    _VIT_CLASSIFIER,
    source_class="DeiTForImageClassification",
    example="facebook/deit-base-distilled-patch16-224",
    prefixes=("deit.",),
    config=_VIT_CLASSIFIER_CONFIG | {"distillation_token": fixed(True)},
    preprocess=_DEIT_PREPROCESS,
)
_DEIT_TEACHER = replace(
    _DEIT_CLASSIFIER,
    source_class="DeiTForImageClassificationWithTeacher",
    config=_DEIT_CLASSIFIER.config
    | {"d_out": rows_of("cls_classifier.weight"), "pooling": fixed(("cls", "distillation"))},
    weights=_VIT.weights
    | {
        "head.linear.weight": averaged("cls_classifier.weight", "distillation_classifier.weight"),
        "head.linear.bias": averaged("cls_classifier.bias", "distillation_classifier.bias"),
    },
    note="the average of both heads",
)

# DINOv2 --------------------------------------------------------------------------------------------------------------

DINOV2 = Family(
    library="transformers",
    source_class="Dinov2Model",
    example="facebook/dinov2-large",
    prefixes=("dinov2.",),
    config=_COMMON
    | {
        "d_mlp": lambda source: int(source.get("hidden_size") * source.get("mlp_ratio")),
        "qkv_bias": read("qkv_bias"),
        "layer_scale": fixed(True),
    },
    weights=_PATCH
    | _block(
        _norms("encoder.layer.{i}.norm1", "encoder.layer.{i}.norm2")
        | {
            "attn.out.gamma": "encoder.layer.{i}.layer_scale1.lambda1",
            "mlp.out.gamma": "encoder.layer.{i}.layer_scale2.lambda1",
        },
        (
            "encoder.layer.{i}.attention.q_proj",
            "encoder.layer.{i}.attention.k_proj",
            "encoder.layer.{i}.attention.v_proj",
            "encoder.layer.{i}.attention.o_proj",
        ),
        ("encoder.layer.{i}.mlp.fc1", "encoder.layer.{i}.mlp.fc2"),
    ),
    renames=(
        (r"\.attention\.attention\.query\.", ".attention.q_proj."),
        (r"\.attention\.attention\.key\.", ".attention.k_proj."),
        (r"\.attention\.attention\.value\.", ".attention.v_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    ),
    sites=Sites(
        images="embeddings",
        blocks="encoder.layer",
        norm="norm1",
        attention="attention",
        mlp_out="mlp.fc2",
    ),
    ignore=("embeddings.mask_token",),
    refuse=(Refusal("a SwiGLU MLP (as in the giant model)", read("use_swiglu_ffn", False)),),
    preprocess=Preprocess(resize=(256, 256), crop=(224, 224), arithmetic="transformers", **_IMAGENET),
    at_native_size=False,
)
_DINOV2_CLASSIFIER = replace(
    DINOV2,
    source_class="Dinov2ForImageClassification",
    example="facebook/dinov2-base-imagenet1k-1-layer",
    config=DINOV2.config | _CLASSIFIER_CONFIG | {"pooling": fixed(("cls", "mean"))},
    weights=DINOV2.weights | _CLASSIFIER,
)
_REGISTERS = {
    "n_trained_registers": read("num_register_tokens"),
    "pos_interpolation": fixed("bicubic_antialias"),
}
_DINOV2_REGISTERS = replace(
    DINOV2,
    source_class="Dinov2WithRegistersModel",
    example="facebook/dinov2-with-registers-large",
    prefixes=("dinov2_with_registers.",),
    config=DINOV2.config | _REGISTERS,
)
_DINOV2_REGISTERS_CLASSIFIER = replace(
    _DINOV2_CLASSIFIER,
    source_class="Dinov2WithRegistersForImageClassification",
    example="facebook/dinov2-with-registers-base-imagenet1k-1-layer",
    prefixes=("dinov2_with_registers.",),
    config=_DINOV2_CLASSIFIER.config | _REGISTERS,
)

# CLIP ----------------------------------------------------------------------------------------------------------------

_CLIP_VISION = Family(
    library="transformers",
    source_class="CLIPVisionModel",
    example="openai/clip-vit-large-patch14",
    prefixes=("vision_model.",),
    config=_COMMON
    | {
        "d_mlp": read("intermediate_size"),
        "patch_bias": fixed(False),
        "ln_pre": fixed(True),
    },
    weights={
        "embed.patch.weight": take("embeddings.patch_embedding.weight"),
        "embed.prefix": tokens("embeddings.class_embedding", flat=True),
        "embed.W_pos": positions("embeddings.position_embedding.weight", flat=True),
        "ln_pre.w": take("pre_layrnorm.weight"),
        "ln_pre.b": take("pre_layrnorm.bias"),
        "ln_final.w": take("post_layernorm.weight"),
        "ln_final.b": take("post_layernorm.bias"),
    }
    | _block(
        _norms("encoder.layers.{i}.layer_norm1", "encoder.layers.{i}.layer_norm2"),
        (
            "encoder.layers.{i}.self_attn.q_proj",
            "encoder.layers.{i}.self_attn.k_proj",
            "encoder.layers.{i}.self_attn.v_proj",
            "encoder.layers.{i}.self_attn.out_proj",
        ),
        ("encoder.layers.{i}.mlp.fc1", "encoder.layers.{i}.mlp.fc2"),
    ),
    sites=Sites(
        images="embeddings",
        ln_pre="pre_layrnorm",
        blocks="encoder.layers",
        norm="layer_norm1",
        attention="self_attn",
        mlp_out="mlp.fc2",
    ),
    ignore=("embeddings.position_ids",),
    preprocess=_square(224, crop=(224, 224), **CLIP_STATISTICS),
    note="the normalised [CLS]",
)
_CLIP_PROJECTED = replace(
    _CLIP_VISION,
    source_class="CLIPVisionModelWithProjection",
    config=_CLIP_VISION.config | {"d_out": rows_of("visual_projection.weight"), "head_bias": fixed(False)},
    weights=_CLIP_VISION.weights | {"head.linear.weight": take("visual_projection.weight")},
    note="",
)
_CLIP = replace(
    _CLIP_PROJECTED,
    source_class="CLIPModel",
    example="openai/clip-vit-base-patch16",
    described_at="vision_config",
    ignore=(*_CLIP_VISION.ignore, "text_model.*", "text_projection.*", "logit_scale"),
    note="the vision tower with its projection",
)

FAMILIES = (
    _VIT,
    _VIT_CLASSIFIER,
    _DEIT,
    _DEIT_CLASSIFIER,
    _DEIT_TEACHER,
    _CLIP,
    _CLIP_VISION,
    _CLIP_PROJECTED,
    DINOV2,
    _DINOV2_CLASSIFIER,
    _DINOV2_REGISTERS,
    _DINOV2_REGISTERS_CLASSIFIER,
)

Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic"]
_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_config(fetch: Callable[[str], Path | None]) -> tuple[str, Any]:
    """The class a checkpoint was saved from, and its config object.

    Args:
        fetch: file name -> local path, or None where the checkpoint has no such file.

    Raises:
        UnsupportedArchitectureError: the configuration is not that of a model transformers knows.
    """
    from transformers import AutoConfig  # noqa: PLC0415  (slow to import)

    path = fetch("config.json")
    if path is None:
        raise UnsupportedArchitectureError("The checkpoint has no config.json, so its architecture is unknown.")
    raw = read_json(path)
    try:
        config = AutoConfig.for_model(raw.get("model_type", ""), **{k: v for k, v in raw.items() if k != "model_type"})
    except (ValueError, KeyError) as error:
        raise UnsupportedArchitectureError(
            f"config.json says model_type={raw.get('model_type')!r}, which this version of transformers does not know. "
            f"Remote code is never run."
        ) from error
    classes = raw.get("architectures") or [_default_class(raw.get("model_type"))]
    return classes[0], config


def _default_class(model_type: str | None) -> str:
    defaults = {"vit": "ViTModel", "deit": "DeiTModel", "dinov2": "Dinov2Model", "clip": "CLIPModel"}
    defaults |= {"clip_vision_model": "CLIPVisionModel", "dinov2_with_registers": "Dinov2WithRegistersModel"}
    return defaults.get(model_type or "", str(model_type))


def read_preprocess(fetch: Fetch, family: Family) -> Preprocess | None:
    """The steps that a checkpoint's image processor describes, or None if it has none.

    Raises:
        ConfigError: a step we cannot reproduce.
    """
    if (path := fetch("preprocessor_config.json")) is not None:
        raw = read_json(path)
    elif (path := fetch("processor_config.json")) is not None:  # transformers 5 nests it where there is a text side
        raw = read_json(path).get("image_processor", {})
    else:
        return None
    usual = family.preprocess
    resampling = raw.get("resample")
    if not raw.get("do_resize", True) or resampling not in (None, *_RESAMPLING):
        step = "do_resize=false" if not raw.get("do_resize", True) else f"resample={resampling}"
        raise ConfigError(f"'{path}' asks for {step}, which cannot be reproduced. Change that line to load the model.")
    target, fit = _target(raw.get("size"), usual, path)
    crop = raw.get("crop_size") if raw.get("do_center_crop", bool(raw.get("crop_size"))) else None
    mean, std = (0.0,) * 3, (1.0,) * 3
    if raw.get("do_normalize", True):
        mean, std = tuple(raw.get("image_mean") or usual.mean), tuple(raw.get("image_std") or usual.std)
    # Ours divides by 255 first; another factor is the same steps with other statistics.
    factor = 255 * raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 255.0
    return Preprocess(
        resize=target,
        fit=fit,
        crop=_target(crop, usual, path)[0] if crop else (target if fit == "cover" else None),
        arithmetic="transformers",
        interpolation=usual.interpolation if resampling is None else _RESAMPLING[resampling],
        mean=tuple(value / factor for value in mean),
        std=tuple(value / factor for value in std),
    )


def _target(size: Any, usual: Preprocess, path: Path) -> tuple[tuple[int, int], Literal["cover", "exact"]]:
    if size is None:
        return usual.resize, usual.fit
    if isinstance(size, int):
        return (size, size), usual.fit
    if set(size) == {"shortest_edge"}:
        return (size["shortest_edge"],) * 2, "cover"
    if set(size) == {"height", "width"}:
        return (size["height"], size["width"]), "exact"
    raise ConfigError(f"'{path}' asks for size={size}, which cannot be reproduced. Change it to load the model.")

"""ViT and its closest relatives in transformers: DeiT, MSN, I-JEPA, the encoder of MAE, and InternVL's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from registerlens.config import ViTConfig
from registerlens.config_parts import QKNormConfig
from registerlens.errors import InterventionError
from registerlens.loading.family import HALF, IMAGENET, Family, Refusal, Sites, fixed, has_weight, read, rows_of
from registerlens.loading.hf_rules import ATTENTION, COMMON, FC, OLD_VIT, PATCH, block, square, with_classifier
from registerlens.loading.weights import averaged, linear

if TYPE_CHECKING:
    from torch import Tensor

_NORMS = ("layernorm_before", "layernorm_after")
_SITES = Sites(images="embeddings", blocks="layers", norm="layernorm_before", attention="attention", mlp_out="mlp.fc2")
_CONFIG = COMMON | {"qkv_bias": read("qkv_bias")}
_WEIGHTS = PATCH | block("layers.{i}", _NORMS, ATTENTION, FC)

_VIT = Family(
    library="transformers",
    source_class="ViTModel",
    example="google/vit-base-patch16-224-in21k",
    prefixes=("vit.",),
    config=_CONFIG
    | {
        "d_out": rows_of("pooler.dense.weight"),
        "head_act": lambda source: "tanh" if "pooler.dense.weight" in source.state else None,
    },
    weights=_WEIGHTS | linear("head.linear", "pooler.dense"),
    renames=OLD_VIT,
    sites=_SITES,
    ignore=("embeddings.mask_token",),
    refuse=(
        Refusal(
            "a pooler nonlinearity other than tanh",
            lambda source: "pooler.dense.weight" in source.state and source.get("pooler_act", "tanh") != "tanh",
        ),
    ),
    preprocess=square(224, fit="exact", interpolation="bilinear", **HALF),
    note="the pooler's output if the checkpoint has one, else the normalised [CLS]",
)
_WITHOUT_POOLER: dict[str, Any] = {"ignore": ("pooler.*",), "refuse": ()}
_VIT_CLASSIFIER = with_classifier(
    _VIT,
    "ViTForImageClassification",
    {"head_act": fixed(None)},
    example="google/vit-base-patch16-224",
    **_WITHOUT_POOLER,
)

# DeiT ----------------------------------------------------------------------------------------------------------------

_DEIT = replace(
    _VIT,
    source_class="DeiTModel",
    example="facebook/deit-base-distilled-patch16-224",
    prefixes=("deit.",),
    config=_VIT.config | {"distillation_token": fixed(True)},
    preprocess=square(224, **IMAGENET),
)
_DEIT_CLASSIFIER = with_classifier(_DEIT, "DeiTForImageClassification", {"head_act": fixed(None)}, **_WITHOUT_POOLER)
_DEIT_TEACHER = replace(
    _DEIT_CLASSIFIER,
    source_class="DeiTForImageClassificationWithTeacher",
    config=_DEIT_CLASSIFIER.config
    | {"d_out": rows_of("cls_classifier.weight"), "pooling": fixed(("cls", "distillation"))},
    weights=_WEIGHTS
    | {
        "head.linear.weight": averaged("cls_classifier.weight", "distillation_classifier.weight"),
        "head.linear.bias": averaged("cls_classifier.bias", "distillation_classifier.bias"),
    },
    note="the average of both heads",
)

# MSN and I-JEPA ------------------------------------------------------------------------------------------------------

_MSN = replace(
    _VIT,
    source_class="ViTMSNModel",
    example="facebook/vit-msn-small",
    config=_CONFIG,
    weights=_WEIGHTS,
    refuse=(),
    preprocess=square(224, fit="exact", interpolation="bicubic", **IMAGENET),
    note="the normalised [CLS]",
)
_MSN_CLASSIFIER = with_classifier(_MSN, "ViTMSNForImageClassification")
_NO_CLS = {"class_token": fixed(False), "pooling": fixed(("mean",))}
_IJEPA = replace(
    _MSN,
    source_class="IJepaModel",
    example="facebook/ijepa_vith14_1k",
    prefixes=("ijepa.",),
    config=_CONFIG | _NO_CLS,
    refuse=(Refusal("a pooler over its first patch", has_weight("pooler.dense.weight")),),
    preprocess=square(224, fit="exact", interpolation="bilinear", **HALF),
    note="the mean over normalised patches; the library returns the tokens only",
)
_IJEPA_CLASSIFIER = with_classifier(_IJEPA, "IJepaForImageClassification")

# MAE -----------------------------------------------------------------------------------------------------------------


def _in_order(cfg: ViTConfig, images: Tensor, noise: Tensor | None = None, **options: Any) -> Tensor:
    """The images, where MAE does not shuffle their patches.

    Raises:
        InterventionError: it does.
    """
    if noise is None or not bool((noise[:, 1:] > noise[:, :-1]).all()):
        raise InterventionError(
            "This MAE encoder shuffles the patches by random noise, so that edits could not tell them apart. Call it "
            "with noise=torch.arange(n_patches).expand(batch, -1) and mask_ratio=0 in its configuration, or use "
            "HookedViT."
        )
    return images


_MAE = replace(
    _MSN,
    source_class="ViTMAEModel",
    example="facebook/vit-mae-base",
    sites=replace(_SITES, read_images=_in_order),
    note="the normalised [CLS] of the encoder on all patches, in order",
)
_MAE_PRETRAINING = replace(
    _MAE, source_class="ViTMAEForPreTraining", ignore=(*_MAE.ignore, "decoder.*"), written_prefix="vit."
)

# InternVL ------------------------------------------------------------------------------------------------------------

_INTERNVL = Family(
    library="transformers",
    source_class="InternVLVisionModel",
    example="OpenGVLab/InternVL3-1B-hf",
    config=COMMON
    | {
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
        _NORMS,
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer"),
        FC,
        {
            "attn.out.gamma": "lambda_1",
            "mlp.out.gamma": "lambda_2",
            "attn.q_norm.norm.w": "attention.q_norm.weight",
            "attn.k_norm.norm.w": "attention.k_norm.weight",
        },
    ),
    sites=replace(_SITES, blocks="encoder.layer"),
    ignore=("embeddings.mask_token",),
    preprocess=square(448, fit="exact", interpolation="bicubic", **IMAGENET),
    note="the mean over patches or the normalised [CLS], as use_mean_pooling says; the library pools nothing",
)

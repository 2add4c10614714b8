"""DINOv2, with registers too, and DINOv3 in transformers."""

from dataclasses import replace

from registerlens.config import Preprocess
from registerlens.config_parts import RopeConfig
from registerlens.loading.family import IMAGENET, Family, Reader, Sites, SourceModel, fixed, read
from registerlens.loading.hf_rules import ATTENTION, COMMON, FC, OLD_ATTENTION, PATCH, block, square, with_classifier
from registerlens.loading.weights import bias, linear, norm, qkv_biases, take, tokens

_NORMS = ("norm1", "norm2")
_SCALES = {"attn.out.gamma": "layer_scale1.lambda1", "mlp.out.gamma": "layer_scale2.lambda1"}


def _chosen(flag: str, yes: Reader, no: Reader) -> Reader:
    """One of two readers, as a flag of the configuration says."""
    return lambda source: (yes if source.get(flag, False) else no)(source)


def _hidden(source: SourceModel) -> int:
    return int(source.get("hidden_size") * source.get("mlp_ratio"))


def _gated_hidden(source: SourceModel) -> int:
    """Two thirds as many, rounded up to a multiple of 8."""
    return (int(_hidden(source) * 2 / 3) + 7) // 8 * 8


_AT = "encoder.layer.{i}"
_GATED = (
    linear("blocks.{i}.mlp.gate", f"{_AT}.mlp.gate_proj")
    | linear("blocks.{i}.mlp.up", f"{_AT}.mlp.up_proj")
    | linear("blocks.{i}.mlp.out", f"{_AT}.mlp.down_proj")
)
_EMPTY_REGISTERS = {
    "embed.prefix": tokens("embeddings.cls_token", registers="embeddings.register_tokens", empty=True),
}

# DINOv2 --------------------------------------------------------------------------------------------------------------

DINOV2 = Family(
    library="transformers",
    source_class="Dinov2Model",
    example="facebook/dinov2-large",
    prefixes=("dinov2.",),
    config=COMMON
    | {
        "d_mlp": _chosen("use_swiglu_ffn", _gated_hidden, _hidden),
        "gated_mlp": read("use_swiglu_ffn", False),
        "act_fn": _chosen("use_swiglu_ffn", fixed("silu"), COMMON["act_fn"]),
        "qkv_bias": read("qkv_bias"),
        "layer_scale": fixed(True),
    },
    weights=PATCH | block(_AT, _NORMS, ATTENTION, FC, _SCALES),
    gated_weights=_GATED,
    renames=(*OLD_ATTENTION, (r"\.mlp\.weights_out\.", ".mlp.down_proj.")),
    splits=((r"\.mlp\.weights_in\.", (".mlp.gate_proj.", ".mlp.up_proj.")),),
    sites=Sites(
        images="embeddings",
        blocks="encoder.layer",
        norm="norm1",
        attention="attention",
        mlp_out="mlp.fc2",
        gated_mlp_out="mlp.down_proj",
    ),
    ignore=("embeddings.mask_token",),
    preprocess=Preprocess(resize=(256, 256), crop=(224, 224), arithmetic="transformers", **IMAGENET),
    at_native_size=False,
)
_CLASSIFIER_POOLING = {"pooling": fixed(("cls", "mean"))}
_DINOV2_CLASSIFIER = with_classifier(
    DINOV2,
    "Dinov2ForImageClassification",
    _CLASSIFIER_POOLING,
    example="facebook/dinov2-base-imagenet1k-1-layer",
)
_DINOV2_REGISTERS = replace(
    DINOV2,
    source_class="Dinov2WithRegistersModel",
    example="facebook/dinov2-with-registers-large",
    prefixes=("dinov2_with_registers.",),
    config=DINOV2.config
    | {
        "n_trained_registers": read("num_register_tokens"),
        "pos_interpolation": fixed("bicubic_antialias"),
    },
    weights=DINOV2.weights | _EMPTY_REGISTERS,
)
_DINOV2_REGISTERS_CLASSIFIER = with_classifier(
    _DINOV2_REGISTERS,
    "Dinov2WithRegistersForImageClassification",
    _CLASSIFIER_POOLING,
    example="facebook/dinov2-with-registers-base-imagenet1k-1-layer",
)

# DINOv3 --------------------------------------------------------------------------------------------------------------

_V3 = "model.layer.{i}"
_DINOV3 = Family(
    library="transformers",
    source_class="DINOv3ViTModel",
    example="facebook/dinov3-vitb16-pretrain-lvd1689m",
    config=COMMON
    | {
        "gated_mlp": read("use_gated_mlp"),
        "qkv_bias": lambda source: any(source.get(f"{name}_bias") for name in ("query", "key", "value")),
        "layer_scale": fixed(True),
        "n_trained_registers": read("num_register_tokens"),
        "positions": fixed("none"),
        "rope": lambda source: RopeConfig(theta=float(source.get("rope_theta"))),
    },
    weights=linear("embed.patch", "embeddings.patch_embeddings")
    | norm("ln_final", "norm")
    | _EMPTY_REGISTERS
    | block(_V3, _NORMS, ATTENTION, ("mlp.up_proj", "mlp.down_proj"), _SCALES)
    | {
        "blocks.{i}.attn.qkv.bias": qkv_biases(*(f"{_V3}.{name}.bias" for name in ATTENTION[:3])),
        "blocks.{i}.attn.out.bias": bias(f"{_V3}.attention.o_proj.bias", "d_model"),
        "blocks.{i}.mlp.gate.weight": take(f"{_V3}.mlp.gate_proj.weight"),
        "blocks.{i}.mlp.gate.bias": bias(f"{_V3}.mlp.gate_proj.bias", "d_mlp"),
        "blocks.{i}.mlp.up.bias": bias(f"{_V3}.mlp.up_proj.bias", "d_mlp"),
        "blocks.{i}.mlp.out.bias": bias(f"{_V3}.mlp.down_proj.bias", "d_model"),
    },
    renames=((r"^layer\.", "model.layer."),),
    sites=replace(DINOV2.sites, blocks="model.layer", mlp_out="mlp.down_proj", gated_mlp_out=""),
    ignore=("embeddings.mask_token",),
    preprocess=square(224, fit="exact", interpolation="bilinear", **IMAGENET),
    note="the normalised [CLS]",
)

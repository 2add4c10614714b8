"""What transformers' ViT families have in common: names of settings and of weights, and usual preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registerlens.config import Activation, Preprocess
from registerlens.loading.family import Reader, activation, pair, read, rows_of
from registerlens.loading.weights import Weight, concat, positions, take, tokens

ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP_STATISTICS: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


def square(size: int, **steps: Any) -> Preprocess:
    """Resized to a square, as transformers resizes."""
    return Preprocess(resize=(size, size), arithmetic="transformers", **steps)


COMMON: dict[str, Reader] = {
    "n_layers": read("num_hidden_layers"),
    "d_model": read("hidden_size"),
    "n_heads": read("num_attention_heads"),
    "image_size": pair("image_size"),
    "patch_size": pair("patch_size"),
    "n_channels": read("num_channels"),
    "act_fn": activation("hidden_act", ACTIVATION_NAMES),
    "norm_eps": read("layer_norm_eps"),
}
"""What nearly every configuration says under the same name."""

PATCH: dict[str, Weight] = {
    "embed.patch.weight": take("embeddings.patch_embeddings.projection.weight"),
    "embed.patch.bias": take("embeddings.patch_embeddings.projection.bias"),
    "embed.prefix": tokens("embeddings.cls_token", "embeddings.distillation_token", "embeddings.register_tokens"),
    "embed.W_pos": positions("embeddings.position_embeddings"),
    "ln_final.w": take("layernorm.weight"),
    "ln_final.b": take("layernorm.bias"),
}
"""Embeddings and final norm of the families around ViT and DINOv2."""

CLASSIFIER: dict[str, Weight] = {
    "head.linear.weight": take("classifier.weight"),
    "head.linear.bias": take("classifier.bias"),
}
CLASSIFIER_CONFIG: dict[str, Reader] = {"d_out": rows_of("classifier.weight")}

ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
"""The usual names of query, key, value and output maps in a block."""
FC = ("mlp.fc1", "mlp.fc2")
"""The usual names of the MLP's two maps."""

OLD_ATTENTION = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
"""How checkpoints name what the modules call q_proj, k_proj, v_proj and o_proj since transformers 5."""
OLD_VIT = (
    (r"^encoder\.layer\.", "layers."),
    *OLD_ATTENTION,
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
"""The same for the families around ViT."""


def block(
    at: str, parts: Mapping[str, str], attention: tuple[str, str, str, str], mlp: tuple[str, str]
) -> dict[str, Weight]:
    """The rules of a block from the source's names, relative to where it stands.

    Args:
        at: the path of block {i}.
        parts: our weight -> the source's, for what is taken as it is (norms, LayerScale).
        attention: query, key, value and output maps.
        mlp: its first and last linear map.
    """
    q, k, v, out = attention
    rules = {ours: take(f"{at}.{theirs}") for ours, theirs in parts.items()}
    for kind in ("weight", "bias"):
        rules[f"attn.qkv.{kind}"] = concat(*(f"{at}.{name}.{kind}" for name in (q, k, v)))
        rules[f"attn.out.{kind}"] = take(f"{at}.{out}.{kind}")
        rules[f"mlp.up.{kind}"] = take(f"{at}.{mlp[0]}.{kind}")
        rules[f"mlp.out.{kind}"] = take(f"{at}.{mlp[1]}.{kind}")
    return {f"blocks.{{i}}.{ours}": rule for ours, rule in rules.items()}


def norms(first: str, second: str) -> dict[str, str]:
    """The two norms of a block, weights and biases."""
    return {
        "ln1.w": f"{first}.weight",
        "ln1.b": f"{first}.bias",
        "ln2.w": f"{second}.weight",
        "ln2.b": f"{second}.bias",
    }

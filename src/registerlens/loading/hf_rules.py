"""What transformers' ViT families have in common: names of settings and of weights, and usual preprocessing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from registerlens.config import Preprocess
from registerlens.loading import weights
from registerlens.loading.family import Family, Reader, activation, pair, read, rows_of
from registerlens.loading.weights import Weight, concat, linear, norm, positions, tokens


def square(size: int, **steps: Any) -> Preprocess:
    """Resized to a square, as transformers resizes."""
    return Preprocess(resize=(size, size), arithmetic="transformers", **steps)


COMMON: dict[str, Reader] = {
    "n_layers": read("num_hidden_layers"),
    "d_model": read("hidden_size"),
    "n_heads": read("num_attention_heads"),
    "d_mlp": read("intermediate_size"),
    "image_size": pair("image_size"),
    "patch_size": pair("patch_size"),
    "n_channels": read("num_channels"),
    "act_fn": activation("hidden_act"),
    "norm_eps": read("layer_norm_eps"),
}
"""What nearly every configuration says under the same name."""

PATCH: dict[str, Weight] = {
    **linear("embed.patch", "embeddings.patch_embeddings.projection"),
    "embed.prefix": tokens("embeddings.cls_token", "embeddings.distillation_token", "embeddings.register_tokens"),
    "embed.W_pos": positions("embeddings.position_embeddings"),
    **norm("ln_final", "layernorm"),
}
"""Embeddings and final norm of the families around ViT and DINOv2."""

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
    at: str,
    norms: tuple[str, str],
    attention: tuple[str, str, str, str],
    mlp: tuple[str, str],
    taken: Mapping[str, str] | None = None,
) -> dict[str, Weight]:
    """The rules of a block whose queries, keys and values are separate maps; all but `attention` as for
    `registerlens.loading.weights.block`.

    Args:
        attention: query, key, value and output maps.
    """
    *qkv, out = attention
    joined = {
        f"blocks.{{i}}.attn.qkv.{kind}": concat(*(f"{at}.{name}.{kind}" for name in qkv)) for kind in ("weight", "bias")
    }
    return joined | weights.block(at, norms, out, mlp, taken or {})


def with_classifier(
    body: Family,
    source_class: str,
    config: dict[str, Reader] | None = None,
    *,
    ignore: tuple[str, ...] = (),
    note: str = "",
    **changes: Any,
) -> Family:
    """The same body under a linear classifier, whose weights stand beside the body's.

    Args:
        body: the family without it; its first prefix is what its keys begin with then.
        source_class: transformers' name of the class.
        config: what else is read in another way.
        ignore: globs of keys that are ignored besides the body's.
        note, changes: of the family.
    """
    return replace(
        body,
        source_class=source_class,
        config=body.config | {"d_out": rows_of("classifier.weight")} | (config or {}),
        weights=body.weights | linear("head.linear", "classifier"),
        ignore=(*body.ignore, *ignore),
        written_prefix=body.prefixes[0],
        unprefixed=("classifier.*",),
        note=note,
        **changes,
    )

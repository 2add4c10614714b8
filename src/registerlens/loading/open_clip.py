"""open_clip's towers as data: its VisionTransformer, and timm's models as TimmModel wraps them."""

from dataclasses import replace
from typing import Any

from registerlens.config import Preprocess, ViTConfig
from registerlens.config_parts import AttentionPoolConfig
from registerlens.errors import UnsupportedArchitectureError
from registerlens.loading.family import (
    CLIP,
    Family,
    Refusal,
    Sites,
    SourceModel,
    activation,
    fixed,
    has_weight,
    read,
    rows_of,
)
from registerlens.loading.timm import FAMILIES as TIMM_FAMILIES
from registerlens.loading.timm_parts import present
from registerlens.loading.weights import block, concat, either, linear, norm, part, positions, take, tokens, transpose

_POOLING = {"tok": ("cls",), "avg": ("mean",)}


def _width_out(source: SourceModel) -> int | None:
    return source.state["proj"].shape[1] if "proj" in source.state else None


_attends = present("attn_pool")


def _norm_after_pooling(source: SourceModel) -> bool:
    return _attends(source) or bool(source.get("final_ln_after_pool", False))


def _pooling(source: SourceModel) -> tuple[str, ...]:
    return ("attention",) if _attends(source) else _POOLING[source.get("pool_type")]


def _attn_pool(source: SourceModel) -> AttentionPoolConfig | None:
    """CoCa's pooler, of whose queries the first gives the image feature."""
    if not _attends(source):
        return None
    n_queries, width = source.weight("attn_pool.query").shape
    return AttentionPoolConfig(
        n_heads=source.get("attn_pool.attn.num_heads"),
        d_attn=width,
        n_queries=n_queries,
        norm_inputs=True,
        over="all",
    )


def _packed(cfg: ViTConfig) -> bool:
    """Whether torch keeps the pooler's query, key and value weights as one: where its two widths are equal."""
    return cfg.attn_pool is not None and cfg.attn_pool.d_attn == cfg.d_model


_POOLER = "attn_pool.attn"
_POOLER_WEIGHTS = {
    "head.attn.queries": take("attn_pool.query"),
    **norm("head.attn.ln_q", "attn_pool.ln_q"),
    **norm("head.attn.ln_k", "attn_pool.ln_k"),
    "head.attn.q.weight": either(_packed, part(f"{_POOLER}.in_proj_weight", 0, of=3), take(f"{_POOLER}.q_proj_weight")),
    "head.attn.q.bias": part(f"{_POOLER}.in_proj_bias", 0, of=3),
    "head.attn.kv.weight": either(
        _packed,
        part(f"{_POOLER}.in_proj_weight", 1, of=3, count=2),
        concat(f"{_POOLER}.k_proj_weight", f"{_POOLER}.v_proj_weight"),
    ),
    "head.attn.kv.bias": part(f"{_POOLER}.in_proj_bias", 1, of=3, count=2),
    **linear("head.attn.out", f"{_POOLER}.out_proj"),
}

_VISUAL = Family(
    library="open_clip",
    source_class="VisionTransformer",
    example="open_clip:ViT-B-16/laion2b_s34b_b88k",
    prefixes=("visual.",),
    config={
        "n_layers": lambda source: len(source.get("transformer.resblocks")),
        "d_model": lambda source: source.weight("class_embedding").shape[0],
        "n_heads": read("transformer.resblocks.0.attn.num_heads"),
        "d_mlp": rows_of("transformer.resblocks.0.mlp.c_fc.weight"),
        "image_size": read("image_size"),
        "patch_size": read("patch_size"),
        "n_channels": read("conv1.in_channels"),
        "act_fn": activation("transformer.resblocks.0.mlp.gelu"),
        "norm_eps": read("transformer.resblocks.0.ln_1.eps"),
        "patch_bias": fixed(False),
        "pos_interpolation": fixed("bicubic_antialias"),
        "ln_pre": has_weight("ln_pre.weight"),
        "qkv_bias": has_weight("transformer.resblocks.0.attn.in_proj_bias"),
        "layer_scale": has_weight("transformer.resblocks.0.ls_1.gamma"),
        "final_norm": lambda source: not _norm_after_pooling(source),
        "pool_norm": _norm_after_pooling,
        "pooling": _pooling,
        "attn_pool": _attn_pool,
        "d_out": _width_out,
        "head_bias": fixed(False),
    },
    weights={
        "embed.patch.weight": take("conv1.weight"),
        "embed.prefix": tokens("class_embedding", flat=True),
        "embed.W_pos": positions("positional_embedding", flat=True),
        "head.linear.weight": transpose("proj"),
    }
    | norm("ln_pre", "ln_pre")
    | norm("ln_final", "ln_post")
    | norm("head.ln", "ln_post")
    | block(
        "transformer.resblocks.{i}",
        ("ln_1", "ln_2"),
        "attn.out_proj",
        ("mlp.c_fc", "mlp.c_proj"),
        {
            "attn.qkv.weight": "attn.in_proj_weight",
            "attn.qkv.bias": "attn.in_proj_bias",
            "attn.out.gamma": "ls_1.gamma",
            "mlp.out.gamma": "ls_2.gamma",
        },
    )
    | _POOLER_WEIGHTS,
    sites=Sites(
        images="conv1",
        ln_pre="ln_pre",
        blocks="transformer.resblocks",
        norm="ln_1",
        attention="attn",
        mlp_out="mlp.c_proj",
    ),
    refuse=(
        Refusal("two attentional poolers (attentional_pool='parallel' or 'cascade')", present("attn_pool_contrastive")),
        Refusal(
            "an average over the attentional pooler's queries (pool_type='avg')",
            lambda source: _attends(source) and source.get("pool_type") != "tok",
        ),
        Refusal("no pooling (pool_type='none')", lambda source: source.get("pool_type") not in _POOLING),
        Refusal(
            "custom residual blocks (qk_norm, scaled cosine attention, scaled heads)",
            lambda source: type(source.get("transformer.resblocks.0")).__name__ != "ResidualAttentionBlock",
        ),
    ),
    preprocess=Preprocess(resize=(224, 224), crop=(224, 224), **CLIP),
    note="OpenAI's (quick_gelu) and LAION's (GELU) vision towers, CoCa's with its pooler",
)

# TimmModel -----------------------------------------------------------------------------------------------------------

WRAPPER = "TimmModel"
_REFUSED_HEADS = (
    Refusal("an MLP projection (timm_proj='mlp')", lambda source: "head.mlp.fc1.weight" in source.state),
    Refusal(
        "pooling after the trunk (timm_pool='abs_attn' or 'rot_attn')",
        lambda source: any(key.startswith("head.pool.") for key in source.state),
    ),
)


def name_of_wrapper(module: Any) -> str:
    """The family of a TimmModel: its trunk's class, and whether a projection follows the trunk.

    Example:
        >>> from types import SimpleNamespace
        >>> name_of_wrapper(SimpleNamespace(trunk=object(), head=[]))
        'TimmModel with object'
    """
    projected = hasattr(module.head, "proj")
    return f"{WRAPPER} with {type(module.trunk).__name__}{' and projection' if projected else ''}"


_EXAMPLES = {
    "VisionTransformer": "open_clip:ViT-B-16-SigLIP/webli",
    "Eva": "open_clip:EVA02-B-16/merged2b_s8b_b131k",
}


def wrapped(trunk: Family) -> tuple[Family, Family]:
    """The families of a TimmModel around a timm family: as it is, and with open_clip's projection after it."""
    plain = replace(
        trunk,
        library="open_clip",
        source_class=f"{WRAPPER} with {trunk.source_class}",
        example=_EXAMPLES[trunk.source_class],
        described_at="trunk",
        prefixes=("visual.", "trunk.", *trunk.prefixes),
        written_prefix="trunk.",
        refuse=(*_REFUSED_HEADS, *trunk.refuse),
        preprocess=_VISUAL.preprocess,
        note="its output is the trunk's",
    )
    projected = replace(
        plain,
        source_class=f"{plain.source_class} and projection",
        unprefixed=("head.proj.*",),
        config=plain.config | {"d_out": rows_of("head.proj.weight"), "head_bias": has_weight("head.proj.bias")},
        weights=plain.weights | linear("head.linear", "head.proj"),
        note="timm_proj='linear'",
    )
    return plain, projected


# A distilled DeiT averages its two heads, which a projection after it would not see.
_TRUNKS = [family for family in TIMM_FAMILIES if "distillation_token" not in family.config]

FAMILIES = (_VISUAL, *(family for trunk in _TRUNKS for family in wrapped(trunk)))

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

"""What timm's ViT families have in common: how their parts are recognised, read and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from registerlens.config import ViTConfig
from registerlens.config_parts import AttentionPoolConfig, NormKind, QKNormConfig
from registerlens.errors import UnsupportedArchitectureError
from registerlens.loading.family import (
    Reader,
    Refusal,
    Sites,
    SourceModel,
    activation,
    columns_of,
    has_weight,
    read,
    rows_of,
)
from registerlens.loading.weights import (
    Weight,
    absent,
    alternatives,
    block,
    linear,
    made_of,
    norm,
    part,
    positions,
    rows,
    take,
    tokens,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


NORM_NAMES: dict[str, NormKind] = {
    "LayerNorm": "layer",
    "LayerNormFp32": "layer",
    "RmsNorm": "rms",
    "RmsNormFp32": "rms",
    "RMSNorm": "rms",
}

GATED = ("GluMlp", "SwiGLU")

_POOLING = {"token": ("cls",), "avg": ("mean",), "": (), "map": ("attention",)}


# Reading -------------------------------------------------------------------------------------------------------------


def _nothing(module: Any) -> bool:
    """Whether nothing stands there, or an Identity."""
    return module is None or type(module).__name__ == "Identity"


def present(path: str) -> Reader:
    """Whether a module stands at this path, rather than nothing or an Identity."""
    return lambda source: not _nothing(source.get(path, None))


def kind_of(path: str) -> Reader:
    """The class name of what stands at this path."""
    return lambda source: type(source.get(path, None)).__name__


def pooling(source: SourceModel) -> tuple[str, ...]:
    """What the head reads.

    Raises:
        UnsupportedArchitectureError: pooling that is no mean, token or attention.
    """
    pool = source.get("global_pool")
    if pool not in _POOLING:
        raise UnsupportedArchitectureError(
            f"timm's pooling global_pool={pool!r} is not supported; known: {sorted(_POOLING)}."
        )
    return ("mean_all",) if pool == "avg" and source.get("pool_include_prefix", False) else _POOLING[pool]


def qk_norm(source: SourceModel) -> QKNormConfig | None:
    """The norm on queries and keys of each head."""
    norm = source.get("blocks.0.attn.q_norm", None)
    if _nothing(norm):
        return None
    return QKNormConfig(kind=NORM_NAMES[type(norm).__name__], eps=norm.eps)


def attn_pool(over: Callable[[SourceModel], str]) -> Reader:
    """The attention pooling, if there is one; `over` says which tokens it looks at."""

    def reader(source: SourceModel) -> AttentionPoolConfig | None:
        pool = source.get("attn_pool", None)
        if pool is None:
            return None
        return AttentionPoolConfig(
            n_heads=pool.num_heads,
            d_attn=source.get("embed_dim"),
            project_query="attn_pool.q.weight" in source.state,
            qkv_bias="attn_pool.kv.bias" in source.state,
            d_mlp=rows_of("attn_pool.mlp.fc1.weight")(source),
            act_fn=activation("attn_pool.mlp.act")(source),
            over=over(source),  # type: ignore[arg-type]
        )

    return reader


def _n_registers(source: SourceModel) -> int:
    registers: Any = source.get("reg_token")
    return 0 if registers is None else registers.shape[1]


CONFIG: dict[str, Reader] = {
    "n_layers": lambda source: len(source.get("blocks")),
    "d_model": read("embed_dim"),
    "n_heads": read("blocks.0.attn.num_heads"),
    "d_head": read("blocks.0.attn.head_dim"),
    "d_mlp": columns_of("blocks.0.mlp.fc2.weight"),
    "image_size": read("patch_embed.img_size"),
    "patch_size": read("patch_embed.patch_size"),
    "n_channels": read("patch_embed.proj.in_channels"),
    "act_fn": activation("blocks.0.mlp.act"),
    "gated_mlp": lambda source: kind_of("blocks.0.mlp")(source) in GATED,
    "mlp_norm": has_weight("blocks.0.mlp.norm.weight"),
    "norm": lambda source: NORM_NAMES[kind_of("blocks.0.norm1")(source)],
    "norm_eps": read("blocks.0.norm1.eps"),
    "patch_norm": has_weight("patch_embed.norm.weight"),
    "patch_bias": has_weight("patch_embed.proj.bias"),
    "class_token": lambda source: source.get("cls_token") is not None,
    "n_trained_registers": _n_registers,
    "positions": lambda source: "learned" if "pos_embed" in source.state else "none",
    "pos_interpolation": lambda source: "bicubic_antialias",
    "ln_pre": has_weight("norm_pre.weight"),
    "qk_norm": qk_norm,
    "attn_norm": has_weight("blocks.0.attn.norm.weight"),
    "final_norm": has_weight("norm.weight"),
    "pooling": pooling,
    "pool_norm": has_weight("fc_norm.weight"),
    "d_out": rows_of("head.weight"),
    "head_bias": has_weight("head.bias"),
}
"""What both families say in the same place."""


# Weights -------------------------------------------------------------------------------------------------------------


def _up(key: str) -> Weight:
    """The MLP's first map, or the second half of it where the first half is the gate."""

    def build(tensor: Tensor, cfg: ViTConfig) -> Tensor:
        return tensor.chunk(2)[1].contiguous() if cfg.gated_mlp else tensor

    return made_of(key, build, lambda tensor, cfg: tensor, 1)


_BLOCK = "blocks.{i}"

WEIGHTS: dict[str, Weight] = {
    **linear("embed.patch", "patch_embed.proj"),
    **norm("embed.norm", "patch_embed.norm"),
    "embed.prefix": tokens("cls_token", "dist_token", "reg_token"),
    "embed.W_pos": positions("pos_embed"),
    **norm("ln_pre", "norm_pre"),
    **block(_BLOCK, ("norm1", "norm2"), "attn.proj", ("mlp.fc1", "mlp.fc2"), {}),
    **linear(f"{_BLOCK}.attn.qkv", f"{_BLOCK}.attn.qkv"),
    **norm(f"{_BLOCK}.attn.q_norm.norm", f"{_BLOCK}.attn.q_norm"),
    **norm(f"{_BLOCK}.attn.k_norm.norm", f"{_BLOCK}.attn.k_norm"),
    **norm(f"{_BLOCK}.attn.ln", f"{_BLOCK}.attn.norm"),
    f"{_BLOCK}.attn.out.bias": alternatives(take(f"{_BLOCK}.attn.proj.bias"), absent("d_model")),
    f"{_BLOCK}.mlp.gate.weight": alternatives(part(f"{_BLOCK}.mlp.fc1.weight", 0), take(f"{_BLOCK}.mlp.fc1_g.weight")),
    f"{_BLOCK}.mlp.gate.bias": alternatives(
        part(f"{_BLOCK}.mlp.fc1.bias", 0), take(f"{_BLOCK}.mlp.fc1_g.bias"), absent("d_mlp")
    ),
    f"{_BLOCK}.mlp.up.weight": alternatives(_up(f"{_BLOCK}.mlp.fc1.weight"), take(f"{_BLOCK}.mlp.fc1_x.weight")),
    f"{_BLOCK}.mlp.up.bias": alternatives(
        _up(f"{_BLOCK}.mlp.fc1.bias"), take(f"{_BLOCK}.mlp.fc1_x.bias"), absent("d_mlp")
    ),
    **norm(f"{_BLOCK}.mlp.ln", f"{_BLOCK}.mlp.norm"),
    f"{_BLOCK}.mlp.out.bias": alternatives(take(f"{_BLOCK}.mlp.fc2.bias"), absent("d_model")),
    **norm("ln_final", "norm"),
    "head.attn.queries": rows("attn_pool.latent"),
    **linear("head.attn.q", "attn_pool.q"),
    **linear("head.attn.kv", "attn_pool.kv"),
    **linear("head.attn.out", "attn_pool.proj"),
    **norm("head.attn.mlp.ln", "attn_pool.norm"),
    **linear("head.attn.mlp.up", "attn_pool.mlp.fc1"),
    **linear("head.attn.mlp.out", "attn_pool.mlp.fc2"),
    **norm("head.ln", "fc_norm"),
    **linear("head.linear", "head"),
}
"""What both families call the same; LayerScale is named differently."""

SITES = Sites(
    images="patch_embed", ln_pre="norm_pre", blocks="blocks", norm="norm1", attention="attn", mlp_out="mlp.fc2"
)


# Refusing ------------------------------------------------------------------------------------------------------------


def _norms(source: SourceModel) -> Iterator[nn.Module]:
    """Every norm of the model but those on queries and keys, which have a setting of their own."""
    blocks = [f"blocks.{i}.{name}" for i in range(len(source.get("blocks"))) for name in ("norm1", "norm2")]
    blocks += ["blocks.0.attn.norm", "blocks.0.mlp.norm"]
    for path in ("patch_embed.norm", "norm_pre", *blocks, "norm", "attn_pool.norm", "fc_norm"):
        if present(path)(source):
            yield source.get(path)


def _odd_norm(source: SourceModel) -> bool:
    own = [source.get(f"blocks.0.attn.{kind}_norm", None) for kind in "qk"]
    every = [*_norms(source), *(norm for norm in own if not _nothing(norm))]
    return any(
        type(norm).__name__ not in NORM_NAMES or getattr(norm, "weight", None) is None or norm.eps is None
        for norm in every
    )


def _mixed_norms(source: SourceModel) -> bool:
    return len({(NORM_NAMES[type(norm).__name__], norm.eps) for norm in _norms(source)}) > 1


def _is(path: str, *names: str) -> Reader:
    """Whether what stands at this path, in any block, is of one of these classes."""

    def reader(source: SourceModel) -> bool:
        paths = (path.replace("{i}", str(i)) for i in range(len(source.get("blocks"))))
        return any(kind_of(each)(source) in names for each in paths)

    return reader


def refusals(block: str, attention: Sequence[str]) -> tuple[Refusal, ...]:
    """What makes a model unsupported.

    Args:
        block: the class its blocks must have.
        attention: the classes their attention may have.
    """
    mlps = ("Mlp", *GATED)
    return (
        Refusal(
            "a convolutional stem, or another patch embedding than one strided convolution",
            lambda source: kind_of("patch_embed")(source) != "PatchEmbed",
        ),
        Refusal(
            "attention and MLP in parallel (ParallelScalingBlock)",
            _is(_BLOCK, "ParallelScalingBlock", "DiffParallelScalingBlock"),
        ),
        Refusal("several attentions and MLPs in parallel (ParallelThingsBlock)", _is(_BLOCK, "ParallelThingsBlock")),
        Refusal("norms after the sublayers (post-norm)", _is(_BLOCK, "ResPostBlock", "EvaBlockPostNorm")),
        Refusal("differential attention", _is(f"{_BLOCK}.attn", "DiffAttention")),
        Refusal(f"blocks other than timm's {block}", lambda source: kind_of("blocks.0")(source) != block),
        Refusal("another kind of attention", lambda source: kind_of("blocks.0.attn")(source) not in attention),
        Refusal(
            f"an MLP other than timm's {', '.join(mlps)}", lambda source: kind_of("blocks.0.mlp")(source) not in mlps
        ),
        Refusal(
            "a gated MLP whose gate comes last (gate_last)",
            lambda source: kind_of("blocks.0.mlp")(source) == "GluMlp" and source.get("blocks.0.mlp.gate_last"),
        ),
        Refusal("gated attention", present("blocks.0.attn.gate")),
        Refusal("fewer keys and values than queries (grouped-query attention)", _grouped),
        Refusal("a normalisation other than LayerNorm and RMSNorm with weights", _odd_norm),
        Refusal("norms of several kinds or epsilons", _mixed_norms),
        Refusal("norms inside attention pooling (qk_norm)", present("attn_pool.q_norm")),
        Refusal("several queries in attention pooling", lambda source: source.get("attn_pool.latent_len", 1) != 1),
        Refusal("positions inside attention pooling", lambda source: "attn_pool.pos_embed" in source.state),
        Refusal("padding of the image (dynamic_img_pad)", read("patch_embed.dynamic_img_pad", False)),
    )


def _grouped(source: SourceModel) -> bool:
    attentions = (source.get(f"blocks.{i}.attn") for i in range(len(source.get("blocks"))))
    return any(
        getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads for attention in attentions
    )

"""What reads the residual stream, as linear functionals: quantity = vector . stream + constant, at frozen norms.

Norm scales, queries and rotations are constants taken from the run, so that the contributions of all writers add up.
Everything here runs backwards: from what a receiver takes to the vector that it reads the stream with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from registerlens.config import TokenLayout, ViTConfig
from registerlens.errors import ConfigError, ShapeError
from registerlens.model.attention import Rotation
from registerlens.model.block import Block
from registerlens.model.norms import LayerNorm, Norm
from registerlens.model.parts import at_least_float32
from registerlens.model.vit import HookedViT
from registerlens.theory.readers import fold

Space = Literal["output", "tokens"]
Direction = int | Float[Tensor, " d_read"]
"""A class, or a vector: of the model's output (such as a text direction), or of its tokens after the final norm."""
PARTS = {
    "cls": "[CLS]",
    "distillation": "the distillation token",
    "mean": "the mean patch",
    "mean_all": "the mean token",
}


def output_width(vit: HookedViT) -> int:
    """Numbers a token or an image has in the model's output.

    Example:
        >>> import registerlens as rl
        >>> output_width(rl.HookedViT.from_pretrained("registerlens:tiny"))
        52
    """
    return vit.cfg.d_pooled if vit.cfg.d_out is None else vit.cfg.d_out


def space_of(vit: HookedViT, width: int, space: Space | None) -> Space:
    """Where vectors of a width live: in the model's output if they fit there, else among its tokens.

    Raises:
        ShapeError: they fit neither, or not where they are said to live.
    """
    fits: dict[str, int] = {"output": output_width(vit), "tokens": vit.cfg.d_model}
    for name, own in fits.items():
        if own == width and space in (None, name):
            return "output" if name == "output" else "tokens"
    raise ShapeError(
        f"A direction of {width} numbers does not fit{'' if space is None else f' space={space!r}'}: the model's "
        f"output has {fits['output']}, a token after the final norm {fits['tokens']}."
    )


def check_class(vit: HookedViT, index: int) -> None:
    """Refuse a class that the model does not have.

    Raises:
        ConfigError: the model has no head, so no classes.
        ShapeError: there are not so many.
    """
    if vit.head.linear is None:
        raise ConfigError(
            f"Class {index} was asked for, but this model has no head. Give a direction: a vector of "
            f"{vit.cfg.d_model} numbers, such as a row of a probe, or one of rl.evaluation.zero_shot_head for a "
            "CLIP-like model."
        )
    check_output(vit, index)


def check_output(vit: HookedViT, index: int) -> None:
    """Refuse an output that the model does not have; of one without a head, the dimensions of what it pools count.

    Raises:
        ShapeError: there are not so many.
    """
    if not 0 <= index < output_width(vit):
        raise ShapeError(f"Class {index} does not exist: the model's output has 0 to {output_width(vit) - 1}.")


def pool_weights(part: str, layout: TokenLayout) -> Float[Tensor, " pos"]:
    """How much each token counts in what the head pools under this name; float64, on the CPU.

    Example:
        >>> import torch, registerlens as rl
        >>> layout = rl.HookedViT.from_pretrained("registerlens:tiny").layout(torch.rand(1, 3, 16, 16))
        >>> pool_weights("mean", layout)
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    weights = torch.zeros(layout.n_tokens, dtype=torch.float64)
    where = {
        "cls": layout.cls,
        "distillation": layout.distillation,
        "mean": layout.patches,
        "mean_all": slice(layout.patches.stop),
    }[part]
    weights[where] = 1.0
    return weights / weights.sum()


@dataclass(frozen=True)
class Readout:
    """A number for each image, linear in the tokens that enter the final norm once the norms' scales are known."""

    vit: HookedViT
    words: str
    space: Space
    vector: Float[Tensor, " d_read"]
    """In its space: a unit vector of the output for a class."""
    parts: dict[str, Float[Tensor, " d_model"]]
    """What each pooled token is multiplied with before the final norm divides; norms' weights folded in, float64."""
    pooled_constant: float
    """What the final norm's bias adds, before a norm after pooling divides."""
    constant: float
    """What later biases add."""

    @classmethod
    def of(cls, vit: HookedViT, direction: Direction, space: Space | None = None) -> Readout:
        """The reading of a class or a vector.

        Raises:
            ConfigError: a class of a model without head, or the output of attention pooling, which is not linear in
                the tokens.
            ShapeError: the class does not exist, or the vector does not fit.
        """
        head, cfg = vit.head, vit.cfg
        if isinstance(direction, int):
            check_class(vit, direction)
            words, space = f"class {direction}", "output"
            direction = torch.eye(output_width(vit))[direction]
        else:
            words, space = "a given direction", space_of(vit, len(direction), space)
        vector = direction.detach().double().cpu()
        token = "cls" if cfg.class_token else "mean"
        if space == "tokens":
            pooled, constant, names = vector, 0.0, (token,)
        else:
            if head.attn is not None:
                raise ConfigError(
                    f"This model pools by attention, so that its output is not linear in its tokens. Give a direction "
                    f"of the tokens (space='tokens', {cfg.d_model} numbers), or use rl.circuits.path_patching."
                )
            pooled, constant = _before_linear(head.linear, vector)
            names = cfg.pooling or (token,)
        ln = head.ln if space == "output" else None
        constant += _bias(ln, pooled)
        pooled = fold(ln or nn.Identity(), pooled[:, None].to(vit.device))[:, 0].cpu()
        shares = pooled.split(cfg.d_model)
        parts: dict[str, Tensor] = {}
        for name, share in zip(names, shares, strict=True):
            parts[name] = parts.get(name, 0) + fold(vit.ln_final, share[:, None].to(vit.device))[:, 0]
        inner = sum(_bias(vit.ln_final, share) for share in shares)
        where = " and ".join(PARTS[name] for name in parts)
        return cls(vit, f"{words} at {where}", space, vector, parts, inner, constant)

    @property
    def pool_norm(self) -> nn.Module | None:
        """The norm between pooling and what is read, if there is one."""
        return self.vit.head.ln if self.space == "output" else None

    def measure(self, tokens: Float[Tensor, "batch pos d_model"], layout: TokenLayout) -> Float[Tensor, " batch"]:
        """The number itself, from the tokens after the final norm, through the model's own modules; before a tanh."""
        head, wide = self.vit.head, at_least_float32(tokens.dtype)
        if self.space == "output":
            pooled = head.pool(tokens, layout)
            pooled = pooled if head.ln is None else head.ln(pooled)
            tokens = pooled if head.linear is None else head.linear(pooled)
        if tokens.ndim == 3:
            tokens = tokens[:, layout.cls] if layout.cls is not None else tokens[:, layout.patches].mean(1)
        return tokens.to(wide) @ self.vector.to(tokens.device, wide)


def _before_linear(linear: nn.Linear | None, vector: Tensor) -> tuple[Tensor, float]:
    if linear is None:
        return vector, 0.0
    weight = linear.weight.detach().double().cpu()
    constant = 0.0 if linear.bias is None else float(linear.bias.detach().double().cpu() @ vector)
    return weight.T @ vector, constant


def _bias(norm: nn.Module | None, vector: Tensor) -> float:
    """What a norm's bias adds to a reading; for parts side by side each part has the bias."""
    if not isinstance(norm, LayerNorm):
        return 0.0
    return float(norm.b.detach().double().cpu() @ vector)


@dataclass(frozen=True)
class Reading:
    """A linear functional of the stream at some places."""

    vectors: Float[Tensor, "*place d_model"]
    """What the stream is multiplied with."""
    constants: Float[Tensor, "*place"]
    """What is added: biases of norms and weights."""


def through_norm(
    norm: Norm, x: Float[Tensor, "*place width"], reading: Float[Tensor, "*place width"]
) -> tuple[Float[Tensor, "*place width"], Float[Tensor, "*place"]]:
    """From a reading of norm(x) to one of x, with the scale frozen: the vector, and the bias's constant.

    Example:
        >>> from registerlens.model.norms import LayerNorm
        >>> norm, x, reading = LayerNorm(4, 1e-6), torch.arange(4.0), torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> vector, constant = through_norm(norm, x, reading)
        >>> bool(torch.isclose(vector @ x + constant, norm(x) @ reading))
        True
    """
    bias = norm.affine(torch.zeros_like(norm.w)).to(x.dtype)
    # Taking out the mean is a symmetric projection: it is its own adjoint.
    return norm.centre(norm.w.to(x.dtype) * reading) / scale_of(norm, x), reading @ bias


def scale_of(norm: Norm, x: Float[Tensor, "*place width"]) -> Float[Tensor, "*place 1"]:
    """What a norm divides x by, past its hook point."""
    return (norm.centre(x).square().mean(-1, keepdim=True) + norm.eps).sqrt()


def read_keys(
    vit: HookedViT,
    layer: int,
    stream: Float[Tensor, "token d_model"],
    positions: Int[Tensor, " token"],
    queries: Float[Tensor, "token head d_head"],
    layout: TokenLayout,
) -> Reading:
    """How the heads of a block read tokens as keys: q . k / sqrt(d_head) as a functional of what enters the block.

    Args:
        vit: the model.
        layer: the block.
        stream: the residual stream before it.
        positions: where in the sequence each token stands.
        queries: for each token the query it is scored by, as the scores take it: normalised and turned.
        layout: of the sequence.

    Returns:
        vectors [token, head, d_model].
    """
    block = cast(Block, vit.blocks[layer])
    attn, dtype = block.attn, stream.dtype
    g = queries * attn.d_head**-0.5
    if vit.rotary is not None:
        turn = vit.rotary(layout, vit.embed.patch.weight)[layer]
        back = Rotation(turn.cos[positions], -turn.sin[positions], turn.interleaved)
        g = back(g[None])[0]
    # One copy of all keys for each head's score: a norm over all heads mixes them.
    own = torch.eye(attn.n_heads, dtype=dtype, device=g.device)
    spread = einsum(g, own, "token head d, head key -> token head key d")
    constants = torch.zeros_like(g[..., 0])
    if attn.k_norm is not None:
        wide = block.ln1.normalise(stream.to(block.ln1.w.dtype)).to(dtype)
        k = einsum(wide, attn.W_K.to(dtype), "token d_model, key d_model d -> token key d") + attn.b_K.to(dtype)
        pattern = "token ... (group key) d -> token ... group (key d)"
        groups = rearrange(k[:, None], pattern, key=attn.k_norm.together).expand(-1, attn.n_heads, -1, -1)
        spread, biases = through_norm(attn.k_norm.norm, groups, rearrange(spread, pattern, key=attn.k_norm.together))
        spread = rearrange(spread, "token head group (key d) -> token head (group key) d", d=attn.d_head)
        constants = constants + biases.sum(-1)
    constants = constants + einsum(spread, attn.b_K.to(dtype), "token head key d, key d -> token head")
    read = einsum(spread, attn.W_K.to(dtype), "token head key d, key d_model d -> token head d_model")
    vectors, biases = through_norm(block.ln1, stream[:, None].expand_as(read), read)
    return Reading(vectors, constants + biases)


def read_writes(
    vit: HookedViT, layer: int, z: Float[Tensor, "*place head d_head"], reading: Float[Tensor, "*place d_model"]
) -> tuple[Float[Tensor, "*place head d_head"], Float[Tensor, "*place"]]:
    """From a reading of what attention writes to one of the heads' z, any norm before W_O frozen, and its constant."""
    attn = cast(Block, vit.blocks[layer]).attn
    by_head = einsum(reading, attn.W_O.to(reading.dtype), "... d_model, head d d_model -> ... head d")
    if attn.ln is None:
        return by_head, torch.zeros_like(reading[..., 0])
    flat, constants = through_norm(attn.ln, z.flatten(-2), by_head.flatten(-2))
    return rearrange(flat, "... (head d) -> ... head d", d=attn.d_head), constants


# The output ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputReading:
    """How the model's output reads the final stream."""

    vectors: Float[Tensor, "batch pos d_model"]
    """Each token's; zero where the output does not look at it."""
    constants: Float[Tensor, "batch pos"]
    """Each token's share of the final norm's bias."""
    bias: Float[Tensor, " batch"]
    """The head's own bias, and that of a norm after pooling."""
    whole: Float[Tensor, " batch"]
    """The quantity itself."""


def why_no_output(cfg: ViTConfig) -> str | None:
    """Why the output is not linear in the final stream even with norms frozen; None where it is.

    Example:
        >>> why_no_output(ViTConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, image_size=(8, 8), patch_size=(4, 4)))
    """
    if cfg.attn_pool is not None:
        return "The output is not part of the circuit: attention pooling stands between the tokens and the output."
    return None


def output_words(cfg: ViTConfig, target: int | None) -> str:
    """What of the output is measured, in words."""
    what = "the output's own direction" if target is None else f"output {target}"
    return f"{what}{' before its tanh' if cfg.head_act else ''}"


def run_head(
    vit: HookedViT, final: Float[Tensor, "batch pos d_model"], layout: TokenLayout
) -> tuple[Float[Tensor, "batch *width"], Float[Tensor, "batch *out"]]:
    """From the final stream to what the head pools and to its output before any tanh; axis `pos` where none pools."""
    head = vit.head
    tokens = vit.ln_final(final.to(vit.dtype))
    pooled = head.pool(tokens, layout) if head.pooling else tokens
    normed = pooled if head.ln is None else head.ln(pooled)
    out = normed if head.linear is None else head.linear(normed)
    return pooled.to(final.dtype), out.to(final.dtype)


def direction_of(out: Float[Tensor, "batch *out"], target: int | None) -> Float[Tensor, "batch *out"]:
    """The vector that the output is projected on: one class, or the output's own unit vector."""
    if target is None:
        return out / out.norm(dim=-1, keepdim=True)
    direction = torch.zeros_like(out)
    direction[..., target] = 1
    return direction


def project(
    out: Float[Tensor, "batch *out"], direction: Float[Tensor, "batch *out"], readers: Float[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """The quantity: the projection, where nothing is pooled its mean over the readers."""
    projected = (direction * out).sum(-1)
    return (projected * readers).sum(1) if projected.ndim == 2 else projected


def read_output(
    vit: HookedViT,
    final: Float[Tensor, "batch pos d_model"],
    layout: TokenLayout,
    readers: Float[Tensor, "batch pos"],
    target: int | None,
) -> OutputReading:
    """The output's functional of the final stream: one class, or the projection on the output's own direction.

    Where nothing is pooled the quantity is the mean over the reading tokens, of each on its own output.

    Args:
        vit: the model.
        final: the stream after the last block.
        layout: of the sequence.
        readers: how much each token counts as a reader; sums to 1.
        target: an output; None for the own direction.
    """
    head = vit.head
    pooled, out = run_head(vit, final, layout)
    direction = direction_of(out, target)
    g, bias = direction, torch.zeros_like(out[..., 0])
    if head.linear is not None:
        g = direction @ head.linear.weight.to(out.dtype)
        bias = bias if head.linear.bias is None else direction @ head.linear.bias.to(out.dtype)
    if head.ln is not None:
        g, more = through_norm(head.ln, pooled, g)
        bias = bias + more
    if head.pooling:
        shares = torch.stack([pool_weights(part, layout) for part in head.pooling]).to(g)
        g = einsum(rearrange(g, "b (part d) -> b part d", part=len(shares)), shares, "b part d, part pos -> b pos d")
    else:
        g, bias = g * readers[..., None], (bias * readers).sum(1)
    vectors, constants = g, torch.zeros_like(g[..., 0])
    if isinstance(vit.ln_final, Norm):
        vectors, constants = through_norm(vit.ln_final, final, g)
    return OutputReading(vectors, constants, bias, project(out, direction, readers))

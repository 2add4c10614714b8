"""Who reads the residual stream after a block: later values and MLPs, and the head, as matrices behind their norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from registerlens.errors import NonFiniteError
from registerlens.model.block import Block
from registerlens.model.vit import HookedViT
from registerlens.theory.subspaces import fold

KERNELS = ("value", "ov", "ov_head", "mlp", "head")
"""The kernel conditions: W_V of all heads, W_V W_O summed over heads, the same head by head (where there are several),
W_in, the head."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One linear map from the normalised stream."""

    condition: str
    """One of KERNELS."""
    layer: int
    """Its block; for the head the number of blocks."""
    head: int
    """Its attention head; -1 where that means nothing."""
    norm: nn.Module
    """What stands before it."""
    weight: Float[Tensor, "d_model out"]
    """Reads a normalised token x as x @ weight."""

    @property
    def name(self) -> str:
        """For messages: "block 3, ov_head 5"."""
        if self.condition == "head":
            return "The head"
        return f"Block {self.layer}, {self.condition}" + (f" {self.head}" if self.head >= 0 else "")


def readers_of(vit: HookedViT, first: int) -> Iterator[Reader]:
    """The readers from block `first` on, one at a time: their weights are made when they are asked for.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> [(reader.condition, reader.layer) for reader in readers_of(vit, 5)]
        [('value', 5), ('ov', 5), ('mlp', 5), ('head', 6)]
    """
    for layer in range(first, vit.cfg.n_layers):
        block = cast(Block, vit.blocks[layer])
        attn = block.attn
        W_V, W_O = attn.W_V.detach().double(), attn.W_O.detach().double()
        if attn.ln is not None:  # a norm between the two: its weight and centring belong to W_O
            W_O = fold(attn.ln, W_O.flatten(0, 1)).view_as(W_O)
        values = rearrange(W_V, "head d_model d_head -> d_model (head d_head)")
        yield Reader(condition="value", layer=layer, head=-1, norm=block.ln1, weight=values)
        summed = values @ rearrange(W_O, "head d_head d_model -> (head d_head) d_model")
        yield Reader(condition="ov", layer=layer, head=-1, norm=block.ln1, weight=summed)
        if len(W_V) > 1:  # a single head is the sum already
            # ||x W_V W_O|| = ||x W_V R^T|| with W_O^T = Q R: d_head columns instead of d_model.
            triangles = torch.linalg.qr(W_O.mT, mode="r").R
            for head, weight in enumerate(W_V @ triangles.mT):
                yield Reader(condition="ov_head", layer=layer, head=head, norm=block.ln1, weight=weight)
        yield Reader(condition="mlp", layer=layer, head=-1, norm=block.ln2, weight=block.mlp.W_read)
    if (reader := head_weight(vit)) is not None:
        pool = vit.head.attn
        norm = (pool and pool.ln_k) or (vit.ln_final if vit.cfg.final_norm else vit.head.ln) or vit.ln_final
        yield Reader(condition="head", layer=vit.cfg.n_layers, head=-1, norm=norm, weight=reader)


def head_weight(vit: HookedViT) -> Float[Tensor, "d_model read"] | None:
    """What of the head reads the tokens: keys and values of the pooling attention, or the linear map; None without.

    One column a class and pooled part: a direction counts wherever the head would read it.
    """
    if vit.head.attn is not None:
        return vit.head.attn.kv.weight.T
    if vit.head.linear is None:
        return None
    return rearrange(vit.head.linear.weight, "out (part d_model) -> d_model (part out)", d_model=vit.cfg.d_model)


def check_finite(vit: HookedViT, first: int) -> None:
    """Every weight from block `first` on is a number.

    Raises:
        NonFiniteError: one holds NaN or infinity; it is named.
    """
    before = tuple(f"blocks.{layer}." for layer in range(first))
    for name, parameter in vit.named_parameters():
        asked = name.startswith(("blocks.", "ln_final", "head")) and not name.startswith(before)
        if asked and not parameter.isfinite().all():
            n = int((~parameter.isfinite()).sum())
            raise NonFiniteError(
                f"{name} holds NaN or infinity in {n} of {parameter.numel()} places, so that no kernel of it can be "
                f"known. Reload the weights; float16 checkpoints may have overflowed."
            )


def closed_dimensions(vit: HookedViT, first: int) -> dict[str, int]:
    """How many dimensions the norms from block `first` on scale to nothing, by the norm's name; singular ones only.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> closed_dimensions(vit, 2)
        {}
    """
    norms: dict[str, nn.Module] = {"ln_final": vit.ln_final}
    for layer in range(first, vit.cfg.n_layers):
        block = cast(Block, vit.blocks[layer])
        norms |= {f"blocks.{layer}.ln1": block.ln1, f"blocks.{layer}.ln2": block.ln2}
    closed = {}
    for name, norm in sorted(norms.items()):
        scale = getattr(norm, "w", None)
        if scale is not None and (n := int((scale.abs() <= torch.finfo(scale.dtype).eps * scale.abs().max()).sum())):
            closed[name] = n
    return closed

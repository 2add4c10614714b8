"""The sink of a head: its strongest key, what that key writes beside the others, and how alike a head's outputs are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.model.block import Block
from registerlens.model.parts import at_least_float32
from registerlens.model.vit import HookedViT

_SCORES_AT_ONCE = 2**20
"""Scores of a chunk of queries: few enough for the processor's cache, enough for a matrix product to be worth it."""
_LARGEST_EXPONENT = 60.0
"""Of scores that are exponentiated as they are: a million of them still sum up to a finite float32."""
QUERIES = 0.9
"""Share of the queries that must be drawn to a key for a sink event (Fesser et al. 2026)."""


@dataclass(frozen=True)
class StrongestKey:
    """The key that draws the most attention, in each image and head."""

    position: Int[Tensor, "batch head"]
    """s = argmax over keys of the mean attention."""
    received: Float[Tensor, "batch head"]
    """Attention the average query pays it, 0 to 1."""
    column: Float[Tensor, "batch head query"]
    """Attention each query pays it."""
    strength: Float[Tensor, "batch head"]
    """The largest threshold at which it is a sink event: the wanted share of the queries pays it at least this."""


def strongest_key(pattern: Float[Tensor, "batch head query key"], queries: float = QUERIES) -> StrongestKey:
    """The favourite key of each image and head, and how strong a sink it is to this share of the queries; float32.

    Source: Fesser et al. 2026 (2606.08105).

    Example:
        >>> pattern = torch.tensor([[[[0.9, 0.1], [0.6, 0.4]]]])
        >>> found = strongest_key(pattern)
        >>> found.position.item(), round(found.received.item(), 3), round(found.strength.item(), 3)
        (0, 0.75, 0.6)
    """
    received, position = pattern.mean(2, dtype=torch.float32).max(-1)
    where = position[..., None, None].expand(-1, -1, pattern.shape[2], 1)
    return _strongest(position, received, pattern.gather(-1, where)[..., 0].float(), queries)


def strongest_key_of(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key head d_head"], queries: float = QUERIES
) -> StrongestKey:
    """`strongest_key` of the pattern these queries and keys make, which is never held: a few queries at a time.

    Example:
        >>> q, k = torch.randn(2, 1, 5, 3, 8, generator=torch.Generator().manual_seed(0))
        >>> pattern = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
        >>> torch.allclose(strongest_key_of(q, k).column, strongest_key(pattern).column)
        True
    """
    batch, n, head, _ = q.shape
    scaled = rearrange(q * q.shape[-1] ** -0.5, "batch query head d_head -> (batch head) query d_head")
    keys = rearrange(k, "batch key head d_head -> (batch head) d_head key")
    received = torch.empty(len(keys), keys.shape[-1], dtype=torch.float32, device=q.device)
    log_mass = torch.empty(len(keys), n, dtype=torch.float32, device=q.device)
    # By Cauchy-Schwarz. Where no exponential can overflow, the two passes that look for the highest score are saved.
    small = scaled.norm(dim=-1).amax(-1) * keys.norm(dim=1).amax(-1) <= _LARGEST_EXPONENT
    for rows, plain in ((small.nonzero()[:, 0], True), ((~small).nonzero()[:, 0], False)):
        if len(rows):
            received[rows], log_mass[rows] = _reduced(scaled[rows], keys[rows], plain)
    average, position = (received / n).max(-1)
    key = keys.gather(-1, position[:, None, None].expand(-1, keys.shape[1], 1))
    column = ((scaled @ key)[..., 0].float() - log_mass).exp()
    shape = (batch, head)
    return _strongest(position.unflatten(0, shape), average.unflatten(0, shape), column.unflatten(0, shape), queries)


def _reduced(
    scaled: Float[Tensor, "row query d_head"], keys: Float[Tensor, "row d_head key"], plain: bool
) -> tuple[Float[Tensor, "row key"], Float[Tensor, "row query"]]:
    """What each key receives from all queries together, and the logarithm of each query's sum of exponentials.

    `plain` promises scores so small that they can be exponentiated as they are.
    """
    received = torch.zeros(len(keys), keys.shape[-1], dtype=torch.float32, device=keys.device)
    masses = []
    for some in scaled.split(max(1, _SCORES_AT_ONCE // (len(keys) * keys.shape[-1])), 1):
        scores = (some @ keys).float()
        highest = 0.0 if plain else scores.amax(-1, keepdim=True)
        weights = (scores if plain else scores.sub_(highest)).exp_()
        mass = weights.sum(-1, keepdim=True)
        received += (mass.reciprocal().mT @ weights)[:, 0]
        masses.append((mass.log() + highest)[..., 0])
    return received, torch.cat(masses, 1)


def _strongest(position: Tensor, received: Tensor, column: Tensor, queries: float) -> StrongestKey:
    n = column.shape[-1]
    drawn = max(1, math.ceil(queries * n - 1e-9))  # the product may lie just above a whole number
    return StrongestKey(position, received, column, column.kthvalue(n - drawn + 1).values)


def output_factor(W_O: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head rank d_head"]:
    """R of W_O^T = Q R: `R v` has the norms and angles of the output `v W_O`, in d_head numbers; float32 at least.

    Example:
        >>> W_O, v = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3)
        >>> torch.allclose((output_factor(W_O)[0] @ v).norm(), (v @ W_O[0]).norm())
        True
    """
    return torch.linalg.qr(W_O.to(at_least_float32(W_O.dtype)).mT, mode="r").R


def output_factors(vit: HookedViT) -> list[Float[Tensor, "head rank d_head"]]:
    """`output_factor` of every block, LayerScale included."""
    return [output_factor(cast(Block, block).attn.W_O.detach()) for block in vit.blocks]


def stable_rank(x: Float[Tensor, "*batch row column"]) -> Float[Tensor, "*batch"]:
    """||X||_F^2 / sigma_1^2, by the small Gram matrix X^T X; NaN where X is zero.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 2.0, 1.0])))
        tensor(2.2500)
    """
    values = torch.linalg.eigvalsh(x.mT @ x)
    return values.clamp_min(0).sum(-1) / values[..., -1]


def norm_over_others(norms: Float[Tensor, "event key"], position: Int[Tensor, " event"]) -> Float[Tensor, " event"]:
    """The norm at a position over the mean of all others; NaN where all are zero, infinite where only the others are.

    Example:
        >>> norm_over_others(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([0]))
        tensor([0.2500])
    """
    own = norms.gather(-1, position[:, None])[:, 0]
    return own * (norms.shape[-1] - 1) / (norms.sum(-1) - own).clamp_min(0)

"""Against what a number counts as small or large: random directions, and other neurons of the same layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.model.block import Block
from registerlens.model.vit import HookedViT
from registerlens.theory.subspaces import fold

N_RANDOM = 1000
"""Random directions a number is compared with; the smallest p-value is 1 / 1001."""
N_NEURONS = 500
"""At most this many other neurons of a layer."""

Vector = Literal["u1", "u2"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where numbers stand in a null distribution; every field has the shape of the numbers."""

    typical: Float[Tensor, "item *quantity"]
    """Median of the null."""
    spread: Float[Tensor, "item *quantity"]
    """Standard deviation of the null."""
    percentile: Float[Tensor, "item *quantity"]
    """Share of the null below the number, in percent; ties count half."""
    p: Float[Tensor, "item *quantity"]
    """One-sided p-value: how often the null is at least as extreme, (1 + hits) / (1 + samples)."""


def stand(
    values: Float[Tensor, "item *quantity"],
    null: Float[Tensor, "sample *quantity"],
    extreme: Literal["low", "high"],
) -> Standing:
    """Rank numbers in a null distribution.

    Args:
        values: the numbers; several quantities are ranked each in its own null.
        null: samples of each quantity; without any, the standing is NaN throughout.
        extreme: whether low or high numbers are what the null should not produce.

    Example:
        >>> found = stand(torch.tensor([0.0]).double(), torch.arange(1, 100).double(), "low")
        >>> found.percentile.item(), found.p.item()
        (0.0, 0.01)
    """
    if not len(null):
        nothing = torch.full_like(values, torch.nan)
        return Standing(typical=nothing, spread=nothing, percentile=nothing, p=nothing)
    below = (null[:, None] < values).double().mean(0)
    tied = (null[:, None] == values).double().mean(0)
    beyond = (below if extreme == "low" else 1 - below - tied) + tied
    n = len(null)
    return Standing(
        typical=null.median(0).values.expand_as(values),
        spread=null.std(0, correction=0).expand_as(values),
        percentile=100 * (below + tied / 2),
        p=(1 + n * beyond) / (1 + n),
    )


def random_units(n: int, dimensions: int, generator: torch.Generator) -> Float[Tensor, "sample dimension"]:
    """Unit vectors drawn uniformly from a sphere, float64.

    Uniform is uniform in every orthonormal basis, so that one draw serves every matrix: its entries are the
    coefficients of a random direction in that matrix's singular vectors.

    Example:
        >>> units = random_units(3, 5, torch.Generator().manual_seed(0))
        >>> units.shape, bool((units.norm(dim=1) - 1).abs().max() < 1e-12)
        (torch.Size([3, 5]), True)
    """
    return F.normalize(torch.randn(n, dimensions, dtype=torch.float64, generator=generator), dim=1)


def weights_of(
    vit: HookedViT, layer: int, neurons: Int[Tensor, " neuron"] | None = None
) -> dict[Vector, Float[Tensor, "neuron d_model"]]:
    """What neurons of a block read and write in the raw residual stream, float64.

    u1 is the neuron's input weights with the LayerNorm before them folded in, centred as LayerNorm centres: up to the
    token's own scale and a constant, the pre-activation is u1 . x. u2 is the neuron's row of W_out, LayerScale folded
    in.

    Args:
        vit: the model.
        layer: the block.
        neurons: which of its neurons; default: all.

    Source: Jiang et al. 2025, Proposition 1.

    Example:
        >>> import registerlens as rl
        >>> weights_of(rl.HookedViT.from_pretrained("registerlens:tiny"), 1, torch.tensor([183]))["u2"].shape
        torch.Size([1, 64])
    """
    block = cast(Block, vit.blocks[layer])
    chosen = slice(None) if neurons is None else neurons.to(block.mlp.W_out.device)
    return {
        "u1": fold(block.ln2, block.mlp.W_in[:, chosen]).T,
        "u2": block.mlp.W_out[chosen].detach().double(),
    }


def other_neurons(
    vit: HookedViT, layer: int, neurons: RegisterNeurons, generator: torch.Generator
) -> dict[Vector, Float[Tensor, "neuron d_model"]]:
    """u1 and u2 of at most N_NEURONS neurons of a block that are not in the list and neither read nor write nothing."""
    listed = set(neurons.by_layer().get(layer, ()))
    others = torch.tensor([n for n in range(vit.cfg.d_mlp) if n not in listed], dtype=torch.long)
    sample = others[torch.randperm(len(others), generator=generator)[:N_NEURONS]]
    weights = weights_of(vit, layer, sample)
    alive = (weights["u1"].norm(dim=1) > 0) & (weights["u2"].norm(dim=1) > 0)
    return {name: vectors[alive] for name, vectors in weights.items()}

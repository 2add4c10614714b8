"""Who reads the residual stream after a block (values, MLPs, the head), and which of its directions they read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from registerlens.errors import NonFiniteError
from registerlens.model.block import Block
from registerlens.model.norms import LayerNorm
from registerlens.model.vit import HookedViT

EPSILONS = (0.3, 0.1, 0.03, 0.01, 0.001)
"""Singular values below this share of the largest count as zero: the numerical kernel, swept."""
FLOOR = 1e-7
"""Singular values below this share of the largest are zero to us: the square root of float64's precision and some."""


def centred(norm: nn.Module, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Directions as a norm lets them pass: LayerNorm takes the mean out, any other norm leaves them."""
    return vectors - vectors.mean(-1, keepdim=True) if isinstance(norm, LayerNorm) else vectors


def fold(norm: nn.Module, weight: Float[Tensor, "*head d_model out"]) -> Float[Tensor, "*head d_model out"]:
    """The map from the raw stream that a weight after a norm amounts to, float64: P diag(w) W.

    A norm divides by the token's own scale, which is left out: kernels and directions do not depend on it. P takes the
    mean out (LayerNorm only).

    Example:
        >>> ln = LayerNorm(4, 1e-6)
        >>> fold(ln, torch.ones(4, 1)).flatten()  # LayerNorm hides the all-ones direction
        tensor([0., 0., 0., 0.], dtype=torch.float64)
    """
    weight = weight.detach().double()
    scale = getattr(norm, "w", None)
    if scale is not None:
        weight = weight * scale.detach().double()[:, None]
    return centred(norm, weight.mT).mT


def directions(norm: nn.Module, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Unit vectors of what a norm lets pass, float64.

    The length is taken after centring: a norm rescales what is left, so that a token dominated by u has the direction
    of u without its mean, whatever the mean was. A vector of which nothing is left stays zero.
    """
    return F.normalize(centred(norm, vectors.detach().double()), dim=-1)


def dimensions(norm: nn.Module, d_model: int) -> int:
    """Dimensions of the space of directions that a norm lets pass: one fewer after a LayerNorm."""
    return d_model - isinstance(norm, LayerNorm)


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Which directions of the stream a linear map reads, and how strongly."""

    largest: float
    """The largest singular value."""
    singular: Float[Tensor, " rank"]
    """Singular values over the largest, descending; those below FLOOR are left out."""
    basis: Float[Tensor, "d_model rank"]
    """The directions they belong to, as columns; orthonormal."""
    dimensions: int
    """Dimensions of the space of directions that reach the map."""

    def shares(self, units: Float[Tensor, "item d_model"]) -> Float[Tensor, "item rank"]:
        """Squared coefficients of unit vectors in the basis; they sum to 1 less the share in the kernel."""
        return (units.to(self.basis) @ self.basis).square().cpu()

    @property
    def typical_residual(self) -> float:
        """Root mean square of a random direction's relative residual, exact."""
        return float((self.singular.square().sum() / self.dimensions).sqrt())

    def measure(self, shares: Float[Tensor, "item dimension"]) -> Float[Tensor, "item quantity"]:
        """The relative residual, and the share inside the numerical kernel for each of EPSILONS.

        Args:
            shares: squared coefficients of unit vectors, as `shares` gives them, or of random directions in any
                orthonormal basis (the first `rank` of them count).

        Returns:
            column 0 is ||M^T u|| / (sigma_max ||u||), 0 to 1; the others are 0 (all of u is read) to 1 (nothing is).
        """
        shares, singular = shares[:, : len(self.singular)], self.singular.cpu()
        residual = (shares @ singular.square()).sqrt()
        cumulative = F.pad(shares.cumsum(1), (1, 0))
        read = [int((singular >= epsilon).sum()) for epsilon in EPSILONS]
        kernel = (1 - cumulative[:, read]).clamp(0, 1)
        return torch.cat([residual[:, None], torch.round(kernel, decimals=12)], dim=1)


def decompose(norm: nn.Module, weight: Float[Tensor, "d_model out"]) -> Spectrum | None:
    """The left singular vectors and values of a folded weight; None where it reads nothing at all.

    Computed from the Gram matrix of the shorter side, several times faster than a singular value decomposition and as
    good for singular values above FLOOR.

    Example:
        >>> found = decompose(nn.Identity(), torch.tensor([[3.0, 0.0], [0.0, 0.3], [0.0, 0.0]]))
        >>> found.largest, found.singular
        (3.0, tensor([1.0000, 0.1000], dtype=torch.float64))
        >>> found.measure(found.shares(torch.eye(3).double()))[:, :3]  # residual, kernel for eps 0.3 and 0.1
        tensor([[1.0000, 0.0000, 0.0000],
                [0.1000, 1.0000, 0.0000],
                [0.0000, 1.0000, 1.0000]], dtype=torch.float64)
    """
    folded = fold(norm, weight)
    d_model, out = folded.shape
    wide = out >= d_model
    squares, vectors = torch.linalg.eigh(folded @ folded.T if wide else folded.T @ folded)
    singular, vectors = squares.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    largest = float(singular[0])
    if not largest:
        return None
    kept = singular > FLOOR * largest
    singular, vectors = singular[kept], vectors[:, kept]
    return Spectrum(
        largest=largest,
        singular=singular / largest,
        basis=vectors if wide else folded @ vectors / singular,
        dimensions=dimensions(norm, d_model),
    )


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

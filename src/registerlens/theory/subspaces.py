"""What a linear map reads of the residual stream: LayerNorm folded in, one decomposition, everything else from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from registerlens.model.norms import LayerNorm

EPSILONS = (0.3, 0.1, 0.03, 0.01, 0.001)
"""Singular values below this share of the largest count as zero: the numerical kernel, swept."""
FLOOR = 1e-7
"""Singular values below this share of the largest are zero to us: the square root of float64's precision and some."""


def centred(norm: nn.Module, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Directions as a norm lets them pass: LayerNorm takes the mean out, any other norm leaves them."""
    return vectors - vectors.mean(-1, keepdim=True) if isinstance(norm, LayerNorm) else vectors


def fold(norm: nn.Module, weight: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
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
    return centred(norm, weight.T).T


def directions(norm: nn.Module, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Unit vectors of what a norm lets pass, float64.

    The length is taken after centring: a norm rescales what is left, so that a token dominated by u has the direction
    of u without its mean, whatever the mean was. A vector of which nothing is left stays zero.
    """
    return F.normalize(centred(norm, vectors.detach().double()), dim=-1)


def dimensions(norm: nn.Module, d_model: int) -> int:
    """Of the space of directions that a norm lets pass: one fewer after a LayerNorm."""
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
    """Of the space of directions that reach the map."""

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

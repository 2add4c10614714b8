"""What the propositions' bounds are made of: attention beside the sink, Lipschitz constants, float64's own error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.config import Activation
from registerlens.errors import ConfigError

Activations = Sequence[int | float] | Float[np.ndarray, " activation"]
"""Register activations as a caller gives them."""
ACTIVATION_GRID: tuple[float, ...] = tuple(10.0 ** (i / 8) for i in range(33))
"""The register activations looked at by default: 1 to 10,000, eight a decade."""

SLACK = 1e-12
"""Relative error of a softmax in float64, generously."""
_SLOPE: dict[Activation, float] = {"relu": 1.0, "gelu": 1.12905, "gelu_tanh": 1.12905, "quick_gelu": 1.0999}
"""The largest slopes, rounded up."""


def lipschitz(phi: Activation, radius: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
    """A Lipschitz constant of the nonlinearity between -radius and radius; only relu2's depends on the radius.

    Example:
        >>> lipschitz("relu", torch.tensor(3.0)), lipschitz("relu2", torch.tensor(3.0))
        (tensor(1.), tensor(6.))
    """
    return 2 * radius if phi == "relu2" else torch.full_like(radius, _SLOPE[phi])


def attention_beside(
    scores: Float[Tensor, "*rest query key"], sink: int
) -> tuple[Float[Tensor, "*rest query key"], Float[Tensor, "*rest query"], Float[Tensor, "*rest query"]]:
    """Attention; what of it every query gives to other tokens than the sink; and the closed-form bound of that.

    With m other keys and the gap, the smallest difference between the sink's score and another's, the sink's share is
    1 / (1 + sum of exp(s_j - s_sink)) >= 1 / (1 + m exp(-gap)), so that the others' is at most 1 / (1 + exp(gap) / m).

    Example:
        >>> pattern, beside, bound = attention_beside(torch.tensor([[3.0, 0.0, 0.0]]), 0)
        >>> round(float(beside), 6), round(float(bound), 6)
        (0.090557, 0.090557)
    """
    pattern = scores.softmax(-1)
    others = torch.arange(scores.shape[-1]) != sink
    gap = scores[..., sink] - scores[..., others].amax(-1)
    small, m = (-gap.abs()).exp(), scores.shape[-1] - 1  # neither overflows, and the bound does not underflow early
    return pattern, pattern[..., others].sum(-1), torch.where(gap > 0, m * small / (1 + m * small), m / (m + small))


def spectral(matrix: Float[Tensor, "row column"]) -> float:
    """The largest singular value.

    Example:
        >>> spectral(torch.diag(torch.tensor([3.0, 4.0])))
        4.0
    """
    return float(torch.linalg.matrix_norm(matrix, 2))


def exceeds(measured: Float[np.ndarray, "*rest"], bound: Float[np.ndarray, "*rest"]) -> Bool[np.ndarray, "*rest"]:
    """Where a softmax's share is above its bound by more than the rounding of its sums.

    Example:
        >>> exceeds(np.array([0.5, 0.5 + 1e-9]), np.array([0.5, 0.5]))
        array([False,  True])
    """
    return measured > bound * (1 + SLACK) + np.finfo(float).tiny


def rounding(*matrices: Float[Tensor, "_ _"]) -> float:
    """How far float64 can be off after a vector of length one went through these matrices in turn.

    A product with a matrix W adds at most (rows of W) eps |W|_F times the length that enters (Higham 2002, section
    3.5); 8 stands for the sums, the attention and the difference of two outputs around them.
    """
    growth = math.prod(float(matrix.norm()) for matrix in matrices)
    return 8 * sum(len(matrix) for matrix in matrices) * torch.finfo(torch.float64).eps * growth


def checked_activations(activations: Activations) -> Float[np.ndarray, " activation"]:
    """The activations as an array.

    Raises:
        ConfigError: there is none, or they are not positive, finite and increasing.

    Example:
        >>> checked_activations([1, 10])
        array([ 1., 10.])
    """
    values = np.array(activations, dtype=float)  # a copy, which the report keeps
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or not (values > 0).all():
        raise ConfigError(f"activations must be positive, finite numbers, at least one; got {activations!r}.")
    if (np.diff(values) <= 0).any():
        raise ConfigError(f"activations must increase, so that a limit can be seen; got {activations!r}.")
    return values

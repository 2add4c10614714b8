"""The conditions of Proposition 1, measured on the exact two-block model, and what its bounds are made of."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.config import Activation
from registerlens.errors import ConfigError
from registerlens.theory.two_block import CONDITIONS, REGISTER, TwoBlockModel

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


TOLERANCE = 1e-9
"""The model is exact: a condition holds up to rounding, or it does not hold."""

CONSEQUENCES: dict[str, str] = {
    "u1_mlp": "block 2's MLP sees beta u1, which the attention layer brought to [CLS]: no no-op",
    "u2_mlp": "block 2's MLP sees a v2, so that the output moves ever further as a grows: no no-op",
    "u1_head": "the head sees beta u1: no no-op",
    "u2_head": "the head sees a v2, so that the output moves ever further as a grows: no no-op",
    "dominance": "x_s does not tend to the direction v2, and what the other rows write is seen: no no-op",
    "alignment": "with beta <= 0 the neuron stays silent and x_s is no sink; with beta > 0 what of x_s is not along u1 "
    "is seen: no no-op",
    "query_key": "queries avoid x_s and attend to ordinary tokens: no sink, no no-op",
    "silence": "what the other neurons write at x_s is seen, whatever a: no no-op",
    "alone": "the strongest token becomes the sink in x_s's place; equals share",
}
"""What fails in the conclusion if one condition does."""


@dataclass(frozen=True, kw_only=True)
class ConditionCheck:
    """One condition, and whether it holds."""

    name: str
    """A key of CONDITIONS."""
    statement: str
    """The condition in words."""
    measured: float
    """Kernels: |W^T u| / (sigma_max |u|), 0 to 1. Dominance: longest other row that grows over |u2|, in the limit.
    Alignment: 1 - cos(x_s, u1). Query_key: smallest cosine of a query other than x_s with v2, at the largest
    activation. Silence: what other rows write at an aligned token, over |x_s|. Alone: the strongest other token's
    activation over that of an aligned x_s."""
    holds: bool
    """Up to rounding (TOLERANCE)."""


def relative_residual(W: Float[Tensor, "d_model width"], u: Float[Tensor, " d_model"]) -> float:
    """How far u is from the kernel of W^T: |W^T u| / (sigma_max |u|), 0 (in it) to 1; 0 where W is zero.

    Example:
        >>> relative_residual(torch.diag(torch.tensor([2.0, 1.0, 0.0])), torch.tensor([0.0, 3.0, 4.0]))
        0.30000001192092896
    """
    largest = spectral(W)
    return float((W.T @ u).norm() / (largest * u.norm())) if largest else 0.0


def check_conditions(model: TwoBlockModel, activation: float) -> tuple[ConditionCheck, ...]:
    """Every condition of CONDITIONS, in their order, each measured so that it does not depend on the others.

    What concerns the token that fires (dominance, silence, alone) is measured at a token of x_s's length along u1, so
    that a wrong alignment is reported once.

    Example:
        >>> model = TwoBlockModel.build(broken={"dominance": 0.5})
        >>> [(found.name, round(found.measured, 9)) for found in check_conditions(model, 1e4) if not found.holds]
        [('dominance', 0.5)]
    """
    u1, v2, x_s = model.u1, model.v2, model.tokens[model.sink]
    quiet, growing = ~model.grows, model.grows.clone()
    growing[REGISTER] = False
    written = model.act(model.aligned @ model.W_in1[:, quiet]) @ model.W_out1[quiet]
    rows = model.W_out1.norm(dim=1)
    queries = model.after_block1(torch.tensor(activation, dtype=torch.float64))[model.others]
    measured = {
        "u1_mlp": relative_residual(model.W_in2, u1),
        "u2_mlp": relative_residual(model.W_in2, v2),
        "u1_head": relative_residual(model.W_head, u1),
        "u2_head": relative_residual(model.W_head, v2),
        "dominance": float(torch.where(growing, rows, 0.0).max() / rows[REGISTER]),
        # half the squared distance of the unit vectors: 1 - cos without cancellation
        "alignment": float((x_s / x_s.norm() - u1 / u1.norm()).square().sum() / 2),
        "query_key": float((queries @ v2 / queries.norm(dim=1)).min()),
        "silence": float(written.norm() / x_s.norm()),
        "alone": float(model.firing[model.others].max()),
    }
    at_most = {"alone": 1 - TOLERANCE}
    return tuple(
        ConditionCheck(
            name=name,
            statement=CONDITIONS[name],
            measured=value,
            holds=value >= TOLERANCE if name == "query_key" else value <= at_most.get(name, TOLERANCE),
        )
        for name, value in measured.items()
    )


def in_words(conditions: Iterable[ConditionCheck]) -> str:
    """Which conditions hold, and what follows where one does not.

    Example:
        >>> in_words(check_conditions(TwoBlockModel.build(), 1e4))
        'All 9 conditions hold.'
    """
    conditions = tuple(conditions)
    failed = [condition for condition in conditions if not condition.holds]
    if not failed:
        return f"All {len(conditions)} conditions hold."
    reasons = "; ".join(
        f"{condition.statement} ({condition.measured:.3g}): {CONSEQUENCES[condition.name]}" for condition in failed
    )
    return (
        f"{len(failed)} of {len(conditions)} conditions {'fails' if len(failed) == 1 else 'fail'}. Not so: {reasons}."
    )

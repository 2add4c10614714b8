"""The conditions of Proposition 1, measured on the exact two-block model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.theory.bounds import spectral
from registerlens.theory.two_block import CONDITIONS, REGISTER, TwoBlockModel

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
class Condition:
    """One condition, and whether it holds."""

    name: str
    """A key of CONDITIONS."""
    statement: str
    """In words."""
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


def check_conditions(model: TwoBlockModel, activation: float) -> tuple[Condition, ...]:
    """Every condition of CONDITIONS, in their order, each measured so that it does not depend on the others.

    What concerns the token that fires (dominance, silence, alone) is measured at a token of x_s's length along u1, so
    that a wrong alignment is told once.

    Example:
        >>> model = TwoBlockModel.build(broken={"dominance": 0.5})
        >>> [(found.name, round(found.measured, 9)) for found in check_conditions(model, 1e4) if not found.holds]
        [('dominance', 0.5)]
    """
    u1, v2, x_s = model.u1, model.v2, model.tokens[model.sink]
    others = torch.arange(model.n + 1) != model.sink
    quiet, growing = ~model.grows, model.grows.clone()
    growing[REGISTER] = False
    written = model.act(model.aligned @ model.W_in1[:, quiet]) @ model.W_out1[quiet]
    rows = model.W_out1.norm(dim=1)
    queries = model.after_block1(torch.tensor(activation, dtype=torch.float64))[others]
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
        "alone": float(model.firing[others].max()),
    }
    at_most = {"query_key": -TOLERANCE, "alone": 1 - TOLERANCE}
    signs = {"query_key": -1.0}
    return tuple(
        Condition(
            name=name,
            statement=CONDITIONS[name],
            measured=value,
            holds=signs.get(name, 1.0) * value <= at_most.get(name, TOLERANCE),
        )
        for name, value in measured.items()
    )


def in_words(conditions: Iterable[Condition]) -> str:
    """Which conditions hold, and what follows where one does not.

    Example:
        >>> in_words(check_conditions(TwoBlockModel.build(), 1e4))
        'All 9 conditions hold.'
    """
    conditions = tuple(conditions)
    failed = [found for found in conditions if not found.holds]
    if not failed:
        return f"All {len(conditions)} conditions hold."
    told = "; ".join(f"{found.statement} ({found.measured:.3g}): {CONSEQUENCES[found.name]}" for found in failed)
    return f"{len(failed)} of {len(conditions)} conditions {'fails' if len(failed) == 1 else 'fail'}. Not so: {told}."

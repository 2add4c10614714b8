"""Proposition 1 on the exact model: an attention sink that is a no-op, at every activation with its bounds.

Write x' for the stream after block 1, a for the register activation, D for what attention adds to [CLS], p for the
share of [CLS]'s attention that the sink s draws. Out of D = p x'_s + sum over j != s of p_j x'_j the rest of the model
reads W_in2^T D and W_head^T D only. Let, for either matrix W,

    M_W   = max over j != s of |W^T x'_j|                        what ordinary tokens would bring in
    rho_W = |beta| |W^T u1| + |a_s| |W^T v2| + |W^T e_s|          kernel residuals; x'_s = beta u1 + a_s v2 + e_s

where beta is x_s's coefficient along u1, a_s the register neuron's write at x_s (a, if x_s is aligned), and e_s all
else: what other neurons write there, and what of x_s is not along u1. As p <= 1 and 1 - p <= m with
m = 1 / (1 + exp(gap) / n), where the gap is the smallest difference of the sink's score to another,

    |W^T D| <= p rho_W + (1 - p) M_W <= rho_W + m M_W =: B_W.

Output with attention minus output without it is W_head^T D + W_head^T W_out2^T [phi(h + W_in2^T D) - phi(h)] with
h = W_in2^T x'_cls. phi has the Lipschitz constant L on [-R, R], R = max |h| + B_in, which both arguments keep to (for
ReLU, GELU and its kin L does not depend on R). Hence

    deviation <= B_head + L sigma_max(W_out2 W_head) B_in.

If all conditions hold, rho = 0, M does not depend on a (what grows along v2 is in the kernels), and the gap of every
query grows at least linearly in a: q . (x'_s - x'_j) = (1 - firing_j) a q . v2 + O(1) for a query that does not fire,
and as a^2 for one that does. So the attention elsewhere and the deviation fall at least as fast as exp(-const a).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.results import FINITE, Result
from registerlens.theory.bounds import (
    ACTIVATION_GRID,
    Activations,
    attention_beside,
    checked_activations,
    exceeds,
    lipschitz,
    rounding,
    spectral,
)
from registerlens.theory.conditions import Condition, check_conditions, in_words
from registerlens.theory.two_block import CLS, TwoBlockModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

SINK = 0.99
"""A token is a sink when every query gives it at least this share of its attention."""
NO_OP = 1e-6
"""Attention is a no-op when the output moves by at most this share of its norm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PropositionReport(Result):
    """Sink and no-op against the register activation, each beside its bound, and which conditions hold."""

    setup: dict[str, Any]
    """Sizes, nonlinearity and seed of the model."""
    conditions: tuple[Condition, ...]
    """Every condition."""
    activations: Float[np.ndarray, " activation"] = field(metadata=FINITE)
    """What the register neuron writes at an aligned x_s: phi(|x_s| |u1|) |u2|, a length in the residual stream."""
    beside: Float[np.ndarray, "activation query"]
    """Attention of every query to tokens other than x_s, 0 to 1; [CLS] first."""
    beside_bound: Float[np.ndarray, "activation query"]
    """Its bound, 1 - 1 / (1 + n exp(-gap))."""
    deviation: Float[np.ndarray, " activation"]
    """Euclidean distance of the output from that of the model without block 2's attention."""
    deviation_bound: Float[np.ndarray, " activation"]
    """Its bound, as the module derives it."""
    rounding: Float[np.ndarray, " activation"]
    """How much of the deviation can be float64's rounding."""
    output_norm: Float[np.ndarray, " activation"]
    """Euclidean norm of the output without attention."""
    direction: Float[np.ndarray, " activation"]
    """Cosine of x_s after block 1 with v2; tends to 1 if |u2| dominates and x_s fires."""
    row_ratio: Float[np.ndarray, " activation"]
    """|u2| over the longest other row of W_out1."""

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the conditions that do not hold."""
        return tuple(found.name for found in self.conditions if not found.holds)

    @property
    def sink(self) -> bool:
        """Whether, at the largest activation, every query gives x_s at least SINK of its attention."""
        return bool((self.beside[-1] <= 1 - SINK).all())

    @property
    def no_op(self) -> bool:
        """Whether, at the largest activation, attention moves the output by at most NO_OP of its norm."""
        allowed = NO_OP * self.output_norm[-1] + self.rounding[-1]
        return bool(self.deviation[-1] <= allowed)

    @property
    def within_bounds(self) -> bool:
        """Whether nothing measured exceeds its bound, up to rounding."""
        attention = not exceeds(self.beside, self.beside_bound).any()
        return bool(attention and (self.deviation <= self.deviation_bound + self.rounding).all())

    def describe(self) -> str:
        """Conditions and conclusion in words."""
        worst = self.beside[-1].argmax()
        return (
            f"{in_words(self.conditions)} At activation {self.activations[-1]:.3g}, x_s is "
            f"{'a sink for every query' if self.sink else 'not a sink for every query'} (attention elsewhere at most "
            f"{self.beside[-1, worst]:.2g}, bound {self.beside_bound[-1, worst]:.2g}), and attention is "
            f"{'a no-op' if self.no_op else 'no no-op'} (the output moves by {self.deviation[-1]:.2g}, bound "
            f"{self.deviation_bound[-1]:.2g}, rounding {self.rounding[-1]:.1g}, its norm {self.output_norm[-1]:.3g})."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row an activation: [CLS]'s and the worst query's attention elsewhere, the deviation, and the bounds."""
        return pd.DataFrame(
            {
                "activation": self.activations,
                "sink_cls": 1 - self.beside[:, CLS],
                "beside_cls": self.beside[:, CLS],
                "beside_cls_bound": self.beside_bound[:, CLS],
                "beside_worst": self.beside.max(1),
                "beside_worst_bound": self.beside_bound.max(1),
                "deviation": self.deviation,
                "deviation_bound": self.deviation_bound,
                "rounding": self.rounding,
                "output_norm": self.output_norm,
                "direction": self.direction,
                "row_ratio": self.row_ratio,
            }
        )

    def plot(self) -> go.Figure:
        """The convergence curve: attention elsewhere and deviation, with their bounds."""
        from registerlens.viz.theory import proposition_figure  # noqa: PLC0415  (viz stands on results)

        return proposition_figure(self)


def verify_proposition(model: TwoBlockModel, activations: Activations = ACTIVATION_GRID) -> PropositionReport:
    """Let the register activation grow, and compare sink and no-op with their closed-form bounds.

    The bounds hold whether or not the conditions do; with all of them they tend to zero. The conditions are sufficient:
    a neuron of block 2 that stays silent anyhow, say a dead ReLU, does not see what its weights read. What fails with
    one condition broken (`registerlens.theory.conditions.CONSEQUENCES`):

    - u1 or u2 outside a kernel: x_s is a sink, but what it brings in is seen; with u2 the deviation grows like a;
    - no dominance: x_s tends to another direction than v2, and what the others write is seen;
    - beta <= 0: the neuron does not fire and x_s is no sink; misaligned but beta > 0: a sink, not a no-op;
    - q . k < 0: x_s is avoided, its attention tends to 0; [CLS] attends to ordinary tokens, which is no no-op.

    The paper's argument uses three more without saying so. Silence: the other neurons' writes at x_s do not grow, but
    [CLS] gets them, and nothing hides them. Alone: a token that fires more strongly takes the sink's place. And
    q . k > 0, for every query.

    Args:
        model: the exact model; `TwoBlockModel.build` makes one.
        activations: register activations, increasing.

    Raises:
        ConfigError: an activation is not a positive, finite number, or they do not increase.

    Source: Jiang et al. 2025, Proposition 1; the bounds are ours, derived in `registerlens.theory.proposition`.

    Example:
        >>> report = verify_proposition(TwoBlockModel.build(seed=1))
        >>> report.broken, report.sink, report.no_op, report.within_bounds
        ((), True, True, True)
        >>> report = verify_proposition(TwoBlockModel.build(seed=1, broken={"query_key": 1.0}))
        >>> report.broken, report.sink, report.no_op, report.within_bounds
        (('query_key',), False, False, True)
    """
    grid = checked_activations(activations)
    a = torch.from_numpy(grid)
    stream = model.after_block1(a)
    pattern, beside, beside_bound = attention_beside(model.scores(stream), model.sink)
    cls, x_s = stream[:, CLS], stream[:, model.sink]
    added = (pattern[:, CLS, None] @ stream)[:, 0]
    without = model.output(cls)
    bound, off = output_moves(
        model,
        cls,
        seen_by_mlp=_brought(model, model.W_in2, stream, a, beside_bound[:, CLS]),
        seen_by_head=_brought(model, model.W_head, stream, a, beside_bound[:, CLS]),
        longest=2 * stream.norm(dim=-1).amax(-1),
    )
    found = {
        "beside": beside,
        "beside_bound": beside_bound,
        "deviation": (model.output(cls + added) - without).norm(dim=-1),
        "deviation_bound": bound,
        "rounding": off,
        "output_norm": without.norm(dim=-1),
        "direction": x_s @ model.v2 / x_s.norm(dim=-1),
        "row_ratio": model.row_ratio(a),
    }
    return PropositionReport(
        setup=setup_of(model),
        conditions=check_conditions(model, float(grid[-1])),
        activations=grid,
        **{name: value.numpy() for name, value in found.items()},
    )


def setup_of(model: TwoBlockModel) -> dict[str, Any]:
    """Sizes, nonlinearity and seed, JSON-ready.

    Example:
        >>> setup_of(TwoBlockModel.build(n=4))["n"]
        4
    """
    d_model, d_mlp = model.W_in1.shape
    d_out = model.W_head.shape[1]
    return {"n": model.n, "d_model": d_model, "d_mlp": d_mlp, "d_out": d_out, "phi": model.phi, "seed": model.seed}


def _brought(
    model: TwoBlockModel,
    W: Float[Tensor, "d_model width"],
    stream: Float[Tensor, "activation token d_model"],
    activations: Float[Tensor, " activation"],
    beside: Float[Tensor, " activation"],
) -> Float[Tensor, " activation"]:
    """B_W of the module: the most that W reads of what attention adds to [CLS]."""
    u1_hat = model.u1 / model.u1.norm()
    along_u1 = (model.tokens[model.sink] @ u1_hat) * u1_hat
    a_s = activations * model.firing[model.sink]
    other = model.without_register(activations)[:, model.sink] - along_u1
    residual = (along_u1 @ W).norm() + a_s.abs() * (model.v2 @ W).norm() + (other @ W).norm(dim=-1)
    ordinary = torch.cat([stream[:, : model.sink], stream[:, model.sink + 1 :]], 1) @ W
    return residual + beside * ordinary.norm(dim=-1).amax(-1)


def output_moves(
    model: TwoBlockModel,
    cls: Float[Tensor, "activation d_model"],
    *,
    seen_by_mlp: Float[Tensor, " activation"],
    seen_by_head: Float[Tensor, " activation"],
    longest: Float[Tensor, " activation"],
) -> tuple[Float[Tensor, " activation"], Float[Tensor, " activation"]]:
    """How far the output can move when something is added to [CLS] before block 2's MLP; and float64's rounding.

    Args:
        model: the exact model.
        cls: [CLS] before.
        seen_by_mlp: at least |W_in2^T added|.
        seen_by_head: at least |W_head^T added|.
        longest: the length of [CLS] before and after is at most this.

    Source: the module's derivation.

    Example:
        >>> model, some = TwoBlockModel.build(), torch.ones(1, dtype=torch.float64)
        >>> bound, off = output_moves(model, model.rest[:1], seen_by_mlp=0 * some, seen_by_head=some, longest=some)
        >>> float(bound), bool(off < 1e-10)
        (1.0, True)
    """
    radius = (cls @ model.W_in2).abs().amax(-1) + seen_by_mlp
    slope = lipschitz(model.phi, radius)
    bound = seen_by_head + slope * spectral(model.W_out2 @ model.W_head) * seen_by_mlp
    off = longest * (rounding(model.W_head) + slope * rounding(model.W_in2, model.W_out2, model.W_head))
    return bound, off

"""Proposition 1 and Corollary 1 on the exact model: a sink that is a no-op, and the bias in its place, with bounds.

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

Corollary 1: the register neuron against an explicit attention bias (k', v') = (a_s v2, a_s v2). With the neuron, token
i's update is D_i = sum over j of p_ij x'_j. Without it, the stream is c = x' - a firing v2, and the bias adds one more
key and value: D'_i = sum over j of p'_ij c_j + p'_i a_s v2, with softmax over the n + 2 keys. As x'_s = c_s + a_s v2,
and shares of attention sum to one,

    D_i  = x'_s   + sum over j != s of p_ij (x'_j - x'_s),   so |D_i - x'_s|    <= m_i  max over j of |x'_j - x'_s|,
    D'_i = a_s v2 + sum over j of p'_ij (c_j - a_s v2),      so |D'_i - a_s v2| <= m'_i max over j of |c_j - a_s v2|,

where m_i and m'_i bound the attention beside the sink and beside the pair: 1 / (1 + exp(gap) / number of other keys).
So the difference D_i - D'_i tends to c_s, exactly: beta u1 if x_s is aligned and no other neuron writes there. It does
not vanish, as the paper's "+ a_s v2" suggests; but it is |x_s| / a of the update, and neither MLP nor head sees it.

The limit asks two things of a token: x'_i . v2 > 0, so that it attends to x_s, and c_i . v2 > 0, so that it attends to
the pair. For x_s itself the second reads u1 . u2 > 0, which the paper does not ask for.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.display import drawn_by, grid_table
from registerlens.results import FINITE, Result
from registerlens.theory.conditions import (
    ACTIVATION_GRID,
    Activations,
    ConditionCheck,
    attention_beside,
    check_conditions,
    checked_activations,
    exceeds,
    in_words,
    lipschitz,
    rounding,
    spectral,
)
from registerlens.theory.two_block import CLS, TwoBlockModel

Report = TypeVar("Report", bound="ExactReport")

SINK = 0.99
"""A token is a sink when every query gives it at least this share of its attention."""
NO_OP = 1e-6
"""Attention is a no-op when the output moves by at most this share of its norm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactReport(Result):
    """What was measured on an exact model, against the register activation."""

    setup: dict[str, Any]
    """Sizes, nonlinearity and seed of the model, and what else tells it from others."""
    conditions: tuple[ConditionCheck, ...]
    """Every condition of Proposition 1."""
    activations: Float[np.ndarray, " activation"] = field(metadata=FINITE)
    """What the register neuron writes at an aligned x_s: phi(|x_s| |u1|) |u2|, a length in the residual stream."""

    @classmethod
    def of(
        cls: type[Report],
        model: TwoBlockModel,
        activations: Float[np.ndarray, " activation"],
        measured: dict[str, Tensor],
        **setup: Any,
    ) -> Report:
        """The report on a model, whose conditions are checked at the largest activation."""
        d_model, d_mlp = model.W_in1.shape
        sizes = {"n": model.n, "d_model": d_model, "d_mlp": d_mlp, "d_out": model.W_head.shape[1]}
        return cls(
            setup=sizes | {"phi": model.phi, "seed": model.seed} | setup,
            conditions=check_conditions(model, float(activations[-1])),
            activations=activations,
            **{name: value.numpy() for name, value in measured.items()},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SinkReport(ExactReport):
    """Sink and no-op, each beside its bound."""

    beside: Float[np.ndarray, "activation ..."]
    """Attention of every query to tokens other than x_s, 0 to 1; [CLS] first."""
    beside_bound: Float[np.ndarray, "activation ..."]
    """Its bound, 1 - 1 / (1 + n exp(-gap))."""
    deviation: Float[np.ndarray, " activation"]
    """Euclidean distance of the output from that of the model without block 2's attention."""
    deviation_bound: Float[np.ndarray, " activation"]
    """Its bound, as the module derives it."""
    rounding: Float[np.ndarray, " activation"]
    """How much of the deviation can be float64's rounding."""
    output_norm: Float[np.ndarray, " activation"]
    """Euclidean norm of the output without attention."""

    @property
    def no_op(self) -> bool:
        """Whether, at the largest activation, attention moves the output by at most NO_OP of its norm."""
        return bool(self.deviation[-1] <= NO_OP * self.output_norm[-1] + self.rounding[-1])

    @property
    def within_bounds(self) -> bool:
        """Whether nothing measured exceeds its bound, up to rounding."""
        attention = not exceeds(self.beside, self.beside_bound).any()
        return bool(attention and (self.deviation <= self.deviation_bound + self.rounding).all())


_BY_ACTIVATION = ("deviation", "deviation_bound", "rounding", "output_norm", "direction", "row_ratio")


@dataclass(frozen=True, kw_only=True, eq=False)
class PropositionReport(SinkReport):
    """Sink and no-op against the register activation, each beside its bound, and which conditions hold."""

    beside: Float[np.ndarray, "activation query"]
    """Attention of every query to tokens other than x_s, 0 to 1; [CLS] first."""
    beside_bound: Float[np.ndarray, "activation query"]
    """Its bound, 1 - 1 / (1 + n exp(-gap))."""
    direction: Float[np.ndarray, " activation"]
    """Cosine of x_s after block 1 with v2; tends to 1 if |u2| dominates and x_s fires."""
    row_ratio: Float[np.ndarray, " activation"]
    """|u2| over the longest other row of W_out1."""

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the conditions that do not hold."""
        return tuple(condition.name for condition in self.conditions if not condition.holds)

    @property
    def sink(self) -> bool:
        """Whether, at the largest activation, every query gives x_s at least SINK of its attention."""
        return bool((self.beside[-1] <= 1 - SINK).all())

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
                **{name: getattr(self, name) for name in _BY_ACTIVATION},
            }
        )

    plot = drawn_by("theory.proposition_figure")
    """The convergence curve: attention elsewhere and deviation, with their bounds."""


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
    bounds = {
        # B_W of the module: the most that W reads of what attention adds to [CLS]
        name: model.read_at_sink(W, a) + beside_bound[:, CLS] * (stream[:, model.others] @ W).norm(dim=-1).amax(-1)
        for name, W in (("seen_by_mlp", model.W_in2), ("seen_by_head", model.W_head))
    }
    bound, off = output_moves(model, cls, **bounds, longest=2 * stream.norm(dim=-1).amax(-1))
    measured = {
        "beside": beside,
        "beside_bound": beside_bound,
        "deviation": (model.output(cls + added) - without).norm(dim=-1),
        "deviation_bound": bound,
        "rounding": off,
        "output_norm": without.norm(dim=-1),
        "direction": x_s @ model.v2 / x_s.norm(dim=-1),
        "row_ratio": model.row_ratio(a),
    }
    return PropositionReport.of(model, grid, measured)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class CorollaryReport(ExactReport):
    """What separates the register neuron from the attention bias, token by token, against the register activation."""

    attends: Bool[np.ndarray, " token"]
    """Whether, at the largest activation, the token gives x_s, and without the neuron the pair, at least SINK of its
    attention: for these tokens the limit is near."""
    difference: Float[np.ndarray, "activation token"]
    """Euclidean distance of the two updates; [CLS] first."""
    limit: Float[np.ndarray, " activation"]
    """Its limit: |c_s|, the length of x_s after block 1 without the neuron; |x_s| if all conditions hold."""
    from_limit: Float[np.ndarray, "activation token"]
    """Euclidean distance of the difference, as a vector, from c_s."""
    from_limit_bound: Float[np.ndarray, "activation token"]
    """Its bound, as the module derives it."""
    rounding: Float[np.ndarray, " activation"]
    """How much of these can be float64's rounding."""
    output_difference: Float[np.ndarray, " activation"]
    """Euclidean distance of the two models' outputs."""
    output_bound: Float[np.ndarray, " activation"]
    """Its bound."""
    output_rounding: Float[np.ndarray, " activation"]
    """How much of it can be float64's rounding."""
    output_norm: Float[np.ndarray, " activation"]
    """Euclidean norm of the output with the bias."""

    @property
    def equal(self) -> bool:
        """Whether, at the largest activation, the two models' outputs agree up to NO_OP of their norm."""
        return bool(self.output_difference[-1] <= NO_OP * self.output_norm[-1] + self.output_rounding[-1])

    @property
    def within_bounds(self) -> bool:
        """Whether nothing measured exceeds its bound, up to rounding."""
        updates = self.from_limit <= self.from_limit_bound + self.rounding[:, None]
        outputs = self.output_difference <= self.output_bound + self.output_rounding
        return bool(updates.all() and outputs.all())

    def describe(self) -> str:
        """The comparison in words."""
        a, attends = self.activations[-1], self.attends
        if not attends.any():
            difference = "no token attends to x_s with the neuron and to the pair without it"
        else:
            difference = (
                f"for {attends.sum()} of {len(attends)} tokens the updates differ by the limit {self.limit[-1]:.3g} "
                f"({self.limit[-1] / a:.1g} of the update) but for {self.from_limit[-1][attends].max():.2g} (bound "
                f"{self.from_limit_bound[-1][attends].max():.2g}, rounding {self.rounding[-1]:.1g})"
            )
        sink = self.setup["sink"]
        own = (
            ""
            if attends[sink] or not attends.any()
            else " x_s itself does not attend to the pair: that takes u1 . u2 > 0."
        )
        return (
            f"{in_words(self.conditions)} At activation {a:.3g}, {difference}.{own} The outputs "
            f"{'agree' if self.equal else 'differ'}: by {self.output_difference[-1]:.2g} (bound "
            f"{self.output_bound[-1]:.2g}) of {self.output_norm[-1]:.3g}."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row an activation and token: the difference, also as a share of a, its limit and the distance from it."""
        return grid_table(
            {"activation": self.activations, "token": range(len(self.attends))},
            attends=self.attends,
            difference=self.difference,
            relative_difference=self.difference / self.activations[:, None],
            limit=self.limit[:, None],
            from_limit=self.from_limit,
            from_limit_bound=self.from_limit_bound,
        )

    plot = drawn_by("theory.corollary_figure")
    """Difference of the updates and of the outputs against the activation, with limit and bounds."""


def verify_corollary(model: TwoBlockModel, activations: Activations = ACTIVATION_GRID) -> CorollaryReport:
    """Replace the register neuron by an explicit key and value a_s v2, and compare every token's attention update.

    Args:
        model: the exact model; `TwoBlockModel.build` makes one.
        activations: register activations, increasing.

    Raises:
        ConfigError: an activation is not a positive, finite number, or they do not increase.

    Source: Jiang et al. 2025, Corollary 1; Sun et al. 2024 for the form of the bias. Limit and bounds are ours, derived
        in `registerlens.theory.proposition`.

    Example:
        >>> model = TwoBlockModel.build(seed=1)
        >>> report = verify_corollary(model)
        >>> report.equal, report.within_bounds
        (True, True)
        >>> bool(np.isclose(report.difference[-1, 0], model.tokens[model.sink].norm()))
        True
    """
    grid = checked_activations(activations)
    a = torch.from_numpy(grid)
    stream, bare = model.after_block1(a), model.without_register(a)
    pair = (a * model.firing[model.sink])[:, None] * model.v2
    pattern, beside_now, beside = attention_beside(model.scores(stream), model.sink)
    keys = torch.cat([bare, pair[:, None]], 1)
    biased, beside_pair_now, beside_pair = attention_beside(bare @ keys.mT * model.scale, model.n + 1)
    update, update_biased = pattern @ stream, biased @ keys
    c_s = bare[:, model.sink]

    def farthest(vectors: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        return (vectors - point[:, None]).norm(dim=-1).amax(-1, keepdim=True)

    bound = beside * farthest(stream, stream[:, model.sink]) + beside_pair * farthest(bare, pair)
    longest = torch.maximum(stream.norm(dim=-1).amax(-1), keys.norm(dim=-1).amax(-1))
    cls = bare[:, CLS] + update_biased[:, CLS]
    output = model.output(cls)
    # The two [CLS] differ by what the neuron wrote there, by c_s, and by what the bound allows.
    own = a[:, None] * model.firing[CLS] * model.v2 + c_s
    bounds = {
        name: (own @ W).norm(dim=-1) + spectral(W) * bound[:, CLS]
        for name, W in (("seen_by_mlp", model.W_in2), ("seen_by_head", model.W_head))
    }
    output_bound, output_off = output_moves(model, cls, **bounds, longest=2 * longest)
    measured = {
        "attends": torch.maximum(beside_now[-1], beside_pair_now[-1]) <= 1 - SINK,
        "difference": (update - update_biased).norm(dim=-1),
        "limit": c_s.norm(dim=-1),
        "from_limit": (update - update_biased - c_s[:, None]).norm(dim=-1),
        "from_limit_bound": bound,
        "rounding": 8 * sum(stream.shape[1:]) * torch.finfo(torch.float64).eps * longest,
        "output_difference": (model.output(stream[:, CLS] + update[:, CLS]) - output).norm(dim=-1),
        "output_bound": output_bound,
        "output_rounding": output_off,
        "output_norm": output.norm(dim=-1),
    }
    return CorollaryReport.of(model, grid, measured, sink=model.sink)

"""Corollary 1 on the exact model: the register neuron against an explicit attention bias (k', v') = (a_s v2, a_s v2).

With the neuron, token i's update is D_i = sum over j of p_ij x'_j. Without it, the stream is c = x' - a firing v2, and
the bias adds one more key and value: D'_i = sum over j of p'_ij c_j + p'_i a_s v2, with softmax over the n + 2 keys.
As x'_s = c_s + a_s v2, and shares of attention sum to one,

    D_i  = x'_s   + sum over j != s of p_ij (x'_j - x'_s),   so |D_i - x'_s|    <= m_i  max over j of |x'_j - x'_s|,
    D'_i = a_s v2 + sum over j of p'_ij (c_j - a_s v2),      so |D'_i - a_s v2| <= m'_i max over j of |c_j - a_s v2|,

where m_i and m'_i bound the attention beside the sink and beside the pair: 1 / (1 + exp(gap) / number of other keys).
So the difference D_i - D'_i tends to c_s, exactly: beta u1 if x_s is aligned and no other neuron writes there. It does
not vanish, as the paper's "+ a_s v2" suggests; but it is |x_s| / a of the update, and neither MLP nor head sees it.

The limit asks two things of a token: x'_i . v2 > 0, so that it attends to x_s, and c_i . v2 > 0, so that it attends to
the pair. For x_s itself the second reads u1 . u2 > 0, which the paper does not ask for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from registerlens.results import FINITE, Result
from registerlens.theory.bounds import ACTIVATION_GRID, Activations, attention_beside, checked_activations, spectral
from registerlens.theory.conditions import Condition, check_conditions, in_words
from registerlens.theory.proposition import NO_OP, SINK, output_moves, setup_of
from registerlens.theory.two_block import CLS, TwoBlockModel

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True, eq=False)
class CorollaryReport(Result):
    """What separates the register neuron from the attention bias, token by token, against the register activation."""

    setup: dict[str, Any]
    """Sizes, nonlinearity and seed of the model, and which token is the sink."""
    conditions: tuple[Condition, ...]
    """The conditions of Proposition 1."""
    activations: Float[np.ndarray, " activation"] = field(metadata=FINITE)
    """What the register neuron writes at an aligned x_s."""
    attends: Bool[np.ndarray, " token"]
    """Whether, at the largest activation, the token gives x_s, and without the neuron the pair, at least SINK of its
    attention: for these tokens the limit is near."""
    difference: Float[np.ndarray, "activation token"]
    """Euclidean distance of the two updates; [CLS] first."""
    limit: Float[np.ndarray, " activation"]
    """What it tends to: |c_s|, the length of x_s after block 1 without the neuron; |x_s| if all conditions hold."""
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
            told = "no token attends to x_s with the neuron and to the pair without it"
        else:
            told = (
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
            f"{in_words(self.conditions)} At activation {a:.3g}, {told}.{own} The outputs "
            f"{'agree' if self.equal else 'differ'}: by {self.output_difference[-1]:.2g} (bound "
            f"{self.output_bound[-1]:.2g}) of {self.output_norm[-1]:.3g}."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row an activation and token: the difference, also as a share of a, its limit and the distance from it."""
        n_tokens = len(self.attends)
        return pd.DataFrame(
            {
                "activation": np.repeat(self.activations, n_tokens),
                "token": np.tile(np.arange(n_tokens), len(self.activations)),
                "attends": np.tile(self.attends, len(self.activations)),
                "difference": self.difference.ravel(),
                "relative_difference": (self.difference / self.activations[:, None]).ravel(),
                "limit": np.repeat(self.limit, n_tokens),
                "from_limit": self.from_limit.ravel(),
                "from_limit_bound": self.from_limit_bound.ravel(),
            }
        )

    def plot(self) -> go.Figure:
        """Difference of the updates and of the outputs against the activation, with limit and bounds."""
        from registerlens.viz.theory import corollary_figure  # noqa: PLC0415  (viz stands on results)

        return corollary_figure(self)


def verify_corollary(model: TwoBlockModel, activations: Activations = ACTIVATION_GRID) -> CorollaryReport:
    """Replace the register neuron by an explicit key and value a_s v2, and compare every token's attention update.

    Args:
        model: the exact model; `TwoBlockModel.build` makes one.
        activations: register activations, increasing.

    Raises:
        ConfigError: an activation is not a positive, finite number, or they do not increase.

    Source: Jiang et al. 2025, Corollary 1; Sun et al. 2024 for the form of the bias. Limit and bounds are ours, derived
        in `registerlens.theory.corollary`.

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
    seen = {
        name: (own @ W).norm(dim=-1) + spectral(W) * bound[:, CLS]
        for name, W in (("seen_by_mlp", model.W_in2), ("seen_by_head", model.W_head))
    }
    output_bound, output_off = output_moves(model, cls, **seen, longest=2 * longest)
    found = {
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
    return CorollaryReport(
        setup={**setup_of(model), "sink": model.sink},
        conditions=check_conditions(model, float(grid[-1])),
        activations=grid,
        **{name: value.numpy() for name, value in found.items()},
    )

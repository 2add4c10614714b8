"""The generalised proposition, verified: every point of `registerlens.theory.general` as a curve with its bound."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.display import drawn_by, grid_table
from registerlens.theory.conditions import (
    ACTIVATION_GRID,
    Activations,
    attention_beside,
    checked_activations,
    lipschitz,
    rounding,
    spectral,
)
from registerlens.theory.general import ExactLayerNorm, GeneralModel
from registerlens.theory.proposition import SinkReport
from registerlens.theory.two_block import CLS

STILL = 1e-12
"""A token whose growth per unit of activation is below this does not grow, but for rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneralReport(SinkReport):
    """Sink, limit and no-op with arbitrary attention, against the register activation, each beside its bound.

    Of the conditions none is needed for the no-op on the value side.
    """

    beside: Float[np.ndarray, "activation head query"]
    """Attention of every query to tokens other than x_s, 0 to 1."""
    beside_bound: Float[np.ndarray, "activation head query"]
    """Its bound, 1 - 1 / (1 + n exp(-gap))."""
    brought: Float[np.ndarray, " activation"]
    """Length of what x_s brings to [CLS], summed over heads: sum of p z_s W_V W_O."""
    brought_bound: Float[np.ndarray, " activation"]
    """Its bound: 0 in the limit if the values do not see the sink."""
    key_distance: Float[np.ndarray, " activation"] | None = None
    """|N(x'_s) - N_oo(v2)|. None, like all that follows: without LayerNorm there is no limit."""
    key_bound: Float[np.ndarray, " activation"] | None = None
    """Its bound, O(1 / a)."""
    limit_sink: Float[np.ndarray, "head query"] | None = None
    """The limit of the attention to x_s, 0 to 1."""
    limit_gap: Float[np.ndarray, "head query"] | None = None
    """The limit of x_s's score minus the largest other: above 0, x_s becomes the query's favourite."""
    from_limit: Float[np.ndarray, "activation head query"] | None = None
    """Distance of the attention to x_s from its limit."""
    from_limit_bound: Float[np.ndarray, "activation head query"] | None = None
    """Its bound, O(1 / a)."""

    @property
    def within_bounds(self) -> bool:
        """Whether nothing measured exceeds its bound, up to rounding."""
        more = (
            (self.brought, self.brought_bound),
            (self.key_distance, self.key_bound),
            (self.from_limit, self.from_limit_bound),
        )
        there = ((x.T, bound.T) for x, bound in more if x is not None and bound is not None)  # activations last
        return super().within_bounds and all(bool((x <= bound + self.rounding).all()) for x, bound in there)

    def describe(self) -> str:
        """Sinks and no-op in words."""
        heads, a = self.beside.shape[1], self.activations[-1]
        cls = 1 - self.beside[-1, :, CLS]
        if self.limit_sink is None or self.limit_gap is None or self.key_distance is None or self.key_bound is None:
            limit = ""
        else:
            sought = int((self.limit_gap[:, CLS] > 0).sum())
            limit = (
                f" LayerNorm leaves x_s's key {self.key_distance[-1]:.2g} from its limit (bound "
                f"{self.key_bound[-1]:.2g}), where x_s is [CLS]'s favourite in {sought} of {heads} heads, with at most "
                f"{self.limit_sink[:, CLS].max():.3g} of its attention."
            )
        return (
            f"At activation {a:.3g}, [CLS] gives x_s {cls.min():.3g} to {cls.max():.3g} of its attention in {heads} "
            f"heads.{limit} x_s brings [CLS] a vector of length {self.brought[-1]:.2g} (bound "
            f"{self.brought_bound[-1]:.2g}); attention is {'a no-op' if self.no_op else 'no no-op'}: the output moves "
            f"by {self.deviation[-1]:.2g} (bound {self.deviation_bound[-1]:.2g}) of {self.output_norm[-1]:.3g}."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row an activation and head: [CLS]'s attention to x_s, its limit, and what is not per head repeated."""
        columns: dict[str, Any] = {
            "sink_cls": 1 - self.beside[..., CLS],
            "beside_cls": self.beside[..., CLS],
            "beside_cls_bound": self.beside_bound[..., CLS],
        }
        if self.limit_sink is not None and self.from_limit_bound is not None:
            columns |= {"limit_cls": self.limit_sink[:, CLS], "limit_cls_bound": self.from_limit_bound[..., CLS]}
        for name in ("key_distance", "key_bound", "brought", "brought_bound", "deviation", "deviation_bound"):
            if (values := getattr(self, name)) is not None:
                columns[name] = values[:, None]
        return grid_table({"activation": self.activations, "head": range(self.beside.shape[1])}, **columns)

    plot = drawn_by("theory.generalisation_figure")
    """Attention to x_s per head with its limit, what x_s brings, and the deviation, with their bounds."""


def verify_generalisation(model: GeneralModel, activations: Activations = ACTIVATION_GRID) -> GeneralReport:
    """Let the register activation grow in a model with any attention, with or without LayerNorm.

    Args:
        model: `GeneralModel.build` makes one.
        activations: register activations, increasing.

    Raises:
        ConfigError: an activation is out of range, or LayerNorm does not see what the register neuron writes.

    Source: extends Jiang et al. 2025, Proposition 1; stated and proved in `registerlens.theory.general`.

    Example:
        >>> from registerlens.theory.two_block import TwoBlockModel
        >>> base = TwoBlockModel.build(others_fire=0.0, broken={"u2_head": 0.5})
        >>> report = verify_generalisation(GeneralModel.build(base))  # values that do not see u1 and u2
        >>> report.no_op, report.within_bounds
        (True, True)
        >>> norm = ExactLayerNorm(w=torch.ones(16).double(), b=torch.ones(16).double())
        >>> report = verify_generalisation(GeneralModel.build(base, seeks=[30.0, -30.0], norm=norm))
        >>> (report.limit_gap[:, 0] > 0).tolist(), report.within_bounds
        ([True, False], True)
    """
    grid = checked_activations(activations)
    a, base, sink = torch.from_numpy(grid), model.base, model.base.sink
    stream = base.after_block1(a)
    z = model.read(stream)
    pattern, beside, beside_bound = attention_beside(model.scores(z), sink)
    cls_row = pattern[:, :, CLS]  # activation head key
    brought = torch.einsum("ah,ad,hde->ae", cls_row[..., sink], z[:, sink], model.V)
    added = torch.einsum("ahk,akd,hde->ae", cls_row, z, model.V)
    cls = stream[:, CLS]
    without = model.output(cls)
    bounds = {
        name: _heads_bring(model, z, beside_bound[..., CLS], reader)
        for name, reader in (("added", None), ("seen_by_mlp", base.W_in2), ("seen_by_head", base.W_head))
    }
    if model.norm is None:
        limits = {"brought_bound": torch.stack([base.read_at_sink(V, a) for V in model.V]).sum(0)}
    else:
        limits = _limits(model, model.norm, a, z, 1 - beside)
    measured = {
        "beside": beside,
        "beside_bound": beside_bound,
        "brought": brought.norm(dim=-1),
        "deviation": (model.output(cls + added) - without).norm(dim=-1),
        "deviation_bound": model.output_moves(cls, **bounds),
        "rounding": _rounding(model, cls, z, stream),
        "output_norm": without.norm(dim=-1),
        **limits,
    }
    return GeneralReport.of(base, grid, measured, n_heads=len(model.W_Q), norm=model.norm is not None)


def _heads_bring(
    model: GeneralModel,
    z: Float[Tensor, "activation token d_model"],
    beside: Float[Tensor, "activation head"],
    reader: Float[Tensor, "d_model width"] | None,
) -> Float[Tensor, " activation"]:
    """The most of what all heads add to [CLS] that a reader sees (point 3); None reads everything."""
    values = model.V if reader is None else model.V @ reader
    lengths = (z[:, None] @ values).norm(dim=-1)  # activation head token
    ordinary = lengths[..., model.base.others].amax(-1)
    return (lengths[..., model.base.sink] + beside * ordinary).sum(-1)


def _limits(
    model: GeneralModel,
    norm: ExactLayerNorm,
    a: Float[Tensor, " activation"],
    z: Float[Tensor, "activation token d_model"],
    share: Float[Tensor, "activation head query"],
) -> dict[str, Tensor]:
    """Points 1 and 2: what keys and attention tend to, how far off they are, and how far they can be."""
    base, A = model.base, model.A
    grows = base.growth.norm(dim=-1) > STILL
    z_oo = norm(base.rest)
    z_oo[grows] = norm.limit(base.growth[grows])
    grown = a[:, None, None] * base.growth
    still = norm.lipschitz(base.rest) * grown.norm(dim=-1)
    off = torch.where(grows, norm.distance_bound(base.rest.expand_as(grown), grown), still)  # r: activation token

    scores = model.scores(z_oo)
    _, beside, _ = attention_beside(scores, base.sink)
    by_key, by_query = (A @ z_oo.mT).norm(dim=1), (z_oo @ A).norm(dim=-1)  # head token
    largest = torch.linalg.matrix_norm(A, 2)[:, None, None]
    error = (
        off[:, None, :, None] * by_key[:, None, :]
        + off[:, None, None, :] * by_query[..., None]
        + off[:, None, :, None] * off[:, None, None, :] * largest
    )  # activation head query key
    limit_V = (z_oo[base.sink] @ model.V).norm(dim=-1).sum()
    return {
        "key_distance": (z[:, base.sink] - z_oo[base.sink]).norm(dim=-1),
        "key_bound": off[:, base.sink],
        "limit_sink": 1 - beside,
        "limit_gap": scores[..., base.sink] - scores[..., base.others].amax(-1),
        "from_limit": (share - (1 - beside)).abs(),
        "from_limit_bound": (error[..., base.sink] + error[..., base.others].amax(-1)) / 4,
        "brought_bound": limit_V + off[:, base.sink] * torch.linalg.matrix_norm(model.V, 2).sum(),
    }


def _rounding(
    model: GeneralModel,
    cls: Float[Tensor, "activation d_model"],
    z: Float[Tensor, "activation token d_model"],
    stream: Float[Tensor, "activation token d_model"],
) -> Float[Tensor, " activation"]:
    """float64's rounding as an error of the stream, which moves the output as anything added to [CLS] does."""
    base = model.base
    read, length = z.norm(dim=-1).amax(-1), stream.norm(dim=-1).amax(-1)
    slope = lipschitz(base.phi, (model.read(cls) @ base.W_in2).abs().amax(-1))
    size = length + read * sum(float(V.norm()) for V in model.V)
    dims = sum(stream.shape[1:])
    error = 8 * dims * torch.finfo(torch.float64).eps * size + slope * rounding(base.W_in2, base.W_out2) * read
    bounds = {name: spectral(W) * error for name, W in (("seen_by_mlp", base.W_in2), ("seen_by_head", base.W_head))}
    return model.output_moves(cls, added=error, **bounds) + rounding(base.W_head) * (read + size) + error

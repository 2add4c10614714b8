"""The proposition beyond identity matrices: arbitrary W_Q, W_K, W_V, W_O, several heads, with or without pre-LayerNorm.

Stream x'(a) = c + a g as in `two_block`; with LayerNorm every reader (attention, MLP, head) reads z = N(x'), without
it z = x'. Head h has scores s_ij = z_i A z_j with A = W_Q W_K^T / sqrt(d_head), and adds sum over j of p_ij z_j V with
V = W_V W_O.

1. The LayerNorm limit. With P the centring, N(y) = sqrt(d) w * Py / |Y| + b where Y = (Py, sqrt(d eps)) has one more
   entry. For token j, let g_j be its growth; N(c_j + a g_j) tends to N_oo(g_j) = sqrt(d) w * Pg_j / |Pg_j| + b, if
   Pg_j != 0 (LayerNorm does not see a multiple of the all-ones vector). For vectors Y, Z of a Hilbert space
   |Y/|Y| - Z/|Z|| <= 2 |Y - Z| / (|Y| + |Z|) (Dunkl and Williams 1964). With Y = (P(c + a g), sqrt(d eps)) and
   Z = (a Pg, 0):

       |N(c + a g) - N_oo(g)| <= sqrt(d) max|w| 2 sqrt(|Pc|^2 + d eps) / (|Y| + a |Pg|) =: r_j(a) = O(1 / a).

   So the key of a token that the register neuron dominates tends to N_oo(v2) W_K, at the rate 1 / a.

2. The sink. Scores therefore stay bounded, and every share of attention has a limit below 1: x_s is the favourite of
   query i in head h, for all large a, if s_oo_is = z_oo_i A N_oo(v2) is above every other s_oo_ij, and is not if it is
   below one (z_oo_j: the limit of z_j, which is z_j itself for a token that does not grow).
   With |s_ij - s_oo_ij| <= r_i |A z_oo_j| + r_j |z_oo_i A| + r_i r_j sigma_max(A) =: e_ij, the log-odds of s move by at
   most e_is + max over j != s of e_ij, and a logistic function has slope at most 1/4: |p - p_oo| <= that sum / 4.
   A token that fires as weakly as one pleases has the same limit key: LayerNorm forgets by how much it fired.
   Without LayerNorm the gap grows without bound (`proposition`), and p tends to 0 or 1.

3. The no-op on the value side. In either case head h adds D_h = p z_s V + sum over j != s of p_j z_j V, so that

       |R D_h| <= |R z_s V| + m M_R,   M_R = max over j != s of |R z_j V|,   m = 1 / (1 + exp(gap) / n),

   for any linear reader R (identity, W_in2^T, W_head^T). If z_s V = 0 in the limit, what the sink brings tends to zero
   whatever W_in2 and W_head read: u2 in the kernel of V is enough (without LayerNorm: and u1). Without LayerNorm the
   kernel may also be the readers': then R z_s V = 0, and the bound is that of `proposition`, summed over heads.

4. The output with LayerNorm. By the same inequality |N(y') - N(y)| <= l(y) |y' - y|, l(y) = 2 sqrt(d) max|w| / |Y|.
   So with |D| at most the sum over heads, y = x + MLP(N(x)), and y' the same for x + D in x's place:
   |y' - y| <= |D| (1 + L sigma(W_in2) sigma(W_out2) l(x)) and |output' - output| <= sigma(W_head) l(y) |y' - y|.
   A kernel of the readers does not help here: D changes the length of x, and LayerNorm rescales all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.display import Shown
from registerlens.errors import ConfigError, ShapeError
from registerlens.theory.conditions import lipschitz, spectral
from registerlens.theory.two_block import TwoBlockModel, check_exact


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactLayerNorm:
    """LayerNorm as a function of float64 vectors, with its limit and its moduli of continuity.

    Example:
        >>> norm = ExactLayerNorm(w=torch.ones(4).double(), b=torch.zeros(4).double())
        >>> norm.limit(torch.tensor([1.0, -1.0, 1.0, -1.0]).double()).tolist()
        [1.0, -1.0, 1.0, -1.0]
    """

    w: Float[Tensor, " d_model"]
    """Scale."""
    b: Float[Tensor, " d_model"]
    """Shift."""
    eps: float = 1e-6
    """Added to the variance."""

    def __post_init__(self) -> None:
        if self.w.shape != self.b.shape:
            raise ShapeError(f"LayerNorm's w and b must be alike, got {list(self.w.shape)} and {list(self.b.shape)}.")
        check_exact("LayerNorm's w", self.w)
        check_exact("LayerNorm's b", self.b)
        if not self.w.any():
            raise ConfigError("LayerNorm's w is zero throughout: it lets nothing of the stream through. Give another.")
        if not self.eps > 0:
            raise ConfigError(f"LayerNorm's eps must be positive, got {self.eps}.")

    def __call__(self, x: Float[Tensor, "*grid d_model"]) -> Float[Tensor, "*grid d_model"]:
        """What leaves the norm."""
        return self._gain * self.w * _centred(x) / self.length(x)[..., None] + self.b

    @property
    def _gain(self) -> float:
        return len(self.w) ** 0.5

    def length(self, x: Float[Tensor, "*grid d_model"]) -> Float[Tensor, "*grid"]:
        """|Y|: sqrt(|Px|^2 + d eps)."""
        return (_centred(x).square().sum(-1) + len(self.w) * self.eps).sqrt()

    def lipschitz(self, x: Float[Tensor, "*grid d_model"]) -> Float[Tensor, "*grid"]:
        """l(x): the norm's output moves by at most this times a step away from x, of any length."""
        return 2 * self._gain * self.w.abs().max() / self.length(x)

    def limit(self, direction: Float[Tensor, "*grid d_model"]) -> Float[Tensor, "*grid d_model"]:
        """N_oo: what N(c + a direction) tends to as a grows.

        Raises:
            ConfigError: a direction is a multiple of the all-ones vector, which LayerNorm does not see.
        """
        centred = _centred(direction)
        if (centred.norm(dim=-1) <= 1e-12 * direction.norm(dim=-1)).any():
            raise ConfigError(
                "A direction is a multiple of the all-ones vector, which LayerNorm takes out: no limit."
                " Choose another direction."
            )
        return self._gain * self.w * centred / centred.norm(dim=-1, keepdim=True) + self.b

    def distance_bound(
        self, fixed: Float[Tensor, "*grid d_model"], grown: Float[Tensor, "*grid d_model"]
    ) -> Float[Tensor, "*grid"]:
        """r: the most by which N(fixed + grown) differs from N_oo(grown)."""
        lengths = self.length(fixed + grown) + _centred(grown).norm(dim=-1)
        return 2 * self._gain * self.w.abs().max() * self.length(fixed) / lengths


def _centred(x: Float[Tensor, "*grid d_model"]) -> Float[Tensor, "*grid d_model"]:
    return x - x.mean(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneralModel(Shown):
    """The two-block model with any attention and, if `norm` is given, the same LayerNorm before every reader.

    Raises:
        ShapeError: a tensor does not fit the two-block model.
        NonFiniteError: a tensor, which is named, has NaN or infinite entries.

    Example:
        >>> model = GeneralModel.build(TwoBlockModel.build(), seeks=(1.0, -1.0))
        >>> model.W_Q.shape
        torch.Size([2, 16, 8])
    """

    base: TwoBlockModel
    """Tokens, MLPs and head."""
    W_Q: Float[Tensor, "head d_model d_head"]
    """Queries."""
    W_K: Float[Tensor, "head d_model d_head"]
    """Keys."""
    W_V: Float[Tensor, "head d_model d_head"]
    """Values."""
    W_O: Float[Tensor, "head d_head d_model"]
    """What heads write."""
    norm: ExactLayerNorm | None = None
    """Before attention, MLP and head; None: there is none."""

    def __post_init__(self) -> None:
        heads, d_model, d_head = self.W_Q.shape
        if d_model != self.base.tokens.shape[1]:
            raise ShapeError(f"W_Q must read {self.base.tokens.shape[1]} dimensions, got {d_model}.")
        for name, shape in {"W_K": (d_model, d_head), "W_V": (d_model, d_head), "W_O": (d_head, d_model)}.items():
            if tuple(getattr(self, name).shape) != (heads, *shape):
                raise ShapeError(f"{name} must be {[heads, *shape]}, got {list(getattr(self, name).shape)}.")
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            check_exact(name, getattr(self, name))
        if self.norm is not None and len(self.norm.w) != d_model:
            raise ShapeError(f"LayerNorm must have {d_model} entries, got {len(self.norm.w)}.")

    @property
    def A(self) -> Float[Tensor, "head d_model d_model"]:
        """W_Q W_K^T / sqrt(d_head): scores are z_i A z_j."""
        return self.W_Q @ self.W_K.mT / self.W_Q.shape[-1] ** 0.5

    @property
    def V(self) -> Float[Tensor, "head d_model d_model"]:
        """W_V W_O."""
        return self.W_V @ self.W_O

    def read(self, x: Float[Tensor, "*grid d_model"]) -> Float[Tensor, "*grid d_model"]:
        """What a reader gets: the LayerNorm's output, or the stream itself."""
        return x if self.norm is None else self.norm(x)

    def scores(self, z: Float[Tensor, "*grid token d_model"]) -> Float[Tensor, "*grid head query key"]:
        """Attention scores of block 2."""
        return z[..., None, :, :] @ self.A @ z[..., None, :, :].mT

    def output(self, cls: Float[Tensor, "*grid d_model"]) -> Float[Tensor, "*grid d_out"]:
        """The rest of the model, from [CLS] after block 2's attention on."""
        base = self.base
        return self.read(cls + base.act(self.read(cls) @ base.W_in2) @ base.W_out2) @ base.W_head

    def output_moves(
        self,
        cls: Float[Tensor, "activation d_model"],
        *,
        added: Float[Tensor, " activation"],
        seen_by_mlp: Float[Tensor, " activation"],
        seen_by_head: Float[Tensor, " activation"],
    ) -> Float[Tensor, " activation"]:
        """The most by which the output moves for something added to [CLS], given its lengths (points 3 and 4)."""
        base = self.base
        before = self.read(cls) @ base.W_in2
        if self.norm is None:
            slope = lipschitz(base.phi, before.abs().amax(-1) + seen_by_mlp)
            return seen_by_head + slope * spectral(base.W_out2 @ base.W_head) * seen_by_mlp
        mlp_in = spectral(base.W_in2) * self.norm.lipschitz(cls) * added
        slope = lipschitz(base.phi, before.abs().amax(-1) + mlp_in)
        moved = added + slope * spectral(base.W_out2) * mlp_in
        without = cls + base.act(before) @ base.W_out2
        return spectral(base.W_head) * self.norm.lipschitz(without) * moved

    @classmethod
    def build(
        cls,
        base: TwoBlockModel,
        *,
        seeks: Sequence[float] = (1.0, 1.0),
        d_head: int = 8,
        norm: ExactLayerNorm | None = None,
        value_kernel: bool = True,
        seed: int = 0,
    ) -> GeneralModel:
        """Random attention whose heads seek x_s, or avoid it.

        Args:
            base: the two-block model.
            seeks: one number a head: the inner product of a query with x_s's limit key, times the query's share of v2
                (without LayerNorm) or of LayerNorm's b. Positive: the head seeks x_s, negative: it avoids it.
            d_head: width of a head.
            norm: the LayerNorm.
            value_kernel: whether values do not see the sink: the limit of z_s (without LayerNorm: u1 and u2) lies in
                the kernel of W_V W_O.
            seed: equal seeds give equal models.

        Example:
            >>> model = GeneralModel.build(TwoBlockModel.build(), seeks=[2.0])
            >>> bool((model.base.v2 @ model.V[0]).norm() < 1e-12)
            True
        """
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        d_model = base.tokens.shape[1]
        if norm is None:
            key, anchor, hidden = base.v2, base.v2, torch.stack([base.u1, base.v2], 1)
        else:
            key, anchor = norm.limit(base.v2), norm.b if norm.b.any() else torch.ones_like(norm.b)
            hidden = key[:, None]
        onto_hidden = hidden @ torch.linalg.pinv(hidden)
        weights: dict[str, list[Tensor]] = {name: [] for name in ("W_Q", "W_K", "W_V", "W_O")}
        for strength in seeks:
            match = normal(d_head)
            match = match / match.norm()
            keys, queries, values = (normal(d_model, d_head) / d_model**0.5 for _ in range(3))
            # Along match, keys hold the share of the sink's limit key alone, and queries that of the anchor: z_s W_K
            # tends to match.
            queries, keys = (W - torch.outer(W @ match, match) for W in (queries, keys))
            weights["W_K"].append(keys + torch.outer(key, match - key @ keys) / key.square().sum())
            along = torch.outer(anchor, match) * (strength / anchor.square().sum())
            weights["W_Q"].append(queries + along)
            weights["W_V"].append(values - onto_hidden @ values if value_kernel else values)
            weights["W_O"].append(normal(d_head, d_model) / d_head**0.5)
        return cls(base=base, norm=norm, **{name: torch.stack(heads) for name, heads in weights.items()})

"""QK and OV circuits of heads from the weights: do they copy, and how do they read and write the outlier direction?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Complex, Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import check_neurons
from registerlens.display import drawn_by, grid_table
from registerlens.errors import ConfigError, NonFiniteError, ShapeError, check_at_least
from registerlens.model.attention import HeadNorm
from registerlens.model.block import Block, require_linear_output
from registerlens.model.norms import LayerNorm
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult
from registerlens.theory.measurements import constants
from registerlens.theory.readers import centred, dimensions, fold
from registerlens.theory.readers import directions as unit_directions

QUANTITIES = ("key_gain", "query_reading", "ov_gain", "ov_cosine")
"""What is computed for the direction and each head."""
LEVELS = (0.025, 0.5, 0.975)
"""Quantiles of the null."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadCircuits(ModelResult):
    """The circuits of every head, LayerNorm weights folded in; and what they do with one direction.

    QK is W_Q W_K^T and OV is W_V W_O, maps of the stream after a norm divided by its scale (which depends on the token
    and changes no direction). Scores between a token and itself in QK, along eigenvectors; what a token writes into one
    that attends to it in OV. With rotary positions QK is that of two tokens in one place.
    """

    direction: str
    """The direction, in words; empty without one."""
    qk_spectrum: Float[np.ndarray, "layer head d_head part"]
    """Eigenvalues of QK that need not be zero, over sqrt(d_head), by magnitude: real and imaginary part; NaN where a
    norm mixes heads."""
    ov_spectrum: Float[np.ndarray, "layer head d_head part"]
    """Eigenvalues of OV that need not be zero, by magnitude: real and imaginary part."""
    observed: Float[np.ndarray, "quantity layer head"]
    """Of the direction, in the order of QUANTITIES; NaN without a direction, or before it is written.

    key_gain: how strongly keys read it, ||W_K^T u|| over the root mean square of that of all directions.
    query_reading: the score (before the softmax) that a token pointing along u gets from the query bias, what every
    query has in common: b_Q . (W_K u sqrt(d_model)) / sqrt(d_head), u with norm one after centring.
    ov_gain: ||OV u|| over the root mean square of that of all directions; below 1 the head silences the direction.
    ov_cosine: cosine of what OV writes with u itself: 1 copies, -1 erases, 0 turns it into something else."""
    null: Float[np.ndarray, "quantity layer head level"]
    """Quantiles (at LEVELS) of the same for random directions."""
    n_null: int
    """How many of those."""
    seed: int
    """Seed of the null directions."""

    @property
    def qk_eigenvalues(self) -> Complex[np.ndarray, "layer head d_head"]:
        """Eigenvalues of QK."""
        return self.qk_spectrum @ np.array([1, 1j])

    @property
    def ov_eigenvalues(self) -> Complex[np.ndarray, "layer head d_head"]:
        """Eigenvalues of OV."""
        return self.ov_spectrum @ np.array([1, 1j])

    @property
    def copying(self) -> Float[np.ndarray, "layer head"]:
        """sum(lambda) / sum|lambda| over the eigenvalues of OV: 1 for a head that copies all it attends to, -1 for one
        that erases it (Elhage et al. 2021)."""
        return _score(self.ov_eigenvalues)

    @property
    def matching(self) -> Float[np.ndarray, "layer head"]:
        """The same of QK: 1 for a head in which tokens attend to tokens like themselves."""
        return _score(self.qk_eigenvalues)

    def value(self, quantity: str) -> Float[np.ndarray, "layer head"]:
        """One quantity of the direction.

        Raises:
            ConfigError: there is no such quantity.
        """
        return self.observed[self._index(quantity)]

    def beyond_null(self, quantity: str) -> Float[np.ndarray, "layer head"]:
        """-1 where the direction lies below 95% of random ones, 1 where above, 0 between.

        Raises:
            ConfigError: there is no such quantity.
        """
        i = self._index(quantity)
        low, high = self.null[i, ..., 0], self.null[i, ..., -1]
        return (self.observed[i] > high).astype(float) - (self.observed[i] < low)

    def _index(self, quantity: str) -> int:
        if quantity not in QUANTITIES:
            raise ConfigError(f"There is no quantity {quantity!r}: known are {list(QUANTITIES)}.")
        return QUANTITIES.index(quantity)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: copying and matching scores, and each quantity with the 95% range of its null."""
        n_layers, n_heads = self.copying.shape
        columns = {"copying": self.copying, "matching": self.matching}
        for quantity, observed, null in zip(QUANTITIES, self.observed, self.null, strict=True):
            columns |= {quantity: observed, f"{quantity}_low": null[..., 0], f"{quantity}_high": null[..., -1]}
        return grid_table({"layer": range(n_layers), "head": range(n_heads)}, **columns)

    def describe(self) -> str:
        """The result in words."""
        copying = self.copying
        best, worst = (np.unravel_index(f(copying), copying.shape) for f in (np.nanargmax, np.nanargmin))
        sentences = [
            f"{copying.size} heads of {self.model}. Copying score: median {np.nanmedian(copying):.2f}, highest "
            f"{copying[best]:.2f} (head {best[0]}.{best[1]}), lowest {copying[worst]:.2f} (head {worst[0]}.{worst[1]})."
        ]
        if not self.direction:
            return sentences[0]
        there = int(np.isfinite(self.value("ov_gain")).sum())
        sentences.append(f"For {self.direction}, {there} heads come after it:")
        lines = (
            ("key_gain", 1, "keys read it more than random directions"),
            ("query_reading", 1, "the query bias seeks it"),
            ("query_reading", -1, "the query bias shuns it"),
            ("ov_gain", -1, "values and outputs silence it"),
            ("ov_cosine", 1, "it is copied more"),
            ("ov_cosine", -1, "it is copied less"),
        )
        counts = [(int((self.beyond_null(quantity) == sign).sum()), words) for quantity, sign, words in lines]
        sentences.append(
            "; ".join(f"in {n} {words}" for n, words in counts) + f" (beyond 95% of {self.n_null} random ones)."
        )
        reading = self.value("query_reading")
        if np.isfinite(reading).any():
            top = np.unravel_index(np.nanargmax(reading), reading.shape)
            sentences.append(f"It is sought most by head {top[0]}.{top[1]}: {reading[top]:+.3g} in the score.")
        return " ".join(sentences)

    plot = drawn_by("heads.heads_figure")
    """Maps of the scores and quantities, layer by head."""


def head_circuits(
    vit: HookedViT,
    direction: RegisterNeurons | Float[Tensor, " d_model"] | None = None,
    *,
    n_null: int = 200,
    seed: int = 0,
) -> HeadCircuits:
    """Eigenvalues and copying scores of every head, and how each reads and writes an outlier direction.

    From weights alone, in float64: norms' weights and centring are folded into the maps that read them. Norms on
    queries and keys too, but for a LayerNorm over all heads side by side, which mixes them: QK is NaN there.

    Args:
        vit: the model.
        direction: of the stream: register neurons, whose rows of W_out are summed (each head hears of those in earlier
            blocks), or a vector, such as the mean of outlier tokens less that of the others.
        n_null: random directions to compare with.
        seed: of them.

    Raises:
        ConfigError: fewer than 20 random directions.
        InterventionError: no neuron was given, or the model does not have one of them.
        NonFiniteError: a weight is NaN or infinite.
        ShapeError: the vector is not of the stream's width, or zero after centring.
        UnsupportedArchitectureError: a norm stands after the sublayers.

    Source: Elhage et al. 2021 (QK and OV circuits, copying score); Jiang et al. 2025, proposition 1, for u2.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> found = head_circuits(vit, neurons)
        >>> found.copying.shape, bool((found.value("key_gain")[2:] > 1).all())
        ((6, 1), True)
    """
    require_linear_output(vit.cfg, "The reading of weights")
    check_at_least(20, n_null=n_null)  # for a 95% range
    along, words = directions_met(vit, direction)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n_null, vit.cfg.d_model, generator=generator, dtype=torch.float64)
    qk, ov, observed, null = [], [], [], []
    for layer, part in enumerate(vit.blocks):
        circuit = _Circuit.of(cast(Block, part), layer)
        qk.append(circuit.qk())
        ov.append(circuit.ov())
        null.append(circuit.quantities(random))
        mine = along[layer]
        observed.append(
            circuit.quantities(mine[None]) if mine is not None else torch.full_like(null[-1][..., :1], torch.nan)
        )
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    quantiles = torch.stack([values.quantile(levels, -1) for values in null])  # layer level quantity head
    return HeadCircuits(
        **vit.identity,
        direction=words,
        qk_spectrum=torch.view_as_real(torch.stack(qk)).numpy(),
        ov_spectrum=torch.view_as_real(torch.stack(ov)).numpy(),
        observed=rearrange(torch.stack(observed), "layer quantity head 1 -> quantity layer head").numpy(),
        null=rearrange(quantiles, "layer level quantity head -> quantity layer head level").numpy(),
        n_null=n_null,
        seed=seed,
    )


@dataclass(frozen=True)
class _Circuit:
    """The folded weights of one block's heads, float64 on the CPU."""

    norm: Any
    Q: Float[Tensor, "head d_model d_head"]
    K: Float[Tensor, "head d_model d_head"]
    V: Float[Tensor, "head d_model d_head"]
    O: Float[Tensor, "head d_head d_model"]  # noqa: E741
    b_Q: Float[Tensor, "head d_head"]

    @classmethod
    def of(cls, block: Block, layer: int) -> _Circuit:
        attn = block.attn
        Q, K, V = (fold(block.ln1, weight).cpu() for weight in (attn.W_Q, attn.W_K, attn.W_V))
        O = attn.W_O.detach().double()  # noqa: E741
        if attn.ln is not None:
            O = fold(attn.ln, O.flatten(0, 1)).view_as(O)  # noqa: E741
        Q, K = _head_norm(attn.q_norm, Q), _head_norm(attn.k_norm, K)
        bias = _head_norm(attn.q_norm, constants(block.ln1, attn.W_Q, attn.b_Q).cpu()[:, None])[:, 0]
        for weight in (Q, K, V, O):
            if weight.isinf().any() or (weight.isnan().any() and (attn.q_norm is None or weight is O)):
                raise NonFiniteError(f"The attention weights of block {layer} are NaN or infinite.")
        return cls(block.ln1, Q, K, V, O.cpu(), bias)

    def qk(self) -> Complex[Tensor, "head d_head"]:
        """Eigenvalues of W_Q W_K^T over sqrt(d_head), from the small product W_K^T W_Q."""
        return _eigenvalues(self.K.mT @ self.Q) / self.K.shape[-1] ** 0.5

    def ov(self) -> Complex[Tensor, "head d_head"]:
        """Eigenvalues of W_V W_O, from the small product W_O W_V."""
        return _eigenvalues(self.O @ self.V)

    def quantities(self, vectors: Float[Tensor, "item d_model"]) -> Float[Tensor, "quantity head item"]:
        """QUANTITIES of some directions of the stream."""
        d_model, d_head = self.Q.shape[1:]
        unit, n = unit_directions(self.norm, vectors), dimensions(self.norm, d_model)
        key = einsum(unit, self.K, "item m, head m d -> head item d")
        value = einsum(unit, self.V, "item m, head m d -> head item d")
        written = value @ self.O
        key_rms = (self.K.square().sum((1, 2)) / n).sqrt()
        # ||V O||_F from small products
        ov_square = ((self.V.mT @ self.V) * (self.O @ self.O.mT)).sum((1, 2))
        ov_rms = (ov_square.clamp_min(0) / n).sqrt()
        raw = F.normalize(vectors.double(), dim=-1)
        reading = einsum(key, self.b_Q, "head item d, head d -> head item") * (d_model / d_head) ** 0.5
        return torch.stack(
            [
                key.norm(dim=-1) / key_rms[:, None],
                reading,
                written.norm(dim=-1) / ov_rms[:, None],
                F.cosine_similarity(written, raw[None].expand_as(written), dim=-1),
            ]
        )


def _head_norm(norm: HeadNorm | None, weight: Float[Tensor, "head m d_head"]) -> Float[Tensor, "head m d_head"]:
    """A norm on queries or keys folded into the map before it; NaN where it mixes heads."""
    if norm is None:
        return weight
    inner = norm.norm
    scale = inner.w.detach().double().cpu()
    if norm.together == 1:
        return centred(inner, weight) * scale
    if isinstance(inner, LayerNorm):
        return torch.full_like(weight, torch.nan)
    return weight * rearrange(scale, "(head d) -> head 1 d", head=len(weight))


def _eigenvalues(small: Float[Tensor, "head d d"]) -> Complex[Tensor, "head d"]:
    """By magnitude, largest first; NaN for a matrix with NaN."""
    known = small.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvals(small.nan_to_num())
    order = values.abs().argsort(dim=-1, descending=True, stable=True)
    return torch.where(known[:, None], values.gather(-1, order), complex("nan"))


def _score(eigenvalues: Complex[np.ndarray, "layer head d"]) -> Float[np.ndarray, "layer head"]:
    total = np.abs(eigenvalues).sum(-1)
    return np.divide(eigenvalues.sum(-1).real, total, out=np.full(total.shape, np.nan), where=total > 0)


def directions_met(
    vit: HookedViT, direction: RegisterNeurons | Tensor | None
) -> tuple[list[Float[Tensor, " d_model"] | None], str]:
    """For each block the direction that its heads meet, and what it is."""
    n = vit.cfg.n_layers
    if direction is None:
        return [None] * n, ""
    if isinstance(direction, RegisterNeurons):
        check_neurons(vit, direction)
        sums: list[Tensor | None] = []
        total = torch.zeros(vit.cfg.d_model, dtype=torch.float64)
        by_layer = direction.by_layer()
        for layer in range(n):
            sums.append(total.clone() if total.any() else None)
            if layer in by_layer:
                rows = cast(Block, vit.blocks[layer]).mlp.W_out.detach().double().cpu()
                total += rows[list(by_layer[layer])].sum(0)
        return sums, f"what {len(direction)} register neurons write together"
    vector = direction.detach().double().cpu()
    if vector.shape != (vit.cfg.d_model,):
        raise ShapeError(f"A direction of the stream has {vit.cfg.d_model} numbers, got {list(vector.shape)}.")
    left = centred(cast(Block, vit.blocks[0]).ln1, vector)
    if not vector.isfinite().all() or left.norm() <= 1e-9 * vector.norm() or not vector.any():
        raise ShapeError("The direction is zero once its mean is taken out, or not finite: no head can see it.")
    return [vector] * n, "the given direction"

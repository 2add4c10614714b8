"""Multi-head self-attention with hook points, fused unless somebody looks inside; rotary positions."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import TokenLayout, ViTConfig
from registerlens.config_parts import AttentionKind, QKNormConfig
from registerlens.model.norms import NORMS
from registerlens.model.parts import PATTERNS, ResidualWriter, at_least_float32, editable, listening


@dataclass(frozen=True, eq=False)
class Rotation:
    """Turns queries or keys [batch, pos, head, d_head]; tokens without a position stay as they are."""

    cos: Float[Tensor, "pos heads d_head"]
    """Cosines; one row of heads where all heads turn alike. 1 where nothing is turned."""
    sin: Float[Tensor, "pos heads d_head"]
    """Sines; 0 where nothing is turned."""
    interleaved: bool
    """Whether neighbours are turned together, rather than the two halves."""

    def __call__(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """The turned tensor."""
        return x * self.cos.to(x.dtype) + self._quarter(x) * self.sin.to(x.dtype)

    def _quarter(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """Turned by a right angle."""
        if self.interleaved:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)


class Rotary(nn.Module):
    """The rotations of every layer for a token layout.

    A patch's angles are y * frequencies[..., 0, :] + x * frequencies[..., 1, :], with y and x its coordinates. Where
    frequencies are learned, `frequencies` [layer, head, 2, d_head / 2] is a weight; elsewhere half of them belong to
    each axis and follow from the configuration.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        if cfg.rope is None:
            raise ValueError("This architecture has no rotary positions.")
        self.rope, self.n_layers, self.d_head = cfg.rope, cfg.n_layers, cfg.d_head
        self.frequencies = None
        if cfg.rope.learned:
            self.frequencies = nn.Parameter(torch.rand(cfg.n_layers, cfg.n_heads, 2, cfg.d_head // 2))

    def forward(self, layout: TokenLayout, like: Tensor) -> list[Rotation]:
        """One rotation a layer, on the device of `like`; angles in float32 or better."""
        dtype = at_least_float32(like.dtype)
        coordinates = self._coordinates(layout.grid, like.device, dtype)
        frequencies = self._axial(like.device, dtype) if self.frequencies is None else self.frequencies.to(dtype)
        angles = torch.einsum("pa,lhaf->lphf", coordinates, frequencies)
        rotations = [self._rotation(of_layer, layout) for of_layer in angles]
        return rotations if len(rotations) == self.n_layers else rotations * self.n_layers

    def _coordinates(
        self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "patch axis"]:
        """Row and column of each patch, in the configuration's units."""
        axes = []
        for axis, n in enumerate(grid):
            place = torch.arange(n, device=device, dtype=dtype)
            if self.rope.coordinates == "centred":
                place = 2 * math.pi * (2 * (place + 0.5 + self.rope.offset) / n - 1)
            else:
                place = place + self.rope.offset
                if self.rope.reference_grid is not None:
                    place = place / n * self.rope.reference_grid[axis]
            axes.append(place)
        return rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij")), "axis h w -> (h w) axis")

    def _axial(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "1 1 axis pair"]:
        """Half of the pairs for each axis, with the same geometric series of frequencies."""
        n = self.d_head // 4
        series = self.rope.theta ** -(torch.arange(n, device=device, dtype=dtype) / n)
        own, none = series, torch.zeros_like(series)
        y, x = torch.cat([own, none]), torch.cat([none, own])
        return torch.stack([x, y] if self.rope.x_first else [y, x])[None, None]

    def _rotation(self, angles: Float[Tensor, "patch heads pair"], layout: TokenLayout) -> Rotation:
        still = angles.new_zeros(1, *angles.shape[1:])
        parts = [still.expand(layout.patches.start, -1, -1), angles]
        parts.append(still.expand(layout.n_test_time_registers, -1, -1))
        interleaved = self.rope.pairs == "interleaved"
        pattern = "pos heads pair -> pos heads (pair two)" if interleaved else "pos heads pair -> pos heads (two pair)"
        full = repeat(torch.cat(parts), pattern, two=2)
        return Rotation(full.cos(), full.sin(), interleaved)


def final_point(cfg: ViTConfig, kind: Literal["q", "k"]) -> str:
    """The hook point inside attention where queries or keys are as the scores take them: normalised and turned.

    Example:
        >>> final_point(ViTConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, image_size=(8, 8), patch_size=(4, 4)), "k")
        'hook_k'
    """
    if cfg.rope is not None:
        return f"hook_rot_{kind}"
    return f"hook_{kind}" if cfg.qk_norm is None else f"{kind}_norm.hook_normalized"


class HeadNorm(nn.Module):
    """A norm on queries or keys [batch, pos, head, d_head]: of each head, or of all heads side by side."""

    def __init__(self, cfg: QKNormConfig, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.together = n_heads if cfg.over == "all" else 1
        self.norm = NORMS[cfg.kind](d_head * self.together, cfg.eps)
        self.hook_normalized = HookPoint()  # [batch, pos, head, d_head]

    def forward(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch key head d_head"]:
        """The normalised heads; an edit at `hook_normalized` may add keys."""
        groups = rearrange(x, "batch pos (group head) d -> batch pos group (head d)", head=self.together)
        normalised = self.norm(groups)
        pattern = "batch pos group (head d) -> batch pos (group head) d"
        return self.hook_normalized(rearrange(normalised, pattern, head=self.together))


class Attention(nn.Module):
    """Self-attention over all tokens.

    Queries and keys may be normalised (`q_norm`, `k_norm`) and then turned by their positions (`hook_rot_q`,
    `hook_rot_k`), and the heads' outputs normalised before W_O (`ln`): `hook_z` is always what W_O reads.

    Scores and patterns exist only while `hook_attn_scores` or `hook_pattern` has a hook, or where attention is no
    softmax; per-head results only while `hook_result` has one. Otherwise `scaled_dot_product_attention` runs. Axes of
    scores and patterns: head, query, key.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.kind: AttentionKind = cfg.attention
        self.n_heads = cfg.n_heads
        self.d_head = cfg.d_head
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.n_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.out = ResidualWriter(cfg.n_heads * cfg.d_head, cfg.d_model, cfg.layer_scale)
        self.hook_q = HookPoint()  # [batch, pos, head, d_head], as k, v and z
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.q_norm = self.k_norm = None
        if cfg.qk_norm is not None:
            self.q_norm, self.k_norm = (HeadNorm(cfg.qk_norm, cfg.n_heads, cfg.d_head) for _ in "qk")
        if cfg.rope is not None:
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.ln = NORMS[cfg.norm](cfg.n_heads * cfg.d_head, cfg.norm_eps) if cfg.attn_norm else None
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()  # [batch, pos, head, d_model]
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rotation: Rotation | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the residual stream, LayerScale included; `rotation` where positions are rotary."""
        # Selected, not unbound: autograd forbids editing the outputs of unbind in place, and hooks like to do that.
        qkv = rearrange(
            self.qkv(x), "batch pos (three head d_head) -> three batch pos head d_head", three=3, head=self.n_heads
        )
        q, k, v = self.hook_q(qkv[0]), self.hook_k(qkv[1]), self.hook_v(qkv[2])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = self.hook_rot_q(rotation(q)), self.hook_rot_k(rotation(k))
        if self.kind != "softmax" or listening(self.hook_attn_scores, self.hook_pattern):
            z = self._explicit(q, k, v)
        else:
            z = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if self.ln is not None:
            z = rearrange(self.ln(z.flatten(2)), "batch pos (head d_head) -> batch pos head d_head", head=self.n_heads)
        z = self.hook_z(editable(z, self.hook_z))
        if listening(self.hook_result):
            result = einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
            return self.hook_result(result).sum(2) + self.b_O
        return self.out(z.flatten(2))

    def _explicit(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch key head d_head"],
        v: Float[Tensor, "batch key head d_head"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        # Head by head in memory: one copy each, where the matrix products would copy with strides again and again.
        queries, keys, values = (t.transpose(1, 2).contiguous() for t in (q * self.d_head**-0.5, k, v))
        scores = self.hook_attn_scores(queries @ keys.mT)
        pattern = PATTERNS[self.kind](scores, at_least_float32(v.dtype)).to(v.dtype)
        return (self.hook_pattern(editable(pattern, self.hook_pattern)) @ values).transpose(1, 2)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights, a view."""
        return self._weights(0)

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        """Key weights, a view."""
        return self._weights(1)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        """Value weights, a view."""
        return self._weights(2)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query biases."""
        return self._biases(0)

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        """Key biases."""
        return self._biases(1)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        """Value biases."""
        return self._biases(2)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights, LayerScale folded in."""
        return rearrange(self.out.effective_weight, "d_model (head d_head) -> head d_head d_model", head=self.n_heads)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias, LayerScale folded in."""
        return self.out.effective_bias

    def _weights(self, which: int) -> Float[Tensor, "head d_model d_head"]:
        return rearrange(
            self.qkv.weight, "(three head d_head) d_model -> three head d_model d_head", three=3, head=self.n_heads
        )[which]

    def _biases(self, which: int) -> Float[Tensor, "head d_head"]:
        if self.qkv.bias is None:
            return self.qkv.weight.new_zeros(self.n_heads, self.d_head)
        return rearrange(self.qkv.bias, "(three head d_head) -> three head d_head", three=3, head=self.n_heads)[which]

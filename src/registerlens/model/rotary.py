"""Rotary positions: the angles by which the queries and keys of patches are turned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from registerlens.config import TokenLayout, ViTConfig
from registerlens.model.parts import at_least_float32


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

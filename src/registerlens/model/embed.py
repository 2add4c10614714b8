"""From pixels to tokens: patch embedding, prefix and register tokens, position embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from registerlens.config import TokenLayout, ViTConfig
from registerlens.model.norms import NORMS


def sines_and_cosines(layout: TokenLayout, like: Float[Tensor, "token d_model"]) -> Float[Tensor, "patch d_model"]:
    """Fixed positions: a quarter of the numbers each for sines and cosines of the column, then of the row.

    Frequencies fall from 1 to 1 / 10000, computed in float64.

    Source: Chen et al. 2021 (MoCo v3), in the order of AIMv2 and MAE.
    """
    n = like.shape[1] // 4
    frequencies = 10_000.0 ** -(torch.arange(n, dtype=torch.float64) / n)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in layout.grid)
    y, x = (place.flatten()[:, None] * frequencies for place in torch.meshgrid(rows, columns, indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).to(like)


_FIXED = {"sincos": sines_and_cosines}


class Embedding(nn.Module):
    """The parameters before block 0, and the pure maps they stand for.

    `prefix` [token, d_model] holds [CLS], the distillation token and the trained registers, in sequence order;
    `W_pos` [token, d_model] has one row a token of the native sequence, zero where the source model adds none; it is
    None where positions are not learned.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        layout = cfg.layout()
        self.grid = cfg.grid
        self.fixed = _FIXED.get(cfg.positions)
        self.resampling, _, how = cfg.pos_interpolation.partition("_")
        self.antialias, self.offset = how == "antialias", 0.1 if how == "offset" else 0.0
        self.patch = nn.Conv2d(
            cfg.n_channels, cfg.d_model, kernel_size=cfg.patch_size, stride=cfg.patch_size, bias=cfg.patch_bias
        )
        self.norm = NORMS[cfg.norm](cfg.d_model, cfg.norm_eps) if cfg.patch_norm else None
        self.prefix = nn.Parameter(torch.randn(layout.patches.start, cfg.d_model) * 0.02)
        learned = cfg.positions == "learned"
        self.W_pos = nn.Parameter(torch.randn(layout.n_tokens, cfg.d_model) * 0.02) if learned else None

    def patches(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch patch d_model"]:
        """Patch embeddings, row by row, normalised where the model does that."""
        patches = self.patch(images).flatten(2).transpose(1, 2)
        return patches if self.norm is None else self.norm(patches)

    def sequence(self, patches: Float[Tensor, "batch patch d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Prefix and register tokens, then the patches."""
        return torch.cat([self.prefix.expand(len(patches), -1, -1), patches], dim=1)

    def positions(self, layout: TokenLayout) -> Float[Tensor, "pos d_model"]:
        """Position embeddings for this grid, resampled in float32 as the source library resamples them."""
        if self.W_pos is None:
            like = self.prefix
            added = like.new_zeros(layout.n_patches, like.shape[1]) if self.fixed is None else self.fixed(layout, like)
            return torch.cat([torch.zeros_like(like), added])
        if layout.grid == self.grid:
            return self.W_pos
        prefix, patches = self.W_pos[: layout.patches.start], self.W_pos[layout.patches.start :]
        native = rearrange(patches.float(), "(h w) d_model -> 1 d_model h w", h=self.grid[0])
        factors = [(side + self.offset) / own for side, own in zip(layout.grid, self.grid, strict=True)]
        target: dict[str, Any] = {"scale_factor": factors} if self.offset else {"size": layout.grid}
        resampled = F.interpolate(native, **target, mode=self.resampling, align_corners=False, antialias=self.antialias)
        return torch.cat([prefix, rearrange(resampled, "1 d_model h w -> (h w) d_model").to(patches.dtype)])

"""From pixels to tokens: patch embedding, prefix and register tokens, position embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from registerlens.config import TokenLayout, ViTConfig


class Embedding(nn.Module):
    """The parameters before block 0, and the pure maps they stand for.

    `prefix` [token, d_model] holds [CLS], the distillation token and the trained registers, in sequence order;
    `W_pos` [token, d_model] has one row a token of the native sequence, zero where the source model adds none.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        layout = cfg.layout()
        self.grid = cfg.grid
        self.antialias = cfg.pos_interpolation == "bicubic_antialias"
        self.patch = nn.Conv2d(
            cfg.n_channels, cfg.d_model, kernel_size=cfg.patch_size, stride=cfg.patch_size, bias=cfg.patch_bias
        )
        self.prefix = nn.Parameter(torch.randn(layout.patches.start, cfg.d_model) * 0.02)
        self.W_pos = nn.Parameter(torch.randn(layout.n_tokens, cfg.d_model) * 0.02)

    def patches(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch patch d_model"]:
        """Patch embeddings, row by row."""
        return self.patch(images).flatten(2).transpose(1, 2)

    def sequence(self, patches: Float[Tensor, "batch patch d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Prefix and register tokens, then the patches."""
        return torch.cat([self.prefix.expand(len(patches), -1, -1), patches], dim=1)

    def positions(self, layout: TokenLayout) -> Float[Tensor, "pos d_model"]:
        """Position embeddings for this grid, resampled in float32 as the source library resamples them."""
        if layout.grid == self.grid:
            return self.W_pos
        prefix, patches = self.W_pos[: layout.patches.start], self.W_pos[layout.patches.start :]
        native = rearrange(patches.float(), "(h w) d_model -> 1 d_model h w", h=self.grid[0])
        resampled = F.interpolate(
            native, size=layout.grid, mode="bicubic", align_corners=False, antialias=self.antialias
        )
        return torch.cat([prefix, rearrange(resampled, "1 d_model h w -> (h w) d_model").to(patches.dtype)])

"""From the normalised tokens to what the source model returns."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import TokenLayout, ViTConfig
from registerlens.model.norms import NORMS
from registerlens.model.parts import editable
from registerlens.model.pooling import AttentionPool


class Head(nn.Module):
    """Pooling, a norm (or none), a linear classifier or projection (or none), and an optional tanh.

    `hook_out` is the output.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.pooling = cfg.pooling
        self.attn = AttentionPool(cfg) if cfg.attn_pool is not None else None
        self.ln = NORMS[cfg.norm](cfg.d_pooled, cfg.norm_eps) if cfg.pool_norm else None
        self.linear = None if cfg.d_out is None else nn.Linear(cfg.d_pooled, cfg.d_out, bias=cfg.head_bias)
        self.act = torch.tanh if cfg.head_act == "tanh" else None
        self.hook_out = HookPoint()
        if self.linear is not None:
            nn.init.trunc_normal_(self.linear.weight, std=0.02)

    def forward(self, tokens: Float[Tensor, "batch pos d_model"], layout: TokenLayout) -> Float[Tensor, "batch *out"]:
        """[batch, d_out], or [batch, pos, d_out] when nothing is pooled (test-time registers left out)."""
        out = self.pool(tokens, layout)
        if self.ln is not None:
            out = self.ln(out)
        if self.linear is not None:
            out = self.linear(out)
        if self.act is not None:
            out = self.act(out)
        return self.hook_out(editable(out, self.hook_out))

    def pool(self, tokens: Float[Tensor, "batch pos d_model"], layout: TokenLayout) -> Float[Tensor, "batch *out"]:
        """[batch, parts * d_model], or every token of the source model when `pooling` is empty."""
        if not self.pooling:
            return tokens[:, : layout.patches.stop]
        if self.attn is not None:
            return self.attn(tokens, layout)
        parts = {
            "cls": lambda: tokens[:, layout.cls],
            "distillation": lambda: tokens[:, layout.distillation],
            "mean": lambda: tokens[:, layout.patches].mean(1),
            "mean_all": lambda: tokens[:, : layout.patches.stop].mean(1),
        }
        return torch.cat([parts[part]() for part in self.pooling], dim=-1)

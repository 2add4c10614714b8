"""Both ends of a model: from pixels to tokens, and from the normalised tokens to what the source model returns."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import TokenLayout, ViTConfig
from registerlens.config_parts import AttentionPoolConfig
from registerlens.model.norms import NORMS
from registerlens.model.parts import ACTIVATIONS, at_least_float32, editable, listening


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


class AttentionPool(nn.Module):
    """A learned query looks at the tokens; hook points as in the blocks' attention, with one query.

    `queries` [query, d_attn] has all of the source model's; the first is computed.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        pool = cfg.attn_pool
        if pool is None:
            raise ValueError("This architecture has no attention pooling.")
        norm = NORMS[cfg.norm]
        self.n_heads, self.over = pool.n_heads, pool.over
        self.queries = nn.Parameter(torch.randn(pool.n_queries, pool.d_attn) * 0.02)
        self.ln_q = norm(pool.d_attn, cfg.norm_eps) if pool.norm_inputs else None
        self.ln_k = norm(cfg.d_model, cfg.norm_eps) if pool.norm_inputs else None
        self.q = nn.Linear(pool.d_attn, pool.d_attn, bias=pool.qkv_bias) if pool.project_query else None
        self.kv = nn.Linear(cfg.d_model, 2 * pool.d_attn, bias=pool.qkv_bias)
        self.out = nn.Linear(pool.d_attn, pool.d_attn)
        self.hook_q = HookPoint()  # [batch, 1, head, d_head]
        self.hook_k = HookPoint()  # [batch, key, head, d_head], as v
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, 1, key]
        self.hook_pattern = HookPoint()  # [batch, head, 1, key]
        self.hook_z = HookPoint()  # [batch, 1, head, d_head]
        self.hook_out = HookPoint()  # [batch, d_attn]
        self.mlp = PoolMLP(pool, norm(pool.d_attn, cfg.norm_eps)) if pool.d_mlp else None

    def forward(self, tokens: Float[Tensor, "batch pos d_model"], layout: TokenLayout) -> Float[Tensor, "batch d_attn"]:
        """The pooled feature; test-time registers are not looked at."""
        attended = tokens[:, layout.patches if self.over == "patches" else slice(layout.patches.stop)]
        query = self.queries[:1] if self.ln_q is None else self.ln_q(self.queries[:1])
        attended = attended if self.ln_k is None else self.ln_k(attended)
        query = (query if self.q is None else self.q(query)).expand(len(tokens), 1, -1)
        q = self.hook_q(rearrange(query, "batch pos (head d) -> batch pos head d", head=self.n_heads).clone())
        kv = rearrange(self.kv(attended), "batch pos (two head d) -> two batch pos head d", two=2, head=self.n_heads)
        k, v = self.hook_k(kv[0]), self.hook_v(kv[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if listening(self.hook_attn_scores, self.hook_pattern):
            scores = self.hook_attn_scores(q * q.shape[-1] ** -0.5 @ k.mT)
            pattern = scores.softmax(-1, dtype=at_least_float32(v.dtype)).to(v.dtype)
            z = self.hook_pattern(editable(pattern, self.hook_pattern)) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        z = self.hook_z(editable(z.transpose(1, 2), self.hook_z))
        pooled = self.hook_out(self.out(z.flatten(1)))
        return pooled if self.mlp is None else pooled + self.mlp(pooled)


class PoolMLP(nn.Module):
    """A norm and an MLP on the pooled feature, to be added to it."""

    def __init__(self, pool: AttentionPoolConfig, norm: nn.Module) -> None:
        super().__init__()
        self.ln, self.act = norm, ACTIVATIONS[pool.act_fn]
        self.up, self.out = nn.Linear(pool.d_attn, pool.d_mlp), nn.Linear(pool.d_mlp, pool.d_attn)
        self.hook_pre = HookPoint()  # [batch, d_mlp], as post
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch d_attn"]) -> Float[Tensor, "batch d_attn"]:
        """What the MLP adds to the pooled feature."""
        return self.out(self.hook_post(editable(self.act(self.hook_pre(self.up(self.ln(x)))), self.hook_post)))


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

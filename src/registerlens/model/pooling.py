"""Pooling by attention: a learned query, its attention over the tokens, and an MLP after it where there is one."""

from __future__ import annotations

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
        seen = tokens[:, layout.patches if self.over == "patches" else slice(layout.patches.stop)]
        query = self.queries[:1] if self.ln_q is None else self.ln_q(self.queries[:1])
        seen = seen if self.ln_k is None else self.ln_k(seen)
        query = (query if self.q is None else self.q(query)).expand(len(tokens), 1, -1)
        q = self.hook_q(rearrange(query, "batch pos (head d) -> batch pos head d", head=self.n_heads).clone())
        kv = rearrange(self.kv(seen), "batch pos (two head d) -> two batch pos head d", two=2, head=self.n_heads)
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
        """What it adds."""
        return self.out(self.hook_post(editable(self.act(self.hook_pre(self.up(self.ln(x)))), self.hook_post)))

"""Multi-head self-attention with TransformerLens's hook points, fused unless somebody looks inside."""

from __future__ import annotations

import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import ViTConfig
from registerlens.model.parts import ResidualWriter, at_least_float32, editable, listening


class Attention(nn.Module):
    """Self-attention over all tokens.

    Scores and patterns exist only while `hook_attn_scores` or `hook_pattern` has a hook; per-head results only while
    `hook_result` has one. Otherwise `scaled_dot_product_attention` runs. Axes of scores and patterns: head, query, key.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.d_head = cfg.d_head
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.n_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.out = ResidualWriter(cfg.n_heads * cfg.d_head, cfg.d_model, cfg.layer_scale)
        self.hook_q = HookPoint()  # [batch, pos, head, d_head], as k, v and z
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()  # [batch, pos, head, d_model]
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the residual stream, LayerScale included."""
        # Selected, not unbound: autograd forbids editing the outputs of unbind in place, and hooks like to do that.
        qkv = rearrange(
            self.qkv(x), "batch pos (three head d_head) -> three batch pos head d_head", three=3, head=self.n_heads
        )
        q, k, v = self.hook_q(qkv[0]), self.hook_k(qkv[1]), self.hook_v(qkv[2])
        if listening(self.hook_attn_scores, self.hook_pattern):
            z = self._explicit(q, k, v)
        else:
            z = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
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
        pattern = scores.softmax(-1, dtype=at_least_float32(v.dtype)).to(v.dtype)
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

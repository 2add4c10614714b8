"""The MLP of a block: neurons, with their pre- and post-activations as hook points."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import ViTConfig
from registerlens.model.parts import ACTIVATIONS, ResidualWriter, editable, listening

_CACHED_FLOATS = 2**20
"""Hidden units held at once on the CPU when nobody listens: 4 MiB stay in the cache, the whole layer would not."""


class MLP(nn.Module):
    """Two linear maps around a nonlinearity; a neuron is one hidden unit after it (`hook_post`)."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.act_fn]
        self.up = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.out = ResidualWriter(cfg.d_mlp, cfg.d_model, cfg.layer_scale)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]
        nn.init.trunc_normal_(self.up.weight, std=0.02)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream, LayerScale included."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or listening(self.hook_pre, self.hook_post):
            post = self.act(self.hook_pre(self.up(x)))
            return self.out(self.hook_post(editable(post, self.hook_post)))
        return self._in_pieces(x)

    def _in_pieces(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        # The same arithmetic, a few tokens at a time, so that the hidden layer never leaves the cache.
        tokens = x.flatten(0, 1)
        out = torch.empty_like(tokens)
        step = max(1, _CACHED_FLOATS // self.up.out_features)
        for start in range(0, len(tokens), step):
            out[start : start + step] = self.out(self.act(self.up(tokens[start : start + step])))
        return out.view_as(x)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights; column n feeds neuron n."""
        return self.up.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input biases."""
        return self.up.bias

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights, LayerScale folded in; row n is what neuron n writes."""
        return self.out.effective_weight.T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias, LayerScale folded in."""
        return self.out.effective_bias

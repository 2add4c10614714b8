"""The parts every sublayer is made of: LayerNorm with hook points, LayerScale, activations, and "who listens"."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import Activation


def _quick_gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
}
"""The nonlinearities of `ViTConfig.act_fn`."""


def listening(*points: HookPoint) -> bool:
    """Whether any of these hook points has a hook, forward or backward: only then is its tensor worth making."""
    return any(point.has_hooks() for point in points)


def editable(x: Float[Tensor, "..."], point: HookPoint) -> Float[Tensor, "..."]:
    """The output of an operation that keeps it for its gradient, safe for a hook at `point` to edit in place."""
    return x.clone() if x.requires_grad and listening(point) else x


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The number type of norms, softmax and other sums: float32, or float64 where the model is."""
    return torch.promote_types(dtype, torch.float32)


class LayerNorm(nn.Module):
    """LayerNorm whose scale and output are hook points, computed fused unless the scale is listened to.

    `hook_scale` is the standard deviation [..., 1]; `hook_normalized` is what leaves the norm, affine map included.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalise over the last axis."""
        if not listening(self.hook_scale):
            return self.hook_normalized(F.layer_norm(x, self.w.shape, self.w, self.b, self.eps))
        if torch.is_grad_enabled() or at_least_float32(x.dtype) != x.dtype:
            return self.hook_normalized(self.shares(x)[0])
        # Without a graph to keep, the fused kernel's statistics serve; what a hook makes of the scale is put back in.
        standard, _, inverse = torch.native_layer_norm(x, self.w.shape, None, None, self.eps)
        own = inverse.reciprocal()
        scale = self.hook_scale(own.clone())
        return self.hook_normalized(torch.addcmul(self.b, standard * (own / scale), self.w))

    def shares(self, *parts: Float[Tensor, "*batch d_model"]) -> tuple[Float[Tensor, "*batch d_model"], ...]:
        """What each part of a sum contributes to the normalised sum: given its scale, a LayerNorm is linear.

        The bias goes to the first part. The shares add up to `forward(sum(parts))`.
        """
        wide = [part.to(at_least_float32(part.dtype)) for part in parts]
        centred = [part - part.mean(-1, keepdim=True) for part in wide]
        total = torch.stack(centred).sum(0)
        scale = (total.square().mean(-1, keepdim=True) + self.eps).sqrt()
        scale = self.hook_scale(editable(scale, self.hook_scale))
        shares = [part / scale * self.w for part in centred]
        shares[0] = shares[0] + self.b
        return tuple(share.to(parts[0].dtype) for share in shares)


class ResidualWriter(nn.Module):
    """The last linear map of a sublayer, which writes into the residual stream, with its LayerScale if there is one.

    `effective_weight` and `effective_bias` have the LayerScale folded in: they are what the stream receives.
    """

    def __init__(self, d_in: int, d_model: int, layer_scale: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model, d_in))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.gamma = nn.Parameter(torch.ones(d_model)) if layer_scale else None
        nn.init.trunc_normal_(self.weight, std=0.02)

    @property
    def effective_weight(self) -> Float[Tensor, "d_model d_in"]:
        """The weight, LayerScale folded in."""
        return self.weight if self.gamma is None else self.weight * self.gamma[:, None]

    @property
    def effective_bias(self) -> Float[Tensor, " d_model"]:
        """The bias, LayerScale folded in."""
        return self.bias if self.gamma is None else self.bias * self.gamma

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_model"]:
        """gamma * (W x + b)."""
        out = F.linear(x, self.weight, self.bias)
        if self.gamma is None:
            return out
        # `out` is ours alone here: without a graph to keep, scaling in place saves a pass over memory.
        return out * self.gamma if torch.is_grad_enabled() else out.mul_(self.gamma)

"""The parts every sublayer is made of: LayerScale, activations, and "who listens"."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformer_lens.hook_points import HookPoint

from registerlens.config_parts import Activation, AttentionKind


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
    "silu": F.silu,
    "relu": F.relu,
    "relu2": _relu2,
}
"""The nonlinearities of `ViTConfig.act_fn`."""


def _softmax(scores: Float[Tensor, "*row key"], dtype: torch.dtype) -> Float[Tensor, "*row key"]:
    return scores.softmax(-1, dtype=dtype)


def _sigmoid(scores: Float[Tensor, "*row key"], dtype: torch.dtype) -> Float[Tensor, "*row key"]:
    return (scores.to(dtype) - math.log(scores.shape[-1])).sigmoid()


PATTERNS: dict[AttentionKind, Callable[[Tensor, torch.dtype], Tensor]] = {"softmax": _softmax, "sigmoid": _sigmoid}
"""What makes a pattern of scores [..., key], in a number type; the kinds of `ViTConfig.attention`."""


def listening(*modules: nn.Module) -> bool:
    """Whether any of these has a hook, TransformerLens's or PyTorch's: only then is its tensor worth making."""
    return any(map(len, hooks_of(modules))) or bool(_has_any_global_hook())


def hooks_of(modules: Iterable[nn.Module]) -> list[Mapping[int, Callable[..., Any]]]:
    """The tables of hooks of some modules, of every kind that PyTorch has; TransformerLens's are among them."""
    return [
        table
        for module in modules
        for table in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
    ]


def editable(x: Float[Tensor, "..."], point: HookPoint) -> Float[Tensor, "..."]:
    """The output of an operation that keeps it for its gradient, safe for a hook at `point` to edit in place."""
    return x.clone() if x.requires_grad and listening(point) else x


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The number type of norms, softmax and other sums: float32, or float64 where the model is."""
    return torch.promote_types(dtype, torch.float32)


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


def token_norms(resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Euclidean norms over the last axis, summed in float32 at least, returned as float32.

    Example:
        >>> token_norms(torch.full((2, 4), 0.5, dtype=torch.bfloat16))
        tensor([1., 1.])
    """
    return torch.linalg.vector_norm(resid, dim=-1, dtype=at_least_float32(resid.dtype)).float()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, wherever it is.

    Example:
        >>> tensor_hash(torch.zeros(2)) == tensor_hash(torch.zeros(2)) != tensor_hash(torch.ones(2))
        True
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()

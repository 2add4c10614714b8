"""Helpers for tests: random weights everywhere, how far two tensors are apart, and the public rooms."""

from types import ModuleType

import torch
from torch import Tensor, nn

import registerlens


def randomise(module: nn.Module, seed: int = 0, std: float = 0.25) -> nn.Module:
    """Give EVERY parameter a random value (scales around 1, all else around 0), so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith(("weight", ".w", "gamma", "lambda1"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + is_scale)
    return module.eval()


def relative(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what was expected."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} instead of {tuple(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    return ((got - expected).norm() / expected.norm()).item()


def rooms() -> list[ModuleType]:
    """The public rooms: `rl.analysis`, `rl.circuits` and so on."""
    values = [getattr(registerlens, name) for name in registerlens.__all__]
    return [value for value in values if isinstance(value, ModuleType)]

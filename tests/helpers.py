"""Helpers for tests: random weights everywhere, distances of tensors, the explorer's codes read, the public rooms."""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

import registerlens
from registerlens.explorer.codes import LEVELS


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


def decode(codes: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """The inverse of the explorer's `encode`, as its JavaScript does it."""
    return (codes.astype(np.float32) / LEVELS) ** 2 * largest[:, None]


def decoding_error(rows: np.ndarray) -> np.ndarray:
    """How far each decoded value may be from the true one.

    A square root is off by at most half a step, h = 1 / (2 * 255); its square by 2 h sqrt(share) + h^2 at most.
    """
    half = 1 / (2 * LEVELS)
    largest = rows.max(1, keepdims=True)
    return 2 * half * np.sqrt(rows * largest) + half**2 * largest

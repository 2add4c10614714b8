"""Random numbers from a seed, vectors with given inner products, and matrices with given kernel residuals."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.errors import ConfigError


class Draw:
    """Seeded float64 numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Float[Tensor, "..."]:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Float[Tensor, "..."]:
        """Numbers between 0 and 1."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


def with_products(
    directions: Float[Tensor, "direction d_model"], products: Float[Tensor, "direction vector"]
) -> Float[Tensor, "d_model vector"]:
    """The shortest vectors whose inner products with these directions are those.

    Example:
        >>> with_products(torch.eye(3)[:2], torch.tensor([[5.0], [7.0]])).tolist()
        [[5.0], [7.0], [0.0]]
    """
    return directions.T @ torch.linalg.solve(directions @ directions.T, products)


def turned_towards(
    W: Float[Tensor, "d_model width"], plane: Float[Tensor, "2 d_model"], residuals: list[float]
) -> Float[Tensor, "d_model width"]:
    """W, whose kernel contains the plane, with its top left singular vector turned towards the plane.

    The singular values stay, so that the relative residuals |W^T u| / (sigma_max |u|) come out exactly as asked.

    Raises:
        ConfigError: no unit vector has such residuals.

    Example:
        >>> eye = torch.eye(3, dtype=torch.float64)
        >>> (eye[:2] @ turned_towards(2 * eye[:, 2:], eye[:2], [0.6, 0.0])).tolist()  # sigma_max is 2
        [[1.2], [0.0]]
    """
    towards = with_products(plane, torch.tensor(residuals, dtype=W.dtype)[:, None])[:, 0]
    if not towards.norm() < 1:
        raise ConfigError(
            f"Kernel residuals {residuals} of u1 and u2 in one matrix are more than a direction can have. Lower them."
        )
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    # The sign is free. This one excites neurons: what only silences them, they would hide again.
    top, reads = (U[:, 0], Vh[0]) if Vh[0].sum() > 0 else (-U[:, 0], -Vh[0])
    change = (1 - towards.norm() ** 2).sqrt() * top + towards - top
    return W + S[0] * torch.outer(change, reads)

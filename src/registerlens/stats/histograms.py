"""Medians, and histograms over bins that are fixed beforehand, so that batches add up."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

LOG_LOW, LOG_HIGH, N_BINS = -3.0, 7.0, 500
"""Histograms of log(norm / median norm of the image): from e^-3 to e^7 in steps of 2%; the ends collect the rest."""


def medians(values: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch 1"]:
    """The median over the last axis, of an even number the mean of the middle two, as `quantile(0.5)` at any size.

    Example:
        >>> medians(torch.tensor([[1.0, 2.0, 4.0, 9.0]]))
        tensor([[3.]])
    """
    lower, upper = values.median(-1, keepdim=True).values, -(-values).median(-1, keepdim=True).values
    return (lower + upper) / 2


def bin_edges() -> Float[np.ndarray, " edges"]:
    """Edges of the histogram bins, as multiples of the image's median norm."""
    return np.exp(np.linspace(LOG_LOW, LOG_HIGH, N_BINS + 1))


def count_bins(relative: Float[Tensor, "row value"]) -> Int[Tensor, "row bin"]:
    """Histogram of each row over the bins of `bin_edges()`, on the CPU; the ends collect what lies outside.

    Example:
        >>> count_bins(torch.tensor([[1.0, 1.0, 20.0]])).nonzero()[:, 1]
        tensor([150, 299])
    """
    bins = ((relative.log() - LOG_LOW) * (N_BINS / (LOG_HIGH - LOG_LOW))).long().clamp(0, N_BINS - 1)
    rows = torch.zeros(len(relative), N_BINS, dtype=torch.int64, device=relative.device)
    return rows.scatter_add_(1, bins, torch.ones_like(bins)).cpu()


ASINH_LIMIT = 12.5
"""Histograms are over arsinh(x) from -12.5 to 12.5 in steps of 0.05: linear near zero, logarithmic up to 134,000."""


def signed_edges() -> Float[np.ndarray, " edge"]:
    """Edges of the bins of signed values."""
    return np.sinh(np.linspace(-ASINH_LIMIT, ASINH_LIMIT, N_BINS + 1))


def count_signed(values: Float[Tensor, "row value"]) -> Int[Tensor, "row bin"]:
    """Histogram of each row over the bins of `signed_edges()`, on the CPU; the ends collect what lies outside.

    Example:
        >>> count_signed(torch.tensor([[0.01, 0.02, -1e9]])).nonzero()[:, 1].tolist()
        [0, 250]
    """
    bins = ((values.asinh() + ASINH_LIMIT) * (N_BINS / (2 * ASINH_LIMIT))).long().clamp(0, N_BINS - 1)
    counts = torch.zeros(len(values), N_BINS, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins)).cpu()

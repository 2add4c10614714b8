"""Statistics over images that stream by, and how well two rankings agree."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

_NORMAL_95 = 1.959964


class Moments:
    """Mean, mean magnitude and standard error over images of an array of numbers an image; NaN takes no part.

    Example:
        >>> seen = Moments(2)
        >>> seen.add(torch.tensor([[1.0, -4.0], [3.0, torch.nan]]))
        >>> seen.mean.tolist(), seen.magnitude.tolist(), seen.standard_error.tolist()
        ([2.0, -4.0], [2.0, 4.0], [1.0, nan])
    """

    def __init__(self, *shape: int) -> None:
        self.n, self.sum, self.absolute, self.square = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))

    def add(self, values: Float[Tensor, "image ..."]) -> None:
        """Take in one batch."""
        wide = values.detach().cpu().double()
        # Not in place: what was made in inference mode could not be changed outside it.
        self.n = self.n + wide.isfinite().sum(0)
        wide = wide.nan_to_num(0.0, 0.0, 0.0)
        self.sum = self.sum + wide.sum(0)
        self.absolute = self.absolute + wide.abs().sum(0)
        self.square = self.square + wide.square().sum(0)

    @property
    def mean(self) -> Float[np.ndarray, "..."]:
        """Mean over images; NaN where there was none."""
        return (self.sum / self.n).numpy()

    @property
    def magnitude(self) -> Float[np.ndarray, "..."]:
        """Mean absolute value over images."""
        return (self.absolute / self.n).numpy()

    @property
    def standard_error(self) -> Float[np.ndarray, "..."]:
        """Standard error of the mean; NaN for fewer than two images."""
        centred = (self.square - self.sum.square() / self.n).clamp_min(0)
        freedom = torch.where(self.n > 1, self.n - 1, torch.nan)
        return (centred / freedom / self.n).sqrt().numpy()


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Spearman's rank correlation with its 95% interval.

    Source: Bonett and Wright 2000, equation 5 (standard error of Fisher's z of a rank correlation).
    """

    rho: float
    """From -1 to 1; NaN where a ranking is all ties, or there are fewer than two pairs."""
    low: float
    """Lower end of the interval; NaN for fewer than four pairs."""
    high: float
    """Upper end."""
    n: int
    """Pairs compared."""

    def __str__(self) -> str:
        if math.isnan(self.rho):
            return f"undefined (n = {self.n})"
        interval = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.rho:.2f}{interval} (n = {self.n})"


def rank_correlation(a: Float[np.ndarray, " item"], b: Float[np.ndarray, " item"]) -> RankCorrelation:
    """Spearman's rank correlation over the pairs in which both are numbers; ties get their mean rank.

    Example:
        >>> str(rank_correlation(np.array([1.0, 2.0, 3.0, 9.0]), np.array([0.0, 5.0, 6.0, 7.0])))
        '1.00 [1.00, 1.00] (n = 4)'
    """
    both = np.isfinite(a) & np.isfinite(b)
    n = int(both.sum())
    ranks = np.stack([pd.Series(values[both]).rank().to_numpy() for values in (a, b)])
    if n < 2 or np.ptp(ranks, axis=1).min() == 0:
        return RankCorrelation(rho=math.nan, low=math.nan, high=math.nan, n=n)
    rho = float(np.clip(np.corrcoef(ranks)[0, 1], -1, 1))
    if n < 4:
        return RankCorrelation(rho=rho, low=math.nan, high=math.nan, n=n)
    z = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    half = _NORMAL_95 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return RankCorrelation(rho=rho, low=math.tanh(z - half), high=math.tanh(z + half), n=n)

"""Cells of several patches, for pages on which every patch would be too many: attention pooled so that it adds up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import TokenLayout

MOST_PATCHES = 420
"""Patches that a page shows one by one; more are pooled into cells."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Square cells of `side` x `side` patches; those at the right and lower edge may be cut off.

    Example:
        >>> cells = Cells.few_enough(TokenLayout(grid=(37, 37), n_prefix=1))
        >>> cells.side, cells.layout.grid
        (2, (19, 19))
    """

    side: int
    """Patches along a cell; 1 leaves everything as it is."""
    patches: TokenLayout
    """Where the patches are."""

    @classmethod
    def few_enough(cls, layout: TokenLayout) -> Cells:
        """The smallest cells of which there are no more than `MOST_PATCHES`."""
        side = 1
        while math.prod(cls(side=side, patches=layout).layout.grid) > MOST_PATCHES:
            side += 1
        return cls(side=side, patches=layout)

    @property
    def layout(self) -> TokenLayout:
        """The layout with cells in the place of patches."""
        rows, columns = (-(-length // self.side) for length in self.patches.grid)
        return replace(self.patches, grid=(rows, columns))

    @property
    def words(self) -> str:
        """What was pooled; empty where nothing was."""
        if self.side == 1:
            return ""
        return (
            f"To keep this page small, {self.side} x {self.side} patches share a cell, and (row,column) counts cells: "
            f"attention to a cell is summed, attention from it averaged; norm and neurons are those of its patch with "
            f"the largest norm in the clean model."
        )

    def pool(self, pattern: Float[Tensor, "pos key"]) -> Float[Tensor, "cell cell_or_key"]:
        """Attention from cells to cells: the mean over queries, the sum over keys; rows that sum to 1 still do.

        Example:
            >>> cells = Cells(side=2, patches=TokenLayout(grid=(2, 2), n_prefix=1))
            >>> cells.pool(torch.full((5, 5), 0.2))
            tensor([[0.2000, 0.8000],
                    [0.2000, 0.8000]])
        """
        if self.side == 1:
            return pattern
        belongs = self._belongs(len(pattern))
        columns = pattern @ self._belongs(pattern.shape[1])
        return belongs.T @ columns / belongs.sum(0)[:, None]

    def largest(self, norms: Float[Tensor, " pos"]) -> Int[Tensor, " cell"]:
        """For every cell its patch of largest norm; for other tokens themselves."""
        if self.side == 1:
            return torch.arange(len(norms))
        members = self._belongs(len(norms)).bool()
        return torch.where(members, norms[:, None], -math.inf).argmax(0)

    def _belongs(self, n: int) -> Float[Tensor, "pos cell"]:
        """Which cell each of `n` tokens or keys is in; those that are no patches have one of their own."""
        start, stop = self.patches.patches.start, self.patches.patches.stop
        rows, columns = (torch.arange(length) // self.side for length in self.patches.grid)
        cells = rearrange(rows[:, None] * self.layout.grid_width + columns, "h w -> (h w)") + start
        behind = torch.arange(n - stop) + self.layout.patches.stop
        index = torch.cat([torch.arange(start), cells, behind])
        return torch.eye(int(index.max()) + 1)[index]

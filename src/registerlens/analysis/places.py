"""Is it the place in the image or what it shows? How much of the patch norms' variance lies between places."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

PREFIX = "by place"


def count_by_place(relative: Float[Tensor, "sublayer batch patch"], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Relative patch norms as totals that add up over batches, apart for each grid, and that `share_by_place` takes."""
    name = f"{PREFIX} {grid[0]}x{grid[1]}"
    centred = relative - 1  # the median's: less is lost when squares are subtracted
    moments = torch.stack([centred.sum(1), centred.square().sum(1)])
    return {name: moments, f"{name} images": torch.tensor(relative.shape[1])}


def share_by_place(totals: Mapping[str, Tensor]) -> Float[np.ndarray, " sublayer"]:
    """Share (0 to 1) of the variance of relative norms between places of the image, the rest being between images.

    Near 1 the same patches stand out in every image, as a position embedding makes them; near 0 it is what the images
    show. NaN where no grid has two images. An analysis of variance, freed of the share that chance has in few images.

    Example:
        >>> fixed, moving = torch.ones(2, 1, 4, 9).unbind()
        >>> fixed[..., 0], moving[0, range(4), range(4)] = 9.0, 9.0
        >>> [share_by_place(count_by_place(norms, (3, 3))).item() for norms in (fixed, moving)]
        [1.0, 0.0]
    """
    between = within = torch.zeros(())
    for name, moments in totals.items():
        n = int(totals.get(f"{name} images", 0))
        if n < 2:
            continue
        mean, square = moments.double().cpu() / n
        spread = (square - mean.square()).clamp_min(0).mean(-1) * n / (n - 1)
        places = (mean - mean.mean(-1, keepdim=True)).square().mean(-1)
        between, within = between + n * (places - spread / n).clamp_min(0), within + n * spread
    share = between / (between + within)  # NaN where nothing varies
    return np.atleast_1d(share.numpy())

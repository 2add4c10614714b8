"""What flat patches of the synthetic task may show: content that nobody asks for, smooth enough to stay disposable."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic_task import FlatContent
from registerlens.errors import ConfigError

CONTRAST = 0.4
"""Standard deviation of what is shown, in pixel units: that of the textures is 0.5, of the noise on them 0.6."""
SHRUNK_TO = 256
"""Height and width that photographs are shrunk to before patches are cut out."""
SMOOTHEST = 0.3
"""The share of a photograph's patches, those of least contrast, that count as background."""


def flat_contents(
    n: int, patch: int, kinds: tuple[FlatContent, ...], generator: torch.Generator
) -> Float[Tensor, "n 3 height width"]:
    """The content of `n` flat patches, each of a kind drawn from `kinds`; of mean zero over a patch.

    Raises:
        ConfigError: photographs are asked for, and no installed package has any.

    Example:
        >>> shown = flat_contents(4, 8, ("gradient", "soft_noise"), torch.Generator().manual_seed(0))
        >>> shown.shape, bool(shown.mean((2, 3)).abs().max() < 1e-6)
        (torch.Size([4, 3, 8, 8]), True)
    """
    of_kind = torch.stack([_CONTENT[kind](n, patch, generator) for kind in kinds])
    if len(kinds) == 1:
        return of_kind[0]
    drawn = torch.randint(len(kinds), (n,), generator=generator)
    return of_kind[drawn, torch.arange(n)]


def _nothing(n: int, patch: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(n, 3, patch, patch)


def _gradients(n: int, patch: int, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi * torch.rand(n, 1, 1, 1, generator=generator)
    slope = torch.randn(n, 3, 1, 1, generator=generator)
    steps = torch.linspace(-1, 1, patch)
    ramp = steps * angle.cos() + steps[:, None] * angle.sin()
    return slope * ramp / steps.std(correction=0) * CONTRAST


def _soft_noise(n: int, patch: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(n, 3, 3, 3, generator=generator)
    soft = F.interpolate(coarse, size=(patch, patch), mode="bicubic", align_corners=True)
    soft = soft - soft.mean((2, 3), keepdim=True)
    return soft / soft.std((1, 2, 3), keepdim=True, correction=0) * CONTRAST


def _photographs(n: int, patch: int, generator: torch.Generator) -> Tensor:
    bank = _backgrounds(patch)
    return bank[torch.randint(len(bank), (n,), generator=generator)]


@lru_cache(maxsize=2)
def _backgrounds(patch: int) -> Float[Tensor, "n 3 height width"]:
    """The smoothest patches of every photograph at hand, brought to equal contrast."""
    import numpy as np  # noqa: PLC0415  (only where photographs are asked for)
    from PIL import Image  # noqa: PLC0415

    found = []
    for path in shipped_photographs():
        small = Image.open(path).convert("RGB").resize((SHRUNK_TO, SHRUNK_TO), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.array(small)).float() / 255
        whole = SHRUNK_TO // patch * patch
        cut = rearrange(pixels[:whole, :whole], "(h p) (w q) c -> (h w) c p q", p=patch, q=patch)
        cut = cut - cut.mean((2, 3), keepdim=True)
        spread = cut.std((1, 2, 3), correction=0)
        order = spread.argsort()[: int(SMOOTHEST * len(cut))]
        found.append((cut / spread.clamp_min(1e-3)[:, None, None, None] * CONTRAST)[order])
    if not found:
        raise ConfigError(
            "flat_content 'photographs' needs the photographs that come with scikit-image, scikit-learn or matplotlib; "
            "none is installed. Install one of them, or take 'soft_noise'."
        )
    return torch.cat(found)


_CONTENT: dict[FlatContent, Callable[[int, int, torch.Generator], Tensor]] = dict(
    zip(get_args(FlatContent), (_nothing, _gradients, _soft_noise, _photographs), strict=True)
)

"""Images for a first look at any model, offline: synthetic for the embedded model, photographs for all others."""

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from registerlens.data.images import load_images, to_display
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ImageError, MissingExtraError
from registerlens.model.vit import HookedViT

SYNTHETIC, VIEWS = 256, 4
"""How many there are unless another number is asked for: so many synthetic images, or so many views a photograph."""
SCALES = (1.0, 1.25, 1.5)
"""How much larger than the model's size a photograph is before a view of that size is cut out of it."""


def example_images(
    vit: HookedViT, n: int | None = None, seed: int = 0, photographs: Sequence[str | Path] | None = None
) -> Float[Tensor, "image channel height width"]:
    """Images that suit a model: what the embedded one was trained on, or views of photographs, preprocessed.

    A view is a photograph enlarged by one of SCALES, cut out at a random place, in half of the cases mirrored. Views of
    different seeds differ, but they show the same few photographs: they are no sample of the world.

    Args:
        vit: the model.
        n: how many; default: 256 synthetic images, or four views of each photograph.
        seed: equal seeds give equal images.
        photographs: image files; default: those that come with scikit-image, scikit-learn and matplotlib.

    Raises:
        ImageError: n is below 1, or there are no photographs in the list.
        MissingExtraError: none of the three packages is installed, and no photographs are given.

    Example:
        >>> import registerlens as rl
        >>> example_images(rl.HookedViT.from_pretrained("registerlens:tiny"), 2).shape
        torch.Size([2, 3, 48, 48])
        >>> cfg = rl.ViTConfig(n_layers=1, d_model=16, n_heads=1, d_mlp=16, image_size=(32, 32), patch_size=(8, 8))
        >>> example_images(rl.HookedViT(cfg), 3, seed=1).shape
        torch.Size([3, 3, 32, 32])
    """
    if n is not None and n < 1:
        raise ImageError(f"n, the number of images, must be at least 1, got {n}.")
    if photographs is None and is_embedded(vit):
        return synthetic_images(n or SYNTHETIC, seed).images
    files = [Path(file) for file in (shipped_photographs() if photographs is None else photographs)]
    if not files and photographs is None:
        raise MissingExtraError("scikit-image", "demo", "Photographs to look at without a network")
    if not files:
        raise ImageError("There are no photographs in the list. Give image files, or None for those at hand.")
    return _views(vit, files, n or VIEWS * len(files), torch.Generator().manual_seed(seed))


def _views(
    vit: HookedViT, files: Sequence[Path], n: int, generator: torch.Generator
) -> Float[Tensor, "image channel height width"]:
    height, width = vit.preprocess.output_size
    chosen = torch.randint(len(SCALES), (n,), generator=generator).tolist()
    sizes = [(round(height * scale), round(width * scale)) for scale in SCALES]
    enlarged = {k: load_images(files, vit, size=sizes[k]) for k in sorted(set(chosen))}
    views = []
    for i, k in enumerate(chosen):
        down, right, mirrored = torch.rand(3, generator=generator).tolist()
        top, left = (
            int((have - want) * at) for have, want, at in zip(sizes[k], (height, width), (down, right), strict=True)
        )
        view = enlarged[k][i % len(enlarged[k]), :, top : top + height, left : left + width]
        views.append(view.flip(-1) if mirrored < 0.5 else view)
    return torch.stack(views)


def example_pictures(
    vit: HookedViT, images: Float[Tensor, "image channel height width"]
) -> UInt8[np.ndarray, "image height width channel"]:
    """Preprocessed images as pictures to look at, 0..255, channels last; to be drawn beneath patch maps.

    Photographs get their colours back. Synthetic images are no photographs: their values are stretched, so that the
    lowest and highest hundredth of them become black and white.

    Args:
        vit: the model they were made for.
        images: from `example_images` or `load_images`.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> example_pictures(vit, example_images(vit, 2)).shape
        (2, 48, 48, 3)
    """
    if not is_embedded(vit):
        return to_display(images, vit.preprocess)
    low, high = images.float().flatten().quantile(torch.tensor([0.01, 0.99], device=images.device))
    stretched = ((images.float() - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return (stretched * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


class OwnImages:
    """`example_images` as a stream: for commands, where no files are named."""

    def __init__(self, vit: HookedViT, n: int | None = None, *, batch_size: int = 16) -> None:
        self.vit, self.batch_size, self.skipped = vit, batch_size, list[Any]()
        self.images = example_images(vit, n)
        self.loaded = [f"example image {i}" for i in range(len(self.images))]

    @property
    def n_images(self) -> int:
        """How many there are."""
        return len(self.images)

    def __iter__(self) -> Iterator[Float[Tensor, "batch channel height width"]]:
        return iter(self.images.split(self.batch_size))

    def first(self, n: int) -> "OwnImages":
        """The first of them, at most `n`."""
        few = copy(self)
        few.images, few.loaded = self.images[:n], self.loaded[:n]
        return few


def is_embedded(vit: HookedViT) -> bool:
    """Whether it is the embedded model, or a copy of it with planted neurons: it was trained on synthetic images.

    Example:
        >>> import registerlens as rl
        >>> is_embedded(rl.HookedViT.from_pretrained("registerlens:tiny"))
        True
    """
    return vit.source.startswith("registerlens:tiny")

"""Images in shards, each of which can be read on its own, by whichever worker needs it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from registerlens.data.images import Skipped
from registerlens.errors import ImageError, ShapeError


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some consecutive images of a source."""

    names: tuple[str, ...]
    """One name an image, unique in the source."""
    images: Float[Tensor, "image channel height width"]
    """Preprocessed; float32 on the CPU."""
    labels: Int[Tensor, "image ..."] | None = None
    """One label an image, where the source has labels; -1 where one is missing."""
    skipped: tuple[Skipped, ...] = ()
    """Images of this shard that could not be used."""


@runtime_checkable
class Source(Protocol):
    """Images that are read shard by shard; small enough to be sent to a worker, which then reads what it needs."""

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        ...

    @property
    def n_images(self) -> int | None:
        """How many images there are, usable or not, where that is known."""
        ...

    @property
    def identity(self) -> str:
        """A hash of what is in it, in order: another list of images has another one."""
        ...

    def shard(self, index: int) -> Shard:
        """Read one shard, always the same.

        Raises:
            ImageError: it cannot be read.
        """
        ...


@dataclass(frozen=True)
class TensorSource:
    """Preprocessed images that are in memory.

    Args:
        images: all of them.
        labels: one an image.
        shard_size: images a shard.

    Raises:
        ImageError: there are no images, or the shard size is below 1.
        ShapeError: not one label an image.

    Example:
        >>> import torch
        >>> source = TensorSource(torch.zeros(5, 3, 8, 8), shard_size=2)
        >>> source.n_shards, source.shard(2).names
        (3, ('image 4',))
    """

    images: Float[Tensor, "image channel height width"]
    labels: Int[Tensor, "image ..."] | None = None
    shard_size: int = 256

    def __post_init__(self) -> None:
        if not len(self.images):
            raise ImageError("No image was given: the tensor is empty.")
        check_shard_size(self.shard_size)
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ShapeError(f"{len(self.labels)} labels for {len(self.images)} images; one for each is needed.")

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return -(-len(self.images) // self.shard_size)

    @property
    def n_images(self) -> int:
        """How many images there are."""
        return len(self.images)

    @property
    def identity(self) -> str:
        """SHA-256 of the pixels, the labels and the size of the shards."""
        parts = [self.images.float().cpu().contiguous().numpy().tobytes()]
        if self.labels is not None:
            parts.append(self.labels.cpu().contiguous().numpy().tobytes())
        return hash_of([hashlib.sha256(part).hexdigest() for part in parts], self.shard_size)

    def shard(self, index: int) -> Shard:
        """One shard."""
        where = slice(index * self.shard_size, (index + 1) * self.shard_size)
        images = self.images[where].float().cpu()
        names = tuple(f"image {where.start + i}" for i in range(len(images)))
        return Shard(names=names, images=images, labels=None if self.labels is None else self.labels[where])


def hash_of(names: Sequence[str], shard_size: int) -> str:
    """A hash of names in order, and of how they are cut.

    Example:
        >>> hash_of(["a", "b"], 2) == hash_of(["a", "b"], 2) != hash_of(["b", "a"], 2)
        True
    """
    return hashlib.sha256("\0".join([str(shard_size), *names]).encode()).hexdigest()


def check_shard_size(shard_size: int) -> None:
    """Refuse shards without images.

    Raises:
        ImageError: the size is below 1.
    """
    if shard_size < 1:
        raise ImageError(f"shard_size must be at least 1, got {shard_size}.")

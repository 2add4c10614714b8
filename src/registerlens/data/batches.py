"""Images as analyses take them: one tensor, or batches that stream by."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from registerlens.errors import ImageError

Images = Tensor | Iterable[Tensor]
"""[image, channel, height, width], or an iterable of such batches, such as `ImageStream`."""


def in_batches(images: Images, batch_size: int) -> Iterable[Tensor]:
    """A tensor's images in batches of `batch_size`; an iterable of batches as it is.

    Raises:
        ImageError: the batch size is below 1.

    Example:
        >>> import torch
        >>> [len(batch) for batch in in_batches(torch.zeros(5, 3, 8, 8), 2)]
        [2, 2, 1]
    """
    if not isinstance(images, Tensor):
        return images
    if batch_size < 1:
        raise ImageError(f"batch_size must be at least 1, got {batch_size}.")
    return images.split(batch_size) if len(images) else ()


def count(images: Images) -> int | None:
    """How many images there are, if that is known before they have gone by.

    Example:
        >>> import torch
        >>> count(torch.zeros(5, 3, 8, 8)), count(iter([]))
        (5, None)
    """
    return len(images) if isinstance(images, Tensor) else getattr(images, "n_images", None)


@dataclass(frozen=True)
class Counted:
    """Batches, and how many images they hold in all, if that is known."""

    batches: Iterable[Tensor]
    n_images: int | None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def first_and_all(images: Images, n: int, batch_size: int) -> tuple[list[Tensor], Counted]:
    """The first `n` images, and an iterable over every batch that reads them from memory.

    The first part is cut to exactly `n` images; of the stream, no more than the batches it needs are held. What has
    been read is not read again, so that an iterator which can be used up is taken too.

    Raises:
        ImageError: there is no image.

    Example:
        >>> import torch
        >>> first, every = first_and_all(torch.zeros(5, 3, 8, 8), 3, 2)
        >>> [len(batch) for batch in first], [len(batch) for batch in every]
        ([2, 1], [2, 2, 1])
    """
    stream: Iterator[Tensor] = iter(in_batches(images, batch_size))
    held: list[Tensor] = []
    while sum(map(len, held)) < n and (batch := next(stream, None)) is not None:
        held.append(batch)
    if not held:
        raise ImageError("No image was given: the tensor or the iterable of batches is empty. Give at least one.")
    surplus = sum(map(len, held)) - n
    first = [*held[:-1], held[-1][: len(held[-1]) - max(0, surplus)]]
    return first, Counted(chain(held, stream), count(images))

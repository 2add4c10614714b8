"""Pairs of images, clean and corrupted, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.data.batches import Images, in_batches
from registerlens.errors import ImageError, ShapeError
from registerlens.model.vit import HookedViT


@dataclass(frozen=True)
class PairBatch:
    """Some pairs."""

    clean: Float[Tensor, "batch channel height width"]
    corrupted: Float[Tensor, "batch channel height width"]
    labels: Int[Tensor, "batch ..."] | None
    rows: slice
    """Which of all the pairs these are."""

    @property
    def identical(self) -> Bool[Tensor, " batch"]:
        """Which pairs are one image twice."""
        return (self.clean == self.corrupted).flatten(1).all(1).cpu()


def paired(
    vit: HookedViT, clean: Images, corrupted: Images, labels: Int[Tensor, "pair ..."] | None, batch_size: int
) -> Iterator[PairBatch]:
    """The pairs in batches, on the model's device.

    Raises:
        ImageError: there are none, or all pairs are one image twice.
        ShapeError: not as many corrupted images as clean ones or labels, or images of a pair differ in size.
    """
    n, differ = 0, False
    for one, other in zip_longest(in_batches(clean, batch_size), in_batches(corrupted, batch_size)):
        if one is None or other is None or len(one) != len(other):
            counts = [n if some is None else n + len(some) for some in (one, other)]
            raise ShapeError(
                f"Pairs need one corrupted image for each clean one, in batches of the same length; got {counts[0]} "
                f"clean and {counts[1]} corrupted ones" + (" so far." if one is not None and other is not None else ".")
            )
        vit.layout(one)
        vit.layout(other)
        if one.shape != other.shape:
            raise ShapeError(f"The images of a pair must have one size, got {list(one.shape)} and {list(other.shape)}.")
        rows = slice(n, n + len(one))
        mine = None if labels is None else labels[rows]
        if labels is not None and len(labels) < rows.stop:
            raise ShapeError(f"{len(labels)} labels for {rows.stop} pairs or more; one for each is needed.")
        n = rows.stop
        batch = PairBatch(one.to(vit.device), other.to(vit.device), mine, rows)
        differ = differ or not bool(batch.identical.all())
        yield batch
    if not n:
        raise ImageError("No pair came: the tensors or iterables are empty, or could be iterated only once.")
    if labels is not None and len(labels) != n:
        raise ShapeError(f"{len(labels)} labels for {n} pairs; one for each is needed.")
    if not differ:
        raise ImageError(
            f"Each of the {n} pairs is one image twice, so that no patch can change anything. Give a corrupted image "
            f"that differs from the clean one, such as one with and one without an outlier."
        )


def first_image(clean: Images) -> Float[Tensor, "1 channel height width"]:
    """One image to try things on.

    Raises:
        ImageError: there is none.
    """
    for batch in in_batches(clean, 1):
        if len(batch):
            return batch[:1]
    raise ImageError("No pair came: the tensors or iterables are empty, or could be iterated only once.")

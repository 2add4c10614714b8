"""Images pass through the model once, batch by batch; reducers watch, and add up what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.data.batches import Images, count, in_batches
from registerlens.errors import ImageError, ShapeError
from registerlens.model.names import match_names
from registerlens.model.vit import Hook, HookedViT
from registerlens.progress import track

Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Batch:
    """Images that pass together."""

    images: Float[Tensor, "batch channel height width"]
    """On the model's device."""
    layout: TokenLayout
    """Layout of their sequences."""
    start: int
    """How many images passed before them."""
    labels: Int[Tensor, "batch ..."] | None = None
    """Labels of these images, where there are some."""

    def __len__(self) -> int:
        return len(self.images)


@runtime_checkable
class Reducer(Protocol[Result_co]):
    """What is learned from images that pass, in memory that does not grow with their number.

    A reducer sees named activations: whoever has recorded them can feed it by the same hooks. Most are `Sums`, so that
    reducers of different shards can be merged.
    """

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> Sequence[Hook]:
        """A batch begins: (names of hook points, function of (activation, hook point)) pairs that will watch it."""
        ...

    def update(self, batch: Batch) -> None:
        """The batch has passed, and its hooks are gone."""
        ...

    def result(self) -> Result_co:
        """What was learned."""
        ...


class Sums:
    """Totals by name, of a reducer whose memory is sums: they add up over batches, and over shards.

    Example:
        >>> one, other = Sums(), Sums()
        >>> one.add(n_images=2, norm=torch.tensor([1.0, 2.0]))
        >>> other.add(n_images=1, norm=torch.tensor([4.0, 4.0]))
        >>> one.merge(other)
        >>> one.n_images, one.means()["norm"] * 3
        (3, array([5., 6.]))
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    @property
    def n_images(self) -> int:
        """Images so far, where they are counted under this name."""
        return self.count("n_images")

    def count(self, name: str) -> int:
        """A total that is a single whole number; 0 where there was nothing to add."""
        return int(self.totals.get(name, 0))

    def add(self, **values: Tensor | int | float) -> None:
        """Add to the totals of these names, floating-point numbers in float64."""
        for name, value in values.items():
            tensor = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            if tensor.device.type == "mps":  # has no float64
                tensor = tensor.cpu()
            total = (tensor.double() if tensor.is_floating_point() else tensor.long()).contiguous()
            # Not in place: what was made in inference mode could not be changed outside it.
            before = self.totals.get(name)
            self.totals[name] = total if before is None else before + total.to(before.device)

    def merge(self, other: Sums) -> None:
        """Take in what another reducer with the same options saw, as if its images had come here."""
        self.add(**other.totals)

    def means(self, over: str = "n_images") -> dict[str, Any]:
        """The arrays as they are reported: whole numbers as counts, all others over how many images there were.

        Args:
            over: the name under which these images are counted.
        """
        n = self.count(over)
        return {
            name: (total / n if total.is_floating_point() else total).cpu().numpy()
            for name, total in self.totals.items()
            if total.ndim
        }


class MeansAt(Sums):
    """The mean over images of what is read at some hook points; by their names, in float32."""

    def __init__(self, points: Sequence[str], read: Callable[[Tensor, TokenLayout], Tensor]) -> None:
        """Globs are allowed; `read` takes an activation and the layout; the first axis of what it gives is images."""
        super().__init__()
        self.points, self.read = points, read

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> Sequence[Hook]:
        """The hook points, read and summed as they come by."""
        return [(self.points, lambda x, hook: self.add(**{hook.name: self.read(x, layout).float().sum(0)}))]

    def update(self, batch: Batch) -> None:
        """Count the images."""
        self.add(n_images=len(batch))

    def result(self) -> dict[str, Tensor]:
        """The means."""
        return {name: (total / self.n_images).float().cpu() for name, total in self.totals.items() if total.ndim}


def stream(
    vit: HookedViT,
    images: Images,
    reducers: Sequence[Reducer[Result_co]],
    *,
    batch_size: int = 16,
    labels: Int[Tensor, "image ..."] | None = None,
    description: str,
    allow_none: bool = False,
) -> list[Result_co]:
    """One pass over the images for any number of reducers; it goes no deeper than the last hook point of any of them.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], split into batches here, or an iterable of batches.
        reducers: who watches.
        batch_size: images at once when a tensor is given.
        labels: one an image, which come with the batches.
        description: what is being done, for the progress bar.
        allow_none: whether there may be no image, as where reducers have seen some already.

    Returns:
        the reducers' results.

    Raises:
        HookNameError: a reducer asks for a hook point that does not exist.
        ImageError: there are no images.
        ShapeError: they do not fit the model, or there is not one label an image.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> activity = MeansAt(["blocks.1.mlp.hook_post"], lambda post, layout: post.amax(1))
        >>> [means] = stream(vit, torch.rand(5, 3, 48, 48), [activity], batch_size=2, description="looking")
        >>> means["blocks.1.mlp.hook_post"].shape
        torch.Size([256])
    """
    with torch.inference_mode():
        for batch in batches(vit, images, batch_size, description, labels, allow_none):
            run_until_seen(
                vit, batch.images, [hook for reducer in reducers for hook in reducer.hooks(vit, batch.layout)]
            )
            for reducer in reducers:
                reducer.update(batch)
    return [reducer.result() for reducer in reducers]


def batches(
    vit: HookedViT,
    images: Images,
    batch_size: int,
    description: str,
    labels: Int[Tensor, "image ..."] | None = None,
    allow_none: bool = False,
) -> Iterator[Batch]:
    """The images in batches on the model's device, with a progress bar; for what is more than one pass.

    Raises:
        ImageError: no image came.
        ShapeError: images do not fit the model, or there is not one label an image.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(3, 3, 48, 48)
        >>> [(one.start, one.labels.tolist()) for one in batches(vit, images, 2, "counting", torch.tensor([5, 6, 7]))]
        [(0, [5, 6]), (2, [7])]
    """
    n, known = 0, count(images)
    if labels is not None and known not in (None, len(labels)):
        raise ShapeError(f"{len(labels)} labels for {known} images; one for each is needed.")
    for part in track(in_batches(images, batch_size), description, known, len):
        layout, start, n = vit.layout(part), n, n + len(part)
        if labels is not None and n > len(labels):
            raise ShapeError(f"{len(labels)} labels for {n} images or more; one for each is needed.")
        yield Batch(part.to(vit.device), layout, start, None if labels is None else labels[start:n])
    if not n and not allow_none:
        raise ImageError(
            f"No image came for {description}: the tensor or the iterable is empty, or it could be iterated only once. "
            f"Give a tensor, a list of batches or an rl.data.ImageStream."
        )
    if labels is not None and n != len(labels):
        raise ShapeError(f"{len(labels)} labels for {n} images; one for each is needed.")


def run_until_seen(vit: HookedViT, images: Float[Tensor, "batch channel height width"], hooks: Sequence[Hook]) -> None:
    """A forward pass that ends, within a block if need be, as soon as each of the hook points has been reached.

    With edits in force it goes to the end.

    Example:
        >>> import registerlens as rl
        >>> vit, seen = rl.HookedViT.from_pretrained("registerlens:tiny"), []
        >>> with torch.inference_mode(), vit.hooks([("blocks.*.hook_mlp_out", lambda x, hook: seen.append(hook.name))]):
        ...     run_until_seen(vit, torch.rand(1, 3, 48, 48), [("blocks.1.hook_resid_mid", lambda x, hook: None)])
        >>> seen
        ['blocks.0.hook_mlp_out']
    """
    if vit.edits:  # they may lie deeper than what is watched, and an edit that never fires is an error
        with vit.hooks(hooks):
            vit(images)
        return
    exact = [(name, hook) for names, hook in hooks for name in match_names(names, vit.hook_dict)]
    left = {name for name, _ in exact}

    def count_down(x: Tensor, hook: Any) -> None:
        left.discard(hook.name)
        if not left:
            raise _AllSeen

    # A hook that raises can end a pass within a block, which stop_at_layer cannot.
    with suppress(_AllSeen), vit.hooks([*exact, *((name, count_down) for name in left)]):
        vit(images)


class _AllSeen(Exception):
    """Each hook point has been reached."""

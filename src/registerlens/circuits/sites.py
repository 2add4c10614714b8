"""What is patched: a hook point, which of its heads, neurons and tokens, and pairs of clean and corrupted images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.data.batches import Images, in_batches
from registerlens.errors import ConfigError, HookNameError, ImageError, ShapeError
from registerlens.model.names import match_names
from registerlens.model.vit import HookedViT

TokenKind = Literal["cls", "trained_registers", "patches", "test_time_registers"]
_KINDS = ("cls", "trained_registers", "patches", "test_time_registers")
_BY_QUERY = ("hook_attn_scores", "hook_pattern")


@dataclass(frozen=True, eq=False)
class Site:
    """A named hook point, whole or in part.

    Example:
        >>> Site("blocks.1.mlp.hook_post", neurons=[183, 103], positions="patches").label
        'blocks.1.mlp.hook_post, neurons 183 103, patches'
    """

    name: str
    """A hook point; a glob stands for several."""
    heads: int | Sequence[int] | None = None
    """These heads only, where the point tells heads apart."""
    neurons: int | Sequence[int] | None = None
    """These entries of the last axis only: neurons in an MLP, dimensions of the stream elsewhere."""
    positions: TokenKind | Sequence[int] | Bool[Tensor, "image patch"] | None = None
    """These tokens only: a kind, patches by index (row by row), or patches of each image on its own (such as
    `rl.find_outliers(vit, images).mask`). At scores and patterns they are queries."""

    def __post_init__(self) -> None:
        for axis in ("heads", "neurons"):
            value = getattr(self, axis)
            chosen = (value,) if isinstance(value, int) else None if value is None else tuple(int(i) for i in value)
            if chosen == ():
                raise ConfigError(f"{axis} is empty at {self.name!r}: give some, or None for all of them.")
            object.__setattr__(self, axis, chosen)
        where = self.positions
        if isinstance(where, str) and where not in _KINDS:
            raise ConfigError(f"positions must be one of {list(_KINDS)}, patches by index or booleans; got {where!r}.")
        if not (where is None or isinstance(where, str | Tensor)):
            object.__setattr__(self, "positions", tuple(int(i) for i in where))

    @property
    def label(self) -> str:
        """The place in words."""
        parts = [self.name]
        for axis in ("heads", "neurons"):
            if chosen := getattr(self, axis):
                parts.append(f"{axis if len(chosen) > 1 else axis[:-1]} {' '.join(map(str, chosen))}")
        if isinstance(self.positions, Tensor):
            parts.append("patches of each image")
        elif isinstance(self.positions, tuple):
            parts.append(f"patches {' '.join(map(str, self.positions))}")
        elif isinstance(self.positions, str):
            parts.append("[CLS]" if self.positions == "cls" else self.positions.replace("_", " "))
        return ", ".join(parts)

    def mask(
        self, x: Float[Tensor, "batch ..."], layout: TokenLayout, images: slice = slice(None)
    ) -> Bool[Tensor, "#batch ..."]:
        """Which entries of the tensor at the point are meant, to be broadcast over it.

        Args:
            x: the tensor.
            layout: of the run.
            images: which rows of `positions`, where it has one an image, this batch is.

        Raises:
            ShapeError: the point has no such axis, or not so many heads, neurons or tokens.
        """
        mask = torch.ones([1] * x.ndim, dtype=torch.bool, device=x.device)
        by_query = self.name.endswith(_BY_QUERY)
        if isinstance(self.heads, tuple):
            axis = 1 if by_query else 2
            apart = by_query or (x.ndim == 4 and ".norm." not in self.name)
            mask = mask & self._chosen(x, axis if apart else None, "heads", self.heads)
        if isinstance(self.neurons, tuple):
            mask = mask & self._chosen(x, None if by_query else x.ndim - 1, "neurons", self.neurons)
        if self.positions is not None:
            axis = 2 if by_query else 1
            shape = [1] * x.ndim
            there = self._tokens(x, None if x.ndim < 3 else x.shape[axis], layout, images).to(x.device)
            shape[0], shape[axis] = there.shape
            mask = mask & there.reshape(shape)
        return mask

    def _chosen(self, x: Tensor, axis: int | None, what: str, chosen: Iterable[int]) -> Tensor:
        if axis is None:
            raise ShapeError(f"{self.name} [{', '.join(map(str, x.shape))}] does not tell {what} apart.")
        if wrong := [i for i in chosen if not 0 <= i < x.shape[axis]]:
            raise ShapeError(f"{self.name} has {what} 0 to {x.shape[axis] - 1}, got {wrong[:5]}.")
        mask, shape = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device), [1] * x.ndim
        mask[list(chosen)] = True
        shape[axis] = -1
        return mask.reshape(shape)

    def _tokens(self, x: Tensor, size: int | None, layout: TokenLayout, images: slice) -> Bool[Tensor, "#batch pos"]:
        """Booleans over the point's token axis, which may be the patches alone, or have keys without a token."""
        patches_alone = size == layout.n_patches and size != layout.n_tokens
        if size is None or (size < layout.n_tokens and not patches_alone):
            raise ShapeError(f"{self.name} {list(x.shape)} has no token axis, so no positions can be chosen there.")
        where = self.positions
        rows = len(x) if isinstance(where, Tensor) else 1
        mask = torch.zeros(rows, max(size, layout.n_tokens), dtype=torch.bool)
        if isinstance(where, Tensor):
            mine = where[images]
            if mine.dtype != torch.bool or mine.shape != (len(x), layout.n_patches):
                raise ShapeError(
                    f"positions of each image are booleans [image, {layout.n_patches}], got {where.dtype} "
                    f"{list(where.shape)} for a batch of {len(x)}."
                )
            mask[:, layout.patches] = mine.cpu()
        elif isinstance(where, str):
            at = getattr(layout, where)
            if at is not None:
                mask[:, at] = True
        else:
            if wrong := [i for i in where or () if not 0 <= i < layout.n_patches]:
                raise ShapeError(f"Patches {wrong[:5]} do not exist: there are 0 to {layout.n_patches - 1}.")
            mask[:, torch.tensor(where, dtype=torch.long) + layout.patches.start] = True
        mask = mask[:, layout.patches] if patches_alone else mask[:, :size]
        if not mask.any() and not isinstance(where, Tensor):
            raise ShapeError(f"There are no tokens {where!r} at {self.name}.")
        return mask


Place = str | Site
"""A hook point by name, or a part of one."""


def expand(places: Place | Sequence[Place], vit: HookedViT) -> list[Site]:
    """One site for each hook point that names and globs stand for.

    Raises:
        HookNameError: a name or glob matches nothing.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> [site.name for site in expand("blocks.[01].attn.hook_q", vit)]
        ['blocks.0.attn.hook_q', 'blocks.1.attn.hook_q']
    """
    listed = [places] if isinstance(places, str | Site) else list(places)
    sites = [place if isinstance(place, Site) else Site(place) for place in listed]
    return [replace(site, name=name) for site in sites for name in match_names(site.name, vit.hook_dict)]


def firing_order(
    vit: HookedViT, image: Float[Tensor, "1 channel height width"], sites: Sequence[Site], first: int = 0
) -> dict[str, int]:
    """The order in which hook points are met by one image, on which the sites are checked too.

    Args:
        vit: the model.
        image: any.
        sites: those of interest.
        first: which of the images this is, for positions that depend on it.

    Raises:
        HookNameError: a point is not met.
        ShapeError: a site's heads, neurons or positions do not exist.
    """
    layout, order = vit.layout(image), {}

    def meet(x: Tensor, hook: Any) -> None:
        order.setdefault(hook.name, len(order))
        for site in sites:
            if site.name == hook.name:
                site.mask(x, layout, slice(first, first + 1))

    with torch.inference_mode(), vit.hooks([(list({site.name for site in sites}), meet)]):
        vit(image.to(vit.device))
    if missed := sorted({site.name for site in sites} - set(order)):
        raise HookNameError(f"{missed[0]} is not met when this model runs.")
    return order


def block_of(name: str, vit: HookedViT) -> int | None:
    """The block to start from so that a point is met: None from the images, the last block for what comes after.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> block_of("hook_embed", vit), block_of("blocks.2.attn.hook_q", vit), block_of("head.hook_out", vit)
        (None, 2, 5)
    """
    kind, _, rest = name.partition(".")
    if kind == "blocks":
        return int(rest.split(".")[0])
    return vit.cfg.n_layers - 1 if kind in ("ln_final", "head") else None


def sublayer_output(name: str) -> str | None:
    """The output of the attention or MLP that a point lies in; None for points of the residual stream.

    Example:
        >>> sublayer_output("blocks.2.ln1.hook_scale"), sublayer_output("blocks.2.hook_resid_mid")
        ('blocks.2.hook_attn_out', None)
    """
    parts = name.split(".")
    of_attention, of_mlp = ("ln1", "attn", "ln1_post", "hook_attn_out"), ("ln2", "mlp", "ln2_post", "hook_mlp_out")
    kinds = dict.fromkeys(of_attention, "attn") | dict.fromkeys(of_mlp, "mlp")
    if parts[0] != "blocks" or parts[2] not in kinds:
        return None
    return f"blocks.{parts[1]}.hook_{kinds[parts[2]]}_out"


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

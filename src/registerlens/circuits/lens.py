"""The logit lens on patches: what the model would say of each token, had it stopped there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.circuits.readings import Space, check_class, output_width, space_of
from registerlens.config import TokenLayout
from registerlens.display import grid_table
from registerlens.engine.stream import batches
from registerlens.errors import ConfigError, ImageError, ShapeError, close_matches
from registerlens.model.sublayers import Sublayer
from registerlens.model.sublayers import sublayers as every_sublayer
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SHOWN = 8
"""Classes kept when none are named."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchLens(ModelResult):
    """Projected maps of a few images, sublayer by sublayer."""

    sublayers: tuple[str, ...]
    """Where the stream was read: "embed", "3.attn", "3.mlp", ..."""
    unit: str
    """What a value is."""
    n_directions: int
    """Classes or directions among which the top one was sought."""
    chosen: tuple[int, ...]
    """Directions whose maps were kept."""
    values: Float[np.ndarray, "sublayer image direction grid_h grid_w"]
    """Value of each kept class or direction at each patch, float32."""
    top: Int[np.ndarray, "sublayer image grid_h grid_w"]
    """The class or direction of the largest value at each patch, among all of them."""
    top_value: Float[np.ndarray, "sublayer image grid_h grid_w"]
    """The value of the top class or direction."""

    @property
    def settled(self) -> Float[np.ndarray, " sublayer"]:
        """Share of patches (0 to 1) whose top class is that of the last sublayer read."""
        return (self.top == self.top[-1]).mean((1, 2, 3))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a sublayer and kept direction: mean and largest value over patches and images, share of patches where
        it is on top, and share of patches whose top one is that of the last sublayer."""
        return grid_table(
            {"sublayer": self.sublayers, "direction": self.chosen},
            mean=self.values.mean((1, 3, 4)),
            largest=self.values.max((1, 3, 4)),
            on_top=np.stack([(self.top == direction).mean((1, 2, 3)) for direction in self.chosen], 1),
            settled=self.settled[:, None],
        )

    def describe(self) -> str:
        """The result in words."""
        settled = self.settled
        half = next(place for place, share in zip(self.sublayers, settled, strict=True) if share >= 0.5)
        counts = np.bincount(self.top[-1].ravel(), minlength=self.n_directions)
        top = np.argsort(-counts, kind="stable")[:3]
        listed = ", ".join(f"{i} ({counts[i] / counts.sum():.0%})" for i in top if counts[i])
        return (
            f"{self.n_directions} directions read at {self.top.shape[2] * self.top.shape[3]} patches of "
            f"{self.top.shape[1]} images after {len(self.sublayers)} sublayers; values are {self.unit}. On top after "
            f"{self.sublayers[-1]}: {listed}. From {half} on or earlier half of the patches have the top one they end "
            f"with ({settled[0]:.0%} at {self.sublayers[0]})."
        )

    def plot(self, image: int = 0, direction: int | None = None) -> go.Figure:
        """One image's maps of a kept direction (default: the first), a map a sublayer.

        Raises:
            ShapeError: there is no such image, or that direction was not kept.
        """
        from registerlens.viz.heads import lens_figure

        return lens_figure(self, image, direction)


def patch_lens(
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    directions: Float[Tensor, "d_read direction"] | None = None,
    *,
    classes: Sequence[int] | None = None,
    sublayers: Sequence[str] | None = None,
    space: Space | None = None,
    cosine: bool = False,
    batch_size: int = 16,
) -> PatchLens:
    """Read the stream after each sublayer through the final norm and the head, at every patch.

    A patch is read as if it were what the model pools: final norm, the norm after pooling, head, nonlinearity. Early
    layers need not speak the head's language: compare with the model's output before believing a map.

    Args:
        vit: the model, edited or not.
        images: preprocessed, all of one size.
        directions: columns to project on instead of the head's classes: text directions as `zero_shot_head` gives them
            (of the model's output), or directions of tokens after the final norm.
        classes: whose maps are kept; of `directions`, by column. Default: all of at most 8, else the 8 that are largest
            after the last sublayer, in the mean over patches. The top class is sought among all.
        sublayers: where to read, as a trace names them; default: after every sublayer.
        space: which of the two directions belong to, where they fit both; default: the output.
        cosine: divide by the norms of feature and direction: the similarity that CLIP-like models compare.
        batch_size: images at once.

    Raises:
        ConfigError: the model has no head and no directions were given, or its output is no function of one token
            (several pooled parts side by side, attention pooling).
        ImageError: there are no images.
        ShapeError: a class or sublayer does not exist, or the directions do not fit.

    Source: nostalgebraist 2020 (logit lens); Vilas et al. 2023 (2310.18969) for image tokens.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = patch_lens(vit, synthetic_images(4, 0).images)
        >>> found.values.shape, found.sublayers[:2]
        ((13, 4, 8, 6, 6), ('embed', '0.attn'))
    """
    reader = _Reader.of(vit, directions, space, cosine)
    places = _places(vit, sublayers)
    if not len(images):
        raise ImageError("No image was given: the tensor is empty.")
    layout = vit.layout(images)
    if classes is not None:
        chosen = tuple(dict.fromkeys(int(index) for index in classes))
        if wrong := [index for index in chosen if not 0 <= index < reader.n]:
            raise ShapeError(f"Classes {wrong[:5]} do not exist: there are 0 to {reader.n - 1}.")
    elif reader.n <= _SHOWN:
        chosen = tuple(range(reader.n))
    else:
        chosen = _largest(vit, images, reader, layout, batch_size)
    values: list[list[Tensor]] = [[] for _ in places]
    tops: list[list[Tensor]] = [[] for _ in places]
    names = {Sublayer(place).hook_name: i for i, place in enumerate(places)}
    index = torch.tensor(chosen, dtype=torch.long, device=vit.device)

    def read(resid: Tensor, hook: Any) -> None:
        projected = reader(resid[:, layout.patches])
        values[names[hook.name]].append(projected[..., index].transpose(1, 2).cpu())
        tops[names[hook.name]].append(torch.stack([part.double() for part in projected.max(-1)]).cpu())

    with torch.inference_mode(), vit.hooks([(list(names), read)]):
        for batch in batches(vit, images, batch_size, "reading patches"):
            vit(batch.images, stop_at_layer=vit.cfg.n_layers)
    grid = layout.grid
    best = torch.stack([torch.cat(parts, 1) for parts in tops]).unflatten(-1, grid).numpy()
    return PatchLens(
        **vit.identity,
        sublayers=places,
        unit=reader.unit,
        n_directions=reader.n,
        chosen=chosen,
        values=torch.stack([torch.cat(parts) for parts in values]).unflatten(-1, grid).numpy(),
        top=best[:, 1].astype(np.int64),
        top_value=best[:, 0].astype(np.float32),
    )


@dataclass(frozen=True)
class _Reader:
    """From the stream at some tokens to a number for each class or direction."""

    vit: HookedViT
    directions: Float[Tensor, "d_read direction"] | None
    space: Space
    cosine: bool

    @classmethod
    def of(cls, vit: HookedViT, directions: Tensor | None, space: Space | None, cosine: bool) -> _Reader:
        if directions is None:
            if vit.head.linear is None:
                check_class(vit, 0)  # says what to do
            space = "output"
        else:
            if not directions.shape[1]:
                raise ShapeError("directions has no column: give at least one.")
            space = space_of(vit, len(directions), space)
            directions = directions.detach().to(vit.device, vit.dtype)
        if space == "output" and (vit.head.attn is not None or len(vit.cfg.pooling) > 1):
            why = "pools by attention" if vit.head.attn is not None else f"pools {list(vit.cfg.pooling)} side by side"
            raise ConfigError(
                f"This model {why}, so that its head does not read one token. Give directions of tokens "
                f"({vit.cfg.d_model} numbers each, space='tokens')."
            )
        if cosine and directions is None:
            raise ConfigError(
                "cosine compares features with directions: give directions, such as rl.evaluation.zero_shot_head's."
            )
        return cls(vit, directions, space, cosine)

    @property
    def n(self) -> int:
        """Classes or directions."""
        return output_width(self.vit) if self.directions is None else self.directions.shape[1]

    @property
    def unit(self) -> str:
        """The unit of what is read."""
        if self.directions is None:
            return "outputs of the head"
        return "cosines with the directions" if self.cosine else "projections on the directions"

    def __call__(self, resid: Float[Tensor, "batch patch d_model"]) -> Float[Tensor, "batch patch direction"]:
        # Past the hook points, which are for the model's own run.
        x = _normalised(self.vit.ln_final, resid)
        if self.space == "output":
            head = self.vit.head
            x = x if head.ln is None else _normalised(head.ln, x)
            x = x if head.linear is None else head.linear(x)
            x = x if head.act is None else head.act(x)
        if self.directions is None:
            return x.float()
        if not self.cosine:
            return (x @ self.directions).float()
        return F.normalize(x.float(), dim=-1) @ F.normalize(self.directions.float(), dim=0)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    return norm.normalise(x) if hasattr(norm, "normalise") else norm(x)


def _places(vit: HookedViT, sublayers: Sequence[str] | None) -> tuple[str, ...]:
    every = every_sublayer(vit.cfg.n_layers)
    if sublayers is None:
        return every
    if not sublayers:
        raise ShapeError("sublayers is empty: give some, or None for all of them.")
    for place in sublayers:
        if place not in every:
            raise ShapeError(
                f"There is no sublayer {place!r}.{close_matches(str(place), every)} The model has {every[0]!r}, "
                f"{every[1]!r}, {every[2]!r} to {every[-1]!r}."
            )
    return tuple(place for place in every if place in set(sublayers))


def _largest(vit: HookedViT, images: Tensor, reader: _Reader, layout: TokenLayout, batch_size: int) -> tuple[int, ...]:
    """The classes that are largest in the end, in the mean over the patches of the first batch."""
    with torch.inference_mode():
        resid = vit(images[:batch_size].to(vit.device), stop_at_layer=vit.cfg.n_layers)
        mean = reader(resid[:, layout.patches]).mean((0, 1))
    return tuple(mean.topk(min(_SHOWN, reader.n)).indices.tolist())

"""A run paused before a layer, and what a metric sees of it once it goes on from there, edited or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.engine.views import Seen, View, Watched, mapped, run_from
from registerlens.errors import ShapeError
from registerlens.evaluation.metrics import Metric
from registerlens.interventions.ablation import Reference
from registerlens.model.vit import HookedViT


@dataclass(frozen=True)
class PausedRun:
    """A batch before a layer: no graph leads here, whatever is differentiated comes after it."""

    vit: HookedViT
    metric: Metric
    layout: TokenLayout
    layer: int
    """The block that comes next."""
    resid: Float[Tensor, "batch pos d_model"]
    seen: Seen
    """Of the blocks before, and the labels."""

    def go_on(self, hooks: Sequence[Any] = ()) -> View:
        """Run to the end, with a graph if gradients are enabled."""
        watched = Watched.by([self.metric])
        return run_from(self.vit, self.resid, self.layer, self.layout, watched, hooks, self.seen)

    def first(self, n: int) -> PausedRun:
        """The first images of the batch alone."""
        return replace(self, resid=self.resid[:n], seen=mapped(self.seen, lambda tensor: tensor[:n]))

    def value(self, edited: View, clean: View) -> Float[Tensor, " batch"]:
        """What the metric says, in float32 at least.

        Raises:
            ShapeError: not one number an image.
        """
        value, n = self.metric.measure(edited, clean), len(self.resid)
        if not isinstance(value, Tensor) or value.shape != (n,) or not value.is_floating_point():
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"Metric '{self.metric.name}' must give one floating-point number an image, a tensor of shape [{n}] "
                f"here, and gave {got}."
            )
        return value.to(torch.promote_types(value.dtype, torch.float32))


def paused_runs(
    vit: HookedViT,
    batch: Float[Tensor, "batch channel height width"],
    metric: Metric,
    layers: Iterable[int],
    labels: Int[Tensor, "batch ..."] | None = None,
) -> Iterator[PausedRun]:
    """The batch before each of these layers, in ascending order, in one pass without a graph.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> metric = Metric(name="norm", measure=lambda edited, clean: edited.norms["1.mlp"].amax(1), norms=("1.mlp",))
        >>> with torch.no_grad():
        ...     [bool((at.go_on().output == vit(images)).all()) for at in paused_runs(vit, images, metric, [0, 3])]
        [True, True]
    """
    layout, watched, resid, start = vit.layout(batch), Watched.by([metric]), batch.to(vit.device), None
    seen = Seen(labels=None if labels is None else labels.to(vit.device))
    for layer in sorted(layers):
        with torch.no_grad(), vit.hooks(watched.hooks(vit, layout, seen.norms, seen.attention)):
            options = {} if start is None else {"start_at_layer": start, "layout": layout}
            resid, start = vit(resid, stop_at_layer=layer, **options), layer
        so_far = mapped(seen, lambda tensor: tensor)  # whose dictionaries do not fill further
        yield PausedRun(vit, metric, layout, layer, resid, so_far)


@dataclass(frozen=True)
class Replacement:
    """What ablated neurons become: zero, or the mean of a reference, a row for each kind of token."""

    reference: Reference | None = None

    def at(
        self, layer: int, layout: TokenLayout, like: Float[Tensor, "batch pos neuron"]
    ) -> Float[Tensor, "#pos neuron"]:
        """The values in a layer, in the number type and on the device of `like`."""
        if self.reference is None:
            return like.new_zeros(1, like.shape[-1])
        mean = self.reference.mean[f"blocks.{layer}.mlp.hook_post"]
        # Prefix tokens and trained registers have rows of their own, all later tokens share the last one.
        return mean[torch.arange(layout.n_tokens).clamp_max(len(mean) - 1)].to(like)

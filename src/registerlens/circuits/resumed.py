"""A run stopped before a layer, and what a metric sees of it once it goes on from there, edited or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.engine.views import View, Watched
from registerlens.errors import ShapeError
from registerlens.evaluation.metrics import Metric
from registerlens.interventions.ablation import Reference
from registerlens.model.vit import HookedViT


@dataclass(frozen=True)
class Seen:
    """What a metric asked for and has come by so far."""

    norms: dict[str, Float[Tensor, "batch pos"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "batch head key"]] = field(default_factory=dict)

    def hooks(self, vit: HookedViT, layout: TokenLayout, metric: Metric) -> list[Any]:
        """Hooks that fill it."""
        return Watched.by([metric]).hooks(vit, layout, self.norms, self.attention)

    def map(self, change: Callable[[Tensor], Tensor]) -> Seen:
        """The same with every tensor changed."""
        return Seen(
            {place: change(norms) for place, norms in self.norms.items()},
            {layer: change(attention) for layer, attention in self.attention.items()},
        )


@dataclass(frozen=True)
class Station:
    """A batch before a layer: no graph leads here, whatever is differentiated comes after it."""

    vit: HookedViT
    metric: Metric
    layout: TokenLayout
    layer: int
    """The block that comes next."""
    resid: Float[Tensor, "batch pos d_model"]
    labels: Int[Tensor, "batch ..."] | None
    seen: Seen

    def go_on(self, hooks: Sequence[Any] = ()) -> View:
        """Run to the end, with a graph if gradients are enabled."""
        seen = Seen(dict(self.seen.norms), dict(self.seen.attention))
        with self.vit.hooks([*hooks, *seen.hooks(self.vit, self.layout, self.metric)]):
            tokens = self.vit(self.resid, start_at_layer=self.layer, layout=self.layout, return_type="tokens")
        return View(
            layout=self.layout,
            tokens=tokens,
            output=self.vit.head(tokens, self.layout),
            norms=seen.norms,
            attention=seen.attention,
            labels=self.labels,
        )

    def first(self, n: int) -> Station:
        """The first images of the batch alone."""
        return replace(
            self,
            resid=self.resid[:n],
            labels=None if self.labels is None else self.labels[:n],
            seen=self.seen.map(lambda tensor: tensor[:n]),
        )

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


def stations(
    vit: HookedViT,
    batch: Float[Tensor, "batch channel height width"],
    metric: Metric,
    layers: Iterable[int],
    labels: Int[Tensor, "batch ..."] | None = None,
) -> Iterator[Station]:
    """The batch before each of these layers, in ascending order, in one pass without a graph.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> metric = Metric(name="norm", measure=lambda edited, clean: edited.norms["1.mlp"].amax(1), norms=("1.mlp",))
        >>> with torch.no_grad():
        ...     [bool((at.go_on().output == vit(images)).all()) for at in stations(vit, images, metric, [0, 3])]
        [True, True]
    """
    layout, seen = vit.layout(batch), Seen()
    resid, start = batch.to(vit.device), None
    labels = None if labels is None else labels.to(vit.device)
    for layer in sorted(layers):
        with torch.no_grad(), vit.hooks(seen.hooks(vit, layout, metric)):
            options = {} if start is None else {"start_at_layer": start, "layout": layout}
            resid, start = vit(resid, stop_at_layer=layer, **options), layer
        yield Station(vit, metric, layout, layer, resid, labels, Seen(dict(seen.norms), dict(seen.attention)))


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

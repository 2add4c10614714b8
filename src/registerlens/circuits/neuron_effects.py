"""What ablating each neuron alone would do to a metric: read off gradients from a paused run, or measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.neurons import Pair, RegisterNeurons
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.engine.stream import batches
from registerlens.engine.views import Seen, View, Watched, mapped, run_from
from registerlens.errors import ConfigError, ShapeError, check_finite
from registerlens.evaluation.edit_runs import measure_edits
from registerlens.evaluation.metrics import Metric
from registerlens.interventions.ablation import Ablate, Reference
from registerlens.model.parts import at_least_float32
from registerlens.model.vit import HookedViT
from registerlens.stats.moments import Moments


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
        return value_of(self.metric, edited, clean)


def value_of(metric: Metric, edited: View, clean: View) -> Float[Tensor, " batch"]:
    """What a metric says, in float32 at least, with its graph.

    Raises:
        ShapeError: not one number an image.
    """
    value, n = metric.measure(edited, clean), len(edited.output)
    if not isinstance(value, Tensor) or value.shape != (n,) or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"Metric '{metric.name}' must give one floating-point number an image, a tensor of shape [{n}] here, and "
            f"gave {got}."
        )
    return value.to(at_least_float32(value.dtype))


def check_gradient(values: Tensor, metric: str, where: str = "") -> None:
    """Refuse what a gradient with NaN or infinity has made.

    Raises:
        NonFiniteError: it has.
    """
    suspects = "the images and the metric (a square root at 0, 0 / 0)"
    check_finite(values, f"The gradient of metric '{metric}' is NaN or infinite{where}", suspects)


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


Effects = dict[int, Float[Tensor, "batch neuron"]]
"""Effect of each neuron of a layer on each image, float32; layers that the metric does not depend on are left out."""

STATIONARY = 1e-3
"""A first-order effect of a whole layer below this share of the true one: the metric's gradient vanishes."""


@contextmanager
def frozen_weights(vit: HookedViT) -> Iterator[None]:
    """No gradient for any weight inside the block, so that nothing is kept for one."""
    learning = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def first_order(paused: PausedRun, layers: Sequence[int], replacement: Replacement) -> tuple[Tensor, Effects]:
    """One forward and one backward pass for the neurons of all layers.

    Args:
        paused: the batch before the first of them.
        layers: whose neurons.
        replacement: what they would become.

    Returns:
        the metric [batch] of the clean run, and effect_n = sum over tokens of (replacement - activation) times the
        metric's derivative by the activation.

    Raises:
        ConfigError: the metric cannot be differentiated.
        ShapeError: it does not give one number an image.

    Source: Molchanov et al. 2017 (1611.06440), equation 7; Nanda 2023 (attribution patching).
    """
    effects: Effects = {}
    leaves: list[Tensor] = []

    def watch(post: Tensor, hook: Any) -> Tensor:
        if not leaves:
            post = post.detach().requires_grad_()
            leaves.append(post)
        change = replacement.at(hook.layer(), paused.layout, post) - post.detach()
        post.register_hook(partial(receive, hook.layer(), change))
        return post

    def receive(layer: int, change: Tensor, gradient: Tensor) -> None:
        wide = at_least_float32(change.dtype)
        effects[layer] = (change.to(wide) * gradient.to(wide)).sum(1).float()

    with torch.enable_grad():
        edited = paused.go_on([([f"blocks.{layer}.mlp.hook_post" for layer in layers], watch)])
        values = paused.value(edited, mapped(edited, Tensor.detach))
        if _descend(values, leaves[0]) is None:
            raise not_differentiable(paused.metric.name, f"the neurons from block {paused.layer} on")
    return values.detach(), effects


def integrated_gradients(
    paused: PausedRun, clean: View, replacement: Replacement, steps: int
) -> Float[Tensor, "batch neuron"] | None:
    """The effect of ablating the whole of the layer it paused before, shared out among its neurons.

    The gradient is averaged (Gauss-Legendre) while all neurons of the layer go from their activations to their
    replacements together: effect_n = sum over tokens of (replacement - activation) times that average. Over the neurons
    the effects add up to that of ablating the layer as a whole. None where the metric does not depend on the layer.

    Source: Sundararajan et al. 2017 (1703.01365), equation 1 and proposition 1; Dhamdhere et al. 2019 (1805.12233).
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = None
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        met: list[Tensor] = []

        def move(post: Tensor, hook: Any, share: float = float(node), met: list[Tensor] = met) -> Tensor:
            change = replacement.at(hook.layer(), paused.layout, post) - post.detach()
            met += [(post.detach() + share * change).requires_grad_(), change]
            return met[0]

        with torch.enable_grad():
            edited = paused.go_on([(f"blocks.{paused.layer}.mlp.hook_post", move)])
            gradient = _descend(paused.value(edited, clean), met[0])
        if gradient is None:
            return None
        wide = at_least_float32(gradient.dtype)
        effect = float(weight) * (met[1].to(wide) * gradient.to(wide)).sum(1).float()
        total = effect if total is None else total + effect
    return total


def check_slope(paused: PausedRun, effects: Effects, replacement: Replacement) -> None:
    """Make sure that the gradient says anything at all about the layer it paused before; costs two runs of the batch.

    Raises:
        ConfigError: ablating the layer changes the metric, and the gradient knows nothing of it.
    """

    def ablate(post: Tensor, hook: Any) -> Tensor:
        return replacement.at(hook.layer(), paused.layout, post).expand_as(post).clone()

    with torch.no_grad():
        clean = paused.go_on()
        edited = paused.go_on([(f"blocks.{paused.layer}.mlp.hook_post", ablate)])
        true = paused.value(edited, clean) - paused.value(clean, clean)
    predicted = effects[paused.layer].sum(1)[: len(true)]
    if predicted.abs().nanmean() < STATIONARY * true.abs().nanmean():
        raise no_slope(paused.metric.name, "method='integrated_gradients'")


def no_slope(metric: str, instead: str) -> ConfigError:
    """What to say where the gradient vanishes though the metric changes."""
    return ConfigError(
        f"First order cannot see metric '{metric}': its gradient vanishes at the clean run, as that of every distance, "
        f"cosine or KL divergence to the clean run does. Use {instead}, or a metric with a slope there: a logit, or a "
        f"projection such as 'cls'."
    )


def not_differentiable(metric: str, by: str) -> ConfigError:
    """What to say where no gradient comes back."""
    return ConfigError(
        f"Metric '{metric}' has no gradient by {by}: it is not differentiable (it counts, compares, detaches or leaves "
        f"torch), or looks at earlier layers only. Measure exactly instead, with rl.run_sweep or "
        f"rl.circuits.path_patching."
    )


def _descend(values: Float[Tensor, " batch"], leaf: Tensor) -> Tensor | None:
    """The derivative by the leaf, None where there is no way to it; an image without a value takes no part."""
    if not values.requires_grad:
        return None
    return torch.autograd.grad(values[values.isfinite()].sum(), [leaf], allow_unused=True)[0]


def exact_effects(
    vit: HookedViT,
    images: Images,
    metric: Metric,
    pairs: Sequence[Pair],
    replacement: Replacement,
    *,
    labels: Int[Tensor, "image ..."] | None = None,
    batch_size: int = 16,
    stack: int = 64,
) -> Moments:
    """The metric with one neuron ablated less the metric of the clean run, over images; one number a pair.

    Args:
        vit: the model, its edits in place.
        images: preprocessed, as a tensor or in batches.
        metric: what is measured; it need not be differentiable.
        pairs: (layer, neuron) of each.
        replacement: what the neuron becomes at every token.
        labels: one an image, where the metric wants them.
        batch_size: images at once when a tensor is given.
        stack: sequences (images x neurons) at once.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.circuits.differentiable import largest_norm
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> exact_effects(vit, images, largest_norm("1.mlp"), [(5, 0), (2, 3)], Replacement()).mean.tolist()
        [0.0, 0.0]
    """
    effects = Moments(len(pairs))
    if not pairs:
        return effects
    conditions = [(), *((_ablation(pair, replacement.reference),) for pair in pairs)]
    for batch in batches(vit, images, batch_size, "ablating exactly", labels):
        values = measure_edits(
            vit, batch.images, conditions, [metric], labels=batch.labels, batch_size=len(batch), stack=stack
        )
        effects.add((values[1:, :, 0] - values[0, :, 0]).T)
    return effects


def _ablation(pair: Pair, reference: Reference | None) -> Ablate:
    """The ablation of one neuron, to zero or to what a reference for whole layers says of it."""
    target = RegisterNeurons.from_pairs([pair])
    if reference is None:
        return Ablate(target)
    point, neuron = f"blocks.{pair[0]}.mlp.hook_post", pair[1]
    mean, std = ({point: kind[point][:, neuron : neuron + 1]} for kind in (reference.mean, reference.std))
    return Ablate(target, "mean", reference=Reference(mean=mean, std=std, bank={}, n_images=reference.n_images))

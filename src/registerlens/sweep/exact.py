"""The exact effect of ablating single neurons: many of one layer at once, each from the residual stream before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.neurons import Pair
from registerlens.data.batches import Images, count
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.sweep.metrics import Metric, View
from registerlens.sweep.moments import Moments
from registerlens.sweep.stations import Replacement, Station, labelled, stations
from registerlens.sweep.views import mapped


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
        >>> from registerlens.sweep.differentiable import largest_norm
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> exact_effects(vit, images, largest_norm("1.mlp"), [(5, 0), (2, 3)], Replacement()).mean.tolist()
        [0.0, 0.0]
    """
    effects = Moments(len(pairs))
    if not pairs:
        return effects
    by_layer: dict[int, list[int]] = {}
    for i, (layer, _) in enumerate(pairs):
        by_layer.setdefault(layer, []).append(i)
    neurons = torch.tensor([neuron for _, neuron in pairs], dtype=torch.long)
    batches = labelled(images, labels, batch_size)
    with torch.no_grad():
        for batch, mine in track(batches, "exact ablations", count(images), lambda item: len(item[0])):
            changes = torch.full((len(batch), len(pairs)), torch.nan)
            clean: View | None = None
            for station in stations(vit, batch, metric, by_layer, mine):
                clean = station.go_on() if clean is None else clean
                value = station.value(clean, clean)
                at_once = max(1, stack // len(batch))
                for some in torch.tensor(by_layer[station.layer]).split(at_once):
                    edited = _ablated(station, clean, neurons[some], replacement)
                    changes[:, some] = (edited - value).T.float().cpu()
            effects.add(changes)
    return effects


def _ablated(
    station: Station, clean: View, neurons: Int[Tensor, " condition"], replacement: Replacement
) -> Float[Tensor, "condition batch"]:
    """The metric with each of these neurons of the station's layer ablated, one a copy of the batch."""
    n = len(neurons)
    copies = torch.arange(n, device=station.resid.device)

    def ablate(post: Tensor, hook: Any) -> Tensor:
        new = replacement.at(hook.layer(), station.layout, post)[:, neurons].T  # condition, pos or 1
        apart = post.clone().unflatten(0, (n, -1))
        apart[copies, :, :, neurons.to(post.device)] = new[:, None].expand(*apart.shape[:3])
        return apart.flatten(0, 1)

    def repeat(tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * n)

    many = station.repeated(n)
    edited = many.go_on([(f"blocks.{station.layer}.mlp.hook_post", ablate)])
    return many.value(edited, mapped(clean, repeat)).unflatten(0, (n, -1))

"""The exact effect of ablating single neurons: one condition a neuron."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from registerlens.analysis.neurons import Pair, RegisterNeurons
from registerlens.circuits.resumed import Replacement, labelled
from registerlens.data.batches import Images, count
from registerlens.evaluation.edit_runs import measure_edits
from registerlens.evaluation.metrics import Metric
from registerlens.interventions.ablation import Ablate, Reference
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.stats.moments import Moments


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
    batches = labelled(images, labels, batch_size)
    for batch, mine in track(batches, "exact ablations", count(images), lambda item: len(item[0])):
        values = measure_edits(vit, batch, conditions, [metric], labels=mine, batch_size=len(batch), stack=stack)
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

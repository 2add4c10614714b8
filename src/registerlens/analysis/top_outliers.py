"""Neurons at two tokens of each image: its top outlier, and a random normal patch to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis import sighting
from registerlens.analysis.detection import Detection, detect, require_outliers
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.data.batches import Images
from registerlens.errors import ImageError, InterventionError
from registerlens.model.vit import HookedViT

PLACES = ("top outlier", "random normal patch")
"""The two tokens."""


@dataclass(frozen=True)
class Sight:
    """What one batch shows at the two tokens; only images with an outlier and a normal patch have a row."""

    images: Int[Tensor, " row"]
    """Index in the batch of each row's image."""
    patches: Int[Tensor, "place row"]
    """The two patches, in the order of `PLACES`."""
    _activations: Callable[[int, Tensor, Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def activations(self, layer: int) -> Float[Tensor, "place row neuron"]:
        """Every neuron of a layer at the two tokens, float32."""
        return self._activations(layer, self.images, self.patches)


def located(
    vit: HookedViT,
    images: Images,
    neurons: RegisterNeurons,
    detection: Detection | None,
    purpose: str,
    batch_size: int,
) -> Detection:
    """Check the neurons, and find outliers unless the caller did.

    Raises:
        InterventionError: no neuron was given, or the model does not have one of them.
        NoOutliersError: the model has no outliers on these images; it carries the evidence.
    """
    check_neurons(vit, neurons)
    detection = detection or detect(vit, images, batch_size=batch_size)
    require_outliers(detection, purpose)
    return detection


def check_neurons(vit: HookedViT, neurons: RegisterNeurons) -> None:
    """Raise an InterventionError unless there are neurons, all of this model."""
    if not len(neurons.check(vit.cfg)):
        raise InterventionError("No neuron was given. Find some with rl.find_register_neurons(vit, images).")


def look(
    vit: HookedViT,
    batch: Float[Tensor, "batch channel height width"],
    layers: Sequence[int],
    detection: Detection,
    generator: torch.Generator,
) -> Sight:
    """Run a batch as far as it takes, and pick the two tokens of each image.

    Args:
        vit: the model, edited or not.
        batch: preprocessed images.
        layers: whose neurons will be asked for.
        detection: where norms are taken, and above which one a patch is an outlier.
        generator: draws the normal patches, one number an image: the same in every batching.

    Raises:
        NonFiniteError: a norm is NaN or infinite.
    """
    seen = sighting.look(vit, batch, layers, detection.sublayer)
    norms = seen.norms(detection.sublayer)
    images, chosen = pick(norms, detection.cutoff.above(norms), torch.rand(len(batch), generator=generator))
    return Sight(images, chosen, seen.activations)


def pick(
    norms: Float[Tensor, "batch patch"], mask: Bool[Tensor, "batch patch"], draw: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, " row"], Int[Tensor, "place row"]]:
    """The images that have both kinds of patches, and in each the largest outlier and a normal patch at random.

    Args:
        norms: of the patches.
        mask: which are outliers.
        draw: a number from 0 to 1 for each image, which chooses among its normal patches.

    Example:
        >>> norms = torch.tensor([[1.0, 9.0, 8.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
        >>> images, patches = pick(norms, norms > 5, torch.tensor([0.6, 0.1]))
        >>> images.tolist(), patches.tolist()
        ([0], [[1], [3]])
    """
    images = (mask.any(1) & ~mask.all(1)).nonzero()[:, 0]
    norms, mask, draw = norms[images], mask[images], draw.to(norms.device)[images]
    n_normal = (~mask).sum(1)
    wanted = (draw * n_normal).long().clamp_max(n_normal - 1)
    normal = ((~mask).cumsum(1) > wanted[:, None]).long().argmax(1)  # the first patch with so many normal ones before
    return images, torch.stack([norms.masked_fill(~mask, -1).argmax(1), normal])


def need_some(n_images: int, n_with_outliers: int) -> None:
    """Complain if there was nothing to look at.

    Raises:
        ImageError: no image came, or none had an outlier.
    """
    if not n_images:
        raise ImageError(
            "No image came: the tensor or the iterable is empty, or it could be iterated only once. Give a tensor, a "
            "list of batches or an rl.data.ImageStream, or pass detection=."
        )
    if not n_with_outliers:
        raise ImageError(f"None of the {n_images} images has an outlier. Give more images, or a lower threshold.")


def random_sets(
    listed: Sequence[int], d_mlp: int, draws: int, generator: torch.Generator
) -> Int[Tensor, "draw neuron"]:
    """Sets as large as the one listed, drawn without replacement from a layer's other neurons: the null.

    Raises:
        InterventionError: the layer has too few others.

    Example:
        >>> random_sets([0, 1], 4, 3, torch.Generator().manual_seed(0)).sort().values.tolist()
        [[2, 3], [2, 3], [2, 3]]
    """
    others = torch.tensor(sorted(set(range(d_mlp)) - set(listed)), dtype=torch.long)
    if len(others) < len(listed):
        raise InterventionError(
            f"{len(listed)} of a layer's {d_mlp} neurons are listed: too few others for random sets as large."
            " List fewer."
        )
    return torch.stack([others[torch.randperm(len(others), generator=generator)[: len(listed)]] for _ in range(draws)])

"""What neurons do at an image's top outlier, and at a random normal patch to compare it with, in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, detect, require_outliers
from registerlens.analysis.neurons import RegisterNeurons, warn_of_other_model
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.engine.stream import Batch, Sums
from registerlens.errors import ImageError, InterventionError, check_finite
from registerlens.model.block import Block
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import Sublayer
from registerlens.model.vit import Hook, HookedViT
from registerlens.results import ModelResult


class NormsAndActivations:
    """Patch norms at some places and the inputs of some MLPs for one batch, filled by `hooks` in its first pass.

    Hidden layers, four times as wide, are not kept: activations are computed again at the few patches that are asked
    for. Where somebody edits a hidden layer it is kept itself, for computed again it would be unedited.

    Args:
        vit: the model, its edits in place.
        layout: of the images to come.
        layers: blocks whose neurons will be asked for.
        places: sublayers after which patch norms will be.
    """

    def __init__(self, vit: HookedViT, layout: TokenLayout, layers: Sequence[int], places: Sequence[str]) -> None:
        self._patches = patches = layout.patches
        self._mlps = {layer: cast(Block, vit.blocks[layer]).mlp for layer in layers}
        self._edited = {layer for layer, mlp in self._mlps.items() if mlp.watched}
        self._inputs: dict[int, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        inputs, norms = self._inputs, self._norms  # hooks that hold `self` would keep the tensors alive in a cycle

        def keep_input(x: Tensor, hook: Any) -> None:
            inputs.setdefault(hook.layer(), x)

        def keep_norms(resid: Tensor, hook: Any) -> None:
            if hook.name not in norms:
                norms[hook.name] = token_norms(resid[:, patches])

        names = ["mlp.hook_post" if layer in self._edited else "ln2.hook_normalized" for layer in layers]
        self.hooks: list[Any] = [
            *((f"blocks.{layer}.{name}", keep_input) for layer, name in zip(layers, names, strict=True)),
            *((Sublayer(place).hook_name, keep_norms) for place in places),
        ]

    def norms(self, place: str) -> Float[Tensor, "batch patch"]:
        """Patch norms after a sublayer, float32.

        Raises:
            NonFiniteError: one is NaN or infinite.
        """
        norms = self._norms[Sublayer(place).hook_name]
        check_finite(norms, f"Patch norms are NaN or infinite at {place}")
        return norms

    def activations(
        self, layer: int, image: Int[Tensor, "..."], patch: Int[Tensor, "..."]
    ) -> Float[Tensor, "... neuron"]:
        """Activations of a layer's neurons at patches of images, float32."""
        x = self._inputs[layer][image, patch + self._patches.start]
        return (x if layer in self._edited else self._mlps[layer].neurons(x)).float()

    def forget(self) -> None:
        """Give the memory back."""
        self._inputs.clear()
        self._norms.clear()


PLACES = ("top outlier", "random normal patch")
"""The two tokens."""


@dataclass(frozen=True)
class TokenPairs:
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
    warn_of_other_model(vit, neurons)
    if not len(neurons.check(vit.cfg)):
        raise InterventionError("No neuron was given. Find some with rl.find_register_neurons(vit, images).")


@dataclass(frozen=True, kw_only=True, eq=False)
class TopOutlierResult(ModelResult, ABC):
    """What register neurons do at the top outlier of each image."""

    neurons: RegisterNeurons
    """The neurons looked at."""
    detection: Detection
    """Which patches are outliers, in the model as it is."""
    n_images: int
    """Images that went through."""
    n_with_outliers: int
    """Of these, how many have an outlier and so count."""
    layers: tuple[int, ...]
    """Blocks of the neurons."""

    def describe(self) -> str:
        """The result in words."""
        return " ".join([f"{self.n_with_outliers} of {self.n_images} images have an outlier.", *self._findings()])

    @abstractmethod
    def _findings(self) -> Iterator[str]:
        """A sentence a layer."""


class AtTopOutliers(Sums, ABC):
    """Sums over the two tokens of each image; `take` gets what a batch shows there."""

    def __init__(
        self, vit: HookedViT, neurons: RegisterNeurons, detection: Detection, generator: torch.Generator
    ) -> None:
        """In the layers of these neurons; the generator draws normal patches, one number an image in every batching."""
        super().__init__()
        self.identity, self.neurons = vit.identity, neurons
        self.layers, self.detection, self.generator = tuple(neurons.by_layer()), detection, generator

    @abstractmethod
    def take(self, tokens: TokenPairs) -> None:
        """Take in the images of a batch that have an outlier and a normal patch; there is one at least."""

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """Norms where outliers are, and what enters the MLPs."""
        self.seen = NormsAndActivations(vit, layout, self.layers, [self.detection.sublayer])
        return self.seen.hooks

    def update(self, batch: Batch) -> None:
        """Pick the two tokens of each image."""
        norms = self.seen.norms(self.detection.sublayer)
        draw = torch.rand(len(batch), generator=self.generator)
        images, chosen = pick(norms, self.detection.cutoff.above(norms), draw)
        self.add(n_images=len(batch), n_with_outliers=len(images))
        if len(images):
            self.take(TokenPairs(images, chosen, self.seen.activations))

    def about(self) -> dict[str, Any]:
        """Fields that all results have.

        Raises:
            ImageError: no image had an outlier.
        """
        n = need_some(self.n_images, self.count("n_with_outliers"))
        named = ("neurons", "detection", "n_images", "layers")
        return {**self.identity, "n_with_outliers": n} | {name: getattr(self, name) for name in named}


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


def need_some(n_images: int, n_with_outliers: int) -> int:
    """The number of images with an outlier.

    Raises:
        ImageError: it is 0.
    """
    if not n_with_outliers:
        raise ImageError(f"None of the {n_images} images has an outlier. Give more images, or a lower threshold.")
    return n_with_outliers


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

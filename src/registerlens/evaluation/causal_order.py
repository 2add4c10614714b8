"""Which register neurons drive which: edit those of one layer, watch those of later layers at the outliers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.detection import Detection
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import AtTopOutliers, NormsAndActivations, TokenPairs, TopOutlierResult, located
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by, grid_table
from registerlens.engine.stream import stream
from registerlens.errors import InterventionError
from registerlens.evaluation.controls import DRAWS, random_neurons
from registerlens.interventions.ablation import Ablate
from registerlens.model.vit import Hook, HookedViT

CONDITIONS = ("zero", "mean", "random, zero")
"""How a layer's register neurons are edited: to zero, to their mean over images and patches; and, as a control, as many
random neurons of the layer to zero (mean of three draws)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalOrder(TopOutlierResult):
    """Activations of register neurons at the top outlier, with those of an earlier layer edited."""

    clean: Float[np.ndarray, " listed"]
    """Activation of each neuron at the clean run's top outlier, mean over images."""
    edited: Float[np.ndarray, "condition layer listed"]
    """The same with the neurons of a layer edited, by `CONDITIONS`; NaN for neurons not in a later layer."""

    @property
    def change(self) -> Float[np.ndarray, "condition layer listed"]:
        """Share of the clean activation that is lost (-1: all of it) or gained; NaN for neurons not in a later layer,
        and for those silent in the clean run."""
        lost = self.edited - self.clean
        return np.divide(lost, np.abs(self.clean), out=np.full_like(lost, np.nan), where=self.clean != 0)

    def between(self, condition: str = "zero") -> Float[np.ndarray, "layer layer"]:
        """Change of a later layer's (column's) summed activations when a layer (row) is edited; NaN up to it."""
        c = CONDITIONS.index(condition)
        of_layer = np.array([layer for layer, _ in self.neurons.pairs])
        columns = [of_layer == layer for layer in self.layers]
        lost = np.stack([(self.edited[c] - self.clean)[:, own].sum(1) for own in columns], 1)
        with np.errstate(invalid="ignore"):  # a layer whose neurons are silent has no change
            return lost / np.array([np.abs(self.clean[own]).sum() for own in columns])

    def to_dataframe(self) -> pd.DataFrame:
        """One row a condition, edited layer and later neuron: clean and edited activation, and relative change."""
        layers, neurons = zip(*self.neurons.pairs, strict=True)
        table = grid_table(
            {"condition": CONDITIONS, "edited_layer": self.layers, "listed": range(len(self.neurons))},
            layer=layers,
            neuron=neurons,
            clean=self.clean,
            edited=self.edited,
            change=self.change,
        )
        later = table[table["layer"] > table["edited_layer"]]
        return later.drop(columns="listed").reset_index(drop=True)

    def _findings(self) -> Iterator[str]:
        changes = {condition: self.between(condition) for condition in CONDITIONS}
        for i, layer in enumerate(self.layers[:-1]):
            effects = [
                f"block {later} by {changes['zero'][i, i + 1 + j]:+.0%} (mean {changes['mean'][i, i + 1 + j]:+.0%}, "
                f"random neurons {changes['random, zero'][i, i + 1 + j]:+.0%})"
                for j, later in enumerate(self.layers[i + 1 :])
            ]
            yield f"Zeroing the register neurons of block {layer} changes those of {', '.join(effects)}."

    plot = drawn_by("neuron_evidence.causal_figure")
    """Heat maps: edited layer against later neuron, for each kind of edit."""


def causal_order(
    vit: HookedViT,
    images: Images,
    neurons: RegisterNeurons,
    *,
    detection: Detection | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> CausalOrder:
    """Edit the register neurons of each layer in turn, and see what it does to those of later layers.

    Zeroing leaves the range that later layers know, so that the mean edit and random neurons stand beside it. Each edit
    starts from the clean stream before its block.

    Args:
        vit: the model; it may be edited already.
        images: [image, channel, height, width], or batches that can be iterated several times.
        neurons: register neurons of at least two layers.
        detection: which patches are outliers; default: found first, in another pass.
        seed: of the random neurons.
        batch_size: images at once when a tensor is given.

    Raises:
        InterventionError: the neurons are of one layer, so that nothing comes later; no neuron was given, or the model
            does not have one of them, or a layer has too few others for a control.
        NoOutliersError: the model has no outliers on these images; it carries the evidence.
        ImageError: there are no images, or none has an outlier.

    Source: Jiang et al. 2025, section 3 (neurons before the onset drive those at it); Parodi et al. 2026 for controls.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images
        >>> found = causal_order(vit, images, rl.RegisterNeurons.from_pairs([(1, 183), (1, 103), (2, 197)]))
        >>> found.layers, found.edited.shape
        ((1, 2), (3, 2, 3))
    """
    detection = located(vit, images, neurons, detection, "The causal order of register neurons", batch_size)
    first, *later = neurons.by_layer()
    if not later:
        raise InterventionError(
            f"All {len(neurons)} neurons are of block {first}, so that none comes later. Give neurons of several "
            f"layers, for instance rl.find_register_neurons(vit, images, top_layer=...)."
        )
    layers = (first, *later)
    edits = _edits(vit, images, neurons, layers[:-1], seed, batch_size)
    sums = _OrderSums(vit, neurons, detection, edits, torch.Generator().manual_seed(seed))
    [order] = stream(vit, images, [sums], batch_size=batch_size, description="ordering neurons")
    return order


class _OrderSums(AtTopOutliers):
    def __init__(
        self,
        vit: HookedViT,
        neurons: RegisterNeurons,
        detection: Detection,
        edits: dict[tuple[str, int], list[Ablate]],
        generator: torch.Generator,
    ) -> None:
        super().__init__(vit, neurons, detection, generator)
        self.vit, self.edits = vit, edits

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """The stream before each edited layer too."""
        self.layout, self.streams = layout, dict[int, Tensor]()

        def keep(resid: Tensor, hook: Any) -> None:
            self.streams[hook.layer()] = resid

        points = [f"blocks.{layer}.hook_resid_pre" for layer in self.layers[:-1]]
        return [(points, keep), *super().hooks(vit, layout)]

    def take(self, tokens: TokenPairs) -> None:
        """The clean activations, and those of later layers under each edit."""
        clean = self._of({layer: tokens.activations(layer)[0] for layer in self.layers})
        edited = torch.full((len(CONDITIONS), len(self.layers), len(self.neurons)), torch.nan, dtype=torch.float64)
        for c, condition in enumerate(CONDITIONS):
            for i, layer in enumerate(self.layers[:-1]):
                edits = self.edits[condition, layer]
                effects = [
                    self._of(self._later(layer, self.layers[i + 1 :], tokens, one)) / len(edits) for one in edits
                ]
                later = torch.tensor([at > layer for at, _ in self.neurons.pairs])
                edited[c, i, later] = torch.stack(effects).sum(0)[later]
        self.add(clean=clean, edited=edited)

    def _later(
        self, first: int, later: Sequence[int], tokens: TokenPairs, ablation: Ablate
    ) -> dict[int, Float[Tensor, "row neuron"]]:
        """Activations of later layers at the clean top outliers, under an edit of the layer `first`."""
        with self.vit.edit(ablation):
            recorded = NormsAndActivations(self.vit, self.layout, later, [])
            with self.vit.hooks(recorded.hooks):
                self.vit(self.streams[first], start_at_layer=first, stop_at_layer=max(later) + 1, layout=self.layout)
            return {layer: recorded.activations(layer, tokens.images, tokens.patches[0]) for layer in later}

    def _of(self, activations: dict[int, Float[Tensor, "row neuron"]]) -> Float[Tensor, " listed"]:
        """Sum over images for each listed neuron; 0 for those of a layer that was not watched."""
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack(
            [
                activations[layer][:, n].double().sum().cpu() if layer in activations else zero
                for layer, n in self.neurons.pairs
            ]
        )

    def result(self) -> CausalOrder:
        """Means over the images."""
        return CausalOrder(**self.about(), **self.means(over="n_with_outliers"))


def _edits(
    vit: HookedViT, images: Images, neurons: RegisterNeurons, layers: Sequence[int], seed: int, batch_size: int
) -> dict[tuple[str, int], list[Ablate]]:
    """The ablations of each condition and layer; means are fitted for all layers in one pass."""
    fitted = Ablate.fit(vit, images, neurons, "mean", batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    edits: dict[tuple[str, int], list[Ablate]] = {}
    for layer in layers:
        own = neurons.filter(layers=[layer])
        edits["zero", layer] = [Ablate(own)]
        edits["mean", layer] = [replace(fitted, target=own)]
        random = [random_neurons(own, vit.cfg.d_mlp, generator) for _ in range(DRAWS)]
        edits["random, zero", layer] = [Ablate(other) for other in random]
    return edits

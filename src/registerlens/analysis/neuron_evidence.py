"""How register neurons, and all others of their layers, fire at outliers and at normal patches (figures 20 and 27)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped

from registerlens.analysis.detection import Detection
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import AtTopOutliers, TokenPairs, TopOutlierResult, located
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import stream
from registerlens.model.vit import HookedViT
from registerlens.stats.histograms import count_signed


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationDistributions(TopOutlierResult):
    """Activations at the top outlier of each image and at a random normal patch of it; places in that order."""

    seed: int
    """Seed of the choice of normal patches."""
    histogram: Int[np.ndarray, "place layer bin"]
    """All neurons of a layer in all images, by activation; bins as `signed_edges()`."""
    neuron_histogram: Int[np.ndarray, "place listed bin"]
    """Images by the activation of each neuron listed."""
    mean: Float[np.ndarray, "place layer neuron"]
    """Activation of every neuron of the layers, mean over images."""
    std: Float[np.ndarray, "place layer neuron"]
    """Its standard deviation over images."""
    skewness: Float[np.ndarray, "place layer"]
    """Skewness of a layer's activations at the token, mean over images; 0 for a symmetric distribution."""
    large: Float[np.ndarray, " layer"]
    """Neurons whose |activation| at the top outlier exceeds that of every neuron at the normal patch, mean over images:
    the few large values, without a threshold."""
    large_listed: Float[np.ndarray, " layer"]
    """How many of these are listed."""

    def listed(self, values: Shaped[np.ndarray, "place layer neuron"]) -> Shaped[np.ndarray, "place listed"]:
        """One number for each listed neuron, out of those for all."""
        rows, columns = zip(*((self.layers.index(layer), n) for layer, n in self.neurons.pairs), strict=True)
        return values[:, rows, columns]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron listed: mean and spread at both tokens, and its rank in its layer by mean at the outlier."""
        ranks = (-self.mean[:1]).argsort(-1, kind="stable").argsort(-1, kind="stable")
        mean, std = self.listed(self.mean), self.listed(self.std)
        return pd.DataFrame(
            {
                "layer": [layer for layer, _ in self.neurons.pairs],
                "neuron": [neuron for _, neuron in self.neurons.pairs],
                "mean_outlier": mean[0],
                "std_outlier": std[0],
                "mean_normal": mean[1],
                "std_normal": std[1],
                "rank_in_layer": self.listed(ranks)[0],
            }
        )

    def _findings(self) -> Iterator[str]:
        for i, layer in enumerate(self.layers):
            n = sum(at == layer for at, _ in self.neurons.pairs)
            yield (
                f"Block {layer}: skewness {self.skewness[0, i]:.1f} at the top outlier, {self.skewness[1, i]:.1f} at a "
                f"normal patch; {self.large[i]:.1f} of {self.config.d_mlp} neurons are larger there than any at the "
                f"normal patch, {self.large_listed[i]:.1f} of them among the {n} listed."
            )

    plot = drawn_by("neuron_evidence.distributions_figure")
    """Both distributions, layer by layer, and the neurons listed one by one."""


def activation_distributions(
    vit: HookedViT,
    images: Images,
    neurons: RegisterNeurons,
    *,
    detection: Detection | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> ActivationDistributions:
    """How a layer's neurons fire at the top outlier, and at a random normal patch, streaming.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or batches that can be iterated twice.
        neurons: register neurons; all neurons of their layers are counted, these one by one.
        detection: which patches are outliers; default: found first, in another pass.
        seed: of the normal patches.
        batch_size: images at once when a tensor is given.

    Raises:
        InterventionError: no neuron was given, or the model does not have one of them.
        NoOutliersError: the model has no outliers on these images; it carries the evidence.
        ImageError: there are no images, or none has an outlier.
        NonFiniteError: norms are NaN or infinite.

    Source: Jiang et al. 2025, figures 20 and 27.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> found = activation_distributions(vit, synthetic_images(32, 0).images, neurons)
        >>> found.to_dataframe()["rank_in_layer"].tolist()
        [0]
    """
    detection = located(vit, images, neurons, detection, "Comparing activations at outliers", batch_size)
    sums = _ActivationSums(vit, neurons, detection, torch.Generator().manual_seed(seed))
    [means] = stream(vit, images, [sums], batch_size=batch_size, description="comparing activations")
    return ActivationDistributions(seed=seed, **means)


class _ActivationSums(AtTopOutliers):
    def take(self, tokens: TokenPairs) -> None:
        x = torch.stack([tokens.activations(layer).cpu() for layer in self.layers], 1)  # place layer row neuron
        wide = x.double()
        centred = wide - wide.mean(-1, keepdim=True)
        spread = centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        large = (x[0].abs() > x[1].abs().amax(-1, keepdim=True)).double()
        layer = torch.tensor([self.layers.index(layer) for layer, _ in self.neurons.pairs])
        neuron = torch.tensor([neuron for _, neuron in self.neurons.pairs])
        of_listed = large.sum(1)[layer, neuron]
        self.add(
            histogram=count_signed(x.flatten(2).flatten(0, 1)).unflatten(0, x.shape[:2]),
            neuron_histogram=torch.stack([count_signed(own[layer, :, neuron]) for own in x]),
            sum=wide.sum(2),
            square=wide.square().sum(2),
            skewness=(centred / spread).pow(3).mean(-1).sum(2),
            large=large.sum((1, 2)),
            large_listed=torch.zeros(len(self.layers), dtype=torch.float64).index_add(0, layer, of_listed),
        )

    def result(self) -> dict[str, Any]:
        """Fields of the result."""
        about, means = self.about(), self.means(over="n_with_outliers")
        mean = means.pop("sum")
        std = np.sqrt((means.pop("square") - np.square(mean)).clip(0))
        return {**about, **means, "mean": mean, "std": std}

"""How register neurons, and all others of their layers, fire at outliers and at normal patches (figures 20 and 27)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from registerlens.analysis.detection import Detection
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.stored import Stored
from registerlens.analysis.top_outliers import located, look, need_some
from registerlens.config import ViTConfig
from registerlens.data.batches import Images, count, in_batches
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.stats.histograms import N_BINS, count_signed

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationDistributions(Stored):
    """Activations at the top outlier of each image and at a random normal patch of it; places in that order."""

    model: str
    """Where the model came from."""
    config: ViTConfig
    """Its architecture."""
    neurons: RegisterNeurons
    """The neurons looked at."""
    detection: Detection
    """Which patches are outliers."""
    seed: int
    """Of the normal patches."""
    n_images: int
    """Images that went through."""
    n_with_outliers: int
    """Of these, how many have an outlier and so count."""
    layers: tuple[int, ...]
    """Blocks of the neurons."""
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
    """Of these, how many are listed."""

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

    def describe(self) -> str:
        """The layers in words."""
        told = [f"{self.n_with_outliers} of {self.n_images} images have an outlier."]
        for i, layer in enumerate(self.layers):
            n = sum(at == layer for at, _ in self.neurons.pairs)
            told.append(
                f"Block {layer}: skewness {self.skewness[0, i]:.1f} at the top outlier, {self.skewness[1, i]:.1f} at a "
                f"normal patch; {self.large[i]:.1f} of {self.config.d_mlp} neurons are larger there than any at the "
                f"normal patch, {self.large_listed[i]:.1f} of them among the {n} listed."
            )
        return " ".join(told)

    def plot(self) -> go.Figure:
        """Both distributions, layer by layer, and the neurons listed one by one."""
        from registerlens.viz.neuron_evidence import distributions_figure  # noqa: PLC0415  (viz stands on results)

        return distributions_figure(self)


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
    sums = _ActivationSums(neurons, vit.cfg.d_mlp)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for batch in track(in_batches(images, batch_size), "activation distributions", count(images), len):
            sight = look(vit, batch, sums.layers, detection, generator)
            sums.n_images += len(batch)
            sums.n_with_outliers += len(sight)
            if len(sight):
                for i, layer in enumerate(sums.layers):
                    sums.add(i, sight.activations(layer))
    need_some(sums.n_images, sums.n_with_outliers)
    return ActivationDistributions(
        model=vit.source,
        config=vit.cfg,
        neurons=neurons,
        detection=detection,
        seed=seed,
        n_images=sums.n_images,
        n_with_outliers=sums.n_with_outliers,
        layers=sums.layers,
        **sums.means(),
    )


class _ActivationSums:
    """Running sums over images."""

    def __init__(self, neurons: RegisterNeurons, d_mlp: int) -> None:
        by_layer = neurons.by_layer()
        self.layers, self.listed = tuple(by_layer), list(by_layer.values())
        self.order = {pair: i for i, pair in enumerate(neurons.pairs)}
        n = len(self.layers)
        self.histogram = torch.zeros(2, n, N_BINS, dtype=torch.int64)
        self.neuron_histogram = torch.zeros(2, len(neurons), N_BINS, dtype=torch.int64)
        self.sum, self.square = (torch.zeros(2, n, d_mlp, dtype=torch.float64) for _ in range(2))
        self.skewness = torch.zeros(2, n, dtype=torch.float64)
        self.large, self.large_listed = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
        self.n_images = self.n_with_outliers = 0

    def add(self, i: int, activations: Float[Tensor, "place row neuron"]) -> None:
        """Take in one batch's activations of the i-th layer."""
        x, chosen = activations.cpu(), list(self.listed[i])
        rows = [self.order[self.layers[i], neuron] for neuron in chosen]
        self.histogram[:, i] += count_signed(x.flatten(1))
        of_listed = count_signed(x[..., chosen].transpose(1, 2).flatten(0, 1))
        self.neuron_histogram[:, rows] += of_listed.unflatten(0, (2, len(rows)))
        self.sum[:, i] += x.double().sum(1)
        self.square[:, i] += x.double().square().sum(1)
        centred = x.double() - x.double().mean(-1, keepdim=True)
        spread = centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        self.skewness[:, i] += (centred / spread).pow(3).mean(-1).sum(1)
        large = x[0].abs() > x[1].abs().amax(-1, keepdim=True)
        self.large[i] += float(large.sum())
        self.large_listed[i] += float(large[:, chosen].sum())

    def means(self) -> dict[str, np.ndarray]:
        """Everything as it is reported."""
        n = self.n_with_outliers
        mean = self.sum / n
        return {
            "histogram": self.histogram.numpy(),
            "neuron_histogram": self.neuron_histogram.numpy(),
            "mean": mean.numpy(),
            "std": (self.square / n - mean.square()).clamp_min(0).sqrt().numpy(),
            "skewness": (self.skewness / n).numpy(),
            "large": (self.large / n).numpy(),
            "large_listed": (self.large_listed / n).numpy(),
        }

"""What register neurons write together: how large it is, and how constant its direction (figure 21)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import AtTopOutliers, TokenPairs, TopOutlierResult, located, random_sets
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import stream
from registerlens.errors import check_at_least
from registerlens.model.block import Block, require_linear_output
from registerlens.model.vit import HookedViT
from registerlens.stats.histograms import count_signed

COSINE_BINS = 40
"""Histograms of cosines have bins of 0.05 from -1 to 1."""
DRAWS = 100
"""Random sets a layer."""
GROUPS = ("register neurons", "random sets")
"""Whose histograms are kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronUpdates(TopOutlierResult):
    """Summed updates of sets of neurons at each image's top outlier; set 0 are the register neurons of the layer."""

    norm: Float[np.ndarray, "layer set"]
    """Norm of the summed update, mean over images."""
    cosine: Float[np.ndarray, "layer set"]
    """Cosine of the updates of two images, mean over all pairs of images in which the set writes something; NaN where
    there is no such pair. A set of which a single neuron fires has a constant direction too: look at the norm first."""
    silent: Float[np.ndarray, "layer set"]
    """Share of images in which a set writes nothing, 0 to 1."""
    norm_histogram: Int[np.ndarray, "layer group bin"]
    """Images by norm, register neurons and all random sets; bins as `neuron_evidence.signed_edges()`."""
    cosine_histogram: Int[np.ndarray, "layer group cosine_bin"]
    """Pairs of successive images by cosine, in bins of 0.05 from -1 to 1."""

    def percentile(self, values: Float[np.ndarray, "layer set"]) -> Float[np.ndarray, " layer"]:
        """Percentage of random sets below the register neurons, in each layer."""
        return 100 * (values[:, 1:] < values[:, :1]).mean(1)

    def p_value(self, values: Float[np.ndarray, "layer set"]) -> Float[np.ndarray, " layer"]:
        """Chance that a random set reaches the register neurons' value; at least 1 / (draws + 1)."""
        return (1 + (values[:, 1:] >= values[:, :1]).sum(1)) / values.shape[1]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer: norm and cosine of the register neurons, of the random sets, and p-values."""
        sizes = [len(listed) for listed in self.neurons.by_layer().values()]
        columns: dict[str, object] = {"layer": self.layers, "n_neurons": sizes}
        for name, values in (("norm", self.norm), ("cosine", self.cosine)):
            columns[name] = values[:, 0]
            random = pd.DataFrame(values[:, 1:])  # whose statistics leave out NaN
            columns |= {f"{name}_random": random.mean(axis=1), f"{name}_random_largest": random.max(axis=1)}
            columns[f"{name}_p_value"] = self.p_value(values)
        return pd.DataFrame(columns)

    def _findings(self) -> Iterator[str]:
        for row in self.to_dataframe().to_dict("records"):
            yield (
                f"Block {row['layer']}: the {row['n_neurons']} neurons together write a norm of {row['norm']:.3g} "
                f"(random sets {row['norm_random']:.3g}, p = {row['norm_p_value']:.2g}), with a cosine of "
                f"{row['cosine']:.3f} between images (random sets {row['cosine_random']:.3f}, largest "
                f"{row['cosine_random_largest']:.3f}, p = {row['cosine_p_value']:.2g})."
            )

    plot = drawn_by("neuron_evidence.updates_figure")
    """Distributions of norms and of cosines, register neurons against random sets, layer by layer."""


def neuron_updates(
    vit: HookedViT,
    images: Images,
    neurons: RegisterNeurons,
    *,
    draws: int = DRAWS,
    detection: Detection | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> NeuronUpdates:
    """What the register neurons of each layer write at the top outlier, against random sets of the same size.

    The mean cosine over all pairs of images is exact, from the sum of the unit vectors; its histogram takes each image
    with the one before it.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or batches that can be iterated twice.
        neurons: register neurons.
        draws: random sets in each layer, at least one.
        detection: which patches are outliers; default: found first, in another pass.
        seed: of the random sets.
        batch_size: images at once when a tensor is given.

    Raises:
        InterventionError: no neuron was given, the model does not have one of them, or a layer has too few others.
        NoOutliersError: the model has no outliers on these images; it carries the evidence.
        ConfigError: no random set was asked for.
        ImageError: there are no images, or none has an outlier.
        NonFiniteError: norms are NaN or infinite.
        UnsupportedArchitectureError: a norm stands after the sublayers.

    Source: Jiang et al. 2025, figure 21.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103), (1, 219)])
        >>> found = neuron_updates(vit, synthetic_images(32, 0).images, neurons)
        >>> bool(found.cosine[0, 0] > 0.95), found.p_value(found.norm).round(2).tolist()
        (True, [0.01])
    """
    require_linear_output(vit.cfg, "The split of an update by neurons")
    check_at_least(1, draws=draws)
    detection = located(vit, images, neurons, detection, "Measuring updates at outliers", batch_size)
    sums = _UpdateSums(vit, neurons, detection, draws, torch.Generator().manual_seed(seed))
    [updates] = stream(vit, images, [sums], batch_size=batch_size, description="comparing updates")
    return updates


class _UpdateSums(AtTopOutliers):
    """Shards that are merged lack the pair of successive images between them."""

    def __init__(
        self, vit: HookedViT, neurons: RegisterNeurons, detection: Detection, draws: int, generator: torch.Generator
    ) -> None:
        super().__init__(vit, neurons, detection, generator)
        self.sets: list[Int[Tensor, "set neuron"]] = []
        self.writes: list[Float[Tensor, "set neuron d_model"]] = []
        self.last: Float[Tensor, "layer 1 set d_model"] | None = None
        for layer, listed in neurons.by_layer().items():
            W_out = cast(Block, vit.blocks[layer]).mlp.W_out.detach().float()
            random = random_sets(listed, vit.cfg.d_mlp, draws, generator)
            self.sets.append(torch.cat([torch.tensor(listed)[None], random]).to(W_out.device))
            self.writes.append(W_out[self.sets[-1]])

    def take(self, tokens: TokenPairs) -> None:
        """Take in the activations at the top outliers of a batch."""
        numbers = []
        for layer, chosen, writes in zip(self.layers, self.sets, self.writes, strict=True):
            active = tokens.activations(layer)[0][:, chosen]
            numbers.append(einsum(active, writes, "image set n, set n d_model -> image set d_model"))
        updates = torch.stack(numbers).cpu()  # layer image set d_model
        norms = updates.norm(dim=-1)
        units = F.normalize(updates.double(), dim=-1)
        chain = units if self.last is None else torch.cat([self.last, units], 1)
        self.last = units[:, -1:].clone()
        similar = (chain[:, 1:] * chain[:, :-1]).sum(-1)
        writes = chain.square().sum(-1) > 0.5  # a unit vector, or 0 where the set writes nothing
        both = writes[:, 1:] & writes[:, :-1]
        bins = ((similar + 1) * (COSINE_BINS / 2)).long().clamp(0, COSINE_BINS - 1)
        groups = slice(0, 1), slice(1, None)  # the register neurons are set 0, random sets follow
        self.add(
            norm=norms.double().sum(1),
            directions=units.sum(1),
            silent=(norms == 0).double().sum(1),
            norm_histogram=torch.stack([count_signed(norms[..., own].flatten(1)) for own in groups], 1),
            cosine_histogram=torch.stack(
                [
                    torch.stack([torch.bincount(b[:, own][w[:, own]], minlength=COSINE_BINS) for own in groups])
                    for b, w in zip(bins, both, strict=True)
                ]
            ),
        )

    def result(self) -> NeuronUpdates:
        """Means over the images; the cosine over all pairs of them."""
        about, n = self.about(), self.count("n_with_outliers")
        # |sum of unit vectors|^2 counts each pair twice and each vector once.
        firing = n - self.totals["silent"]
        total = self.totals["directions"].square().sum(-1) - firing
        cosine = torch.where(firing > 1, total / (firing * (firing - 1)).clamp_min(1), float("nan"))
        means = self.means(over="n_with_outliers")
        del means["directions"]
        return NeuronUpdates(cosine=cosine.numpy(), **about, **means)

"""Which residual dimensions register neurons write into: their rows of W_out beside the others' (figure 25)."""

import math
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.massive import kurtosis
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import check_neurons, random_sets
from registerlens.display import drawn_by
from registerlens.errors import NonFiniteError
from registerlens.model.block import Block, require_linear_output
from registerlens.model.vit import HookedViT
from registerlens.results import FINITE, ModelResult
from registerlens.stats.histograms import count_signed

TOP = 3
"""Residual dimensions that a table names."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputWeights(ModelResult):
    """What register neurons write: their rows of W_out (LayerScale included), beside the other neurons of a layer.

    A row is relative where it is divided by its root mean square: then 1 is a typical weight in every row.
    """

    neurons: RegisterNeurons
    """The neurons looked at."""
    layers: tuple[int, ...]
    """Blocks of the neurons."""
    rows: Float[np.ndarray, "listed d_model"] = field(metadata=FINITE)
    """What each neuron writes at an activation of 1."""
    others_histogram: Int[np.ndarray, "layer bin"]
    """Relative weights of a layer's other neurons; bins as `signed_edges()`."""
    norm_percentile: Float[np.ndarray, " listed"]
    """Percentage of the layer's other neurons that write a smaller norm."""
    kurtosis: Float[np.ndarray, " listed"]
    """Kurtosis of the row over the residual dimensions: high where few hold most (3 for a normal distribution)."""
    kurtosis_percentile: Float[np.ndarray, " listed"]
    """Percentage of the layer's other neurons of lower kurtosis."""
    shared: Float[np.ndarray, " d_model"]
    """Relative |weight| in each dimension, mean over the neurons: high where they agree."""
    shared_null: Float[np.ndarray, " draw"]
    """The largest such mean of random sets with as many neurons in each layer."""

    @property
    def relative(self) -> Float[np.ndarray, "listed d_model"]:
        """The rows, each divided by its root mean square."""
        return self.rows / np.sqrt((self.rows**2).mean(1, keepdims=True)).clip(1e-30)

    @property
    def shared_dimensions(self) -> Int[np.ndarray, " rank"]:
        """Residual dimensions in the order of how much the neurons share them."""
        return np.argsort(-self.shared, kind="stable")

    @property
    def p_value(self) -> float:
        """Chance that a random set agrees as much on its strongest dimension; at least 1 / (draws + 1)."""
        return float((1 + (self.shared_null >= self.shared.max()).sum()) / (1 + len(self.shared_null)))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron: norm and kurtosis with percentiles, and its three largest dimensions with their weights."""
        top = np.argsort(-np.abs(self.rows), axis=1, kind="stable")[:, :TOP]
        frame = self.neurons.to_dataframe()[["layer", "neuron"]].assign(
            norm=np.linalg.norm(self.rows, axis=1),
            norm_percentile=self.norm_percentile,
            kurtosis=self.kurtosis,
            kurtosis_percentile=self.kurtosis_percentile,
        )
        for rank in range(top.shape[1]):
            frame[f"dimension_{rank + 1}"] = top[:, rank]
            frame[f"weight_{rank + 1}"] = np.take_along_axis(self.rows, top, 1)[:, rank]
        return frame

    def describe(self) -> str:
        """The weights in words."""
        best = self.shared_dimensions[:TOP]
        listed = ", ".join(f"{i} ({self.shared[i]:.1f} x typical)" for i in best)
        return (
            f"The {len(self.neurons)} neurons share the residual dimensions {listed}. Random sets as large reach "
            f"{self.shared_null.mean():.1f} on their strongest dimension, at most {self.shared_null.max():.1f} in "
            f"{len(self.shared_null)} draws (p = {self.p_value:.2g}). Kurtosis of what they write: median "
            f"{np.median(self.kurtosis):.1f}, percentile {np.median(self.kurtosis_percentile):.0f} of their layer."
        )

    plot = drawn_by("neuron_evidence.weights_figure")
    """Histograms of the weights over residual dimensions, the neurons against the others of their layer."""


def output_weights(vit: HookedViT, neurons: RegisterNeurons, *, draws: int = 1000, seed: int = 0) -> OutputWeights:
    """Into which residual dimensions register neurons write, from the weights alone.

    Args:
        vit: the model.
        neurons: register neurons.
        draws: random sets for the null.
        seed: of the draws; equal seeds give equal results.

    Raises:
        InterventionError: no neuron was given, the model does not have one of them, or a layer has too few others.
        NonFiniteError: a layer's weights, which are named, are NaN or infinite.
        UnsupportedArchitectureError: a norm stands after the sublayers.

    Source: Jiang et al. 2025, figure 25.

    Example:
        >>> import registerlens as rl
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103), (1, 219)])
        >>> found = output_weights(rl.HookedViT.from_pretrained("registerlens:tiny"), neurons)
        >>> found.shared_dimensions[:2].tolist(), found.p_value < 0.01
        ([31, 8], True)
    """
    require_linear_output(vit.cfg, "The reading of output weights")
    check_neurons(vit, neurons)
    generator = torch.Generator().manual_seed(seed)
    rows: dict[tuple[int, int], Tensor] = {}
    by_pair: dict[tuple[int, int], tuple[float, float, float]] = {}
    histograms, null = [], torch.zeros(draws, vit.cfg.d_model, dtype=torch.float64)
    for layer, listed in neurons.by_layer().items():
        weights = _output_rows(vit, layer)
        relative = weights / (weights.norm(dim=1, keepdim=True) / math.sqrt(weights.shape[1])).clamp_min(1e-30)
        others = torch.ones(len(weights), dtype=torch.bool)
        others[list(listed)] = False
        norms, peaked = weights.norm(dim=1), kurtosis(weights)
        histograms.append(count_signed(relative[others].reshape(1, -1))[0])
        for draw, chosen in enumerate(random_sets(listed, len(weights), draws, generator)):
            null[draw] += relative[chosen].abs().sum(0)
        for n in listed:
            rows[layer, n] = weights[n]
            below = [100 * float((values[others] < values[n]).float().mean()) for values in (norms, peaked)]
            by_pair[layer, n] = (below[0], float(peaked[n]), below[1])
    ordered = torch.stack([rows[pair] for pair in neurons.pairs])
    statistics = np.array([by_pair[pair] for pair in neurons.pairs])
    scale = (ordered.norm(dim=1, keepdim=True) / math.sqrt(vit.cfg.d_model)).clamp_min(1e-30)
    return OutputWeights(
        **vit.identity,
        neurons=neurons,
        layers=tuple(neurons.by_layer()),
        rows=ordered.numpy(),
        others_histogram=torch.stack(histograms).numpy(),
        norm_percentile=statistics[:, 0],
        kurtosis=statistics[:, 1],
        kurtosis_percentile=statistics[:, 2],
        shared=(ordered / scale).abs().mean(0).numpy(),
        shared_null=(null.amax(1) / len(neurons)).numpy(),
    )


def _output_rows(vit: HookedViT, layer: int) -> Float[Tensor, "neuron d_model"]:
    weights = cast(Block, vit.blocks[layer]).mlp.W_out.detach().double().cpu()
    if not weights.isfinite().all():
        raise NonFiniteError(
            f"The output weights of block {layer}'s MLP are NaN or infinite."
            " Load the checkpoint anew; one in float16 may have overflowed."
        )
    return weights

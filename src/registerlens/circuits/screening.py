"""Screening: what ablating every neuron of every layer would do to a metric, from one forward and one backward pass.

First order is right where the metric follows the neuron in a straight line. It is checked, not believed: the neurons
with the largest effects and a random sample are ablated one by one, and the two rankings compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.neurons import Pair, RegisterNeurons
from registerlens.circuits.differentiable import Measure, metric_of
from registerlens.circuits.neuron_effects import (
    PausedRun,
    Replacement,
    check_gradient,
    check_slope,
    exact_effects,
    first_order,
    frozen_weights,
    integrated_gradients,
    not_differentiable,
    paused_runs,
)
from registerlens.config import ViTConfig
from registerlens.data.batches import Images
from registerlens.display import drawn_by, grid_table
from registerlens.engine.stream import batches
from registerlens.errors import ConfigError, NonFiniteError, ShapeError, check_at_least, check_choice
from registerlens.evaluation.metrics import Metric
from registerlens.interventions.ablation import Ablate, Reference
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult
from registerlens.stats.moments import Moments, RankCorrelation, rank_correlation

Mode = Literal["zero", "mean"]
Method = Literal["first_order", "integrated_gradients"]
METHODS: dict[Method, str] = {"first_order": "first order", "integrated_gradients": "integrated gradients"}

POOR = 0.7
"""A rank correlation below this is called poor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Screening(ModelResult):
    """The screened effect of ablating each neuron alone, and the exact one of some; in units of the metric.

    An effect is the metric with the neuron ablated less the metric of the clean run.
    """

    metric: str
    """What was measured."""
    words: str
    """The same in words, with its unit."""
    mode: Mode
    """What neurons are replaced by: zero, or their mean."""
    method: Method
    """How effects were screened."""
    steps: int
    """Gradients a layer and batch: 1 for first order."""
    layers: tuple[int, ...]
    """The blocks whose neurons were screened."""
    seed: int
    """Seed of the random sample."""
    n_images: int
    """Images with a value of the metric."""
    n_without: int
    """Images for which the metric is NaN; they are left out."""
    clean: float
    """The metric of the clean run, mean over images."""
    effects: Float[np.ndarray, "layer neuron"]
    """Screened effect, mean over images."""
    magnitude: Float[np.ndarray, "layer neuron"]
    """Absolute value of an image's screened effect, mean over images."""
    standard_error: Float[np.ndarray, "layer neuron"]
    """Standard error of the mean over images; NaN for one image."""
    checked: Int[np.ndarray, "checked 2"]
    """(layer, neuron) of those ablated one by one: the candidates, then the rest of the random sample."""
    is_candidate: Bool[np.ndarray, " checked"]
    """Which of them have the largest screened effects."""
    is_sample: Bool[np.ndarray, " checked"]
    """Which of them were drawn at random from all neurons."""
    exact: Float[np.ndarray, " checked"]
    """Exact effect, mean over images."""
    exact_standard_error: Float[np.ndarray, " checked"]
    """Its standard error."""

    @cached_property
    def screened(self) -> Float[np.ndarray, " checked"]:
        """The screened effects of the neurons that were checked."""
        rows = np.searchsorted(self.layers, self.checked[:, 0])
        return self.effects[rows, self.checked[:, 1]]

    @property
    def on_sample(self) -> RankCorrelation:
        """Screened against exact effects of the random sample: how far the screening can be trusted at large."""
        return rank_correlation(self.screened[self.is_sample], self.exact[self.is_sample])

    @property
    def on_candidates(self) -> RankCorrelation:
        """Screened against exact effects of the candidates: how far their order can be trusted."""
        return rank_correlation(self.screened[self.is_candidate], self.exact[self.is_candidate])

    @property
    def n_missed(self) -> int:
        """Neurons of the random sample, no candidates, whose exact effect is larger than half the candidates'."""
        others = np.abs(self.exact[~self.is_candidate])
        return int((others > np.median(np.abs(self.exact[self.is_candidate]))).sum()) if self.is_candidate.any() else 0

    def neurons(self, k: int) -> RegisterNeurons:
        """The `k` neurons with the largest absolute screened effects, which are their scores.

        Raises:
            ConfigError: `k` is not from 1 to the number of neurons.
        """
        if not 1 <= k <= self.effects.size:
            raise ConfigError(f"k must be 1 to {self.effects.size}, the number of neurons screened, got {k}.")
        size = np.abs(self.effects)
        pairs = _largest(size, self.layers, k)
        rows = {layer: row for row, layer in enumerate(self.layers)}
        return RegisterNeurons(
            pairs=pairs,
            scores=tuple(float(size[rows[layer], neuron]) for layer, neuron in pairs),
            source=f"screened: {self.metric}, {self.mode} ablation, {METHODS[self.method]}",
        )

    def describe(self) -> str:
        """The result in words."""
        listed = self.neurons(min(5, self.effects.size))
        rows = {layer: row for row, layer in enumerate(self.layers)}
        top = ", ".join(
            f"{layer}:{neuron} ({self.effects[rows[layer], neuron]:+.3g})" for layer, neuron in listed.pairs
        )
        left_out = f", {self.n_without} more without a value left out" if self.n_without else ""
        return (
            f"{self.mode.capitalize()} ablation of each of {self.effects.size} neurons of "
            f"{len(self.layers)} block{'s' * (len(self.layers) > 1)} on {self.words or self.metric} "
            f"({self.clean:.4g} in the clean run), by {METHODS[self.method]} on {self.n_images} images{left_out}. "
            f"Largest effects (block:neuron): {top}. {self.trust()}"
        )

    def trust(self) -> str:
        """How well the screened effects agree with exact ones, in words."""
        if not len(self.checked):
            return "Nothing was ablated to check this: raise exact= and sample=."
        groups = (
            ("random neurons", self.is_sample, self.on_sample),
            ("the candidates", self.is_candidate, self.on_candidates),
        )
        known = [(what, rho) for what, mask, rho in groups if mask.any()]
        correlations = "; ".join(f"{rho} on {what}" for what, rho in known)
        words = [f"Spearman's rank correlation with exact ablation: {correlations}."]
        if poor := [what for what, rho in known if rho.rho < POOR]:
            instead = {
                "first_order": "compare method='integrated_gradients', or ablate more neurons exactly (exact=)",
                "integrated_gradients": "ablate more neurons exactly (exact=)",
            }
            method = METHODS[self.method].capitalize()
            words.append(f"{method} is poor here, on {' and '.join(poor)}: {instead[self.method]}.")
        if self.n_missed:
            words.append(f"{self.n_missed} of the random neurons have a larger effect than half the candidates.")
        return " ".join(words)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, effect, magnitude, standard error, exact effect (NaN where not checked)."""
        axes = {"layer": self.layers, "neuron": range(self.effects.shape[1])}
        columns = {"effect": self.effects, "magnitude": self.magnitude, "standard_error": self.standard_error}
        checked = self.checked_dataframe()[["layer", "neuron", "exact"]]
        return grid_table(axes, **columns).merge(checked, on=["layer", "neuron"], how="left")

    def checked_dataframe(self) -> pd.DataFrame:
        """One row a neuron ablated exactly: layer, neuron, screened, exact, its standard error, candidate, sample."""
        return pd.DataFrame(
            {
                "layer": self.checked[:, 0],
                "neuron": self.checked[:, 1],
                "screened": self.screened,
                "exact": self.exact,
                "exact_standard_error": self.exact_standard_error,
                "candidate": self.is_candidate,
                "sample": self.is_sample,
            }
        )

    plot = drawn_by("patching.screening_figure")
    """Effects against their certainty, and screened against exact effects."""


def screen_neurons(
    vit: HookedViT,
    images: Images,
    metric: str | Metric | Measure = "largest_norm",
    *,
    layers: Iterable[int] | None = None,
    mode: Mode = "zero",
    method: Method = "first_order",
    steps: int = 8,
    labels: Int[Tensor, "image ..."] | None = None,
    exact: int = 16,
    sample: int = 64,
    batch_size: int = 16,
    stack: int = 64,
    seed: int = 0,
) -> Screening:
    """Estimate what ablating each neuron alone does to a metric, for every neuron at once; check some exactly.

    "first_order" costs one forward and one backward pass: effect_n = sum over tokens of (replacement - activation)
    times the metric's derivative by the activation. It sees no metric whose gradient vanishes at the clean run (KL
    divergence, cosine or distance to the clean run): such a metric is refused.

    "integrated_gradients" costs about layers x steps / 2 such passes, each from its layer on: the effect of ablating a
    layer as a whole is shared out among its neurons, along the straight path on which all of them go together. The
    shares add up to the whole, whatever the metric. This is another question than one neuron alone: neurons that stand
    in for each other (ablate one, and the others still do) have a small effect alone and a large share together.

    Args:
        vit: the model, edited or not. Its weights get no gradient.
        images: preprocessed, as a tensor or in batches that can be iterated several times.
        metric: "largest_norm" (where outliers are clearest; "largest_norm@5.mlp" says where), "cross_entropy",
            "class_logit", "cls", a `Metric`, or a differentiable function of (edited, clean), see `View`.
        layers: whose neurons; default: all.
        mode: neurons become "zero", or their "mean" over the images (and patches), as in `Ablate`.
        method: as above.
        steps: gradients along the path, for integrated gradients.
        labels: one an image, where the metric wants them.
        exact: so many neurons with the largest effects are ablated exactly; each costs about half a forward pass.
        sample: so many random neurons too.
        batch_size: images at once when a tensor is given.
        stack: sequences (images x neurons) at once in exact ablations.
        seed: of the random sample.

    Raises:
        ConfigError: an unknown name or option, or a metric without a gradient, or with none at the clean run.
        ImageError: there are no images, or they could be iterated only once.
        NonFiniteError: the metric is NaN for every image, or a gradient is not finite.
        ShapeError: a layer does not exist, the metric does not give one number an image, or labels do not fit.

    Source: Molchanov et al. 2017 (1611.06440); Sundararajan et al. 2017 (1703.01365).

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images
        >>> found = screen_neurons(vit, images, "largest_norm@1.mlp", exact=4, sample=4)
        >>> found.neurons(3).by_layer()
        {1: (183, 103, 219)}
    """
    chosen = _layers(vit.cfg, layers)
    _check_options(mode, method, steps, exact, sample, stack)
    measured = metric_of(metric, vit, images, batch_size)
    replacement = Replacement(_means(vit, chosen, images, batch_size) if mode == "mean" else None)
    estimate = _Share(replacement, chosen, steps) if method == "integrated_gradients" else _Slope(replacement, chosen)
    clean, effects = Moments(), Moments(len(chosen), vit.cfg.d_mlp)
    n = 0
    with frozen_weights(vit), torch.inference_mode(False):
        for batch in batches(vit, images, batch_size, "screening neurons", labels):
            n += len(batch)
            values, estimates = estimate(paused_runs(vit, batch.images, measured, estimate.stops, batch.labels))
            kept = values.isfinite()
            check_gradient(estimates[:, kept], measured.name)
            clean.add(values)
            effects.add(estimates[:, kept].transpose(0, 1))
    if not clean.n:
        raise NonFiniteError(
            f"Metric '{measured.name}' is NaN or infinite for each of the {n} images."
            " Check the images, and the metric (0 / 0, a logarithm of 0)."
        )
    checked, is_candidate, is_sample = _to_check(effects.mean, chosen, exact, sample, seed)
    true = exact_effects(vit, images, measured, checked, replacement, labels=labels, batch_size=batch_size, stack=stack)
    return Screening(
        **vit.identity,
        metric=measured.name,
        words=measured.words,
        mode=mode,
        method=method,
        steps=steps if method == "integrated_gradients" else 1,
        layers=chosen,
        seed=seed,
        n_images=int(clean.n),
        n_without=n - int(clean.n),
        clean=float(clean.mean),
        effects=effects.mean,
        magnitude=effects.magnitude,
        standard_error=effects.standard_error,
        checked=np.array(checked, dtype=np.int64).reshape(-1, 2),
        is_candidate=is_candidate,
        is_sample=is_sample,
        exact=true.mean,
        exact_standard_error=true.standard_error,
    )


class _Slope:
    """First order: one forward and one backward pass a batch."""

    def __init__(self, replacement: Replacement, layers: tuple[int, ...]) -> None:
        self.replacement, self.layers, self.stops = replacement, layers, layers[:1]
        self.checked = False

    def __call__(self, at: Iterable[PausedRun]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "layer batch neuron"]]:
        """The metric of the clean run, and the effects."""
        [paused] = at
        values, effects = first_order(paused, self.layers, self.replacement)
        if not self.checked:
            check_slope(paused.first(2), effects, self.replacement)
            self.checked = True
        zero = torch.zeros_like(effects[self.layers[0]])
        return values, torch.stack([effects.get(layer, zero) for layer in self.layers])


class _Share:
    """Integrated gradients: `steps` passes a layer, each from that layer on."""

    def __init__(self, replacement: Replacement, layers: tuple[int, ...], steps: int) -> None:
        self.replacement, self.stops, self.steps = replacement, layers, steps

    def __call__(self, at: Iterable[PausedRun]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "layer batch neuron"]]:
        """The metric of the clean run, and the effects."""
        runs = iter(at)
        first = next(runs)
        with torch.no_grad():
            clean = first.go_on()
            values = first.value(clean, clean)
        every = chain([first], runs)
        effects = [integrated_gradients(paused, clean, self.replacement, self.steps) for paused in every]
        known = next((effect for effect in effects if effect is not None), None)
        if known is None:
            raise not_differentiable(first.metric.name, f"the neurons from block {first.layer} on")
        return values, torch.stack([torch.zeros_like(known) if effect is None else effect for effect in effects])


def _layers(cfg: ViTConfig, layers: Iterable[int] | None) -> tuple[int, ...]:
    chosen = range(cfg.n_layers) if layers is None else list(layers)
    if not len(chosen):
        raise ConfigError("layers is empty: give some blocks, or None for all of them.")
    if wrong := [layer for layer in chosen if not -cfg.n_layers <= layer < cfg.n_layers]:
        raise ShapeError(f"Layers {wrong[:5]} do not exist: the model has blocks 0 to {cfg.n_layers - 1}.")
    return tuple(sorted({layer % cfg.n_layers for layer in chosen}))


def _check_options(mode: str, method: str, steps: int, exact: int, sample: int, stack: int) -> None:
    check_choice("mode", mode, get_args(Mode))
    check_choice("method", method, get_args(Method))
    check_at_least(1, steps=steps, stack=stack)
    check_at_least(0, exact=exact, sample=sample)


def _means(vit: HookedViT, layers: tuple[int, ...], images: Images, batch_size: int) -> Reference | None:
    every = RegisterNeurons.from_pairs((layer, neuron) for layer in layers for neuron in range(vit.cfg.d_mlp))
    return Ablate.fit(vit, images, every, "mean", batch_size=batch_size).reference


def _to_check(
    effects: Float[np.ndarray, "layer neuron"], layers: tuple[int, ...], exact: int, sample: int, seed: int
) -> tuple[list[Pair], Bool[np.ndarray, " checked"], Bool[np.ndarray, " checked"]]:
    """The candidates and a random sample of all neurons, which of them are which; a neuron may be both."""
    candidates = _largest(np.abs(effects), layers, min(exact, effects.size))
    sampled = torch.randperm(effects.size, generator=torch.Generator().manual_seed(seed))[:sample].numpy()
    random = _named(sampled, layers, effects.shape[1])
    checked = [*candidates, *(pair for pair in random if pair not in set(candidates))]
    first, second = (np.array([pair in set(some) for pair in checked], dtype=bool) for some in (candidates, random))
    return checked, first, second


def _largest(sizes: Float[np.ndarray, "layer neuron"], layers: tuple[int, ...], k: int) -> tuple[Pair, ...]:
    return _named(np.argsort(-sizes, axis=None, kind="stable")[:k], layers, sizes.shape[1])


def _named(flat: Int[np.ndarray, " neuron"], layers: tuple[int, ...], d_mlp: int) -> tuple[Pair, ...]:
    return tuple((layers[row], int(neuron)) for row, neuron in zip(*np.divmod(flat, d_mlp), strict=True))

"""Edges of a circuit: how much each neuron's write into the residual stream does to what a later head computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, detect, require_outliers
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import check_neurons, need_some
from registerlens.circuits.differentiable import Measure, metric_of
from registerlens.circuits.neuron_effects import frozen_weights, not_differentiable, paused_runs
from registerlens.config import TokenLayout, ViTConfig
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import batches
from registerlens.engine.views import mapped
from registerlens.errors import ConfigError, InterventionError, check_choice
from registerlens.evaluation.metrics import Metric
from registerlens.interventions.ablation import Heads
from registerlens.model.block import Block, require_linear_output
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import require_heads
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult
from registerlens.stats.moments import Moments

Norm = Literal["frozen", "differentiated"]
_ATTENTION = {
    "score": ("hook_attn_scores", "the attention score of the top outlier"),
    "attention": ("hook_pattern", "the attention to the top outlier"),
}
"""Quantity -> hook point inside attention, words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeAttribution(ModelResult):
    """First-order contribution of neurons to what later heads compute, along the direct path alone."""

    neurons: RegisterNeurons
    """The neurons that write."""
    layers: tuple[int, ...]
    """The blocks of the heads that read."""
    quantity: str
    """What of a head is attributed: "score", "attention", or the name of a metric."""
    words: str
    """The same in words."""
    norm: Norm
    """How the LayerNorm before the head was treated."""
    detection: Detection | None
    """Which patches are outliers; None for a metric."""
    n_images: int
    """Images that went through."""
    n_used: int
    """How many of these have an outlier or a value of the metric."""
    effects: Float[np.ndarray, "neuron layer head"]
    """Contribution to the head's quantity, mean over images; NaN where the head is not later, or was not asked for."""
    standard_error: Float[np.ndarray, "neuron layer head"]
    """Its standard error; NaN for one image."""
    values: Float[np.ndarray, "layer head"]
    """The quantity itself, mean over images; for a metric its derivative by the head's z, times z."""

    def describe(self) -> str:
        """The result in words."""
        table = self.to_dataframe()
        top = table.iloc[np.argsort(-np.abs(table["effect"].to_numpy()), kind="stable")[:5]]
        strongest = zip(*(top[name] for name in ("layer", "neuron", "head_layer", "head", "effect")), strict=True)
        named = ", ".join(
            f"{layer}:{neuron} -> {at}.{head} ({effect:+.3g})" for layer, neuron, at, head, effect in strongest
        )
        return (
            f"Direct contributions of {len(self.neurons)} neurons to {self.words} of later heads, LayerNorm "
            f"{self.norm}, {self.n_used} of {self.n_images} images. Largest (block:neuron -> block.head): {named}."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge: layer, neuron, head_layer, head, effect, standard error, the head's value."""
        i, j, head = np.isfinite(self.effects).nonzero()
        pairs = np.array(self.neurons.pairs, dtype=np.int64)
        return pd.DataFrame(
            {
                "layer": pairs[i, 0],
                "neuron": pairs[i, 1],
                "head_layer": np.array(self.layers, dtype=np.int64)[j],
                "head": head,
                "effect": self.effects[i, j, head],
                "standard_error": self.standard_error[i, j, head],
                "value": self.values[j, head],
            }
        )

    plot = drawn_by("patching.edges_figure")
    """A heat map, neurons by heads."""


def attribute_edges(
    vit: HookedViT,
    images: Images,
    neurons: RegisterNeurons,
    heads: Heads | None = None,
    quantity: str | Metric | Measure = "score",
    *,
    norm: Norm = "frozen",
    detection: Detection | None = None,
    labels: Int[Tensor, "image ..."] | None = None,
    batch_size: int = 16,
) -> EdgeAttribution:
    """What the write of each neuron contributes to a quantity of each later head, along the direct path.

    A neuron writes activation x its row of W_out (LayerScale included) at every token. The edge is the sum over tokens
    of that write times the derivative of the head's quantity by the stream that enters the head's block; other blocks
    in between, and other heads, take no part. Taking the write away changes the quantity by about minus the edge.

    Quantities: "score" is q . k / sqrt(d_head) between [CLS] (without [CLS]: the mean over queries) and the top outlier
    patch; "attention" the same after the softmax. With a metric (as in `screen_neurons`) it is what reaches the metric
    through the head's z: the metric's derivative by z, held fixed, times z.

    With the LayerNorm before the head "frozen", its scale is a constant: contributions of all writers then add up as
    the stream does, which is what one wants of register neurons. They make up most of the outlier's norm, so that the
    "differentiated" norm hides them: it cancels what lies along the token's own direction.

    Args:
        vit: the model, edited or not.
        images: preprocessed, as a tensor or in batches that can be iterated twice.
        neurons: those that write.
        heads: those that read; default: every head of every later block.
        quantity: as above.
        norm: as above.
        detection: which patches are outliers; default: found here. Not needed for a metric.
        labels: one an image, where a metric wants them.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: an unknown option, or a metric without a gradient.
        ImageError: there are no images, or none has an outlier.
        InterventionError: a neuron or head does not exist, or no head comes after a neuron.
        NoOutliersError: the model has no outliers, which "score" and "attention" are about.
        UnsupportedArchitectureError: a norm stands after the sublayers.

    Source: Syed et al. 2023 (2310.10348), edge attribution patching; Elhage et al. 2021 for frozen norms.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images
        >>> edges = attribute_edges(vit, images, rl.RegisterNeurons.from_pairs([(1, 183), (1, 0)]))
        >>> edges.effects.shape, bool((edges.effects[0] > abs(edges.effects[1])).all())
        ((2, 4, 1), True)
    """
    require_linear_output(vit.cfg, "The attribution of edges")
    check_choice("norm", norm, get_args(Norm))
    check_neurons(vit, neurons)
    wanted = _heads(vit.cfg, neurons, heads)
    reader: _Reader
    if isinstance(quantity, str) and quantity in _ATTENTION:
        detection = detection or detect(vit, images, batch_size=batch_size)
        require_outliers(detection, "Attributing attention to outliers")
        reader = _ToOutlier(vit, quantity, detection)
    else:
        detection = None
        reader = _ToMetric(vit, metric_of(quantity, vit, images, batch_size), wanted)
    shape = (len(wanted), vit.cfg.n_heads)
    effects, values, n = Moments(len(neurons), *shape), Moments(*shape), 0
    with frozen_weights(vit), torch.inference_mode(False):
        for batch in batches(vit, images, batch_size, "attributing edges", labels):
            n += len(batch)
            edges, value = _Edges(vit, neurons, wanted, norm).of(reader, batch.images, batch.labels)
            effects.add(edges)
            values.add(value)
    n_used = int(values.n.max())
    need_some(n, n_used)
    return EdgeAttribution(
        **vit.identity,
        neurons=neurons,
        layers=tuple(wanted),
        quantity=quantity if isinstance(quantity, str) else reader.name,
        words=reader.words,
        norm=norm,
        detection=detection,
        n_images=n,
        n_used=n_used,
        effects=effects.mean,
        standard_error=effects.standard_error,
        values=values.mean,
    )


# What a head computes ------------------------------------------------------------------------------------------------


class _Reader(ABC):
    """A quantity of each head: the hook point inside attention where it is read, and how."""

    name: str
    words: str
    point: str

    @abstractmethod
    def prepare(self, batch: Tensor, labels: Tensor | None) -> list[Any]:
        """Make ready for a batch; returns hooks for its clean run."""

    @abstractmethod
    def read(self, layer: int, x: Tensor, layout: TokenLayout) -> Float[Tensor, "batch head"]:
        """From the tensor at the hook point to the quantity; NaN where an image has none."""


class _ToOutlier(_Reader):
    """Attention from [CLS], or from the mean query, to the top outlier."""

    def __init__(self, vit: HookedViT, quantity: str, detection: Detection) -> None:
        self.vit, self.detection, self.name = vit, detection, quantity
        self.point, self.words = _ATTENTION[quantity]
        self.norms = torch.empty(0)

    def prepare(self, batch: Tensor, labels: Tensor | None) -> list[Any]:
        """A hook that takes the norms."""
        patches = self.vit.layout(batch).patches

        def keep(resid: Tensor, hook: Any) -> None:
            self.norms = token_norms(resid[:, patches])

        return [(self.detection.hook_name, keep)]

    def read(self, layer: int, x: Tensor, layout: TokenLayout) -> Float[Tensor, "batch head"]:
        """The column of the top outlier."""
        rows = x.mean(2) if layout.cls is None else x[:, :, layout.cls]
        key = self.norms.argmax(1) + layout.patches.start
        chosen = rows[torch.arange(len(rows), device=rows.device), :, key]
        present = self.detection.cutoff.above(self.norms).any(1)
        return torch.where(present[:, None], chosen, torch.nan)


class _ToMetric(_Reader):
    """The way to a metric through a head's z, linear: the metric's derivative by z is held fixed."""

    point = "hook_z"

    def __init__(self, vit: HookedViT, metric: Metric, layers: dict[int, tuple[int, ...]]) -> None:
        self.vit, self.metric, self.layers = vit, metric, layers
        self.name, self.words = metric.name, f"{metric.words or metric.name} by way of z"
        self.slopes: dict[int, Tensor] = {}
        self.present = torch.empty(0)

    def prepare(self, batch: Tensor, labels: Tensor | None) -> list[Any]:
        """Run the batch once, forward and backward, for the derivatives."""
        self.slopes = {}
        [before] = paused_runs(self.vit, batch, self.metric, [min(self.layers)], labels)
        leaf = before.resid.detach().requires_grad_()

        def watch(z: Tensor, hook: Any) -> None:
            layer = hook.layer()
            z.register_hook(lambda slope: self.slopes.__setitem__(layer, slope))

        with torch.enable_grad():
            points = [f"blocks.{layer}.attn.hook_z" for layer in self.layers]
            edited = replace(before, resid=leaf).go_on([(points, watch)])
            values = before.value(edited, mapped(edited, Tensor.detach))
            self.present = values.isfinite()
            if values.requires_grad:
                torch.autograd.grad(values[self.present].sum(), [leaf], allow_unused=True)
        if not self.slopes:
            raise not_differentiable(self.metric.name, f"what enters block {before.layer}")
        return []

    def read(self, layer: int, x: Tensor, layout: TokenLayout) -> Float[Tensor, "batch head"]:
        """Derivative times z; zero where the metric does not depend on the layer."""
        slope = self.slopes.get(layer, torch.zeros_like(x))
        return torch.where(self.present[:, None], (slope * x).sum((1, 3)), torch.nan)


# One batch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edges:
    vit: HookedViT
    neurons: RegisterNeurons
    heads: dict[int, tuple[int, ...]]
    norm: Norm

    @cached_property
    def by_layer(self) -> dict[int, list[int]]:
        """Which rows of the neurons stand in each layer."""
        rows: dict[int, list[int]] = {}
        for i, (layer, _) in enumerate(self.neurons.pairs):
            rows.setdefault(layer, []).append(i)
        return rows

    def of(
        self, reader: _Reader, batch: Tensor, labels: Tensor | None
    ) -> tuple[Float[Tensor, "batch neuron layer head"], Float[Tensor, "batch layer head"]]:
        """Contributions and quantities; NaN where there is no such edge."""
        layout, n_heads = self.vit.layout(batch), self.vit.cfg.n_heads
        posts: dict[int, Tensor] = {}
        before: dict[int, Tensor] = {}

        def keep_posts(post: Tensor, hook: Any) -> None:
            index = [self.neurons.pairs[i][1] for i in self.by_layer[hook.layer()]]
            posts[hook.layer()] = post[:, :, index]

        def keep_before(resid: Tensor, hook: Any) -> None:
            before[hook.layer()] = resid.clone()

        hooks = [
            *reader.prepare(batch, labels),
            ([f"blocks.{layer}.mlp.hook_post" for layer in self.by_layer], keep_posts),
            ([f"blocks.{layer}.hook_resid_pre" for layer in self.heads], keep_before),
        ]
        with torch.no_grad(), self.vit.hooks(hooks):
            self.vit(batch.to(self.vit.device), stop_at_layer=self.vit.cfg.n_layers)
        effects = torch.full((len(batch), len(self.neurons), len(self.heads), n_heads), torch.nan)
        values = torch.full((len(batch), len(self.heads), n_heads), torch.nan)
        for j, (layer, heads) in enumerate(self.heads.items()):
            for head, value, slope in self._slopes(reader, layer, heads, before.pop(layer), layout):
                values[:, j, head] = value
                for writer, rows in self.by_layer.items():
                    if writer < layer:
                        index = [self.neurons.pairs[i][1] for i in rows]
                        W_out = cast(Block, self.vit.blocks[writer]).mlp.W_out[index].float()
                        read = einsum(slope, W_out, "batch pos d_model, neuron d_model -> batch pos neuron")
                        edges = (posts[writer].float() * read).sum(1).cpu()
                        effects[:, rows, j, head] = torch.where(value.isnan()[:, None], torch.nan, edges)
        return effects, values

    def _slopes(
        self, reader: _Reader, layer: int, heads: tuple[int, ...], resid: Tensor, layout: TokenLayout
    ) -> Iterator[tuple[int, Float[Tensor, " batch"], Float[Tensor, "batch pos d_model"]]]:
        """Each head's quantity, and its derivative by what enters the block."""
        leaf, met = resid.detach().requires_grad_(), []
        hooks: list[Any] = [(f"blocks.{layer}.attn.{reader.point}", lambda x, hook: met.append(x))]
        if self.norm == "frozen":
            hooks.append((f"blocks.{layer}.ln1.hook_scale", lambda scale, hook: scale.detach()))
        with torch.enable_grad(), self.vit.hooks(hooks):
            self.vit(leaf, start_at_layer=layer, stop_at_layer=layer + 1, layout=layout)
            quantity = reader.read(layer, met[0], layout)
        for head in heads:
            total = quantity[:, head].nansum()
            [slope] = torch.autograd.grad(total, [leaf], retain_graph=True)
            yield head, quantity[:, head].detach().float().cpu(), slope.float()


def _heads(cfg: ViTConfig, neurons: RegisterNeurons, heads: Heads | None) -> dict[int, tuple[int, ...]]:
    """The heads of each layer that comes after a neuron's."""
    if heads is not None and not isinstance(heads, Heads):
        raise ConfigError(f"heads must be rl.Heads or None, got {type(heads).__name__}.")
    first = min(layer for layer, _ in neurons.pairs)
    every = ((layer, head) for layer in range(first + 1, cfg.n_layers) for head in range(cfg.n_heads))
    pairs = sorted(set(every if heads is None else heads.pairs))
    require_heads(pairs, cfg.n_layers, cfg.n_heads)
    later = [(layer, head) for layer, head in pairs if layer > first]
    if not later:
        raise InterventionError(
            f"No head comes after block {first}, where the first of the neurons is, so no edge."
            " Give neurons of earlier blocks."
        )
    return {layer: tuple(head for at, head in later if at == layer) for layer in sorted({at for at, _ in later})}

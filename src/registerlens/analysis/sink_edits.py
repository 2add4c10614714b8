"""Edits of a sink at fixed attention, and what they need: a batch's sinks, and what values usually are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.sink_events import StrongestKey, output_factors, strongest_key
from registerlens.config import TokenLayout, ViTConfig
from registerlens.engine.stream import Batch
from registerlens.model.parts import token_norms
from registerlens.model.vit import Hook, HookedViT

SinkEdit = Literal["remove", "zero", "mean", "other_image", "ordinary"]
EDITS: tuple[SinkEdit, ...] = get_args(SinkEdit)
"""What is done to the sink, attention otherwise fixed. "remove": its column of A is taken out and the rest
renormalised. The others replace its value v_s: by zero; by the "mean" value of the other tokens, over the reference
images; by the sink's value in the same head of another ("other_image") of them; by that of an "ordinary" token of the
same image, the patch whose value has the median norm."""
REFERENCE = 32
"""Images held out for the reference where none are given, at most half of them."""


# One batch as it is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbedLayer:
    """What one layer of a batch does, as far as it is needed to edit its sinks."""

    index: int
    resid: Float[Tensor, "batch pos d_model"]
    """What enters the layer."""
    key: StrongestKey
    v: Float[Tensor, "batch key head d_head"]
    event: Bool[Tensor, "batch head"]
    """Where there is a sink."""


class Probe:
    """Hooks that hand over each layer with a sink event; other layers are forgotten at once."""

    def __init__(self, vit: HookedViT, heads: set[tuple[int, int]], threshold: float, queries: float) -> None:
        self.threshold, self.queries = threshold, queries
        self.wanted = torch.zeros(vit.cfg.n_layers, vit.cfg.n_heads, dtype=torch.bool)
        for layer, head in heads:
            self.wanted[layer, head] = True
        self.factors = output_factors(vit)

    def hooks(self, layers: list[ProbedLayer]) -> list[Any]:
        """Hooks for one batch, which append to `layers`."""
        passing: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any) -> None:
            passing[str(hook.name).rpartition("_")[2]] = x

        def look(pattern: Tensor, hook: Any) -> None:
            layer, key = hook.layer(), strongest_key(pattern, self.queries)
            event = (key.strength >= self.threshold) & self.wanted[layer].to(pattern.device)
            if event.any():
                layers.append(ProbedLayer(layer, passing["pre"], key, passing["v"], event))

        points = [f"blocks.{layer}" for layer in self.wanted.any(1).nonzero()[:, 0].tolist()]
        return [
            ([f"{point}.{name}" for point in points for name in ("hook_resid_pre", "attn.hook_v")], keep),
            ([f"{point}.attn.hook_pattern" for point in points], look),
        ]


class Bank:
    """What values usually are: the mean over reference images of the other tokens', and the sinks' one by one."""

    def __init__(self, cfg: ViTConfig, probe: Probe) -> None:
        self.probe = probe
        self.n_images = 0
        self.layers: list[ProbedLayer] = []
        cells = (cfg.n_layers, cfg.n_heads)
        self.total = torch.zeros(*cells, cfg.d_head, dtype=torch.float64)
        self.number = torch.zeros(cells, dtype=torch.float64)
        self.sinks: dict[tuple[int, int], list[Tensor]] = {}

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """The hooks of the probe."""
        self.layers = []
        return self.probe.hooks(self.layers)

    def update(self, batch: Batch) -> None:
        """Take in one batch of reference images."""
        self.n_images += len(batch)
        for layer in self.layers:
            image, head = layer.event.nonzero(as_tuple=True)
            own = layer.v[image, layer.key.position[image, head], head]
            others = layer.v[image, :, head].double().sum(1) - own.double()
            self.total[layer.index].index_add_(0, head.cpu(), others.cpu())
            self.number[layer.index] += layer.event.sum(0).cpu() * (layer.v.shape[1] - 1)
            for at, value in zip(head.tolist(), own, strict=True):
                held = self.sinks.setdefault((layer.index, at), [])
                if len(held) < REFERENCE:
                    held.append(value.clone())

    def result(self) -> Bank:
        """The bank, filled."""
        return self

    def mean(self, layer: int, head: int) -> Float[Tensor, "1 d_head"]:
        """NaN where no reference image has a sink in this head."""
        return (self.total[layer, head] / self.number[layer, head])[None]

    def others(self, layer: int, head: int, images: Int[Tensor, " event"]) -> Float[Tensor, "event d_head"]:
        """Each image takes its turn through the bank; NaN where no reference image has a sink in this head."""
        held = self.sinks.get((layer, head))
        if not held:
            return self.total.new_full((1, self.total.shape[-1]), float("nan")).expand(len(images), -1)
        return torch.stack([held[int(image) % len(held)] for image in images])


# The edits -----------------------------------------------------------------------------------------------------------


def edit_sink(
    z: Float[Tensor, "event query d_head"],
    column: Float[Tensor, "event query"],
    v_sink: Float[Tensor, "event d_head"],
    value: Float[Tensor, "#event d_head"] | None,
) -> Float[Tensor, "event query d_head"]:
    """A head's z with the sink's value replaced, or, with None, its column removed from A and A renormalised.

    Given A, z is linear in the values: nothing but the sink's column is needed. A query that attends to the sink alone
    has nothing left when it is removed, and gets zero.

    Example:
        >>> z, column, v_sink = torch.tensor([[[3.0]]]), torch.tensor([[0.5]]), torch.tensor([[2.0]])  # 0.5 * 2 + 2
        >>> edit_sink(z, column, v_sink, None).item(), edit_sink(z, column, v_sink, torch.zeros(1, 1)).item()
        (4.0, 2.0)
    """
    weight = column[..., None].to(z.dtype)
    if value is not None:
        return z + weight * (value.to(z) - v_sink)[:, None]
    left = 1 - weight
    rest = z - weight * v_sink[:, None]
    return torch.where(left > 0, rest / left.clamp_min(torch.finfo(z.dtype).tiny), torch.zeros_like(z))


def ordinary_value(
    v: Float[Tensor, "event key d_head"], position: Int[Tensor, " event"], layout: TokenLayout
) -> Float[Tensor, "event d_head"]:
    """The value of the patch, other than the sink, whose value has the median norm.

    Example:
        >>> v = torch.tensor([[[9.0], [1.0], [2.0], [3.0]]])
        >>> ordinary_value(v, torch.tensor([0]), TokenLayout(grid=(2, 2), n_prefix=0, class_token=False))
        tensor([[2.]])
    """
    norms = token_norms(v)
    norms = norms.scatter(1, position[:, None], float("nan"))[:, layout.patches]
    chosen = norms.nanmedian(1).indices + layout.patches.start
    return v[torch.arange(len(v), device=v.device), chosen]

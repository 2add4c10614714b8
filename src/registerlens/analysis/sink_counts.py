"""Counting sinks batch by batch: hooks that reduce each layer to its events, and sums that do not grow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.outliers import RatioHistogram
from registerlens.analysis.sink_events import (
    StrongestKey,
    norm_over_others,
    stable_rank,
    strongest_key,
    strongest_key_of,
)
from registerlens.config import TokenLayout, ViTConfig
from registerlens.engine.attention_received import pattern_hooks
from registerlens.errors import ImageError, NonFiniteError
from registerlens.model.parts import token_norms
from registerlens.model.vit import HookedViT
from registerlens.stats.histograms import N_BINS, bin_edges, count_bins, medians

NOP_RATIO = 0.2
"""A sink whose output is at most this share of the others' mean is a NOP."""
BROADCAST_RATIO, BROADCAST_RANK = 0.5, 1.5
"""A sink with at least this ratio, in a head whose output has at most this stable rank, is a broadcast."""
GU_SINK = 0.3
"""A head has a sink in the sense of Gu et al. where a key draws more than this of the average query."""

MECHANISMS = ("nop", "broadcast", "other")
"""What a sink does. Order of the first axis of `SinkKinds.mechanisms`."""
PLACES = (
    "cls",
    "distillation",
    "trained_register",
    "outlier_patch",
    "other_patch",
    "test_time_register",
    "attention_bias",
)
"""What stands at the sink. Order of the first axis of `SinkKinds.places`."""
_PATCH = PLACES.index("other_patch")
PER_EVENT = ("output_ratio", "value_ratio", "stable_rank")
"""Numbers that only an event has."""


@dataclass(frozen=True)
class Events:
    """The sinks of one layer and batch; one entry an event."""

    layer: int
    head: Int[Tensor, " event"]
    strength: Float[Tensor, " event"]
    output_ratio: Float[Tensor, " event"]
    value_ratio: Float[Tensor, " event"]
    stable_rank: Float[Tensor, " event"]
    place: Int[Tensor, " event"]
    """Index into PLACES; every patch counts as "other_patch" here."""
    norm: Float[Tensor, " event"]
    """What a patch brings into the layer, over the image's median."""


class SinkWatch:
    """One batch, layer by layer: hooks on q, k, v and z, and nothing kept of a layer but its events."""

    def __init__(self, layout: TokenLayout, factors: list[Tensor], swept: tuple[float, ...], queries: float) -> None:
        self.layout, self.factors, self.swept, self.queries = layout, factors, swept, queries
        self.norms: list[Tensor] = []
        self.received: list[Tensor] = []
        self.drawn: list[Tensor] = []
        self.events: list[Events] = []
        self.n_keys = layout.n_tokens
        self._values: Tensor | None = None
        self._key: StrongestKey | None = None

    def hooks(self, vit: HookedViT) -> list[Any]:
        """To be put in force around one forward pass."""
        return [
            ("blocks.*.hook_resid_pre", self._norm),
            ("blocks.*.attn.hook_v", self._value),
            *pattern_hooks(vit, range(vit.cfg.n_layers), self._pair, self._pattern),
            ("blocks.*.attn.hook_z", self._output),
        ]

    def _norm(self, resid: Tensor, hook: Any) -> None:
        self.norms.append(token_norms(resid[:, self.layout.patches]))

    def _value(self, v: Tensor, hook: Any) -> None:
        self._values = v

    def _pair(self, layer: int, q: Tensor, k: Tensor) -> None:
        self._take(layer, strongest_key_of(q, k, self.queries), k.shape[1])

    def _pattern(self, layer: int, pattern: Tensor) -> None:
        self._take(layer, strongest_key(pattern, self.queries), pattern.shape[-1])

    def _take(self, layer: int, key: StrongestKey, n_keys: int) -> None:
        self._key, self.n_keys = key, n_keys
        self.received.append(key.received)
        self.drawn.append(torch.stack([(key.column >= threshold).float().mean(-1) for threshold in self.swept]))
        if not key.received.isfinite().all():
            raise NonFiniteError(
                f"The attention of block {layer} is NaN. Check the images; if the model is in float16, use "
                f"bfloat16 or float32."
            )

    def _output(self, z: Float[Tensor, "batch query head d_head"], hook: Any) -> None:
        v, key = cast(Tensor, self._values), cast(StrongestKey, self._key)
        self._values = self._key = None
        image, head = (key.strength >= self.swept[-1]).nonzero(as_tuple=True)
        factor = self.factors[hook.layer()][head].mT  # event d_head rank
        position = key.position[image, head]
        values, mixed = v[image, :, head].to(factor.dtype), z[image, :, head].to(factor.dtype)
        relative = self.norms[-1] / medians(self.norms[-1])
        place = self._places(position)
        patch = (position - self.layout.patches.start).clamp(0, self.layout.n_patches - 1)
        self.events.append(
            Events(
                layer=hook.layer(),
                head=head,
                strength=key.strength[image, head],
                output_ratio=norm_over_others(token_norms(values @ factor), position),
                value_ratio=norm_over_others(token_norms(values), position),
                stable_rank=stable_rank(mixed @ factor),
                place=place,
                norm=relative[image, patch],
            )
        )

    def _places(self, position: Int[Tensor, " event"]) -> Int[Tensor, " event"]:
        layout = self.layout
        place = torch.full_like(position, PLACES.index("attention_bias"))
        for name, where in (
            ("test_time_register", layout.test_time_registers),
            ("other_patch", layout.patches),
            ("trained_register", layout.trained_registers),
        ):
            place[(position >= where.start) & (position < where.stop)] = PLACES.index(name)
        for name, at in (("cls", layout.cls), ("distillation", layout.distillation)):
            if at is not None:
                place[position == at] = PLACES.index(name)
        return place


class SinkCounts:
    """Running counts and sums, as large after a million images as after one."""

    def __init__(self, cfg: ViTConfig, thresholds: tuple[float, ...]) -> None:
        self.thresholds = thresholds
        cells = (len(thresholds), cfg.n_layers, cfg.n_heads)
        self.n_images = 0
        self.mechanisms = torch.zeros(len(MECHANISMS), *cells, dtype=torch.int64)
        self.places = torch.zeros(len(PLACES), *cells, dtype=torch.int64)
        self.patch_norms = torch.zeros(*cells, N_BINS, dtype=torch.int64)
        self.totals = {name: torch.zeros(2, *cells, dtype=torch.float64) for name in PER_EVENT}  # sum, and of how many
        self.drawn = torch.zeros(cells, dtype=torch.float64)
        self.received, self.excess, self.gu = (torch.zeros(cells[1:], dtype=torch.float64) for _ in range(3))
        self.norms = [RatioHistogram() for _ in range(cfg.n_layers)]

    def add(self, watch: SinkWatch) -> None:
        """Take in one batch."""
        received = torch.stack(watch.received).double().cpu()  # layer batch head
        self.n_images += received.shape[1]
        self.received += received.sum(1)
        self.drawn += torch.stack(watch.drawn, 1).sum(2).double().cpu()  # threshold layer head
        self.excess += (received - 1 / watch.n_keys).sum(1)
        self.gu += (received > GU_SINK).sum(1)
        for histogram, norms in zip(self.norms, watch.norms, strict=True):
            histogram.add(norms)
        for events in watch.events:
            for at, threshold in enumerate(self.thresholds):
                self._count(at, events, (events.strength >= threshold).nonzero()[:, 0])

    def _count(self, at: int, events: Events, chosen: Int[Tensor, " event"]) -> None:
        layer, head = events.layer, events.head[chosen].cpu()
        ratio, rank = events.output_ratio[chosen], events.stable_rank[chosen]
        kind = torch.full_like(head, MECHANISMS.index("other"))
        kind[((ratio >= BROADCAST_RATIO) & (rank <= BROADCAST_RANK)).cpu()] = MECHANISMS.index("broadcast")
        kind[(ratio <= NOP_RATIO).cpu()] = MECHANISMS.index("nop")
        place, norms = events.place[chosen].cpu(), count_bins(events.norm[chosen][:, None])
        one = torch.ones_like(head)
        self.mechanisms[:, at, layer].index_put_((kind, head), one, accumulate=True)
        self.places[:, at, layer].index_put_((place, head), one, accumulate=True)
        at_patch = place == _PATCH
        self.patch_norms[at, layer].index_add_(0, head[at_patch], norms[at_patch])
        for name, total in self.totals.items():
            value = getattr(events, name)[chosen].double().cpu()
            there = value.isfinite()
            total[0, at, layer].index_add_(0, head[there], value[there])
            total[1, at, layer].index_add_(0, head[there], torch.ones_like(value[there]))

    def result(self) -> dict[str, Any]:
        """Counts, means, and the norm above which a patch counts as an outlier: fields of `SinkKinds`.

        Raises:
            ImageError: no image came.
        """
        n = self.n_images
        if not n:
            raise ImageError(
                "No image to find sinks in: the tensor or the iterable of batches is empty. Give at least one."
            )
        evidence = max((histogram.judge() for histogram in self.norms), key=lambda found: (found.present, found.gap))
        places = self.places.numpy().copy()
        if evidence.present:
            outliers = self.patch_norms.numpy()[..., bin_edges()[:-1] >= evidence.threshold].sum(-1)
            places[_PATCH] -= outliers
            places[PLACES.index("outlier_patch")] = outliers
        return {
            "n_images": n,
            "outlier_norm": evidence.threshold if evidence.present else math.nan,
            "mechanisms": self.mechanisms.numpy(),
            "places": places,
            "drawn": (self.drawn / n).numpy(),
            "received": (self.received / n).numpy(),
            "excess": (self.excess / n).numpy(),
            "gu_rate": (self.gu / n).numpy(),
            **{name: (total / number).numpy() for name, (total, number) in self.totals.items()},
        }

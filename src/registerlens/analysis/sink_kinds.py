"""What kind of sink it is: one that switches its head off (NOP), or one that sends every token the same (broadcast)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from registerlens.analysis.sink_events import (
    GU_SINK,
    MECHANISMS,
    PER_EVENT,
    PLACES,
    QUERIES,
    SinkSums,
)
from registerlens.data.batches import Images
from registerlens.display import grid_table
from registerlens.engine.stream import stream
from registerlens.errors import ConfigError
from registerlens.model.block import require_linear_output, require_softmax
from registerlens.model.vit import HookedViT
from registerlens.results import FINITE, ModelResult

if TYPE_CHECKING:
    import plotly.graph_objects as go

THRESHOLDS = (0.5, 0.3, 0.2, 0.1)
"""Attention from which a query counts as drawn to the sink. Fesser et al. take 0.5; counts depend on it, so sweep."""


# The result ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class SinkKinds(ModelResult):
    """How often each head has a sink, what the sink does, and which token it is.

    An event is one image and head. Its numbers are means over the events that have them; NaN where none has (no event,
    or a head that writes nothing).
    """

    n_images: int
    """Images that went through."""
    thresholds: tuple[float, ...]
    """Attention that the queries must pay to the sink, largest first."""
    queries: float
    """Share of the queries that must pay it, 0 to 1."""
    outlier_norm: float
    """Norm entering a layer, over the image's median, above which a patch counts as an outlier; NaN when absent."""
    mechanisms: Int[np.ndarray, "mechanism threshold layer head"]
    """Images in which the head has a sink of this kind; mechanisms as in MECHANISMS."""
    places: Int[np.ndarray, "place threshold layer head"]
    """The same events by what stands at the sink; places as in PLACES."""
    output_ratio: Float[np.ndarray, "threshold layer head"]
    """||u_s|| over the mean ||u_j|| of the other keys, u = v W_O with LayerScale."""
    value_ratio: Float[np.ndarray, "threshold layer head"]
    """The same of the values v themselves."""
    stable_rank: Float[np.ndarray, "threshold layer head"]
    """||U||_F^2 / sigma_1^2 of the head's output U = A u over all queries; 1: every token receives one direction."""
    drawn: Float[np.ndarray, "threshold layer head"] = field(metadata=FINITE)
    """Share of the queries (0 to 1) that pay the most attended key at least the threshold, mean over images."""
    received: Float[np.ndarray, "layer head"] = field(metadata=FINITE)
    """Attention the average query pays to the most attended key (0 to 1), mean over images."""
    excess: Float[np.ndarray, "layer head"] = field(metadata=FINITE)
    """The same less 1 / (number of keys), what uniform attention would pay."""
    gu_rate: Float[np.ndarray, "layer head"] = field(metadata=FINITE)
    """Share of images in which that exceeds GU_SINK."""

    @property
    def events(self) -> Int[np.ndarray, "threshold layer head"]:
        """Images in which the head has a sink."""
        return self.mechanisms.sum(0)

    @property
    def sink_rate(self) -> float:
        """Share of images, layers and heads with a sink in the sense of Gu et al. 2025."""
        return float(self.gu_rate.mean())

    def index(self, threshold: float) -> int:
        """Which of the thresholds this is.

        Raises:
            ConfigError: the sweep has no such threshold.
        """
        if threshold not in self.thresholds:
            raise ConfigError(f"No threshold {threshold} was swept; there are {list(self.thresholds)}.")
        return self.thresholds.index(threshold)

    def counts(self, threshold: float) -> dict[str, int]:
        """Events of each mechanism over all images, layers and heads.

        Raises:
            ConfigError: the sweep has no such threshold.
        """
        totals = self.mechanisms[:, self.index(threshold)].sum((1, 2))
        return dict(zip(MECHANISMS, map(int, totals), strict=True))

    def mean(self, name: Literal["output_ratio", "value_ratio", "stable_rank"], threshold: float) -> float:
        """Mean of a per-event number over all events at a threshold; NaN without any.

        Raises:
            ConfigError: the sweep has no such threshold.
        """
        at = self.index(threshold)
        there = np.isfinite(getattr(self, name)[at])
        values, weights = getattr(self, name)[at][there], self.events[at][there]
        return float((values * weights).sum() / weights.sum()) if there.any() else float("nan")

    def describe(self) -> str:
        """The result in words, one sentence a threshold."""
        heads = self.n_images * self.gu_rate.size
        lines = [
            f"Sinks of {self.model}, {self.n_images} images. In {self.sink_rate:.1%} of images and heads the average "
            f"query pays one token more than {GU_SINK:g}. Counted below: tokens that {self.queries:.0%} of queries pay "
            f"at least the threshold."
        ]
        for threshold in self.thresholds:
            counts = self.counts(threshold)
            total = sum(counts.values())
            if not total:
                most = self.drawn[self.index(threshold)].max()
                lines.append(f"At {threshold:g}: no sink; the strongest head draws {most:.0%} of its queries.")
                continue
            places = self.places[:, self.index(threshold)].sum((1, 2))
            kinds = ", ".join(f"{name} {n / total:.0%}" for name, n in counts.items())
            stand = ", ".join(
                f"{name.replace('_', ' ')} {n / total:.0%}" for name, n in zip(PLACES, places, strict=True) if n
            )
            lines.append(
                f"At {threshold:g}: {total} sinks, {total / heads:.1%} of images and heads ({kinds}); they write "
                f"{self.mean('output_ratio', threshold):.2f} x what the others do (values "
                f"{self.mean('value_ratio', threshold):.2f} x), stable rank {self.mean('stable_rank', threshold):.2f}; "
                f"at: {stand}."
            )
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a threshold, layer and head."""
        n_layers, n_heads = self.received.shape
        axes = {"threshold": self.thresholds, "layer": range(n_layers), "head": range(n_heads)}
        columns = {"events": self.events, **dict(zip(MECHANISMS, self.mechanisms, strict=True))}
        columns |= {name: getattr(self, name) for name in (*PER_EVENT, "drawn")}
        columns |= {f"at_{name}": events for name, events in zip(PLACES, self.places, strict=True)}
        return grid_table(axes, **columns, received=self.received, excess=self.excess, gu_rate=self.gu_rate)

    def plot(self, threshold: float | None = None) -> go.Figure:
        """Maps layer x head of NOPs, broadcasts and other sinks; default: the threshold of Fesser et al., 0.5, or the
        largest.

        Raises:
            ConfigError: the sweep has no such threshold.
        """
        from registerlens.viz.sinks import sink_map

        return sink_map(self, self.thresholds[0] if threshold is None else threshold)


# Measuring -----------------------------------------------------------------------------------------------------------


def classify_sinks(
    vit: HookedViT,
    images: Images,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    queries: float = QUERIES,
    batch_size: int = 16,
) -> SinkKinds:
    """Find the sinks of every image, layer and head, and tell NOPs from broadcasts, in one pass of flat memory.

    In each image and head, s is the key that draws the most attention on average. It is a sink event at a threshold if
    90% of all queries pay it at least that much. With u_j = v_j W_O (LayerScale included), its ratio is ||u_s|| over
    the mean ||u_j|| of the other keys, and U = A u is what the head writes. A NOP has a ratio of at most NOP_RATIO
    (0.2): its head is switched off. A broadcast has at least BROADCAST_RATIO (0.5) and a U of stable rank at most
    BROADCAST_RANK (1.5): it sends every token the same. Everything else is "other".

    No pattern is ever held, only the scores of a few queries; singular values come from d_head-sized Gram matrices, for
    events only.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], split into batches here, or an iterable of batches.
        thresholds: to sweep, each above 0 and at most 1.
        queries: share of all queries, the sink's own among them, that must be drawn. Where several tokens share the
            sink, or some tokens look elsewhere, the strict 90% finds nothing; `SinkKinds.drawn` shows how many do.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: a threshold or `queries` is out of range.
        ImageError: there are no images.
        NonFiniteError: an attention is NaN.
        UnsupportedArchitectureError: attention is no softmax, or a norm stands after the sublayers.

    Source: Fesser et al. 2026 (2606.08105); sink rate: Gu et al. 2025.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = classify_sinks(vit, synthetic_images(32, 0).images)
        >>> found.events.shape
        (4, 6, 1)
    """
    require_softmax(vit.cfg, "The classification of sinks")
    require_linear_output(vit.cfg, "The classification of sinks")
    swept = tuple(sorted({float(threshold) for threshold in thresholds}, reverse=True))
    if not swept or not 0 < swept[-1] <= swept[0] <= 1:
        raise ConfigError(f"Thresholds are shares of a query's attention, above 0 and at most 1; got {thresholds}.")
    if not 0 < queries <= 1:
        raise ConfigError(f"queries is a share of all queries, above 0 and at most 1; got {queries}.")
    sums = SinkSums(vit, swept, queries)
    [kinds] = stream(vit, images, [sums], batch_size=batch_size, description="classifying sinks")
    return SinkKinds(**vit.identity, thresholds=swept, queries=float(queries), **kinds)

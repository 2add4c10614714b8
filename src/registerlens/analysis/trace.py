"""Where outlier norms and attention sinks arise: one streaming pass over any number of images (figures 2 and 26)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.outliers import Answer, OutlierEvidence, judge_each
from registerlens.analysis.places import PREFIX, count_by_place, share_by_place
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.attention_received import attention_hooks
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.errors import check_finite
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import EVERYWHERE, Sublayer, sublayers
from registerlens.model.vit import Hook, HookedViT
from registerlens.results import FINITE, ModelResult
from registerlens.stats.histograms import bin_edges, count_bins

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Levels of `Trace.norm_quantiles`."""


MIN_JUMP = 1.3
"""At an onset the largest patch norm over the median becomes at least this many times what it was."""
MIN_GROWTH = 1.5
"""So much where outliers are there already: their norms may grow, and are no new ones."""


@dataclass(frozen=True, kw_only=True)
class Onset:
    """A place in the residual stream where outliers are that were not there before."""

    sublayer: Sublayer
    """The attention or MLP that brings them, or the embedding."""
    before: float
    """Largest patch norm over the image's median before it, mean over the images that have outliers; 1 before the
    embedding. The larger of the two sublayers before counts, so that a dip is no new beginning."""
    after: float
    """The same after it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace(ModelResult):
    """Patch norms and sinks along the residual stream; sublayer 0 is the embedding, then attention and MLP in turn."""

    image_sizes: tuple[tuple[int, int], ...]
    """Heights and widths in pixels of the images that went through, each size once."""
    sublayers: tuple[Sublayer, ...]
    """Places in the stream: "embed", "0.attn", "0.mlp", "1.attn", ..."""
    sink_query: Literal["cls", "mean"]
    """Whose attention counts for sinks: [CLS]'s, or the mean over queries where there is no [CLS]."""
    n_images: int
    """Images that went through."""
    largest_norm: Float[np.ndarray, " sublayer"] = field(metadata=FINITE)
    """Largest patch norm of an image, mean over images."""
    median_norm: Float[np.ndarray, " sublayer"] = field(metadata=FINITE)
    """Median patch norm of an image, mean over images."""
    largest_over_median: Float[np.ndarray, " sublayer"] = field(metadata=FINITE)
    """Their ratio in each image, mean over images."""
    norm_quantiles: Float[np.ndarray, "sublayer level"] = field(metadata=FINITE)
    """Quantiles of an image's patch norms at the levels QUANTILES, mean over images."""
    histogram: Int[np.ndarray, "sublayer bin"]
    """Patches by norm over the image's median; bins as `analysis.outliers.bin_edges()`."""
    largest_histogram: Int[np.ndarray, "sublayer bin"]
    """Images by the same ratio of their largest patch."""
    head_sink: Float[np.ndarray, "layer head"] = field(metadata=FINITE)
    """Largest attention a patch draws in each head (0 to 1), mean over images."""
    mean_sink: Float[np.ndarray, " layer"] = field(metadata=FINITE)
    """Largest attention a patch draws in the average head (0 to 1), mean over images."""
    sink_histogram: Int[np.ndarray, "layer bin"]
    """Images by the norm (over the median) that the most attended patch brings into the layer."""
    share_by_place: Float[np.ndarray, " sublayer"]
    """Share (0 to 1) of the variance of relative norms that lies between places of the image: near 1, the same patches
    stand out in every image; near 0, it is what the images show. NaN where no two images have one size."""

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return len(self.mean_sink)

    @cached_property
    def evidence(self) -> tuple[OutlierEvidence, ...]:
        """The evidence at every sublayer."""
        return judge_each(self.histogram, self.largest_histogram, self.largest_over_median)

    @cached_property
    def _strongest(self) -> int:
        return max(range(len(self.sublayers)), key=lambda i: self.evidence[i].strength)

    @property
    def strongest(self) -> Sublayer:
        """The sublayer where the evidence is strongest."""
        return self.sublayers[self._strongest]

    @property
    def verdict(self) -> Answer:
        """Whether the model has outlier tokens on these images."""
        return self.evidence[self._strongest].verdict

    @cached_property
    def onsets(self) -> tuple[Onset, ...]:
        """Every place where outliers are that were not there before, first to last; none where norms only drift apart.

        The largest norm jumps there and then stays beyond the gap until a place where outliers are present, mostly that
        same one.
        """
        found: list[Onset] = []
        for i, place in enumerate(self.sublayers):
            if (k := self._next_present(i)) is None:
                break
            largest, threshold = self._largest(k), self.evidence[k].threshold
            before = float(largest[max(i - 2, 0) : i].max(initial=1.0))
            jump = MIN_JUMP if before < threshold else MIN_GROWTH
            if largest[i] >= jump * before and self._beyond(i):
                found.append(Onset(sublayer=place, before=before, after=float(largest[i])))
        return tuple(found)

    @property
    def onset(self) -> Sublayer | None:
        """The first place at which outliers arise; None where they do not, or where norms only drift apart."""
        return self.onsets[0].sublayer if self.onsets else None

    def onset_before(self, sublayer: str) -> Sublayer | None:
        """The first onset of the outliers that are present at a place; None where there are none.

        Earlier ones that two sublayers in a row had lost again do not count; a dip of one sublayer is no loss.
        """
        place = self.sublayers.index(sublayer)
        if not self.evidence[place].present:
            return None
        there = [evidence.present or self._beyond(i) for i, evidence in enumerate(self.evidence[: place + 1])]
        lost = max((i for i in range(1, place) if not (there[i - 1] or there[i])), default=-1)
        later = [onset.sublayer for onset in self.onsets if lost < self.sublayers.index(onset.sublayer) <= place]
        return later[0] if later else None

    def _next_present(self, i: int) -> int | None:
        """The first place from this one on where outliers are present."""
        return next((k for k in range(i, len(self.sublayers)) if self.evidence[k].present), None)

    def _largest(self, k: int) -> Float[np.ndarray, " sublayer"]:
        """Largest norms over the median everywhere, mean over as many images as have outliers at one place."""
        n = max(round(self.evidence[k].share_of_images * self.n_images), 1)
        from_top = np.minimum(self.largest_histogram[:, ::-1].cumsum(1), n)
        centres = np.sqrt(bin_edges()[:-1] * bin_edges()[1:])[::-1]
        return np.diff(from_top, prepend=0, axis=1) @ centres / n

    def _beyond(self, i: int) -> bool:
        """Whether the largest norms lie beyond the gap from here to where outliers are next present, but for dips."""
        if (k := self._next_present(i)) is None:
            return False
        low = self._largest(k)[i : k + 1] < self.evidence[k].threshold
        return not low[0] and not (low[1:] & low[:-1]).any()

    @property
    def onset_layer(self) -> int | None:
        """The block of the onset; None when absent, or when the embedding has them already."""
        return None if self.onset is None or self.onset == "embed" else self.onset.layer

    @property
    def sink_is_outlier(self) -> Float[np.ndarray, " layer"]:
        """How often (0 to 1) the most attended patch of a layer enters it as an outlier; NaN when absent."""
        threshold = self.evidence[self._strongest].threshold
        if self.verdict != "present":
            return np.full(self.n_layers, np.nan)
        beyond = self.sink_histogram[:, bin_edges()[:-1] >= threshold].sum(1)
        return beyond / self.n_images

    def describe(self) -> str:
        """The verdict in words: which norm, which layer."""
        return f"Outlier tokens: {self.verdict}. {self.explain()}"

    def explain(self) -> str:
        """What the verdict rests on, in words."""
        evidence = self.evidence[self._strongest]
        if self.verdict == "absent":
            return (
                f"Nowhere in the residual stream do patch norms separate: {evidence.reason}. "
                f"The largest patch norm is at most {self.largest_over_median.max():.1f} x the median."
            )
        if self.verdict == "too few images":
            return f"At {self.strongest}, where norms separate most, {evidence.reason}."
        return f"{self._arising()} Where they are clearest ({self.strongest}), {evidence.reason}."

    def _arising(self) -> str:
        if not self.onsets:
            return "No single sublayer brings them: norms drift apart from one to the next."
        first, *later = self.onsets
        if first.sublayer == "embed":
            where = "They are there in the embedding, before any block."
        else:
            writer = "MLP" if first.sublayer.kind == "mlp" else "attention"
            where = (
                f"They arise in block {first.sublayer.layer}, after its {writer}: the largest patch norm goes from "
                f"{first.before:.2g} to {first.after:.2g} x the median."
            )
        if later:
            jumps = ", ".join(f"{one.sublayer} (from {one.before:.2g} to {one.after:.2g})" for one in later)
            where += f" More arise at {jumps}."
        return where

    def to_dataframe(self) -> pd.DataFrame:
        """One row a sublayer: norms, evidence, and for attention rows the sinks of that layer."""
        rows = []
        for i, sublayer in enumerate(self.sublayers):
            row: dict[str, Any] = {
                "sublayer": sublayer,
                "layer": sublayer.layer,
                "after": sublayer.kind,
                "largest_norm": self.largest_norm[i],
                "median_norm": self.median_norm[i],
                "largest_over_median": self.largest_over_median[i],
                "gap": self.evidence[i].gap,
                "verdict": self.evidence[i].verdict,
                "share_of_images": self.evidence[i].share_of_images,
                "share_of_patches": self.evidence[i].share_of_patches,
            }
            row |= {f"norm_q{level * 100:02.0f}": self.norm_quantiles[i, j] for j, level in enumerate(QUANTILES)}
            if sublayer.kind == "attn":
                row["sink_mean_head"] = self.mean_sink[sublayer.layer]
                row["sink_largest_head"] = self.head_sink[sublayer.layer].max()
                row["sink_is_outlier"] = self.sink_is_outlier[sublayer.layer]
            rows.append(row)
        return pd.DataFrame(rows)

    plot = drawn_by("detection.trace_figure")
    """The two panels of figure 2: largest patch norm after attention and after the MLP; largest attention."""


def trace(vit: HookedViT, images: Images, *, batch_size: int = 16) -> Trace:
    """Follow patch norms and attention sinks through the model, in one pass whose memory does not grow.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], split into batches here, or an iterable of batches such as
            `ImageStream`.
        batch_size: images at once when a tensor is given.

    Raises:
        ImageError: there are no images.
        ShapeError: they do not fit the model.
        NonFiniteError: a norm is NaN or infinite.

    Source: Jiang et al. 2025, figures 2 and 26; the verdict as `analysis.outliers` explains.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = rl.trace(vit, synthetic_images(32, 0).images)
        >>> found.verdict, found.onset
        ('present', '1.mlp')
    """
    [traced] = stream(vit, images, [TraceSums(vit)], batch_size=batch_size, description="tracing")
    return traced


class TraceSums(Sums):
    """What a trace adds up; nothing larger than [batch, patch] a sublayer is kept of a batch."""

    def __init__(self, vit: HookedViT) -> None:
        super().__init__()
        self.identity = vit.identity
        self.sublayers = sublayers(vit.cfg.n_layers)
        self.sizes: dict[tuple[int, int], None] = {}  # an ordered set

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """Norms everywhere, and the attention that patches draw."""
        self.norms: list[Float[Tensor, "batch patch"]] = []
        self.head_sinks: list[Float[Tensor, "batch head"]] = []
        self.sinks: list[Float[Tensor, " batch"]] = []
        self.sink_patches: list[Int[Tensor, " batch"]] = []

        def norm(resid: Tensor, hook: Any) -> None:
            self.norms.append(token_norms(resid[:, layout.patches]))

        def attention(layer: int, received: Float[Tensor, "batch head key"]) -> None:
            received = received[..., layout.patches]
            self.head_sinks.append(received.amax(-1))
            strongest = received.mean(1).max(-1)
            self.sinks.append(strongest.values)
            self.sink_patches.append(strongest.indices)

        return [(EVERYWHERE, norm), *attention_hooks(vit, layout, range(vit.cfg.n_layers), attention)]

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        norms = torch.stack(self.norms)  # sublayer batch patch
        first = int((~norms.isfinite()).flatten(1).any(1).int().argmax())
        check_finite(norms, f"Patch norms are NaN or infinite at {self.sublayers[first]}")
        levels = torch.tensor(QUANTILES, dtype=norms.dtype, device=norms.device)
        quantiles = norms.quantile(levels, dim=-1)  # level sublayer batch
        median = quantiles[QUANTILES.index(0.5)]
        largest = norms.amax(-1)
        relative = norms / median[..., None]
        # sublayer 2 l is what enters block l: the embedding, or the block before it after its MLP
        entering = relative[:-1:2].gather(-1, torch.stack(self.sink_patches)[..., None])[..., 0]
        self.sizes[batch.images.shape[2], batch.images.shape[3]] = None
        self.add(
            n_images=len(batch),
            largest_norm=largest.sum(1),
            median_norm=median.sum(1),
            largest_over_median=(largest / median).sum(1),
            norm_quantiles=quantiles.sum(-1).T,
            head_sink=torch.stack(self.head_sinks).sum(1),
            mean_sink=torch.stack(self.sinks).sum(1),
            histogram=count_bins(relative.flatten(1)),
            largest_histogram=count_bins(relative.amax(-1)),
            sink_histogram=count_bins(entering),
            **count_by_place(relative, batch.layout.grid),
        )

    def merge(self, other: TraceSums) -> None:  # type: ignore[override]
        """Take in what another one saw."""
        super().merge(other)
        self.sizes |= other.sizes

    def result(self) -> Trace:
        """Everything, as means over the images."""
        by_place = {name: total for name, total in self.totals.items() if name.startswith(PREFIX)}
        means = {name: mean for name, mean in self.means().items() if name not in by_place}
        return Trace(
            **self.identity,
            image_sizes=tuple(self.sizes),
            sublayers=self.sublayers,
            sink_query="cls" if self.identity["config"].class_token else "mean",
            n_images=self.n_images,
            share_by_place=np.broadcast_to(share_by_place(by_place), len(self.sublayers)).copy(),
            **means,
        )

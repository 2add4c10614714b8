"""What all findings rest on: pixels, norms of every kind of token, channels and sinks, in two passes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.massive import MassiveActivations, MassiveSums
from registerlens.analysis.sink_kinds import SinkKinds, classify_sinks
from registerlens.analysis.trace import Trace, TraceSums
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.errors import UnsupportedArchitectureError
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import EVERYWHERE
from registerlens.model.vit import Hook, HookedViT
from registerlens.stats.histograms import medians

SINK = 0.3
"""Attention that makes a sink (Gu et al. 2025) where 90% of the queries pay it (Fesser et al. 2026)."""


Pixels = dict[str, Float[np.ndarray, " channel"]]
"""By channel, means over images: "mean", "square", "lowest", "highest", and "neighbours", the correlation of pixels
that stand side by side."""


@dataclass(frozen=True, kw_only=True)
class Symptoms:
    """A model on its images."""

    vit: HookedViT
    trace: Trace
    massive: MassiveActivations
    sinks: SinkKinds | None
    """None where attention is none that `classify_sinks` can take."""
    pixels: Pixels
    """Of the images as the model gets them."""
    registers: float
    """Largest norm of a trained register over the image's median patch norm, at the place where it is largest, mean
    over images; NaN without trained registers."""

    @property
    def outliers_in_blocks(self) -> bool:
        """Whether there are outlier patches that a block made, and not the embedding."""
        return self.trace.verdict == "present" and self.trace.onset != "embed"


class PixelSums(Sums):
    """Statistics of the images themselves."""

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """Nothing: the images come with the batch."""
        return []

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        pixels = batch.images.float()
        centred = pixels - pixels.mean((2, 3), keepdim=True)
        variance = centred.square().mean((2, 3))
        together = (centred[..., 1:] * centred[..., :-1]).mean((2, 3))
        statistics = {
            "mean": pixels.mean((2, 3)),
            "square": pixels.square().mean((2, 3)),
            "lowest": pixels.amin((2, 3)),
            "highest": pixels.amax((2, 3)),
            "neighbours": together / variance.clamp_min(1e-12),
        }
        self.add(n_images=len(batch), **{name: value.sum(0) for name, value in statistics.items()})

    def result(self) -> dict[str, Any]:
        """Means over the images."""
        return self.means()


class RegisterSums(Sums):
    """Norms of the trained registers everywhere in the stream."""

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """Every place of the stream."""
        self.found: list[Float[Tensor, " batch"]] = []

        def take(resid: Tensor, hook: Any) -> None:
            norms = token_norms(resid)
            typical = medians(norms[:, layout.patches])[:, 0]
            self.found.append(norms[:, layout.trained_registers].amax(1) / typical)

        return [(EVERYWHERE, take)] if layout.n_trained_registers else []

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        self.add(n_images=len(batch), **({"norm": torch.stack(self.found).sum(1)} if self.found else {}))

    def result(self) -> float:
        """At the place where it is largest."""
        return float(self.means()["norm"].max()) if "norm" in self.totals else float("nan")


def measure(vit: HookedViT, images: Images, batch_size: int) -> Symptoms:
    """Everything, in two passes.

    Raises:
        ImageError: there are no images, or they could be iterated only once.
        NonFiniteError: a number is NaN or infinite; it says where.
        ShapeError: the images do not fit the model.
    """
    sums: list[Any] = [PixelSums(), RegisterSums(), TraceSums(vit), MassiveSums(vit)]
    pixels, registers, traced, massive = stream(vit, images, sums, batch_size=batch_size, description="diagnosing")
    try:
        sinks = classify_sinks(vit, images, thresholds=[SINK], batch_size=batch_size)
    except UnsupportedArchitectureError:
        sinks = None
    return Symptoms(vit=vit, trace=traced, massive=massive, sinks=sinks, pixels=pixels, registers=registers)

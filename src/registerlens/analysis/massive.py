"""Massive activations: single numbers of the residual stream that dwarf all others, and where they stand."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.errors import check_finite
from registerlens.model.vit import Hook, HookedViT
from registerlens.results import FINITE, ModelResult

ABSOLUTE, RELATIVE = 100.0, 1000.0
"""An activation is massive above this magnitude, and above so many times the median one (Sun et al. 2024)."""
KINDS = ("prefix", "trained_registers", "patches", "test_time_registers")
"""Parts of a `TokenLayout`."""
TOP = 3
"""Channels that a table names."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MassiveActivations(ModelResult):
    """Magnitudes of the residual stream at every place: as it enters block 0, and after each block."""

    n_images: int
    """Images that went through."""
    places: tuple[str, ...]
    """Names of the places: "embed", "0.mlp", "1.mlp", ..."""
    largest: Float[np.ndarray, " place"] = field(metadata=FINITE)
    """Largest magnitude of an image's stream, over tokens and channels; mean over images."""
    median: Float[np.ndarray, " place"] = field(metadata=FINITE)
    """Median magnitude of the same; mean over images."""
    ratio: Float[np.ndarray, " place"]
    """Largest over median in each image, mean over images. Free of thresholds and of the stream's scale."""
    kurtosis: Float[np.ndarray, " place"]
    """Kurtosis over the channels of an image's most peaked token, mean over images; 3 for a normal distribution,
    about d_model where one channel is all. Free of thresholds and scale too."""
    typical_kurtosis: Float[np.ndarray, " place"]
    """The same of the average token."""
    per_image: Float[np.ndarray, " place"] = field(metadata=FINITE)
    """Massive activations (token and channel) in an image, mean over images."""
    share_of_images: Float[np.ndarray, " place"] = field(metadata=FINITE)
    """Share of images with at least one, 0 to 1."""
    tokens: Float[np.ndarray, "place kind"] = field(metadata=FINITE)
    """Tokens of each kind with at least one, mean over images; in the order of `KINDS`."""
    channels: Int[np.ndarray, "place channel"]
    """Images in which a channel has one."""
    channel_largest: Float[np.ndarray, "place channel"] = field(metadata=FINITE)
    """Largest magnitude of each channel over an image's tokens, mean over images."""

    @property
    def top_channels(self) -> Int[np.ndarray, "place rank"]:
        """The three channels of largest magnitude at each place."""
        return np.argsort(-self.channel_largest, axis=1, kind="stable")[:, :TOP]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a place: magnitudes, companions, counts, and the top three channels with their magnitudes."""
        top = self.top_channels
        frame = pd.DataFrame(
            {
                "place": self.places,
                "largest": self.largest,
                "median": self.median,
                "ratio": self.ratio,
                "kurtosis": self.kurtosis,
                "typical_kurtosis": self.typical_kurtosis,
                "massive_per_image": self.per_image,
                "share_of_images": self.share_of_images,
                **{f"massive_{kind}": self.tokens[:, i] for i, kind in enumerate(KINDS)},
            }
        )
        for rank in range(top.shape[1]):
            frame[f"channel_{rank + 1}"] = top[:, rank]
            frame[f"channel_{rank + 1}_largest"] = np.take_along_axis(self.channel_largest, top, 1)[:, rank]
        return frame

    def describe(self) -> str:
        """The result in words."""
        at = int(self.ratio.argmax())
        channels = ", ".join(map(str, self.top_channels[at]))
        strongest = (
            f"The largest magnitude is furthest from the others at {self.places[at]}: {self.largest[at]:.3g}, "
            f"{self.ratio[at]:.3g} x the median; the most peaked token has kurtosis {self.kurtosis[at]:.3g} (average "
            f"token {self.typical_kurtosis[at]:.3g}, normal distribution 3); top channels {channels}."
        )
        some = np.flatnonzero(self.share_of_images > 0)
        if not len(some):
            return f"No activation is massive (above {ABSOLUTE:g} and {RELATIVE:g} x the median) anywhere. {strongest}"
        most = int(self.share_of_images.argmax())
        carriers = [f"{n:.2f} {kind}" for kind, n in zip(KINDS, self.tokens[most], strict=True) if n]
        return (
            f"Massive activations (above {ABSOLUTE:g} and {RELATIVE:g} x the median) from {self.places[some[0]]} to "
            f"{self.places[some[-1]]}; most often at {self.places[most]}, in {self.share_of_images[most]:.0%} of "
            f"images, where they stand in {' and '.join(carriers)} token(s) an image. {strongest}"
        )

    plot = drawn_by("observables.massive_figure")
    """Largest and median magnitude, kurtosis, and the top channels, place by place."""


def massive_activations(vit: HookedViT, images: Images, *, batch_size: int = 16) -> MassiveActivations:
    """Which activations of the residual stream are massive, at every place, in one pass of constant memory.

    The definition has an absolute part (magnitude above 100), so that it depends on the stream's scale, which means
    nothing in a pre-LayerNorm model; the companions `ratio` and `kurtosis` do not. All tokens count.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or an iterable of batches.
        batch_size: images at once when a tensor is given.

    Raises:
        ImageError: there are no images.
        ShapeError: they do not fit the model.
        NonFiniteError: the stream is NaN or infinite at a place, which is named.

    Source: Sun et al. 2024 (massive activations): above 100, and about 1000 times the median magnitude.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = massive_activations(vit, synthetic_images(16, 0).images)
        >>> found.places[int(found.ratio.argmax())], float(found.per_image.max())
        ('5.mlp', 0.0)
    """
    [massive] = stream(
        vit, images, [MassiveSums(vit)], batch_size=batch_size, description="finding massive activations"
    )
    return massive


def is_massive(
    magnitudes: Float[Tensor, "batch pos channel"], median: Float[Tensor, " batch"]
) -> Bool[Tensor, "batch pos channel"]:
    """Sun et al.'s definition, given each image's median magnitude.

    Example:
        >>> is_massive(torch.tensor([[[99.0, 101.0, 5000.0]]]), torch.tensor([1.0]))
        tensor([[[False, False,  True]]])
    """
    return magnitudes > (RELATIVE * median).clamp_min(ABSOLUTE)[:, None, None]


def magnitudes_of(
    resid: Float[Tensor, "batch pos channel"],
) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, " batch"]]:
    """Magnitudes in float32, and the median one of each image (the lower of the middle two)."""
    magnitudes = resid.float().abs()
    return magnitudes, magnitudes.flatten(1).median(-1).values


def kurtosis(x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch"]:
    """Fourth central moment over the squared second, over the last axis; 0 where all values are equal.

    Example:
        >>> kurtosis(torch.tensor([0.0, 0.0, 0.0, 4.0, -4.0, 0.0, 0.0, 0.0]))
        tensor(4.)
    """
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    squares = centred.square()
    variance = squares.mean(-1, keepdim=True).clamp_min(1e-30)
    return (squares / variance).square().mean(-1)


class MassiveSums(Sums):
    """Statistics at every place, each summed over a batch's images at once."""

    def __init__(self, vit: HookedViT) -> None:
        super().__init__()
        self.identity = vit.identity
        self.places = ("embed", *(f"{layer}.mlp" for layer in range(vit.cfg.n_layers)))

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """The stream before the first block and after each."""
        self.found: list[dict[str, Tensor]] = []

        def take(resid: Tensor, hook: Any) -> None:
            magnitudes, median = magnitudes_of(resid)
            by_channel = magnitudes.amax(1)
            largest = by_channel.amax(-1)
            check_finite(largest, f"The residual stream is NaN or infinite at {self.places[len(self.found)]}")
            massive = is_massive(magnitudes, median)
            tokens = massive.any(-1)
            peaked = kurtosis(resid)
            sums = {
                "largest": largest,
                "median": median,
                "ratio": largest / median.clamp_min(1e-30),
                "kurtosis": peaked.amax(1),
                "typical_kurtosis": peaked.mean(1),
                "per_image": massive.sum((1, 2)).float(),
                "share_of_images": tokens.any(1).float(),
                "tokens": torch.stack([tokens[:, getattr(layout, kind)].sum(1) for kind in KINDS], 1).float(),
                "channels": massive.any(1),
                "channel_largest": by_channel,
            }
            self.found.append({name: values.sum(0) for name, values in sums.items()})

        return [(["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"], take)]

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        sums = {name: torch.stack([sums_here[name] for sums_here in self.found]) for name in self.found[0]}
        self.add(n_images=len(batch), **sums)

    def result(self) -> MassiveActivations:
        """Everything, as means over the images."""
        return MassiveActivations(**self.identity, n_images=self.n_images, places=self.places, **self.means())

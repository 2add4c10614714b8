"""Norm outliers, massive channels, sinks and closeness to [CLS]: four observables, and how far they are the same."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, Threshold, detect, require_outliers
from registerlens.analysis.massive import ABSOLUTE, RELATIVE, is_massive, magnitudes_of
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.attention_received import attention_hooks
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.errors import ImageError, check_finite
from registerlens.model.parts import token_norms
from registerlens.model.vit import Hook, HookedViT
from registerlens.results import ModelResult

SINK = 0.3
"""A patch is a sink if a head gives it more than this share of its attention (Gu et al. 2025)."""
NORM, MASSIVE, SINKS, CLOSE = "norm outlier", "massive channel", "sink", "close to [CLS]"


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlap(ModelResult):
    """Which patches show which observable, counted two ways.

    By cut-offs: each observable has its own, `cutoffs` says which. Matched: in every image with k norm outliers the k
    patches that rank first by each observable are compared, which needs no cut-off but the norms'.
    """

    detection: Detection
    """Place in the stream, cut-off and evidence of norm outliers."""
    observables: tuple[str, ...]
    """The observables that the model has: without [CLS] there is no closeness to it, without a later block no sink."""
    cutoffs: tuple[str, ...]
    """Above what a patch shows each, in words."""
    n_images: int
    """Images that went through."""
    n_with_outliers: int
    """How many of these have a norm outlier, and so a matched comparison."""
    n_patches: int
    """Patches in all."""
    counts: Int[np.ndarray, "observable observable"]
    """Patches that show both; on the diagonal those that show one."""
    matched: Int[np.ndarray, "observable observable"]
    """Patches that rank among an image's first k by both; on the diagonal the sum of k."""
    chance: float
    """Share of the matched patches that two unrelated rankings would have in common."""

    @property
    def jaccard(self) -> Float[np.ndarray, "observable observable"]:
        """Patches that show both over patches that show either; NaN where none shows either."""
        alone = np.diag(self.counts)
        return _divide(self.counts, alone[:, None] + alone[None] - self.counts)

    @property
    def conditional(self) -> Float[np.ndarray, "observable observable"]:
        """Share of the row's patches that show the column's observable too; NaN where the row has none."""
        return _divide(self.counts, np.broadcast_to(np.diag(self.counts)[:, None], self.counts.shape))

    @property
    def matched_share(self) -> Float[np.ndarray, "observable observable"]:
        """Share of the first k patches that two rankings have in common, over all images; compare with `chance`."""
        return self.matched / self.matched[0, 0]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a pair: patches that show each and both, Jaccard index, conditional shares, matched share."""
        rows = []
        for i, j in combinations(range(len(self.observables)), 2):
            rows.append(
                {
                    "first": self.observables[i],
                    "second": self.observables[j],
                    "n_first": self.counts[i, i],
                    "n_second": self.counts[j, j],
                    "n_both": self.counts[i, j],
                    "jaccard": self.jaccard[i, j],
                    "second_given_first": self.conditional[i, j],
                    "first_given_second": self.conditional[j, i],
                    "matched_share": self.matched_share[i, j],
                    "matched_by_chance": self.chance,
                }
            )
        return pd.DataFrame(rows)

    def describe(self) -> str:
        """The table in words."""
        shares = np.diag(self.counts) / self.n_patches
        listed = "; ".join(
            f"{name} {share:.2%} ({cutoff})"
            for name, share, cutoff in zip(self.observables, shares, self.cutoffs, strict=True)
        )
        sentences = [f"Of {self.n_patches} patches show: {listed}."]
        for j, name in enumerate(self.observables[1:], start=1):
            if self.counts[j, j]:
                sentences.append(
                    f"{self.conditional[0, j]:.0%} of the norm outliers are {_plural(name)}, and "
                    f"{self.conditional[j, 0]:.0%} the other way round."
                )
            sentences.append(f"Ranked by '{name}' {self.matched_share[0, j]:.0%} of the first are norm outliers.")
        return " ".join([*sentences, f"By chance it would be {self.chance:.1%}."])

    plot = drawn_by("observables.overlap_figure")
    """Heat maps of the conditional shares, the Jaccard indices and the matched shares."""


def observable_overlap(
    vit: HookedViT,
    images: Images,
    *,
    detection: Detection | None = None,
    layer: int | str = "auto",
    threshold: Threshold = "auto",
    batch_size: int = 16,
) -> Overlap:
    """How far four observables pick the same patches, streaming.

    At the place of detection: norm outliers (above the cut-off), and massive channels (a channel above 100 and 1000 x
    the image's median magnitude; ranked by the largest channel). In the blocks after the onset: sinks (a head's [CLS]
    query, or its average query where there is no [CLS], gives the patch more than 0.3). Closeness to [CLS]: at the
    place of detection the cosine to [CLS] is higher than that to the image's average patch (the mean of unit vectors);
    ranked by the difference.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or batches that can be iterated twice.
        detection: where to look for norm outliers, and above which norm; default: found first, in another pass.
        layer, threshold: for that, as in `find_outliers`.
        batch_size: images at once when a tensor is given.

    Raises:
        NoOutliersError: the model has no outliers on these images; it carries the evidence.
        ImageError: there are no images, or none has an outlier above a threshold of your own.
        NonFiniteError: norms are NaN or infinite.

    Source: Sun et al. 2024 (massive activations); Gu et al. 2025 (sinks); Darcet et al. 2024 (norms, [CLS]).

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> found = observable_overlap(vit, synthetic_images(32, 0).images, layer=1)
        >>> found.observables
        ('norm outlier', 'massive channel', 'sink')
    """
    if detection is None:
        detection = detect(vit, images, layer=layer, threshold=threshold, batch_size=batch_size)
    require_outliers(detection, "The overlap of the observables")
    first = (detection.onset or detection.sublayer).layer + 1
    [overlap] = stream(
        vit,
        images,
        [OverlapSums(vit, detection, sink_layers=range(first, vit.cfg.n_layers))],
        batch_size=batch_size,
        description="comparing observables",
    )
    return overlap


def count_overlaps(flags: Bool[Tensor, "observable *patch"]) -> Int[Tensor, "observable observable"]:
    """How many patches show each pair of observables.

    Example:
        >>> count_overlaps(torch.tensor([[True, True, False], [False, True, True]]))
        tensor([[2, 1],
                [1, 2]])
    """
    flat = flags.flatten(1).double() if flags.device.type != "mps" else flags.flatten(1).float()
    return (flat @ flat.T).long().cpu()


def first_by(
    scores: Float[Tensor, "observable image patch"], k: Int[Tensor, " image"]
) -> Bool[Tensor, "observable image patch"]:
    """The k patches of each image that score highest; among equals the earlier.

    Example:
        >>> first_by(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([2]))
        tensor([[[False,  True,  True]]])
    """
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < k[:, None]


def closeness(
    patches: Float[Tensor, "image patch d_model"], cls: Float[Tensor, "image d_model"]
) -> Float[Tensor, "image patch"]:
    """Cosine to [CLS] less the cosine to the average patch (the mean of the patches' unit vectors).

    Example:
        >>> patches = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> closeness(patches, torch.tensor([[0.0, 1.0]]))[0] > 0
        tensor([False, False, False,  True])
    """
    unit = F.normalize(patches.float(), dim=-1)
    average = F.normalize(unit.mean(1), dim=-1)
    return torch.einsum("npd,nd->np", unit, F.normalize(cls.float(), dim=-1) - average)


def _in_stream(
    resid: Float[Tensor, "batch pos d_model"], layout: TokenLayout, detection: Detection
) -> dict[str, tuple[Tensor, Tensor]]:
    """Flags and scores of what shows in the residual stream."""
    patches = resid[:, layout.patches]
    norms = token_norms(patches)
    check_finite(norms, f"Patch norms are NaN or infinite at {detection.sublayer}")
    magnitudes, median = magnitudes_of(resid)
    of_patches = magnitudes[:, layout.patches]
    shows = {
        NORM: (detection.cutoff.above(norms), norms),
        MASSIVE: (is_massive(of_patches, median).any(-1), of_patches.amax(-1)),
    }
    if layout.cls is not None:
        close = closeness(patches, resid[:, layout.cls])
        shows[CLOSE] = (close > 0, close)
    return shows


class OverlapSums(Sums):
    """Counts of patches that show each pair of observables."""

    def __init__(self, vit: HookedViT, detection: Detection, sink_layers: range) -> None:
        super().__init__()
        self.identity, self.detection, self.sink_layers = vit.identity, detection, sink_layers
        self.cutoffs = {
            NORM: f"above {detection.cutoff} at {detection.sublayer}",
            MASSIVE: f"a channel above {ABSOLUTE:g} and {RELATIVE:g} x the median at {detection.sublayer}",
        }
        if len(sink_layers):
            self.cutoffs[SINKS] = f"a head of blocks {sink_layers[0]} to {sink_layers[-1]} gives more than {SINK:g}"
        if vit.cfg.class_token:
            self.cutoffs[CLOSE] = f"nearer to [CLS] than to the average patch at {detection.sublayer}"

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """The stream where outliers are, and the attention that patches draw."""
        self.drawn: list[Float[Tensor, "batch patch"]] = []
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

        def in_stream(resid: Tensor, hook: Any) -> None:
            self.seen = _in_stream(resid, layout, self.detection)

        def attention(layer: int, received: Float[Tensor, "batch head key"]) -> None:
            self.drawn.append(received[..., layout.patches].amax(1))

        return [*attention_hooks(vit, layout, self.sink_layers, attention), (self.detection.hook_name, in_stream)]

    def update(self, batch: Batch) -> None:
        """Whether each patch shows each observable, and how strongly."""
        if self.drawn:
            most = torch.stack(self.drawn).amax(0)
            self.seen[SINKS] = (most > SINK, most)
        flags = torch.stack([self.seen[name][0] for name in self.cutoffs])
        scores = torch.stack([self.seen[name][1].float() for name in self.cutoffs])
        k = flags[0].sum(-1)
        self.add(
            n_images=len(batch),
            n_patches=flags[0].numel(),
            n_with_outliers=(k > 0).sum(),
            counts=count_overlaps(flags),
            matched=count_overlaps(first_by(scores, k)),
            by_chance=float(k.float().square().sum()) / flags.shape[2],
        )

    def result(self) -> Overlap:
        """The counts of all images.

        Raises:
            ImageError: none has a norm outlier.
        """
        n = self.count("n_with_outliers")
        if not n:
            raise ImageError(f"None of the {self.n_images} images has a norm outlier. Give more, or lower threshold=.")
        counts = self.means()
        return Overlap(
            **self.identity,
            detection=self.detection,
            observables=tuple(self.cutoffs),
            cutoffs=tuple(self.cutoffs.values()),
            n_images=self.n_images,
            n_with_outliers=n,
            n_patches=self.count("n_patches"),
            chance=float(self.totals["by_chance"]) / int(counts["matched"][0, 0]),
            **counts,
        )


def _divide(part: Int[np.ndarray, "a b"], whole: Int[np.ndarray, "a b"]) -> Float[np.ndarray, "a b"]:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _plural(name: str) -> str:
    return {MASSIVE: "massive in a channel", SINKS: "sinks", CLOSE: "close to [CLS]"}[name]

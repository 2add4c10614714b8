"""How strongly every neuron fires at outlier patches: Algorithm 1's averages, and three other scores, streaming."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection
from registerlens.analysis.outliers import OutlierEvidence, count_ratios, judge_each
from registerlens.analysis.top_outliers import NormsAndActivations
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import Shown
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.errors import ImageError, check_choice
from registerlens.model.vit import Hook, HookedViT

Score = Literal["mean", "mean_abs", "contrast", "auc"]
SCORES: tuple[Score, ...] = get_args(Score)
Keep = Literal["telling", "sparse", "all"]
"""Which neurons may be register neurons; see `NeuronScores.candidates`."""
TELLING = 5.0
"""A telling neuron's magnitude at outliers is at least this many times that at normal patches."""
QUIET = 0.5
"""A sparse neuron's activation lies below this on at least half of the normal patches (the authors' code)."""
NORMALS = 16
"""Normal patches an image, evenly spread over their norms, that outliers are compared with."""
_COMPARED = 2**22
"""Activations compared at once for the AUC: 16 MiB in float32."""
_SUMMED = ("mean", "mean_abs", "auc", "normal", "square", "normal_abs", "quiet")
"""Totals [half, layer, neuron], in the order in which the scores take them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronScores(Shown):
    """Scores of every neuron in a range of layers.

    "mean" is Algorithm 1: activation at an image's outlier patches, averaged over them, then over the images that have
    any. "mean_abs" is the same for its absolute value. "contrast" is the mean at outliers minus the mean at normal
    patches, over the standard deviation there. "auc" is the probability that an outlier patch has a higher activation
    than a normal patch of the same image, over the images that have both. The last two compare with a sample of 16
    normal patches an image. Where a neuron is silent on normal patches, its spread there is set to a thousandth of the
    average one: such a contrast is large, but how large means nothing.
    """

    first_layer: int
    """The lowest layer."""
    scores: Float[np.ndarray, "score layer neuron"]
    """In the order of `SCORES`."""
    halves: Float[np.ndarray, "half score layer neuron"]
    """The same from every other image: 1st, 3rd, 5th, ... and 2nd, 4th, 6th, ..."""
    normal_abs: Float[np.ndarray, "layer neuron"]
    """Magnitude of the activation at normal patches, mean."""
    quiet: Float[np.ndarray, "layer neuron"]
    """Share of normal patches at which the activation lies below QUIET, 0 to 1."""
    n_images: int
    """Images that went through."""
    n_with_outliers: int
    """How many of these have an outlier."""
    n_outliers: int
    """Outlier patches in all."""
    evidence: OutlierEvidence
    """What the norms of all these images say at the place of detection."""

    def of(self, score: Score) -> Float[np.ndarray, "layer neuron"]:
        """One score.

        Raises:
            ConfigError: there is no such score.
        """
        return self.scores[_index(score)]

    def candidates(self, keep: Keep) -> Bool[np.ndarray, "layer neuron"]:
        """Which neurons may be register neurons: a neuron that is always on is none, however active at outliers.

        "telling": the magnitude at outliers is at least five times that at normal patches; "sparse": the activation is
        below 0.5 on at least half of the normal patches, as in the code of Jiang et al. 2025; "all": Algorithm 1 as it
        stands. No floor on the AUC does what "telling" does: of planted neurons that fire on an eighth of the outliers
        each it is 0.54, of neurons of block 0 that are on everywhere up to 0.79 (docs, "Register neurons").

        Raises:
            ConfigError: there is no such choice.
        """
        check_choice("keep", keep, get_args(Keep))
        if keep == "telling":
            return self.of("mean_abs") >= TELLING * self.normal_abs
        return self.quiet >= (0.5 if keep == "sparse" else 0.0)

    def ranked(
        self, score: Score = "mean", half: int | None = None, keep: Keep = "all"
    ) -> list[tuple[int, int, float]]:
        """(layer, neuron, score), highest first; equal ones by their mean activation, as many an AUC is exactly 1."""
        every = self.scores if half is None else self.halves[half]
        values = every[_index(score)]
        order = np.lexsort((-every[_index("mean")].ravel(), -values.ravel()))
        order = order[self.candidates(keep).ravel()[order]]
        layers, neurons = np.unravel_index(order, values.shape)
        flat = values.ravel()[order]
        return [(int(a) + self.first_layer, int(b), float(c)) for a, b, c in zip(layers, neurons, flat, strict=True)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, and all four scores; highest mean first."""
        layers, width = self.scores.shape[1:]
        frame = pd.DataFrame(
            {
                "layer": np.repeat(np.arange(layers) + self.first_layer, width),
                "neuron": np.tile(np.arange(width), layers),
                **{name: self.of(name).ravel() for name in SCORES},
            }
        )
        return frame.sort_values("mean", ascending=False, kind="stable", ignore_index=True)


def score_neurons(
    vit: HookedViT,
    images: Images,
    detection: Detection,
    *,
    lowest_layer: int = 0,
    top_layer: int,
    early_stop: bool = True,
    batch_size: int = 16,
    seen: NormsAndActivations | None = None,
) -> NeuronScores:
    """Algorithm 1 in batches: one streaming pass whose memory does not grow with the number of images.

    The hidden layers are never kept: what enters each MLP is, and activations are computed again where outliers and a
    few normal patches turn out to be.

    Args:
        vit: the model, edited or not.
        images: [image, channel, height, width], or batches of them; sizes may differ from batch to batch.
        detection: where to look for outliers, and above which norm.
        lowest_layer, top_layer: the first and the last layer whose neurons are scored.
        early_stop: end each pass at the last place that matters. The scores are the same.
        batch_size: images at once when a tensor is given.
        seen: what a pass over one more batch has left behind, which counts as the first; it is used up.

    Raises:
        ImageError: no image, or no outlier in any image.
        NonFiniteError: a norm is NaN or infinite.

    Source: Jiang et al. 2025, algorithm 1.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.analysis.detection import detect
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(64, 0).images
        >>> scores = score_neurons(vit, images, detect(vit, images), top_layer=1)
        >>> [(layer, neuron) for layer, neuron, _ in scores.ranked()[:3]]
        [(1, 183), (1, 103), (1, 219)]
    """
    sums = ScoreSums(vit, detection, range(lowest_layer, top_layer + 1), early_stop)
    if seen is not None:
        with torch.inference_mode():
            sums.take(seen)
            seen.forget()
    [scores] = stream(
        vit, images, [sums], batch_size=batch_size, description="scoring neurons", allow_none=seen is not None
    )
    return scores


class ScoreSums(Sums):
    """Sums over images of what the scores are made of, apart for every other image."""

    def __init__(self, vit: HookedViT, detection: Detection, layers: range, early_stop: bool) -> None:
        super().__init__()
        self.detection, self.layers = detection, layers
        self.last = None if early_stop else f"blocks.{vit.cfg.n_layers - 1}.hook_resid_post"

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """Norms where outliers are, and what enters the MLPs."""
        self.seen = NormsAndActivations(vit, layout, self.layers, [self.detection.sublayer])
        return [*self.seen.hooks, *([(self.last, lambda resid, hook: None)] if self.last else [])]

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        self.take(self.seen)

    def take(self, recorded: NormsAndActivations) -> None:
        """Take in what a pass over a batch has left behind."""
        norms = recorded.norms(self.detection.sublayer)
        mask = self.detection.cutoff.above(norms)
        half = (torch.arange(len(norms), device=norms.device) + self.n_images) % 2
        self.add(n_images=len(norms), n_outliers=mask.sum(), **count_ratios(norms[None]))
        image, patch = mask.nonzero(as_tuple=True)
        if not len(image):
            return
        has = mask.any(1)
        normals, valid = normal_patches(norms, mask, NORMALS)
        self.add(
            with_outliers=torch.bincount(half[has], minlength=2),
            with_both=torch.bincount(half[has & valid.any(1)], minlength=2),
            with_normal=half.new_zeros(2).index_add(0, half[has], valid[has].sum(1)),
        )
        share = 1 / mask.sum(1)[image][:, None]  # of an outlier in its image's mean
        rows = has.nonzero()[:, 0]
        weight = _wide(valid[rows])[..., None]
        place = torch.zeros(len(norms), dtype=torch.long, device=norms.device)
        place[rows] = torch.arange(len(rows), device=norms.device)
        scores: dict[str, list[Float[Tensor, "half neuron"]]] = {name: [] for name in _SUMMED}
        for layer in self.layers:
            outlying = recorded.activations(layer, image, patch)
            normal = recorded.activations(layer, rows[:, None], normals[rows])
            won = _share_exceeded(outlying, normal, valid[rows], place[image])
            scores["mean"].append(_sum_by(half[image], outlying * share))
            scores["mean_abs"].append(_sum_by(half[image], outlying.abs() * share))
            scores["auc"].append(_sum_by(half[image], won * share))
            scores["normal"].append(_sum_by(half[rows], (normal * weight).sum(1)))
            scores["square"].append(_sum_by(half[rows], (normal.square() * weight).sum(1)))
            scores["normal_abs"].append(_sum_by(half[rows], (normal.abs() * weight).sum(1)))
            scores["quiet"].append(_sum_by(half[rows], ((normal < QUIET) * weight).sum(1)))
        self.add(**{name: torch.stack(values, 1) for name, values in scores.items()})

    def result(self) -> NeuronScores:
        """Everything, as means.

        Raises:
            ImageError: there was no outlier.
        """
        if not self.count("n_outliers"):
            raise ImageError(
                f"None of the {self.n_images} images has an outlier patch above the threshold. Give more images, or a "
                f"lower threshold."
            )
        means = self.means()
        n_normal = max(int(self.totals["with_normal"].sum()), 1)
        normal_abs, quiet = ((self.totals[name].sum(0) / n_normal).cpu().numpy() for name in ("normal_abs", "quiet"))
        [evidence] = judge_each(means["histogram"], means["largest_histogram"], means["largest_over_median"])
        return NeuronScores(
            first_layer=self.layers[0],
            scores=self._scores(slice(None)),
            halves=np.stack([self._scores(slice(half, half + 1)) for half in (0, 1)]),
            normal_abs=normal_abs,
            quiet=quiet,
            n_images=self.n_images,
            n_with_outliers=int(self.totals["with_outliers"].sum()),
            n_outliers=self.count("n_outliers"),
            evidence=evidence,
        )

    def _scores(self, half: slice) -> Float[np.ndarray, "score layer neuron"]:
        n_with, n_both, n_normal = (
            int(self.totals[name][half].sum()) for name in ("with_outliers", "with_both", "with_normal")
        )
        mean, mean_abs, auc, normal, square = (self.totals[name][half].sum(0).cpu() for name in _SUMMED[:5])
        n, n_normal = max(n_with, 1), max(n_normal, 1)
        average = normal / n_normal
        spread = (square / n_normal - average.square()).clamp_min(0).sqrt()
        # A neuron that is silent on normal patches has no spread there: the floor keeps its contrast finite.
        floor = 1e-3 * float(spread.mean()) + 1e-12
        contrast = (mean / n - average) / spread.clamp_min(floor)
        # Where no image has both kinds of patches there is nothing to compare: as good as chance.
        auc = auc / n_both if n_both else torch.full_like(auc, 0.5)
        return torch.stack([mean / n, mean_abs / n, contrast, auc]).numpy()


def normal_patches(
    norms: Float[Tensor, "image patch"], mask: Bool[Tensor, "image patch"], n: int
) -> tuple[Int[Tensor, "image sample"], Bool[Tensor, "image sample"]]:
    """A sample of `n` normal patches of each image, evenly spread over their norms; the same in every batching.

    Returns:
        patch indices, and which of them count: an image with fewer normal patches lists each once.

    Example:
        >>> normal_patches(torch.tensor([[1.0, 9.0, 2.0, 3.0]]), torch.tensor([[False, True, False, False]]), 2)
        (tensor([[0, 3]]), tensor([[True, True]]))
    """
    order = norms.masked_fill(mask, float("inf")).argsort(dim=-1, stable=True)
    n_normal = (~mask).sum(-1, keepdim=True)
    steps = torch.arange(n, device=norms.device)
    rank = torch.where(n_normal <= n, steps, ((steps + 0.5) * n_normal / n).long())
    return order.gather(1, rank.clamp_max(norms.shape[1] - 1)), rank < n_normal


def _sum_by(half: Int[Tensor, " row"], values: Float[Tensor, "row neuron"]) -> Float[Tensor, "half neuron"]:
    wide = _wide(values)
    return wide.new_zeros(2, values.shape[1]).index_add_(0, half, wide)


def _wide(values: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return values.float() if values.device.type == "mps" else values.double()


def _share_exceeded(
    outlying: Float[Tensor, "outlier neuron"],
    normal: Float[Tensor, "image sample neuron"],
    valid: Bool[Tensor, "image sample"],
    image: Int[Tensor, " outlier"],
) -> Float[Tensor, "outlier neuron"]:
    """For each outlier and neuron, the share of its image's normal patches below it; ties count half."""
    step = max(1, _COMPARED // normal[0].numel())
    parts = []
    for rows in torch.arange(len(outlying), device=outlying.device).split(step):
        others, counted = normal[image[rows]], valid[image[rows]][..., None]
        own = outlying[rows][:, None]
        won = ((own > others).float() + 0.5 * (own == others).float()) * counted
        parts.append(won.sum(1) / counted.sum(1).clamp_min(1))
    return torch.cat(parts)


def _index(score: str) -> int:
    check_choice("score", score, SCORES)
    return SCORES.index(cast(Score, score))

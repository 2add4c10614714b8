"""Fewer is better: the smallest set of register neurons that leaves no outlier, found greedily, and what more cost."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.detection import cuts_in, detection_in, require_outliers
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import trace
from registerlens.display import drawn_by
from registerlens.engine.views import View
from registerlens.errors import InterventionError
from registerlens.evaluation.edit_runs import find_stack, measure_edits
from registerlens.evaluation.metrics import COS_CLS, Metric, above, patch_norms
from registerlens.interventions.choosing_k import Cuts
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult
from registerlens.stats.histograms import medians


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruning(ModelResult):
    """What a test-time register achieves and costs with ever more of the register neurons."""

    neurons: RegisterNeurons
    """All that were given; first those of the smallest set, each the one that helped most when it was added."""
    smallest: int | None
    """How many of these, from the first, leave no outlier; None where not even all of them do."""
    outliers: Float[np.ndarray, " number"]
    """Patches an image that are outliers at any sublayer with 0, 1, 2 ... neurons moved."""
    cos_cls: Float[np.ndarray, " number"]
    """Cosine of the final [CLS] token to the clean run, mean over images; NaN in a model without one."""
    cos_normal: Float[np.ndarray, " number"]
    """The same of the patches that are outliers neither in the clean run nor afterwards."""

    @property
    def kept(self) -> RegisterNeurons:
        """The smallest set; all neurons where no set leaves no outlier."""
        return self.neurons.filter(top=self.smallest)

    def describe(self) -> str:
        """The smallest set, and its cost beside that of all."""
        n = len(self.neurons)
        at = n if self.smallest is None else self.smallest
        left = "leave no outlier" if self.smallest is not None else f"leave {self.outliers[-1]:.2g} outliers per image"
        costs = [f"{values[at]:.3f} (all: {values[-1]:.3f})" for values in (self.cos_cls, self.cos_normal)]
        cls = "" if np.isnan(self.cos_cls[0]) else f"[CLS] {costs[0]}, "
        return f"{at} of {n} neurons {left}. Cosine to the clean run: {cls}normal patches {costs[1]}."

    def to_dataframe(self) -> pd.DataFrame:
        """One row a number of neurons: the last one added, outliers left per image, both cosines."""
        added = [(np.nan, np.nan), *self.neurons.pairs]
        return pd.DataFrame(
            {
                "number": range(len(added)),
                "layer": pd.array([layer for layer, _ in added], dtype="Int64"),
                "neuron": pd.array([neuron for _, neuron in added], dtype="Int64"),
                "outliers": self.outliers,
                "cos_cls": self.cos_cls,
                "cos_normal": self.cos_normal,
            }
        )

    plot = drawn_by("evaluation.pruning_figure")
    """Outliers left, and both cosines, by the number of neurons."""


def prune(
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    neurons: RegisterNeurons,
    *,
    batch_size: int = 16,
) -> Pruning:
    """Greedily: add the neuron whose moving leaves fewest outliers, at whatever sublayer, until none is left.

    Equal ones go by the largest norm that is left. Once no outlier is left, the others follow in their order, so that
    the curves show what more neurons cost. Of n neurons, m in the smallest set, about n * m sets are tried.

    Args:
        vit: the model.
        images: preprocessed; others than those the neurons were found on.
        neurons: the register neurons.
        batch_size: images whose clean run is made at once.

    Raises:
        InterventionError: there is no neuron, or the model does not have one of them.
        NoOutliersError: the clean model has no outliers on these images.
        ImageError: there are no images.

    Source: Jiang et al. 2025, A.4 (fewer is better); the greedy choice is ours.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> found = prune(vit, synthetic_images(16, 1).images, neurons)
        >>> found.smallest < len(neurons), float(found.outliers[found.smallest])
        (True, 0.0)
    """
    if not len(neurons.check(vit.cfg)):
        raise InterventionError("No neuron was given. Find some with rl.find_register_neurons(vit, images).")
    traced = trace(vit, images, batch_size=batch_size)
    require_outliers(detection_in(traced), "Pruning register neurons")
    measures = [*_Measures(cuts_in(traced)).metrics(), *([COS_CLS] if vit.cfg.class_token else [])]
    stack = find_stack(vit, batch_size, (images.shape[2], images.shape[3]))

    def means(sets: list[list[tuple[int, int]]]) -> Float[np.ndarray, "set metric"]:
        edits = [[TestTimeRegisters(RegisterNeurons.from_pairs(pairs))] if pairs else [] for pairs in sets]
        values = measure_edits(vit, images, edits, measures, batch_size=batch_size, stack=stack)
        return values.nanmean(1).numpy()

    chosen, left = [], list(neurons.pairs)
    curve = [means([[]])[0]]
    while left and curve[-1][0] > 0:
        tried = means([[*chosen, pair] for pair in left])
        best = min(range(len(left)), key=lambda i: tuple(tried[i, :2]))
        chosen.append(left.pop(best))
        curve.append(tried[best])
    smallest = len(chosen) if curve[-1][0] == 0 else None
    curve += list(means([[*chosen, *left[:more]] for more in range(1, len(left) + 1)])) if left else []
    score_of = dict(zip(neurons.pairs, neurons.scores, strict=True))
    pairs = (*chosen, *left)
    outliers, _, cos_normal, *cos_cls = np.array(curve).T
    return Pruning(
        **vit.identity,
        neurons=replace(neurons, pairs=pairs, scores=tuple(score_of[pair] for pair in pairs)),
        smallest=smallest,
        outliers=outliers,
        cos_cls=cos_cls[0] if cos_cls else np.full(len(curve), np.nan),
        cos_normal=cos_normal,
    )


@dataclass(frozen=True)
class _Measures:
    """What a set of neurons is judged by, given above which norm a patch is an outlier, place by place."""

    cuts: Cuts

    def metrics(self) -> list[Metric]:
        """Outliers, the largest norm over the cut-off, and the cosine of normal patches."""
        measures = (self.outliers, self.largest, self.cos_normal)
        return [Metric(name=one.__name__, measure=one, norms=tuple(self.cuts)) for one in measures]

    def outliers(self, edited: View, clean: View) -> Float[Tensor, " batch"]:
        return self._outlying(edited, clean).sum(1).float()

    def largest(self, edited: View, clean: View) -> Float[Tensor, " batch"]:
        ratios = [
            patch_norms(edited, place).amax(1) / (cutoff.value * medians(patch_norms(clean, place))[:, 0])
            for place, cutoff in self.cuts.items()
        ]
        return torch.stack(ratios).amax(0)

    def cos_normal(self, edited: View, clean: View) -> Float[Tensor, " batch"]:
        normal = ~(self._outlying(edited, clean) | self._outlying(clean, clean))
        tokens = (view.tokens[:, view.layout.patches].float() for view in (edited, clean))
        return (F.cosine_similarity(*tokens, dim=-1) * normal).sum(1) / normal.sum(1)

    def _outlying(self, view: View, clean: View) -> Bool[Tensor, "batch patch"]:
        return torch.stack([above(place, cutoff, view, clean) for place, cutoff in self.cuts.items()]).any(0)

"""Has the phenomenon emerged? Every sign of it as a number with a threshold, on images that nothing was chosen on."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, after_onset
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import Trace, trace
from registerlens.config import ViTConfig
from registerlens.display import drawn_by
from registerlens.emergence.evidence import (
    CONDITIONS,
    FIRES,
    MEASURED,
    RANDOM_SETS,
    Evidence,
    choose,
    emerging,
    made_by_mlp,
    make_edits,
    nothing,
    prefix_tokens,
    share,
)
from registerlens.engine.stream import batches
from registerlens.errors import ConfigError, ShapeError
from registerlens.evaluation.controls import GONE
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult


@dataclass(frozen=True)
class Criterion:
    """One sign of the phenomenon."""

    name: str
    """As in the tables."""
    side: Literal[">=", "<="]
    """On which side of the threshold it holds."""
    threshold: float
    """The value from which on the criterion holds or fails."""
    words: str
    """What is measured."""

    def holds(self, value: float) -> bool:
        """Whether it does; a NaN never does."""
        return value >= self.threshold if self.side == ">=" else value <= self.threshold


CRITERIA: tuple[Criterion, ...] = tuple(
    Criterion(*values)  # type: ignore[arg-type]
    for values in (
        ("largest/median", ">=", 5.0, "largest patch norm over the median after the onset block's MLP"),
        ("bimodality", ">=", 2.0, "there, 1st percentile of outliers over 99.9th percentile of normal patches"),
        (
            "one MLP",
            ">=",
            0.5,
            "share of the whole rise of largest/median (in logarithms) that the onset block's MLP makes",
        ),
        ("sink", ">=", 0.3, "attention to outliers, mean over all queries and the layers after the onset"),
        ("value drain", "<=", 0.5, "value norms of outliers over those of other patches, mean of the same layers"),
        ("few neurons", "<=", 0.02, "register neurons as a share of all MLP neurons"),
        ("AUC, onset block", "<=", 0.1, f"share of the onset block's neurons with an AUC of at least {FIRES}"),
        ("AUC, all", "<=", 0.05, "such neurons of all blocks up to the onset, as a share of all MLP neurons"),
        ("register: outliers", "<=", GONE, "outliers left with a test-time register, as a share of those before"),
        ("register: norm", ">=", 0.5, "the register's norm over that of the outliers before"),
        ("register: attention", ">=", 0.5, "attention to the register over that to the outliers before"),
        ("register: accuracy", ">=", -0.005, "accuracy with the register less that without any edit"),
        ("zeroing: outliers", "<=", GONE, "outliers left with the neurons at zero, as a share of those before"),
        ("zeroing: accuracy", "<=", -0.005, "accuracy with the neurons at zero less that without any edit"),
        ("random: outliers", ">=", 0.95, f"fewest outliers left by {RANDOM_SETS} sets of matched random neurons"),
        ("unedited: norm", "<=", 3.0, "norm of an unedited zero register over the median"),
        ("unedited: attention", "<=", 0.05, "attention to it"),
        ("chosen patch", ">=", 0.95, "share of images whose chosen patch becomes an outlier"),
        ("chosen patch: others", "<=", GONE, "outliers left elsewhere, as a share of those before"),
    )
)
"""Thresholds stand between the models in which it emerged and those in which it did not; `zeroing: accuracy` asks that
the outliers be needed, which other cues often make up for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EmergenceCriteria(ModelResult):
    """What `emergence_criteria` found; neurons and cut-off were chosen on the first half of the images."""

    detection: Detection
    """Onset, cut-off and evidence on the images of the selection."""
    neurons: RegisterNeurons
    """The register neurons; none where nothing emerged."""
    n_selected_on: int
    """Images of the selection."""
    n_evaluated_on: int
    """Images that everything was measured on."""
    values: Float[np.ndarray, " criterion"]
    """One value for each of CRITERIA; NaN where there is nothing to measure."""
    largest_over_median: Float[np.ndarray, " sublayer"]
    """Largest patch norm over the image's median, mean over the images evaluated on."""
    untrained: Float[np.ndarray, " sublayer"]
    """The same of random weights of this architecture."""
    sink: Float[np.ndarray, " layer"]
    """Attention to outliers, mean over all queries, outliers and what precedes the patches among them."""
    value_ratio: Float[np.ndarray, " layer"]
    """Value norms of outliers over those of other patches."""
    prefix_norm: Float[np.ndarray, "sublayer prefix"]
    """Norm of [CLS] and of every trained register, in units of the image's median patch norm: outliers may go there."""
    prefix_sink: Float[np.ndarray, "layer prefix"]
    """Attention to each of them, mean over all queries."""
    quantiles: Float[np.ndarray, "2"]
    """99.9th percentile of normal patches' norms at the onset and 1st of outliers', in units of the median."""
    outliers: Float[np.ndarray, " condition"]
    """Outliers per image under each of CONDITIONS, then under every set of matched random neurons."""
    accuracy: Float[np.ndarray, " condition"]
    """Accuracy under each, 0 to 1."""
    register_norm: Float[np.ndarray, " condition"]
    """Norm of the test-time register under each, in units of the median; NaN without one."""
    register_attention: Float[np.ndarray, " condition"]
    """Attention to it, mean over the layers after the onset."""

    @property
    def onset(self) -> str | None:
        """The MLP that makes most of the outliers; None where there are none."""
        return self.detection.onset

    def holds(self, name: str) -> bool:
        """Whether one criterion does.

        Raises:
            ConfigError: there is no such criterion.
        """
        known = {criterion.name: i for i, criterion in enumerate(CRITERIA)}
        if name not in known:
            raise ConfigError(f"No criterion {name!r}. There are: {list(known)}.")
        return CRITERIA[known[name]].holds(float(self.values[known[name]]))

    @property
    def n_met(self) -> int:
        """How many criteria hold."""
        return sum(self.holds(criterion.name) for criterion in CRITERIA)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a criterion: value, threshold, whether it holds, what it measures."""
        rows = [
            {
                "criterion": criterion.name,
                "value": value,
                "threshold": f"{criterion.side} {criterion.threshold:g}",
                "holds": criterion.holds(value),
                "measures": criterion.words,
            }
            for criterion, value in zip(CRITERIA, self.values.tolist(), strict=True)
        ]
        return pd.DataFrame(rows)

    def conditions(self) -> pd.DataFrame:
        """One row a condition: outliers per image, accuracy, norm of and attention to the register."""
        names = [*CONDITIONS, *(f"matched random neurons {i + 1}" for i in range(len(self.outliers) - len(CONDITIONS)))]
        columns = {name: getattr(self, name) for name in MEASURED}
        return pd.DataFrame({"condition": names, **columns})

    plot = drawn_by("emergence.criteria_figure")
    """Norms along the depth, and who draws the attention: outliers, [CLS] or trained registers."""

    def describe(self) -> str:
        """The result in words."""
        if not self.detection.evidence.present:
            return f"{self.model}: nothing has emerged. {self.detection.evidence.reason}."
        failed = [criterion.name for criterion in CRITERIA if not self.holds(criterion.name)]
        held = f"all but {', '.join(failed)}" if failed else "every one"
        listed = "; ".join(f"block {layer}: {' '.join(map(str, ns))}" for layer, ns in self.neurons.by_layer().items())
        return (
            f"{self.model}: {self.n_met} of {len(CRITERIA)} criteria hold ({held}). Onset {self.onset}; {listed}; "
            f"{self.outliers[0]:.2f} outliers per image. Chosen on {self.n_selected_on} images, evaluated on "
            f"{self.n_evaluated_on} others."
        )


def emergence_criteria(
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    labels: Int[Tensor, "labelled ..."] | None = None,
    *,
    top_k: Literal["auto"] | int = "auto",
    batch_size: int = 64,
    seed: int = 0,
) -> EmergenceCriteria:
    """Whether register neurons have emerged in a model: every sign of it, with thresholds.

    The first half of the images selects (onset, cut-off, neurons), the second half evaluates.

    Args:
        vit: the model.
        images: preprocessed; at least 32.
        labels: as for `evaluate_intervention`; -1 where there is none. Without any, the criteria of accuracy are NaN
            and do not hold.
        top_k: how many neurons; see `find_register_neurons`.
        batch_size: images at once.
        seed: of the random neurons and the chosen patches.

    Raises:
        ShapeError: fewer than 32 images, or the labels do not fit.

    Source: the criteria follow Jiang et al. 2025: figures 2, 3, 4, 7 and 23, and algorithms 1 and 2.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import FLAT, synthetic_images
        >>> vit, batch = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(64, 0)
        >>> labels = batch.labels.masked_fill((batch.roles == FLAT)[..., None], -1)
        >>> found = emergence_criteria(vit, batch.images, labels)
        >>> found.n_met, found.onset
        (19, '1.mlp')
    """
    n_labels = len(images if labels is None else labels)
    if len(images) < 32 or len(images) != n_labels:
        raise ShapeError(f"Expected at least 32 images with a label each, got {len(images)} and {n_labels} labels.")
    half = len(images) // 2
    chosen, others = images[:half], images[half:]
    selected = trace(vit, chosen, batch_size=batch_size)
    detection = emerging(selected)
    traced = trace(vit, others, batch_size=batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = trace(HookedViT(vit.cfg).to(vit.device), others[:batch_size], batch_size=batch_size)
    result: dict[str, Any] = dict(nothing(vit.cfg.n_layers), neurons=RegisterNeurons.from_pairs([]))
    values = {"largest/median": float(traced.largest_over_median[traced.sublayers.index(detection.sublayer)])}
    if made_by_mlp(detection):
        neurons, values["AUC, onset block"], values["AUC, all"] = choose(vit, chosen, detection, top_k, batch_size)
        edits = make_edits(vit, chosen, neurons, batch_size, seed)
        measured = Evidence(vit, detection, list(edits))
        their_labels = None if labels is None else labels[half:]
        for batch in batches(vit, others, batch_size, "measuring every sign", their_labels):
            measured.add(batch.images, batch.labels, edits, seed)
        result = measured.result() | {"neurons": neurons}
        values |= _judged(traced, detection, result, vit.cfg) | measured.of_chosen_patch()
    return EmergenceCriteria(
        **vit.identity,
        detection=detection,
        n_selected_on=half,
        n_evaluated_on=len(others),
        values=np.array([values.get(criterion.name, np.nan) for criterion in CRITERIA]),
        largest_over_median=traced.largest_over_median,
        untrained=untrained.largest_over_median,
        **prefix_tokens(vit, others, batch_size),
        **result,
    )


def _judged(traced: Trace, detection: Detection, measured: dict[str, Any], cfg: ViTConfig) -> dict[str, float]:
    """The criteria's values from what was measured."""
    at = traced.sublayers.index(detection.sublayer)
    curve = np.log(traced.largest_over_median)
    after = list(after_onset(detection, cfg.n_layers))
    norm, attention = float(traced.largest_over_median[at]), float(measured["sink"][after].mean())
    change = {name: measured["accuracy"][i] - measured["accuracy"][0] for i, name in enumerate(CONDITIONS)}
    left = {name: share(measured["outliers"][i], measured["outliers"][0]) for i, name in enumerate(CONDITIONS)}
    register, unedited = CONDITIONS.index("register"), CONDITIONS.index("unedited")
    return {
        "bimodality": measured["quantiles"][1] / measured["quantiles"][0],
        "one MLP": (curve[at] - curve[at - 1]) / (curve.max() - curve[0]),
        "sink": attention,
        "value drain": measured["value_ratio"][after].mean(),
        "few neurons": len(measured["neurons"]) / (cfg.n_layers * cfg.d_mlp),
        "register: outliers": left["register"],
        "register: norm": measured["register_norm"][register] / norm,
        "register: attention": share(measured["register_attention"][register], attention),
        "register: accuracy": change["register"],
        "zeroing: outliers": left["zeroing"],
        "zeroing: accuracy": change["zeroing"],
        "random: outliers": share(measured["outliers"][len(CONDITIONS) :].min(), measured["outliers"][0]),
        "unedited: norm": measured["register_norm"][unedited],
        "unedited: attention": measured["register_attention"][unedited],
    }

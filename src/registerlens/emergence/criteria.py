"""Has the phenomenon emerged? Every sign of it as a number with a threshold, on images that nothing was chosen on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, after_onset, detection_in
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.outliers import medians, token_norms
from registerlens.analysis.predictions import classifies
from registerlens.analysis.stored import Stored
from registerlens.analysis.trace import Trace, sublayers, trace
from registerlens.config import ViTConfig
from registerlens.errors import ConfigError, ShapeError
from registerlens.evaluation.controls import matched_neurons, neuron_activity
from registerlens.evaluation.observe import Yardstick, observe
from registerlens.evaluation.verdict import GONE
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.base import Intervention, Scene
from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
from registerlens.interventions.search import find_register_neurons
from registerlens.model.vit import HookedViT

RANDOM_SETS = 5
"""Sets of activation-matched random neurons."""
FIRES = 0.95
"""A neuron whose AUC is at least this separates outliers from normal patches."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One sign of the phenomenon."""

    name: str
    """As in the tables."""
    words: str
    """What is measured."""
    side: Literal[">=", "<="]
    """On which side of the threshold it holds."""
    threshold: float
    """From where on."""

    def holds(self, value: float) -> bool:
        """Whether it does; a NaN never does."""
        return value >= self.threshold if self.side == ">=" else value <= self.threshold


CRITERIA: tuple[Criterion, ...] = tuple(
    Criterion(name=name, words=words, side=side, threshold=threshold)  # type: ignore[arg-type]
    for name, side, threshold, words in (
        ("largest/median", ">=", 5.0, "largest patch norm over the median after the onset block's MLP"),
        ("bimodality", ">=", 2.0, "there, 1st percentile of outliers over 99.9th percentile of normal patches"),
        ("one MLP", ">=", 0.5, "share of the rise of largest/median (in logarithms) that the onset block's MLP makes"),
        ("sink", ">=", 0.3, "attention to outliers, mean over queries (or [CLS]) and the layers after the onset"),
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
class EmergenceCriteria(Stored):
    """What `emergence_criteria` found; neurons and cut-off were chosen on the first half of the images."""

    model: str
    """Where the model came from."""
    config: ViTConfig
    """Its architecture."""
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
    """Attention to outliers, mean over queries, or that of [CLS]."""
    value_ratio: Float[np.ndarray, " layer"]
    """Value norms of outliers over those of other patches."""
    prefix_norm: Float[np.ndarray, "sublayer prefix"]
    """Norm of [CLS] and of every trained register, in units of the image's median patch norm: outliers may go there."""
    prefix_sink: Float[np.ndarray, "layer prefix"]
    """Attention to each of them, mean over queries, or that of [CLS]."""
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
        """The sublayer where outliers arise; None where there are none."""
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
                "criterion": one.name,
                "value": value,
                "threshold": f"{one.side} {one.threshold:g}",
                "holds": one.holds(value),
                "measures": one.words,
            }
            for one, value in zip(CRITERIA, self.values.tolist(), strict=True)
        ]
        return pd.DataFrame(rows)

    def conditions(self) -> pd.DataFrame:
        """One row a condition: outliers per image, accuracy, norm of and attention to the register."""
        names = [*CONDITIONS, *(f"matched random neurons {i + 1}" for i in range(len(self.outliers) - len(CONDITIONS)))]
        columns = {name: getattr(self, name) for name in _MEASURED}
        return pd.DataFrame({"condition": names, **columns})

    def describe(self) -> str:
        """The result in words."""
        if not self.detection.evidence.present:
            return f"{self.model}: nothing has emerged. {self.detection.evidence.reason}."
        failed = [one.name for one in CRITERIA if not self.holds(one.name)]
        told = f"all but {', '.join(failed)}" if failed else "every one"
        listed = "; ".join(f"block {layer}: {' '.join(map(str, ns))}" for layer, ns in self.neurons.by_layer().items())
        return (
            f"{self.model}: {self.n_met} of {len(CRITERIA)} criteria hold ({told}). Onset {self.onset}; {listed}; "
            f"{self.outliers[0]:.2f} outliers per image. Chosen on {self.n_selected_on} images, evaluated on "
            f"{self.n_evaluated_on} others."
        )


CONDITIONS = ("clean", "register", "zeroing", "unedited", "chosen patch")
"""What is done to the model."""
_MEASURED = ("outliers", "accuracy", "register_norm", "register_attention")


def emergence_criteria(
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    labels: Int[Tensor, "labelled ..."],
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
        labels: as for `evaluate_intervention`; -1 where there is none.
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
    if len(images) < 32 or len(images) != len(labels):
        raise ShapeError(f"Expected at least 32 images with a label each, got {len(images)} and {len(labels)} labels.")
    half = len(images) // 2
    chosen, others = images[:half], images[half:]
    selected = trace(vit, chosen, batch_size=batch_size)
    detection = detection_in(selected, selected.onset)
    seen = trace(vit, others, batch_size=batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = trace(HookedViT(vit.cfg).to(vit.device), others[:batch_size], batch_size=batch_size)
    result: dict[str, Any] = dict(_nothing(vit.cfg.n_layers), neurons=RegisterNeurons.from_pairs([]))
    values = {"largest/median": float(seen.largest_over_median[seen.sublayers.index(detection.sublayer)])}
    if detection.evidence.present and detection.sublayer.endswith("mlp"):
        neurons, values["AUC, onset block"], values["AUC, all"] = _choose(vit, chosen, detection, top_k, batch_size)
        edits = _edits(vit, chosen, neurons, batch_size, seed)
        measured = _Evaluation(vit, detection, list(edits))
        for part, told in zip(others.split(batch_size), labels[half:].split(batch_size), strict=True):
            measured.add(part, told, edits, seed)
        result = measured.result() | {"neurons": neurons}
        values |= _judged(seen, detection, result, vit.cfg) | measured.of_chosen_patch()
    return EmergenceCriteria(
        model=vit.source,
        config=vit.cfg,
        detection=detection,
        n_selected_on=half,
        n_evaluated_on=len(others),
        values=np.array([values.get(one.name, np.nan) for one in CRITERIA]),
        largest_over_median=seen.largest_over_median,
        untrained=untrained.largest_over_median,
        **_prefix(vit, others, batch_size),
        **result,
    )


def _prefix(vit: HookedViT, images: Tensor, batch_size: int) -> dict[str, Float[np.ndarray, "..."]]:
    """What stands before the patches: its norms and the attention to it, mean over images."""
    norms, sinks = [], []
    with torch.inference_mode():
        for batch in images.split(batch_size):
            seen = observe(vit, batch)
            patches = seen.layout.patches
            norms.append(seen.norms[..., : patches.start] / medians(seen.norms[..., patches]))
            sinks.append(seen.attention[..., : patches.start])
    found = {"prefix_norm": torch.cat(norms, 1), "prefix_sink": torch.cat(sinks, 1)}
    return {name: each.mean(1).cpu().double().numpy() for name, each in found.items()}


def _choose(
    vit: HookedViT, images: Tensor, detection: Detection, top_k: Literal["auto"] | int, batch_size: int
) -> tuple[RegisterNeurons, float, float]:
    """Register neurons; the share of neurons that tell outliers apart, in the onset block and of the whole model."""
    options: dict[str, Any] = {"detection_layer": detection.sublayer, "top_layer": detection.layer, "top_k": top_k}
    found = find_register_neurons(vit, images, batch_size=batch_size, **options)
    assert found.search is not None
    firing = found.search.scores.of("auc") >= FIRES
    neurons = replace(found, search=None, found={})
    return neurons, float(firing[-1].mean()), float(firing.sum() / (vit.cfg.n_layers * vit.cfg.d_mlp))


def _edits(
    vit: HookedViT, images: Tensor, neurons: RegisterNeurons, batch_size: int, seed: int
) -> dict[str, Intervention | None]:
    """What is done under every condition; None is nothing."""
    activity = neuron_activity(vit, images, list(neurons.by_layer()), batch_size)
    generator = torch.Generator().manual_seed(seed)
    return {
        "clean": None,
        "register": TestTimeRegisters(neurons),
        "zeroing": Ablate(neurons),
        "unedited": TestTimeRegisters(RegisterNeurons.from_pairs([])),
        "chosen patch": MoveOutliers(neurons, 0),  # each image gets one of its own
        **{f"random {i}": TestTimeRegisters(matched_neurons(neurons, activity, generator)) for i in range(RANDOM_SETS)},
    }


class _Evaluation:
    """Everything that is measured image by image, under every condition."""

    def __init__(self, vit: HookedViT, detection: Detection, conditions: list[str]) -> None:
        self.vit, self.detection = vit, detection
        self.place = sublayers(vit.cfg.n_layers).index(detection.sublayer)
        self.layers = after_onset(detection, vit.cfg.n_layers)
        self.rows: dict[str, list[dict[str, Tensor]]] = {name: [] for name in conditions}
        self.sinks: list[Float[Tensor, "layer batch"]] = []
        self.value_norms: list[Float[Tensor, "layer batch patch"]] = []
        self.norms: list[Float[Tensor, "batch patch"]] = []
        self.masks: list[Bool[Tensor, "batch patch"]] = []

    def add(self, images: Tensor, labels: Tensor, edits: dict[str, Intervention | None], seed: int) -> None:
        """Take in one batch."""
        vit = self.vit
        with torch.inference_mode():
            values: list[Tensor] = []
            keep = ("blocks.*.attn.hook_v", lambda v, hook: values.append(token_norms(v).mean(-1)))
            with vit.hooks([keep]):
                clean = observe(vit, images)
            ruler = Yardstick(clean, self.place, self.detection.cutoff, self.layers, labels, classifies(vit.cfg))
            self.rows["clean"].append(ruler.measure(clean))
            patches = clean.layout.patches
            self.sinks.append((clean.attention[..., patches] * ruler.mask).sum(-1))
            self.value_norms.append(torch.stack(values)[..., patches])
            self.norms.append(clean.norms[self.place][:, patches] / ruler.median)
            self.masks.append(ruler.mask)
            generator = torch.Generator().manual_seed(seed + len(self.masks))
            for name, edit in edits.items():
                if edit is None:
                    continue
                moving = isinstance(edit, MoveOutliers)
                here = replace(edit, positions=_one_normal_patch(ruler.mask, generator)) if moving else edit
                with vit.edit(here):
                    seen = observe(vit, images)
                self.rows[name].append(ruler.measure(seen, here.aim(Scene(seen.layout, images))))

    def mean(self, metric: str, condition: str) -> float:
        """Over all images; NaN where a condition has no such thing."""
        rows = self.rows[condition]
        return float(torch.cat([row[metric].float() for row in rows]).nanmean()) if metric in rows[0] else np.nan

    def of_chosen_patch(self) -> dict[str, float]:
        """The two criteria that no other condition has."""
        others = self.mean("old_outliers", "chosen patch") + self.mean("new_outliers", "chosen patch")
        placed = self.mean("placed", "chosen patch")
        return {"chosen patch": placed, "chosen patch: others": _share(others, self.mean("outliers", "clean"))}

    def result(self) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays of `EmergenceCriteria`."""
        mask, norms, values = torch.cat(self.masks), torch.cat(self.norms), torch.cat(self.value_norms, 1)
        ratio = torch.stack([layer[mask].mean() / layer[~mask].mean() for layer in values])
        found = {"sink": torch.cat(self.sinks, 1).mean(1), "value_ratio": ratio}
        outlying = norms[mask].quantile(0.01) if mask.any() else torch.tensor(torch.nan)
        found["quantiles"] = torch.stack([norms[~mask].quantile(0.999), outlying.to(norms)])
        names = dict(zip(_MEASURED, ("outliers", "accuracy", "register_norm", "sink_register"), strict=True))
        means = {
            name: np.array([self.mean(metric, condition) for condition in self.rows]) for name, metric in names.items()
        }
        return {name: tensor.cpu().double().numpy() for name, tensor in found.items()} | means


def _one_normal_patch(mask: Bool[Tensor, "batch patch"], generator: torch.Generator) -> Any:
    """A function of the images that gives each of them one patch that is no outlier, at random."""
    drawn = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(mask, -1)
    return lambda images: drawn.argmax(1, keepdim=True)


def _judged(seen: Trace, detection: Detection, found: dict[str, Any], cfg: ViTConfig) -> dict[str, float]:
    """The criteria's values from what was measured."""
    at = seen.sublayers.index(detection.sublayer)
    curve = np.log(seen.largest_over_median)
    after = list(after_onset(detection, cfg.n_layers))
    norm, drawn = float(seen.largest_over_median[at]), float(found["sink"][after].mean())
    change = {name: found["accuracy"][i] - found["accuracy"][0] for i, name in enumerate(CONDITIONS)}
    left = {name: _share(found["outliers"][i], found["outliers"][0]) for i, name in enumerate(CONDITIONS)}
    register, unedited = CONDITIONS.index("register"), CONDITIONS.index("unedited")
    return {
        "bimodality": found["quantiles"][1] / found["quantiles"][0],
        "one MLP": (curve[at] - curve[at - 1]) / (curve[at] - curve[0]),
        "sink": drawn,
        "value drain": found["value_ratio"][after].mean(),
        "few neurons": len(found["neurons"]) / (cfg.n_layers * cfg.d_mlp),
        "register: outliers": left["register"],
        "register: norm": found["register_norm"][register] / norm,
        "register: attention": _share(found["register_attention"][register], drawn),
        "register: accuracy": change["register"],
        "zeroing: outliers": left["zeroing"],
        "zeroing: accuracy": change["zeroing"],
        "random: outliers": _share(found["outliers"][len(CONDITIONS) :].min(), found["outliers"][0]),
        "unedited: norm": found["register_norm"][unedited],
        "unedited: attention": found["register_attention"][unedited],
    }


def _share(value: float, of: float) -> float:
    return float(value) / float(of) if of else np.nan


def _nothing(n_layers: int) -> dict[str, Float[np.ndarray, "..."]]:
    """The arrays where there is nothing to measure."""
    conditions = dict.fromkeys(_MEASURED, len(CONDITIONS) + RANDOM_SETS)
    lengths = {"sink": n_layers, "value_ratio": n_layers, "quantiles": 2, **conditions}
    return {name: np.full(n, np.nan) for name, n in lengths.items()}

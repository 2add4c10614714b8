"""Does an intervention do what it should? Before, after and controls side by side, and a verdict that can be "no"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import (
    Detection,
    Threshold,
    after_onset,
    detect,
    detection_in,
    require_outliers,
)
from registerlens.analysis.outliers import RATIOS, OutlierEvidence, count_ratios, judge_each
from registerlens.analysis.trace import trace
from registerlens.data.batches import Images, count
from registerlens.display import drawn_by
from registerlens.engine.stream import Sums, batches
from registerlens.errors import ConfigError, ImageError, ShapeError
from registerlens.evaluation.controls import ConditionKind, Verdict, build_baselines, build_controls, judge_effect
from registerlens.evaluation.observe import METRICS, Observation, Yardstick, observe
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.base import Intervention, Scene, plan
from registerlens.model.sublayers import sublayers
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult
from registerlens.stats.histograms import medians
from registerlens.stats.intervals import mean_intervals

CLEAN = "clean"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation(ModelResult):
    """What interventions and their controls do to a model."""

    detection: Detection
    """Where outliers were counted, and above which norm."""
    conditions: tuple[str, ...]
    """"clean" first, then the interventions, then baselines and controls."""
    kinds: tuple[ConditionKind, ...]
    """What each condition is there for."""
    interventions: tuple[str, ...]
    """What each condition did, in words."""
    metrics: tuple[str, ...]
    """Names of METRICS that the model has; `evaluation.observe.METRICS` explains them."""
    values: Float[np.ndarray, "condition metric image"]
    """Each metric of each image; NaN where a condition has no such thing."""
    sublayers: tuple[str, ...]
    """Places of the norm curves."""
    norm_curve: Float[np.ndarray, "condition sublayer"]
    """Largest patch norm, mean over images."""
    register_curve: Float[np.ndarray, "condition sublayer"]
    """Largest norm of a test-time register, mean over images; NaN without one."""
    sink_curve: Float[np.ndarray, "condition layer"]
    """Largest attention to one patch (mean over heads, 0 to 1), mean over images."""
    register_sink_curve: Float[np.ndarray, "condition layer"]
    """Attention to test-time registers or bias, mean over images; NaN without."""
    verdicts: dict[str, Verdict]
    """For each intervention, whether it worked, in words."""

    @property
    def n_images(self) -> int:
        """Images that went through."""
        return self.values.shape[2]

    def of(self, metric: str, condition: str) -> Float[np.ndarray, " image"]:
        """One metric of one condition, image by image.

        Raises:
            ConfigError: there is no such metric or condition.
        """
        if metric not in self.metrics or condition not in self.conditions:
            raise ConfigError(
                f"No metric {metric!r} of condition {condition!r}. Metrics: {list(self.metrics)}; conditions: "
                f"{list(self.conditions)}."
            )
        return self.values[self.conditions.index(condition), self.metrics.index(metric)]

    def mean(self, metric: str, condition: str) -> float:
        """Mean over the images that have a value; NaN if none has."""
        values = self.of(metric, condition)
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    def to_dataframe(self) -> pd.DataFrame:
        """One row a condition and metric: mean, its 95% interval, the same of the difference to the clean run.

        Differences are paired, image by image. Intervals are those of `mean_intervals`; below 8 images there are none.
        """
        frame = pd.DataFrame({"condition": self.conditions, "kind": self.kinds})
        parts = []
        for m, metric in enumerate(self.metrics):
            values = self.values[:, m]
            columns = dict(zip(("mean", "low", "high"), mean_intervals(values), strict=True))
            names = ("difference", "difference_low", "difference_high")
            columns |= dict(zip(names, mean_intervals(values - values[0]), strict=True))
            part = frame.assign(metric=metric, **columns)
            parts.append(part[~np.isnan(values).all(axis=1)])
        return pd.concat(parts, ignore_index=True)

    def describe(self) -> str:
        """The verdicts in words, one a line."""
        return "\n".join(f"{name}: {verdict.words}" for name, verdict in self.verdicts.items())

    plot = drawn_by("evaluation.evaluation_figure")
    """Norms and sinks layer by layer, and the telling metrics with intervals, for every condition."""


def evaluate_intervention(
    vit: HookedViT,
    images: Images,
    intervention: Intervention | Mapping[str, Intervention],
    *,
    labels: Int[Tensor, "image ..."] | None = None,
    controls: bool = True,
    layer: Literal["auto"] | int | str = "auto",
    threshold: Threshold = "auto",
    batch_size: int = 16,
    seed: int = 0,
) -> Evaluation:
    """Measure an intervention, or several, beside the clean model, baselines and controls.

    Baselines: zeroing the same neurons, setting them to their mean, and the outlier patches overwritten by their
    neighbours. Controls: the same intervention on random neurons (as many in each layer, 3 draws), on
    activation-matched random neurons (3 draws), and on random neurons that get the register neurons' maxima
    (figure 24). Those about neurons are made for the first intervention.

    The verdict looks at every sublayer of the edited model, as a trace of it does: outliers that are left or new
    anywhere, other than where they were asked for, are no success.

    Args:
        vit: the model.
        images: preprocessed, as a tensor or in batches that can be iterated several times. Use others than those the
            neurons were found on.
        intervention: one, or several by name.
        labels: [image] classes, or as the output's leading axes say ([image, patch] for a head on every patch), or with
            one more axis for several equal groups of classes; -1 where there is none.
        controls: leave them and the baselines out with False.
        threshold, layer: what counts as an outlier; as for `find_outliers`.
        batch_size: images at once when a tensor is given.
        seed: of the random neurons.

    Raises:
        NoOutliersError: the clean model has no outliers and no threshold is given.
        ConfigError: no intervention is given, or one has the name of the clean model, a baseline or a control.
        ImageError: there are no images, or the batches can be iterated only once.
        InterventionError: the intervention does not fit the model, or never fires.
        ShapeError: the labels do not fit.

    Source: Jiang et al. 2025, figures 4, 8, 22, 23, 24 and tables 7, 8; Parodi et al. 2026 for the controls.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> neurons = rl.find_register_neurons(vit, synthetic_images(64, 0).images)
        >>> done = evaluate_intervention(vit, synthetic_images(32, 1).images, rl.TestTimeRegisters(neurons))
        >>> done.verdicts["TestTimeRegisters"].worked, done.mean("outliers", "TestTimeRegisters")
        (True, 0.0)
    """
    tested = intervention if isinstance(intervention, Mapping) else {type(intervention).__name__: intervention}
    _check(tested, images)
    plan(vit, list(tested.values()))  # refuses what does not fit the model before any work
    if labels is not None and count(images) not in (None, len(labels)):
        raise ShapeError(f"{len(labels)} labels for {count(images)} images; one for each is needed.")
    detection, baseline_at = _where(vit, images, threshold, layer, batch_size)
    require_outliers(detection, "Evaluating an intervention")
    baselines, controlled = {}, {}
    if controls:
        first = next(iter(tested.values()))
        baselines = build_baselines(vit, images, first, baseline_at, batch_size)
        controlled = build_controls(vit, images, first, seed, batch_size)
    against = baselines | controlled
    if taken := sorted(tested.keys() & against.keys()):
        raise ConfigError(
            f"Interventions are named {taken}, as baselines or controls are: {sorted(against)}. Give them other names, "
            f"or pass controls=False."
        )
    done: dict[str, Intervention | None] = {CLEAN: None, **tested, **against}
    kinds = {CLEAN: ConditionKind.CLEAN, **dict.fromkeys(tested, ConditionKind.TESTED)}
    kinds |= dict.fromkeys(baselines, ConditionKind.BASELINE) | dict.fromkeys(controlled, ConditionKind.CONTROL)
    sums = _EvaluationSums(list(done), vit.cfg.n_layers)
    place, layers = sums.sublayers.index(detection.sublayer), after_onset(detection, vit.cfg.n_layers)
    with torch.inference_mode():
        for batch in batches(vit, images, batch_size, "evaluating", labels):
            sums.add(n_images=len(batch))
            clean = observe(vit, batch.images)
            ruler = Yardstick(clean, place, detection.cutoff, layers, batch.labels, vit.cfg)
            for name, one in done.items():
                if one is None:
                    sums.take(name, clean, ruler.measure(clean), None)
                    continue
                with vit.edit(one):
                    observed = observe(vit, batch.images)
                aim = one.aim(Scene(observed.layout, batch.images))
                sums.take(name, observed, ruler.measure(observed, aim), aim)
    measured = sums.result()
    verdicts = {
        name: judge_effect(
            measured["metrics"], measured["values"], kinds, name, sums.evidence(name), isinstance(one, Ablate)
        )
        for name, one in tested.items()
    }
    return Evaluation(
        **vit.identity,
        detection=detection,
        conditions=tuple(done),
        kinds=tuple(kinds.values()),
        interventions=tuple("" if one is None else repr(one) for one in done.values()),
        sublayers=sums.sublayers,
        verdicts=verdicts,
        **measured,
    )


class _EvaluationSums(Sums):
    """Per-image metrics, and sums of the curves by condition and curve."""

    def __init__(self, conditions: list[str], n_layers: int) -> None:
        super().__init__()
        self.sublayers = sublayers(n_layers)
        self.rows: dict[str, dict[str, list[Tensor]]] = {name: {} for name in conditions}

    def take(
        self,
        condition: str,
        observed: Observation,
        measured: dict[str, Float[Tensor, " batch"]],
        aim: Bool[Tensor, "#batch patch"] | None,
    ) -> None:
        for metric, values in measured.items():
            self.rows[condition].setdefault(metric, []).append(values.float().cpu())
        patches, stop = observed.layout.patches, observed.layout.patches.stop
        curves = {
            "norm_curve": observed.norms[:, :, patches].amax(-1),
            "sink_curve": observed.attention[:, :, patches].amax(-1),
        }
        if observed.layout.n_test_time_registers:
            curves["register_curve"] = observed.norms[:, :, stop:].amax(-1)
        if observed.attention.shape[-1] > stop:
            curves["register_sink_curve"] = observed.attention[:, :, stop:].sum(-1)
        self.add(**{f"{condition} {name}": values.sum(1) for name, values in curves.items()})
        norms = observed.norms[:, :, patches]
        if aim is not None:  # outliers that were asked for speak neither for nor against
            norms = norms.where(~aim.to(norms.device), medians(norms))
        self.add(**{f"{condition} {name}": values for name, values in count_ratios(norms).items()})

    def evidence(self, condition: str) -> dict[str, OutlierEvidence]:
        """What a trace of the edited model would say at each sublayer, patches that were aimed at left out."""
        means = self.means()
        judged = judge_each(*(means[f"{condition} {name}"] for name in RATIOS))
        return dict(zip(self.sublayers, judged, strict=True))

    def result(self) -> dict[str, Any]:
        n, means = self.n_images, self.means()
        metrics = tuple(name for name in METRICS if any(name in rows for rows in self.rows.values()))
        nothing = np.full(n, np.nan)
        values = [
            [torch.cat(rows[name]).double().numpy() if name in rows else nothing for name in metrics]
            for rows in self.rows.values()
        ]
        sizes = {name: len(self.sublayers) for name in ("norm_curve", "register_curve")}
        sizes |= {name: len(self.sublayers) // 2 for name in ("sink_curve", "register_sink_curve")}
        curves = {
            name: np.stack([means.get(f"{condition} {name}", np.full(size, np.nan)) for condition in self.rows])
            for name, size in sizes.items()
        }
        return {"metrics": metrics, "values": np.array(values), **curves}


def _where(
    vit: HookedViT, images: Images, threshold: Threshold, layer: Any, batch_size: int
) -> tuple[Detection, Detection | None]:
    """Where outliers are counted, and where the baseline overwrites them: as soon as they arise."""
    if threshold in ("auto", "gap") and layer == "auto":
        traced = trace(vit, images, batch_size=batch_size)
        detection = detection_in(traced)
        return detection, None if traced.onset is None else detection_in(traced, traced.onset)
    detection = detect(vit, images, threshold=threshold, layer=layer, batch_size=batch_size)
    return detection, detection


def _check(tested: Mapping[str, Any], images: Images) -> None:
    if not tested:
        raise ConfigError("No intervention was given. Give one, such as rl.TestTimeRegisters(neurons).")
    if CLEAN in tested:
        raise ConfigError(f"{CLEAN!r} is the name of the unedited model; call the intervention something else.")
    if not isinstance(images, Tensor) and isinstance(images, Iterable) and iter(images) is images:
        raise ImageError(
            "The images are needed several times, but this iterator can be used once. Give a tensor, a list of "
            "batches, or an rl.data.ImageStream."
        )

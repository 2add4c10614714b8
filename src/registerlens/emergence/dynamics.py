"""Which comes first in training: the attention sink, the drained values, or the norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import find_outliers, require_outliers
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import trace
from registerlens.emergence.evidence import choose, emerging, made_by_mlp
from registerlens.emergence.run import TrainingRun, held_out_images
from registerlens.errors import ConfigError
from registerlens.evaluation.observe import observe
from registerlens.model.parts import token_norms
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.results import Result
from registerlens.stats.histograms import medians
from registerlens.stats.intervals import LEAST_IMAGES, LEVEL, interval_words, resample

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIGNS = ("sink", "value drain", "norm")
"""What may come first."""
CHOOSING, FOLLOWING = 3, 4
"""Parts of the held-out images: for the choice of neurons, and for everything that is shown."""
HALFWAY = 0.5
"""A sign has set in when it has come so far from its first value to its last one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dynamics(Result):
    """What the tokens that end as outliers went through, at every checkpoint of a run."""

    run: str
    """Name of the run's folder."""
    seed: int
    """Its seed."""
    steps: tuple[int, ...]
    """Steps of the checkpoints."""
    neurons: RegisterNeurons
    """The neurons that are followed, most active first."""
    n_images: int
    """Images that everything was measured on, the same at every checkpoint."""
    norm: Float[np.ndarray, "step sublayer image"]
    """Norm of an image's outliers over the median of its patches, mean over the outliers."""
    sink: Float[np.ndarray, "step layer image"]
    """Attention (0 to 1) to an image's outliers, mean over queries."""
    value_ratio: Float[np.ndarray, "step layer image"]
    """Value norms of an image's outliers over those of its other patches."""
    activation: Float[np.ndarray, "step neuron"]
    """Mean activation of the neurons at outliers."""
    elsewhere: Float[np.ndarray, "step neuron"]
    """The same at other patches."""
    output_norm: Float[np.ndarray, "step neuron"]
    """Norm of the neurons' rows of W_out."""
    alignment: Float[np.ndarray, "step neuron"]
    """Cosine of such a row to the mean of all of them at the last checkpoint."""

    @property
    def layers(self) -> slice:
        """Layers in which attention meets what the neurons write."""
        last = max(self.neurons.by_layer())
        return slice(min(last + 1, self.sink.shape[1] - 1), None)

    def course(self, sign: str) -> Float[np.ndarray, "step image"]:
        """How one of SIGNS developed: attention to outliers and their values' norm, mean over the layers after the
        neurons'; their norm after the neurons' layer, in logarithms.

        Raises:
            ConfigError: there is no such sign.
        """
        if sign not in SIGNS:
            raise ConfigError(f"There is no sign {sign!r}. There are: {list(SIGNS)}.")
        if sign == "norm":
            return np.log(self.norm[:, 2 * max(self.neurons.by_layer()) + 2])
        return (self.sink if sign == "sink" else self.value_ratio)[:, self.layers].mean(1)

    def share(self, sign: str) -> Float[np.ndarray, " step"]:
        """How far a sign has come from its first value (0) to its last one (1), mean over images."""
        course = self.course(sign).mean(1)
        return (course - course[0]) / (course[-1] - course[0])

    def onsets(self, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row a sign: the step at which it set in, with its 95% interval, and how often it came first.

        Rule: a sign sets in when the mean over images is first halfway from its value at the first checkpoint to that
        at the last one (`step`), interpolated between checkpoints. It may fall back: `lasting` is the step from which
        it is beyond halfway for good. Intervals (of `step`) are percentiles over `n_boot` bootstrap samples of the
        images, from 8 images on; `first` is the share of samples in which a sign set in before the other two.
        """
        steps, times = np.array(self.steps), resample(self.n_images, n_boot, seed)
        samples = np.stack([_halfway(steps, self.course(sign) @ times / self.n_images)[0] for sign in SIGNS])
        earliest = samples == samples.min(0)
        alone = earliest & (earliest.sum(0) == 1)
        rows = []
        for i, sign in enumerate(SIGNS):
            step, lasting = _halfway(steps, self.course(sign).mean(1, keepdims=True))[:, 0]
            low, high = np.percentile(samples[i], LEVEL) if self.n_images >= LEAST_IMAGES else (np.nan, np.nan)
            row = {"run": self.run, "seed": self.seed, "sign": sign, "step": step, "low": low, "high": high}
            rows.append(row | {"lasting": lasting, "first": alone[i].mean()})
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a checkpoint: the three signs, and activation and output of the neurons."""
        columns = {"step": self.steps}
        columns |= {sign: self.course(sign).mean(1) for sign in ("sink", "value drain")}  # type: ignore[dict-item]
        columns["norm"] = np.exp(self.course("norm").mean(1))  # type: ignore[assignment]
        for name in ("activation", "elsewhere", "output_norm", "alignment"):
            columns[name] = getattr(self, name).mean(1)
        return pd.DataFrame({"run": self.run, "seed": self.seed, **columns})

    def describe(self) -> str:
        """The order in words."""
        onsets = self.onsets().sort_values("step")
        columns = ["sign", "step", "low", "high", "lasting"]
        order = "; ".join(
            f"{sign} at {step:.0f} ({interval_words(low, high)}), for good from {lasting:.0f}"
            for sign, step, low, high, lasting in onsets[columns].itertuples(index=False)
        )
        return f"{self.run}, step at which each sign was halfway: {order}."

    def plot(self) -> go.Figure:
        """The three signs over the steps, and the neurons."""
        from registerlens.viz.emergence import dynamics_figure

        return dynamics_figure([self])


def training_dynamics(
    run: TrainingRun, neurons: RegisterNeurons | None = None, *, n_images: int = 256, batch_size: int = 64
) -> Dynamics:
    """Follow the patches that end as outliers, and the neurons that make them so, through a run's checkpoints.

    Args:
        run: the run.
        neurons: those to follow; default: the register neurons of the last checkpoint, found on other images.
        n_images: held-out images to measure on; those without an outlier are left out.
        batch_size: images at once where neurons and outliers are searched.

    Raises:
        NoOutliersError: the last checkpoint has no outliers.
        ConfigError: there are fewer than two checkpoints, or no MLP makes the outliers.
    """
    if len(run.checkpoints) < 2:
        raise ConfigError(f"Dynamics need at least two checkpoints; '{run.folder}' has {len(run.checkpoints)}.")
    last = run.vit()
    choosing, images = (held_out_images(run.config, n_images, part).images for part in (CHOOSING, FOLLOWING))
    if neurons is None:
        detection = emerging(trace(last, choosing, batch_size=batch_size))
        require_outliers(detection, "Following a run")
        if not made_by_mlp(detection):
            raise ConfigError(f"Outliers arise at {detection.sublayer}, which has no neurons. Give neurons to follow.")
        neurons, *_ = choose(last, choosing, detection, "auto", batch_size)
    outliers = find_outliers(last, images, batch_size=batch_size)
    require_outliers(outliers.detection, "Following a run")
    with_outliers = outliers.mask.any(1)
    images, mask = images[with_outliers], outliers.mask[with_outliers]
    with torch.inference_mode():
        steps = track(run.checkpoints, "following", len(run.checkpoints))
        rows = [_look(run.vit(step), neurons, images, mask) for step in steps]
    courses = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    written = courses.pop("written")
    return Dynamics(
        run=run.folder.name,
        seed=run.config.seed,
        steps=run.checkpoints,
        neurons=replace(neurons, search=None, found={}),
        n_images=len(images),
        output_norm=written.norm(dim=-1).numpy(),
        alignment=torch.cosine_similarity(written, written[-1].mean(0), dim=-1).numpy(),
        **{name: tensor.numpy() for name, tensor in courses.items()},
    )


def _look(
    vit: HookedViT, neurons: RegisterNeurons, images: Tensor, mask: Bool[Tensor, "image patch"]
) -> dict[str, Tensor]:
    """One checkpoint."""
    values: list[Tensor] = []
    posts: dict[int, Tensor] = {}
    layers = list(neurons.by_layer())
    hooks = [
        ("blocks.*.attn.hook_v", lambda v, hook: values.append(token_norms(v).mean(-1))),
        ([f"blocks.{layer}.mlp.hook_post" for layer in layers], lambda post, hook: posts.update({hook.layer(): post})),
    ]
    with vit.hooks(hooks):
        view = observe(vit, images, "all")
    patches = view.layout.patches
    norms, drained = view.norms[..., patches], torch.stack(values)[..., patches]
    acts = torch.stack([posts[layer][:, patches, neuron] for layer, neuron in neurons.pairs])
    written = [vit.blocks[layer].mlp.W_out[neuron] for layer, neuron in neurons.pairs]  # type: ignore[union-attr]
    return {
        "norm": _mean_at(norms / medians(norms), mask),
        "sink": (view.attention[..., patches] * mask).sum(-1),
        "value_ratio": _mean_at(drained, mask) / _mean_at(drained, ~mask),
        "activation": acts[:, mask].mean(1),
        "elsewhere": acts[:, ~mask].mean(1),
        "written": torch.stack(written),
    }


def _mean_at(
    values: Float[Tensor, "place image patch"], mask: Bool[Tensor, "image patch"]
) -> Float[Tensor, "place image"]:
    return (values * mask).sum(-1) / mask.sum(-1)


def _halfway(
    steps: Int[np.ndarray, " step"], course: Float[np.ndarray, "step sample"]
) -> Float[np.ndarray, "2 sample"]:
    """When each course is halfway from its first to its last value: at first, and for good; linear between checkpoints.

    Example:
        >>> _halfway(np.array([0, 10, 20, 30]), np.array([[0.0], [1.0], [0.2], [1.0]]))[:, 0]
        array([ 5.  , 23.75])
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # a course that ends where it began: NaN
        share = (course - course[0]) / (course[-1] - course[0])
        beyond, each = share >= HALFWAY, np.arange(course.shape[1])
        first = np.maximum(beyond.argmax(0), 1)
        lasting = np.clip(len(share) - (~beyond)[::-1].argmax(0), 1, len(share) - 1)
        after = np.stack([first, lasting])
        low, high = share[after - 1, each], share[after, each]
        return steps[after - 1] + (steps[after] - steps[after - 1]) * (HALFWAY - low) / (high - low)


def order_of_signs(runs: Sequence[Dynamics]) -> pd.DataFrame:
    """Onset steps of every sign in several runs, side by side; see `Dynamics.onsets`.

    Raises:
        ConfigError: no run was given.
    """
    if not runs:
        raise ConfigError("No run was given.")
    return pd.concat([run.onsets() for run in runs], ignore_index=True)

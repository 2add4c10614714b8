"""What the criteria of emergence rest on: neurons chosen on some images, and edits of them measured on others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.detection import Detection, after_onset, detection_in
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import Trace
from registerlens.evaluation.controls import matched_neurons, neuron_activity
from registerlens.evaluation.observe import Yardstick, observe
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.base import Intervention, Scene
from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
from registerlens.interventions.search import find_register_neurons
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import sublayers
from registerlens.model.vit import HookedViT
from registerlens.seeds import generator_of
from registerlens.stats.histograms import medians

RANDOM_SETS = 5
"""Sets of activation-matched random neurons."""
FIRES = 0.95
"""A neuron whose AUC is at least this separates outliers from normal patches."""
CONDITIONS = ("clean", "register", "zeroing", "unedited", "chosen patch")
"""What is done to the model."""
CHOSEN_PATCH = 5
"""What the patches that are to become outliers are drawn for: see `generator_of`."""
MEASURED = ("outliers", "accuracy", "register_norm", "register_attention")


def emerging(traced: Trace) -> Detection:
    """Outliers after the sublayer that makes most of them: where the largest norm over the median rises most, in
    logarithms, of those after which norms are separate. A trace's `onset` is the first of these, which may lift the
    same patches only a little, well before the jump. Where norms are separate nowhere, the place of the strongest
    evidence.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.analysis.trace import trace
        >>> from registerlens.data.synthetic import synthetic_images
        >>> emerging(trace(rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images)).onset
        '1.mlp'
    """
    rise = np.diff(np.log(traced.largest_over_median), prepend=np.nan)
    there = [i for i, evidence in enumerate(traced.evidence) if i and evidence.present]
    if not there:
        return detection_in(traced)
    sublayer = traced.sublayers[max(there, key=lambda i: rise[i])]
    return replace(detection_in(traced, sublayer), onset=sublayer)


def made_by_mlp(detection: Detection) -> bool:
    """Whether there are outliers, and an MLP makes most of them: only then are there neurons to look for."""
    return detection.evidence.present and detection.sublayer.kind == "mlp"


def choose(
    vit: HookedViT, images: Tensor, detection: Detection, top_k: Literal["auto"] | int, batch_size: int
) -> tuple[RegisterNeurons, float, float]:
    """Register neurons; the share of neurons that tell outliers apart, in the onset block and of the whole model."""
    options: dict[str, Any] = {"layer": detection.sublayer, "top_layer": detection.layer, "top_k": top_k}
    neurons_found = find_register_neurons(vit, images, batch_size=batch_size, **options)
    assert neurons_found.search is not None
    firing = neurons_found.search.scores.of("auc") >= FIRES
    neurons = replace(neurons_found, search=None, found={})
    return neurons, float(firing[-1].mean()), float(firing.sum() / (vit.cfg.n_layers * vit.cfg.d_mlp))


def make_edits(
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


class Evidence:
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

    def add(self, images: Tensor, labels: Tensor | None, edits: dict[str, Intervention | None], seed: int) -> None:
        """Take in one batch."""
        vit = self.vit
        with torch.inference_mode():
            values: list[Tensor] = []
            keep = ("blocks.*.attn.hook_v", lambda v, hook: values.append(token_norms(v).mean(-1)))
            with vit.hooks([keep]):
                clean = observe(vit, images, "all")
            ruler = Yardstick(clean, self.place, self.detection.cutoff, self.layers, labels, vit.cfg)
            self.rows["clean"].append(ruler.measure(clean))
            patches = clean.layout.patches
            self.sinks.append((clean.attention[..., patches] * ruler.mask).sum(-1))
            self.value_norms.append(torch.stack(values)[..., patches])
            self.norms.append(clean.norms[self.place][:, patches] / ruler.median)
            self.masks.append(ruler.mask)
            generator = generator_of(CHOSEN_PATCH, seed, len(self.masks))
            for name, edit in edits.items():
                if edit is None:
                    continue
                moving = isinstance(edit, MoveOutliers)
                here = replace(edit, positions=_one_normal_patch(ruler.mask, generator)) if moving else edit
                with vit.edit(here):
                    view = observe(vit, images, "all")
                self.rows[name].append(ruler.measure(view, here.aim(Scene(view.layout, images))))

    def mean(self, metric: str, condition: str) -> float:
        """Over all images; NaN where a condition has no such thing."""
        rows = self.rows[condition]
        return float(torch.cat([row[metric].float() for row in rows]).nanmean()) if metric in rows[0] else np.nan

    def of_chosen_patch(self) -> dict[str, float]:
        """The two criteria that no other condition has."""
        others = self.mean("old_outliers", "chosen patch") + self.mean("new_outliers", "chosen patch")
        placed = self.mean("placed", "chosen patch")
        return {"chosen patch": placed, "chosen patch: others": share(others, self.mean("outliers", "clean"))}

    def result(self) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays of `EmergenceCriteria`."""
        mask, norms, values = torch.cat(self.masks), torch.cat(self.norms), torch.cat(self.value_norms, 1)
        ratio = torch.stack([layer[mask].mean() / layer[~mask].mean() for layer in values])
        measured = {"sink": torch.cat(self.sinks, 1).mean(1), "value_ratio": ratio}
        outlying = norms[mask].quantile(0.01) if mask.any() else torch.tensor(torch.nan)
        measured["quantiles"] = torch.stack([norms[~mask].quantile(0.999), outlying.to(norms)])
        names = dict(zip(MEASURED, ("outliers", "accuracy", "register_norm", "sink_register"), strict=True))
        means = {
            name: np.array([self.mean(metric, condition) for condition in self.rows]) for name, metric in names.items()
        }
        return {name: tensor.cpu().double().numpy() for name, tensor in measured.items()} | means


def _one_normal_patch(mask: Bool[Tensor, "batch patch"], generator: torch.Generator) -> Any:
    """A function of the images that gives each of them one patch that is no outlier, at random."""
    keys = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(mask, -1)
    return lambda images: keys.argmax(1, keepdim=True)


def prefix_tokens(vit: HookedViT, images: Tensor, batch_size: int) -> dict[str, Float[np.ndarray, "..."]]:
    """What stands before the patches: its norms and the attention to it, mean over images."""
    norms, sinks = [], []
    with torch.inference_mode():
        for batch in images.split(batch_size):
            view = observe(vit, batch, "all")
            patches = view.layout.patches
            norms.append(view.norms[..., : patches.start] / medians(view.norms[..., patches]))
            sinks.append(view.attention[..., : patches.start])
    means = {"prefix_norm": torch.cat(norms, 1), "prefix_sink": torch.cat(sinks, 1)}
    return {name: each.mean(1).cpu().double().numpy() for name, each in means.items()}


def nothing(n_layers: int) -> dict[str, Float[np.ndarray, "..."]]:
    """The arrays where there is nothing to measure."""
    conditions = dict.fromkeys(MEASURED, len(CONDITIONS) + RANDOM_SETS)
    lengths = {"sink": n_layers, "value_ratio": n_layers, "quantiles": 2, **conditions}
    return {name: np.full(n, np.nan) for name, n in lengths.items()}


def share(value: float, of: float) -> float:
    """A ratio; NaN where there is nothing to compare with."""
    return float(value) / float(of) if of else np.nan

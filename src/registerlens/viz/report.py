"""One self-contained HTML page: answers in words, norms and sinks, neurons, a register, mechanism, maps, numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from registerlens.analysis.maps import neuron_maps, patch_maps
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import Trace
from registerlens.diagnosis.findings import Diagnosis
from registerlens.errors import NoOutliersError, RegisterLensError
from registerlens.model.vit import HookedViT
from registerlens.viz import sections
from registerlens.viz.page import Section, write_page
from registerlens.viz.sections import Told
from registerlens.viz.study import Mechanism, RegisterStudy

FEW = 4
"""So many neurons, and so many images, have maps in the sections on neurons and on the register."""
EXPLORER_BYTES = 3_200_000
"""Weight of the maps to look at by hand, at most: two conditions of two images with 257 tokens, the telling blocks."""

_METHOD = """Norms are of the residual stream, patches only ([CLS] and registers excluded). "Ratio" is the largest patch
norm over the image's median, averaged over images. Outliers are called present only where these ratios form a mode of
their own, separated by a gap. Method: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", figures
2, 3, 8, 22 to 24 and 26, algorithms 1 and 2."""


@runtime_checkable
class PageSection(Protocol):
    """What is to be looked at by hand, such as `rl.explore` makes."""

    def section(self, *, max_bytes: int) -> str:
        """Its HTML, to stand in a page: whole, with its script, and all text in it escaped."""
        ...


def map_layers(trace: Trace) -> tuple[int, ...]:
    """The blocks whose maps are shown: the onset, the next one (where sinks follow), and the last.

    Without outliers there is no onset: the first, the middle and the last block.
    """
    last = trace.n_layers - 1
    onset = trace.onset_layer
    chosen = {0, last // 2, last} if onset is None else {onset, min(onset + 1, last), last}
    return tuple(sorted(chosen))


def write_report(
    path: str | Path,
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    display: UInt8[np.ndarray, "image height width rgb"],
    trace: Trace,
    *,
    names: Sequence[str],
    title: str,
    note: str = "",
    diagnosis: Diagnosis | None = None,
    study: RegisterStudy | NoOutliersError | None = None,
    mechanism: Mechanism | None = None,
    circuit: Told | RegisterLensError | None = None,
    explorer: PageSection | None = None,
) -> Path:
    """Write the page, whole or not at all; it opens from disk without a network.

    Args:
        path: the HTML file.
        vit: the model.
        images: the images whose maps are shown, preprocessed; all of one size.
        display: the same images to look at.
        trace: of the model, usually over more images.
        names: one caption an image.
        title, note: heading, and a sentence that says what kind of model this is.
        diagnosis: what is wrong with the model, with which the page begins.
        study: the register neurons and what a test-time register does, from `study_registers`; they get sections of
            their own. Without outliers the page says that there is nothing to look for, whatever is given.
        mechanism: kernel conditions, kinds of sinks and evidence for the neurons, from `study_mechanism`; sections of
            their own.
        circuit: the path from register neurons to [CLS], from `attention_circuit`, or the reason why there is none.
        explorer: attention to look at by hand, from `rl.explore`; it gets `EXPLORER_BYTES`.

    Returns:
        the path.

    Example:
        >>> import tempfile, torch, registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48)
        >>> page = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_report(page, vit, images, np.zeros((1, 48, 48, 3), np.uint8), rl.trace(vit, images),
        ...              names=["noise"], title="tiny").exists()
        True
    """
    maps = patch_maps(vit, images, map_layers(trace))
    display = _seen(display, vit, images)
    answers = sections.answers(trace, study)
    if mechanism is not None:
        answers += sections.mechanism_answer(mechanism, circuit)
    body = [
        *([] if diagnosis is None else [sections.diagnosis_section(diagnosis)]),
        Section(id="answers", title="Answers", body=answers),
        sections.trace_section(trace),
        sections.images_section(trace, maps, display, names),
    ]
    if trace.verdict != "present":
        body.append(sections.no_neurons_section(trace))
    elif isinstance(study, RegisterStudy):
        few = images[:FEW], display[:FEW], names[:FEW]
        body += [_neurons(vit, study.neurons, trace, *few), _register(vit, study, *few)]
    if mechanism is not None:
        body += sections.mechanism_sections(mechanism)
    if trace.verdict != "present":
        body.append(sections.no_circuit_section(trace))
    elif circuit is not None:
        body.append(sections.circuit_section(circuit))
    if explorer is not None:
        body.append(sections.explorer_section(explorer.section(max_bytes=EXPLORER_BYTES)))
    body.append(sections.numbers_section(trace))
    heads = f"{vit.cfg.n_heads} head{'s' if vit.cfg.n_heads > 1 else ''}"
    facts = [trace.model, f"{trace.n_images} images", f"{vit.cfg.n_layers} blocks", heads, f"width {vit.cfg.d_model}"]
    return write_page(path, title, [*facts, note] if note else facts, body, _METHOD)


def write_neuron_maps(
    path: str | Path,
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    display: UInt8[np.ndarray, "image height width rgb"],
    neurons: RegisterNeurons,
    *,
    names: Sequence[str],
    block: int,
) -> Path:
    """Write a page with the register neurons alone: scores, and activation maps beside the norm after a block.

    Args:
        path: the HTML file.
        vit: the model.
        images: the images whose maps are shown, preprocessed; all of one size.
        display: the same images to look at.
        neurons: what was found.
        names: one caption an image.
        block: after which the norms are taken.

    Returns:
        the path.

    Example:
        >>> import tempfile, torch, registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48)
        >>> neurons, page = rl.RegisterNeurons.from_pairs([(1, 183)]), Path(tempfile.mkdtemp()) / "maps.html"
        >>> write_neuron_maps(page, vit, images, np.zeros((1, 48, 48, 3), np.uint8), neurons, names=["noise"],
        ...                   block=1).exists()
        True
    """
    maps, norms = neuron_maps(vit, images, neurons.pairs[:FEW]), patch_maps(vit, images, [block]).norms[0]
    section = sections.neurons_section(neurons, maps, norms, block, _seen(display, vit, images), names)
    return write_page(path, "Register neurons", [vit.source, f"{len(neurons)} neurons"], [section])


def _neurons(
    vit: HookedViT, neurons: RegisterNeurons, trace: Trace, images: Tensor, display: np.ndarray, names: Sequence[str]
) -> Section:
    block = max(trace.strongest.layer, 0)
    maps, norms = neuron_maps(vit, images, neurons.pairs[:FEW]), patch_maps(vit, images, [block]).norms[0]
    return sections.neurons_section(neurons, maps, norms, block, display, names)


def _register(
    vit: HookedViT, study: RegisterStudy, images: Tensor, display: np.ndarray, names: Sequence[str]
) -> Section:
    layers = sorted({max(study.evaluation.detection.layer, 0), vit.cfg.n_layers - 1})
    before = patch_maps(vit, images, layers)
    with vit.edit(study.intervention):
        after = patch_maps(vit, images, layers)
    return sections.register_section(study, before, after, display, names)


def _seen(display: np.ndarray, vit: HookedViT, images: Tensor) -> np.ndarray:
    """Without the pixels beyond the last whole patch, which the model does not see: picture and maps coincide."""
    layout, (patch_height, patch_width) = vit.layout(images), vit.cfg.patch_size
    return display[:, : layout.grid_height * patch_height, : layout.grid_width * patch_width]

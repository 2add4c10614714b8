"""Why the outliers act as they do: theory and mechanism of one model, each as a result or as the reason for none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.detection import Detection, detect, require_outliers
from registerlens.analysis.faithfulness import Faithfulness, faithfulness
from registerlens.analysis.massive import MassiveActivations, massive_activations
from registerlens.analysis.mechanism import SinkEffects, sink_no_op
from registerlens.analysis.neuron_evidence import ActivationDistributions, activation_distributions
from registerlens.analysis.neuron_updates import NeuronUpdates, neuron_updates
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.output_weights import OutputWeights, output_weights
from registerlens.analysis.overlap import Overlap, observable_overlap
from registerlens.analysis.singular_defects import SingularDefects, singular_defects
from registerlens.analysis.sink_events import QUERIES
from registerlens.analysis.sink_kinds import SinkKinds, classify_sinks
from registerlens.data.batches import Images, first_and_all
from registerlens.display import Shown
from registerlens.errors import ImageError, NoOutliersError, RegisterLensError
from registerlens.evaluation.causal_order import CausalOrder, causal_order
from registerlens.model.vit import HookedViT
from registerlens.theory.kernels import KernelReport, check_kernels
from registerlens.theory.value_update import ValueUpdate, value_update

EXPLAINED = 64
"""Images that the commands take for this, at most."""
FEW = 8
"""Images for what runs the model many times; a third of them, or half if there are fewer, only give values."""
HEADS = 4
"""Heads whose sink is edited, at most: those that have one most often."""
THRESHOLD = 0.3
"""Attention that makes a sink."""
HALF = 0.5
"""Share of the queries that must pay it, beside the published 90%: those that several sinks of an image share it
among would otherwise be missed."""
SAMPLES = 4096
"""Normal inputs to each linear fit of the singular defects: a page needs no more than two degrees."""
REGISTERS = (1, 2, 4)
"""Numbers of test-time registers whose updates are compared."""

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True, eq=False)
class Mechanism(Shown):
    """Every result on one model, or the error that says why there is none."""

    n_images: int
    """Images that all but the few-image results rest on."""
    n_few: int
    """Images for sink edits and updates of registers."""
    kernels: KernelReport | RegisterLensError
    """The conditions of Proposition 1."""
    published_sinks: SinkKinds | RegisterLensError
    """Sinks that 90% of the queries pay."""
    sinks: SinkKinds | RegisterLensError
    """Sinks that half of the queries pay."""
    effects: SinkEffects | RegisterLensError
    """What editing them changes."""
    value_update: ValueUpdate | RegisterLensError
    """What one register writes against several."""
    massive: MassiveActivations | RegisterLensError
    """Massive activations."""
    overlap: Overlap | RegisterLensError
    """Do the four observables pick the same patches?"""
    defects: SingularDefects | RegisterLensError
    """The outlier direction that weights predict; angles to measured outliers where there are any."""
    distributions: ActivationDistributions | RegisterLensError
    """Activations of the neurons."""
    updates: NeuronUpdates | RegisterLensError
    """What they write together."""
    weights: OutputWeights | RegisterLensError
    """Into which dimensions they write."""
    order: CausalOrder | RegisterLensError
    """Which of them drive which."""
    faithfulness: Faithfulness | RegisterLensError
    """What the last [CLS] rests on."""


def study_mechanism(
    vit: HookedViT,
    images: Images,
    neurons: RegisterNeurons | NoOutliersError | None,
    *,
    batch_size: int = 16,
) -> Mechanism:
    """Everything a page says about kernels, sinks and neurons; what cannot be had is kept as its reason.

    Args:
        vit: the model.
        images: [image, channel, height, width], or batches of one size that can be iterated several times.
        neurons: register neurons; or the error that says why there are none; None: they were not looked for.
        batch_size: images at once when a tensor is given.

    Raises:
        ImageError: there are no images.
        NonFiniteError: norms are NaN or infinite.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, neurons = rl.HookedViT.from_pretrained("registerlens:tiny"), rl.RegisterNeurons.from_pairs([(1, 183)])
        >>> found = study_mechanism(vit, synthetic_images(8, 0).images, neurons)
        >>> found.kernels.no_op, type(found.faithfulness).__name__
        ('holds approximately', 'ConfigError')
    """
    detection = detect(vit, images, batch_size=batch_size)
    few = torch.cat(first_and_all(images, FEW, batch_size)[0])

    def chosen() -> RegisterNeurons:
        return _neurons(neurons, detection)

    at: dict[str, object] = {"detection": detection, "batch_size": batch_size}
    clear, measured = (detection, images) if detection.evidence.present else (None, None)
    massive = massive_activations(vit, images, batch_size=batch_size)
    sinks = _or_reason(lambda: classify_sinks(vit, images, queries=HALF, batch_size=batch_size))
    return Mechanism(
        n_images=massive.n_images,
        n_few=len(few),
        kernels=_or_reason(lambda: check_kernels(vit, chosen(), images=images, batch_size=batch_size)),
        published_sinks=_or_reason(lambda: classify_sinks(vit, images, queries=QUERIES, batch_size=batch_size)),
        sinks=sinks,
        effects=_or_reason(lambda: _effects(vit, few, sinks)),
        value_update=_or_reason(lambda: value_update(vit, few, chosen(), registers=REGISTERS, batch_size=batch_size)),
        massive=massive,
        overlap=_or_reason(lambda: observable_overlap(vit, images, detection=detection, batch_size=batch_size)),
        defects=_or_reason(
            lambda: singular_defects(
                vit, measured, detection=detection, batch_size=batch_size, n_samples=max(SAMPLES, 4 * vit.cfg.d_model)
            )
        ),
        distributions=_or_reason(lambda: activation_distributions(vit, images, chosen(), **at)),  # type: ignore[arg-type]
        updates=_or_reason(lambda: neuron_updates(vit, images, chosen(), **at)),  # type: ignore[arg-type]
        weights=_or_reason(lambda: output_weights(vit, chosen())),
        order=_or_reason(lambda: causal_order(vit, images, chosen(), **at)),  # type: ignore[arg-type]
        faithfulness=_or_reason(lambda: faithfulness(vit, images, detection=clear, batch_size=batch_size)),
    )


def _or_reason(measure: Callable[[], Kind]) -> Kind | RegisterLensError:
    try:
        return measure()
    except RegisterLensError as reason:
        return reason


def _neurons(neurons: RegisterNeurons | NoOutliersError | None, detection: Detection) -> RegisterNeurons:
    if isinstance(neurons, NoOutliersError):
        raise neurons
    if neurons is None:
        require_outliers(detection, "What is said of register neurons")
        raise NoOutliersError("Register neurons were not looked for.", detection.evidence)
    return neurons


def _effects(
    vit: HookedViT, few: Float[Tensor, "image channel height width"], sinks: SinkKinds | RegisterLensError
) -> SinkEffects:
    """Edits of the sinks of those heads that have one most often."""
    if isinstance(sinks, RegisterLensError):
        raise sinks
    if len(few) < 2:
        raise ImageError(
            "Editing a sink takes values from other images, and there is only one. Give at least two images."
        )
    events = sinks.events[sinks.index(THRESHOLD)]
    heads = [(layer, head) for layer, head in product(*map(range, events.shape)) if events[layer, head]]
    often = sorted(heads, key=lambda place: -events[place])[:HEADS]
    n = len(few) // (3 if len(few) >= 6 else 2)
    return sink_no_op(vit, few[n:], reference=few[:n], heads=often, threshold=THRESHOLD, queries=HALF)

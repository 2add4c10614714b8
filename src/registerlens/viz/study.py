"""What a report shows: register neurons, a register and its circuit, images to explore; and why outliers do this."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from registerlens.analysis.detection import Detection, after_onset, detect, require_outliers
from registerlens.analysis.faithfulness import Faithfulness, faithfulness
from registerlens.analysis.massive import MassiveActivations, massive_activations
from registerlens.analysis.mechanism import SinkEffects, sink_no_op
from registerlens.analysis.neuron_evidence import ActivationDistributions, activation_distributions
from registerlens.analysis.neuron_updates import NeuronUpdates, neuron_updates
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.output_weights import OutputWeights, output_weights
from registerlens.analysis.overlap import Overlap, observable_overlap
from registerlens.analysis.singular_defects import SingularDefects, singular_defects
from registerlens.analysis.sink_events import PLACES, QUERIES
from registerlens.analysis.sink_kinds import SinkKinds, classify_sinks
from registerlens.analysis.trace import Trace
from registerlens.circuits.attention_circuit import attention_circuit
from registerlens.circuits.records import AttentionCircuit
from registerlens.data.batches import Images, first_and_all
from registerlens.diagnosis.cure import REGISTER, Remedy
from registerlens.display import Shown
from registerlens.errors import ImageError, InterventionError, NoOutliersError, RegisterLensError
from registerlens.evaluation.causal_order import CausalOrder, causal_order
from registerlens.evaluation.effects import Evaluation, evaluate_intervention
from registerlens.explorer.explorer import Explorer, explore
from registerlens.interventions.base import Intervention
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.interventions.search import find_register_neurons
from registerlens.model.vit import HookedViT
from registerlens.theory.kernels import KernelReport, check_kernels
from registerlens.theory.value_update import ValueUpdate, value_update

FOLLOWED = 8
"""Images that the circuit of a report is a mean over, at most: each costs several passes."""
EXPLORED = 3
"""Images to look at by hand, at most; a page has room for fewer where they have many patches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RegisterStudy(Shown):
    """Register neurons, an intervention on them, and its evaluation."""

    neurons: RegisterNeurons
    """What was found, or given."""
    intervention: Intervention
    """What the maps after the edit show."""
    condition: str = REGISTER
    """Its name in the evaluation."""
    evaluation: Evaluation
    """Before, after, and controls."""
    samples: str
    """On which images the neurons were found, and the intervention evaluated: a sentence."""

    @property
    def worked(self) -> bool:
        """Whether the intervention did what it should."""
        return bool(self.evaluation.verdicts[self.condition].worked)

    @property
    def words(self) -> str:
        """The verdict on it."""
        return self.evaluation.verdicts[self.condition].words


def study_registers(
    vit: HookedViT,
    found_on: Images,
    evaluated_on: Images,
    samples: str,
    *,
    labels: Int[Tensor, "image ..."] | None = None,
    batch_size: int = 16,
) -> RegisterStudy | NoOutliersError:
    """Find register neurons, and evaluate one test-time register; without outliers, the error that says so.

    Args:
        vit: the model.
        found_on: images for the search.
        evaluated_on: images for the evaluation; batches must be iterable several times.
        samples: a sentence that says which images these are.
        labels: of the images evaluated on, as for `evaluate_intervention`.
        batch_size: images at once when a tensor is given.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(64, 0).images
        >>> study_registers(vit, images[:48], images[48:], "Found on 48 images, evaluated on 16 others.").worked
        True
    """
    try:
        neurons = find_register_neurons(vit, found_on, batch_size=batch_size)
        register = TestTimeRegisters(neurons)
        done = evaluate_intervention(vit, evaluated_on, {REGISTER: register}, labels=labels, batch_size=batch_size)
    except NoOutliersError as error:
        return error
    return RegisterStudy(neurons=neurons, intervention=register, evaluation=done, samples=samples)


def remedy_of(study: RegisterStudy | NoOutliersError | None) -> Remedy:
    """The same for a diagnosis.

    Example:
        >>> remedy_of(NoOutliersError("No outliers here.")).reason
        'No outliers here.'
    """
    if isinstance(study, RegisterStudy):
        return Remedy(neurons=study.neurons, evaluation=study.evaluation)
    return Remedy(reason="" if study is None else str(study))


def study_circuit(
    vit: HookedViT, images: Images, study: RegisterStudy | NoOutliersError | None, *, batch_size: int = 16
) -> AttentionCircuit | RegisterLensError | None:
    """The path from the neurons found to [CLS], or the reason why there is none; None where none were looked for.

    Args:
        vit: the model.
        images: [image, channel, height, width], or batches that can be iterated twice or more.
        study: from `study_registers`; outliers are those above its cut-off.
        batch_size: images at once when a tensor is given.

    Example:
        >>> import torch, registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> str(study_circuit(vit, torch.rand(1, 3, 48, 48), NoOutliersError("No outliers here.")))
        'No outliers here.'
    """
    if not isinstance(study, RegisterStudy):
        return study
    detection = study.evaluation.detection
    try:
        return attention_circuit(vit, images, study.neurons, detection=detection, batch_size=batch_size)
    except RegisterLensError as reason:
        return reason


def explore_few(
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    display: UInt8[np.ndarray, "image height width rgb"],
    trace: Trace,
    study: RegisterStudy | NoOutliersError | None,
    *,
    names: Sequence[str],
    n: int = EXPLORED,
) -> Explorer:
    """The first images to look at by hand, and where neurons were found, the model with a test-time register beside it.

    Args:
        vit: the model.
        images: preprocessed.
        display: the same to look at.
        trace: what tells outliers.
        study: from `study_registers`.
        names: one caption an image.
        n: how many, at most.

    Example:
        >>> import torch, registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(5, 3, 48, 48)
        >>> display = np.zeros((5, 48, 48, 3), np.uint8)
        >>> found = explore_few(vit, images, display, rl.trace(vit, images), None, names="abcde")
        >>> found.names, list(found.conditions)
        (('a', 'b', 'c'), ['clean'])
    """
    outliers = isinstance(study, RegisterStudy)
    return explore(
        vit,
        images[:n],
        study.neurons if outliers else None,
        interventions={study.condition: study.intervention} if outliers else {},
        names=names[:n],
        display=display[:n],
        trace=trace,
    )


def describe(study: RegisterStudy | NoOutliersError) -> str:
    """The outcome in words.

    Example:
        >>> describe(NoOutliersError("No outliers here."))
        'No outliers here.'
    """
    if isinstance(study, NoOutliersError):
        return str(study)
    return f"{study.condition[:1].upper()}{study.condition[1:]}: {study.words}"


# Why the outliers act as they do ------------------------------------------------------------------------------------

FEW = 8
"""Images for what runs the model many times; a third of them, or half if there are fewer, only give values."""
HEADS = 4
"""Heads whose sink is edited, at most: those that have one most often."""
THRESHOLD = 0.3
"""Attention that makes a sink."""
HALF = 0.5
"""Share of the queries that must pay it, beside the published 90%: those that several sinks of an image share it
among would otherwise be missed."""
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
        effects=_or_reason(lambda: _effects(vit, few, sinks, detection)),
        value_update=_or_reason(lambda: value_update(vit, few, chosen(), registers=REGISTERS, batch_size=batch_size)),
        massive=massive,
        overlap=_or_reason(lambda: observable_overlap(vit, images, detection=detection, batch_size=batch_size)),
        defects=_or_reason(lambda: singular_defects(vit, measured, detection=detection, batch_size=batch_size)),
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
    vit: HookedViT,
    few: Float[Tensor, "image channel height width"],
    sinks: SinkKinds | RegisterLensError,
    detection: Detection,
) -> SinkEffects:
    """Edits of the sinks of the heads that have one most often: where there are outliers, at these, after the onset."""
    if isinstance(sinks, RegisterLensError):
        raise sinks
    if len(few) < 2:
        raise ImageError(
            "Editing a sink takes values from other images, and there is only one. Give at least two images."
        )
    at = sinks.index(THRESHOLD)
    events = sinks.events[at]
    if detection.evidence.present:
        events = sinks.places[PLACES.index("outlier_patch"), at].copy()
        events[: after_onset(detection, vit.cfg.n_layers).start] = 0
        if not events.any():
            raise InterventionError(
                "No head after the onset has its sink at an outlier, so that there is none to edit."
            )
    heads = [(layer, head) for layer, head in product(*map(range, events.shape)) if events[layer, head]]
    often = sorted(heads, key=lambda place: -events[place])[:HEADS]
    n = len(few) // (3 if len(few) >= 6 else 2)
    return sink_no_op(vit, few[n:], reference=few[:n], heads=often, threshold=THRESHOLD, queries=HALF)

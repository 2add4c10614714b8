"""What the later sections of a report show: register neurons, a test-time register, a circuit, images to explore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.trace import Trace
from registerlens.circuits.attention_circuit import attention_circuit
from registerlens.circuits.records import AttentionCircuit
from registerlens.data.batches import Images
from registerlens.display import Shown
from registerlens.errors import NoOutliersError, RegisterLensError
from registerlens.evaluation.effects import Evaluation, evaluate_intervention
from registerlens.explorer.explorer import Explorer, explore
from registerlens.interventions.base import Intervention
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.interventions.search import find_register_neurons
from registerlens.model.vit import HookedViT

REGISTER = "test-time register"
"""The name of the condition."""
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
    found = isinstance(study, RegisterStudy)
    return explore(
        vit,
        images[:n],
        study.neurons if found else None,
        interventions={study.condition: study.intervention} if found else {},
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

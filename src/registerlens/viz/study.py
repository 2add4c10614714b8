"""A model's register neurons and what a test-time register does to it: what the later sections of a report show."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.comfort import Shown
from registerlens.data.batches import Images
from registerlens.errors import NoOutliersError
from registerlens.evaluation.effects import Evaluation, evaluate_intervention
from registerlens.interventions.base import Intervention
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.interventions.search import find_register_neurons
from registerlens.model.vit import HookedViT

REGISTER = "test-time register"
"""The name of the condition."""


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


def describe(study: RegisterStudy | NoOutliersError) -> str:
    """The outcome in words.

    Example:
        >>> describe(NoOutliersError("No outliers here."))
        'No outliers here.'
    """
    if isinstance(study, NoOutliersError):
        return str(study)
    return f"{study.condition[:1].upper()}{study.condition[1:]}: {study.words}"

"""The one question most users have: what is wrong with this model?"""

from registerlens.data.batches import Images
from registerlens.diagnosis.cure import Remedy, outlier_tokens, seek
from registerlens.diagnosis.embedding import embedding_outliers
from registerlens.diagnosis.findings import Diagnosis, by_importance
from registerlens.diagnosis.inputs import other_images, wrong_preprocessing
from registerlens.diagnosis.symptoms import Symptoms, measure
from registerlens.diagnosis.tokens import (
    massive_channel,
    nothing,
    registers_hold,
    sinks_without_outliers,
    too_few_images,
)
from registerlens.diagnosis.weights import not_finite, not_finite_inside, untrained
from registerlens.errors import NonFiniteError
from registerlens.loading.pretrained import from_pretrained
from registerlens.model.vit import HookedViT

CHECKS = (
    other_images,
    wrong_preprocessing,
    embedding_outliers,
    too_few_images,
    massive_channel,
    sinks_without_outliers,
    registers_hold,
)
"""Each asks for one cause, and answers with a finding or nothing."""


def diagnose(vit: HookedViT | str, images: Images, *, evaluated: int = 32, batch_size: int = 16) -> Diagnosis:
    """What is wrong with a model, with evidence, and what to do about it.

    Looked for are: numbers that are not finite; untrained weights; images that are not of the kind the model was
    trained on, or were preprocessed otherwise; outliers of the position or patch embedding; register neurons, with or
    despite trained registers, and then what a test-time register and an attention bias do and cost; a massive channel
    or sinks without outlier tokens; trained registers that hold the outliers. `Cause` has them in order of importance.

    Args:
        vit: the model, or the name of one for `rl.from_pretrained`.
        images: preprocessed, [image, channel, height, width], or batches that can be iterated several times.
        evaluated: on how many of the images, the first ones, remedies are measured, at most. They are among those that
            neurons are found on, so that this is no independent test.
        batch_size: images at once when a tensor is given.

    Raises:
        ImageError: there are no images, or they could be iterated only once.
        ShapeError: they do not fit the model.
        ModelNotFoundError: there is no model of this name.

    Source: each check names its own; error rates are in the documentation ("What is wrong with my model?").

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> found = rl.diagnose("registerlens:tiny", synthetic_images(64, 0).images)
        >>> found.cause, found.cure, found.neurons.by_layer()
        ('register neurons', 'test-time register', {1: (183, 103, 219, 125, 55, 128, 177)})
    """
    vit = from_pretrained(vit) if isinstance(vit, str) else vit
    if (broken := not_finite(vit)) is not None:
        return Diagnosis(**vit.identity, n_images=0, findings=(broken,))
    try:
        found = measure(vit, images, batch_size)
    except NonFiniteError as reason:
        return Diagnosis(**vit.identity, n_images=0, findings=(not_finite_inside(str(reason)),))
    remedy = seek(vit, images, evaluated, batch_size) if found.outliers_in_blocks else Remedy()
    return conclude(found, remedy)


def conclude(found: Symptoms, remedy: Remedy) -> Diagnosis:
    """All findings on what was measured."""
    findings = [finding for check in CHECKS if (finding := check(found)) is not None]
    findings += [finding for finding in (untrained(found.vit), outlier_tokens(found, remedy)) if finding is not None]
    return Diagnosis(
        **found.vit.identity,
        n_images=found.trace.n_images,
        findings=by_importance(findings or [nothing(found)]),
        trace=found.trace,
        massive=found.massive,
        sinks=found.sinks,
        neurons=remedy.neurons,
        evaluation=remedy.evaluation,
        cure=remedy.best,
    )

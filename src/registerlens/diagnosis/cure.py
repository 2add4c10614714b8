"""Outliers that blocks make: the neurons behind them, and what removes them at which cost."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.data.batches import Images, first_and_all
from registerlens.diagnosis.embedding import SAME_PLACES
from registerlens.diagnosis.findings import CauseFinding
from registerlens.diagnosis.symptoms import Symptoms
from registerlens.errors import ConfigError, NoOutliersError, UnsupportedArchitectureError
from registerlens.evaluation.effects import Evaluation, evaluate_intervention
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Intervention
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.interventions.search import find_register_neurons
from registerlens.model.vit import HookedViT

REGISTER, BIAS = "test-time register", "attention bias"
"""Names of the two remedies."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What was found and tried against outliers."""

    neurons: RegisterNeurons | None = None
    """Register neurons; None where none were found or looked for."""
    evaluation: Evaluation | None = None
    """The two remedies beside controls."""
    reason: str = ""
    """Why there are no neurons."""

    @property
    def best(self) -> str | None:
        """The remedy that worked at the least cost; None where none did."""
        if (done := self.evaluation) is None:
            return None
        worked = [name for name, verdict in done.verdicts.items() if verdict.worked]
        return min(worked, key=lambda name: cost(done, name), default=None)


def cost(evaluation: Evaluation, condition: str) -> float:
    """1 - cosine to the clean run: of [CLS], or of the normal patches where there is none."""
    cosines = (evaluation.mean(name, condition) for name in ("cos_cls", "cos_normal") if name in evaluation.metrics)
    return 1 - next((cosine for cosine in cosines if np.isfinite(cosine)), float("nan"))


def seek(vit: HookedViT, images: Images, evaluated: int, batch_size: int) -> Remedy:
    """Register neurons, and both remedies measured on the first images."""
    try:
        neurons = find_register_neurons(vit, images, batch_size=batch_size)
    except (NoOutliersError, ConfigError) as reason:
        return Remedy(reason=str(reason))
    few, _ = first_and_all(images, evaluated, batch_size)
    tried: dict[str, Intervention] = {REGISTER: TestTimeRegisters(neurons)}
    with suppress(UnsupportedArchitectureError):  # attention is no softmax
        tried[BIAS] = AttentionBias.fit(vit, images, neurons, batch_size=batch_size)
    try:
        return Remedy(neurons=neurons, evaluation=evaluate_intervention(vit, few, tried, batch_size=batch_size))
    except NoOutliersError as reason:  # in all images there are some, in the first ones none
        return Remedy(neurons=neurons, reason=str(reason))


def outlier_tokens(found: Symptoms, remedy: Remedy) -> CauseFinding | None:
    """Outlier patches that blocks make, in a model with or without trained registers."""
    traced = found.trace
    if not found.outliers_in_blocks:
        return None
    evidence = traced.evidence[traced.sublayers.index(traced.strongest)]
    by_place = float(traced.share_by_place[traced.sublayers.index(traced.strongest)])
    numbers: dict[str, float | str] = {
        "onset": str(traced.onset or "none"),
        "norm over the median": evidence.typical,
        "share of patches": evidence.share_of_patches,
        "share of variance between places": by_place,
    }
    trained = found.vit.cfg.n_trained_registers
    despite = f"Despite {trained} trained registers: " if trained else ""
    where = ", at the same places in every image" if by_place >= SAME_PLACES else ""
    since = f"From {traced.onset} on" if traced.onset else f"At {traced.strongest}, to which norms drift apart"
    words = (
        f"{despite}{since}, {evidence.share_of_patches:.1%} of patches are outlier tokens, at {evidence.typical:.1f} x "
        f"the median norm{where}."
    )
    made, more = _makers(remedy)
    advice, costs = _advice(remedy)
    return CauseFinding(
        cause="outliers despite registers" if trained else "register neurons",
        words=f"{words} {made}",
        evidence=numbers | more | costs,
        advice=advice,
    )


def _makers(remedy: Remedy) -> tuple[str, dict[str, float | str]]:
    if remedy.neurons is None:
        return f"The neurons that make them were not found: {remedy.reason}", {}
    listed = [f"{layer}:{neuron}" for layer, neuron, _ in remedy.neurons]
    few = ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    noun = "neuron makes" if len(listed) == 1 else "neurons make"
    return f"{len(listed)} register {noun} them ({few}).", {"register neurons": ", ".join(listed)}


def _advice(remedy: Remedy) -> tuple[str, dict[str, float | str]]:
    """The remedy that worked, and what each costs."""
    if remedy.evaluation is None:
        return "Search with more images, or with top_layer= and top_k= of your own (rl.find_register_neurons).", {}
    done, what = remedy.evaluation, "[CLS]" if "cos_cls" in remedy.evaluation.metrics else "normal patches"
    costs: dict[str, float | str] = {f"cost of the {name}": cost(done, name) for name in done.verdicts}
    if remedy.best is None:
        failed = "; ".join(f"{name}: {verdict.words}" for name, verdict in done.verdicts.items())
        return f"Neither remedy holds on these images. {failed}", costs
    code = "rl.AttentionBias.fit(vit, images, neurons)" if remedy.best == BIAS else "rl.TestTimeRegisters(neurons)"
    prices = ", ".join(f"{name} {cost(done, name):.3f}" for name in done.verdicts)
    return f"Cure: {remedy.best}, {code}. Cost (1 - cosine of {what} to the clean run): {prices}.", costs

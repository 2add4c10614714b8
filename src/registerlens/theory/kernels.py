"""The kernel conditions of Proposition 1 on real models: every number beside its nulls, and verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from registerlens.analysis.neurons import RegisterNeurons, warn_of_other_model
from registerlens.codecs import table_of
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.errors import ConfigError, WeightsError
from registerlens.model.block import require_linear_output, require_softmax
from registerlens.model.vit import HookedViT
from registerlens.results import FINITE, ModelResult
from registerlens.theory.measurements import (
    COLUMNS,
    Rows,
    measure_concentration,
    measure_cosines,
    measure_kernels,
    measure_keys,
    measure_size,
    subjects_of,
    weights_of,
)
from registerlens.theory.observed import Observed, observe
from registerlens.theory.readers import KERNELS, check_finite, closed_dimensions, head_weight
from registerlens.theory.verdicts import Finding, Verdict, effects, find, select, with_verdicts

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ORDER: tuple[Verdict, ...] = ("fails", "holds approximately", "holds")
_SIDES = {"value": "the values", "ov": "values and output weights together"}
_SUBJECTS = {"outlier": "the outlier tokens' direction", "u2": "u2"}


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelReport(ModelResult):
    """Which conditions of Proposition 1, relaxed to a real model, hold for some register neurons."""

    neurons: RegisterNeurons
    """The neurons checked."""
    table: pd.DataFrame = field(
        metadata=table_of(
            words=(*(name for name, nothing in COLUMNS.items() if nothing == ""), "verdict"),
            numbers=(name for name, nothing in COLUMNS.items() if nothing != ""),
        )
    )
    """Every number with its nulls; columns as `to_dataframe` explains."""
    written: Float[np.ndarray, "neuron d_model"] = field(metadata=FINITE)
    """What each neuron writes (u2), in the order of `neurons`: its row of W_out, LayerScale folded in."""
    usual: Float[np.ndarray, " d_model"] = field(metadata=FINITE)
    """Root mean square of the weights other neurons of the same blocks write into each dimension."""
    n_tokens: int
    """Keys of a query, for the key side."""
    n_images: int
    """Images that went through; 0 for a check of the weights alone."""
    n_outliers: int
    """Outlier patches among them."""
    not_applicable: dict[str, str]
    """Conditions that could not be asked, and why."""
    notes: tuple[str, ...]
    """What else a reader should know, in words."""

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One for each condition and vector."""
        return tuple(find(self.table, self.n_tokens))

    def finding(self, condition: str, vector: str = "u2") -> Finding:
        """The finding on one condition.

        Raises:
            ConfigError: it was not asked; the message says why.
        """
        for finding in self.findings:
            if (finding.condition, finding.vector) == (condition, vector):
                return finding
        why = self.not_applicable.get(condition, f"there is no such condition for {vector!r}")
        known = sorted({(finding.condition, finding.vector) for finding in self.findings})
        raise ConfigError(f"No finding on {condition!r} for {vector!r}: {why}. There are: {known}.")

    def violation(self, vector: str = "u2", layer: int | None = None) -> float:
        """How strongly later blocks and the head read a direction, 0 (exact kernel) to about 1 (like a random one).

        Root mean square over neurons, blocks and readers (values, MLP, head) of what is read over what is read of a
        random direction; each reader weighs as much as random directions let it say (the inverse variance of the same
        ratio). On a planted model an estimate of its `violation`, with the error that a random direction has.

        Raises:
            ConfigError: nothing reads that vector (there).
        """
        rows = select(self.table, condition=["value", "mlp", "head"], quantity="residual", vector=vector)
        rows = rows if layer is None else select(rows, layer=layer)
        if not len(rows):
            raise ConfigError(f"Nothing reads {vector!r}" + ("." if layer is None else f" in block {layer}."))
        weights = (rows["random"].to_numpy() / rows["random_sd"].to_numpy()) ** 2
        return float(np.average(effects(rows) ** 2, weights=weights) ** 0.5)

    @property
    def no_op(self) -> Verdict | None:
        """Whether a sink on these neurons' tokens is a no-op as far as weights can tell; None if nothing follows.

        It is one where attention to the token writes nothing (the value side: W_V, or W_V W_O), whatever the token
        itself shows to MLPs and head. Judged by the outlier tokens' direction where images gave it, else by u2.
        """
        return self._value_side.verdict if self._value_side else None

    @property
    def _value_side(self) -> Finding | None:
        """The condition on the value side that holds best."""
        for vector in ("outlier", "u2"):
            findings = [f for f in self.findings if f.vector == vector and f.condition in _SIDES]
            if findings:
                return max(findings, key=lambda f: (_ORDER.index(f.verdict), -f.effect))
        return None

    def describe(self) -> str:
        """Each condition in words, then what they amount to."""
        lines = [finding.words for finding in self.findings]
        lines += [f"Not applicable, {name}: {reason}." for name, reason in self.not_applicable.items()]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes), self.conclusion()])

    def conclusion(self) -> str:
        """Are these neurons' sinks no-ops?"""
        best = self._value_side
        if best is None:
            return "As far as the weights can tell: nothing, for no later block's attention reads what they write."
        sentence = {
            "holds": "Yes: attention to such a token writes next to nothing but constants",
            "holds approximately": "In part: such a token writes less than half of what a random direction would",
            "fails": "No: attention to such a token writes something, unless what it writes is ignored downstream",
        }[best.verdict]
        return (
            f"Are sinks on these tokens no-ops, as far as weights can tell? {sentence} "
            f"({_SUBJECTS[best.vector]} is read at "
            f"{best.effect:.2g} of a random direction's strength by {_SIDES[best.condition]})."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a number.

        condition: value (W_V), ov (W_V W_O, heads summed), ov_head, mlp (W_in), head: kernel conditions; key,
            dominance, concentration, alignment, agreement.
        quantity: residual (||M^T u|| / (sigma_max ||u||), 0 to 1), kernel_share (of u below eps sigma_max, 0 to 1),
            lead (nats over an ordinary key), over_median and over_largest (ratios of row norms), top_share (0 to 1),
            cosine.
        vector, neuron_layer, neuron: u1 or u2 of a neuron, or outlier (neuron -1), of which block.
        layer, head: who reads it; the head of the model counts as the block after the last.
        value; random, neurons: typical value of the null (the root mean square for residuals of random directions, a
            median otherwise); *_sd: its standard deviation; *_percentile: share of the null below the
            value; *_p: one-sided p-value.
        verdict: empty for a quantity the condition is not judged by.
        """
        return self.table.copy()

    plot = drawn_by("theory.kernel_figure")
    """Heat maps, layer by condition: how strongly each reader reads each vector, and whom queries seek."""

    def plot_weights(self) -> go.Figure:
        """What each neuron writes into each dimension (figure 25)."""
        from registerlens.viz.theory import weight_figure

        return weight_figure(self)


def check_kernels(
    vit: HookedViT,
    neurons: RegisterNeurons,
    *,
    images: Images | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> KernelReport:
    """Ask a real model for the conditions of Proposition 1.

    For each neuron u1 is what it reads (input weights, LayerNorm folded in) and u2 what it writes (its row of W_out,
    LayerScale folded in). Every later block's W_V, W_V W_O and W_in, and the head, are asked how much of them they
    read, with the LayerNorm before them folded in. Lengths are taken after the LayerNorm's centring: a norm rescales
    what it lets pass, so that only the direction left counts. Beside every number stand random directions and other
    neurons of the same block. The proposition wants u1 and u2 in every kernel; behind norms, u1 fades as the token
    grows, and a sink is a no-op already where the value side does not read u2.

    Args:
        vit: the model, edited or not.
        neurons: which; found, published or listed.
        images: as for `rl.trace`. With images the key side uses their queries and keys, and the outlier tokens'
            direction is measured: against u1 before they fire, against u2, and as a vector of its own in every kernel.
        seed: of the nulls; equal seeds give equal reports.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: there is no neuron in the list.
        InterventionError: a neuron does not exist in the model.
        NonFiniteError: a weight is NaN or infinite; it is named.
        WeightsError: none of the neurons writes anything.
        ImageError, ShapeError: there are no images, or they do not fit the model.
        UnsupportedArchitectureError: attention is no softmax, or a norm stands after the sublayers.

    Source: Jiang et al. 2025, Proposition 1 and figure 25.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> report = check_kernels(vit, rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)]))
        >>> report.finding("value").verdict, report.finding("mlp").verdict
        ('holds approximately', 'fails')
    """
    require_softmax(vit.cfg, "The check of kernel conditions")
    require_linear_output(vit.cfg, "The check of kernel conditions")
    if not len(neurons):
        raise ConfigError("No neuron to check: the list is empty. See rl.find_register_neurons(vit, images).")
    warn_of_other_model(vit, neurons)
    layers = tuple(neurons.check(vit.cfg).by_layer())
    first = layers[0] + 1
    check_finite(vit, layers[0])
    observed = None if images is None else observe(vit, images, layers, first, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    rows = Rows()
    subjects, notes = subjects_of(vit, neurons, observed, generator)
    if not any(subject.vector == "u2" for subject in subjects):
        raise WeightsError(
            f"None of these neurons writes anything (their rows of W_out are zero): {neurons}."
            " Is the list of another model?"
        )
    notes += list(measure_kernels(rows, vit, subjects, first, generator))
    n_key_rows = measure_keys(rows, vit, subjects, first, observed, generator)
    for subject in subjects:
        if subject.vector == "u2":
            measure_size(rows, vit, subject, neurons)
            measure_concentration(rows, subject, generator)
        if observed is not None and observed.n_outliers and subject.vector != "outlier":
            measure_cosines(rows, vit, subject, observed, generator)
    n_tokens = vit.cfg.layout().n_tokens if observed is None else observed.n_tokens
    table = rows.frame()
    notes += [
        f"{name} scales {n} of {vit.cfg.d_model} dimensions to nothing: they lie in the kernel of all that reads it."
        for name, n in closed_dimensions(vit, first).items()
    ]
    others = torch.cat([subject.others for subject in subjects if subject.vector == "u2"])
    u2 = {pair: weights_of(vit, pair[0], torch.tensor([pair[1]]))["u2"][0] for pair in neurons.pairs}
    return KernelReport(
        **vit.identity,
        neurons=neurons,
        table=with_verdicts(table, n_tokens),
        written=torch.stack(list(u2.values())).cpu().numpy(),
        usual=others.square().mean(0).sqrt().cpu().numpy(),
        n_tokens=n_tokens,
        n_images=0 if observed is None else observed.n_images,
        n_outliers=0 if observed is None else observed.n_outliers,
        not_applicable=_not_applicable(vit, first, observed, n_key_rows),
        notes=tuple(notes + _notes_on_images(observed, n_key_rows)),
    )


def _not_applicable(vit: HookedViT, first: int, observed: Observed | None, n_key_rows: int) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if first == vit.cfg.n_layers:
        last = f"block {first - 1} is the last: no block reads what its neurons write"
        reasons |= {name: last for name in (*KERNELS[:-1], "key")}
    elif vit.cfg.qk_norm is not None or vit.cfg.rope is not None:
        reasons["key"] = "keys are normalised or turned by their positions, so that no direction has one score"
    elif not n_key_rows:
        reasons["key"] = "without biases weights alone do not say what queries seek; give images"
    if vit.cfg.n_heads == 1:
        reasons.setdefault("ov_head", "a single head is the sum over heads (ov)")
    if head_weight(vit) is None:
        reasons["head"] = "the model has no head or projection; it returns its tokens, which hides nothing"
    if observed is None:
        reasons |= {name: "it needs images" for name in ("alignment", "agreement")}
    elif not observed.n_outliers:
        evidence = observed.detection.evidence
        reasons |= {name: f"there are no outlier tokens ({evidence.reason})" for name in ("alignment", "agreement")}
    return reasons


def _notes_on_images(observed: Observed | None, n_key_rows: int) -> list[str]:
    if observed is None:
        stand_in = (
            "Without images the query of an average token (biases of LayerNorm and W_Q) stands in on the key side."
        )
        return [stand_in] if n_key_rows else []
    if not observed.n_outliers:
        return []
    return [
        f"{observed.n_outliers} outlier tokens in {observed.n_images} images, at {observed.detection.sublayer}; their "
        f"mean cosine to the direction they share is {float(observed.after.norm()):.2f}."
    ]

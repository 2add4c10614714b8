"""How what the weights, the edits and the circuit say of sinks goes together: one paragraph for a page."""

from registerlens.circuits.records import AttentionCircuit, share_from_outliers
from registerlens.errors import RegisterLensError
from registerlens.viz.study import THRESHOLD, Mechanism

SMALL = 0.05
"""A change of the output by less than this, and a share of it below this, count as next to nothing."""


def reconcile(found: Mechanism, circuit: object) -> str:
    """The three answers beside each other, what each of them is about, and whether they agree; "" without all three."""
    if isinstance(found.kernels, RegisterLensError) or isinstance(found.effects, RegisterLensError):
        return ""
    if isinstance(found.sinks, RegisterLensError) or not isinstance(circuit, AttentionCircuit):
        return ""
    counts = found.sinks.counts(THRESHOLD)
    nop = counts["nop"] / max(sum(counts.values()), 1)
    changed, share = found.effects.mean("output", "zero"), share_from_outliers(circuit, circuit.reader)
    by_weights = found.kernels.no_op in ("holds", "holds approximately", None)
    by_tokens = changed < SMALL and abs(share) < SMALL
    if by_weights == by_tokens:
        together = "The three agree."
    elif by_weights:
        together = (
            "No contradiction: the weights compare with a random direction of the same length; what is left of it, "
            "constants that every key brings, and what else stands in the outlier tokens, heads do read."
        )
    else:
        together = "No contradiction: heads read what the neurons write, and what follows makes little of it."
    passed = {"holds": "next to nothing", "holds approximately": "little", "fails": "a part", None: "nothing"}
    return (
        f"Three questions, three answers. By the weights, heads pass on {passed[found.kernels.no_op]} of what the "
        f"register neurons write. Of the sinks found, {nop:.0%} have a value next to nothing (NOP), and where a head's "
        f"sink is set to zero, the output changes by {changed:.1%}. Of what {circuit.reader} gets, {share:+.1%} comes "
        f"from outlier tokens, all that stands in these included. {together}"
    )

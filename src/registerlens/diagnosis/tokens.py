"""Models without outlier patches: a massive channel, sinks at other tokens, registers that hold the outliers."""

import numpy as np
from jaxtyping import Int

from registerlens.analysis.massive import KINDS, RELATIVE
from registerlens.analysis.outliers import OutlierEvidence
from registerlens.analysis.sink_events import MECHANISMS, PLACES, QUERIES
from registerlens.analysis.sink_kinds import SinkKinds
from registerlens.diagnosis.findings import CauseFinding
from registerlens.diagnosis.symptoms import SINK, Symptoms

MANY_SINKS = 0.1
"""Sinks are told of where at least this share of images and heads has one; 0.02 to 0.05 are seen in a model without."""
HELD = 3.0
"""A trained register holds outliers where its norm is at least this many times the median patch norm."""


def massive_channel(found: Symptoms) -> CauseFinding | None:
    """A channel that dwarfs all others, while no patch stands out."""
    massive = found.massive
    at = int(massive.ratio.argmax())
    if found.trace.verdict == "present" or massive.ratio[at] < RELATIVE:
        return None
    place, channel = massive.places[at], int(massive.top_channels[at, 0])
    return CauseFinding(
        cause="massive channel",
        words=(
            f"Channel {channel} dwarfs all others: {massive.largest[at]:.3g} at {place}, {massive.ratio[at]:.0f} x the "
            f"median magnitude, while no patch has an outlier norm."
        ),
        evidence={
            "place": place,
            "channel": float(channel),
            "largest over median magnitude": float(massive.ratio[at]),
            "kurtosis of the average token": float(massive.typical_kurtosis[at]),
        }
        | {f"massive tokens, {kind}": float(n) for kind, n in zip(KINDS, massive.tokens[at], strict=True)},
        advice=(
            "Keep that channel in float32 when you quantise, and leave it out of cosine distances and dictionaries; "
            "registers do not change it."
        ),
    )


def sinks_without_outliers(found: Symptoms) -> CauseFinding | None:
    """Attention sinks at tokens of ordinary norm."""
    if found.sinks is None or found.trace.verdict == "present" or registers_hold(found) is not None:
        return None
    events, (nop, broadcast, _), places = _sinks(found.sinks)
    rate = events / found.sinks.gu_rate.size / found.sinks.n_images
    if rate < MANY_SINKS:
        return None
    where = int(places.argmax())
    token, share = PLACES[where].replace("_", " "), places[where] / events
    name = "[CLS]" if token == "cls" else f"a {token}"
    return CauseFinding(
        cause="sinks without outliers",
        words=(
            f"In {rate:.0%} of images and heads, {QUERIES:.0%} of the queries pay one token at least {SINK:g} of their "
            f"attention, {name} in {share:.0%} of these; no patch has an outlier norm."
        ),
        evidence={
            "share of images and heads with a sink": rate,
            "token": token,
            "share of sinks at that token": share,
            "share of NOPs": nop / events,
            "share of broadcasts": broadcast / events,
        },
        advice=(
            "Patch features are clean of outlier norms; leave the sink's column out of attention maps. A test-time "
            "register has nothing to take over."
        ),
    )


def registers_hold(found: Symptoms) -> CauseFinding | None:
    """Trained registers that do what they are for."""
    if found.trace.verdict == "present" or not found.registers >= HELD:
        return None
    numbers: dict[str, float | str] = {"register norm over the median patch": found.registers}
    words = f"The model's trained registers hold what would be outliers: {found.registers:.1f} x the median patch norm"
    if found.sinks is not None:
        events, _, places = _sinks(found.sinks)
        numbers["share of sinks at a register"] = places[PLACES.index("trained_register")] / max(events, 1)
    return CauseFinding(
        cause="registers hold the outliers",
        words=f"{words}, while no patch stands out (the largest is at most {_largest(found):.1f} x).",
        evidence=numbers,
        advice="Nothing is to be done: use the patches, and leave the registers out.",
    )


def nothing(found: Symptoms) -> CauseFinding:
    """Everything was looked for, and none of it found."""
    numbers: dict[str, float | str] = {
        "largest norm over the median": _largest(found),
        "largest over median magnitude": float(found.massive.ratio.max()),
    }
    return CauseFinding(
        cause="none",
        words=(
            f"No outlier tokens: {_strongest(found).reason}. No massive channel, no sinks beyond a few heads; weights "
            f"and images are as they should be."
        ),
        evidence=numbers,
        advice="Nothing is to be done; a test-time register would have nothing to take over.",
    )


def too_few_images(found: Symptoms) -> CauseFinding | None:
    """A gap between norms that more images might confirm."""
    evidence = _strongest(found)
    if evidence.verdict != "too few images":
        return None
    return CauseFinding(
        cause="too few images",
        words=f"Whether there are outlier tokens cannot be told from {found.trace.n_images} images: {evidence.reason}.",
        evidence={
            "gap": evidence.gap,
            "norm over the median": evidence.typical,
            "more images": float(evidence.more_images),
        },
        advice=f"Give about {evidence.more_images} more images like these.",
    )


def _strongest(found: Symptoms) -> OutlierEvidence:
    return max(found.trace.evidence, key=lambda evidence: evidence.strength)


def _largest(found: Symptoms) -> float:
    return float(found.trace.largest_over_median.max())


def _sinks(sinks: SinkKinds) -> tuple[int, list[int], Int[np.ndarray, " place"]]:
    """How many there are, of each of MECHANISMS, and at each of PLACES."""
    counts = sinks.counts(SINK)
    return sum(counts.values()), [counts[name] for name in MECHANISMS], sinks.places[:, 0].sum((1, 2))

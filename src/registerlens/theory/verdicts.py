"""From numbers to words: which condition of Proposition 1 holds, holds approximately, or fails, and what that means."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from registerlens.theory.readers import KERNELS

VECTORS = {
    "u1": "u1 (what the neurons read)",
    "u2": "u2 (what the neurons write)",
    "outlier": "The outlier tokens' direction",
}
"""What a neuron reads, what it writes, and the measured direction of outlier tokens."""
READERS = {
    "value": "the values (W_V)",
    "ov": "attention's output (W_V W_O, heads summed)",
    "ov_head": "single heads' output (W_V W_O)",
    "mlp": "later MLPs (W_in)",
    "head": "the head",
}
_NULLS = {"random": "random directions", "neurons": "other neurons of the block"}
_SHOWN_EPS = 0.1


def title(condition: str, vector: str, rows: pd.DataFrame) -> str:
    """What was asked.

    Example:
        >>> title("mlp", "u2", pd.DataFrame({"layer": [3, 4, 5]}))
        'u2 (what the neurons write) in the kernel of later MLPs (W_in), blocks 3 to 5'
    """
    layers = sorted(set(rows["layer"]))
    where = f", blocks {layers[0]} to {layers[-1]}" if len(layers) > 1 else f", block {layers[0]}"
    by_itself = {
        "dominance": "Dominance of u2 over the other rows of W_out",
        "concentration": "Concentration of u2 on few dimensions",
        "alignment": "Alignment of outlier tokens with u1 before the neurons fire",
        "agreement": "Agreement of u2 with the outlier tokens' direction",
        "key": f"{VECTORS[vector]} as a key{where}",
    }
    if condition in by_itself:
        return by_itself[condition]
    return f"{VECTORS[vector]} in the kernel of {READERS[condition]}{'' if condition == 'head' else where}"


def reading(violation: float, hidden: float, faint: float) -> str:
    """How strongly a direction is read, next to a random one.

    Example:
        >>> reading(0.0, 0.05, 0.5), reading(0.3, 0.05, 0.5), reading(1.8, 0.05, 0.5)
        ('Not read', 'Read faintly', 'Read better than a random direction')
    """
    if violation <= hidden:
        return "Not read"
    if violation <= faint:
        return "Read faintly"
    if violation < 0.9:
        return "Read, if less than a random direction"
    return "Read like any direction" if violation < 1.1 else "Read better than a random direction"


def kernel_words(rows: pd.DataFrame, shares: pd.DataFrame, violation: float, how: str) -> str:
    """A kernel condition; `shares` are its rows on the numerical kernel, `rows` those on the residual."""
    by_layer = {
        layer: float(np.sqrt(np.mean(rows.loc[rows["layer"] == layer, "effect"].to_numpy() ** 2)))
        for layer in sorted(set(rows["layer"]))
    }
    layer = max(by_layer, key=by_layer.__getitem__)
    worst = f" (worst: block {layer}, {by_layer[layer]:.2g})" if len(by_layer) > 1 else ""
    inside = shares.loc[shares["eps"] == _SHOWN_EPS, ["value", "random"]].median()
    return (
        f"{how}: at {violation:.2g} of a random direction's strength{worst}; relative residual "
        f"{rows['value'].median():.2g}, random {rows['random'].median():.2g}; {inside['value']:.0%} of it lies where "
        f"singular values are below {_SHOWN_EPS} of the largest, random {inside['random']:.0%}."
    )


def key_words(best: pd.DataFrame, n_seeking: int, n_tokens: int) -> str:
    """The key side; `best` has the best head of every later block."""
    heads = zip(best["layer"], best["head"], best["value"], strict=True)
    leads = ", ".join(f"{value:+.1f} (head {layer}.{head})" for layer, head, value in heads)
    return (
        f"In {n_seeking} of {len(best)} later blocks the best head's queries seek it: its score over an ordinary key, "
        f"in nats, is {leads}; {np.log(n_tokens):.1f} would draw half of the attention."
    )


def own_words(condition: str, rows: pd.DataFrame, over_median: pd.DataFrame) -> str:
    """A condition on the vectors themselves; `over_median` are the rows on their norms over the median row's."""
    low, middle, high = rows["value"].min(), rows["value"].median(), rows["value"].max()
    span = f"{middle:.2g}" + (f" (from {low:.2g} to {high:.2g})" if len(rows) > 1 else "")
    if condition == "dominance":
        return (
            f"Norm {np.median(over_median['value']):.2g} x the median of the other rows, {span} x the largest of them."
        )
    if condition == "concentration":
        return (
            f"Three dimensions carry {span} of the squared norm, of a random direction's {rows['random'].median():.2g}."
        )
    return f"Mean cosine {span}."


def null_words(medians: Mapping[str, float], low: bool) -> str:
    """Where the median number stands in both nulls; nothing where it has none.

    Example:
        >>> where = {"random_percentile": 0.0, "random_p": 0.001, "neurons_percentile": 1.5, "neurons_p": math.nan}
        >>> null_words(where, low=True)
        ' Typically below 100% of random directions (p = 0.001).'
    """
    parts = []
    for null, name in _NULLS.items():
        percentile, p = medians[f"{null}_percentile"], medians[f"{null}_p"]
        if not math.isnan(p):
            parts.append(f"{100 - percentile if low else percentile:.3g}% of {name} (p = {p:.2g})")
    return f" Typically {'below' if low else 'above'} {' and '.join(parts)}." if parts else ""


Verdict = Literal["holds", "holds approximately", "fails"]

ALPHA = 0.01
"""A number the random-direction null produces more often than this is no evidence."""
HIDDEN = 0.05
"""A kernel condition holds where a direction is read at most at this share of a random direction's strength..."""
FAINT = 0.5
"""...and holds approximately up to this share."""
DOMINANT = 2.0
"""A row of W_out dominates at this many times the largest of the other rows; approximately, where it is the largest or
larger than all but ALPHA of them."""
CONCENTRATED = 0.5
"""u2 is concentrated with this share of its squared norm in three dimensions; approximately, where neither null (the
neurons' at SPECIFIC) produces its share."""
SPECIFIC = 0.05
"""p-value at which a number sets a neuron apart from its block's others."""
ALIGNED = 0.9
"""A cosine at which two directions are one; approximately, where random directions do not produce it."""

MAIN = dict.fromkeys(KERNELS, "residual") | {
    "key": "lead",
    "dominance": "over_largest",
    "concentration": "top_share",
    "alignment": "cosine",
    "agreement": "cosine",
}
"""The quantity each condition is judged by."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One condition, over all neurons and later layers."""

    condition: str
    """Which."""
    vector: str
    """Of which vector: "u1", "u2" or "outlier"."""
    verdict: Verdict
    """Whether it holds."""
    value: float
    """Median of the quantity it is judged by; for the key side the best head of the weakest layer."""
    effect: float
    """For kernel conditions the violation: how strongly the direction is read, as a share of a random direction's
    strength (root mean square; 0 is an exact kernel, 1 a direction like any other). Otherwise `value`."""
    random_p: float
    """Median p-value against random directions."""
    neurons_p: float
    """Median p-value against other neurons of the block."""
    words: str
    """The same for a reader."""


def judge(condition: str, effect: float, random_p: float, neurons_p: float, n_tokens: int) -> Verdict:
    """The verdict on one number, or on a median of many.

    Args:
        condition: one of MAIN.
        effect: for kernel conditions the violation, for others the quantity itself.
        random_p: p-value against random directions.
        neurons_p: p-value against other neurons.
        n_tokens: keys of a query; a key that outscores the average by log(n_tokens) draws about half of the attention.

    Example:
        >>> judge("mlp", 0.2, 0.001, 0.4, 197), judge("mlp", 0.2, 0.1, 0.4, 197), judge("key", 6.0, 0.001, 1.0, 197)
        ('holds approximately', 'fails', 'holds')
    """
    unlikely = random_p <= ALPHA
    if condition in KERNELS:
        full, partly = unlikely and effect <= HIDDEN, unlikely and effect <= FAINT
    elif condition == "dominance":
        full, partly = effect >= DOMINANT, effect >= 1 or neurons_p <= ALPHA
    elif condition == "concentration":
        full, partly = unlikely and effect >= CONCENTRATED, unlikely and neurons_p <= SPECIFIC
    elif condition == "key":
        full, partly = unlikely and effect >= np.log(n_tokens), unlikely and effect > 0
    else:
        full, partly = unlikely and effect >= ALIGNED, unlikely and effect > 0
    return "holds" if full else "holds approximately" if partly else "fails"


def select(table: pd.DataFrame, **columns: object) -> pd.DataFrame:
    """The rows whose columns have these values; a list allows any of its members.

    Example:
        >>> select(pd.DataFrame({"layer": [1, 2, 3]}), layer=[2, 3]).index.tolist()
        [1, 2]
    """
    chosen = np.ones(len(table), dtype=bool)
    for name, value in columns.items():
        chosen &= table[name].isin(value if isinstance(value, list) else [value]).to_numpy()
    return table.loc[chosen]


def effects(rows: pd.DataFrame) -> Float[np.ndarray, " row"]:
    """What rows are judged by: the value, over a random direction's where the condition is about a kernel."""
    value, random = rows["value"].to_numpy(), rows["random"].to_numpy()
    return np.where(rows["condition"].isin(KERNELS), value / random, value)


def main_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows on the quantities that conditions are judged by, with their effects."""
    rows = pd.concat([select(table, condition=name, quantity=quantity) for name, quantity in MAIN.items()])
    return rows.assign(effect=effects(rows))


def with_verdicts(table: pd.DataFrame, n_tokens: int) -> pd.DataFrame:
    """The table with a verdict in every row that bears its condition's main quantity; empty in the others."""
    rows = main_rows(table)
    columns = zip(rows["condition"], rows["effect"], rows["random_p"], rows["neurons_p"], strict=True)
    judged = [judge(name, effect, random_p, neurons_p, n_tokens) for name, effect, random_p, neurons_p in columns]
    verdicts = pd.Series(judged, index=rows.index, dtype=object)
    return table.assign(verdict=verdicts.reindex(table.index, fill_value="").tolist())


_MEDIANS = ["value", "random_p", "neurons_p", "random_percentile", "neurons_percentile"]


def find(table: pd.DataFrame, n_tokens: int) -> Iterator[Finding]:
    """One finding for each condition and vector that the table has."""
    main = main_rows(table)
    for condition in MAIN:
        for vector in VECTORS:
            rows = select(main, condition=condition, vector=vector)
            if not len(rows):
                continue
            if condition == "key":
                rows, verdict, value, text = _judged_keys(rows, n_tokens)
            else:
                verdict, value, text = _judged(rows, select(table, condition=condition, vector=vector), n_tokens)
            medians = _medians(rows)
            yield Finding(
                condition=condition,
                vector=vector,
                verdict=verdict,
                value=value if condition == "key" else medians["value"],
                effect=value,
                random_p=medians["random_p"],
                neurons_p=medians["neurons_p"],
                words=f"{title(condition, vector, rows)}: {verdict}. {text}"
                f"{null_words(medians, low=condition in KERNELS)}",
            )


def _judged(rows: pd.DataFrame, of_condition: pd.DataFrame, n_tokens: int) -> tuple[Verdict, float, str]:
    """Verdict, effect and words on one condition; `rows` are those of its main quantity."""
    condition, medians = rows["condition"].iloc[0], _medians(rows)
    if condition in KERNELS:
        effect = float(np.sqrt(np.mean(rows["effect"].to_numpy() ** 2)))
        text = kernel_words(rows, of_condition, effect, reading(effect, HIDDEN, FAINT))
    else:
        effect = medians["value"]
        text = own_words(condition, rows, select(of_condition, quantity="over_median"))
    return judge(condition, effect, medians["random_p"], medians["neurons_p"], n_tokens), effect, text


def _judged_keys(rows: pd.DataFrame, n_tokens: int) -> tuple[pd.DataFrame, Verdict, float, str]:
    """A sink needs one head a block: the best one counts, by the median over neurons. Its rows come first."""
    medians = rows.groupby(["layer", "head"])[_MEDIANS].median().reset_index()
    best = medians.loc[medians.groupby("layer")["value"].idxmax()]
    judged = zip(best["value"], best["random_p"], best["neurons_p"], strict=True)
    verdicts = [judge("key", value, random_p, neurons_p, n_tokens) for value, random_p, neurons_p in judged]
    n_seeking = sum(verdict != "fails" for verdict in verdicts)
    # Everywhere is "holds", somewhere is "approximately".
    overall: Verdict = "holds" if set(verdicts) == {"holds"} else "holds approximately" if n_seeking else "fails"
    return best, overall, float(np.min(best["value"].to_numpy())), key_words(best, n_seeking, n_tokens)


def _medians(rows: pd.DataFrame) -> dict[str, float]:
    return {name: float(np.median(rows[name].to_numpy())) for name in _MEDIANS}

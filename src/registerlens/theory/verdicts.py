"""From numbers to words: which condition of Proposition 1 holds, holds approximately, or fails, and what that means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from registerlens.theory.readers import KERNELS
from registerlens.theory.wording import kernel_words, key_words, null_words, own_words, reading, title

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
VECTORS = ("u1", "u2", "outlier")
"""What a neuron reads, what it writes, and the measured direction of outlier tokens."""


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


def find(table: pd.DataFrame, n_tokens: int) -> Iterator[Finding]:
    """One finding for each condition and vector that the table has."""
    main = main_rows(table)
    for condition in MAIN:
        for vector in VECTORS:
            rows = select(main, condition=condition, vector=vector)
            if len(rows):
                yield (_find_key if condition == "key" else _find)(condition, vector, rows, table, n_tokens)


_MEDIANS = ["value", "random_p", "neurons_p", "random_percentile", "neurons_percentile"]


def _find(condition: str, vector: str, rows: pd.DataFrame, table: pd.DataFrame, n_tokens: int) -> Finding:
    medians, kernel = _medians(rows), condition in KERNELS
    effect = float(np.sqrt(np.mean(rows["effect"].to_numpy() ** 2))) if kernel else medians["value"]
    verdict = judge(condition, effect, medians["random_p"], medians["neurons_p"], n_tokens)
    mine = select(table, condition=condition, vector=vector)
    if kernel:
        told = kernel_words(rows, mine, effect, reading(effect, HIDDEN, FAINT))
    else:
        told = own_words(condition, rows, select(mine, quantity="over_median"))
    return Finding(
        condition=condition,
        vector=vector,
        verdict=verdict,
        value=medians["value"],
        effect=effect,
        random_p=medians["random_p"],
        neurons_p=medians["neurons_p"],
        words=f"{title(condition, vector, rows)}: {verdict}. {told}{null_words(medians, low=kernel)}",
    )


def _find_key(condition: str, vector: str, rows: pd.DataFrame, table: pd.DataFrame, n_tokens: int) -> Finding:
    """A sink needs one head a block: the best one counts, by the median over neurons."""
    medians = rows.groupby(["layer", "head"])[_MEDIANS].median().reset_index()
    best = medians.loc[medians.groupby("layer")["value"].idxmax()]
    judged = zip(best["value"], best["random_p"], best["neurons_p"], strict=True)
    verdicts = [judge("key", value, random_p, neurons_p, n_tokens) for value, random_p, neurons_p in judged]
    n_seeking = sum(verdict != "fails" for verdict in verdicts)
    # Everywhere is "holds", somewhere is "approximately".
    overall: Verdict = "holds" if set(verdicts) == {"holds"} else "holds approximately" if n_seeking else "fails"
    typical, weakest = _medians(best), float(np.min(best["value"].to_numpy()))
    told = key_words(best, n_seeking, n_tokens)
    return Finding(
        condition=condition,
        vector=vector,
        verdict=overall,
        value=weakest,
        effect=weakest,
        random_p=typical["random_p"],
        neurons_p=typical["neurons_p"],
        words=f"{title(condition, vector, rows)}: {overall}. {told}{null_words(typical, low=False)}",
    )


def _medians(rows: pd.DataFrame) -> dict[str, float]:
    return {name: float(np.median(rows[name].to_numpy())) for name in _MEDIANS}

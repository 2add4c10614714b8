"""The numbers of a kernel check in words: what was asked, what was measured, and how unusual that is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

VECTORS = {
    "u1": "u1 (what the neurons read)",
    "u2": "u2 (what the neurons write)",
    "outlier": "The outlier tokens' direction",
}
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
    leads = ", ".join(f"{value:+.1f} (block {layer}, head {head})" for layer, head, value in heads)
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

"""What attribution patching found, and how far exact patching agrees."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from registerlens.display import drawn_by
from registerlens.results import ModelResult
from registerlens.stats.moments import RankCorrelation, rank_correlation

POOR = 0.8
"""A rank correlation with exact patching below which attributions are called poor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Attributions(ModelResult):
    """Estimated effects of patching, at many hook points; means over pairs, in the unit of the metric.

    A unit is a head where a point tells heads apart, else an entry of the last axis: a neuron, or a dimension of the
    stream. Units of different points stand side by side in one long axis.
    """

    metric: str
    """Name of the metric."""
    words: str
    """The metric in words, with its unit."""
    steps: int
    """Gradients along the way from clean to corrupted; 1 is first order."""
    tokens: str
    """Whose activations count."""
    n_pairs: int
    """Pairs with a value of the metric."""
    names: tuple[str, ...]
    """The hook points, in the order of the model's run."""
    n_units: tuple[int, ...]
    """Units of each."""
    kinds: tuple[str, ...]
    """What they are: "head", "neuron" or "dimension"."""
    total: float
    """Change of the metric from the clean to the corrupted image."""
    by_unit: Float[np.ndarray, " unit"]
    """Attribution of each unit, summed over tokens."""
    by_unit_error: Float[np.ndarray, " unit"]
    """Its standard error; NaN for one pair."""
    by_position: Float[np.ndarray, "name pos"]
    """Attribution of each token (a query, at scores and patterns), summed over units; NaN where there is no such
    token."""
    checked: Int[np.ndarray, " checked"]
    """Units that were also patched exactly, as indices into `by_unit`."""
    is_candidate: Bool[np.ndarray, " checked"]
    """Which of them have the largest attributions; the others are a random sample."""
    exact: Float[np.ndarray, " checked"]
    """Their exact effects: one unit alone patched, everything later free."""
    whole: Float[np.ndarray, " name"]
    """The exact effect of patching each hook point as a whole."""

    @property
    def by_name(self) -> Float[np.ndarray, " name"]:
        """Attribution of each whole hook point: with enough steps, its exact effect `whole`."""
        ends = np.cumsum(self.n_units)
        return np.array([part.sum() for part in np.split(self.by_unit, ends[:-1])])

    @property
    def on_sample(self) -> RankCorrelation:
        """Agreement with exact patching over the random sample."""
        some = ~self.is_candidate
        return rank_correlation(self.by_unit[self.checked[some]], self.exact[some])

    @property
    def on_candidates(self) -> RankCorrelation:
        """Agreement over the units with the largest attributions, which are hard to rank."""
        some = self.is_candidate
        return rank_correlation(self.by_unit[self.checked[some]], self.exact[some])

    def to_dataframe(self) -> pd.DataFrame:
        """One row a unit: hook point, kind, unit, attribution, standard error, exact effect (NaN where not checked)."""
        exact = np.full(len(self.by_unit), np.nan)
        exact[self.checked] = self.exact
        return pd.DataFrame(
            {
                "name": np.repeat(self.names, self.n_units),
                "kind": np.repeat(self.kinds, self.n_units),
                "unit": np.concatenate([np.arange(n) for n in self.n_units]),
                "attribution": self.by_unit,
                "standard_error": self.by_unit_error,
                "exact": exact,
            }
        )

    def describe(self) -> str:
        """The result in words."""
        table = self.to_dataframe()
        top = table.iloc[np.argsort(-np.abs(table["attribution"].to_numpy()), kind="stable")[:5]]
        named = ", ".join(
            f"{name} {kind} {unit} ({value:+.3g})"
            for name, kind, unit, value in zip(top["name"], top["kind"], top["unit"], top["attribution"], strict=True)
        )
        how = "to first order" if self.steps == 1 else f"by gradients at {self.steps} steps along the way"
        return (
            f"Attribution patching {how}, {self.tokens}: estimated change of {self.words or self.metric} (the whole "
            f"corrupted image: {self.total:+.3g}) on {self.n_pairs} pairs, {len(self.by_unit)} units of "
            f"{len(self.names)} hook points. Largest: {named}. {self.trust()}"
        )

    def trust(self) -> str:
        """How well attributions agree with exact patching, in words."""
        worst = int(np.argmax(np.abs(self.by_name - self.whole)))
        sums = (
            f"Of whole hook points {self.names[worst]} is furthest off: {self.by_name[worst]:+.3g} for an exact "
            f"{self.whole[worst]:+.3g}."
        )
        if not len(self.checked):
            return f"{sums} No unit was patched exactly to check this: raise exact= and sample=."
        groups = (("a random sample", self.on_sample), ("the largest", self.on_candidates))
        known = [(what, rho) for what, rho in groups if rho.n]
        words = "; ".join(f"{rho} on {what}" for what, rho in known)
        poor = [what for what, rho in known if rho.rho < POOR]
        more = "raise steps=, or patch exactly (rl.circuits.path_patching)" if self.steps == 1 else "patch exactly"
        warning = f" That is poor on {' and '.join(poor)}: {more}." if poor else ""
        return f"Spearman's rank correlation with exact patching: {words}.{warning} {sums}"

    plot = drawn_by("patching.attributions_figure")
    """Attributions by hook point, and against exact effects."""

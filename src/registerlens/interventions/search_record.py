"""The record of a search for register neurons: what was measured and chosen on the way, in words and as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from registerlens.analysis.detection import Detection
from registerlens.analysis.neurons import Pair
from registerlens.analysis.scores import SCORES, Keep, NeuronScores, Score
from registerlens.interventions.choosing_k import MOST
from registerlens.results import ModelResult, as_json

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronSearch(ModelResult):
    """How register neurons were found: everything that was measured and chosen on the way."""

    detection: Detection
    """Where outliers were looked for, above which norm, and the evidence on the first images."""
    scores: NeuronScores
    """Every neuron's scores."""
    score: Score
    """The score that ranks them."""
    keep: Keep
    """Which neurons were candidates; see `NeuronScores.candidates`."""
    lowest_layer: int
    """First layer searched."""
    top_layer: int
    """Last layer searched: the onset, unless it was given."""
    taken: tuple[Pair, ...]
    """(layer, neuron) of the register neurons, most important first."""
    elbow: int | None
    """How many the largest relative drop of the sorted scores suggests; None where no drop stands out, and for the AUC,
    which is bounded."""
    sweep: int | None
    """How many it takes until a test-time register leaves no outlier on held-out images; None: no number tried did, or
    there was no sweep (`sweep_note` says which)."""
    sweep_curve: tuple[tuple[int, float], ...]
    """(number of neurons, outliers per held-out image left, at whatever sublayer); 0 neurons first."""
    sweep_note: str
    """What happened in the sweep, in words."""
    later: tuple[NeuronSearch, ...] = ()
    """The same in the model whose neurons found so far are moved, again and again while outliers are left."""
    warnings: tuple[str, ...] = ()
    """What speaks against the choice, in words; of later searches, too."""

    @property
    def top_k(self) -> int:
        """How many neurons were taken."""
        return len(self.taken)

    @property
    def rounds(self) -> tuple[NeuronSearch, ...]:
        """This search, and the later ones."""
        return self, *self.later

    @property
    def ranked(self) -> list[tuple[int, int, float]]:
        """(layer, neuron, score) of the candidates, highest first."""
        return self.scores.ranked(self.score, keep=self.keep)

    @property
    def chosen(self) -> dict[Pair, float]:
        """The register neurons of this search and the later ones with their scores."""
        return {(a, b): value for one in self.rounds for a, b, value in one.ranked if (a, b) in one.taken}

    @property
    def sorted_scores(self) -> Float[np.ndarray, " rank"]:
        """Scores in descending order, at most 2 * MOST of them: the curve of the elbow."""
        return np.array([value for _, _, value in self.ranked[: 2 * MOST]])

    @property
    def overlap(self) -> float:
        """Share of the top_k that both halves of the images have in common, 0 to 1."""
        halves = [self.scores.ranked(self.score, half, self.keep)[: self.top_k] for half in (0, 1)]
        first, second = ({(a, b) for a, b, _ in half} for half in halves)
        return len(first & second) / self.top_k

    @property
    def rank_correlation(self) -> float:
        """Spearman's rank correlation of all neurons' scores between the halves; NaN where a half has no outlier."""
        index = SCORES.index(self.score)
        ranks = [pd.Series(self.scores.halves[half, index].ravel()).rank().to_numpy() for half in (0, 1)]
        if min(np.ptp(rank) for rank in ranks) == 0:
            return float("nan")
        return float(np.corrcoef(ranks)[0, 1])

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron of the layers searched, with all scores; `chosen` marks the register neurons.

        `round` is 0, and counts up for the later searches in the edited model, which have rows of their own.
        """
        frames = []
        for number, one in enumerate(self.rounds):
            frame = one.scores.to_dataframe().sort_values(one.score, ascending=False, kind="stable", ignore_index=True)
            pairs = zip(frame["layer"], frame["neuron"], strict=True)
            frames.append(frame.assign(chosen=[(int(a), int(b)) in one.taken for a, b in pairs], round=number))
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> dict[str, Any]:
        """What was chosen, JSON-ready."""
        correlation = self.rank_correlation
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "score": self.score,
            "keep": self.keep,
            "lowest_layer": self.lowest_layer,
            "top_layer": self.top_layer,
            "top_k": self.top_k,
            "elbow": self.elbow,
            "sweep": self.sweep,
            "sweep_curve": [list(point) for point in self.sweep_curve],
            "sweep_note": self.sweep_note,
            "warnings": list(self.warnings),
            "overlap_of_halves": self.overlap,
            "rank_correlation_of_halves": None if np.isnan(correlation) else correlation,
            "n_images": self.scores.n_images,
            "n_with_outliers": self.scores.n_with_outliers,
            "n_outliers": self.scores.n_outliers,
            "detection": as_json(self.detection),
            "evidence": as_json(self.scores.evidence),
            "later": [one.summary() for one in self.later],
        }

    def describe(self) -> str:
        """The choice in words."""
        sentences = ["no elbow" if self.elbow is None else f"the elbow of the scores says {self.elbow}"]
        sentences.append(f"the sweep {self.sweep}" if self.sweep is not None else self.sweep_note)
        per_image = self.scores.n_outliers / self.scores.n_images
        blocks = f"blocks {self.lowest_layer} to {self.top_layer}"
        later = [f"With these moved: {one.describe()}" for one in self.later]
        return " ".join(
            [
                f"{self.top_k} neurons, searched in {blocks} ({', '.join(sentences)}).",
                f"Outliers: above {self.detection.cutoff} at {self.detection.sublayer}, {per_image:.2f} per image.",
                f"Between halves of the {self.scores.n_images} images {self.overlap:.0%} of them agree.",
                *later,
                *(f"Warning: {warning}." for warning in self.warnings),
            ]
        )

    def plot(self) -> go.Figure:
        """Sorted scores with the elbow, and the outliers left by the number of neurons moved."""
        from registerlens.viz.detection import search_figure

        return search_figure(self)

"""Register neurons: a named set of (layer, neuron) pairs that can be filtered, combined, saved and looked up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from registerlens.config import ViTConfig
from registerlens.display import card
from registerlens.errors import ConfigError, InterventionError, close_matches
from registerlens.results import UNSAVED, ResultFile

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from registerlens.interventions.search_record import NeuronSearch
    from registerlens.model.vit import HookedViT

Pair = tuple[int, int]

_PUBLISHED = {path.stem: path for path in sorted((Path(__file__).parents[1] / "assets" / "neurons").glob("*.json"))}
"""Files of published lists by name."""


@dataclass(frozen=True, kw_only=True)
class RegisterNeurons(ResultFile):
    """An ordered set of neurons; iterates as (layer, neuron, score), in the order of importance where one is known.

    Made by `find_register_neurons`, `from_pairs`, `published` or `load`; `save` writes register_neurons.json, and any
    JSON with "neurons": [[layer, neuron], ...] can be read. `a | b`, `a & b` and `a - b` combine sets:
    the order, and the scores of common neurons, are those of `a`.

    Example:
        >>> neurons = RegisterNeurons.from_pairs([(5, 599), (3, 1074), (5, 846)])
        >>> len(neurons), (5, 599) in neurons, neurons.by_layer()
        (3, True, {3: (1074,), 5: (599, 846)})
        >>> (neurons - RegisterNeurons.from_pairs([(5, 599)])).pairs
        ((3, 1074), (5, 846))
    """

    STEM = "register_neurons"

    pairs: tuple[Pair, ...]
    """(layer, neuron) of each; layers count from 0."""
    scores: tuple[float, ...]
    """Importance of each (the score they were found by; NaN where unknown)."""
    source: str = "given"
    """Where the list came from."""
    found: dict[str, Any] = field(default_factory=dict, compare=False)
    """How they were found, JSON-ready: model, detection, score, estimates of top_k, stability."""
    search: NeuronSearch | None = field(default=None, compare=False, repr=False, metadata=UNSAVED)
    """The whole search with the scores of all neurons; not part of the file."""

    def __post_init__(self) -> None:
        # One and the same NaN for every unknown score: tuples with it are equal, and so are equal lists of neurons.
        object.__setattr__(self, "scores", tuple(math.nan if math.isnan(score) else score for score in self.scores))
        if len(self.pairs) != len(self.scores):
            raise ConfigError(
                f"{len(self.pairs)} neurons with {len(self.scores)} scores. Give one score for each neuron."
            )
        if len(set(self.pairs)) < len(self.pairs):
            twice = sorted({pair for pair in self.pairs if self.pairs.count(pair) > 1})
            raise ConfigError(f"Neurons {twice[:5]} are listed more than once. List each once.")
        if negative := [pair for pair in self.pairs if min(pair) < 0]:
            raise ConfigError(f"Layers and neurons count from 0, got {negative[:5]}.")

    # Making ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pairs(cls, pairs: Iterable[Pair], source: str = "given") -> RegisterNeurons:
        """A list of (layer, neuron).

        Raises:
            ConfigError: not pairs of integers, or a pair is given twice.

        Example:
            >>> RegisterNeurons.from_pairs([(1, 183)])
            RegisterNeurons(1 neuron: 1: 183; given)
        """
        pairs = list(pairs)
        try:
            clean = tuple((index(layer), index(neuron)) for layer, neuron in pairs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Expected (layer, neuron) pairs, got {pairs[:3]!r}.") from error
        return cls(pairs=clean, scores=(math.nan,) * len(clean), source=source)

    @classmethod
    def published(cls, name: str) -> RegisterNeurons:
        """A published list: "dinov2_vitl14" (45 neurons) or "openclip_vitb16" (those that figures name).

        Raises:
            ConfigError: there is no such list.

        Source: Jiang et al. 2025, appendix.

        Example:
            >>> len(RegisterNeurons.published("dinov2_vitl14"))
            45
        """
        if name not in _PUBLISHED:
            raise ConfigError(
                f"No published list {name!r}.{close_matches(name, _PUBLISHED)} There are: {sorted(_PUBLISHED)}."
            )
        return cls.load(_PUBLISHED[name])

    # Reading ---------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        for (layer, neuron), score in zip(self.pairs, self.scores, strict=True):
            yield layer, neuron, score

    def __len__(self) -> int:
        return len(self.pairs)

    def __contains__(self, pair: object) -> bool:
        return pair in self.pairs

    def __repr__(self) -> str:
        listed = "; ".join(f"{layer}: {' '.join(map(str, ns))}" for layer, ns in self.by_layer().items())
        about = "; ".join([self.source, *(f"warning: {warning}" for warning in self.warnings)])
        return f"RegisterNeurons({len(self)} neuron{'s' * (len(self) != 1)}: {listed or 'none'}; {about})"

    def _repr_html_(self) -> str:
        listed = [(str(layer), ", ".join(map(str, neurons))) for layer, neurons in self.by_layer().items()]
        return card(self, (("block", "neurons"), listed))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the choice, where a search made it."""
        return tuple(self.found.get("warnings", ()))

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Neurons of each layer, layers in ascending order."""
        layers = sorted({layer for layer, _ in self.pairs})
        return {layer: tuple(neuron for at, neuron in self.pairs if at == layer) for layer in layers}

    def check(self, cfg: ViTConfig) -> RegisterNeurons:
        """The same list, if the model has all of them.

        Raises:
            InterventionError: a layer or neuron does not exist in it.
        """
        wrong = [(layer, n) for layer, n in self.pairs if layer >= cfg.n_layers or n >= cfg.d_mlp]
        if wrong:
            raise InterventionError(
                f"Neurons {wrong[:5]} do not exist: the model has blocks 0 to {cfg.n_layers - 1} with neurons 0 to "
                f"{cfg.d_mlp - 1} each. Was the list ({self.source}) made for another model?"
            )
        return self

    def other_model(self, vit: HookedViT) -> str:
        """A sentence with both names if these neurons were found in another model than this one, else "".

        Of a float16 copy, whose weights are rounded, and of lists that were given or published nothing is said.
        """
        weights = self.found.get("fingerprint")
        if weights is None or vit.dtype == torch.float16 or weights == vit.fingerprint:
            return ""
        return (
            f"These register neurons were found in {self.found.get('model')} (weights {weights}) and are used in "
            f"{vit.source} (weights {vit.fingerprint}): neurons of one model mean nothing in another. Search in this "
            f"one, or say that it is meant with neurons.taken_for(vit)."
        )

    def taken_for(self, vit: HookedViT) -> RegisterNeurons:
        """The same list as one of this model's, so that its use there is no mistake to be warned of."""
        return replace(self, found=self.found | {"model": vit.source, "fingerprint": vit.fingerprint})

    def describe(self) -> str:
        """How many in which blocks, and where they come from."""
        where = ", ".join(f"{len(listed)} in block {layer}" for layer, listed in self.by_layer().items())
        warnings = "".join(f" Warning: {warning}." for warning in self.warnings)
        return f"{len(self)} register neurons ({where or 'none'}); {self.source}.{warnings}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron: rank, layer, neuron, score."""
        rows = [{"rank": i, "layer": layer, "neuron": n, "score": score} for i, (layer, n, score) in enumerate(self)]
        return pd.DataFrame(rows, columns=["rank", "layer", "neuron", "score"])

    def plot(self) -> go.Figure:
        """The sorted scores with the elbow, and the sweep over the number of neurons.

        Raises:
            ConfigError: the list was not found by a search in this session.
        """
        if self.search is None:
            raise ConfigError(
                f"These neurons ({self.source}) come without the scores of a search; there is no curve."
                " Find some with rl.find_register_neurons(vit, images)."
            )
        return self.search.plot()

    # Combining -------------------------------------------------------------------------------------------------------

    def filter(
        self,
        *,
        layers: Iterable[int] | None = None,
        top: int | None = None,
        where: Callable[[int, int, float], bool] | None = None,
    ) -> RegisterNeurons:
        """Those in `layers`, for which `where(layer, neuron, score)` holds, and of these the first `top`.

        Example:
            >>> len(RegisterNeurons.published("dinov2_vitl14").filter(layers=[16, 17], top=20))
            20
        """
        kept = None if layers is None else set(layers)
        chosen = [
            (pair, score)
            for pair, score in zip(self.pairs, self.scores, strict=True)
            if (kept is None or pair[0] in kept) and (where is None or where(*pair, score))
        ]
        return self._with(chosen[:top])

    def __or__(self, other: RegisterNeurons) -> RegisterNeurons:
        extra = [(pair, score) for pair, score in zip(other.pairs, other.scores, strict=True) if pair not in self]
        return self._with([*zip(self.pairs, self.scores, strict=True), *extra], f"{self.source} | {other.source}")

    def __and__(self, other: RegisterNeurons) -> RegisterNeurons:
        return self.filter(where=lambda layer, neuron, score: (layer, neuron) in other)

    def __sub__(self, other: RegisterNeurons) -> RegisterNeurons:
        return self.filter(where=lambda layer, neuron, score: (layer, neuron) not in other)

    def _with(self, chosen: list[tuple[Pair, float]], source: str | None = None) -> RegisterNeurons:
        return RegisterNeurons(
            pairs=tuple(pair for pair, _ in chosen),
            scores=tuple(score for _, score in chosen),
            source=self.source if source is None else source,
            found=self.found,
        )

    # Files -----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; an unknown score is None."""
        listed = [[layer, neuron, None if math.isnan(score) else score] for layer, neuron, score in self]
        return {"source": self.source, "neurons": listed, "found": self.found}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RegisterNeurons:
        """The inverse of `to_dict`; entries may be [layer, neuron] alone.

        Raises:
            ConfigError: the values do not describe neurons.
        """
        try:
            entries = [(index(entry[0]), index(entry[1]), *entry[2:]) for entry in values["neurons"]]
            scores = tuple(math.nan if len(e) < 3 or e[2] is None else float(e[2]) for e in entries)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(
                f'Not a list of register neurons: expected {{"neurons": [[layer, neuron, score], ...]}}. {error!r}'
            ) from error
        pairs = tuple((entry[0], entry[1]) for entry in entries)
        return cls(pairs=pairs, scores=scores, source=values.get("source", "given"), found=values.get("found", {}))


class OtherModelWarning(UserWarning):
    """Register neurons of one model are used in another."""


def warn_of_other_model(vit: HookedViT, neurons: RegisterNeurons) -> None:
    """Warn, with both names, if the neurons were found in another model; `neurons.taken_for(vit)` says it is meant."""
    if words := neurons.other_model(vit):
        warnings.warn(words, OtherModelWarning, stacklevel=3)

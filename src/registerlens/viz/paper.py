"""Every figure of "Vision Transformers Don't Need Trained Registers" by its number, drawn from results of any model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
import yaml

from registerlens.analysis.maps import NeuronMaps
from registerlens.analysis.neuron_evidence import ActivationDistributions
from registerlens.analysis.neuron_updates import NeuronUpdates
from registerlens.analysis.output_weights import OutputWeights
from registerlens.analysis.trace import Trace
from registerlens.errors import ConfigError
from registerlens.evaluation.comparison import InterventionMaps
from registerlens.evaluation.effects import Evaluation
from registerlens.evaluation.shifts import OutlierShift
from registerlens.markup import asset
from registerlens.viz.detection import trace_figure
from registerlens.viz.evaluation import norms_figure, shift_figure
from registerlens.viz.maps import conditions_figure, layers_figure, neurons_figure
from registerlens.viz.neuron_evidence import distributions_figure, updates_figure, weights_figure
from registerlens.viz.theme import Mode, Size, sized


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """One figure: what the paper shows, and what it is drawn from here."""

    title: str
    """What the figure shows."""
    takes: dict[type, str]
    """Kinds of results, each with the call that makes it."""
    draw: Callable[..., go.Figure]
    """From the results, the mode and options to the figure."""
    options: tuple[str, ...] = ()
    """What else `draw` can be told."""
    note: str = ""
    """Where it differs from the paper's."""


def paper_figure(number: int, *results: Any, mode: Mode = "light", size: Size = "cell", **options: Any) -> go.Figure:
    """A figure of the paper, drawn from your results.

    Args:
        number: of the figure in Jiang et al. 2025; `paper_figures()` lists them with what they take.
        results: what it is drawn from, in any order.
        mode: light or dark.
        size: "cell" for a notebook; "page" or "column" for a paper.
        options: such as `images`, `layer` or `layers` of map figures.

    Raises:
        ConfigError: there is no such figure, its results are others, or it has no such option.

    Source: Jiang et al. 2025 (arXiv 2506.08010).

    Example:
        >>> import torch, registerlens as rl
        >>> found = rl.trace(rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48))
        >>> paper_figure(2, found).data[0].name
        'largest, after attention'
        >>> paper_figure(6)
        Traceback (most recent call last):
        registerlens.errors.ConfigError: Figure 6 is not drawn here: attention of LLaVA's language model to the ...
    """
    if number not in FIGURES:
        raise ConfigError(_no_such(number))
    figure = FIGURES[number]
    matched = _matched(number, figure, results)
    if unknown := sorted(set(options) - set(figure.options)):
        raise ConfigError(f"Figure {number} has no option {unknown}; it has {list(figure.options) or 'none'}.")
    if "size" in figure.options:
        return figure.draw(*matched, mode=mode, size=size, **options)
    return sized(figure.draw(*matched, mode=mode, **options), size)


def paper_figures() -> pd.DataFrame:
    """Every figure that can be drawn: number, what it shows, which results it takes, and the calls that make them.

    Example:
        >>> paper_figures().set_index("figure").loc[25, "takes"]
        'OutputWeights'
    """
    rows = [
        {
            "figure": number,
            "shows": figure.title,
            "takes": ", ".join(kind.__name__ for kind in figure.takes),
            "made by": "; ".join(figure.takes.values()),
            "note": figure.note,
        }
        for number, figure in FIGURES.items()
    ]
    return pd.DataFrame(rows)


def _no_such(number: int) -> str:
    if number in NOT_DRAWN:
        return f"Figure {number} is not drawn here: {NOT_DRAWN[number]}"
    listed = "\n".join(f"  {known}: {figure.title}" for known, figure in FIGURES.items())
    return f"The paper has no figure {number!r} that can be drawn here. There are:\n{listed}"


def _matched(number: int, figure: PaperFigure, results: tuple[Any, ...]) -> list[Any]:
    """The results in the order of `takes`."""
    left = list(results)
    matched = []
    for kind in figure.takes:
        match = next((result for result in left if isinstance(result, kind)), None)
        if match is not None:
            left.remove(match)
            matched.append(match)
    if left or len(matched) < len(figure.takes):
        wanted = " and ".join(f"{_article(kind.__name__)}, from {call}" for kind, call in figure.takes.items())
        got = ", ".join(type(result).__name__ for result in results) or "nothing"
        raise ConfigError(f"Figure {number} ({figure.title}) takes {wanted}; got {got}.")
    return matched


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


_CHOSEN = ("size", "images", "layer")


def _layers(maps: InterventionMaps, *, half: Literal["all", "first", "second"] = "all", **options: Any) -> go.Figure:
    """Photographs and conditions, block by block, of all blocks or of a half of them."""
    middle = -(-len(maps.layers) // 2)
    shown = {"all": maps.layers, "first": maps.layers[:middle], "second": maps.layers[middle:]}[half]
    return layers_figure(maps, **{"layers": shown, **options})


_DRAWN_AS: dict[str, tuple[Callable[..., go.Figure], tuple[str, ...]]] = {
    "conditions": (partial(conditions_figure, measures=("attention",)), (*_CHOSEN, "measures")),
    "layers": (_layers, ("size", "images", "layers", "measure")),
    "neurons": (neurons_figure, _CHOSEN),
    "shift": (shift_figure, ()),
    "trace": (trace_figure, ()),
    "norms": (norms_figure, ()),
    "distributions": (distributions_figure, ()),
    "updates": (updates_figure, ()),
    "weights": (weights_figure, ()),
}
"""Ways to draw, and what else can be asked of each."""
_OF_NEURONS = (NeuronMaps, ActivationDistributions, NeuronUpdates, OutputWeights)
_RESULTS = {kind.__name__: kind for kind in (InterventionMaps, OutlierShift, Trace, Evaluation, *_OF_NEURONS)}
"""Classes of results that figures are drawn from."""


def _listed(*, title: str, drawn_as: str, takes: dict[str, str], note: str = "", **options: Any) -> PaperFigure:
    """A figure as the catalogue lists it; further entries are options that it is always drawn with."""
    draw, may_be_asked = _DRAWN_AS[drawn_as]
    calls: dict[type, str] = {_RESULTS[name]: call for name, call in takes.items()}
    return PaperFigure(title=title, takes=calls, draw=partial(draw, **options), options=may_be_asked, note=note)


_CATALOGUE = yaml.safe_load(str(asset("paper/figures.yaml")))
FIGURES: dict[int, PaperFigure] = {number: _listed(**entry) for number, entry in _CATALOGUE["drawn"].items()}
"""What can be drawn, by number."""
NOT_DRAWN: dict[int, str] = _CATALOGUE["not_drawn"]
"""What cannot, and why."""

"""Every figure of "Vision Transformers Don't Need Trained Registers" by its number, drawn from results of any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from registerlens.analysis.maps import NeuronMaps
from registerlens.analysis.neuron_evidence import ActivationDistributions
from registerlens.analysis.neuron_updates import NeuronUpdates
from registerlens.analysis.output_weights import OutputWeights
from registerlens.analysis.trace import Trace
from registerlens.errors import ConfigError
from registerlens.evaluation.comparison import InterventionMaps, Measure
from registerlens.evaluation.effects import Evaluation
from registerlens.evaluation.shifts import OutlierShift
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
            "shows": one.title,
            "takes": ", ".join(kind.__name__ for kind in one.takes),
            "made by": "; ".join(one.takes.values()),
            "note": one.note,
        }
        for number, one in FIGURES.items()
    ]
    return pd.DataFrame(rows)


def _no_such(number: int) -> str:
    if number in NOT_DRAWN:
        return f"Figure {number} is not drawn here: {NOT_DRAWN[number]}"
    listed = "\n".join(f"  {known}: {one.title}" for known, one in FIGURES.items())
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


_COMPARED = "rl.evaluation.compare_maps(vit, images, {'original': None, %s})"
_REGISTER = "'with register': rl.TestTimeRegisters(neurons)"
_BIAS = "'attention bias': rl.AttentionBias.fit(vit, images, neurons)"
_CHOSEN = ("size", "images", "layer")
_RANDOM = "random_neurons(neurons, vit.cfg.d_mlp, torch.Generator())"
_WHENCE = "random_neurons is registerlens.evaluation.controls's."


def _maps(title: str, *conditions: str, measures: tuple[Measure, ...] = ("attention",), note: str = "") -> PaperFigure:
    """Photographs and conditions, after one block."""
    return PaperFigure(
        title=title,
        takes={InterventionMaps: _COMPARED % ", ".join(conditions)},
        draw=partial(conditions_figure, measures=measures),
        options=(*_CHOSEN, "measures"),
        note=note,
    )


def _layers(title: str, part: Callable[[int, int], bool] = lambda _i, _n: True) -> PaperFigure:
    """Photographs and conditions, block by block; `part` says whether the i-th of n blocks is shown."""

    def draw(maps: InterventionMaps, **options: Any) -> go.Figure:
        layers = [layer for i, layer in enumerate(maps.layers) if part(i, len(maps.layers))]
        return layers_figure(maps, **{"layers": layers, **options})

    takes: dict[type, str] = {InterventionMaps: _COMPARED % _REGISTER}
    return PaperFigure(title=title, takes=takes, draw=draw, options=("size", "images", "layers", "measure"))


def _neurons(title: str, pairs: str) -> PaperFigure:
    """Photographs, norms and the activations of neurons."""
    takes = {
        InterventionMaps: "rl.evaluation.compare_maps(vit, images, {'original': None})",
        NeuronMaps: f"rl.analysis.neuron_maps(vit, images, {pairs})",
    }
    return PaperFigure(title=title, takes=takes, draw=neurons_figure, options=_CHOSEN)


def _shift(title: str, intervention: str, note: str = "") -> PaperFigure:
    """Histograms of norm and attention, target against other patches."""
    takes: dict[type, str] = {OutlierShift: f"rl.evaluation.measure_shift(vit, images, {intervention})"}
    return PaperFigure(title=title, takes=takes, draw=shift_figure, note=note)


def _one(title: str, kind: type, call: str, draw: Callable[..., go.Figure], note: str = "") -> PaperFigure:
    """Drawn by a function that other pages use too."""
    return PaperFigure(title=title, takes={kind: call}, draw=draw, note=note)


_ANYWHERE = "rl.evaluation.RandomPatches(vit.cfg.patch_size)"
_ACTIVATIONS = "rl.analysis.activation_distributions(vit, images, neurons)"
_MEAN_HEADS = "Attention is the mean over heads."

FIGURES: dict[int, PaperFigure] = {
    1: _maps(
        "Outliers of the original model, shifted to chosen patches, and moved into a test-time register",
        "'shifted': rl.MoveOutliers(neurons, positions)",
        _REGISTER,
        measures=("norms", "attention"),
    ),
    2: _one(
        "OpenCLIP: outliers appear after MLPs, attention sinks right after them",
        Trace,
        "rl.trace(vit, images)",
        trace_figure,
    ),
    3: _neurons(
        "OpenCLIP: neurons that fire at the top outlier fire at all outliers", "[(6, 980), (6, 61), (6, 2372)]"
    ),
    4: _shift(
        "OpenCLIP: register neurons shift outliers to random patches",
        f"rl.MoveOutliers(neurons, {_ANYWHERE})",
        _MEAN_HEADS,
    ),
    5: _maps(
        "DINOv2: attention maps with trained registers and with a test-time register",
        _REGISTER,
        note="Trained registers are another model's: add its maps with "
        "`| rl.evaluation.compare_maps(other, images, {...})`.",
    ),
    7: _maps("OpenCLIP: attention maps with an attention bias made from registers", _BIAS, _REGISTER),
    8: _one(
        "OpenCLIP: with an attention bias no outlier norm is left in any layer",
        Evaluation,
        f"rl.evaluate_intervention(vit, images, {{{_BIAS}}})",
        norms_figure,
    ),
    9: _maps("OpenCLIP: an attention bias cleans attention maps as a test-time register does", _BIAS, _REGISTER),
    12: _maps(
        "DINOv2: one test-time register is enough, several change little",
        "**{f'{n} registers': rl.TestTimeRegisters(neurons, n, assign='random') for n in (1, 2, 3, 4, 5)}",
    ),
    13: _maps(
        "DINOv2: how a test-time register starts does not matter",
        "**{init: rl.TestTimeRegisters(neurons, init=init) for init in ('zero', 'gaussian', 'mean')}",
    ),
    14: _maps("InternViT-6B: attention map with a test-time register", _REGISTER),
    15: _maps(
        "OpenAI CLIP: outliers moved onto written text",
        "'shifted': rl.MoveOutliers(neurons, positions_of_text)",
        measures=("norms",),
        note="The paper also prints the predicted class.",
    ),
    16: _layers("OpenCLIP: attention maps of all layers with a test-time register"),
    17: _layers("DINOv2: attention maps of the first half of the layers", lambda i, n: 2 * i < n),
    18: _layers("DINOv2: attention maps of the second half of the layers", lambda i, n: 2 * i >= n),
    19: _neurons("OpenCLIP: neurons before the onset that fire at outliers", "[(5, 599), (4, 1468), (3, 1074)]"),
    20: _one(
        "OpenCLIP: activations of a layer's neurons at the top outlier and at a normal patch",
        ActivationDistributions,
        _ACTIVATIONS,
        distributions_figure,
        "The paper's horizontal axis is linear.",
    ),
    21: _one(
        "OpenCLIP: outlier neurons write much, in a constant direction",
        NeuronUpdates,
        "rl.analysis.neuron_updates(vit, images, neurons)",
        updates_figure,
    ),
    22: _shift("OpenCLIP: outliers shifted to a test-time register", "rl.TestTimeRegisters(neurons)", _MEAN_HEADS),
    23: _shift(
        "OpenCLIP: random neurons do not shift outliers",
        f"rl.MoveOutliers({_RANDOM}, {_ANYWHERE})",
        f"{_MEAN_HEADS} {_WHENCE}",
    ),
    24: _shift(
        "OpenCLIP: nor do random neurons that get the register neurons' maxima",
        f"rl.MoveOutliers({_RANDOM}, {_ANYWHERE}, maxima_of=neurons)",
        f"{_MEAN_HEADS} {_WHENCE}",
    ),
    25: _one(
        "OpenCLIP: register neurons write into the same few dimensions",
        OutputWeights,
        "rl.analysis.output_weights(vit, neurons)",
        weights_figure,
        "Weights are signed and relative; other neurons of the layer are behind each, not in a row of their own.",
    ),
    26: _one("DINOv2: as figure 2", Trace, "rl.trace(vit, images)", trace_figure),
    27: _one("DINOv2: as figure 20", ActivationDistributions, _ACTIVATIONS, distributions_figure),
    28: _neurons("DINOv2: as figure 3", "[(17, 884), (17, 133), (17, 1427)]"),
    29: _shift("DINOv2: as figure 4", f"rl.MoveOutliers(neurons, {_ANYWHERE})", _MEAN_HEADS),
}
"""What can be drawn, by number. Captions are those of version 5 on arXiv, restated."""

NOT_DRAWN: dict[int, str] = {
    6: "attention of LLaVA's language model to the visual tokens, which needs that language model.",
    10: "a drawing of algorithm 1; `rl.find_register_neurons` runs it, and its result has a plot of its own.",
    11: "a drawing of algorithm 2; `rl.TestTimeRegisters` carries it out.",
    30: "intermediate steps of LOST; rl.viz.overlay draws any map over a photograph.",
    31: "LOST scores by kind of feature; rl.viz.overlay draws any map over a photograph.",
    32: "more of figure 6, which needs LLaVA's language model.",
}
"""What cannot, and why."""

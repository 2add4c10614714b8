"""Maps of several conditions, layers or neurons side by side, over the photographs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from registerlens.analysis.maps import NeuronMaps
from registerlens.errors import ConfigError
from registerlens.evaluation.comparison import InterventionMaps, Measure
from registerlens.viz.panels import Panel, Scale, panel_figure
from registerlens.viz.theme import Mode, Size, width_of

_NAMES: dict[Measure, str] = {"norms": "residual norm", "attention": "attention"}
_BESIDE: dict[Measure, Measure] = {"norms": "attention", "attention": "norms"}
_COLOURS: dict[Measure, str] = {"norms": "Viridis", "attention": "Inferno"}
_OUTSIDE: dict[Measure, str] = {"norms": "register", "attention": "outside"}
"""What takes the outliers over, outside the image."""
_WIDEST_BLOCK, _NARROWEST_BLOCK = 110.0, 52
"""Widest and narrowest panel where blocks stand side by side, in pixels."""
ACROSS = 12
"""Most blocks beside each other."""


def conditions_figure(
    maps: InterventionMaps,
    *,
    layer: int | None = None,
    measures: Sequence[Measure] = ("attention",),
    images: Sequence[int] | None = None,
    size: Size = "cell",
    mode: Mode = "light",
) -> go.Figure:
    """The photograph and a column for each condition; a row for each image and measure.

    Args:
        maps: what `compare_maps` found.
        layer: the block; None is the last one there.
        measures: "norms", "attention" or both.
        images: which of them, by index; None shows all.
        size: "cell" for a notebook; "page" or "column" for a paper.
        mode: light or dark.

    Raises:
        ConfigError: there is no such block, measure or image.

    Source: Jiang et al. 2025, figures 1, 5, 7, 9, 12 to 15.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.evaluation.comparison import compare_maps
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> figure = conditions_figure(compare_maps(vit, torch.rand(1, 3, 48, 48), {"original": None}))
        >>> figure.data[0].z.shape
        (6, 6)
    """
    layer = maps.layers[-1] if layer is None else layer
    if not measures:
        raise ConfigError("There is no measure to show: give measures=('norms',), ('attention',) or both.")
    chosen, scales = _images(maps, images), []
    found = {(measure, name): maps.at(measure, name, layer) for measure in measures for name in maps.conditions}
    for measure in measures:
        values = [found[measure, name][chosen] for name in maps.conditions]
        scales.append(_scale(maps, measure, values))
    rows, titles = [], []
    for i in chosen:
        for k, measure in enumerate(measures):
            first = not rows
            photograph = Panel(photograph=maps.display[i], title="photograph" if first else "")
            row: list[Panel | None] = [photograph if k == 0 else None]
            for name in maps.conditions:
                row.append(_panel(maps, measure, name, layer, i, k, name if first else ""))
            rows.append(row)
            told = [maps.names[i]] * (len(chosen) > 1) + [_NAMES[measure]] * (len(measures) > 1)
            titles.append(": ".join(told))
    title = f"{maps.model}: after block {layer}"
    return panel_figure(rows, scales, row_titles=titles if len(rows) > 1 else (), title=title, size=size, mode=mode)


def layers_figure(
    maps: InterventionMaps,
    *,
    measure: Measure = "attention",
    layers: Sequence[int] | None = None,
    images: Sequence[int] | None = None,
    size: Size = "cell",
    mode: Mode = "light",
) -> go.Figure:
    """A column a block, twelve at most beside each other; a row for each image and condition.

    Args:
        maps: what `compare_maps` found.
        measure: "norms" or "attention".
        layers: which blocks; None shows all.
        images: which images, by index; None shows all.
        size: "cell" for a notebook; "page" or "column" for a paper.
        mode: light or dark.

    Raises:
        ConfigError: there is no such block, measure or image, or there are more than 128 panels.

    Source: Jiang et al. 2025, figures 16 to 18.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.evaluation.comparison import compare_maps
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> len(layers_figure(compare_maps(vit, torch.rand(1, 3, 48, 48), {"original": None})).data)
        6
    """
    shown = list(maps.layers if layers is None else layers)
    chosen = _images(maps, images)
    if not shown:
        raise ConfigError(f"There is no block to show; the maps have the blocks {list(maps.layers)}.")
    parts = -(-len(shown) // min(ACROSS, int(width_of(size) / _NARROWEST_BLOCK) - 3))
    across = -(-len(shown) // parts)
    values = [maps.at(measure, name, layer)[chosen] for name in maps.conditions for layer in shown]
    scale = _scale(maps, measure, values)
    rows, titles = [], []
    for i in chosen:
        for start in range(0, len(shown), across):
            for k, name in enumerate(maps.conditions):
                head = [f"block {layer}" if k == 0 else "" for layer in shown[start : start + across]]
                part = zip(shown[start : start + across], head, strict=True)
                photograph = Panel(photograph=maps.display[i], title=maps.names[i]) if k == 0 else None
                rows.append([photograph, *(_panel(maps, measure, name, layer, i, 0, words) for layer, words in part)])
                titles.append(name)
    title = f"{maps.model}: {_NAMES[measure]}, block by block"
    return panel_figure(rows, [scale], row_titles=titles, title=title, widest=_WIDEST_BLOCK, size=size, mode=mode)


def neurons_figure(
    maps: InterventionMaps,
    neurons: NeuronMaps,
    *,
    layer: int | None = None,
    images: Sequence[int] | None = None,
    size: Size = "cell",
    mode: Mode = "light",
) -> go.Figure:
    """The photograph, the patch norms of the first condition, and the activations of each neuron; a row an image.

    Args:
        maps: what `compare_maps` found; its first condition's norms are shown.
        neurons: what `neuron_maps` found on the same images.
        layer: after which block the norms are; None is the last one there.
        images: which of them, by index; None shows all.
        size: "cell" for a notebook; "page" or "column" for a paper.
        mode: light or dark.

    Raises:
        ConfigError: the two are not of the same images, or there is no such block or image.

    Source: Jiang et al. 2025, figures 3, 19 and 28.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.analysis.maps import neuron_maps
        >>> from registerlens.evaluation.comparison import compare_maps
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48)
        >>> maps = compare_maps(vit, images, {"original": None})
        >>> [panel.name for panel in neurons_figure(maps, neuron_maps(vit, images, [(1, 183)])).data]
        ['patch norms', 'block 1, neuron 183']
    """
    if neurons.activations.shape[1:] != maps.norms.shape[2:]:
        raise ConfigError(
            f"The neurons' maps are [image, grid_h, grid_w] = {list(neurons.activations.shape[1:])}, the norms' "
            f"{list(maps.norms.shape[2:])}. Give both functions the same images."
        )
    layer = maps.layers[-1] if layer is None else layer
    chosen, condition = _images(maps, images), maps.conditions[0]
    norms = maps.at("norms", condition, layer)
    scales = [
        Scale.over(f"residual norm after block {layer}", [norms[chosen]], colours=_COLOURS["norms"]),
        Scale.over("activation", [neurons.activations[:, chosen]], colours="Cividis"),
    ]
    rows = []
    for i in chosen:
        first = not rows
        row: list[Panel | None] = [Panel(photograph=maps.display[i], title="photograph" if first else "")]
        row.append(_panel(maps, "norms", condition, layer, i, 0, "patch norms" if first else ""))
        for (at, neuron), activations in zip(neurons.pairs, neurons.activations, strict=True):
            row.append(
                Panel(
                    photograph=maps.display[i],
                    values=activations[i],
                    scale=1,
                    beside=("residual norm", norms[i]),
                    title=f"block {at}, neuron {neuron}" if first else "",
                    hover="activation",
                )
            )
        rows.append(row)
    titles = [maps.names[i] for i in chosen] if len(chosen) > 1 else ()
    return panel_figure(rows, scales, row_titles=titles, title=f"{maps.model}: {condition}", size=size, mode=mode)


def _panel(
    maps: InterventionMaps, measure: Measure, condition: str, layer: int, image: int, scale: int, title: str
) -> Panel:
    other = _BESIDE[measure]
    registers = (maps.register_norm, maps.register_attention)[measure == "attention"]
    own = registers[maps.conditions.index(condition), maps.layers.index(layer), image]
    return Panel(
        photograph=maps.display[image],
        values=maps.at(measure, condition, layer)[image],
        scale=scale,
        beside=(_NAMES[other], maps.at(other, condition, layer)[image]),
        title=title,
        hover=_NAMES[measure],
        note="" if np.isnan(own) else f"{_OUTSIDE[measure]}: {own:.3g}",
    )


def _scale(maps: InterventionMaps, measure: Measure, values: Sequence[np.ndarray]) -> Scale:
    """Norms from zero; attention by its logarithm, for a sink draws a hundred times as much as other patches."""
    return Scale.over(_words(maps, measure), values, log=measure == "attention", colours=_COLOURS[measure])


def _words(maps: InterventionMaps, measure: Measure) -> str:
    if measure == "norms":
        return _NAMES[measure]
    return "attention of [CLS] (log)" if maps.sink_query == "cls" else "attention, mean of queries (log)"


def _images(maps: InterventionMaps, images: Sequence[int] | None) -> list[int]:
    n = len(maps.names)
    chosen = list(range(n) if images is None else images)
    if not chosen or any(not 0 <= i < n for i in chosen):
        raise ConfigError(f"Images {chosen} do not exist or are none: there are images 0 to {n - 1}.")
    return chosen

"""Maps over photographs: of conditions, layers or neurons beside each other, and of any values by patch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from registerlens.analysis.maps import NeuronMaps, PatchMaps
from registerlens.errors import ConfigError, ShapeError
from registerlens.evaluation.comparison import InterventionMaps, Measure
from registerlens.viz.panels import OPACITY, ColourScale, Panel, panel_figure
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
    drawn_maps = {(measure, name): maps.at(measure, name, layer) for measure in measures for name in maps.conditions}
    for measure in measures:
        values = [drawn_maps[measure, name][chosen] for name in maps.conditions]
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
            words = [maps.names[i]] * (len(chosen) > 1) + [_NAMES[measure]] * (len(measures) > 1)
            titles.append(": ".join(words))
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
    layers_shown = list(maps.layers if layers is None else layers)
    chosen = _images(maps, images)
    if not layers_shown:
        raise ConfigError(f"There is no block to show; the maps have the blocks {list(maps.layers)}.")
    parts = -(-len(layers_shown) // min(ACROSS, int(width_of(size) / _NARROWEST_BLOCK) - 3))
    across = -(-len(layers_shown) // parts)
    values = [maps.at(measure, name, layer)[chosen] for name in maps.conditions for layer in layers_shown]
    scale = _scale(maps, measure, values)
    rows, titles = [], []
    for i in chosen:
        for start in range(0, len(layers_shown), across):
            for k, name in enumerate(maps.conditions):
                head = [f"block {layer}" if k == 0 else "" for layer in layers_shown[start : start + across]]
                part = zip(layers_shown[start : start + across], head, strict=True)
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
        ['patch norms', 'neuron 1:183']
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
        ColourScale.over(f"residual norm after block {layer}", [norms[chosen]], colours=_COLOURS["norms"]),
        ColourScale.over("activation", [neurons.activations[:, chosen]], colours="Cividis"),
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
                    title=f"neuron {at}:{neuron}" if first else "",
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


def _scale(maps: InterventionMaps, measure: Measure, values: Sequence[np.ndarray]) -> ColourScale:
    """Norms from zero; attention by its logarithm, for a sink draws a hundred times as much as other patches."""
    return ColourScale.over(_words(maps, measure), values, log=measure == "attention", colours=_COLOURS[measure])


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


def overlay(
    photographs: UInt8[np.ndarray, "*photograph height width 3"],
    maps: Float[np.ndarray, "*panel grid_h grid_w"]
    | Int[np.ndarray, "*panel grid_h grid_w"]
    | Bool[np.ndarray, "*panel grid_h grid_w"]
    | Float[Tensor, "*panel grid_h grid_w"],
    *,
    patch_size: int | tuple[int, int] | None = None,
    name: str = "value",
    titles: Sequence[str] = (),
    title: str | None = None,
    low: float | int | None = None,
    high: float | int | None = None,
    log: bool = False,
    colours: str = "Viridis",
    columns: int | None = None,
    show_photograph: bool = True,
    opacity: float | int = OPACITY,
    size: Size = "cell",
    mode: Mode = "light",
) -> go.Figure:
    """A patch map over its photograph, or a row or grid of them with one shared colour scale.

    Args:
        photographs: pixels; one for all maps [height, width, 3], or one for each [panel, height, width, 3].
        maps: any values by patch: [grid_h, grid_w], or several [panel, grid_h, grid_w].
        patch_size: height and width of a patch in pixels (an int for a square one), if the photograph has pixels beyond
            the last whole patch; they are not shown. None: the grid divides the photograph.
        name: what the values are, with their unit; for the colour bar and the hover.
        titles: one a map.
        title: of the whole figure.
        low, high: values of the first and last colour; None is zero (or the lowest value) and the highest value.
        log: whether colours go by the logarithm (of positive values); then `low` must be positive.
        colours: a plotly colour scale.
        columns: panels beside each other; None chooses.
        show_photograph: whether the photograph comes first, in colour.
        opacity: of the map: at 1 the photograph is hidden.
        size: "cell" for a notebook; "page" or "column" for a paper.
        mode: light or dark.

    Raises:
        ShapeError: a map has another grid than its photograph has patches, there is not one whole patch, or the number
            of photographs or titles does not fit.
        NonFiniteError: no value is finite.
        ConfigError: more than 128 panels, no column, or colours that do not go up.

    Example:
        >>> photograph = np.zeros((28, 42, 3), np.uint8)
        >>> figure = overlay(photograph, np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), patch_size=14, name="norm")
        >>> figure.data[0].z.shape, figure.layout.coloraxis.colorbar.title.text
        ((2, 3), 'norm')
    """
    values = np.asarray(maps.detach().cpu().float() if isinstance(maps, Tensor) else maps, np.float32)
    values = values[None] if values.ndim == 2 else values
    pictures = photographs[None] if photographs.ndim == 3 else photographs
    if values.ndim != 3 or pictures.ndim != 4 or len(pictures) not in (1, len(values)):
        raise ShapeError(
            f"Got photographs of the shape {list(photographs.shape)} and maps of the shape {list(maps.shape)}; "
            f"expected maps [panel, grid_h, grid_w], and one photograph [height, width, 3] or one for each map."
        )
    if titles and len(titles) != len(values):
        raise ShapeError(f"{len(titles)} titles for {len(values)} maps; one for each is needed.")
    if columns is not None and columns < 1:
        raise ConfigError(f"columns={columns} has no place for a panel. Give at least 1, or None.")
    pictures = whole_patches(pictures, values.shape[1:], patch_size)
    scale = ColourScale.over(name, [values], log=log, colours=colours)
    scale = replace(scale, low=scale.low if low is None else low, high=scale.high if high is None else high)
    if scale.low >= scale.high or (scale.log and scale.low <= 0):
        raise ConfigError(
            f"The colours would go from {scale.low:g} to {scale.high:g}. Choose low below high, above 0 for log."
        )
    labels = list(titles) or [""] * len(values)
    every: list[Panel] = []
    for i, grid in enumerate(values):
        if show_photograph and (i == 0 or len(pictures) > 1):
            every.append(Panel(photograph=pictures[i if len(pictures) > 1 else 0], title="image"))
        every.append(Panel(photograph=pictures[i if len(pictures) > 1 else 0], values=grid, title=labels[i]))
    wide = columns or (2 * min(2, len(pictures)) if show_photograph and len(pictures) > 1 else min(len(every), 6))
    rows = [every[i : i + wide] for i in range(0, len(every), wide)]
    return panel_figure(rows, [scale], title=title, opacity=opacity, size=size, mode=mode)


def patches_figure(maps: PatchMaps, mode: Mode = "light") -> go.Figure:
    """The norms after the last block, an image each, without photographs.

    Example:
        >>> import torch, registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> len(rl.analysis.patch_maps(vit, torch.rand(2, 3, 48, 48), [0, 5]).plot().data)
        2
    """
    titles = [f"image {i}" for i in range(maps.norms.shape[1])]
    return _bare(maps.norms[-1], f"residual norm after block {maps.layers[-1]}", titles, maps.model, mode)


def activations_figure(maps: NeuronMaps, mode: Mode = "light") -> go.Figure:
    """The activations of each neuron on each image, without photographs.

    Example:
        >>> import torch, registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> len(rl.analysis.neuron_maps(vit, torch.rand(2, 3, 48, 48), [(1, 183)]).plot().data)
        2
    """
    n_images = maps.activations.shape[1]
    titles = [f"{layer}:{neuron}, image {i}" for layer, neuron in maps.pairs for i in range(n_images)]
    return _bare(np.concatenate(maps.activations), "activation", titles, maps.model, mode)


def _bare(
    values: Float[np.ndarray, "panel grid_h grid_w"], name: str, titles: Sequence[str], title: str, mode: Mode
) -> go.Figure:
    white = np.full((*values.shape[1:], 3), 255, np.uint8)
    return overlay(white, values, name=name, titles=titles, title=title, show_photograph=False, opacity=1, mode=mode)


def whole_patches(
    photographs: UInt8[np.ndarray, "panel height width 3"],
    grid: tuple[int, ...],
    patch_size: int | tuple[int, int] | None,
) -> UInt8[np.ndarray, "panel seen_h seen_w 3"]:
    """The pixels that belong to whole patches, if there are as many as the grid says.

    Raises:
        ShapeError: there are others, or none.
    """
    size = photographs.shape[1:3]
    if patch_size is None:
        if any(n < 1 or pixels % n or pixels < n for pixels, n in zip(size, grid, strict=True)):
            raise ShapeError(
                f"A map of {grid[0]} x {grid[1]} patches does not divide a photograph of {size[0]} x {size[1]} pixels. "
                f"Pass patch_size, or the photograph at the size at which the model saw it."
            )
        return photographs
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if min(patch) < 1:
        raise ShapeError(f"patch_size={patch_size} is no patch. Give its height and width in pixels, at least 1.")
    has = tuple(pixels // side for pixels, side in zip(size, patch, strict=True))
    if min(has) < 1:
        raise ShapeError(
            f"A photograph of {size[0]} x {size[1]} pixels has not one whole patch of {patch[0]} x {patch[1]}. "
            f"Take a larger one."
        )
    if has != tuple(grid):
        raise ShapeError(
            f"The map has {grid[0]} x {grid[1]} patches, but a photograph of {size[0]} x {size[1]} pixels has "
            f"{has[0]} x {has[1]} of {patch[0]} x {patch[1]} pixels. Is the map of another image or size?"
        )
    return photographs[:, : has[0] * patch[0], : has[1] * patch[1]]

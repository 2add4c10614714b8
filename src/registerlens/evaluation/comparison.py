"""The same images under several edits: norm and attention maps side by side (figures 1, 5, 7, 9, 12 to 18)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from torch import Tensor

from registerlens.analysis.maps import PatchMaps, patch_maps
from registerlens.data.images import to_display
from registerlens.display import grid_table
from registerlens.errors import ConfigError, ShapeError
from registerlens.interventions.base import Edits, several
from registerlens.model.vit import HookedViT
from registerlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MEASURED = ("norms", "attention", "register_norm", "register_attention")
_MODELS = ("model", "fingerprint")
Measure = Literal["norms", "attention"]


@dataclass(frozen=True, kw_only=True, eq=False)
class InterventionMaps(Result):
    """Norm and attention maps of a few images under several conditions; `a | b` puts two models' side by side."""

    model: str
    """Where the model came from; of several, joined by " | "."""
    fingerprint: str
    """Of its weights (`vit.fingerprint`); of several, joined like that."""
    conditions: tuple[str, ...]
    """Names, in the order in which they are shown."""
    interventions: tuple[str, ...]
    """What each condition did, in words; empty for the model as it is."""
    layers: tuple[int, ...]
    """The blocks."""
    sink_query: Literal["cls", "mean"]
    """Whose attention: [CLS]'s, or the mean over queries where there is no [CLS]."""
    names: tuple[str, ...]
    """A name for each image."""
    display: UInt8[np.ndarray, "image height width 3"]
    """The images to look at, without the pixels beyond the last whole patch."""
    norms: Float[np.ndarray, "condition layer image grid_h grid_w"]
    """Residual norm of each patch after the block."""
    attention: Float[np.ndarray, "condition layer image grid_h grid_w"]
    """Attention each patch draws in the block, mean over heads (0 to 1)."""
    register_norm: Float[np.ndarray, "condition layer image"]
    """Residual norm of the (largest) test-time register after the block; NaN without one."""
    register_attention: Float[np.ndarray, "condition layer image"]
    """Attention that test-time registers and an attention bias draw together (0 to 1); NaN without any."""

    def __or__(self, other: InterventionMaps) -> InterventionMaps:
        if (self.layers, self.sink_query) != (other.layers, other.sink_query):
            raise ConfigError(
                f"Maps of blocks {list(self.layers)} and {list(other.layers)}, of the queries {self.sink_query} and "
                f"{other.sink_query}: only those of the same blocks and queries can be put side by side."
            )
        if self.norms.shape[2:] != other.norms.shape[2:] or not np.array_equal(self.display, other.display):
            raise ConfigError("The maps are not of the same images; give both the same `images` or the same `display`.")
        if both := set(self.conditions) & set(other.conditions):
            raise ConfigError(f"Both have the conditions {sorted(both)}. Give one of them another name.")
        joined = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _MEASURED}
        return replace(
            self,
            conditions=self.conditions + other.conditions,
            interventions=self.interventions + other.interventions,
            **{name: " | ".join(dict.fromkeys((getattr(self, name), getattr(other, name)))) for name in _MODELS},
            **joined,
        )

    def at(self, measure: Measure, condition: str, layer: int) -> Float[np.ndarray, "image grid_h grid_w"]:
        """One measure's maps.

        Raises:
            ConfigError: there is no such measure, condition or block.
        """
        if measure not in ("norms", "attention") or condition not in self.conditions or layer not in self.layers:
            raise ConfigError(
                f"No {measure!r} of {condition!r} at block {layer}. There are 'norms' and 'attention' of the "
                f"conditions {list(self.conditions)} at the blocks {list(self.layers)}."
            )
        return getattr(self, measure)[self.conditions.index(condition), self.layers.index(layer)]

    def describe(self) -> str:
        """What was done to the images, one condition a line."""
        lines = [f"{self.model}: norms and attention of {len(self.names)} images after blocks {list(self.layers)}."]
        described = zip(self.conditions, self.interventions, strict=True)
        return "\n".join([*lines, *(f"{condition}: {words or 'unedited'}." for condition, words in described)])

    def to_dataframe(self) -> pd.DataFrame:
        """One row a condition, block and image: the largest patch norm and attention, and the register's."""
        return grid_table(
            {"condition": self.conditions, "layer": self.layers, "image": self.names},
            largest_norm=self.norms.max((3, 4)),
            largest_attention=self.attention.max((3, 4)),
            register_norm=self.register_norm,
            register_attention=self.register_attention,
        )

    def plot(
        self,
        layer: int | None = None,
        measures: Sequence[Measure] = ("norms", "attention"),
        images: Sequence[int] | None = None,
    ) -> go.Figure:
        """A column a condition, a row an image and measure, over the photographs; `layer` None is the last block."""
        from registerlens.viz.maps import conditions_figure

        return conditions_figure(self, layer=layer, measures=measures, images=images)

    def plot_layers(
        self,
        measure: Measure = "attention",
        layers: Sequence[int] | None = None,
        images: Sequence[int] | None = None,
    ) -> go.Figure:
        """A column a block, a row an image and condition; `layers` None shows all."""
        from registerlens.viz.maps import layers_figure

        return layers_figure(self, measure=measure, layers=layers, images=images)


def compare_maps(
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    conditions: Mapping[str, Edits],
    *,
    layers: Sequence[int] | None = None,
    display: UInt8[np.ndarray, "shown shown_h shown_w 3"] | None = None,
    names: Sequence[str] | None = None,
) -> InterventionMaps:
    """Norm and attention maps of the same images under several edits.

    Args:
        vit: the model.
        images: preprocessed, all of one size; few, for their maps are all kept.
        conditions: what is compared, by name: None for the model as it is, an intervention, or several at once.
        layers: blocks; None is all of them.
        display: the images to look at, of the same height and width; None undoes the model's normalisation.
        names: a name for each image; None counts them.

    Raises:
        ConfigError: there is no condition, or not one name an image.
        ShapeError: a block does not exist, the images are smaller than one patch, or `display` is of another size.

    Source: Jiang et al. 2025, figures 1, 5, 7, 9, 12 to 18.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(2, 0).images
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> maps = compare_maps(vit, images, {"original": None, "with register": rl.TestTimeRegisters(neurons)})
        >>> maps.norms.shape, bool(maps.norms[1].max() < maps.norms[0].max() / 5)
        ((2, 6, 2, 6, 6), True)
    """
    if not conditions:
        raise ConfigError("Nothing to compare: give conditions such as {'original': None, 'edited': an intervention}.")
    pictures = _display(vit, images, display)
    names = tuple(f"image {i}" for i in range(len(images))) if names is None else tuple(map(str, names))
    if len(names) != len(images):
        raise ConfigError(f"{len(names)} names for {len(images)} images; one for each is needed.")
    by_name: dict[str, PatchMaps] = {}
    for name, edits in conditions.items():
        with vit.edit(*several(edits)):
            by_name[name] = patch_maps(vit, images, range(vit.cfg.n_layers) if layers is None else layers)
    first = next(iter(by_name.values()))
    return InterventionMaps(
        model=vit.source,
        fingerprint=vit.fingerprint,
        conditions=tuple(by_name),
        interventions=tuple("" if edits is None else repr(edits) for edits in conditions.values()),
        layers=first.layers,
        sink_query=first.sink_query,
        names=names,
        display=pictures,
        **{name: np.stack([getattr(maps, name) for maps in by_name.values()]) for name in _MEASURED},
    )


def _display(vit: HookedViT, images: Tensor, display: np.ndarray | None) -> UInt8[np.ndarray, "image height width 3"]:
    """The pixels that the model sees."""
    layout, (patch_h, patch_w) = vit.layout(images), vit.cfg.patch_size
    if display is None:
        display = to_display(images, vit.preprocess)
    expected = (len(images), *images.shape[2:])
    if display.shape[:3] != expected:
        raise ShapeError(
            f"The images to look at have the shape {list(display.shape)}, expected {[*expected, 3]}: one for each "
            f"image, of the same height and width. rl.data.images.to_display(images, vit.preprocess) makes them."
        )
    return display[:, : layout.grid_height * patch_h, : layout.grid_width * patch_w]

"""Patch maps of single images: residual norms, the attention that patches draw, and activations of single neurons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.display import drawn_by, grid_table
from registerlens.engine.attention_received import attention_hooks
from registerlens.errors import InterventionError, ShapeError
from registerlens.model.parts import token_norms
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult

_BATCH = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchMaps(ModelResult):
    """Norm and attention maps of a few images."""

    layers: tuple[int, ...]
    """The blocks."""
    sink_query: Literal["cls", "mean"]
    """Whose attention: [CLS]'s, or the mean over queries where there is no [CLS]."""
    norms: Float[np.ndarray, "layer image grid_h grid_w"]
    """Residual norm of each patch after the block."""
    attention: Float[np.ndarray, "layer image grid_h grid_w"]
    """Attention each patch draws in the block, mean over heads (0 to 1)."""
    register_norm: Float[np.ndarray, "layer image"]
    """Residual norm of the (largest) test-time register after the block; NaN without one."""
    register_attention: Float[np.ndarray, "layer image"]
    """Attention that test-time registers and an attention bias draw together (0 to 1); NaN without any."""

    plot = drawn_by("maps.patches_figure")

    def describe(self) -> str:
        """What the maps are of."""
        n = self.norms.shape[1]
        return f"{self.model}: norms and attention of {n} images after blocks {list(self.layers)}."

    def to_dataframe(self) -> pd.DataFrame:
        """One row a block and image: the largest patch norm and attention, and the register's."""
        return grid_table(
            {"layer": self.layers, "image": range(self.norms.shape[1])},
            largest_norm=self.norms.max((2, 3)),
            largest_attention=self.attention.max((2, 3)),
            register_norm=self.register_norm,
            register_attention=self.register_attention,
        )


def patch_maps(vit: HookedViT, images: Float[Tensor, "image channel height width"], layers: Sequence[int]) -> PatchMaps:
    """Norm and attention maps at the given blocks.

    Args:
        vit: the model, edited or not.
        images: preprocessed, all of one size.
        layers: block indices, at least one; one given twice counts once.

    Raises:
        ShapeError: a layer does not exist, or the images do not fit.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> patch_maps(vit, torch.rand(2, 3, 48, 48), [0, 5]).norms.shape
        (2, 2, 6, 6)
    """
    if not layers:
        raise ShapeError("No layer was given. Pass at least one block index.")
    if bad := [layer for layer in layers if not 0 <= layer < vit.cfg.n_layers]:
        raise ShapeError(f"Layers {bad} do not exist: the model has blocks 0 to {vit.cfg.n_layers - 1}.")
    layers = tuple(dict.fromkeys(layers))
    layout = vit.layout(images)
    norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    attention: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep_norm(resid: Tensor, hook: Any) -> None:
        norms[hook.layer()].append(token_norms(resid))

    hooks = attention_hooks(vit, layout, layers, lambda layer, received: attention[layer].append(received.mean(1)))
    hooks.append(([f"blocks.{layer}.hook_resid_post" for layer in layers], keep_norm))
    with torch.inference_mode(), vit.hooks(hooks):
        for batch in images.split(_BATCH):
            vit(batch.to(vit.device), stop_at_layer=max(layers) + 1)

    def stacked(by_layer: dict[int, list[Tensor]]) -> Float[Tensor, "layer image pos"]:
        return torch.stack([torch.cat(by_layer[layer]) for layer in layers]).cpu()

    def grids(values: Float[Tensor, "layer image pos"]) -> Float[np.ndarray, "layer image grid_h grid_w"]:
        # Patches first: with an attention bias there are more keys than tokens.
        return np.stack([layout.to_grid(row[:, layout.patches]).numpy() for row in values])

    def beyond(values: Float[Tensor, "layer image pos"]) -> Float[Tensor, "layer image extra"]:
        return values[..., layout.patches.stop :]

    every_norm, every_attention = stacked(norms), stacked(attention)
    registers, extra_keys = beyond(every_norm), beyond(every_attention)
    nothing = np.full(every_norm.shape[:2], np.nan, np.float32)
    return PatchMaps(
        **vit.identity,
        layers=layers,
        sink_query="cls" if layout.cls is not None else "mean",
        norms=grids(every_norm),
        attention=grids(every_attention),
        register_norm=registers.amax(-1).numpy() if registers.shape[-1] else nothing,
        register_attention=extra_keys.sum(-1).numpy() if extra_keys.shape[-1] else nothing,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronMaps(ModelResult):
    """Activation maps of a few neurons on a few images (figure 3)."""

    pairs: tuple[tuple[int, int], ...]
    """(layer, neuron) of each."""
    activations: Float[np.ndarray, "neuron image grid_h grid_w"]
    """Activation after the nonlinearity at each patch."""

    plot = drawn_by("maps.activations_figure")

    def describe(self) -> str:
        """What the maps are of."""
        n_neurons, n_images = self.activations.shape[:2]
        return f"{self.model}: activations of {n_neurons} neurons on {n_images} images."

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron and image: the largest activation of a patch, and the median."""
        n_neurons, n_images = self.activations.shape[:2]
        layers, neurons = np.array(self.pairs).T[..., None]
        return grid_table(
            {"index": range(n_neurons), "image": range(n_images)},
            layer=layers,
            neuron=neurons,
            largest=self.activations.max((2, 3)),
            median=np.median(self.activations, (2, 3)),
        ).drop(columns="index")


def neuron_maps(
    vit: HookedViT, images: Float[Tensor, "image channel height width"], pairs: Sequence[tuple[int, int]]
) -> NeuronMaps:
    """How active single neurons are at each patch, laid out as the image.

    Args:
        vit: the model, edited or not.
        images: preprocessed, all of one size.
        pairs: (layer, neuron) of each neuron, at least one.

    Raises:
        InterventionError: no neuron was given, or the model does not have one of them.
        ConfigError: a pair is given twice, or is no pair.
        ShapeError: the images do not fit.

    Source: Jiang et al. 2025, figures 3, 19 and 28.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import FLAT, synthetic_images
        >>> vit, batch = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(2, 0)
        >>> maps = neuron_maps(vit, batch.images, [(1, 183), (1, 103)])
        >>> maps.activations.shape
        (2, 2, 6, 6)
        >>> bool(((maps.activations[0].reshape(2, -1) > 50) == (batch.roles == FLAT).numpy()).all())
        True
    """
    neurons = RegisterNeurons.from_pairs(pairs).check(vit.cfg)
    if not len(neurons):
        raise InterventionError("No neuron was given. Pass at least one (layer, neuron).")
    layout = vit.layout(images)
    recorded: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in neurons.pairs}
    by_layer = neurons.by_layer()

    def keep(post: Tensor, hook: Any) -> None:
        patches = post[:, layout.patches]
        for neuron in by_layer[hook.layer()]:
            recorded[hook.layer(), neuron].append(patches[..., neuron].float().cpu().clone())  # no view of the layer

    hooks: Any = [([f"blocks.{layer}.mlp.hook_post" for layer in by_layer], keep)]
    with torch.inference_mode(), vit.hooks(hooks):
        for batch in images.split(_BATCH):
            vit(batch.to(vit.device), stop_at_layer=max(by_layer) + 1)
    return NeuronMaps(
        **vit.identity,
        pairs=neurons.pairs,
        activations=np.stack([layout.to_grid(torch.cat(values)).numpy() for values in recorded.values()]),
    )

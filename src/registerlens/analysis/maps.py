"""Patch maps of single images: residual norms and the attention that patches draw, at chosen layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.outliers import token_norms
from registerlens.analysis.sinks import attention_hooks
from registerlens.errors import ShapeError
from registerlens.model.vit import HookedViT

_BATCH = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchMaps:
    """Norm and attention maps of a few images."""

    layers: tuple[int, ...]
    """The blocks."""
    sink_query: Literal["cls", "mean"]
    """Whose attention: [CLS]'s, or the mean over queries where there is no [CLS]."""
    norms: Float[np.ndarray, "layer image grid_h grid_w"]
    """Residual norm of each patch after the block."""
    attention: Float[np.ndarray, "layer image grid_h grid_w"]
    """Attention each patch draws in the block, mean over heads (0 to 1)."""


def patch_maps(vit: HookedViT, images: Float[Tensor, "image channel height width"], layers: Sequence[int]) -> PatchMaps:
    """Norm and attention maps at the given blocks.

    Args:
        vit: the model.
        images: preprocessed, all of one size.
        layers: block indices, at least one.

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
    layout = vit.layout(images)
    norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    attention: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep_norm(resid: Tensor, hook: Any) -> None:
        norms[hook.layer()].append(token_norms(resid))

    hooks = attention_hooks(vit, layout, layers, lambda layer, drawn: attention[layer].append(drawn.mean(1)))
    hooks.append(([f"blocks.{layer}.hook_resid_post" for layer in layers], keep_norm))
    with torch.inference_mode(), vit.hooks(hooks):
        for batch in images.split(_BATCH):
            vit(batch.to(vit.embed.W_pos.device), stop_at_layer=max(layers) + 1)

    def grids(found: dict[int, list[Tensor]]) -> np.ndarray:
        return torch.stack([layout.to_grid(torch.cat(found[layer])) for layer in layers]).cpu().numpy()

    return PatchMaps(
        layers=tuple(layers),
        sink_query="cls" if layout.cls is not None else "mean",
        norms=grids(norms),
        attention=grids(attention),
    )

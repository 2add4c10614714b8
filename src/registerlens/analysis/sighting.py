"""What one pass over a batch leaves behind for the scores: patch norms, and what activations follow from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.errors import NonFiniteError
from registerlens.model.block import Block
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import hook_of
from registerlens.model.vit import HookedViT


class Sighting:
    """Patch norms at some places and the inputs of some MLPs for one batch, filled by `hooks` in its first pass.

    Hidden layers, four times as wide, are not kept: activations are computed again at the few patches that are asked
    for. Where somebody edits a hidden layer it is kept itself, for computed again it would be unedited.

    Args:
        vit: the model, its edits in place.
        layout: of the images to come.
        layers: blocks whose neurons will be asked for.
        places: sublayers after which patch norms will be.
    """

    def __init__(self, vit: HookedViT, layout: TokenLayout, layers: Sequence[int], places: Sequence[str]) -> None:
        self._patches = patches = layout.patches
        self._mlps = {layer: cast(Block, vit.blocks[layer]).mlp for layer in layers}
        self._edited = {layer for layer, mlp in self._mlps.items() if mlp.watched}
        self._inputs: dict[int, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        inputs, norms = self._inputs, self._norms  # hooks that hold `self` would keep the tensors alive in a cycle

        def keep_input(x: Tensor, hook: Any) -> None:
            inputs.setdefault(hook.layer(), x)

        def keep_norms(resid: Tensor, hook: Any) -> None:
            if hook.name not in norms:
                norms[hook.name] = token_norms(resid[:, patches])

        names = ["mlp.hook_post" if layer in self._edited else "ln2.hook_normalized" for layer in layers]
        self.hooks: list[Any] = [
            *((f"blocks.{layer}.{name}", keep_input) for layer, name in zip(layers, names, strict=True)),
            *((hook_of(place), keep_norms) for place in places),
        ]

    def norms(self, place: str) -> Float[Tensor, "batch patch"]:
        """Patch norms after a sublayer, float32.

        Raises:
            NonFiniteError: one is NaN or infinite.
        """
        norms = self._norms[hook_of(place)]
        if not norms.isfinite().all():
            raise NonFiniteError(
                f"Patch norms are NaN or infinite at {place}. Check the images; if the model is in float16, use "
                f"bfloat16 or float32."
            )
        return norms

    def activations(
        self, layer: int, image: Int[Tensor, "..."], patch: Int[Tensor, "..."]
    ) -> Float[Tensor, "... neuron"]:
        """Activations of a layer's neurons at patches of images, float32."""
        x = self._inputs[layer][image, patch + self._patches.start]
        return (x if layer in self._edited else self._mlps[layer].neurons(x)).float()

    def forget(self) -> None:
        """Give the memory back."""
        self._inputs.clear()
        self._norms.clear()

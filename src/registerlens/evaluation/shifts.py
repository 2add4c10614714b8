"""Where norm and attention end up when outliers are moved: at the target, or elsewhere (figures 4, 22 to 24, 29)."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.attention_received import attention_hooks
from registerlens.engine.stream import Batch, batches, run_until_seen
from registerlens.errors import InterventionError, ShapeError, check_finite
from registerlens.interventions.base import Intervention, Scene
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import sublayer_of
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult

_ARRAYS = ("target_norm", "other_norm", "target_attention", "other_attention")


@dataclass(frozen=True, kw_only=True, eq=False)
class OutlierShift(ModelResult):
    """For each image, the largest norm and attention at the target of an intervention, and at any other patch."""

    intervention: str
    """What was done, in words."""
    layer: int
    """The block."""
    sink_query: Literal["cls", "mean"]
    """Whose attention: [CLS]'s, or the mean over queries where there is no [CLS]."""
    target: Literal["chosen patches", "test-time register"]
    """Where the outliers shall go."""
    target_norm: Float[np.ndarray, " image"]
    """Largest residual norm of a target after the block."""
    other_norm: Float[np.ndarray, " image"]
    """Largest residual norm of any other patch."""
    target_attention: Float[np.ndarray, " image"]
    """Largest attention to a target in the block, mean over heads (0 to 1)."""
    other_attention: Float[np.ndarray, " image"]
    """Largest attention to any other patch."""

    @property
    def n_images(self) -> int:
        """Images that went through."""
        return len(self.target_norm)

    @property
    def taken(self) -> float:
        """Share of images (0 to 1) in which the target's norm exceeds every other patch's."""
        return float((self.target_norm > self.other_norm).mean())

    def describe(self) -> str:
        """The result in words."""
        return (
            f"After block {self.layer}, the {self.target} had the largest norm in {self.taken:.0%} of {self.n_images} "
            f"images (median {np.median(self.target_norm):.3g}, others {np.median(self.other_norm):.3g}), and drew "
            f"{np.median(self.target_attention):.0%} of attention (others {np.median(self.other_attention):.0%})."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row an image."""
        return pd.DataFrame({name: getattr(self, name) for name in _ARRAYS})

    plot = drawn_by("evaluation.shift_figure")
    """Histograms of norm and attention, target against other patches."""


@dataclass(frozen=True)
class RandomPatches:
    """Random patches of each image, as positions for `MoveOutliers`; the same for equal images, whatever the batch.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(4, 3, 48, 48)
        >>> positions = RandomPatches(vit.cfg.patch_size, n=2)
        >>> positions(images).shape, bool((positions(images)[2:] == positions(images[2:])).all())
        (torch.Size([4, 2]), True)
    """

    patch_size: tuple[int, int]
    """Height and width of a patch in pixels."""
    n: int = 1
    """Patches for each image, all different."""
    seed: int = 0
    """Seed of the draws."""

    def __call__(self, images: Float[Tensor, "batch channel height width"]) -> Int[Tensor, "batch n"]:
        """Indices, row by row.

        Raises:
            ShapeError: an image has fewer patches.
        """
        rows, columns = images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1]
        if rows * columns < self.n:
            raise ShapeError(f"{self.n} patches were asked for; an image has {rows * columns}.")
        scene = Scene(TokenLayout(grid=(rows, columns), n_prefix=0), images)
        draws = [torch.randperm(rows * columns, generator=own)[: self.n] for own in scene.generators(self.seed)]
        return torch.stack(draws)


def measure_shift(
    vit: HookedViT, images: Images, intervention: Intervention, *, layer: int = -1, batch_size: int = 16
) -> OutlierShift:
    """Does the target of an intervention take the norms and the attention over?

    Args:
        vit: the model.
        images: [image, channel, height, width], or an iterable of batches.
        intervention: one that aims at patches (`MoveOutliers`), or appends a token (`TestTimeRegisters`).
        layer: the block; negative counts from the end (the paper: the last; DINOv2's norms drop there, -2 shows them).
        batch_size: images at once when a tensor is given.

    Raises:
        InterventionError: the intervention has no target.
        ImageError: there are no images.
        ShapeError: the block does not exist, or the images do not fit.
        NonFiniteError: norms or attention are NaN or infinite.

    Source: Jiang et al. 2025, figures 4, 22, 23, 24 and 29.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> anywhere = RandomPatches(vit.cfg.patch_size)
        >>> measure_shift(vit, images, rl.MoveOutliers(neurons, anywhere), layer=1).taken
        1.0
    """
    layer = sublayer_of(layer, vit.cfg.n_layers).layer
    target = "test-time register" if intervention.n_registers else "chosen patches"
    with torch.inference_mode(), vit.edit(intervention):
        rows = [_measured(vit, batch, intervention, layer) for batch in batches(vit, images, batch_size, "shifting")]
    values = torch.cat(rows, 1)
    check_finite(values, f"Norms or attention are NaN or infinite after block {layer}")
    return OutlierShift(
        **vit.identity,
        intervention=repr(intervention),
        layer=layer,
        sink_query="cls" if vit.cfg.class_token else "mean",
        target=target,
        **dict(zip(_ARRAYS, values.numpy(), strict=True)),
    )


def _measured(vit: HookedViT, batch: Batch, intervention: Intervention, layer: int) -> Float[Tensor, "measure batch"]:
    layout = batch.layout
    norms: list[Tensor] = []
    received: list[Tensor] = []
    hooks: list[Any] = attention_hooks(vit, layout, [layer], lambda _, attention: received.append(attention.mean(1)))
    hooks.append((f"blocks.{layer}.hook_resid_post", lambda resid, hook: norms.append(token_norms(resid))))
    run_until_seen(vit, batch.images, hooks)
    aimed, other = _sides(intervention, layout, batch.images)
    values = [norms[0].cpu(), received[0][:, : layout.n_tokens].cpu()]
    largest = [value.masked_fill(~side, -torch.inf).amax(1) for value in values for side in (aimed, other)]
    return torch.stack(largest).float()


def _sides(
    intervention: Intervention, layout: TokenLayout, batch: Tensor
) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Target tokens, and all other patches."""
    aimed, other = (torch.zeros(len(batch), layout.n_tokens, dtype=torch.bool) for _ in range(2))
    aim = intervention.aim(Scene(layout, batch))
    other[:, layout.patches] = True
    if aim is not None:
        aimed[:, layout.patches] = aim.cpu()
        other &= ~aimed
    elif layout.n_test_time_registers:
        aimed[:, layout.test_time_registers] = True
    if not aimed.any(1).all() or not other.any(1).all():
        raise InterventionError(
            f"{type(intervention).__name__} has no target in some image, or no other patch is left. Measure an "
            f"intervention that moves outliers: rl.MoveOutliers(neurons, positions) or rl.TestTimeRegisters(neurons)."
        )
    return aimed, other

"""The trivial baseline: overwrite outlier patches by their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.detection import Cutoff, Detection
from registerlens.config import TokenLayout
from registerlens.errors import ConfigError
from registerlens.interventions.base import Edit, Host, Intervention, Scene
from registerlens.model.parts import at_least_float32, token_norms
from registerlens.model.sublayers import sublayer_of


@dataclass(frozen=True)
class InterpolateOutliers(Intervention):
    """Replace outlier patches, after one layer, by the mean of their (up to eight) normal neighbours.

    Where all neighbours are outliers too, those filled in first serve the others; an image of outliers only is left as
    it is. Cheap, needs no neuron, and is what any cleverer edit has to beat.

    Args:
        layer: a block (after its MLP), or a sublayer such as "5.attn".
        cutoff: above which norm a patch is an outlier.

    Source: field practice, as a baseline to Jiang et al. 2025.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images
        >>> baseline = rl.InterpolateOutliers.at(rl.find_outliers(vit, images).detection)
        >>> with vit.edit(baseline):
        ...     rl.trace(vit, images).evidence[-1].verdict
        'absent'
    """

    layer: int | str
    cutoff: Cutoff

    def __post_init__(self) -> None:
        if not self.cutoff.value > 0:
            raise ConfigError(f"The cut-off must be above 0, got {self.cutoff.value}.")

    @classmethod
    def at(cls, detection: Detection) -> InterpolateOutliers:
        """At the place, and with the cut-off, of a detection."""
        return cls(detection.sublayer, detection.cutoff)

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """One edit of the residual stream."""
        return [Edit(sublayer_of(self.layer, host.cfg.n_layers).hook_name, partial(_interpolate, self.cutoff))]


def _interpolate(
    cutoff: Cutoff, resid: Float[Tensor, "batch pos d_model"], scene: Scene
) -> Float[Tensor, "batch pos d_model"]:
    layout = scene.layout
    patches = resid[:, layout.patches]
    outlying = cutoff.above(token_norms(patches))
    filled = fill_from_neighbours(patches, outlying, layout).to(resid.dtype)
    return torch.cat([resid[:, : layout.patches.start], filled, resid[:, layout.patches.stop :]], 1)


def fill_from_neighbours(
    patches: Float[Tensor, "batch patch d_model"], missing: Bool[Tensor, "batch patch"], layout: TokenLayout
) -> Float[Tensor, "batch patch d_model"]:
    """Patches with the missing ones replaced by the mean of those of their eight neighbours that are there.

    Example:
        >>> patches = torch.tensor([[[1.0], [9.0], [3.0]]])
        >>> layout = TokenLayout(grid=(1, 3), n_prefix=0)
        >>> fill_from_neighbours(patches, torch.tensor([[False, True, False]]), layout)[0, :, 0]
        tensor([1., 2., 3.])
    """
    grid = rearrange(patches.to(at_least_float32(patches.dtype)), "b (h w) d -> b d h w", h=layout.grid_height)
    there = rearrange(~missing, "b (h w) -> b 1 h w", h=layout.grid_height).to(grid)
    for _ in range(max(layout.grid)):
        if bool(there.all()):
            break
        total, n = (9 * F.avg_pool2d(x, 3, stride=1, padding=1) for x in (grid * there, there))
        reached = (there == 0) & (n > 0.5)
        grid = torch.where(reached, total / n.clamp_min(1), grid)
        there = torch.maximum(there, reached.to(there))
    filled = rearrange(grid, "b d h w -> b (h w) d").to(patches.dtype)
    return torch.where(missing[..., None], filled, patches)

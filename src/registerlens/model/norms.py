"""The norms: LayerNorm and RMSNorm with hook points, fused unless the scale is listened to."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config_parts import NormKind
from registerlens.model.parts import at_least_float32, editable, listening


class Norm(nn.Module):
    """A norm over the last axis with a weight `w`; `hook_scale` [..., 1] divides, `hook_normalized` leaves it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(width))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    @abstractmethod
    def normalise(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The norm as one fused operation, without hook points."""

    def centre(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What is divided by the scale: linear in x."""
        return x

    @abstractmethod
    def affine(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Times the weight, plus the bias where there is one."""

    def standard(self, x: Float[Tensor, "*batch width"]) -> tuple[Tensor, Tensor] | None:
        """x over its scale and that scale, from one fused operation without a graph; None where there is none."""

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Normalise over the last axis."""
        if not listening(self.hook_scale):
            return self.hook_normalized(self.normalise(x))
        fused = None if torch.is_grad_enabled() or at_least_float32(x.dtype) != x.dtype else self.standard(x)
        if fused is None:
            return self.hook_normalized(self.shares(x)[0])
        # What a hook makes of the scale is put back in.
        standard, own = fused
        scale = self.hook_scale(own.clone())
        return self.hook_normalized(self.affine(standard * (own / scale)))

    def shares(self, *parts: Float[Tensor, "*batch width"]) -> tuple[Float[Tensor, "*batch width"], ...]:
        """What each part of a sum contributes to the normalised sum: given its scale, a norm is linear.

        A bias goes to the first part. The shares add up to `forward(sum(parts))`.
        """
        wide = [self.centre(part.to(at_least_float32(part.dtype))) for part in parts]
        scale = (torch.stack(wide).sum(0).square().mean(-1, keepdim=True) + self.eps).sqrt()
        scale = self.hook_scale(editable(scale, self.hook_scale))
        shares = [self.affine(wide[0] / scale), *(part / scale * self.w for part in wide[1:])]
        return tuple(share.to(parts[0].dtype) for share in shares)


class LayerNorm(Norm):
    """LayerNorm: the mean is taken out; `hook_scale` is the standard deviation; it has a bias `b`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.b = nn.Parameter(torch.zeros(width))

    def normalise(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The fused operation."""
        return F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)

    def centre(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Without its mean."""
        return x - x.mean(-1, keepdim=True)

    def affine(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Weight and bias."""
        return torch.addcmul(self.b, x, self.w)

    def standard(self, x: Float[Tensor, "*batch width"]) -> tuple[Tensor, Tensor] | None:
        """Computed with the fused kernel's statistics."""
        standard, _, inverse = torch.native_layer_norm(x, self.w.shape, None, None, self.eps)
        return standard, inverse.reciprocal()


class RMSNorm(Norm):
    """RMSNorm: divides by the root mean square, `hook_scale`; no mean is taken out, and there is no bias."""

    def normalise(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The fused operation."""
        return F.rms_norm(x, self.w.shape, self.w, self.eps)

    def affine(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The weight."""
        return x * self.w


NORMS: dict[NormKind, type[Norm]] = {"layer": LayerNorm, "rms": RMSNorm}
"""The norms of `ViTConfig.norm`."""

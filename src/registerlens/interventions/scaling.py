"""Scale neurons, heads or tokens: the dose between what the model does and zero ablation, and beyond it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.errors import ConfigError
from registerlens.interventions.base import Edit, Host, Intervention, Scene
from registerlens.interventions.targets import Heads, Part, Target, Tokens, parts_of


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiply neurons (at every token), heads (their output z, at every token) or tokens after a block by a factor.

    Args:
        target: a `RegisterNeurons`, `Heads` or `Tokens`.
        factor: 0 is zero ablation, 1 changes nothing, above 1 amplifies, below 0 turns round.

    Raises:
        ConfigError: another kind of target, or a factor that is no finite number.

    Example:
        >>> import torch, registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> with torch.no_grad(), vit.edit(Scale(neurons, 0.5)):
        ...     vit(images).shape
        torch.Size([2, 36, 52])
    """

    target: Target
    factor: float | int

    def __post_init__(self) -> None:
        if not isinstance(self.target, RegisterNeurons | Heads | Tokens):
            raise ConfigError(
                f"Scale takes a RegisterNeurons, rl.Heads or rl.Tokens, got {type(self.target).__name__}. For a list "
                f"of (layer, neuron) use rl.RegisterNeurons.from_pairs."
            )
        if not (isinstance(self.factor, int | float) and math.isfinite(self.factor)):
            raise ConfigError(f"The factor must be a finite number, got {self.factor!r}.")
        object.__setattr__(self, "factor", float(self.factor))  # 1 and 1.0 are the same edit, and have the same hash

    def edits(self, host: Host, first_register: int) -> Sequence[Edit]:
        """One edit for each hook point of the target."""
        return [Edit(part.point, partial(self._change, part)) for part in parts_of(self.target, host.cfg)]

    def _change(self, part: Part, x: Float[Tensor, "batch pos ..."], scene: Scene) -> Float[Tensor, "batch pos ..."]:
        return part.write(x, part.read(x) * self.factor, scene.layout)

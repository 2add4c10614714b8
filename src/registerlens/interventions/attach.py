"""The same interventions inside an unmodified transformers, timm or open_clip model."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from torch import nn

from registerlens.errors import InterventionError
from registerlens.interventions.attach_tower import Tower
from registerlens.interventions.base import Intervention, Plan
from registerlens.model.vit import HookedViT


def attach(module: nn.Module, *interventions: Intervention) -> Attachment:
    """Put interventions in force inside a model of transformers, timm or open_clip, which is otherwise left as it is.

    With `with`, for the length of the block; without, until `remove()`. Either way the module is then exactly what it
    was. Outputs keep their shapes: appended tokens are taken out of hidden states, features and attention maps (whose
    rows then lack what went to them). Features, pooled outputs and gradients equal those of `HookedViT` under
    `vit.edit(...)`. Attaching again composes, in that order, and may be removed in any order.

    Training, autocast, `torch.compile`, `get_intermediate_layers`, `forward_intermediates` and non-reentrant gradient
    checkpointing (backward before removal, as it runs the blocks again) work. Threads must not share the module.

    Args:
        module: an instance of a class listed by `registerlens models`, or any model that holds exactly one, as CLIP or
            LLaVA. Called as always, on images [batch, channel, height, width].
        interventions: as for `vit.edit`, applied in the order given.

    Raises:
        InterventionError: one does not fit the model, edits a point that has no place here, or has not fired by the
            end of the `with` block.
        UnsupportedArchitectureError: there is no supported vision transformer in the module, or several.

    Source: Jiang et al. 2025, algorithm 2.

    Example:
        >>> import torch, transformers, registerlens as rl
        >>> from registerlens.interventions.attach import attach
        >>> config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                                    image_size=28)
        >>> model, images = transformers.Dinov2Model(config).eval(), torch.rand(2, 3, 28, 28)
        >>> before = model(images).pooler_output
        >>> register = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(0, 5), (1, 17)]))
        >>> with attach(model, register):
        ...     after = model(images)
        >>> after.last_hidden_state.shape, torch.equal(after.pooler_output, before)
        (torch.Size([2, 5, 32]), False)
        >>> torch.equal(model(images).pooler_output, before)
        True
    """
    if isinstance(module, HookedViT):
        raise InterventionError("attach is for models of other libraries; for a HookedViT use vit.edit(...).")
    if not isinstance(module, nn.Module):
        raise InterventionError(
            f"Expected a model of transformers, timm or open_clip, got {type(module).__name__}. "
            f"For a HookedViT use vit.edit(...)."
        )
    tower = Tower.of(module)
    return Attachment(tower, tower.add(interventions))


@dataclass(frozen=True, eq=False)
class Attachment:
    """Interventions in force in a model; made by `attach`. Works as a context manager, or until `remove()`."""

    tower: Tower
    plan: Plan

    def remove(self) -> None:
        """Take the interventions out again; a second time does nothing."""
        self.tower.remove(self.plan)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        if kind is None:
            self.plan.check_fired()

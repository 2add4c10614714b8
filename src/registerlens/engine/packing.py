"""A model as one picklable object, so that a worker on this machine or another gets it once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from registerlens.errors import ConfigError
from registerlens.loading import native
from registerlens.model.parts import listening
from registerlens.model.vit import HookedViT


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A HookedViT on its way to a worker: RegisterLens's own folder format, in memory.

    In memory and not in a folder, since workers on other machines see no common disk: what carries the job (a pipe, an
    object store) carries the model with it. Safetensors and not a pickled module, since hooks are closures.
    """

    described: dict[str, Any]
    """What config.json would say."""
    weights: bytes = field(repr=False)
    """What model.safetensors would hold."""

    def unpack(self, device: torch.device | str = "cpu") -> HookedViT:
        """The model, its weights bit for bit those that were packed."""
        return native.build(self.described, from_bytes(self.weights), "a packed model").to(device)


def pack(vit: HookedViT) -> PackedModel:
    """A model, ready to be sent.

    Raises:
        ConfigError: hooks or edits are in force, which would be left behind.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> there = pack(vit).unpack()
        >>> torch.equal(there.blocks[0].mlp.b_in, vit.blocks[0].mlp.b_in)
        True
    """
    check_untouched(vit, "The model")
    return PackedModel(described=native.describe(vit), weights=to_bytes(native.weights_of(vit)))


def check_untouched(vit: HookedViT, name: str) -> None:
    """A sweep measures the model as it is, and no edit that happens to be in force.

    Raises:
        ConfigError: hooks or edits are in force.
    """
    hooked = [point for point, hook in vit.hook_dict.items() if listening(hook)]
    if hooked or vit.n_test_time_registers:
        where = f" at {', '.join(hooked[:3])}" if hooked else ""
        raise ConfigError(
            f"{name} has hooks or edits in force{where}. They would change the clean run and are not part of any "
            f"condition: leave the `with vit.edit(...)` block (or vit.reset_hooks()), and put edits into conditions."
        )

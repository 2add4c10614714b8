"""What an edit can be aimed at: neurons, heads or tokens, and the hook points they stand for."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import TokenLayout, ViTConfig
from registerlens.errors import ConfigError, InterventionError
from registerlens.model.sublayers import require_blocks, require_heads


@dataclass(frozen=True)
class Heads:
    """Attention heads: what is ablated is their output z, before the output projection.

    Example:
        >>> Heads([(3, 0), (3, 5)]).pairs
        ((3, 0), (3, 5))
    """

    pairs: tuple[tuple[int, int], ...]
    """(layer, head) of each."""

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        object.__setattr__(self, "pairs", tuple((int(layer), int(head)) for layer, head in pairs))


@dataclass(frozen=True)
class Tokens:
    """Tokens of the residual stream after a block.

    Example:
        >>> Tokens(3, "trained_registers").layer, Tokens(3, [0, 7]).which
        (3, (0, 7))
    """

    layer: int
    """The block after which they are replaced."""
    which: Literal["cls", "trained_registers"] | tuple[int, ...]
    """[CLS], the trained registers, or patches by index (row by row)."""

    def __init__(self, layer: int, which: Literal["cls", "trained_registers"] | Iterable[int]) -> None:
        if isinstance(which, str) and which not in ("cls", "trained_registers"):
            raise ConfigError(f"which must be 'cls', 'trained_registers' or patch indices, got {which!r}.")
        chosen = which if isinstance(which, str) else tuple(int(patch) for patch in which)
        object.__setattr__(self, "layer", int(layer))
        object.__setattr__(self, "which", chosen)

    def positions(self, layout: TokenLayout) -> Bool[Tensor, " pos"]:
        """Where they are in a sequence.

        Raises:
            InterventionError: there are no such tokens.
        """
        mask = torch.zeros(layout.n_tokens, dtype=torch.bool)
        if self.which == "cls" and layout.cls is not None:
            mask[layout.cls] = True
        elif self.which == "trained_registers":
            mask[layout.trained_registers] = True
        elif not isinstance(self.which, str):
            wrong = [patch for patch in self.which if not 0 <= patch < layout.n_patches]
            if wrong:
                raise InterventionError(f"Patches {wrong[:5]} do not exist: there are 0 to {layout.n_patches - 1}.")
            mask[torch.tensor(self.which, dtype=torch.long) + layout.patches.start] = True
        if not mask.any():
            raise InterventionError(
                f"Nothing to ablate: the sequence has no tokens {self.which!r}. Name others, such as patch indices."
            )
        return mask


Target = RegisterNeurons | Heads | Tokens


@dataclass(frozen=True)
class TargetPart:
    """One hook point, the features of it that are edited, and whose tokens."""

    point: str
    index: tuple[int, ...] | None = None
    """Neurons, or heads; None is every feature."""
    tokens: Tokens | None = None
    """None stands for every token."""

    def read(self, x: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos feature"]:
        """The chosen features, heads side by side; of every token."""
        chosen = x if self.index is None else x[:, :, torch.tensor(self.index, device=x.device)]
        return chosen.flatten(2)

    def write(
        self, x: Float[Tensor, "batch pos ..."], new: Float[Tensor, "#batch #pos feature"], layout: TokenLayout
    ) -> Float[Tensor, "batch pos ..."]:
        """What was there, with new values of the chosen features at the chosen tokens."""
        if self.tokens is not None:
            return torch.where(self.tokens.positions(layout).to(x.device)[:, None], new.to(x.dtype), x)
        index = torch.tensor(self.index, device=x.device)
        shape = (len(x), x.shape[1], len(index), *x.shape[3:])
        return x.index_copy(2, index, new.to(x.dtype).expand(*shape[:2], -1).reshape(shape))


def parts_of(target: Target, cfg: ViTConfig) -> list[TargetPart]:
    """The hook points a target stands for.

    Raises:
        InterventionError: the model has no such neuron, head, layer or kind of token.
    """
    if isinstance(target, RegisterNeurons):
        listed = target.check(cfg).by_layer()
        return [TargetPart(f"blocks.{layer}.mlp.hook_post", index) for layer, index in listed.items()]
    if isinstance(target, Heads):
        require_heads(target.pairs, cfg.n_layers, cfg.n_heads)
        layers = sorted({layer for layer, _ in target.pairs})
        return [
            TargetPart(f"blocks.{layer}.attn.hook_z", tuple(sorted({h for at, h in target.pairs if at == layer})))
            for layer in layers
        ]
    require_blocks([target.layer], cfg.n_layers)
    if isinstance(target.which, str):
        target.positions(cfg.layout())
    return [TargetPart(f"blocks.{target.layer}.hook_resid_post", tokens=target)]

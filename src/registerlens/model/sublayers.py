"""Names of the places of the residual stream: "embed", and after each sublayer "5.attn" and "5.mlp"; what exists."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from registerlens.errors import InterventionError, ShapeError, close_matches

EVERYWHERE = ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_mid", "blocks.*.hook_resid_post"]
"""Hook points of all sublayers, in their order."""


class Sublayer(str):
    """A place of the residual stream: "embed", or what a block leaves after its attention or MLP, "5.attn" or "5.mlp".

    It is its name, so that it prints and compares as one.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> place = Sublayer("5.attn")
        >>> place.layer, place.kind, place.hook_name
        (5, 'attn', 'blocks.5.hook_resid_mid')
    """

    def __new__(cls, name: str) -> Sublayer:
        """Take the name, if it is one."""
        if not re.fullmatch(r"embed|\d+\.(attn|mlp)", name):
            raise ValueError(f"{name!r} is no sublayer such as 'embed', '5.attn' or '5.mlp'")
        return super().__new__(cls, name)

    @property
    def layer(self) -> int:
        """The block; -1 for the embedding."""
        return -1 if self == "embed" else int(self.partition(".")[0])

    @property
    def kind(self) -> str:
        """What has written there last: "embed", "attn" or "mlp"."""
        return self.rpartition(".")[2]

    @property
    def hook_name(self) -> str:
        """The hook point at which the stream is as it is there."""
        kind = {"embed": "pre", "attn": "mid", "mlp": "post"}[self.kind]
        return f"blocks.{max(self.layer, 0)}.hook_resid_{kind}"


def sublayers(n_layers: int) -> tuple[Sublayer, ...]:
    """Every place of the residual stream.

    Example:
        >>> sublayers(2)
        ('embed', '0.attn', '0.mlp', '1.attn', '1.mlp')
    """
    places = (f"{layer}.{kind}" for layer in range(n_layers) for kind in ("attn", "mlp"))
    return tuple(map(Sublayer, ("embed", *places)))


def sublayer_of(layer: int | str, n_layers: int) -> Sublayer:
    """The sublayer a caller means by a block index (after its MLP; negative counts from the end) or by its name.

    Raises:
        ShapeError: there is no such place.
    """
    names = sublayers(n_layers)
    if isinstance(layer, int) and -n_layers <= layer < n_layers:
        return Sublayer(f"{layer % n_layers}.mlp")
    if layer in names:
        return Sublayer(str(layer))
    raise ShapeError(
        f"There is no layer {layer!r}: give a block from 0 to {n_layers - 1}, or a sublayer such as 'embed', "
        f"'0.attn', '{n_layers - 1}.mlp'.{close_matches(str(layer), names)}"
    )


def require_blocks(blocks: Iterable[int], n_layers: int) -> None:
    """Raise unless the model has these blocks.

    Raises:
        InterventionError: it lacks one.
    """
    for block in blocks:
        if not 0 <= block < n_layers:
            raise InterventionError(f"Block {block} does not exist: there are 0 to {n_layers - 1}.")


def require_heads(pairs: Collection[tuple[int, int]], n_layers: int, n_heads: int) -> None:
    """Raise unless the model has these heads, each a (layer, head).

    Raises:
        InterventionError: it lacks some.
    """
    if wrong := [(layer, head) for layer, head in pairs if not (0 <= layer < n_layers and 0 <= head < n_heads)]:
        raise InterventionError(
            f"Heads {wrong[:5]} do not exist: the model has blocks 0 to {n_layers - 1} with heads 0 to {n_heads - 1} "
            f"each."
        )

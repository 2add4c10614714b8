"""Names of the places of the residual stream: "embed", and after each sublayer "5.attn" and "5.mlp"; what exists."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from registerlens.errors import InterventionError, ShapeError, close_matches

EVERYWHERE = ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_mid", "blocks.*.hook_resid_post"]
"""Hook points of all sublayers, in their order."""


def sublayers(n_layers: int) -> tuple[str, ...]:
    """Every place of the residual stream.

    Example:
        >>> sublayers(2)
        ('embed', '0.attn', '0.mlp', '1.attn', '1.mlp')
    """
    return ("embed", *(f"{layer}.{kind}" for layer in range(n_layers) for kind in ("attn", "mlp")))


def layer_of(sublayer: str) -> int:
    """The block of a sublayer; -1 for "embed"."""
    return -1 if sublayer == "embed" else int(sublayer.partition(".")[0])


def hook_of(sublayer: str) -> str:
    """The hook point at which the stream is as it is after the sublayer.

    Example:
        >>> hook_of("embed"), hook_of("5.attn"), hook_of("5.mlp")
        ('blocks.0.hook_resid_pre', 'blocks.5.hook_resid_mid', 'blocks.5.hook_resid_post')
    """
    if sublayer == "embed":
        return "blocks.0.hook_resid_pre"
    layer, kind = sublayer.split(".")
    return f"blocks.{layer}.hook_resid_{'post' if kind == 'mlp' else 'mid'}"


def sublayer_of(layer: int | str, n_layers: int) -> str:
    """The sublayer a caller means by a block index (after its MLP; negative counts from the end) or by its name.

    Raises:
        ShapeError: there is no such place.
    """
    names = sublayers(n_layers)
    if isinstance(layer, int) and -n_layers <= layer < n_layers:
        return f"{layer % n_layers}.mlp"
    if layer in names:
        return str(layer)
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

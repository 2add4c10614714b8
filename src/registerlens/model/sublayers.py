"""Names of the places of the residual stream: "embed", and after each sublayer "5.attn" and "5.mlp"."""

from __future__ import annotations

from registerlens.config import ViTConfig
from registerlens.errors import ShapeError, close_matches

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


def sublayer_of(layer: int | str, cfg: ViTConfig) -> str:
    """The sublayer a caller means by a block index (after its MLP; negative counts from the end) or by its name.

    Raises:
        ShapeError: there is no such place.
    """
    names = sublayers(cfg.n_layers)
    if isinstance(layer, int) and -cfg.n_layers <= layer < cfg.n_layers:
        return f"{layer % cfg.n_layers}.mlp"
    if layer in names:
        return str(layer)
    raise ShapeError(
        f"There is no layer {layer!r}: give a block from 0 to {cfg.n_layers - 1}, or a sublayer such as 'embed', "
        f"'0.attn', '{cfg.n_layers - 1}.mlp'.{close_matches(str(layer), names)}"
    )

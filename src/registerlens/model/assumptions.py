"""What some analyses take for granted of a model's blocks, asked before they start."""

from __future__ import annotations

from registerlens.config import ViTConfig
from registerlens.errors import UnsupportedArchitectureError

_INSTEAD = "Measured things need no such assumption: trace, find_register_neurons, interventions, patching by hooks."


def require_softmax(cfg: ViTConfig, purpose: str) -> None:
    """Refuse a model whose patterns are no softmax.

    Args:
        cfg: the model's architecture.
        purpose: what assumes it, as the subject of a sentence.

    Raises:
        UnsupportedArchitectureError: attention is of another kind.

    Example:
        >>> from registerlens.emergence.config import ModelShape, TrainingConfig
        >>> require_softmax(TrainingConfig(model=ModelShape(attention="sigmoid")).vit_config, "The attention bias")
        Traceback (most recent call last):
        registerlens.errors.UnsupportedArchitectureError: The attention bias assumes that attention is a ...
    """
    if cfg.attention != "softmax":
        raise UnsupportedArchitectureError(
            f"{purpose} assumes that attention is a softmax; this model's is {cfg.attention}. {_INSTEAD}"
        )


def require_linear_output(cfg: ViTConfig, purpose: str) -> None:
    """Refuse a model in which a norm stands between what W_O and W_out write and the residual stream.

    Args:
        cfg: the model's architecture.
        purpose: what assumes it, as the subject of a sentence.

    Raises:
        UnsupportedArchitectureError: `norm_after` is set.
    """
    if cfg.norm_after:
        raise UnsupportedArchitectureError(
            f"{purpose} assumes that sublayers add to the residual stream what W_O and W_out write; in this model a "
            f"norm stands between (norm_after). {_INSTEAD}"
        )

"""What is measured of each image under each condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import TokenLayout


@dataclass(frozen=True, kw_only=True)
class View:
    """What a metric may look at: one run over a batch, clean or edited."""

    layout: TokenLayout
    """Which token is which; test-time registers included."""
    tokens: Float[Tensor, "batch pos d_model"]
    """After the final norm."""
    output: Float[Tensor, "batch *out"]
    """What the model returns: logits, projection or pooled token."""
    norms: dict[str, Float[Tensor, "batch pos"]] = field(default_factory=dict)
    """Residual norms at the sublayers asked for, such as "3.mlp"; float32."""
    attention: dict[int, Float[Tensor, "batch head key"]] = field(default_factory=dict)
    """Attention drawn by each key in the layers asked for (from [CLS], or the mean over queries), 0 to 1; float32."""
    labels: Int[Tensor, "batch ..."] | None = None
    """The images' labels, where there are any."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number for each image of a batch.

    Example:
        >>> drift = Metric(name="drift", measure=lambda edited, clean: (edited.output - clean.output).norm(dim=-1))
        >>> drift.name
        'drift'
    """

    name: str
    """A column of the result."""
    measure: Callable[[View, View], Float[Tensor, " batch"]] = field(repr=False)
    """From (edited, clean) to one number an image, all images at once; NaN where an image has no such number."""
    norms: tuple[str, ...] = ()
    """Sublayers whose residual norms it looks at, named as in a trace: "embed", "3.attn", "3.mlp"."""
    attention: tuple[int, ...] = ()
    """Layers whose attention it looks at."""
    words: str = ""
    """What it is, with its unit."""

"""What the explorer shows of one token under one condition: exact numbers, before anything is quantised."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from registerlens.explorer.attention import Attention, Head, Role
from registerlens.stats.histograms import medians


@dataclass(frozen=True, kw_only=True)
class Neuron:
    """A neuron at one token."""

    layer: int
    """Its block."""
    neuron: int
    """Which of the block."""
    activation: float
    """After the nonlinearity."""
    written: float
    """Norm of what it adds to the residual stream."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """One token of one image under one condition, in one block and head."""

    attention: Float[Tensor, " other"]
    """What the token pays to every key (role "query"), or draws from every token (role "key"); 0 to 1."""
    reference: Float[Tensor, " key"]
    """What [CLS], or the average query, pays to every key; 0 to 1."""
    norms: Float[Tensor, " place"]
    """The token's residual norm at every place; empty for the key of an attention bias, which is no token."""
    medians: Float[Tensor, " sublayer"]
    """The image's median patch norm there."""
    strongest: tuple[Neuron, ...]
    """The neurons that write most at the token, over all blocks."""
    chosen: Float[Tensor, " chosen"]
    """Activations of the neurons asked for."""


def patch_medians(attention: Attention) -> Float[Tensor, " sublayer"]:
    """The median patch norm of the image at every place."""
    recording = attention.recording
    return medians(recording.norms[:, recording.layout.patches])[:, 0]


def shown(attention: Attention, index: int, role: Role, layer: int, head: Head) -> Shown:
    """Everything about one token.

    Args:
        attention: of one image under one condition.
        index: the token, or the key of an attention bias, which can only be looked at.
        role: whether it looks, or is looked at.
        layer, head: of the attention.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.explorer.recording import record
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> attention = Attention(record(vit, torch.rand(1, 3, 48, 48)))
        >>> about = shown(attention, 7, "query", 2, "mean")
        >>> about.attention.shape, about.norms.shape, len(about.strongest)
        (torch.Size([36]), torch.Size([13]), 8)
    """
    recording = attention.recording
    is_token = index < recording.layout.n_tokens
    neurons = (
        zip(
            recording.strongest[index].tolist(),
            recording.strongest_activation[index].tolist(),
            recording.strongest_written[index].tolist(),
            strict=True,
        )
        if is_token
        else ()
    )
    return Shown(
        attention=attention.of(index, role, layer, head),
        reference=attention.reference(layer, head),
        norms=recording.norms[:, index] if is_token else recording.norms[:0, 0],
        medians=patch_medians(attention),
        strongest=tuple(Neuron(layer=at, neuron=n, activation=a, written=w) for (at, n), a, w in neurons),
        chosen=recording.chosen_activation[index] if is_token else recording.chosen_activation[0, :0],
    )

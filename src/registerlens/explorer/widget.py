"""The explorer as an anywidget: the browser asks, this process answers from what it recorded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float
from torch import Tensor

from registerlens.errors import RegisterLensError, ShapeError, needing
from registerlens.explorer.attention import Head, RecordedAttention, Role
from registerlens.explorer.codes import encode
from registerlens.explorer.explorer import CLEAN, Explorer
from registerlens.explorer.manifest import manifest
from registerlens.explorer.page import script, style

if TYPE_CHECKING:
    from anywidget import AnyWidget

Answer = tuple[dict[str, Any], list[bytes]]
"""A message of plain JSON, and the buffers it speaks of: for each panel the codes of its two maps."""


def make_widget(explorer: Explorer) -> AnyWidget:
    """What `Explorer.widget` does; see there.

    Raises:
        MissingExtraError: anywidget is not installed.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.explorer.explorer import explore
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> make_widget(explore(vit, torch.rand(1, 3, 48, 48))).manifest["layers"]
        6
    """
    with needing("anywidget", "notebooks", "The live explorer"):
        import anywidget
        import traitlets

    class ExplorerWidget(anywidget.AnyWidget):
        _esm = str(script())
        _css = str(style())
        manifest = traitlets.Dict().tag(sync=True)

    widget = ExplorerWidget(manifest=manifest(explorer))

    def asked(_: Any, question: dict[str, Any], __: Any) -> None:
        reply, buffers = answer(explorer, question)
        widget.send(reply, buffers)

    widget.on_msg(asked)
    return widget


def answer(explorer: Explorer, question: dict[str, Any]) -> Answer:
    """The answer to a question, or a message with the error in words.

    Args:
        explorer: what is asked about.
        question: "id"; "image" by number, "conditions" by name, "layer", "head" (a number, "mean" or "rollout"),
            "token" by name, "role" ("query" or "key").

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.explorer.explorer import explore
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> asked = {"id": 7, "image": 0, "conditions": ["clean"], "layer": 3, "head": "mean"}
        >>> told, buffers = answer(explore(vit, torch.rand(1, 3, 48, 48)), asked | {"token": "(2,2)", "role": "key"})
        >>> told["id"], len(told["panels"]), [len(buffer) for buffer in buffers]
        (7, 1, [36, 36])
    """
    try:
        panels, buffers = [], []
        for condition in question["conditions"]:
            panel, codes = _panel(explorer, question, condition)
            panels.append(panel)
            buffers += codes
    except (RegisterLensError, KeyError, TypeError, ValueError) as error:
        return {"id": question.get("id"), "error": str(error)}, []
    return {"id": question.get("id"), "panels": panels}, buffers


def _panel(explorer: Explorer, question: dict[str, Any], condition: str) -> tuple[dict[str, Any] | None, list[bytes]]:
    """One condition; None where it has no such token, such as a test-time register without the intervention."""
    if question["role"] not in ("query", "key"):
        raise ShapeError(f"A token is a 'query' or a 'key', not {question['role']!r}.")
    attention = explorer.attention(question["image"], condition)
    names = explorer.tokens(condition)
    if question["token"] not in names:
        return None, []
    index, role = names.index(question["token"]), cast(Role, question["role"])
    if role == "query" and index >= attention.recording.layout.n_tokens:
        return None, []  # the key of an attention bias is looked at and looks at nothing
    about = token_view(attention, index, role, question["layer"], question["head"])
    maps = [encode(values[None].numpy()) for values in (about.attention, about.reference)]
    reply = {
        "largest": [float(largest[0]) for _, largest in maps],
        "norms": about.norms.tolist(),
        "medians": about.medians.tolist(),
        "cutoff": cutoff(explorer, question["image"]),
        "neurons": [asdict(neuron) for neuron in about.strongest],
        "chosen": about.chosen.tolist(),
    }
    return reply, [np.ascontiguousarray(codes).tobytes() for codes, _ in maps]


def cutoff(explorer: Explorer, image: int) -> float | None:
    """The norm above which a patch of an image is an outlier where that is judged; None where the model has none.

    It follows the clean model's median, so that an intervention does not move it.
    """
    if explorer.threshold is None:
        return None
    return explorer.threshold * float(explorer.attention(image, CLEAN).recording.patch_medians[explorer.place])


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
class TokenView:
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


def token_view(attention: RecordedAttention, index: int, role: Role, layer: int, head: Head) -> TokenView:
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
        >>> attention = RecordedAttention(record(vit, torch.rand(1, 3, 48, 48)))
        >>> about = token_view(attention, 7, "query", 2, "mean")
        >>> about.attention.shape, about.norms.shape, len(about.strongest)
        (torch.Size([36]), torch.Size([13]), 8)
    """
    recording = attention.recording
    rows = slice(index, index + 1) if index < recording.layout.n_tokens else slice(0)  # the key of a bias is no token
    strongest = (recording.strongest, recording.strongest_activation, recording.strongest_written)
    neurons = zip(*(part[rows].flatten(0, 1).tolist() for part in strongest), strict=True)
    return TokenView(
        attention=attention.of(index, role, layer, head),
        reference=attention.reference(layer, head),
        norms=recording.norms[:, rows].flatten(),
        medians=recording.patch_medians,
        strongest=tuple(Neuron(layer=at, neuron=n, activation=a, written=w) for (at, n), a, w in neurons),
        chosen=recording.chosen_activation[rows].flatten(),
    )

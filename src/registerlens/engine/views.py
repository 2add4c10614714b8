"""Runs as metrics see them, from the images or from the residual stream before a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.engine.attention_received import attention_hooks
from registerlens.model.names import TOKENS
from registerlens.model.parts import listening, token_norms
from registerlens.model.sublayers import Sublayer
from registerlens.model.vit import HookedViT


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a run has recorded so far of what was asked for."""

    norms: dict[str, Float[Tensor, "batch pos"]] = field(default_factory=dict)
    """Residual norms at the sublayers asked for, such as "3.mlp"; float32."""
    attention: dict[int, Float[Tensor, "batch head key"]] = field(default_factory=dict)
    """Attention drawn by each key in the layers asked for (from [CLS], or the mean over queries), 0 to 1; float32."""
    labels: Int[Tensor, "batch ..."] | None = None
    """The images' labels, where there are any."""


@dataclass(frozen=True, kw_only=True)
class View(Seen):
    """What may be looked at of one run over a batch, clean or edited."""

    layout: TokenLayout
    """Which token is which; test-time registers included."""
    tokens: Float[Tensor, "batch pos d_model"]
    """After the final norm."""
    output: Float[Tensor, "batch *out"]
    """What the model returns: logits, projection or pooled token."""


AnySeen = TypeVar("AnySeen", bound=Seen)


@runtime_checkable
class Asking(Protocol):
    """What says which norms and whose attention it looks at: a metric, for one."""

    @property
    def norms(self) -> tuple[str, ...]:
        """Sublayers, named as in a trace: "embed", "3.attn", "3.mlp"."""
        ...

    @property
    def attention(self) -> tuple[int, ...]:
        """Layers."""
        ...


@dataclass(frozen=True)
class Watched:
    """What is looked at beside tokens and output.

    Example:
        >>> Watched(norms=("0.mlp", "3.attn"), attention=()).since(2)
        Watched(norms=('3.attn',), attention=())
    """

    norms: tuple[str, ...]
    """Sublayers, as `View.norms`."""
    attention: tuple[int, ...]
    """Layers, as `View.attention`; ascending."""

    @classmethod
    def by(cls, asking: Iterable[Asking]) -> Watched:
        """Everything that one of them asks for."""
        every = list(asking)
        norms = dict.fromkeys(place for ask in every for place in ask.norms)
        return cls(tuple(norms), tuple(sorted({layer for ask in every for layer in ask.attention})))

    def since(self, layer: int) -> Watched:
        """What a run that starts before a block still reaches."""
        norms = (place for place in map(Sublayer, self.norms) if max(place.layer, 0) >= layer)
        return Watched(tuple(norms), tuple(at for at in self.attention if at >= layer))

    def hooks(
        self, vit: HookedViT, layout: TokenLayout, norms: dict[str, Tensor], attention: dict[int, Tensor]
    ) -> list[Any]:
        """Hooks that put it into dictionaries such as a View has; to be made when the edits are in force."""
        places = {Sublayer(place).hook_name: place for place in self.norms}

        def keep(resid: Tensor, hook: Any) -> None:
            norms[places[hook.name]] = token_norms(resid)

        return [
            *((name, keep) for name in places),
            *attention_hooks(vit, layout, self.attention, attention.__setitem__),
        ]


def run_clean(
    vit: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    labels: Int[Tensor, "batch ..."] | None,
    watched: Watched,
    starts: Iterable[int],
) -> tuple[View, dict[int, Float[Tensor, "batch pos d_model"]]]:
    """The run that nothing edits, and the residual stream before some of its blocks.

    Example:
        >>> import torch, registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(2, 3, 48, 48)
        >>> view, resid = run_clean(vit, images, None, Watched((), ()), [4])
        >>> bool((vit(resid[4], start_at_layer=4) == view.output).all())
        True
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        # Where a block is left, not where the next one is entered: hooks of the caller's there fire once more later.
        def hook(resid: Tensor, hook: Any) -> None:
            kept[layer] = resid.clone() if listening(vit.hook_dict[f"blocks.{layer}.hook_resid_pre"]) else resid

        return f"blocks.{layer - 1}.hook_resid_post" if layer else TOKENS, hook

    layout = vit.layout(images)
    with vit.hooks([keep(layer) for layer in sorted(set(starts))]):
        view = run_from(vit, images, None, layout, watched)
    return replace(view, labels=labels), kept


def run_from(
    vit: HookedViT,
    x: Float[Tensor, "batch ..."],
    layer: int | None,
    layout: TokenLayout,
    watched: Watched,
    edits: Sequence[Any] = (),
    before: Seen | None = None,
) -> View:
    """A run from images (`layer` None) or from the residual stream before a block, with the hooks of some edits.

    What lies before that block is as in `before`.
    """
    start = 0 if layer is None else layer
    norms = {} if before is None else dict(before.norms)
    attention = {} if before is None else dict(before.attention)
    with ExitStack() as stack:
        stack.enter_context(vit.hooks(edits))  # first, so that what is watched is edited
        stack.enter_context(vit.hooks(watched.since(start).hooks(vit, layout, norms, attention)))
        options: dict[str, Any] = {} if layer is None else {"start_at_layer": layer, "layout": layout}
        tokens = vit(x, return_type="tokens", **options)
        output = vit.head(tokens, layout)
    return View(
        layout=layout,
        tokens=tokens,
        output=output,
        norms=norms,
        attention=attention,
        labels=None if before is None else before.labels,
    )


def mapped(seen: AnySeen, change: Callable[[Tensor], Tensor]) -> AnySeen:
    """The same with every tensor changed.

    Example:
        >>> import torch
        >>> tokens = torch.ones(1, 5, 4, requires_grad=True)
        >>> view = View(layout=TokenLayout(grid=(2, 2), n_prefix=1), tokens=tokens, output=tokens[:, 0])
        >>> mapped(view, torch.Tensor.detach).output.requires_grad
        False
    """
    tensors = {item.name: value for item in fields(seen) if isinstance(value := getattr(seen, item.name), Tensor)}
    return replace(
        seen,
        norms={place: change(norms) for place, norms in seen.norms.items()},
        attention={layer: change(attention) for layer, attention in seen.attention.items()},
        **{name: change(tensor) for name, tensor in tensors.items()},
    )


def repeated(view: View, times: int) -> View:
    """The same batch several times over.

    Example:
        >>> import torch
        >>> layout = TokenLayout(grid=(2, 2), n_prefix=1)
        >>> view = View(layout=layout, tokens=torch.rand(2, 5, 4), output=torch.rand(2, 4))
        >>> repeated(view, 3).tokens.shape
        torch.Size([6, 5, 4])
    """
    return view if times == 1 else mapped(view, lambda x: x.repeat(times, *(1 for _ in x.shape[1:])))

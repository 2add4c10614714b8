"""What one image looks like inside the model: queries and keys, norms, and the neurons that wrote most at each token.

Queries and keys are kept instead of patterns: they are smaller by a factor of the number of tokens over twice the width
of a head, and any row, column or mean of a pattern follows from them in milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.engine.attention_received import pattern_hooks
from registerlens.errors import ShapeError
from registerlens.interventions.base import Intervention
from registerlens.model.block import Block
from registerlens.model.parts import token_norms
from registerlens.model.sublayers import EVERYWHERE, sublayers
from registerlens.model.vit import HookedViT
from registerlens.stats.histograms import medians

STRONGEST = 8
"""Neurons kept for each token: those that write most into the residual stream there, over all blocks."""

_AT_ONCE = 2**22
"""Activations of a layer that are compared at once: 16 MiB in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """One image under one condition; everything on the CPU, in float32."""

    layout: TokenLayout
    """Which token is which, test-time registers included."""
    sublayers: tuple[str, ...]
    """Places in the stream: "embed", "0.attn", "0.mlp", ..."""
    norms: Float[Tensor, "sublayer pos"]
    """Residual norm of every token at every place."""
    queries: dict[int, Float[Tensor, "head pos d_head"]]
    """By layer, as the scores take them, divided by sqrt(d_head) already."""
    keys: dict[int, Float[Tensor, "head key d_head"]]
    """By layer; more than tokens where an attention bias is in force."""
    patterns: dict[int, Float[Tensor, "head pos key"]]
    """By layer, where scores or patterns are edited, so that queries and keys do not tell them, or where attention is
    no softmax: then each key's share of its row."""
    strongest: Int[Tensor, "pos rank 2"]
    """(layer, neuron) of the neurons that write most at each token: |activation| times the norm of what they write."""
    strongest_activation: Float[Tensor, "pos rank"]
    """Their activations."""
    strongest_written: Float[Tensor, "pos rank"]
    """The norm of what each writes into the residual stream, before a norm that may stand there (`norm_after`)."""
    chosen_activation: Float[Tensor, "pos chosen"]
    """Activations of the neurons asked for."""

    def check(self, layer: int, head: int = 0) -> None:
        """Complain about a block or head that is not there.

        Raises:
            ShapeError: the number is no index of one.
        """
        kept = self.queries | self.patterns
        for what, number, n in (("Block", layer, len(kept)), ("Head", head, len(kept[0]))):
            if number not in range(n):
                raise ShapeError(f"{what} {number!r} does not exist: there are 0 to {n - 1}.")

    @property
    def n_keys(self) -> int:
        """Keys of every layer: tokens, and those of attention biases."""
        if self.patterns:
            return next(iter(self.patterns.values())).shape[-1]
        return self.keys[0].shape[1]

    @property
    def patch_medians(self) -> Float[Tensor, " sublayer"]:
        """The median patch norm of the image at every place."""
        return medians(self.norms[:, self.layout.patches])[:, 0]

    def pattern(self, layer: int) -> Float[Tensor, "head pos key"]:
        """The attention pattern of a block, computed here; rows sum to 1."""
        self.check(layer)
        if layer in self.patterns:
            return self.patterns[layer]
        return (self.queries[layer] @ self.keys[layer].mT).softmax(-1)

    def head(self, layer: int, head: int, queries: slice | list[int] = slice(None)) -> Float[Tensor, "query key"]:
        """The pattern of one head, or only some of its rows."""
        self.check(layer, head)
        if layer in self.patterns:
            return self.patterns[layer][head, queries]
        return (self.queries[layer][head, queries] @ self.keys[layer][head].mT).softmax(-1)


def record(
    vit: HookedViT,
    image: Float[Tensor, "1 channel height width"],
    interventions: Sequence[Intervention] = (),
    chosen: Sequence[tuple[int, int]] = (),
) -> Recording:
    """Run the model on one image and keep what the explorer shows.

    Args:
        vit: the model, edited or not.
        image: preprocessed, a batch of one.
        interventions: in force during the run.
        chosen: (layer, neuron) of neurons whose activations are kept whatever they are.

    Raises:
        ShapeError: the image does not fit.
        InterventionError: an intervention does not fit the model.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> kept = record(vit, torch.rand(1, 3, 48, 48))
        >>> kept.norms.shape, kept.pattern(2).shape, kept.strongest.shape
        (torch.Size([13, 36]), torch.Size([1, 36, 36]), torch.Size([36, 8, 2]))
    """
    with torch.inference_mode(), vit.edit(*interventions):
        watch = _Watch(vit, chosen)
        with vit.hooks(watch.hooks()):
            vit(image.to(vit.device), stop_at_layer=vit.cfg.n_layers)
        return watch.result(vit.layout(image))


class _Watch:
    """What hooks collect while one image goes through."""

    def __init__(self, vit: HookedViT, chosen: Sequence[tuple[int, int]]) -> None:
        self.vit, self.chosen = vit, tuple(chosen)
        self.norms: list[Tensor] = []
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.patterns: dict[int, Tensor] = {}
        self.best: list[tuple[Tensor, Tensor, Tensor]] = []  # written, activation, (layer, neuron) of each layer
        self.activations: dict[tuple[int, int], Tensor] = {}

    def hooks(self) -> list[Any]:
        inside = pattern_hooks(self.vit, range(self.vit.cfg.n_layers), self._pair, self._pattern)
        return [(EVERYWHERE, self._norm), ("blocks.*.mlp.hook_post", self._neurons), *inside]

    def _norm(self, resid: Tensor, hook: Any) -> None:
        self.norms.append(token_norms(resid[0]).cpu())

    def _pair(self, layer: int, q: Tensor, k: Tensor) -> None:
        q, k = (rearrange(x[0].float(), "pos head d -> head pos d").cpu().clone() for x in (q, k))
        self.queries[layer], self.keys[layer] = q * q.shape[-1] ** -0.5, k

    def _pattern(self, layer: int, pattern: Tensor) -> None:
        self.patterns[layer] = pattern[0].float().cpu().clone()

    def _neurons(self, post: Tensor, hook: Any) -> None:
        layer = hook.layer()
        block = cast(Block, self.vit.blocks[layer])
        written = token_norms(block.mlp.W_out)  # what one unit of activation writes, for each neuron
        rows: list[tuple[Tensor, Tensor]] = []
        for part in post[0].split(max(1, _AT_ONCE // post.shape[-1])):
            top = (part.float().abs() * written).topk(min(STRONGEST, post.shape[-1]), dim=-1)
            rows.append((top.values, top.indices))
        values, index = (torch.cat(parts) for parts in zip(*rows, strict=True))
        pairs = torch.stack([torch.full_like(index, layer), index], -1)
        self.best.append((values.cpu(), post[0].float().gather(-1, index).cpu(), pairs.cpu()))
        for at, neuron in self.chosen:
            if at == layer:
                self.activations[at, neuron] = post[0, :, neuron].float().cpu().clone()

    def result(self, layout: TokenLayout) -> Recording:
        values, activation, pairs = (torch.cat(parts, 1) for parts in zip(*self.best, strict=True))
        top = values.topk(min(STRONGEST, values.shape[1]), dim=1)
        activations = [self.activations[pair] for pair in self.chosen]
        return Recording(
            layout=layout,
            sublayers=sublayers(self.vit.cfg.n_layers),
            norms=torch.stack(self.norms),
            queries=self.queries,
            keys=self.keys,
            patterns=self.patterns,
            strongest=torch.stack([pairs[..., i].gather(1, top.indices) for i in range(2)], -1),
            strongest_activation=activation.gather(1, top.indices),
            strongest_written=top.values,
            chosen_activation=torch.stack(activations, 1) if activations else torch.zeros(len(values), 0),
        )

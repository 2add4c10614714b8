"""Attention of one recording as people ask for it: a head, the mean over heads, or rollout; a row, a column, a mean."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.errors import ShapeError
from registerlens.explorer.recording import Recording

Head = int | Literal["mean", "rollout"]
"""A head by number, the mean over heads, or attention rollout from this block down to the input."""
Role = Literal["query", "key"]
"""Whether a token looks (where to) or is looked at (from where)."""


@dataclass(frozen=True, eq=False)
class RecordedAttention:
    """The attention of one image under one condition, computed when asked for; means over heads are kept.

    Blocks, heads and tokens that are not there are a `ShapeError`.

    Rollout multiplies the patterns of all blocks up to one, each the mean over heads, mixed half and half with the
    identity for the residual connection. The key of an attention bias has no token whose past could be followed: what
    goes there stays there, so that rows still sum to 1.

    Source: Abnar and Zuidema 2020, 2005.00928, for rollout.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.explorer.recording import record
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> attention = RecordedAttention(record(vit, torch.rand(1, 3, 48, 48)))
        >>> round(float(attention.of(7, "query", 3, "rollout").sum()), 4)
        1.0
    """

    recording: Recording
    _means: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def mean(self, layer: int) -> Float[Tensor, "pos key"]:
        """The mean over heads."""
        if layer not in self._means:
            self._means[layer] = self.recording.pattern(layer).mean(0)
        return self._means[layer]

    def whole(self, layer: int, head: Head) -> Float[Tensor, "pos key"]:
        """From every token to every key; rows sum to 1."""
        if head == "rollout":
            return self.rollout(layer, torch.eye(self.recording.layout.n_tokens))
        return self.mean(layer) if head == "mean" else self.recording.head(layer, head)

    def of(self, index: int, role: Role, layer: int, head: Head) -> Float[Tensor, " other"]:
        """What one token pays to every key (role "query"), or draws from every token (role "key")."""
        n_tokens = self.recording.layout.n_tokens
        n = n_tokens if role == "query" else self.recording.n_keys
        if not 0 <= index < n:
            raise ShapeError(f"Token {index} is no {role}: these count 0 to {n - 1}.")
        if head == "rollout":
            if role == "query":
                return self.rollout(layer, torch.eye(n_tokens)[[index]])[0]
            return self._rollout_to(layer, index)
        if role == "query" and isinstance(head, int):
            return self.recording.head(layer, head, [index])[0]
        whole = self.whole(layer, head)
        return whole[index] if role == "query" else whole[:, index]

    def reference(self, layer: int, head: Head) -> Float[Tensor, " key"]:
        """What [CLS] pays to every key; where there is no [CLS], the mean over queries."""
        layout = self.recording.layout
        if layout.cls is not None:
            return self.of(layout.cls, "query", layer, head)
        if head == "rollout":
            return self.rollout(layer, torch.full((1, layout.n_tokens), 1 / layout.n_tokens))[0]
        return self.whole(layer, head).mean(0)

    def rollout(self, layer: int, start: Float[Tensor, "row pos"]) -> Float[Tensor, "row key"]:
        """Where attention that starts at the output of a block comes from; `start` weighs the tokens there."""
        self.recording.check(layer)
        n_tokens, n_keys = self.recording.layout.n_tokens, self.recording.n_keys
        tokens, beyond = start, start.new_zeros(len(start), n_keys - n_tokens)
        for below in range(layer, -1, -1):
            flow = tokens @ self.mean(below) / 2
            tokens, beyond = tokens / 2 + flow[:, :n_tokens], beyond + flow[:, n_tokens:]
        return torch.cat([tokens, beyond], 1)

    def _rollout_to(self, layer: int, key: int) -> Float[Tensor, " pos"]:
        """How much of one key is in each token at the output of a block."""
        self.recording.check(layer)
        n_tokens, n_keys = self.recording.layout.n_tokens, self.recording.n_keys
        column = torch.zeros(n_keys)
        column[key] = 1
        for below in range(layer + 1):
            column = torch.cat([(column[:n_tokens] + self.mean(below) @ column) / 2, column[n_tokens:]])
        return column[:n_tokens]

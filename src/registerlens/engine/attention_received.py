"""Attention that the [CLS] query (or, without [CLS], the average query) pays to each key, without whole patterns."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.model.attention import final_point
from registerlens.model.block import Block
from registerlens.model.parts import listening
from registerlens.model.vit import HookedViT

_SCORES_AT_ONCE = 2**20
"""Scores held at once where every query counts: 4 MiB in float32."""


def received_attention(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key head d_head"], layout: TokenLayout
) -> Float[Tensor, "batch head key"]:
    """Attention paid to each key: by [CLS] where there is one, else the mean over all queries; float32.

    Args:
        q: queries as the scores take them (`final_point`); only the [CLS] row is read where there is one.
        k: keys, likewise; there may be more of them than queries, where an attention bias adds some.
        layout: where [CLS] is.

    Returns:
        probabilities; over the keys they sum to 1.

    Source: Jiang et al. 2025, figures 2 and 26 ([CLS] query); Gu et al. 2025 for the mean over queries.

    Example:
        >>> layout = TokenLayout(grid=(2, 2), n_prefix=1)
        >>> received_attention(torch.zeros(1, 5, 2, 8), torch.randn(1, 5, 2, 8), layout)[0, 0]
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    scale = q.shape[-1] ** -0.5
    if layout.cls is not None:
        row = q[:, layout.cls] * scale
        return torch.einsum("bhd,bkhd->bhk", row, k).softmax(-1, dtype=torch.float32)
    keys = k.permute(0, 2, 3, 1)  # batch head d_head key
    queries = (q * scale).transpose(1, 2)
    batch, head, n, _ = queries.shape
    total = torch.zeros(batch, head, keys.shape[-1], dtype=torch.float32, device=q.device)
    step = max(1, _SCORES_AT_ONCE // (batch * head * n))
    for start in range(0, n, step):
        total += (queries[:, :, start : start + step] @ keys).softmax(-1, dtype=torch.float32).sum(2)
    return total / n


Receive = Callable[[int, Float[Tensor, "batch head key"]], None]


def attention_hooks(vit: HookedViT, layout: TokenLayout, layers: Iterable[int], receive: Receive) -> list[Any]:
    """Hooks that hand `receive(layer, attention)` the attention each key draws, in the order of the layers.

    It is computed from queries and keys; where scores or patterns are edited already, or are no softmax, from patterns.

    Args:
        vit: the model, its edits in place.
        layout: of the images to come.
        layers: blocks to watch.
        receive: takes the block's index and [batch, head, key], as `received_attention` gives it.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48)
        >>> seen = {}
        >>> with torch.no_grad(), vit.hooks(attention_hooks(vit, vit.layout(images), [3], seen.__setitem__)):
        ...     out = vit(images)
        >>> seen[3].shape
        torch.Size([1, 1, 36])
    """

    def from_pair(layer: int, q: Tensor, k: Tensor) -> None:
        receive(layer, received_attention(q, k, layout))

    def from_pattern(layer: int, pattern: Tensor) -> None:
        received = pattern.mean(2) if layout.cls is None else pattern[:, :, layout.cls]
        receive(layer, received.float())

    return pattern_hooks(vit, layers, from_pair, from_pattern)


def pattern_hooks(
    vit: HookedViT,
    layers: Iterable[int],
    from_pair: Callable[[int, Tensor, Tensor], None],
    from_pattern: Callable[[int, Tensor], None],
) -> list[Any]:
    """Hooks that hand over what a layer's softmax is taken of, or the pattern itself where it is edited or no softmax.

    So nobody who only counts makes the model hold its patterns.

    Args:
        vit: the model, its edits in place.
        layers: blocks to watch.
        from_pair: takes a block's index, its queries and its keys [batch, pos, head, d_head], normalised and turned.
        from_pattern: takes a block's index and its pattern [batch, head, query, key]; where attention is no softmax,
            and rows have any sum, each key's share of its row.

    Example:
        >>> import registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48)
        >>> hooks = pattern_hooks(vit, [3], lambda layer, q, k: print(layer, *q.shape), lambda layer, pattern: None)
        >>> with torch.no_grad(), vit.hooks(hooks):
        ...     out = vit(images)
        3 1 36 1 64
    """
    queries: dict[int, Tensor] = {}
    q_point, k_point = (final_point(vit.cfg, kind) for kind in ("q", "k"))

    def layer_of(hook: Any) -> int:
        return int(hook.name.split(".")[1])

    def keep_query(q: Tensor, hook: Any) -> None:
        queries[layer_of(hook)] = q

    def with_key(k: Tensor, hook: Any) -> None:
        from_pair(layer_of(hook), queries.pop(layer_of(hook)), k)

    def with_pattern(pattern: Tensor, hook: Any) -> None:
        if vit.cfg.attention != "softmax":
            pattern = pattern / pattern.sum(-1, keepdim=True)
        from_pattern(layer_of(hook), pattern)

    hooks: list[Any] = []
    for layer in layers:
        attn, name = cast(Block, vit.blocks[layer]).attn, f"blocks.{layer}.attn"
        if vit.cfg.attention != "softmax" or listening(attn.hook_attn_scores, attn.hook_pattern):
            hooks.append((f"{name}.hook_pattern", with_pattern))
        else:
            hooks += [(f"{name}.{q_point}", keep_query), (f"{name}.{k_point}", with_key)]
    return hooks

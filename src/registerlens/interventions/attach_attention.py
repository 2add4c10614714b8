"""Attention of the source libraries, run so that queries, keys, values and heads can be edited.

Each class stands in for the `forward` of one attention module, and uses that module's own weights and dropout. Edits
meet tensors of shape [batch, pos, head, d_head]; keys and values may come back longer than queries.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from registerlens.errors import InterventionError

Apply = Callable[[str, Tensor], Tensor]
"""From "q", "k", "v" or "z" and the tensor there to the edited one."""


class TransformersAttention:
    """transformers' own attention code, with one more among its exchangeable attention functions.

    The code runs on this stand-in for the module: it has all that the module has, but its configuration names our
    function. That one edits, and hands over to the function the model is set to (eager, sdpa, flash).
    """

    name = "registerlens"

    def __init__(self, attention: nn.Module, apply: Apply) -> None:
        from transformers import AttentionInterface  # slow to import

        AttentionInterface.register(self.name, _edited_attention)
        self.attention: Any = attention
        self.apply = apply
        modeling = vars(sys.modules[type(attention).__module__])
        self.known, self.eager = modeling["ALL_ATTENTION_FUNCTIONS"], modeling["eager_attention_forward"]
        self.config = copy.copy(self.attention.config)
        self.config._attn_implementation = self.name

    def __getattr__(self, name: str) -> Any:
        if name == "attention":  # while being copied there is none yet
            raise AttributeError(name)
        return getattr(self.attention, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the module's `forward` returns."""
        return type(self.attention).forward(self, *arguments, **options)


def with_still_tokens(options: dict[str, Any], n: int) -> dict[str, Any]:
    """A block's options with n more tokens last that are not turned: their cosines 1, their sines 0.

    The libraries count rows from the end of the sequence. transformers has `position_embeddings`, a pair of cosines and
    sines [pos, d_head]; timm has `rope` [..., pos, 2 d_head], sines and cosines side by side.
    """
    pair, joint = options.get("position_embeddings"), options.get("rope")
    if n and pair is not None:
        longer = tuple(F.pad(rows, (0, 0, 0, n), value=value) for rows, value in zip(pair, (1.0, 0.0), strict=True))
        options = options | {"position_embeddings": longer}
    if n and joint is not None:
        sines, cosines = joint.chunk(2, -1)
        longer = [F.pad(rows, (0, 0, 0, n), value=value) for rows, value in ((sines, 0.0), (cosines, 1.0))]
        options = options | {"rope": torch.cat(longer, -1)}
    return options


def _edited_attention(
    stand_in: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    points = zip("qkv", (query, key, value), strict=True)
    q, k, v = (stand_in.apply(kind, x.transpose(1, 2)).transpose(1, 2) for kind, x in points)
    attend = stand_in.known.get_interface(stand_in.attention.config._attn_implementation, stand_in.eager)
    z, weights = attend(stand_in.attention, q, k, v, _longer(attention_mask, k.shape[2]), **options)
    return stand_in.apply("z", z), weights


class TimmAttention:
    """timm's `Attention`, `AttentionRope` and `EvaAttention`, fused or not as the module is set."""

    def __init__(self, attention: nn.Module, apply: Apply) -> None:
        self.attention: Any = attention
        self.apply = apply
        self.signature = inspect.signature(type(attention).forward)

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        """What the module's `forward` returns."""
        attention = self.attention
        bound = self.signature.bind(attention, *arguments, **options).arguments
        if bound.get("is_causal", False):
            raise InterventionError("Attention cannot be edited where it is causal. Call the model without is_causal.")
        qkv = rearrange(self._projected(bound["x"]), "batch pos (three head d) -> three batch head pos d", three=3,
                        head=attention.num_heads)  # fmt: skip
        q, k = (self._turned(x, bound.get("rope")) for x in (attention.q_norm(qkv[0]), attention.k_norm(qkv[1])))
        q, k, v = (self._edited(kind, x) for kind, x in zip("qkv", (q, k, qkv[2]), strict=True))
        mask = _longer(bound.get("attn_mask"), k.shape[2])
        if attention.fused_attn:
            dropout = attention.attn_drop.p if attention.training else 0.0
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            scores = q * attention.scale @ k.mT
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            z = attention.attn_drop(scores.softmax(-1)) @ v
        heads = attention.norm(z.transpose(1, 2).flatten(2)).unflatten(2, (attention.num_heads, -1))
        return attention.proj_drop(attention.proj(self.apply("z", heads).flatten(2)))

    def _projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side, from one map or three."""
        attention = self.attention
        if attention.qkv is None:
            return torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)
        if getattr(attention, "q_bias", None) is None:
            return attention.qkv(x)
        return attention.qkv(x) + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])

    def _turned(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """Queries or keys [batch, head, pos, d_head] of patches turned by their positions, sines and cosines."""
        if rope is None:
            return x
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat  # optional dependency

        still, patches = x.tensor_split([self.attention.num_prefix_tokens], 2)
        return torch.cat([still, apply_rot_embed_cat(patches, rope, half=self.attention.rotate_half)], 2).type_as(x)

    def _edited(self, kind: str, x: Tensor) -> Tensor:
        return self.apply(kind, x.transpose(1, 2)).transpose(1, 2)


class OpenClipAttention:
    """torch's `MultiheadAttention` as open_clip calls it: self-attention, batch first, without attention weights."""

    def __init__(self, attention: nn.Module, apply: Apply) -> None:
        self.attention: Any = attention
        self.apply = apply

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """What the module's `forward` returns."""
        attention = self.attention
        if need_weights:
            raise InterventionError("Edited attention gives no weights here. Take them from HookedViT.")
        qkv = F.linear(query, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = _edited(qkv, attention.num_heads, self.apply)
        dropout = attention.dropout if attention.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=_longer(attn_mask, k.shape[2]), dropout_p=dropout)
        return attention.out_proj(self.apply("z", z.transpose(1, 2)).flatten(2)), None


class DinoAttention:
    """Attention of DINO's and DINOv2's own code, without xformers; DINO's returns its maps too."""

    def __init__(self, attention: nn.Module, apply: Apply, returns_maps: bool) -> None:
        self.attention: Any = attention
        self.apply = apply
        self.returns_maps = returns_maps

    def __call__(self, x: Tensor, attn_bias: Any = None) -> Tensor | tuple[Tensor, Tensor]:
        """What the module's `forward` returns."""
        attention = self.attention
        if attn_bias is not None:
            raise InterventionError("Attention over several images side by side cannot be edited. Give one batch.")
        q, k, v = _edited(attention.qkv(x), attention.num_heads, self.apply)
        dropout = getattr(attention.attn_drop, "p", attention.attn_drop)  # a module, or in later versions a number
        pattern = F.dropout((q * attention.scale @ k.mT).softmax(-1), dropout, attention.training)
        z = self.apply("z", (pattern @ v).transpose(1, 2))
        out = attention.proj_drop(attention.proj(z.flatten(2)))
        return (out, pattern) if self.returns_maps else out


STAND_INS: dict[str, Callable[[nn.Module, Apply], Callable[..., Any]]] = {
    "transformers": TransformersAttention,
    "timm": TimmAttention,
    "open_clip": OpenClipAttention,
    "dino": partial(DinoAttention, returns_maps=True),
    "dinov2": partial(DinoAttention, returns_maps=False),
}
"""Library -> from an attention module and its edits to what stands in for its `forward`."""


def _edited(qkv: Tensor, n_heads: int, apply: Apply) -> tuple[Tensor, Tensor, Tensor]:
    """Edited queries, keys and values [batch, head, pos, d_head] from the joint projection."""
    split = rearrange(qkv, "batch pos (three head d_head) -> three batch pos head d_head", three=3, head=n_heads)
    q, k, v = (apply(kind, split[index]).transpose(1, 2) for index, kind in enumerate("qkv"))
    return q, k, v


def _longer(mask: Tensor | None, n_keys: int) -> Tensor | None:
    """The mask (booleans, or numbers added to the scores) with added keys open to every query."""
    return None if mask is None else F.pad(mask, (0, n_keys - mask.shape[-1]), value=mask.dtype == torch.bool)

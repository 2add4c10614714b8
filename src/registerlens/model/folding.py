"""Norms folded into the weights that read them, so that those weights can be read on their own."""

from dataclasses import replace
from typing import cast

import torch
from einops import rearrange
from torch import nn

from registerlens.config import ViTConfig
from registerlens.model.block import Block
from registerlens.model.mlp import GatedMLP
from registerlens.model.norms import LayerNorm, Norm
from registerlens.model.parts import ResidualWriter
from registerlens.model.vit import HookedViT

Linear = nn.Linear | ResidualWriter


def fold_layer_norm(vit: HookedViT) -> HookedViT:
    """A new model that computes the same, in which norms that only linear maps read have weight 1 and bias 0.

    The maps take over the norm's weight and bias; where the norm takes the mean out, their rows are centred too, as
    nothing along the all-ones direction reaches them. Folded are the norms before attention and MLP, those inside them,
    and what stands before the head's (or the pooling attention's) linear maps. Left are norms whose output is added
    to the residual stream (`ln_pre`, patch embeddings), those on queries and keys, and a final norm that no linear
    map reads alone.

    Where the final norm is folded into the head, `return_type="tokens"` gives the tokens without its weight and bias.

    Source: TransformerLens's `fold_ln`, for ViTs.

    Example:
        >>> import torch, registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> folded, images = fold_layer_norm(vit), torch.rand(1, 3, 48, 48)
        >>> torch.allclose(folded(images), vit(images), atol=1e-4), bool((folded.blocks[2].ln1.w == 1).all())
        (True, True)
    """
    folded = HookedViT(_with_biases(vit.cfg), vit.preprocess, f"{vit.source}, norms folded")
    folded = folded.to(vit.device, vit.dtype).train(vit.training)
    own = folded.state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name not in vit.state_dict()}
    folded.load_state_dict(vit.state_dict() | zeros)
    with torch.no_grad():
        for part in folded.blocks:
            _fold_block(cast(Block, part))
        _fold_head(folded)
    return folded


def _with_biases(cfg: ViTConfig) -> ViTConfig:
    """The same architecture with a bias wherever a norm's own may have to go."""
    pool = cfg.attn_pool and replace(cfg.attn_pool, qkv_bias=True)
    return replace(cfg, qkv_bias=True, head_bias=True, attn_pool=pool)


def _fold_block(block: Block) -> None:
    attn, mlp = block.attn, block.mlp
    _fold(block.ln1, attn.qkv)
    _fold(block.ln2, mlp.up, *([mlp.gate] if isinstance(mlp, GatedMLP) else []))
    for norm, out in ((attn.ln, attn.out), (mlp.ln, mlp.out)):
        if norm is not None:
            _fold(norm, out)


def _fold_head(vit: HookedViT) -> None:
    head, pool, final = vit.head, vit.head.attn, vit.ln_final
    if pool is not None:
        before_kv = pool.ln_k or final
        if isinstance(before_kv, Norm):
            _fold(before_kv, pool.kv)
        if pool.ln_q is not None and pool.q is not None:
            _fold(pool.ln_q, pool.q)
        if pool.mlp is not None:
            _fold(cast(Norm, pool.mlp.ln), pool.mlp.up)
    if head.linear is None:
        return
    if head.ln is not None:
        _fold(head.ln, head.linear)
    elif pool is None and isinstance(final, Norm):
        _fold(final, head.linear)


def _fold(norm: Norm, *readers: Linear) -> None:
    """Give a norm's weight and bias to the linear maps that read it, which may read several normalised vectors."""
    for reader in readers:
        weight = rearrange(reader.weight.double(), "out (part width) -> out part width", width=len(norm.w))
        if isinstance(norm, LayerNorm):
            reader.bias.add_(weight.sum(1) @ norm.b.double())
        weight = weight * norm.w.double()
        if isinstance(norm, LayerNorm):
            weight = weight - weight.mean(-1, keepdim=True)
        reader.weight.copy_(rearrange(weight, "out part width -> out (part width)"))
    norm.w.fill_(1)
    if isinstance(norm, LayerNorm):
        norm.b.zero_()

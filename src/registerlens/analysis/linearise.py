"""Blocks as linear maps of one token, from the weights alone, and the direction that their product stretches most."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from registerlens.model.block import Block
from registerlens.model.mlp import MLP
from registerlens.model.norms import LayerNorm, Norm

_AT_ONCE = 1024
"""Inputs that go through an MLP together."""


def block_map(block: Block, samples: Float[Tensor, "sample d_model"]) -> Float[Tensor, "d_model d_model"]:
    """E = C A of one block, float64, acting on columns; `samples` are one half of the pairs X, -X."""
    attn, mlp = block.attn, block.mlp
    out = rearrange(attn.W_O.double().cpu(), "head d_head d_model -> d_model (head d_head)")
    out = out if attn.ln is None else _after_norm(out, attn.ln)
    through = out @ rearrange(attn.W_V.double().cpu(), "head d_model d_head -> (head d_head) d_model")
    identity = torch.eye(through.shape[0], dtype=torch.float64)
    attention = identity + _after_norm(through, block.ln1)
    return (identity + _after_norm(fit_mlp(mlp, samples), block.ln2)) @ attention


def _after_norm(linear: Float[Tensor, "out width"], norm: Norm) -> Float[Tensor, "out width"]:
    """The map after a norm's weight and, in a LayerNorm, its centring: linear @ diag(weight) @ P."""
    scaled = linear * norm.w.double().cpu()
    return scaled - scaled.mean(1, keepdim=True) if isinstance(norm, LayerNorm) else scaled


def fit_mlp(mlp: MLP, samples: Float[Tensor, "sample d_model"]) -> Float[Tensor, "d_model d_model"]:
    """W_out M: least squares of what the MLP writes on its input X, over the samples and their negatives."""
    W_out = mlp.W_out
    wide = torch.float32 if W_out.device.type == "mps" else torch.float64
    size = samples.shape[1]
    cross, gram = (torch.zeros(size, size, dtype=wide, device=W_out.device) for _ in range(2))
    for part in samples.split(_AT_ONCE):
        x = part.to(W_out)
        odd = (mlp.neurons(x) - mlp.neurons(-x)) / 2  # what is even in X has no slope, and drops out
        cross += (x.T @ (odd @ W_out)).to(wide)
        gram += (x.T @ x).to(wide)
    return torch.linalg.solve(gram.double().cpu(), cross.double().cpu()).T


def compose(
    maps: list[Float[Tensor, "d_model d_model"]],
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]]:
    """First left singular vector, and relative singular values, of the product of the maps up to each.

    Example:
        >>> stretch = torch.diag(torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64))
        >>> directions, values = compose([stretch, stretch])
        >>> directions.tolist(), values[:, 1].tolist()
        ([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]], [0.33..., 0.11...])
    """
    product = torch.eye(maps[0].shape[0], dtype=torch.float64)
    directions, values = [], []
    for step in maps:
        product = step @ product
        left, singular, _ = torch.linalg.svd(product)
        product = product / singular[0]  # only the direction matters; the size might overflow
        first = left[:, 0]
        directions.append(first * first[first.abs().argmax()].sign())
        values.append(singular / singular[0])
    return torch.stack(directions), torch.stack(values)

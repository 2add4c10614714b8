"""Blocks as linear maps of one token: attention as if every token attended to itself, the MLP by its least-squares fit.

The fit is on a normal input; the LayerNorms are without their division.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from registerlens.model.block import Block
from registerlens.model.mlp import MLP, GatedMLP
from registerlens.model.norms import LayerNorm, Norm
from registerlens.model.parts import ACTIVATIONS


def block_map(block: Block) -> Float[Tensor, "d_model d_model"]:
    """E = C A of one block, float64, acting on columns."""
    attn, mlp = block.attn, block.mlp
    out = rearrange(attn.W_O.double().cpu(), "head d_head d_model -> d_model (head d_head)")
    out = out if attn.ln is None else _after_norm(out, attn.ln)
    through = out @ rearrange(attn.W_V.double().cpu(), "head d_model d_head -> (head d_head) d_model")
    identity = torch.eye(through.shape[0], dtype=torch.float64)
    attention = identity + _after_norm(through, block.ln1)
    return (identity + _after_norm(fit_mlp(mlp), block.ln2)) @ attention


def _after_norm(linear: Float[Tensor, "out width"], norm: Norm) -> Float[Tensor, "out width"]:
    """The map after a norm's weight and, in a LayerNorm, its centring: linear @ diag(weight) @ P."""
    scaled = linear * norm.w.double().cpu()
    return scaled - scaled.mean(1, keepdim=True) if isinstance(norm, LayerNorm) else scaled


def fit_mlp(mlp: MLP) -> Float[Tensor, "d_model d_model"]:
    """W_out M: least squares of what the MLP writes on its input X ~ N(0, I).

    By Stein's lemma M is the mean derivative of the neurons by X.
    """
    out = mlp.W_out.double().cpu().T
    out = out if mlp.ln is None else _after_norm(out, mlp.ln)
    reads, bias = mlp.W_in.double().cpu().T, mlp.b_in.double().cpu()
    if not isinstance(mlp, GatedMLP):
        return out @ (activation_moments(mlp.act, bias, reads.norm(dim=1))[1, :, None] * reads)
    gates, gate_bias = mlp.W_gate.double().cpu().T, mlp.b_gate.double().cpu()
    level, slope, bend = activation_moments(mlp.act, gate_bias, gates.norm(dim=1))
    by_gate = bias * slope + (reads * gates).sum(1) * bend
    return out @ (by_gate[:, None] * gates + level[:, None] * reads)


# A nonlinearity under a normal input ---------------------------------------------------------------------------------


def activation_moments(
    act: Callable[[Tensor], Tensor], mean: Float[Tensor, " neuron"], std: Float[Tensor, " neuron"]
) -> Float[Tensor, "moment neuron"]:
    """Means of act(x), of its first and of its second derivative for normal x, float64.

    In closed form for GELU, ReLU and ReLU squared, else (SiLU, and GELU's approximations) by the trapezoidal rule,
    which for an analytic function of a normal variable is exact to rounding.

    Example:
        >>> activation_moments(torch.nn.functional.relu, torch.zeros(1), torch.ones(1)).squeeze(1).numpy().round(4)
        array([0.3989, 0.5   , 0.3989])
    """
    mean, std = mean.double(), std.double().clamp_min(1e-150)
    closed = _CLOSED.get(act)
    return torch.stack(closed(mean, std)) if closed else _trapezoidal(act, mean, std)


def _normal(z: Tensor) -> tuple[Tensor, Tensor]:
    """The normal distribution function and its density."""
    return torch.special.ndtr(z), (-z.square() / 2).exp() / math.sqrt(2 * math.pi)


def _gelu(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = 1 + std.square()
    below, density = _normal(mean / total.sqrt())
    density = density / total.sqrt()
    centre, variance = mean / total, std.square() / total
    slope = below + centre * density
    return mean * below + std.square() * density, slope, (2 - centre.square() - variance) * density


def _relu(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below, density = _normal(mean / std)
    return mean * below + std * density, below, density / std


def _relu2(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    level, below, _ = _relu(mean, std)
    return mean * level + std.square() * below, 2 * level, 2 * below


_CLOSED = {ACTIVATIONS["gelu"]: _gelu, ACTIVATIONS["relu"]: _relu, ACTIVATIONS["relu2"]: _relu2}


def _trapezoidal(act: Callable[[Tensor], Tensor], mean: Tensor, std: Tensor) -> Float[Tensor, "moment neuron"]:
    step = min(0.3, 0.3 / float(std.max()))  # a sigmoid's nearest pole lies pi / std from the line
    z = torch.arange(-10, 10 + step, step, dtype=torch.float64)
    weights = (-z.square() / 2).exp()
    with torch.enable_grad():
        x = (mean[:, None] + std[:, None] * z).requires_grad_()
        y = act(x)
        [slope] = torch.autograd.grad(y.sum(), x, create_graph=True)
        [bend] = torch.autograd.grad(slope.sum(), x)
    return torch.stack([y.detach(), slope.detach(), bend]) @ (weights / weights.sum())


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

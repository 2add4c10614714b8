"""Weights that are not finite, or that nobody trained."""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from registerlens.diagnosis.findings import CauseFinding
from registerlens.model.block import Block
from registerlens.model.vit import HookedViT

STRUCTURE = 1.2
"""A block counts as untrained where none of its matrices stretches a direction this many times as much as a random
matrix does: 0.9 to 1.1 are seen in random models, at least 1.45 in trained ones' blocks."""


def not_finite(vit: HookedViT) -> CauseFinding | None:
    """NaN or infinity among the parameters."""
    wrong = {name: int((~weight.isfinite()).sum()) for name, weight in vit.named_parameters()}
    wrong = {name: n for name, n in wrong.items() if n}
    if not wrong:
        return None
    first = next(iter(wrong))
    return CauseFinding(
        cause="not finite",
        words=f"{sum(wrong.values())} weights in {len(wrong)} parameters are NaN or infinite, the first in {first}.",
        evidence={name: float(n) for name, n in wrong.items()},
        advice="Load the checkpoint again, or an earlier one; nothing else can be said of this model.",
    )


def not_finite_inside(reason: str) -> CauseFinding:
    """NaN or infinity that arises on the way, as the error that met it says."""
    return CauseFinding(
        cause="not finite",
        words=reason,
        evidence={},
        advice="Look for NaN in the images; if the model is in float16, use bfloat16 or float32.",
    )


def untrained(vit: HookedViT) -> CauseFinding | None:
    """Blocks whose matrices have no more structure than random numbers."""
    stretches = [_most_structured(cast(Block, block)) for block in vit.blocks]
    random = [layer for layer, stretch in enumerate(stretches) if stretch < STRUCTURE]
    if not random:
        return None
    which = "All blocks" if len(random) == len(stretches) else f"Blocks {', '.join(map(str, random))}"
    largest = max(stretches[layer] for layer in random)
    return CauseFinding(
        cause="untrained weights",
        words=(
            f"{which} have the weights of a random twin: no matrix in them stretches any direction more than "
            f"{largest:.2f} times as much as random numbers of the same size do (trained blocks: 1.4 and more)."
        ),
        evidence={f"block {layer}": stretch for layer, stretch in enumerate(stretches)},
        advice=(
            "Load the weights: a checkpoint's names may not have matched, or the model was made from a configuration. "
            "What is said of outliers, sinks and neurons holds for random numbers."
        ),
    )


def _most_structured(block: Block) -> float:
    thirds = block.attn.qkv.weight.chunk(3)  # each may have a scale of its own
    return max(
        _stretch(weight) for weight in (*thirds, block.attn.out.weight, block.mlp.up.weight, block.mlp.out.weight)
    )


def _stretch(weight: Float[Tensor, "row column"]) -> float:
    """Largest singular value over that of a random matrix of the same shape and mean square (Bai and Yin 1993)."""
    matrix = weight.detach().float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        largest = float(torch.svd_lowrank(matrix, q=8, niter=12)[1][0])
    expected = float(matrix.square().mean().sqrt()) * sum(map(math.sqrt, matrix.shape))
    return largest / max(expected, 1e-30)

"""From what was written to what it does: contributions to every receiver, which add up to the receiver's quantity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.circuits.outlier_tokens import OutlierRun
from registerlens.circuits.readings import read_keys, read_output, read_writes
from registerlens.config import ViTConfig
from registerlens.model.block import Block
from registerlens.model.vit import HookedViT

LATER = ("attention of later blocks", "neurons of later blocks", "biases")
"""What else a later head's score is made of: writes between the stream's place and the head, all biases."""


def neuron_name(layer: int, neuron: int) -> str:
    """A neuron's node.

    Example:
        >>> neuron_name(1, 183)
        'neuron 1:183'
    """
    return f"neuron {layer}:{neuron}"


def stream_parts(cfg: ViTConfig, neurons: RegisterNeurons, block: int) -> list[str]:
    """Names of what the outliers' stream is made of: the neurons, then the rest.

    Example:
        >>> cfg = ViTConfig(n_layers=2, d_model=8, n_heads=1, d_mlp=8, image_size=(8, 8), patch_size=(4, 4))
        >>> stream_parts(cfg, RegisterNeurons.from_pairs([(0, 3)]), 0)
        ['neuron 0:3', 'embedding', 'attention of block 0', 'other neurons of block 0', 'biases']
    """
    named = [neuron_name(*pair) for pair in neurons.pairs]
    written = [f"{what} of block {i}" for i in range(block + 1) for what in ("attention", "other neurons")]
    return [*named, "embedding", *written, "biases"]


def reader_parts(cfg: ViTConfig, block: int) -> list[str]:
    """Names of what the reader's stream is made of besides the heads of later blocks."""
    attention = [f"attention of block {i}" for i in range(block + 1)]
    return ["embedding", *attention, *(f"neurons of block {i}" for i in range(cfg.n_layers)), "biases"]


@dataclass(frozen=True)
class Received:
    """A receiver at the end of the path: the reader's stream, or the output."""

    heads: Float[Tensor, "batch layer head via"]
    """From each head of the blocks after the stream's place, apart for each group of keys."""
    rest: Float[Tensor, "batch part"]
    """From everything else."""
    whole: Float[Tensor, " batch"]
    """The quantity as the model has it."""


@dataclass(frozen=True)
class Contributions:
    """What every part of a batch contributes to every receiver, image by image."""

    stream: Float[Tensor, "batch part"]
    """To the norm of the outliers' stream."""
    stream_norm: Float[Tensor, " batch"]
    """That norm, mean over the image's outliers."""
    scores: Float[Tensor, "batch source layer head"]
    """To the readers' mean score with the outliers: a source is one of `stream_parts`, then of `LATER`."""
    score: Float[Tensor, "batch layer head"]
    """That score."""
    attention: Float[Tensor, "batch layer head via"]
    """The readers' mean attention to each group of keys."""
    reader: Received
    """To the norm of the readers' mean stream after the last block; the rest as `reader_parts`."""
    output: Received | None
    """To the output; the rest as `reader_parts`, then "other tokens"."""
    error: float
    """Largest relative difference between a sum of parts and its whole."""


def contributions(
    vit: HookedViT, seen: OutlierRun, neurons: RegisterNeurons, target: int | None, *, with_output: bool
) -> Contributions:
    """All contributions of one batch.

    Args:
        vit: the model, edited or not.
        seen: what a run of the batch left.
        neurons: those with a name of their own, none after the stream's place.
        target: which output; None for its own direction.
        with_output: whether the output is a receiver.
    """
    writers = written(vit, seen, neurons)
    norms = seen.stream.norm(dim=-1, keepdim=True)
    stream = seen.tokens.mean(einsum(writers, seen.stream / norms, "part token d, token d -> part token"))
    stream_norm = seen.tokens.mean(norms[:, 0])
    scores, score = (torch.stack(each, -2) for each in zip(*_scores(vit, seen, writers), strict=True))
    layers = sorted(seen.pattern)
    mean = mean_reader(seen)
    norm = mean.norm(dim=-1)
    direction = (mean / norm[:, None])[:, None] * seen.tokens.readers[..., None]
    heads, rest = _to_reader(vit, seen, direction)
    received = Received(heads, rest, norm)
    output = _to_output(vit, seen, target) if with_output else None
    pairs = [(stream.sum(1), stream_norm), (scores.sum(1), score)]
    pairs += [(one.heads.sum((1, 2, 3)) + one.rest.sum(1), one.whole) for one in (received, output) if one is not None]
    return Contributions(
        stream=stream,
        stream_norm=stream_norm,
        scores=scores,
        score=score,
        attention=torch.stack([seen.pattern[layer] for layer in layers], 1),
        reader=received,
        output=output,
        error=max(float((total - whole).norm() / whole.norm()) for total, whole in pairs),
    )


def mean_reader(seen: OutlierRun) -> Float[Tensor, "batch d_model"]:
    """The readers' mean stream after the last block: of [CLS] itself."""
    return einsum(seen.final[:, seen.tokens.places], seen.tokens.readers, "b q d, b q -> b d")


def written(vit: HookedViT, seen: OutlierRun, neurons: RegisterNeurons) -> Float[Tensor, "part token d_model"]:
    """What each of `stream_parts` wrote into the stream of the outliers."""
    own: dict[tuple[int, int], Tensor] = {}
    rest, biases = [seen.embedded[0]], torch.zeros_like(seen.embedded[0])
    named = neurons.by_layer()
    for layer in range(seen.block + 1):
        block = cast(Block, vit.blocks[layer])
        W_out, act = block.mlp.W_out.to(biases.dtype), seen.neurons[layer].clone()
        for neuron in named.get(layer, ()):
            own[layer, neuron] = act[:, neuron, None] * W_out[neuron]
        act[:, list(named.get(layer, ()))] = 0
        rest += [seen.attention[layer][0] - block.attn.b_O, act @ W_out]
        biases = biases + block.attn.b_O + block.mlp.b_out
    return torch.stack([*(own[pair] for pair in neurons.pairs), *rest, biases])


def _scores(vit: HookedViT, seen: OutlierRun, writers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each later block: contributions [batch, part, head] to the scores, and the scores [batch, head]."""
    tokens = seen.tokens
    later = torch.zeros(len(LATER), *seen.stream.shape, dtype=seen.stream.dtype, device=seen.stream.device)
    for layer in sorted(seen.scores):
        block = cast(Block, vit.blocks[layer])
        queries = seen.queries[layer][tokens.image]
        reading = read_keys(vit, layer, seen.before[layer], tokens.position, queries, tokens.layout)
        read = einsum(torch.cat([writers, later]), reading.vectors, "part token d, token head d -> part head token")
        read[-1] += reading.constants.T
        yield tokens.mean(read), tokens.mean(seen.scores[layer].T)
        wrote = (seen.attention[layer][0] - block.attn.b_O, seen.mlp[layer][0] - block.mlp.b_out)
        later = later + torch.stack([*wrote, (block.attn.b_O + block.mlp.b_out).expand_as(wrote[0])])


def _to_reader(
    vit: HookedViT, seen: OutlierRun, reading: Float[Tensor, "batch reader d_model"]
) -> tuple[Float[Tensor, "batch layer head via"], Float[Tensor, "batch part"]]:
    """Contributions to a functional of the readers' final stream: of later heads, and of `reader_parts`."""

    def read(x: Tensor) -> Float[Tensor, " batch"]:
        return (x * reading).sum((1, 2))

    heads, rest = [], [read(seen.embedded[1])]
    neurons, biases = [], torch.zeros_like(rest[0])
    for layer, module in enumerate(vit.blocks):
        block = cast(Block, module)
        biases = biases + read((block.attn.b_O + block.mlp.b_out).to(reading.dtype).expand_as(reading))
        neurons.append(read(seen.mlp[layer][1] - block.mlp.b_out))
        if layer <= seen.block:
            rest.append(read(seen.attention[layer][1] - block.attn.b_O))
            continue
        z = seen.z[layer]
        by_head, constants = read_writes(vit, layer, z.sum(2), reading)
        heads.append(einsum(z, by_head, "b q via head d, b q head d -> b head via"))
        biases = biases + constants.sum(1)
    return torch.stack(heads, 1), torch.stack([*rest, *neurons, biases], 1)


def _to_output(vit: HookedViT, seen: OutlierRun, target: int | None) -> Received:
    tokens = seen.tokens
    readers = tokens.everywhere
    output = read_output(vit, seen.final, tokens.layout, readers, target)
    heads, rest = _to_reader(vit, seen, (output.vectors * (readers > 0)[..., None])[:, tokens.places])
    by_token = (output.vectors * seen.final).sum(-1) + output.constants
    others = (by_token * (readers == 0)).sum(1)
    constants = output.bias + (output.constants * (readers > 0)).sum(1)
    rest[:, -1] += constants
    return Received(heads, torch.cat([rest, others[:, None]], 1), output.whole)

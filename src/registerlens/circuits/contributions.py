"""What a run of a batch leaves behind, and what each part of it contributes to every receiver, in sums that add up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, patch_norms
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.circuits.readings import read_keys, read_output, read_writes
from registerlens.config import TokenLayout, ViTConfig
from registerlens.errors import InterventionError
from registerlens.model.attention import final_point
from registerlens.model.block import Block
from registerlens.model.parts import at_least_float32
from registerlens.model.vit import HookedViT

VIA = ("outliers", "other patches", "prefix", "registers")
"""Groups of key tokens: outlier patches, other patches, [CLS] (and a distillation token), trained or test-time
registers."""


@dataclass(frozen=True)
class Located:
    """Which tokens of a batch are outliers, and who reads; every image has an outlier and an ordinary patch."""

    layout: TokenLayout
    """Of the batch."""
    image: Int[Tensor, " token"]
    """Index in the batch of each outlier token's image."""
    position: Int[Tensor, " token"]
    """Its place in the sequence."""
    groups: Float[Tensor, "batch pos via"]
    """1 where a token belongs to the group, in the order of `VIA`."""
    places: slice
    """Tokens that may read: [CLS] alone, or the patches."""
    readers: Float[Tensor, "batch reader"]
    """How much each of them counts: 1 for [CLS]; 1 / n for each of n ordinary patches, 0 for outliers."""

    @property
    def everywhere(self) -> Float[Tensor, "batch pos"]:
        """The readers' weights over the whole sequence."""
        weights = torch.zeros_like(self.groups[..., 0])
        weights[:, self.places] = self.readers
        return weights

    def mean(self, values: Float[Tensor, "*part token"]) -> Float[Tensor, "batch *part"]:
        """From a number an outlier token to the mean over each image's outliers."""
        flat = values.reshape(-1, values.shape[-1])
        total = flat.new_zeros(len(self.readers), len(flat)).index_add(0, self.image, flat.T)
        number = torch.bincount(self.image, minlength=len(self.readers))
        return (total / number[:, None]).reshape(len(self.readers), *values.shape[:-1])


def reads_by_cls(cfg: ViTConfig) -> bool:
    """Whether [CLS] is what the circuit ends in: where there is one, and the output is not a mean of other tokens.

    Example:
        >>> reads_by_cls(ViTConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, image_size=(8, 8), patch_size=(4, 4)))
        True
    """
    means_only = bool(cfg.pooling) and set(cfg.pooling) <= {"mean", "mean_all"}
    return cfg.class_token and not means_only


def locate(vit: HookedViT, batch: Tensor, detection: Detection) -> tuple[Bool[Tensor, " batch"], Located | None]:
    """Which images can be used, those with an outlier and an ordinary patch, and the tokens of these."""
    layout = vit.layout(batch)  # first, for its clear errors
    above = detection.cutoff.above(patch_norms(vit, batch, detection.sublayer))
    used = above.any(1) & ~above.all(1)
    above = above[used]
    if not len(above):
        return used, None
    image, patch = above.nonzero(as_tuple=True)
    dtype = at_least_float32(vit.dtype)
    groups = torch.zeros(len(above), layout.n_tokens, len(VIA), dtype=dtype, device=above.device)
    groups[:, layout.patches, 0], groups[:, layout.patches, 1] = above.to(dtype), (~above).to(dtype)
    groups[:, layout.prefix, 2] = 1
    groups[:, layout.trained_registers, 3] = groups[:, layout.test_time_registers, 3] = 1
    if reads_by_cls(vit.cfg) and layout.cls is not None:
        places, readers = slice(layout.cls, layout.cls + 1), groups.new_ones(len(above), 1)
    else:
        ordinary = groups[:, layout.patches, 1]
        places, readers = layout.patches, ordinary / ordinary.sum(1, keepdim=True)
    return used, Located(layout, image, patch + layout.patches.start, groups, places, readers)


@dataclass
class OutlierRun:
    """What a run of a batch leaves behind, in float32 at least. Dictionaries are by block."""

    tokens: Located
    block: int
    """The block after which the outliers' stream is taken; heads of later blocks are looked into."""
    embedded: list[Tensor] = field(default_factory=list)
    """What enters block 0: [token, d_model] at the outliers, [batch, reader, d_model] at the readers."""
    attention: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What attention writes, at the outliers and at the readers."""
    neurons: dict[int, Tensor] = field(default_factory=dict)
    """Activations at the outliers [token, d_mlp], up to `block`."""
    mlp: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What the MLP writes, as `attention`."""
    before: dict[int, Tensor] = field(default_factory=dict)
    """The stream before later blocks, at the outliers."""
    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    """The stream after `block`, at the outliers."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """The readers' mean query [batch, head, d_head] of later blocks, as the scores take it."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    """Its scores with the outliers as keys [token, head], as the model computed them."""
    pattern: dict[int, Tensor] = field(default_factory=dict)
    """The readers' mean attention to each group [batch, head, via]."""
    z: dict[int, Tensor] = field(default_factory=dict)
    """The readers' attention times value, apart for each group [batch, reader, via, head, d_head]."""
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    """The stream after the last block, all tokens."""


def look(vit: HookedViT, batch: Tensor, tokens: Located, block: int) -> OutlierRun:
    """Run the model and keep what a circuit needs.

    Raises:
        InterventionError: an edit in force adds keys that are no tokens.
    """
    run, dtype, n_layers = OutlierRun(tokens, block), at_least_float32(vit.dtype), vit.cfg.n_layers
    rows, later, up_to = (tokens.image, tokens.position), range(block + 1, n_layers), range(block + 1)
    values: dict[int, Tensor] = {}

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[rows].to(dtype), x[:, tokens.places].to(dtype)

    def keep_scores(scores: Tensor, hook: Any) -> None:
        mean = einsum(scores[:, :, tokens.places].to(dtype), tokens.readers, "b head q key, b q -> b key head")
        run.scores[hook.layer()] = mean[rows]

    def keep_pattern(pattern: Tensor, hook: Any) -> None:
        if pattern.shape[-1] != tokens.layout.n_tokens:
            raise InterventionError(
                "An edit in force adds keys that are no tokens (an attention bias), which a circuit has no node for. "
                "Measure the circuit of the unedited model, or use test-time registers instead."
            )
        read = pattern[:, :, tokens.places].to(dtype)
        run.pattern[hook.layer()] = einsum(
            read, tokens.readers, tokens.groups, "b head q key, b q, b key via -> b head via"
        )
        grouped = "b head q key, b key via, b key head d -> b q via head d"
        run.z[hook.layer()] = einsum(read, tokens.groups, values.pop(hook.layer()), grouped)

    def keep_query(q: Tensor, hook: Any) -> None:
        run.queries[hook.layer()] = einsum(q[:, tokens.places].to(dtype), tokens.readers, "b q head d, b q -> b head d")

    def points(layers: range, name: str) -> list[str]:
        return [f"blocks.{layer}.{name}" for layer in layers]

    every = range(n_layers)
    hooks: list[Any] = [
        ("blocks.0.hook_resid_pre", lambda x, hook: run.embedded.extend(both(x))),
        (points(every, "hook_attn_out"), lambda x, hook: run.attention.__setitem__(hook.layer(), both(x))),
        (points(up_to, "mlp.hook_post"), lambda x, hook: run.neurons.__setitem__(hook.layer(), x[rows].to(dtype))),
        (points(every, "hook_mlp_out"), lambda x, hook: run.mlp.__setitem__(hook.layer(), both(x))),
        (f"blocks.{block}.hook_resid_post", lambda x, hook: setattr(run, "stream", x[rows].to(dtype))),
        (points(later, "hook_resid_pre"), lambda x, hook: run.before.__setitem__(hook.layer(), x[rows].to(dtype))),
        (points(later, f"attn.{final_point(vit.cfg, 'q')}"), keep_query),
        (points(later, "attn.hook_v"), lambda v, hook: values.__setitem__(hook.layer(), v.to(dtype))),
        (points(later, "attn.hook_attn_scores"), keep_scores),
        (points(later, "attn.hook_pattern"), keep_pattern),
    ]
    with vit.hooks(hooks):
        run.final = vit(batch.to(vit.device), stop_at_layer=n_layers).to(dtype)
    return run


LATER = ("attention of later blocks", "neurons of later blocks", "biases")
"""What else a later head's score is made of: writes between the stream's place and the head, all biases."""


class Node(str):
    """A node of a circuit: "neuron 1:183", "head 3.0", STREAM, a reader such as "[CLS]", OUTPUT, or the rest of one.

    It is its name, so that it prints and compares as one.

    Example:
        >>> node = Node.head(3, 0)
        >>> node, node.kind, node.place, Node.rest_of(node)
        ('head 3.0', 'head', (3, 0), 'rest of head 3.0')
    """

    @classmethod
    def neuron(cls, layer: int, neuron: int) -> Node:
        """A neuron."""
        return cls(f"neuron {layer}:{neuron}")

    @classmethod
    def head(cls, layer: int, head: int) -> Node:
        """A head."""
        return cls(f"head {layer}.{head}")

    @classmethod
    def rest_of(cls, receiver: str) -> Node:
        """All that flows into a node and is not shown."""
        return cls(f"rest of {receiver}")

    @property
    def kind(self) -> str:
        """One of "neuron", "stream", "head", "reader", "output" and "rest"."""
        known = re.match("(neuron|head|rest) ", self)
        return known[1] if known else {STREAM: "stream", OUTPUT: "output"}.get(self, "reader")

    @property
    def place(self) -> tuple[int, int]:
        """(layer, index) of a neuron or head; -1 for none."""
        layer, index = re.findall(r"\d+", self) if self.kind in ("neuron", "head") else (-1, -1)
        return int(layer), int(index)

    @property
    def receiver(self) -> Node:
        """Whose rest this is."""
        return Node(self.removeprefix("rest of "))


STREAM, OUTPUT = Node("outlier stream"), Node("output")


def stream_parts(cfg: ViTConfig, neurons: RegisterNeurons, block: int) -> list[str]:
    """Names of what the outliers' stream is made of: the neurons, then the rest.

    Example:
        >>> cfg = ViTConfig(n_layers=2, d_model=8, n_heads=1, d_mlp=8, image_size=(8, 8), patch_size=(4, 4))
        >>> stream_parts(cfg, RegisterNeurons.from_pairs([(0, 3)]), 0)
        ['neuron 0:3', 'embedding', 'attention of block 0', 'other neurons of block 0', 'biases']
    """
    named = [Node.neuron(*pair) for pair in neurons.pairs]
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
    """Contributions of everything else."""
    whole: Float[Tensor, " batch"]
    """The quantity as the model has it."""


@dataclass(frozen=True)
class Contributions:
    """What every part of a batch contributes to every receiver, image by image."""

    stream: Float[Tensor, "batch part"]
    """Contributions to the norm of the outliers' stream."""
    stream_norm: Float[Tensor, " batch"]
    """Norm of the outliers' stream, mean over the image's outliers."""
    scores: Float[Tensor, "batch source layer head"]
    """To the readers' mean score with the outliers: a source is one of `stream_parts`, then of `LATER`."""
    score: Float[Tensor, "batch layer head"]
    """The readers' mean score with the outliers."""
    attention: Float[Tensor, "batch layer head via"]
    """The readers' mean attention to each group of keys."""
    reader: Received
    """To the norm of the readers' mean stream after the last block; the rest as `reader_parts`."""
    output: Received | None
    """To the output; the rest as `reader_parts`, then "other tokens"."""
    error: float
    """Largest relative difference between a sum of parts and its whole."""


def contributions(
    vit: HookedViT, run: OutlierRun, neurons: RegisterNeurons, target: int | None, *, with_output: bool
) -> Contributions:
    """All contributions of one batch.

    Args:
        vit: the model, edited or not.
        run: what a run of the batch left.
        neurons: those with a name of their own, none after the stream's place.
        target: which output; None for its own direction.
        with_output: whether the output is a receiver.
    """
    writers = written(vit, run, neurons)
    norms = run.stream.norm(dim=-1, keepdim=True)
    stream = run.tokens.mean(einsum(writers, run.stream / norms, "part token d, token d -> part token"))
    stream_norm = run.tokens.mean(norms[:, 0])
    scores, score = (torch.stack(each, -2) for each in zip(*_scores(vit, run, writers), strict=True))
    layers = sorted(run.pattern)
    mean = mean_reader(run)
    norm = mean.norm(dim=-1)
    direction = (mean / norm[:, None])[:, None] * run.tokens.readers[..., None]
    heads, rest = _to_reader(vit, run, direction)
    received = Received(heads, rest, norm)
    output = _to_output(vit, run, target) if with_output else None
    pairs = [(stream.sum(1), stream_norm), (scores.sum(1), score)]
    pairs += [(one.heads.sum((1, 2, 3)) + one.rest.sum(1), one.whole) for one in (received, output) if one is not None]
    return Contributions(
        stream=stream,
        stream_norm=stream_norm,
        scores=scores,
        score=score,
        attention=torch.stack([run.pattern[layer] for layer in layers], 1),
        reader=received,
        output=output,
        error=max(float((total - whole).norm() / whole.norm()) for total, whole in pairs),
    )


def mean_reader(run: OutlierRun) -> Float[Tensor, "batch d_model"]:
    """The readers' mean stream after the last block: of [CLS] itself."""
    return einsum(run.final[:, run.tokens.places], run.tokens.readers, "b q d, b q -> b d")


def written(vit: HookedViT, run: OutlierRun, neurons: RegisterNeurons) -> Float[Tensor, "part token d_model"]:
    """What each of `stream_parts` wrote into the stream of the outliers."""
    own: dict[tuple[int, int], Tensor] = {}
    rest, biases = [run.embedded[0]], torch.zeros_like(run.embedded[0])
    named = neurons.by_layer()
    for layer in range(run.block + 1):
        block = cast(Block, vit.blocks[layer])
        W_out, act = block.mlp.W_out.to(biases.dtype), run.neurons[layer].clone()
        for neuron in named.get(layer, ()):
            own[layer, neuron] = act[:, neuron, None] * W_out[neuron]
        act[:, list(named.get(layer, ()))] = 0
        rest += [run.attention[layer][0] - block.attn.b_O, act @ W_out]
        biases = biases + block.attn.b_O + block.mlp.b_out
    return torch.stack([*(own[pair] for pair in neurons.pairs), *rest, biases])


def _scores(vit: HookedViT, run: OutlierRun, writers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each later block: contributions [batch, part, head] to the scores, and the scores [batch, head]."""
    tokens = run.tokens
    later = torch.zeros(len(LATER), *run.stream.shape, dtype=run.stream.dtype, device=run.stream.device)
    for layer in sorted(run.scores):
        block = cast(Block, vit.blocks[layer])
        queries = run.queries[layer][tokens.image]
        reading = read_keys(vit, layer, run.before[layer], tokens.position, queries, tokens.layout)
        read = einsum(torch.cat([writers, later]), reading.vectors, "part token d, token head d -> part head token")
        read[-1] += reading.constants.T
        yield tokens.mean(read), tokens.mean(run.scores[layer].T)
        wrote = (run.attention[layer][0] - block.attn.b_O, run.mlp[layer][0] - block.mlp.b_out)
        later = later + torch.stack([*wrote, (block.attn.b_O + block.mlp.b_out).expand_as(wrote[0])])


def _to_reader(
    vit: HookedViT, run: OutlierRun, reading: Float[Tensor, "batch reader d_model"]
) -> tuple[Float[Tensor, "batch layer head via"], Float[Tensor, "batch part"]]:
    """Contributions to a functional of the readers' final stream: of later heads, and of `reader_parts`."""

    def read(x: Tensor) -> Float[Tensor, " batch"]:
        return (x * reading).sum((1, 2))

    heads, rest = [], [read(run.embedded[1])]
    neurons, biases = [], torch.zeros_like(rest[0])
    for layer, module in enumerate(vit.blocks):
        block = cast(Block, module)
        biases = biases + read((block.attn.b_O + block.mlp.b_out).to(reading.dtype).expand_as(reading))
        neurons.append(read(run.mlp[layer][1] - block.mlp.b_out))
        if layer <= run.block:
            rest.append(read(run.attention[layer][1] - block.attn.b_O))
            continue
        z = run.z[layer]
        by_head, constants = read_writes(vit, layer, z.sum(2), reading)
        heads.append(einsum(z, by_head, "b q via head d, b q head d -> b head via"))
        biases = biases + constants.sum(1)
    return torch.stack(heads, 1), torch.stack([*rest, *neurons, biases], 1)


def _to_output(vit: HookedViT, run: OutlierRun, target: int | None) -> Received:
    tokens = run.tokens
    readers = tokens.everywhere
    output = read_output(vit, run.final, tokens.layout, readers, target)
    heads, rest = _to_reader(vit, run, (output.vectors * (readers > 0)[..., None])[:, tokens.places])
    by_token = (output.vectors * run.final).sum(-1) + output.constants
    others = (by_token * (readers == 0)).sum(1)
    constants = output.bias + (output.constants * (readers > 0)).sum(1)
    rest[:, -1] += constants
    return Received(heads, torch.cat([rest, others[:, None]], 1), output.whole)

"""Path patching of a circuit's edges: one part is taken out of one receiver's input, and the receiver computes again.

Nothing else in the model sees the change. The receiver is run twice: "live", where its norms take their scale from the
patched input, as they would; and "held", where scales (and the direction that a stream is measured along) are those of
the clean run, as attributions assume: there the effect must be what was attributed.
"""

from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.circuits.contributions import VIA, Contributions, OutlierRun, Received, mean_reader, written
from registerlens.circuits.readings import direction_of, project, run_head, scale_of
from registerlens.interventions.targets import Heads
from registerlens.model.attention import Rotation, final_point
from registerlens.model.block import Block
from registerlens.model.norms import Norm
from registerlens.model.vit import HookedViT

NORMS = ("live", "held")
"""How the receiver's norms are treated."""
LIVE, HELD = range(len(NORMS))
WHOLE_STREAM, FIRST_NEURON, ALL_NEURONS = 0, 1, -1
"""Where senders into a head stand on their axis."""


@dataclass(frozen=True)
class EdgeEffects:
    """By how much a receiver's quantity falls when one part is taken out of its input, image by image.

    Axis `norm` is as `NORMS`. Senders into a head are the whole stream, each neuron, and all neurons together.
    """

    stream: Float[Tensor, "batch norm neuron"]
    """The outliers' stream without a neuron's write: its norm, or its length along the clean direction."""
    score: Float[Tensor, "batch norm sender head"]
    """A head's score with the outliers, their keys made without the sender's write."""
    attention: Float[Tensor, "batch norm sender head"]
    """The same of the attention paid to outliers."""
    reader: Float[Tensor, "batch norm head via"]
    """The readers' mean stream without what a head writes from a group of keys; as `stream`."""
    output: Float[Tensor, "batch norm head via"] | None
    """The same of the output; None where it is not part of the circuit."""


def check_edges(
    vit: HookedViT,
    batch: Float[Tensor, "batch channel height width"],
    run: OutlierRun,
    neurons: RegisterNeurons,
    heads: Heads,
    target: int | None,
    *,
    with_output: bool,
) -> EdgeEffects:
    """Patch every edge between these neurons, the outliers' stream, these heads, the reader and the output.

    Cost: the attention of each head's block runs once; the keys of the outliers are made twice for every neuron; the
    last norm and the model's head run twice for every attention head and group of keys.
    """
    writes = written(vit, run, neurons)[: len(neurons)]
    senders = torch.cat([run.stream[None], writes, writes.sum(0, keepdim=True)])
    score, attention = _without_in_keys(vit, batch, run, senders, heads)
    reader, output = _without_writes(vit, run, heads, target, with_output=with_output)
    shortened = _shortened(run.stream, writes)
    return EdgeEffects(
        stream=run.tokens.mean(shortened), score=score, attention=attention, reader=reader, output=output
    )


def _shortened(
    x: Float[Tensor, "place d_model"], part: Float[Tensor, "*part place d_model"]
) -> Float[Tensor, "norm *part place"]:
    """By how much the norm falls without the part, and the length along the clean direction."""
    wide = x.double()  # a small difference of large numbers
    norm, left = wide.norm(dim=-1), wide - part
    return torch.stack([norm - left.norm(dim=-1), norm - (left * wide).sum(-1) / norm]).to(x.dtype)


# In a head's keys ----------------------------------------------------------------------------------------------------


def _without_in_keys(
    vit: HookedViT,
    batch: Tensor,
    run: OutlierRun,
    senders: Float[Tensor, "sender token d_model"],
    heads: Heads,
) -> tuple[Float[Tensor, "batch norm sender head"], Float[Tensor, "batch norm sender head"]]:
    """By how much score and attention fall when the keys of the outliers are made without each sender's write."""
    shape = (len(run.tokens.readers), len(NORMS), len(senders), len(heads.pairs))
    score, attention = senders.new_zeros(shape), senders.new_zeros(shape)
    resid, at = vit(batch.to(vit.device), stop_at_layer=run.block + 1), run.block + 1
    for layer in sorted({layer for layer, _ in heads.pairs}):
        resid, at = vit(resid, start_at_layer=at, stop_at_layer=layer, layout=run.tokens.layout), layer
        keys = _Keys(vit, layer, resid, run)
        clean_score, clean_attention = run.tokens.mean(run.scores[layer].T), run.pattern[layer][..., 0]
        columns = [i for i, (of, _) in enumerate(heads.pairs) if of == layer]
        chosen = [heads.pairs[i][1] for i in columns]
        for sender, part in enumerate(senders):
            for norm in (LIVE, HELD):
                scores, paid = keys.without(part, held=norm == HELD)
                score[:, norm, sender, columns] = (clean_score - scores)[:, chosen]
                attention[:, norm, sender, columns] = (clean_attention - paid)[:, chosen]
    return score, attention


class _Keys:
    """The readers' attention in one block, with other keys of the outlier tokens and all else as in the clean run."""

    def __init__(self, vit: HookedViT, layer: int, resid: Float[Tensor, "batch pos d_model"], run: OutlierRun) -> None:
        self.block, self.tokens, self.stream = cast(Block, vit.blocks[layer]), run.tokens, run.before[layer]
        places, dtype, met = run.tokens.places, run.stream.dtype, dict[str, Tensor]()
        self.rotation = turn = None
        if vit.rotary is not None:
            turn = vit.rotary(run.tokens.layout, vit.embed.patch.weight)[layer]
            at = run.tokens.position
            self.rotation = Rotation(turn.cos[at], turn.sin[at], turn.interleaved)
        name = f"blocks.{layer}.attn"
        hooks: list[Any] = [
            (f"{name}.{final_point(vit.cfg, 'q')}", lambda q, hook: met.update(q=q[:, places].to(dtype))),
            (f"{name}.hook_attn_scores", lambda scores, hook: met.update(scores=scores[:, :, places].to(dtype))),
        ]
        with vit.hooks(hooks):
            self.block.attn(self.block.ln1(resid), turn)
        self.queries = met["q"][run.tokens.image] * vit.cfg.d_head**-0.5  # [token, reader, head, d_head]
        outliers = run.tokens.groups[:, None, None, :, 0] > 0
        self.others = met["scores"].masked_fill(outliers, -torch.inf).logsumexp(-1)  # [batch, head, reader]

    def without(
        self, part: Float[Tensor, "token d_model"], *, held: bool
    ) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch head"]]:
        """The readers' mean score with the outliers and attention to them, one part missing from the outliers' keys."""
        tokens = self.tokens
        scores = einsum(self.queries, self._keys(part, held=held), "token q head d, token head d -> token head q")
        mean = einsum(scores, tokens.readers[tokens.image], "token head q, token q -> token head")
        # The softmax of the outliers against all other keys, whose scores have not changed.
        odds = torch.zeros_like(self.others, dtype=torch.float64)
        odds = odds.index_add(0, tokens.image, (scores - self.others[tokens.image]).double().clamp_max(500).exp())
        paid = (odds / (1 + odds)).to(scores.dtype)
        return tokens.mean(mean.T), einsum(paid, tokens.readers, "b head q, b q -> b head")

    def _keys(self, part: Float[Tensor, "token d_model"], *, held: bool) -> Float[Tensor, "token head d_head"]:
        """The outliers' keys as the scores take them."""
        attn, left = self.block.attn, self.stream - part
        k = self._project(_normed(self.block.ln1, left, self.stream if held else left))
        if attn.k_norm is not None:
            scaled_as = self._project(_normed(self.block.ln1, self.stream, self.stream)) if held else k
            pattern = "token (group key) d -> token group (key d)"
            groups = (rearrange(x, pattern, key=attn.k_norm.together) for x in (k, scaled_as))
            normed = _normed(attn.k_norm.norm, *groups)
            k = rearrange(normed, "token group (key d) -> token (group key) d", key=attn.k_norm.together)
        return k if self.rotation is None else self.rotation(k[None])[0]

    def _project(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token head d_head"]:
        attn = self.block.attn
        return einsum(x, attn.W_K.to(x.dtype), "token d_model, head d_model d -> token head d") + attn.b_K.to(x.dtype)


def _normed(
    norm: Norm, x: Float[Tensor, "*place width"], scaled_as: Float[Tensor, "*place width"]
) -> Float[Tensor, "*place width"]:
    """The norm of x, with the scale of another stream."""
    return norm.affine(norm.centre(x) / scale_of(norm, scaled_as))


# In the reader's stream ----------------------------------------------------------------------------------------------


def _without_writes(
    vit: HookedViT, run: OutlierRun, heads: Heads, target: int | None, *, with_output: bool
) -> tuple[Float[Tensor, "batch norm head via"], Float[Tensor, "batch norm head via"] | None]:
    """By how much the reader's stream and the output fall when what a head wrote from a group of keys is taken out."""
    tokens, mean = run.tokens, mean_reader(run)
    shape = (len(mean), len(NORMS), len(heads.pairs), len(VIA))
    reader, output = mean.new_zeros(shape), mean.new_zeros(shape) if with_output else None
    outputs = _Outputs(vit, run, target) if with_output else None
    for i, (layer, head) in enumerate(heads.pairs):
        for via in range(len(VIA)):
            if not tokens.groups[..., via].any():
                continue
            wrote = _wrote(vit, run, layer, head, via)
            reader[:, :, i, via] = _shortened(mean, einsum(wrote, tokens.readers, "b q d, b q -> b d")).T
            if output is not None and outputs is not None:
                output[:, :, i, via] = outputs.without(wrote)
    return reader, output


class _Outputs:
    """The model's last norm and head, which can be run without a write into the readers' streams."""

    def __init__(self, vit: HookedViT, run: OutlierRun, target: int | None) -> None:
        self.vit, self.run = vit, run
        pooled, clean = run_head(vit, run.final, run.tokens.layout)
        self.pooled, self.direction = pooled, direction_of(clean, target)
        self.whole = self._measure(clean)

    def without(self, wrote: Float[Tensor, "batch reader d_model"]) -> Float[Tensor, "batch norm"]:
        """By how much the output falls, scales live and held."""
        tokens, final = self.run.tokens, self.run.final.clone()
        final[:, tokens.places] -= wrote * (tokens.readers > 0)[..., None]
        outs = [run_head(self.vit, final, tokens.layout)[1], self._held(final)]
        return torch.stack([self.whole - self._measure(out) for out in outs], 1)

    def _measure(self, out: Tensor) -> Float[Tensor, " batch"]:
        return project(out, self.direction, self.run.tokens.everywhere)

    def _held(self, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch *out"]:
        """The output with the scales of the clean run, by hand: pooling is linear."""
        head, norm = self.vit.head, self.vit.ln_final
        tokens = _normed(norm, final, self.run.final) if isinstance(norm, Norm) else final
        pooled = head.pool(tokens, self.run.tokens.layout) if head.pooling else tokens
        pooled = pooled if head.ln is None else _normed(head.ln, pooled, self.pooled)
        return pooled if head.linear is None else head.linear(pooled.to(self.vit.dtype)).to(final.dtype)


def _wrote(vit: HookedViT, run: OutlierRun, layer: int, head: int, via: int) -> Float[Tensor, "batch reader d_model"]:
    """What a head wrote into the readers' streams from one group of keys."""
    attn, every = cast(Block, vit.blocks[layer]).attn, run.z[layer]
    z = torch.zeros_like(every[:, :, via])
    z[:, :, head] = every[:, :, via, head]
    if attn.ln is not None:
        # The norm before W_O has the scale of all heads and keys together; its bias is no head's.
        own = attn.ln.centre(z.flatten(-2)) / scale_of(attn.ln, every.sum(2).flatten(-2)) * attn.ln.w
        z = own.unflatten(-1, z.shape[-2:])
    return einsum(z, attn.W_O.to(z.dtype), "b q head d, head d d_model -> b q d_model")


class Collected:
    """Arrays of what came by, images first; attributes as those of `Contributions` and `EdgeEffects`.

    `Received` becomes three arrays: `reader_heads`, `reader_rest`, `reader_whole`.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}
        self.error = 0.0

    def add(self, batch: Contributions | EdgeEffects) -> None:
        """Take in one batch."""
        self._take("", batch)

    def __getitem__(self, name: str) -> np.ndarray:
        """All images of one array, float64; batches are put together once, as tables ask for an array edge by edge."""
        parts = self._parts[name]
        if len(parts) > 1:
            parts[:] = [np.concatenate(parts)]
        return parts[0]

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def _take(self, prefix: str, values: Any) -> None:
        for item in fields(values):
            value = getattr(values, item.name)
            if isinstance(value, Tensor):
                self._parts.setdefault(prefix + item.name, []).append(value.cpu().numpy().astype(np.float64))
            elif isinstance(value, Received):
                self._take(f"{item.name}_", value)
            elif isinstance(value, float):
                self.error = max(self.error, value)

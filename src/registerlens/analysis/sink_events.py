"""The sink of a head: its strongest key, what that key writes beside the others, and counts of such events."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.outliers import count_ratios, judge_each
from registerlens.config import TokenLayout
from registerlens.engine.attention_received import pattern_hooks
from registerlens.engine.stream import Batch, Sums
from registerlens.errors import check_finite
from registerlens.model.block import Block
from registerlens.model.parts import at_least_float32, token_norms
from registerlens.model.vit import Hook, HookedViT
from registerlens.stats.histograms import N_BINS, bin_edges, count_bins, medians

_SCORES_AT_ONCE = 2**20
"""Scores of a chunk of queries: few enough for the processor's cache, enough for a matrix product to be worth it."""
_LARGEST_EXPONENT = 60.0
"""Largest score that is exponentiated as it is: a million of them still sum to a finite float32."""
QUERIES = 0.9
"""Share of the queries that must be drawn to a key for a sink event (Fesser et al. 2026)."""


@dataclass(frozen=True)
class StrongestKey:
    """The key that draws the most attention, in each image and head."""

    position: Int[Tensor, "batch head"]
    """s = argmax over keys of the mean attention."""
    received: Float[Tensor, "batch head"]
    """Attention the average query pays it, 0 to 1."""
    column: Float[Tensor, "batch head query"]
    """Attention each query pays it."""
    strength: Float[Tensor, "batch head"]
    """The largest threshold at which it is a sink event: the wanted share of the queries pays it at least this."""


def strongest_key(pattern: Float[Tensor, "batch head query key"], queries: float = QUERIES) -> StrongestKey:
    """The favourite key of each image and head, and how strong a sink it is to this share of the queries; float32.

    Source: Fesser et al. 2026 (2606.08105).

    Example:
        >>> pattern = torch.tensor([[[[0.9, 0.1], [0.6, 0.4]]]])
        >>> found = strongest_key(pattern)
        >>> found.position.item(), round(found.received.item(), 3), round(found.strength.item(), 3)
        (0, 0.75, 0.6)
    """
    received, position = pattern.mean(2, dtype=torch.float32).max(-1)
    where = position[..., None, None].expand(-1, -1, pattern.shape[2], 1)
    return _strongest(position, received, pattern.gather(-1, where)[..., 0].float(), queries)


def strongest_key_of(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key head d_head"], queries: float = QUERIES
) -> StrongestKey:
    """`strongest_key` of the pattern these queries and keys make, which is never held: a few queries at a time.

    Example:
        >>> q, k = torch.randn(2, 1, 5, 3, 8, generator=torch.Generator().manual_seed(0))
        >>> pattern = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
        >>> torch.allclose(strongest_key_of(q, k).column, strongest_key(pattern).column)
        True
    """
    batch, n, head, _ = q.shape
    scaled = rearrange(q * q.shape[-1] ** -0.5, "batch query head d_head -> (batch head) query d_head")
    keys = rearrange(k, "batch key head d_head -> (batch head) d_head key")
    received = torch.empty(len(keys), keys.shape[-1], dtype=torch.float32, device=q.device)
    log_mass = torch.empty(len(keys), n, dtype=torch.float32, device=q.device)
    # By Cauchy-Schwarz. Where no exponential can overflow, the two passes that look for the highest score are saved.
    small = scaled.norm(dim=-1).amax(-1) * keys.norm(dim=1).amax(-1) <= _LARGEST_EXPONENT
    for rows, plain in ((small.nonzero()[:, 0], True), ((~small).nonzero()[:, 0], False)):
        if len(rows):
            received[rows], log_mass[rows] = _reduced(scaled[rows], keys[rows], plain)
    average, position = (received / n).max(-1)
    key = keys.gather(-1, position[:, None, None].expand(-1, keys.shape[1], 1))
    column = ((scaled @ key)[..., 0].float() - log_mass).exp()
    shape = (batch, head)
    return _strongest(position.unflatten(0, shape), average.unflatten(0, shape), column.unflatten(0, shape), queries)


def _reduced(
    scaled: Float[Tensor, "row query d_head"], keys: Float[Tensor, "row d_head key"], plain: bool
) -> tuple[Float[Tensor, "row key"], Float[Tensor, "row query"]]:
    """What each key receives from all queries together, and the logarithm of each query's sum of exponentials.

    `plain` promises scores so small that they can be exponentiated as they are.
    """
    received = torch.zeros(len(keys), keys.shape[-1], dtype=torch.float32, device=keys.device)
    masses = []
    for some in scaled.split(max(1, _SCORES_AT_ONCE // (len(keys) * keys.shape[-1])), 1):
        scores = (some @ keys).float()
        highest = 0.0 if plain else scores.amax(-1, keepdim=True)
        weights = (scores if plain else scores.sub_(highest)).exp_()
        mass = weights.sum(-1, keepdim=True)
        received += (mass.reciprocal().mT @ weights)[:, 0]
        masses.append((mass.log() + highest)[..., 0])
    return received, torch.cat(masses, 1)


def _strongest(position: Tensor, received: Tensor, column: Tensor, queries: float) -> StrongestKey:
    n = column.shape[-1]
    needed = max(1, math.ceil(queries * n - 1e-9))  # the product may lie just above a whole number
    return StrongestKey(position, received, column, column.kthvalue(n - needed + 1).values)


def output_factor(W_O: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head rank d_head"]:
    """R of W_O^T = Q R: `R v` has the norms and angles of the output `v W_O`, in d_head numbers; float32 at least.

    Example:
        >>> W_O, v = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3)
        >>> torch.allclose((output_factor(W_O)[0] @ v).norm(), (v @ W_O[0]).norm())
        True
    """
    return torch.linalg.qr(W_O.to(at_least_float32(W_O.dtype)).mT, mode="r").R


def output_factors(vit: HookedViT) -> list[Float[Tensor, "head rank d_head"]]:
    """`output_factor` of every block, LayerScale included."""
    return [output_factor(cast(Block, block).attn.W_O.detach()) for block in vit.blocks]


def stable_rank(x: Float[Tensor, "*batch row column"]) -> Float[Tensor, "*batch"]:
    """||X||_F^2 / sigma_1^2, by the small Gram matrix X^T X; NaN where X is zero.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 2.0, 1.0])))
        tensor(2.2500)
    """
    values = torch.linalg.eigvalsh(x.mT @ x)
    return values.clamp_min(0).sum(-1) / values[..., -1]


def norm_over_others(norms: Float[Tensor, "event key"], position: Int[Tensor, " event"]) -> Float[Tensor, " event"]:
    """The norm at a position over the mean of all others; NaN where all are zero, infinite where only the others are.

    Example:
        >>> norm_over_others(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([0]))
        tensor([0.2500])
    """
    own = norms.gather(-1, position[:, None])[:, 0]
    return own * (norms.shape[-1] - 1) / (norms.sum(-1) - own).clamp_min(0)


NOP_RATIO = 0.2
"""A sink whose output is at most this share of the others' mean is a NOP."""
BROADCAST_RATIO, BROADCAST_RANK = 0.5, 1.5
"""A sink with at least this ratio, in a head whose output has at most this stable rank, is a broadcast."""
GU_SINK = 0.3
"""A head has a sink in the sense of Gu et al. where a key draws more than this of the average query."""

MECHANISMS = ("nop", "broadcast", "other")
"""What a sink does. Order of the first axis of `SinkKinds.mechanisms`."""
PLACES = (
    "cls",
    "distillation",
    "trained_register",
    "outlier_patch",
    "other_patch",
    "test_time_register",
    "attention_bias",
)
"""What stands at the sink. Order of the first axis of `SinkKinds.places`."""
_PATCH = PLACES.index("other_patch")
PER_EVENT = ("output_ratio", "value_ratio", "stable_rank")
"""Numbers that only an event has."""


@dataclass(frozen=True)
class Events:
    """The sinks of one layer and batch; one entry an event."""

    layer: int
    head: Int[Tensor, " event"]
    strength: Float[Tensor, " event"]
    output_ratio: Float[Tensor, " event"]
    value_ratio: Float[Tensor, " event"]
    stable_rank: Float[Tensor, " event"]
    place: Int[Tensor, " event"]
    """Index into PLACES; every patch counts as "other_patch" here."""
    norm: Float[Tensor, " event"]
    """What a patch brings into the layer, over the image's median."""


class SinkSums(Sums):
    """Counts and sums of sinks; events are counted in place, a threshold and a layer at a time."""

    def __init__(self, vit: HookedViT, thresholds: tuple[float, ...], queries: float) -> None:
        super().__init__()
        self.thresholds, self.queries, self.factors = thresholds, queries, output_factors(vit)
        cells = (len(thresholds), vit.cfg.n_layers, vit.cfg.n_heads)
        self.totals |= {name: torch.zeros(2, *cells, dtype=torch.float64) for name in PER_EVENT}  # sum, and of how many
        self.totals["mechanisms"] = torch.zeros(len(MECHANISMS), *cells, dtype=torch.int64)
        self.totals["places"] = torch.zeros(len(PLACES), *cells, dtype=torch.int64)
        self.totals["patch_norms"] = torch.zeros(*cells, N_BINS, dtype=torch.int64)

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """Of each layer in turn q, k, v and z are looked at, and nothing is kept but counts."""
        self.layout, self.n_keys = layout, layout.n_tokens
        self.norms: list[Tensor] = []
        self.received: list[Tensor] = []
        self.drawn: list[Tensor] = []
        self._values: Tensor | None = None
        self._key: StrongestKey | None = None
        return [
            ("blocks.*.hook_resid_pre", self._norm),
            ("blocks.*.attn.hook_v", self._value),
            *pattern_hooks(vit, range(vit.cfg.n_layers), self._pair, self._pattern),
            ("blocks.*.attn.hook_z", self._output),
        ]

    def _norm(self, resid: Tensor, hook: Any) -> None:
        self.norms.append(token_norms(resid[:, self.layout.patches]))

    def _value(self, v: Tensor, hook: Any) -> None:
        self._values = v

    def _pair(self, layer: int, q: Tensor, k: Tensor) -> None:
        self._take(layer, strongest_key_of(q, k, self.queries), k.shape[1])

    def _pattern(self, layer: int, pattern: Tensor) -> None:
        self._take(layer, strongest_key(pattern, self.queries), pattern.shape[-1])

    def _take(self, layer: int, key: StrongestKey, n_keys: int) -> None:
        self._key, self.n_keys = key, n_keys
        self.received.append(key.received)
        self.drawn.append(torch.stack([(key.column >= threshold).float().mean(-1) for threshold in self.thresholds]))
        check_finite(key.received, f"The attention of block {layer} is NaN")

    def _output(self, z: Float[Tensor, "batch query head d_head"], hook: Any) -> None:
        v, key = cast(Tensor, self._values), cast(StrongestKey, self._key)
        self._values = self._key = None
        image, head = (key.strength >= self.thresholds[-1]).nonzero(as_tuple=True)
        factor = self.factors[hook.layer()][head].mT  # event d_head rank
        position = key.position[image, head]
        values, mixed = v[image, :, head].to(factor.dtype), z[image, :, head].to(factor.dtype)
        relative = self.norms[-1] / medians(self.norms[-1])
        patch = (position - self.layout.patches.start).clamp(0, self.layout.n_patches - 1)
        events = Events(
            layer=hook.layer(),
            head=head,
            strength=key.strength[image, head],
            output_ratio=norm_over_others(token_norms(values @ factor), position),
            value_ratio=norm_over_others(token_norms(values), position),
            stable_rank=stable_rank(mixed @ factor),
            place=self._places(position),
            norm=relative[image, patch],
        )
        for at, threshold in enumerate(self.thresholds):
            self._count(at, events, (events.strength >= threshold).nonzero()[:, 0])

    def _places(self, position: Int[Tensor, " event"]) -> Int[Tensor, " event"]:
        layout = self.layout
        place = torch.full_like(position, PLACES.index("attention_bias"))
        for name, where in (
            ("test_time_register", layout.test_time_registers),
            ("other_patch", layout.patches),
            ("trained_register", layout.trained_registers),
        ):
            place[(position >= where.start) & (position < where.stop)] = PLACES.index(name)
        for name, at in (("cls", layout.cls), ("distillation", layout.distillation)):
            if at is not None:
                place[position == at] = PLACES.index(name)
        return place

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        received = torch.stack(self.received).double().cpu()  # layer batch head
        self.add(
            n_images=len(batch),
            received=received.sum(1),
            excess=(received - 1 / self.n_keys).sum(1),
            gu_rate=(received > GU_SINK).double().sum(1),
            drawn=torch.stack(self.drawn, 1).sum(2),  # threshold layer head
            **count_ratios(torch.stack(self.norms)),
        )

    def _count(self, at: int, events: Events, chosen: Int[Tensor, " event"]) -> None:
        layer, head = events.layer, events.head[chosen].cpu()
        ratio, rank = events.output_ratio[chosen], events.stable_rank[chosen]
        kind = torch.full_like(head, MECHANISMS.index("other"))
        kind[((ratio >= BROADCAST_RATIO) & (rank <= BROADCAST_RANK)).cpu()] = MECHANISMS.index("broadcast")
        kind[(ratio <= NOP_RATIO).cpu()] = MECHANISMS.index("nop")
        place, norms = events.place[chosen].cpu(), count_bins(events.norm[chosen][:, None])
        one = torch.ones_like(head)
        self.totals["mechanisms"][:, at, layer].index_put_((kind, head), one, accumulate=True)
        self.totals["places"][:, at, layer].index_put_((place, head), one, accumulate=True)
        at_patch = place == _PATCH
        self.totals["patch_norms"][at, layer].index_add_(0, head[at_patch], norms[at_patch])
        for name in PER_EVENT:
            value = getattr(events, name)[chosen].double().cpu()
            there = value.isfinite()
            total, number = self.totals[name][:, at, layer]
            total.index_add_(0, head[there], value[there])
            number.index_add_(0, head[there], torch.ones_like(value[there]))

    def result(self) -> dict[str, Any]:
        """Counts, means, and the norm above which a patch counts as an outlier: fields of `SinkKinds`."""
        means = self.means()
        norms = [means.pop(name) for name in ("histogram", "largest_histogram", "largest_over_median")]
        evidence = max(judge_each(*norms), key=lambda found: found.strength)
        patch_norms, places = means.pop("patch_norms"), means["places"].copy()
        if evidence.present:
            outliers = patch_norms[..., bin_edges()[:-1] >= evidence.threshold].sum(-1)
            places[_PATCH] -= outliers
            places[PLACES.index("outlier_patch")] = outliers
        per_event = {name: (self.totals[name][0] / self.totals[name][1]).numpy() for name in PER_EVENT}
        outlier_norm = evidence.threshold if evidence.present else math.nan
        return {**means, **per_event, "places": places, "n_images": self.n_images, "outlier_norm": outlier_norm}

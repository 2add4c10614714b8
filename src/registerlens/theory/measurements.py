"""Every number of a kernel check beside what it counts as small or large against: random directions, other neurons."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from registerlens.analysis.neurons import RegisterNeurons
from registerlens.model.block import Block
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.theory.observed import Observed
from registerlens.theory.readers import EPSILONS, decompose, dimensions, directions, fold, head_weight, readers_of

N_RANDOM = 1000
"""Random directions a number is compared with; the smallest p-value is 1 / 1001."""
N_NEURONS = 500
"""At most this many other neurons of a layer."""

Vector = Literal["u1", "u2"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where numbers stand in a null distribution; every field has the shape of the numbers."""

    typical: Float[Tensor, "item *quantity"]
    """Median of the null."""
    spread: Float[Tensor, "item *quantity"]
    """Standard deviation of the null."""
    percentile: Float[Tensor, "item *quantity"]
    """Share of the null below the number, in percent; ties count half."""
    p: Float[Tensor, "item *quantity"]
    """One-sided p-value: how often the null is at least as extreme, (1 + hits) / (1 + samples)."""


def stand(
    values: Float[Tensor, "item *quantity"],
    null: Float[Tensor, "sample *quantity"],
    extreme: Literal["low", "high"],
) -> Standing:
    """Rank numbers in a null distribution.

    Args:
        values: the numbers; several quantities are ranked each in its own null.
        null: samples of each quantity; without any, the standing is NaN throughout.
        extreme: whether low or high numbers are what the null should not produce.

    Example:
        >>> found = stand(torch.tensor([0.0]).double(), torch.arange(1, 100).double(), "low")
        >>> found.percentile.item(), found.p.item()
        (0.0, 0.01)
    """
    if not len(null):
        nothing = torch.full_like(values, torch.nan)
        return Standing(typical=nothing, spread=nothing, percentile=nothing, p=nothing)
    below = (null[:, None] < values).double().mean(0)
    tied = (null[:, None] == values).double().mean(0)
    beyond = (below if extreme == "low" else 1 - below - tied) + tied
    n = len(null)
    return Standing(
        typical=null.median(0).values.expand_as(values),
        spread=null.std(0, correction=0).expand_as(values),
        percentile=100 * (below + tied / 2),
        p=(1 + n * beyond) / (1 + n),
    )


def random_units(n: int, dimensions: int, generator: torch.Generator) -> Float[Tensor, "sample dimension"]:
    """Unit vectors drawn uniformly from a sphere, float64.

    Uniform is uniform in every orthonormal basis, so that one draw serves every matrix: its entries are the
    coefficients of a random direction in that matrix's singular vectors.

    Example:
        >>> units = random_units(3, 5, torch.Generator().manual_seed(0))
        >>> units.shape, bool((units.norm(dim=1) - 1).abs().max() < 1e-12)
        (torch.Size([3, 5]), True)
    """
    return F.normalize(torch.randn(n, dimensions, dtype=torch.float64, generator=generator), dim=1)


def weights_of(
    vit: HookedViT, layer: int, neurons: Int[Tensor, " neuron"] | None = None
) -> dict[Vector, Float[Tensor, "neuron d_model"]]:
    """What neurons of a block read and write in the raw residual stream, float64.

    u1 is the neuron's input weights with the LayerNorm before them folded in, centred as LayerNorm centres: up to the
    token's own scale and a constant, the pre-activation is u1 . x. u2 is the neuron's row of W_out, LayerScale folded
    in.

    Args:
        vit: the model.
        layer: the block.
        neurons: which of its neurons; default: all.

    Source: Jiang et al. 2025, Proposition 1.

    Example:
        >>> import registerlens as rl
        >>> weights_of(rl.HookedViT.from_pretrained("registerlens:tiny"), 1, torch.tensor([183]))["u2"].shape
        torch.Size([1, 64])
    """
    block = cast(Block, vit.blocks[layer])
    chosen = slice(None) if neurons is None else neurons.to(block.mlp.W_out.device)
    return {
        "u1": fold(block.ln2, block.mlp.W_in[:, chosen]).T,
        "u2": block.mlp.W_out[chosen].detach().double(),
    }


def other_neurons(
    vit: HookedViT, layer: int, neurons: RegisterNeurons, generator: torch.Generator
) -> dict[Vector, Float[Tensor, "neuron d_model"]]:
    """u1 and u2 of at most N_NEURONS neurons of a block that are not in the list and neither read nor write nothing."""
    listed = set(neurons.by_layer().get(layer, ()))
    others = torch.tensor([n for n in range(vit.cfg.d_mlp) if n not in listed], dtype=torch.long)
    sample = others[torch.randperm(len(others), generator=generator)[:N_NEURONS]]
    weights = weights_of(vit, layer, sample)
    alive = (weights["u1"].norm(dim=1) > 0) & (weights["u2"].norm(dim=1) > 0)
    return {name: vectors[alive] for name, vectors in weights.items()}


TOP = 3
"""Concentration is the share of the squared norm in this many dimensions, as field practice counts massive channels."""

STANDINGS = {"": "typical", "_sd": "spread", "_percentile": "percentile", "_p": "p"}
"""What follows a null's name in the names of columns -> the field of a `Standing` that stands there."""
COLUMNS = {
    "condition": "",
    "quantity": "",
    "eps": math.nan,
    "vector": "",
    "neuron_layer": -1,
    "neuron": -1,
    "layer": -1,
    "head": -1,
    "value": math.nan,
    **{f"{null}{suffix}": math.nan for null in ("random", "neurons") for suffix in STANDINGS},
}
"""Columns of the table, and what stands where a column means nothing."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Vectors of one kind from one block, and their null."""

    vector: str
    """"u1", "u2", or "outlier" (the measured direction of outlier tokens)."""
    layer: int
    """Readers after this block count."""
    neurons: Int[Tensor, " item"]
    """Which neuron each vector belongs to; -1 for the outlier direction."""
    vectors: Float[Tensor, "item d_model"]
    """In the raw residual stream, float64."""
    others: Float[Tensor, "sample d_model"]
    """The same of other neurons of the block."""


@dataclass
class Rows:
    """A table under construction, column by column."""

    parts: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in COLUMNS})

    def add(self, subject: Subject, **columns: Any) -> None:
        """Take in a row for each vector; a single value goes to all of them, columns left out say nothing."""
        n = len(subject.vectors)
        columns |= {"vector": subject.vector, "neuron_layer": subject.layer, "neuron": subject.neurons}
        for name, nothing in COLUMNS.items():
            value = columns.get(name, nothing)
            value = value.cpu().numpy() if isinstance(value, Tensor) else value
            self.parts[name].append(np.broadcast_to(np.asarray(value, dtype=object if nothing == "" else None), n))

    def frame(self) -> pd.DataFrame:
        """The table."""
        return pd.DataFrame({name: np.concatenate(parts) for name, parts in self.parts.items() if parts})


def against(random: Standing | None, neurons: Standing | None, which: Any = ...) -> dict[str, Tensor]:
    """Columns of two standings; `which` picks a quantity."""
    columns: dict[str, Tensor] = {}
    for name, standing in (("random", random), ("neurons", neurons)):
        if standing is not None:
            columns |= {f"{name}{suffix}": getattr(standing, part)[which] for suffix, part in STANDINGS.items()}
    return columns


def subjects_of(
    vit: HookedViT, neurons: RegisterNeurons, observed: Observed | None, generator: torch.Generator
) -> tuple[list[Subject], list[str]]:
    """u1 and u2 of the neurons, block by block, and the outlier direction where images showed one; with notes."""
    subjects, notes = [], []
    for layer, listed in neurons.by_layer().items():
        others = other_neurons(vit, layer, neurons, generator)
        chosen = torch.tensor(listed)
        for vector, vectors in weights_of(vit, layer, chosen).items():
            alive = (vectors.norm(dim=1) > 0).cpu()
            if not alive.all():
                verb = "reads" if vector == "u1" else "writes"
                notes.append(f"Neuron {chosen[~alive].tolist()} of block {layer} {verb} nothing: its {vector} is zero.")
            if alive.any():
                subjects.append(
                    Subject(
                        vector=vector,
                        layer=layer,
                        neurons=chosen[alive],
                        vectors=vectors[alive],
                        others=others[vector],
                    )
                )
    if observed is not None and observed.outlier_layer is not None:
        at = observed.outlier_layer
        home = at if at >= 0 else next(iter(neurons.by_layer()))
        subjects.append(
            Subject(
                vector="outlier",
                layer=at,
                neurons=torch.tensor([-1]),
                vectors=observed.after[None].to(vit.device),
                others=other_neurons(vit, home, neurons, generator)["u2"],
            )
        )
    return subjects, notes


# Who reads the vectors: the kernel conditions ------------------------------------------------------------------------


def measure_kernels(
    rows: Rows, vit: HookedViT, subjects: list[Subject], first: int, generator: torch.Generator
) -> Iterator[str]:
    """Relative residuals and kernel shares of every vector at every later reader; yields notes on idle readers.

    One decomposition a reader, shared by all vectors, their nulls and every epsilon.
    """
    units: dict[int, Tensor] = {}
    n_readers = (vit.cfg.n_layers - first) * (3 + vit.cfg.n_heads) + (head_weight(vit) is not None)
    for reader in track(readers_of(vit, first), "decomposing weights", n_readers):
        spectrum = decompose(reader.norm, reader.weight)
        if spectrum is None:
            yield f"{reader.name} reads nothing at all: all its weights, or those of its norm, are zero."
            continue
        if spectrum.dimensions not in units:
            units[spectrum.dimensions] = random_units(N_RANDOM, spectrum.dimensions, generator).square()
        random = spectrum.measure(units[spectrum.dimensions])
        for subject in subjects:
            if subject.layer >= reader.layer:
                continue
            values, others = (
                spectrum.measure(spectrum.shares(directions(reader.norm, vectors)))
                for vectors in (subject.vectors, subject.others)
            )
            where = {"condition": reader.condition, "layer": reader.layer, "head": reader.head}
            columns = against(*(stand(values[:, 0], null[:, 0], "low") for null in (random, others)))
            columns["random"] = torch.full_like(values[:, 0], spectrum.typical_residual)
            rows.add(subject, quantity="residual", value=values[:, 0], **where, **columns)
            standings = [stand(values[:, 1:], null[:, 1:], "high") for null in (random, others)]
            for i, epsilon in enumerate(EPSILONS):
                columns = against(*standings, which=(slice(None), i))
                rows.add(subject, quantity="kernel_share", eps=epsilon, value=values[:, 1 + i], **where, **columns)


# What the vectors are by themselves ----------------------------------------------------------------------------------


def measure_size(rows: Rows, vit: HookedViT, subject: Subject, neurons: RegisterNeurons) -> None:
    """Dominance of u2 over the other rows of W_out: over all of them, since their largest is asked for."""
    norms, every = subject.vectors.norm(dim=1).cpu(), weights_of(vit, subject.layer)["u2"].norm(dim=1).cpu()
    listed = set(neurons.by_layer()[subject.layer])
    others = every[[n for n in range(len(every)) if n not in listed]]
    if not others.any():
        return
    for quantity, unit in (("over_median", others.median()), ("over_largest", others.max())):
        standing = stand(norms / unit, others / unit, "high")
        rows.add(subject, condition="dominance", quantity=quantity, value=norms / unit, **against(None, standing))


def measure_concentration(rows: Rows, subject: Subject, generator: torch.Generator) -> None:
    """Share of the squared norm in the TOP dimensions (Jiang et al. 2025, figure 25)."""

    def top(vectors: Float[Tensor, "item d_model"]) -> Float[Tensor, " item"]:
        squares = vectors.square().cpu()
        return squares.topk(min(TOP, squares.shape[1]), dim=1).values.sum(1) / squares.sum(1)

    values = top(subject.vectors)
    random = stand(values, top(random_units(N_RANDOM, subject.vectors.shape[1], generator)), "high")
    neurons = stand(values, top(subject.others), "high")
    rows.add(subject, condition="concentration", quantity="top_share", value=values, **against(random, neurons))


# Whom queries look for: the key side ---------------------------------------------------------------------------------


def measure_keys(
    rows: Rows,
    vit: HookedViT,
    subjects: list[Subject],
    first: int,
    observed: Observed | None,
    generator: torch.Generator,
) -> int:
    """By how much a token dominated by a vector outscores an ordinary key, per head, in nats; returns rows added.

    The key of such a token is W_K LN(u). A key's constant part (biases) adds the same to every score of a query, so it
    counts for nothing. The score is linear in the query: its mean over queries needs the mean query only. Without
    images the query of an average token stands in (the biases of LayerNorm and W_Q) and an average key is the zero
    point; heads without biases have no such query.
    """
    if vit.cfg.qk_norm is not None or vit.cfg.rope is not None:
        return 0  # keys are normalised or turned afterwards: no direction of the stream has one score
    before = sum(map(len, rows.parts["value"]))
    norm = cast(Block, vit.blocks[0]).ln1
    coordinate = random_units(N_RANDOM, dimensions(norm, vit.cfg.d_model), generator)[:, :1]
    for layer in range(first, vit.cfg.n_layers):
        block = cast(Block, vit.blocks[layer])
        probe, zero = key_probe(block, layer, observed)
        if not probe.any():
            continue
        random = coordinate * probe.norm(dim=0) - zero
        for subject in subjects:
            if subject.layer >= layer or subject.vector == "u1":
                continue
            values, others = (directions(block.ln1, v).cpu() @ probe - zero for v in (subject.vectors, subject.others))
            standings = [stand(values, null, "high") for null in (random, others)]
            for head in range(vit.cfg.n_heads):
                columns = against(*standings, which=(slice(None), head)) | {"value": values[:, head]}
                rows.add(subject, condition="key", quantity="lead", layer=layer, head=head, **columns)
    return sum(map(len, rows.parts["value"])) - before


def constants(
    norm: nn.Module, weight: Float[Tensor, "head d_model d_head"], bias: Float[Tensor, "head d_head"]
) -> Float[Tensor, "head d_head"]:
    """What a linear map after a norm gives every token, float64: its own bias, and what it makes of the norm's."""
    own, of_norm = bias.detach().double(), getattr(norm, "b", None)
    if of_norm is None:
        return own
    return own + torch.einsum("m,hmd->hd", of_norm.detach().double(), weight.detach().double())


def key_probe(
    block: Block, layer: int, observed: Observed | None
) -> tuple[Float[Tensor, "d_model head"], Float[Tensor, " head"]]:
    """What a unit direction is multiplied by to give its score in nats, and the score of an ordinary key."""
    attn = block.attn
    W_K = attn.W_K.detach().double()
    constant_key = constants(block.ln1, attn.W_K, attn.b_K)
    if observed is None:
        query, key = constants(block.ln1, attn.W_Q, attn.b_Q), constant_key
    else:
        query, key = observed.query[layer].to(W_K), observed.key[layer].to(W_K)
    query = query * attn.d_head**-0.5
    # A norm gives a token the length sqrt(d_model) whatever its own.
    probe = fold(block.ln1, torch.einsum("hmd,hd->mh", W_K, query)) * math.sqrt(W_K.shape[1])
    return probe.cpu(), (query * (key - constant_key)).sum(1).cpu()


# What the outlier tokens do, with images -----------------------------------------------------------------------------


def measure_cosines(
    rows: Rows, vit: HookedViT, subject: Subject, observed: Observed, generator: torch.Generator
) -> None:
    """Alignment of outlier tokens with u1 before they fire, or agreement of u2 with their direction afterwards."""
    norm = cast(Block, vit.blocks[subject.layer]).ln2
    condition = "alignment" if subject.vector == "u1" else "agreement"
    target = observed.before[subject.layer] if subject.vector == "u1" else observed.after
    values, others = (directions(norm, vectors).cpu() @ target for vectors in (subject.vectors, subject.others))
    coordinate = random_units(N_RANDOM, dimensions(norm, vit.cfg.d_model), generator)[:, 0]
    standings = (stand(values, null, "high") for null in (coordinate * target.norm(), others))
    rows.add(subject, condition=condition, quantity="cosine", value=values, **against(*standings))

"""Rules for weights: how one of ours is made of a source library's, and how those are got back from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from einops import rearrange

from registerlens.config import ViTConfig
from registerlens.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

Width = Literal["d_model", "d_mlp", "heads"]
"""How wide a missing bias would be."""


@dataclass(frozen=True)
class Piece:
    """A source weight, or one of the equal parts that are stacked along its first axis."""

    key: str
    tensor: Tensor
    index: int = 0
    """Which part."""
    may_lack: bool = False
    """Whether it is left out where it is zero throughout and the weights that were read had none."""


@dataclass(frozen=True)
class Weight:
    """One of our weights: the source's keys it is made of ("{i}" is the layer), and how, both ways."""

    keys: tuple[str, ...]
    build: Callable[[Sequence[Tensor | None], ViTConfig], Tensor]
    """From the source's tensors, None where an optional one is missing."""
    undo: Callable[[Tensor, ViTConfig], Sequence[Piece]]
    """From our tensor to the source's."""
    optional: frozenset[str] = frozenset()
    """Keys that a model may lack."""
    others: tuple[Weight, ...] = ()
    """How other models of the family store it."""

    def among(self, stored: Callable[[str], bool]) -> Weight:
        """This rule, or the first of the others whose keys the model has."""
        return next((rule for rule in (self, *self.others) if rule._fits(stored)), self)

    def _fits(self, stored: Callable[[str], bool]) -> bool:
        present = {key for key in self.keys if stored(key)}
        return present | self.optional >= set(self.keys) and (bool(present) or not self.keys)


def alternatives(first: Weight, *others: Weight) -> Weight:
    """The first rule whose keys the model has: for families that store a weight in several ways."""
    return replace(first, others=others)


def absent(width: Width) -> Weight:
    """A bias the source does not have: zero, and written nowhere."""
    return _implied(lambda cfg: _zeros(_width(width, cfg)))


def ones() -> Weight:
    """A LayerScale the source does not have, while it has the other sublayer's: one, and written nowhere."""
    return _implied(lambda cfg: _zeros(cfg.d_model) + 1)


def _implied(value: Callable[[ViTConfig], Tensor]) -> Weight:
    def undo(tensor: Tensor, cfg: ViTConfig) -> list[Piece]:
        if not tensor.equal(value(cfg).to(tensor)):
            raise WeightsError(
                "A weight that the source model does not have has been changed; there is no key for it."
                " Keep the model with vit.save_pretrained instead."
            )
        return []

    return Weight((), lambda tensors, cfg: value(cfg), undo)


def join(pieces: Sequence[Piece]) -> Tensor:
    """One source weight from its parts."""
    ordered = [piece.tensor for piece in sorted(pieces, key=lambda piece: piece.index)]
    return ordered[0] if len(ordered) == 1 else _cat(ordered)


def _cat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    import torch  # slow to import

    return torch.cat(list(tensors), axis)


def _zeros(*shape: int) -> Tensor:
    import torch  # slow to import

    return torch.zeros(shape)


def _width(width: Width, cfg: ViTConfig) -> int:
    return {"d_model": cfg.d_model, "d_mlp": cfg.d_mlp, "heads": cfg.n_heads * cfg.d_head}[width]


def _given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def made_of(
    key: str,
    build: Callable[[Tensor, ViTConfig], Tensor],
    undo: Callable[[Tensor, ViTConfig], Tensor],
    index: int = 0,
) -> Weight:
    """A weight made of one of the source's.

    Args:
        key: the source's.
        build: from the source's tensor to ours.
        undo: from ours to the source's, or to one of the equal parts stacked along its first axis.
        index: which part.
    """
    return Weight(
        (key,),
        lambda tensors, cfg: build(_given(tensors)[0], cfg),
        lambda tensor, cfg: [Piece(key, undo(tensor, cfg), index)],
    )


def take(key: str) -> Weight:
    """The same tensor."""
    return made_of(key, lambda tensor, cfg: tensor, lambda tensor, cfg: tensor)


def linear(ours: str, theirs: str) -> dict[str, Weight]:
    """Weight and bias of a linear map, as they are."""
    return {f"{ours}.{kind}": take(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def norm(ours: str, theirs: str) -> dict[str, Weight]:
    """Weight and bias of a norm, as they are."""
    return {f"{ours}.w": take(f"{theirs}.weight"), f"{ours}.b": take(f"{theirs}.bias")}


def block(
    at: str, norms: tuple[str, str], out: str, mlp: tuple[str, str], taken: Mapping[str, str]
) -> dict[str, Weight]:
    """What nearly every library's block stores as it is, by the source's names, relative to where the block stands.

    Args:
        at: the path of block {i}.
        norms: before attention, and before the MLP.
        out: attention's output map.
        mlp: its first and last linear map.
        taken: our weight -> the source's, for all else that is taken as it is (LayerScale, joint queries and keys).
    """
    ours = "blocks.{i}"
    return (
        norm(f"{ours}.ln1", f"{at}.{norms[0]}")
        | norm(f"{ours}.ln2", f"{at}.{norms[1]}")
        | linear(f"{ours}.attn.out", f"{at}.{out}")
        | linear(f"{ours}.mlp.up", f"{at}.{mlp[0]}")
        | linear(f"{ours}.mlp.out", f"{at}.{mlp[1]}")
        | {f"{ours}.{name}": take(f"{at}.{theirs}") for name, theirs in taken.items()}
    )


def transpose(key: str) -> Weight:
    """A matrix that the source stores the other way round."""
    return made_of(key, lambda tensor, cfg: tensor.T.contiguous(), lambda tensor, cfg: tensor.T.contiguous())


def part(key: str, index: int, of: int = 2, count: int = 1) -> Weight:
    """`count` of the `of` equal parts stacked along the source tensor's first axis, as the two halves of a gated MLP's
    map, or keys and values of a joint projection."""

    def build(tensor: Tensor, cfg: ViTConfig) -> Tensor:
        return _cat(tensor.chunk(of)[index : index + count])

    return made_of(key, build, lambda tensor, cfg: tensor, index)


def either(when: Callable[[ViTConfig], bool], first: Weight, second: Weight) -> Weight:
    """The first rule where the architecture says so, else the second: for weights that are stored in two ways."""

    def build(tensors: Sequence[Tensor | None], cfg: ViTConfig) -> Tensor:
        n = len(first.keys)
        rule, own = (first, tensors[:n]) if when(cfg) else (second, tensors[n:])
        for key, tensor in zip(rule.keys, own, strict=True):
            if tensor is None and key not in rule.optional:
                raise WeightsError(f"missing: {key!r}.")
        return rule.build(own, cfg)

    def undo(tensor: Tensor, cfg: ViTConfig) -> Sequence[Piece]:
        return (first if when(cfg) else second).undo(tensor, cfg)

    return Weight(first.keys + second.keys, build, undo, frozenset(first.keys + second.keys))


def rows(key: str) -> Weight:
    """Vectors [row, d] that the source keeps as [1, row, d]."""
    return made_of(key, lambda tensor, cfg: tensor.flatten(0, -2), lambda tensor, cfg: tensor[None])


def patch_rows(key: str) -> Weight:
    """A patch embedding [d_model, channel, row, column] that the source has as a linear map of patches laid out as
    [row, column, channel]."""

    def build(tensor: Tensor, cfg: ViTConfig) -> Tensor:
        height, width = cfg.patch_size
        return rearrange(tensor, "d (h w c) -> d c h w", h=height, w=width).contiguous()

    return made_of(key, build, lambda tensor, cfg: rearrange(tensor, "d c h w -> d (h w c)").contiguous())


def concat(*keys: str) -> Weight:
    """Tensors stacked along their first axis, as separate query, key and value weights."""
    return Weight(
        keys,
        lambda tensors, cfg: _cat(_given(tensors)),
        lambda tensor, cfg: [Piece(*pair) for pair in zip(keys, tensor.chunk(len(keys)), strict=True)],
    )


def qkv_biases(q: str | None, k: str | None, v: str | None) -> Weight:
    """Biases of queries, keys and values, each zero where the source has none (None, or a key the model lacks).

    Written back, a part that is zero throughout is left out, unless the weights that were read had it.
    """
    named = tuple(key for key in (q, k, v) if key is not None)

    def build(tensors: Sequence[Tensor | None], cfg: ViTConfig) -> Tensor:
        given = dict(zip(named, tensors, strict=True))
        like = _given(tensors)
        width = cfg.n_heads * cfg.d_head
        none = like[0].new_zeros(width) if like else _zeros(width)
        parts = [given.get(key) if key else None for key in (q, k, v)]
        return _cat([none if tensor is None else tensor for tensor in parts])

    def undo(tensor: Tensor, cfg: ViTConfig) -> list[Piece]:
        pairs = zip((q, k, v), tensor.chunk(3), strict=True)
        return [Piece(key, chunk, may_lack=True) for key, chunk in pairs if key is not None]

    return Weight(named, build, undo, frozenset(named))


def bias(key: str, width: Width) -> Weight:
    """A bias that some models of the family lack; zero then, and written back as `qkv_biases` is."""

    def build(tensors: Sequence[Tensor | None], cfg: ViTConfig) -> Tensor:
        return _zeros(_width(width, cfg)) if tensors[0] is None else tensors[0]

    def undo(tensor: Tensor, cfg: ViTConfig) -> list[Piece]:
        return [Piece(key, tensor, may_lack=True)]

    return Weight((key,), build, undo, frozenset((key,)))


def tokens(
    cls: str | None = None,
    distillation: str | None = None,
    registers: str | None = None,
    flat: bool = False,
    empty: bool = False,
) -> Weight:
    """Token embeddings in sequence order; a key the model lacks contributes no row.

    In the source they are [1, token, d_model], or [d_model] if `flat` (one token). With `empty`, a model without
    registers has a tensor of none.
    """
    named = tuple(key for key in (cls, distillation, registers) if key is not None)

    def build(tensors: Sequence[Tensor | None], cfg: ViTConfig) -> Tensor:
        rows = [tensor.reshape(-1, cfg.d_model) for tensor in _given(tensors)]
        return _cat(rows) if rows else _zeros(0, cfg.d_model)

    def undo(tensor: Tensor, cfg: ViTConfig) -> list[Piece]:
        counts = [int(cfg.class_token), int(cfg.distillation_token), cfg.n_trained_registers]
        named_rows = zip((cls, distillation, registers), tensor.split(counts), strict=True)
        written = [(key, part) for key, part in named_rows if key is not None and (len(part) or empty)]
        return [Piece(key, part.reshape(cfg.d_model) if flat else part[None]) for key, part in written]

    return Weight(named, build, undo, frozenset(named))


def positions(key: str, flat: bool = False) -> Weight:
    """Position embeddings, with zero rows for the prefix tokens and registers to which the source adds none.

    In the source they are [1, token, d_model], or [token, d_model] if `flat`.
    """

    def build(tensor: Tensor, cfg: ViTConfig) -> Tensor:
        rows = tensor.reshape(-1, cfg.d_model)
        placed = cfg.layout().patches.start - cfg.n_unplaced
        return _cat([rows[:placed], rows.new_zeros(cfg.n_unplaced, cfg.d_model), rows[placed:]])

    def undo(tensor: Tensor, cfg: ViTConfig) -> Tensor:
        start = cfg.layout().patches.start
        rows = _cat([tensor[: start - cfg.n_unplaced], tensor[start:]])
        return rows if flat else rows[None]

    return made_of(key, build, undo)


def averaged(*keys: str) -> Weight:
    """Heads whose outputs the source averages, as one head that reads their inputs side by side."""

    def build(tensors: Sequence[Tensor | None], cfg: ViTConfig) -> Tensor:
        given = _given(tensors)
        joined = _cat(given, -1) if given[0].ndim == 2 else _cat([row[None] for row in given]).sum(0)
        return joined / len(given)

    def undo(tensor: Tensor, cfg: ViTConfig) -> list[Piece]:
        raise WeightsError(
            f"{list(keys)} were averaged when they were read, and cannot be told apart again."
            " Keep the model with vit.save_pretrained instead."
        )

    return Weight(keys, build, undo)

"""The one engine that turns a source library's weights into a HookedViT and back, driven by families that are data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from registerlens.config import Activation, Preprocess, ViTConfig
from registerlens.errors import ConfigError, UnsupportedArchitectureError, WeightsError, close_matches
from registerlens.loading.weights import Piece, Weight, join
from registerlens.model.assumptions import require_softmax
from registerlens.model.vit import HookedViT

_ABSENT = object()


@dataclass(frozen=True)
class Source:
    """What a source library says of a model: a config object or the module itself, and named weights."""

    described: Any
    state: Mapping[str, Tensor]

    def get(self, path: str, default: Any = _ABSENT) -> Any:
        """The value at a dotted path of attributes, keys and indices, as "blocks.0.attn.num_heads".

        Raises:
            ConfigError: nothing is there and no default is given.
        """
        value: Any = self.described
        for step in path.split("."):
            if isinstance(value, Mapping):
                value = value.get(step, _ABSENT)
            elif step.isdigit():
                value = value[int(step)]
            else:
                value = getattr(value, step, _ABSENT)
            if value is _ABSENT:
                if default is _ABSENT:
                    raise ConfigError(
                        f"The source model says nothing of {path!r}; it is incomplete or of another kind."
                        " `registerlens models` lists what can be loaded."
                    )
                return default
        return value

    def weight(self, key: str) -> Tensor:
        """A weight that the architecture is read from.

        Raises:
            WeightsError: it is missing.
        """
        if key not in self.state:
            raise WeightsError(
                f"The weights lack {key!r}, which tells the architecture.{close_matches(key, self.state)}"
                " Give a whole checkpoint."
            )
        return self.state[key]


# Reading the architecture --------------------------------------------------------------------------------------------

Reader = Callable[[Source], Any]


def read(path: str, default: Any = _ABSENT) -> Reader:
    """The value at a path."""
    return lambda source: source.get(path, default)


def fixed(value: Any) -> Reader:
    """The same value for every model of the family."""
    return lambda source: value


def pair(path: str) -> Reader:
    """A height and width, given as one number or as two."""

    def reader(source: Source) -> tuple[int, int]:
        value = source.get(path)
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    return reader


def has_weight(key: str) -> Reader:
    """Whether the model has this weight."""
    return lambda source: key in source.state


def rows_of(key: str) -> Reader:
    """How many outputs a linear map has, or None if the model does not have it."""
    return lambda source: source.state[key].shape[0] if key in source.state else None


def columns_of(key: str) -> Reader:
    """How many inputs a linear map has."""
    return lambda source: source.state[key].shape[1]


def activation(path: str, names: Mapping[str, Activation], name_of: Callable[[Any], str] = str) -> Reader:
    """The nonlinearity, by the source library's name for it."""

    def reader(source: Source) -> Activation:
        name = name_of(source.get(path))
        if name not in names:
            raise UnsupportedArchitectureError(f"The nonlinearity {name!r} is not supported; known: {sorted(names)}.")
        return names[name]

    return reader


# A family ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A part we cannot represent: how to see it, and what to call it."""

    part: str
    present: Reader


def first_argument(cfg: ViTConfig, images: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """The images, for most modules that read them."""
    return images


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Where the source's modules stand, as dotted paths, for edits inside it; prefixes are dropped as for weights."""

    images: str
    """The module that is called with the images."""
    ln_pre: str | None = None
    """The LayerNorm before block 0, in families that can have one."""
    blocks: str
    """The list of blocks; the paths below start at one of them."""
    norm: str
    """The norm that reads the block's input first of all."""
    attention: str
    """The attention module; how its queries, keys and values are reached depends on the library."""
    mlp_out: str
    """The MLP's second linear map, which reads the neurons (`mlp.hook_post`)."""
    gated_mlp_out: str = ""
    """The same where the MLP is gated, if it has another name then."""
    read_images: Callable[..., Tensor] = first_argument
    """From the architecture and that module's arguments to the images [batch, channel, height, width]."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of a source library, as data."""

    library: str
    """transformers, timm, open_clip, or DINO's and DINOv2's own code (dino, dinov2)."""
    source_class: str
    """The class's name in that library."""
    example: str
    """A name `from_pretrained` takes."""
    config: dict[str, Reader]
    """ViTConfig field -> where the source says it."""
    weights: dict[str, Weight]
    """Our weight ("{i}" is the layer) -> how it is made. Entries the architecture does not need are not used."""
    gated_weights: dict[str, Weight] = field(default_factory=dict)
    """Entries that replace those where the MLP is gated, in families that have both."""
    sites: Sites
    """Where its modules stand."""
    preprocess: Preprocess
    """What the family's images usually go through; a checkpoint's own statement comes first."""
    at_native_size: bool = True
    """Whether those images have the size of the position embeddings. (DINOv2's: trained at 518 pixels, used at 224.)"""
    prefixes: tuple[str, ...] = ()
    """Beginnings of keys that are dropped where they occur, one after the other."""
    written_prefix: str = ""
    """What `to_state_dict` writes before the keys, but for those in `unprefixed`."""
    unprefixed: tuple[str, ...] = ()
    """Globs of keys that stand outside that prefix, as classifiers do."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions that bring older key names to the present ones."""
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """The same for weights that older checkpoints stack along their first axis: what the equal parts are called."""
    ignore: tuple[str, ...] = ()
    """Globs of source keys that do not belong to the vision transformer's forward pass."""
    refuse: tuple[Refusal, ...] = ()
    """Parts that make a model of this class unsupported."""
    described_at: str = ""
    """Path of the part of the config that describes the vision tower."""
    note: str = field(default="")
    """A remark for the table of families."""

    def of(self, cfg: ViTConfig) -> Family:
        """The family as it is for models of this architecture."""
        if not cfg.gated_mlp:
            return self
        sites = replace(self.sites, mlp_out=self.sites.gated_mlp_out or self.sites.mlp_out)
        return replace(self, weights=self.weights | self.gated_weights, sites=sites)


def build(family: Family, source: Source, name: str, preprocess: Preprocess | None = None) -> HookedViT:
    """A HookedViT with the source's weights; nothing is returned unless every weight found its place.

    Args:
        family: how this class maps onto ours.
        source: its description and weights.
        name: where the weights came from, for messages and results.
        preprocess: what images go through; default: the family's usual steps.

    Raises:
        UnsupportedArchitectureError: the model has a part we cannot represent.
        WeightsError: a key is missing, unexpected or of the wrong shape; all of them are named.
    """
    cfg, state = describe(family, source, name)
    with torch.device("meta"):
        vit = HookedViT(cfg, preprocess or _usual_preprocess(family, cfg), source=name)
    # A module says itself which weights it has; what a rule could do without must not get lost on the way.
    module = source.described if isinstance(source.described, nn.Module) else None
    expected = canonical(family, {} if module is None else module.state_dict())
    mapped, vit.source_keys = _map_weights(family.of(cfg), state, vit, name, expected)
    vit.load_state_dict(mapped, strict=True, assign=True)
    # One device and one number type: some libraries keep norms in float32 beside half weights.
    return vit.to(vit.embed.patch.weight).eval()


def describe(family: Family, source: Source, name: str) -> tuple[ViTConfig, Mapping[str, Tensor]]:
    """The architecture, and the weights under the family's present names.

    Raises:
        UnsupportedArchitectureError: the model has a part we cannot represent.
    """
    described = source.get(family.described_at) if family.described_at else source.described
    source = Source(described, canonical(family, source.state))
    for refusal in family.refuse:
        if refusal.present(source):
            raise UnsupportedArchitectureError(
                f"{name}: {family.source_class} with {refusal.part} is not supported."
                " `registerlens models --markdown` lists what is."
            )
    cfg = ViTConfig(**{field_name: reader(source) for field_name, reader in family.config.items()})
    return replace(cfg, n_unplaced=_unplaced(family, cfg, source.state)), source.state


def _unplaced(family: Family, cfg: ViTConfig, state: Mapping[str, Tensor]) -> int:
    """How many prefix and register tokens the source has no position embedding for."""
    rule = family.weights.get("embed.W_pos")
    rows = [state[key].numel() // cfg.d_model for key in (rule.keys if rule else ()) if key in state]
    missing = cfg.layout().n_tokens - rows[0] if cfg.positions == "learned" and rows else 0
    return missing if 0 <= missing <= cfg.layout().patches.start else 0  # else the shape check will complain


def _usual_preprocess(family: Family, cfg: ViTConfig) -> Preprocess:
    return family.preprocess.at(cfg.image_size) if family.at_native_size else family.preprocess


def canonical(family: Family, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the family's present names, without its prefixes."""
    named: dict[str, Tensor] = {}
    for original, tensor in state.items():
        key = original
        for prefix in family.prefixes:
            key = key.removeprefix(prefix)
        for pattern, replacement in family.renames:
            key = re.sub(pattern, replacement, key)
        pattern, parts = next((split for split in family.splits if re.search(split[0], key)), ("", ()))
        if parts and len(tensor) % len(parts) == 0:
            chunks = (chunk.contiguous() for chunk in tensor.chunk(len(parts)))
            named |= {re.sub(pattern, part, key): chunk for part, chunk in zip(parts, chunks, strict=True)}
        else:
            named[key] = tensor
    return named


def _map_weights(
    family: Family, state: Mapping[str, Tensor], vit: HookedViT, name: str, expected: Iterable[str]
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Our weights, and the keys of the rules that made them."""
    mapped: dict[str, Tensor] = {}
    used: set[str] = set()
    stored: set[str] = set()
    problems: list[str] = []
    for target, wanted in vit.state_dict().items():
        layer = re.match(r"blocks\.(\d+)\.", target)
        i = layer.group(1) if layer else ""
        weight = family.weights.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", target))
        if weight is None:
            problems.append(f"the family has no rule for {target!r}")
            continue
        weight = weight.among(lambda key, i=i: key.replace("{i}", i) in state)
        keys = [key.replace("{i}", i) for key in weight.keys]
        needed = [key for key, rule in zip(keys, weight.keys, strict=True) if rule not in weight.optional]
        missing = [key for key in needed if key not in state]
        problems += [f"missing: {key!r}.{close_matches(key, state, n=1)}" for key in missing]
        used.update(key for key in keys if key in state)
        stored.update(rule for key, rule in zip(keys, weight.keys, strict=True) if key in state)
        if missing:
            continue
        tensors = [state.get(key) for key in keys]
        try:
            mapped[target] = weight.build(tensors, vit.cfg)
        except WeightsError as error:
            problems.append(str(error))
            continue
        except RuntimeError as error:
            problems.append(f"wrong shape: {_shapes(keys, tensors)}: {error}")
            continue
        if mapped[target].shape != wanted.shape:
            problems.append(
                f"wrong shape: {_shapes(keys, tensors)} gives {list(mapped[target].shape)}, "
                f"the architecture expects {list(wanted.shape)}{_grids(target, mapped[target], vit.cfg)}"
            )
    unexpected = [key for key in state if key not in used and not any(fnmatchcase(key, glob) for glob in family.ignore)]
    problems += [f"unexpected: {key!r}" for key in unexpected]
    # Whether there is a head, the weights say: backbones are saved without the one their architecture has by default.
    head = {key for target, rule in family.weights.items() if target.startswith("head.linear.") for key in rule.keys}
    lost = [key for key in expected if key not in state and not any(repr(key) in problem for problem in problems)]
    problems += [
        f"missing: {key!r}"
        for key in lost
        if not (key in head and vit.head.linear is None) and not any(fnmatchcase(key, glob) for glob in family.ignore)
    ]
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise WeightsError(
            f"{name}: the weights do not fit {family.library}'s {family.source_class} as configured:\n  {shown}\n"
            f"Check that the weights and the configuration belong to the same model."
        )
    return mapped, frozenset(stored)


def _grids(target: str, given: Tensor, cfg: ViTConfig) -> str:
    """What to do about positions of another image size, which is how most checkpoints differ."""
    side = isqrt(max(0, len(given) - cfg.layout().patches.start))
    if target != "embed.W_pos" or side**2 + cfg.layout().patches.start != len(given):
        return ""
    return (
        f" (positions of {side} x {side} patches, where {cfg.grid[0]} x {cfg.grid[1]} are configured: give the image "
        f"size it was trained at)"
    )


def _shapes(keys: Sequence[str], tensors: Sequence[Tensor | None]) -> str:
    pairs = zip(keys, tensors, strict=True)
    return ", ".join(f"{key!r} {list(tensor.shape)}" for key, tensor in pairs if tensor is not None)


def export(family: Family, vit: HookedViT) -> dict[str, Tensor]:
    """A HookedViT's weights under a family's names: the inverse of `build`, bit for bit.

    What a family ignores when it reads (mask tokens, a text tower) is not in it. Where the family stores a weight in
    several ways, it is written as it was read, or in the first way if it came from elsewhere.

    Raises:
        WeightsError: the family has no place for one of the weights, or reads several of its own as one.
        UnsupportedArchitectureError: attention is no softmax, as that of all families is.
    """
    require_softmax(vit.cfg, f"{family.library}'s {family.source_class}")
    family = family.of(vit.cfg)
    found: dict[str, list[Piece]] = {}
    known = {key for weight in family.weights.values() for rule in (weight, *weight.others) for key in rule.keys}
    own = vit.source_keys <= known
    for target, tensor in vit.state_dict().items():
        layer = re.match(r"blocks\.(\d+)\.", target)
        weight = family.weights.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", target))
        if weight is None:
            raise WeightsError(
                f"{family.library}'s {family.source_class} has no place for {target!r} of {vit.source}."
                " Take the family that the model came from."
            )
        weight = weight.among(vit.source_keys.__contains__) if own and vit.source_keys else weight
        for piece in weight.undo(weight.keys, tensor, vit.cfg):
            if piece.may_lack and not (own and piece.key in vit.source_keys) and not piece.tensor.any():
                continue
            key = piece.key.replace("{i}", layer.group(1) if layer else "")
            inside = not any(fnmatchcase(key, glob) for glob in family.unprefixed)
            found.setdefault(family.written_prefix * inside + key, []).append(piece)
    return {key: join(pieces) for key, pieces in found.items()}

"""The one engine that turns a source library's weights into a HookedViT and back, driven by families that are data."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import isqrt

import torch
from torch import Tensor, nn

from registerlens.config import Preprocess, ViTConfig
from registerlens.errors import UnsupportedArchitectureError, WeightsError, close_matches
from registerlens.loading.family import Family, SourceModel
from registerlens.loading.weights import Piece, Weight, join
from registerlens.model.block import require_softmax
from registerlens.model.vit import HookedViT


def build(family: Family, source: SourceModel, name: str, preprocess: Preprocess | None = None) -> HookedViT:
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
        usual = family.preprocess.at(cfg.image_size) if family.at_native_size else family.preprocess
        vit = HookedViT(cfg, preprocess or usual, source=name)
    # A module says itself which weights it has; what a rule could do without must not get lost on the way.
    module = source.described if isinstance(source.described, nn.Module) else None
    expected = canonical(family, {} if module is None else module.state_dict())
    mapped, vit.source_keys = _map_weights(family.of(cfg), state, vit, name, expected)
    vit.load_state_dict(mapped, strict=True, assign=True)
    # One device and one number type: some libraries keep norms in float32 beside half weights.
    return vit.to(vit.embed.patch.weight).eval()


def describe(family: Family, source: SourceModel, name: str) -> tuple[ViTConfig, Mapping[str, Tensor]]:
    """The architecture, and the weights under the family's present names.

    Raises:
        UnsupportedArchitectureError: the model has a part we cannot represent.
    """
    described = source.get(family.described_at) if family.described_at else source.described
    source = SourceModel(described, canonical(family, source.state))
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


def _rule(family: Family, target: str) -> tuple[str, Weight | None]:
    """The layer of one of our weights ("" outside the blocks), and how the family makes it."""
    layer = re.match(r"blocks\.(\d+)\.", target)
    return layer.group(1) if layer else "", family.weights.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", target))


def _map_weights(
    family: Family, state: Mapping[str, Tensor], vit: HookedViT, name: str, expected: Iterable[str]
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Our weights, and the keys of the rules that made them."""
    mapped: dict[str, Tensor] = {}
    used: set[str] = set()
    stored: set[str] = set()
    problems: list[str] = []  # all of them at once: a checkpoint that is wrong in one key is often wrong in many
    # First pass, from our weights to the source's: whatever the model needs must be there, in the right shape.
    for target, wanted in vit.state_dict().items():
        i, weight = _rule(family, target)
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
    # Second pass, from the source's weights to ours: one that no rule read would be left out without a word.
    unexpected = [key for key in state if key not in used and not any(fnmatchcase(key, glob) for glob in family.ignore)]
    problems += [f"unexpected: {key!r}" for key in unexpected]
    # Third pass, over what the module itself lists. The weights decide whether there is a head: backbones are saved
    # without the one that their architecture has by default.
    head = {key for target, rule in family.weights.items() if target.startswith("head.linear.") for key in rule.keys}
    lost = [key for key in expected if key not in state and not any(repr(key) in problem for problem in problems)]
    problems += [
        f"missing: {key!r}"
        for key in lost
        if not (key in head and vit.head.linear is None) and not any(fnmatchcase(key, glob) for glob in family.ignore)
    ]
    if problems:
        listed = "\n  ".join(problems[:12]) + (f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise WeightsError(
            f"{name}: the weights do not fit {family.library}'s {family.source_class} as configured:\n  {listed}\n"
            f"Check that the weights and the configuration belong to the same model."
        )
    return mapped, frozenset(stored)


def _grids(target: str, tensor: Tensor, cfg: ViTConfig) -> str:
    """What to do about positions of another image size, which is how most checkpoints differ."""
    side = isqrt(max(0, len(tensor) - cfg.layout().patches.start))
    if target != "embed.W_pos" or side**2 + cfg.layout().patches.start != len(tensor):
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
    pieces_of: dict[str, list[Piece]] = {}
    known = {key for weight in family.weights.values() for rule in (weight, *weight.others) for key in rule.keys}
    own = vit.source_keys <= known
    for target, tensor in vit.state_dict().items():
        i, weight = _rule(family, target)
        if weight is None:
            raise WeightsError(
                f"{family.library}'s {family.source_class} has no place for {target!r} of {vit.source}."
                " Take the family that the model came from."
            )
        weight = weight.among(vit.source_keys.__contains__) if own and vit.source_keys else weight
        for piece in weight.undo(tensor, vit.cfg):
            if piece.may_lack and not (own and piece.key in vit.source_keys) and not piece.tensor.any():
                continue
            key = piece.key.replace("{i}", i)
            inside = not any(fnmatchcase(key, glob) for glob in family.unprefixed)
            pieces_of.setdefault(family.written_prefix * inside + key, []).append(piece)
    return {key: join(pieces) for key, pieces in pieces_of.items()}

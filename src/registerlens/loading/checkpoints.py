"""A family's weights in whatever a training run saved: nested containers, prefixes, wrappers, and what is none of them.

A checkpoint is read as one flat mapping, containers and all ("state_dict.model.backbone.blocks.0.norm1.weight"), and a
family's weights stand under the one prefix where its own keys are found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor

from registerlens.errors import WeightsError
from registerlens.loading.family import Family

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Steps of a key that parallel training (`module`), torch.compile, FSDP and checkpointing put in."""

_ADAPTER = re.compile(
    r"(^|\.)((lora|ia3|hada|lokr|oft|boft|vera)_\w+|modules_to_save)(\.|$)|\.base_layer\.(weight|bias)$"
)
_SECOND_CHOICE = re.compile(r"(?<![a-z])(ema|student|momentum)", re.IGNORECASE)
"""Copies that are left aside where there is another one: averages kept beside the weights, and a student whose teacher
is there (DINO's own evaluations take the teacher)."""


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names they have without wrapped modules.

    Raises:
        WeightsError: low-rank adapters are not merged into them, or two keys become one.
    """
    _refuse_adapters(tensors)
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = ".".join(step for step in key.split(".") if step not in WRAPPERS)
        if name in plain:
            raise WeightsError(f"The checkpoint has {name!r} twice, once as {key!r}. Keep one of the two models in it.")
        plain[name] = tensor
    return plain


def _refuse_adapters(keys: Mapping[str, Tensor]) -> None:
    """Raise unless the weights are free of low-rank adapters.

    Raises:
        WeightsError: they have some (PEFT, LoRA).
    """
    if found := [key for key in keys if _ADAPTER.search(key)]:
        raise WeightsError(
            f"{len(found)} weights belong to adapters that are not merged (PEFT, LoRA; {found[0]!r} for one). Merge "
            f"them first: model = model.merge_and_unload(), then load or save that model."
        )


def select(
    family: Family, tensors: Mapping[str, Tensor], name: str, prefix: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """The weights of one model of a family in a checkpoint, and the prefix they stand under.

    Args:
        family: whose keys are looked for.
        tensors: the checkpoint, flat.
        name: the checkpoint's, for messages.
        prefix: the beginning of the keys of one of several models in it.

    Raises:
        WeightsError: there is no such model, or several.
    """
    tensors = without_wrappers(tensors)
    inner = _only(_candidates(family, tensors), family, tensors, name, prefix)
    state = {key[len(inner) :]: tensor for key, tensor in tensors.items() if key.startswith(inner)}
    outer = inner
    for own in reversed(family.prefixes):  # a classifier stands beside the body
        if not f".{outer}".endswith(f".{own}"):
            continue
        outer = outer.removesuffix(own)
        beside = {key for key in _keys(family) if "{i}" not in key and key not in state}
        state |= {key: tensors[outer + key] for key in beside if outer + key in tensors}
    return state, outer


def _keys(family: Family) -> set[str]:
    return {key for rule in family.weights.values() for key in rule.keys}


def _candidates(family: Family, tensors: Mapping[str, Tensor]) -> list[str]:
    """The prefixes under which about as many of the family's keys are found as anywhere."""
    own = {key.replace("{i}", "0") for key in _keys(family)}
    votes = Counter(prefix for key in tensors for prefix, rest in _splits(key) if rest in own)
    first = family.weights["embed.patch.weight"].keys[0]
    images = {prefix: n for prefix, n in votes.items() if prefix + first in tensors} or votes
    return sorted(prefix for prefix, n in images.items() if 2 * n >= max(images.values()))


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """A key cut before each of its steps."""
    yield "", key
    for dot in re.finditer(r"\.", key):
        yield key[: dot.end()], key[dot.end() :]


def _only(candidates: list[str], family: Family, tensors: Mapping[str, Tensor], name: str, prefix: str | None) -> str:
    what = f"{family.library}'s {family.source_class}"
    if not candidates:
        raise WeightsError(
            f"{name} has no weights of {what}, under any prefix. Its keys begin {sorted(tensors)[:4]}; those of the "
            f"family are like {sorted(_keys(family))[:4]}. Give the family the checkpoint was trained with."
        )
    chosen = candidates
    if prefix is not None:
        chosen = [candidate for candidate in candidates if candidate.startswith(prefix)]
    elif len(chosen) > 1:
        chosen = [candidate for candidate in chosen if not _SECOND_CHOICE.search(candidate)]
    if len(chosen) != 1:
        raise WeightsError(
            f"{name} holds {'several models' if prefix is None else f'not one model under {prefix!r}'} of {what}. "
            f"Say which with prefix=, one of {candidates}."
        )
    return chosen[0]

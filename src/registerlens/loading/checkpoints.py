"""A family's weights in whatever a training run saved: nested containers, prefixes, wrappers, and what is none of them.

A checkpoint is read as one flat mapping, containers and all ("state_dict.model.backbone.blocks.0.norm1.weight"), and a
family's weights stand under the one prefix where its own keys are found.
"""

import argparse
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from registerlens.errors import WeightsError
from registerlens.files import read_json
from registerlens.loading.family import Family
from registerlens.loading.sources import Fetch

_HARMLESS = (argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath)
"""What training scripts keep beside the weights, and what holds values only."""

Wanted = Callable[[str], bool]


def read_weights(path: Path, wanted: Wanted | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file read with `weights_only=True`.

    Args:
        path: the file.
        wanted: which keys to read; default: all. Of a .safetensors file nothing else is read.

    Raises:
        WeightsError: the file is missing, truncated, or holds anything but tensors.
    """
    state = _read(path, wanted)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"'{path}' is not a state dict of tensors. Save module.state_dict() as .safetensors.")
    return {key: tensor for key, tensor in state.items() if wanted is None or wanted(key)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in a file that training saved, under the path that leads to it, as "state_dict.blocks.0.weight".

    Optimizer states, which are tensors too, stand under theirs; everything else is passed over.

    Raises:
        WeightsError: the file is missing, truncated, has no tensors, or could run code.
    """
    tensors = dict(_tensors(_read(path)))
    if not tensors:
        raise WeightsError(f"'{path}' is not a state dict of tensors. Save module.state_dict() as .safetensors.")
    return tensors


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor) and path:
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{path}.{key}" if path else str(key))


def _read(path: Path, wanted: Wanted | None = None) -> Any:
    """What is in a file, without running any code; of a .safetensors file, the wanted keys alone."""
    if not path.is_file():
        raise WeightsError(
            f"There is no weight file at '{path}'{': it is a folder' if path.is_dir() else ''}. "
            f"Give the path of a .safetensors or torch file."
        )
    try:
        if path.suffix == ".safetensors":
            if wanted is None:
                return load_file(path)
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118  (no mapping)
        with torch.serialization.safe_globals(list(_HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise WeightsError(f"'{path}' could not be read; it may be truncated: {error}. Fetch it anew.") from error
    except Exception as error:  # torch raises pickle.UnpicklingError for anything that could run code
        raise WeightsError(
            f"'{path}' holds more than tensors, and loading it could run code. Save its state_dict as .safetensors."
        ) from error


def read_checkpoint(fetch: Fetch, wanted: Wanted | None = None) -> dict[str, Tensor]:
    """The weights of a transformers checkpoint: one file, or shards listed in an index.

    Args:
        fetch: file name -> its path, or None.
        wanted: which keys to read; default: all. Shards without any are neither opened nor downloaded.

    Raises:
        WeightsError: none of the usual files is there, or one cannot be read.
    """
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if (path := fetch(name)) is None:
            continue
        if not name.endswith(".index.json"):
            return read_weights(path, wanted)
        state: dict[str, Tensor] = {}
        places = read_json(path).get("weight_map", {})
        for shard in sorted({shard for key, shard in places.items() if wanted is None or wanted(key)}):
            if (part := fetch(shard)) is None:
                raise WeightsError(
                    f"'{path}' lists the shard {shard!r}, which is not there. Fetch it, or the whole checkpoint anew."
                )
            state |= read_weights(part, wanted)
        return state
    raise WeightsError(
        "The checkpoint has a configuration but no weights (model.safetensors or pytorch_model.bin). "
        "If it is a hub repository, they were not downloaded before the network was lost."
    )


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
    if adapted := [key for key in tensors if _ADAPTER.search(key)]:
        raise WeightsError(
            f"{len(adapted)} weights belong to adapters that are not merged (PEFT, LoRA; {adapted[0]!r} for one). "
            f"Merge them first: model = model.merge_and_unload(), then load or save that model."
        )
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = ".".join(step for step in key.split(".") if step not in WRAPPERS)
        if name in plain:
            raise WeightsError(f"The checkpoint has {name!r} twice, once as {key!r}. Keep one of the two models in it.")
        plain[name] = tensor
    return plain


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

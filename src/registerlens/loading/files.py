"""Weight files: whole or not at all, never a pickle that runs code."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from registerlens.errors import WeightsError
from registerlens.files import read_json
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

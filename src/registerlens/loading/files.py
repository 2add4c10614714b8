"""Weight files and hub downloads: whole or not at all, never a pickle that runs code, clear words when offline."""

from __future__ import annotations

import argparse
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from registerlens.errors import ModelNotFoundError, WeightsError
from registerlens.files import read_json

_HARMLESS = (argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath)
"""What training scripts keep beside the weights, and what holds values only."""

Fetch = Callable[[str], Path | None]
Wanted = Callable[[str], bool]

LOCAL_ALTERNATIVES = (
    "Without a network these work: 'registerlens:tiny' (embedded), a folder written by save_pretrained (transformers, "
    "timm's save_for_hf, open_clip's, or ours), a weight file with weights=..., or HookedViT.from_module(module)."
)


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


def folder_fetch(folder: Path) -> Fetch:
    """File name -> path in a folder, or None."""
    return lambda name: path if (path := folder / name).is_file() else None


def hub_fetch(repo: str, revision: str | None = None) -> Fetch:
    """File name -> local copy of a hub repository's file, or None where the repository has no such file.

    Raises:
        ModelNotFoundError: (when called) no such repository, or no network and no cached copy.
    """

    def fetch(name: str) -> Path | None:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache  # noqa: PLC0415  (only where a hub is asked)
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415

        with network(repo):
            try:
                return Path(hf_hub_download(repo, name, revision=revision))
            except LocalEntryNotFoundError:
                # Offline. Where the repository was downloaded before, this is a file it lacks or nobody needed.
                if name != "config.json" and isinstance(
                    try_to_load_from_cache(repo, "config.json", revision=revision), str
                ):
                    return None
                raise
            except EntryNotFoundError:
                return None

    return fetch


@contextmanager
def network(name: str) -> Iterator[None]:
    """Turn whatever a hub client raises inside into one clear ModelNotFoundError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError  # noqa: PLC0415

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its retries are ours to report, once
    try:
        yield
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"No model called {name!r} on the hub (or it is private: log in with `hf auth login`). Check the spelling; "
            f"`registerlens models` lists how to name models."
        ) from error
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"{name!r} is neither an existing folder nor a valid hub id. {LOCAL_ALTERNATIVES}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(
            f"{name!r} is not on this machine and could not be downloaded: no network, or the hub did not answer. "
            f"{LOCAL_ALTERNATIVES}"
        ) from error
    finally:
        logger.setLevel(level)

"""Reports of the theory as files: arrays in safetensors, everything else in JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save_file

from registerlens.errors import ConfigError
from registerlens.files import read_json, read_tensors, whole_file, write_json
from registerlens.theory.conditions import Condition

Record = TypeVar("Record")
"""A report: a dataclass with `setup`, `conditions` and arrays."""


def save_record(record: Any, folder: str | Path, name: str, more: dict[str, Any]) -> Path:
    """Write NAME.json and NAME.safetensors for a report with `setup`, `conditions` and arrays; returns the folder."""
    from registerlens import __version__  # noqa: PLC0415

    folder = Path(folder)
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    arrays = {key: np.ascontiguousarray(value) for key, value in values.items() if isinstance(value, np.ndarray)}
    with whole_file(folder / f"{name}.safetensors") as temporary:
        save_file(arrays, temporary)
    told = {"setup": record.setup, "conditions": [found.to_dict() for found in record.conditions]}
    write_json(folder / f"{name}.json", {"version": __version__, **told, **more})
    return folder


def load_record(kind: Callable[..., Record], folder: str | Path, name: str) -> Record:
    """Read what `save_record` wrote.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    folder = Path(folder)
    told = read_json(folder / f"{name}.json")
    arrays = {key: value.numpy() for key, value in read_tensors(folder / f"{name}.safetensors").items()}
    try:
        conditions = tuple(Condition(**found) for found in told["conditions"])
        return kind(setup=told["setup"], conditions=conditions, **arrays)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"'{folder / name}.json' and .safetensors do not describe a report: {error}.") from error

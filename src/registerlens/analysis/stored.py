"""Results as folders: arrays in one safetensors file, everything else in one JSON file beside it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save_file

from registerlens.analysis.detection import Detection, detection_from_dict, detection_to_dict
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import ViTConfig
from registerlens.display import Shown
from registerlens.errors import ConfigError
from registerlens.files import read_json, read_tensors, whole_file, write_json

Kind = TypeVar("Kind", bound="Stored")


@dataclass(frozen=True, eq=False)
class Stored(Shown, ABC):
    """What a frozen dataclass inherits to be written to a folder and read back; NaN may stand in arrays only.

    Files are named after the class: `MassiveActivations` writes massive_activations.json and .safetensors.
    """

    @abstractmethod
    def describe(self) -> str:
        """The result in words."""

    def save(self, folder: str | Path) -> Path:
        """Write the two files, each whole or not at all; returns the folder."""
        from registerlens import __version__  # noqa: PLC0415

        folder, name = Path(folder), _file_name(type(self))
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        arrays = {key: np.ascontiguousarray(value) for key, value in values.items() if isinstance(value, np.ndarray)}
        with whole_file(folder / f"{name}.safetensors") as temporary:
            save_file(arrays, temporary)
        told = {key: _to_json(value) for key, value in values.items() if key not in arrays}
        write_json(folder / f"{name}.json", {"version": __version__, "in_words": self.describe(), "values": told})
        return folder

    @classmethod
    def load(cls: type[Kind], folder: str | Path) -> Kind:
        """Read what `save` wrote.

        Raises:
            ConfigError: a file is missing, truncated, or of something else.
        """
        folder, name = Path(folder), _file_name(cls)
        told = read_json(folder / f"{name}.json")
        arrays = {key: tensor.numpy() for key, tensor in read_tensors(folder / f"{name}.safetensors").items()}
        try:
            return cls(**{key: _from_json(value) for key, value in told["values"].items()}, **arrays)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"'{folder}' does not hold a {cls.__name__}: {error!r}. Give a folder that its save(folder) wrote."
            ) from error


def _file_name(kind: type) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


_CODED: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "config": (ViTConfig, ViTConfig.to_dict, ViTConfig.from_dict),
    "detection": (Detection, detection_to_dict, detection_from_dict),
    "neurons": (RegisterNeurons, RegisterNeurons.to_dict, RegisterNeurons.from_dict),
}
"""Tag -> type of a value, how it becomes JSON, and how it comes back."""


def _to_json(value: Any) -> Any:
    for tag, (kind, encode, _) in _CODED.items():
        if isinstance(value, kind):
            return {tag: encode(value)}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        [(tag, told)] = value.items()
        return _CODED[tag][2](told)
    return tuple(_from_json(item) for item in value) if isinstance(value, list) else value  # JSON knows lists only

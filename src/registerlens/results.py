"""What every result inherits: words, a table, a figure, and one folder that is whole or not at all."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pandas as pd

from registerlens.codecs import ARRAYS, JSON, Misfit, Parts, Place
from registerlens.config import ViTConfig
from registerlens.display import Shown
from registerlens.encoding import concrete, decode, encode
from registerlens.errors import ConfigError
from registerlens.files import read_json, read_tensors, restore, whole_file, whole_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

Kind = TypeVar("Kind", bound="Saved")
InFile = TypeVar("InFile", bound="ResultFile")

FINITE = {"finite": True}
"""`field(metadata=FINITE)`: neither NaN nor infinity may stand in the field."""
UNSAVED = {"saved": False}
"""`field(default=..., metadata=UNSAVED)`: the field is no part of the files."""


class Saved:
    """What a dataclass inherits to be saved to a folder and read back; `registerlens.encoding` says how.

    result.json holds class, format, versions, and all fields that are no arrays; arrays.safetensors the arrays. `load`
    of a class that others are derived from reads any of them: `Intervention.load(folder)`.
    """

    FORMAT: ClassVar[int] = 1
    """Raised when the meaning of a field changes; what was written in another format is refused."""

    def save(self, folder: str | Path) -> Path:
        """Write a folder that appears whole or not at all; returns it.

        Raises:
            ConfigError: the folder holds something else than an older result of this class, or a field something else
                than it should; both are named.
        """
        folder, parts = Path(folder), Parts()
        _refuse_to_replace(folder, type(self))
        try:
            values = encode(self, parts)
        except Misfit as misfit:
            name = type(self).__name__
            raise ConfigError(f"This {name} cannot be saved: '{misfit.place or name}' {misfit.what}.") from None
        with whole_folder(folder) as whole:
            if parts.arrays:
                from safetensors.torch import save_file  # it brings torch along

                parts.files[ARRAYS] = partial(save_file, parts.arrays)
            for name, write in parts.files.items():
                with whole_file(whole / name) as path:
                    write(path)
            files = {path.name: _digest(path) for path in sorted(whole.iterdir())}
            write_json(whole / JSON, _header(self) | {"files": files, "values": values})
        return folder

    @classmethod
    def load(cls: type[Kind], folder: str | Path) -> Kind:
        """Read what `save` wrote.

        Raises:
            ConfigError: a file is missing, damaged, or another class's; it names the file and the field.
        """
        folder = Path(folder)
        restore(folder)
        stored = read_json(folder / JSON)
        try:
            kind = _kind(cls, stored)
            parts = Parts(arrays=_read_arrays(folder, stored.get("files")), folder=folder)
            result = decode(kind, stored.get("values"), parts)
            for name in parts.arrays:
                raise Misfit(name, f"is no array of a {kind.__name__}", ARRAYS)
        except Misfit as misfit:
            raise ConfigError(
                f"'{folder / misfit.file}': '{misfit.place or 'values'}' {misfit.what}."
                " Give a folder that save(folder) wrote, write it anew, or restore it from a copy."
            ) from misfit.__cause__
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class Result(Shown, Saved, ABC):
    """What was found, frozen: in words, as a table, as a figure, and in files.

    Example:
        >>> import tempfile
        >>> from dataclasses import field
        >>> @dataclass(frozen=True, kw_only=True, eq=False)
        ... class Norms(Result):
        ...     model: str
        ...     values: tuple[float, ...] = field(metadata=FINITE)
        ...     def describe(self): return f"Norms of {self.model}."
        ...     def to_dataframe(self): return pd.DataFrame(self.values)
        ...     def plot(self): raise NotImplementedError
        >>> folder = Norms(model="tiny", values=(1.0, 2.5)).save(Path(tempfile.mkdtemp()) / "norms")
        >>> Norms.load(folder)
        Norms(model='tiny', values=(1.0, 2.5))
        >>> Norms(model="tiny", values=(float("nan"),)).save(folder)
        Traceback (most recent call last):
        registerlens.errors.ConfigError: This Norms cannot be saved: 'values[0]' must be finite, got nan.
        ...
    """

    @abstractmethod
    def describe(self) -> str:
        """The result in words."""

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as a table."""

    @abstractmethod
    def plot(self) -> Any:
        """The result as a figure."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelResult(Result, ABC):
    """What was found of a model."""

    model: str
    """Where the model came from."""
    config: ViTConfig
    """Its architecture."""
    fingerprint: str
    """Of its weights: `vit.fingerprint`."""


class ResultFile(Result):
    """A result that is one JSON file, which people write by hand too: what `to_dict` gives, and `from_dict` reads."""

    STEM: ClassVar[str]
    """Name of the file in a folder, without suffix."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""

    @classmethod
    @abstractmethod
    def from_dict(cls: type[InFile], values: dict[str, Any]) -> InFile:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: the values do not describe one.
        """

    @classmethod
    def _file(cls, path: Path) -> Path:
        return path if path.suffix == ".json" else path / f"{cls.STEM}.json"

    def save(self, folder: str | Path) -> Path:
        """Write a JSON file, or into a folder one with a name of its own, whole or not at all; returns its path."""
        path = self._file(Path(folder))
        write_json(path, _header(self) | self.to_dict())
        return path

    @classmethod
    def load(cls: type[InFile], folder: str | Path) -> InFile:
        """Read what `save` wrote, or what was written by hand without class, format and versions.

        Raises:
            ConfigError: the file is missing, damaged, or another class's; it names the file and the field.
        """
        path = cls._file(Path(folder))
        stored = read_json(path)
        try:
            if "class" in stored:
                _kind(cls, stored)
            return Place(Parts()).make(cls.from_dict, stored)
        except Misfit as misfit:
            raise ConfigError(f"'{path}': '{misfit.place or cls.STEM}' {misfit.what}") from misfit.__cause__


def as_json(value: Any) -> dict[str, Any]:
    """A dataclass without arrays as JSON: as in a saved result."""
    return encode(value, Parts())


def _header(saved: Saved) -> dict[str, Any]:
    kind = type(saved)
    stored: dict[str, Any] = {"class": kind.__name__, "format": kind.FORMAT}
    stored["versions"] = {name: version(name) for name in ("registerlens", "torch", "numpy")}
    return stored | ({"in_words": saved.describe()} if isinstance(saved, Result) else {})


def _kind(cls: type[Any], stored: Mapping[str, Any]) -> type[Any]:
    """The class that the header names: `cls`, or one derived from it."""
    kinds, name = {kind.__name__: kind for kind in concrete(cls)}, stored.get("class")
    if not isinstance(name, str) or name not in kinds:
        raise Misfit("class", f"must be {' or '.join(sorted(kinds))}, got {name!r:.80}")
    if (version := stored.get("format")) != kinds[name].FORMAT:
        raise Misfit("format", f"must be {kinds[name].FORMAT}, which this version reads, got {version!r:.80}")
    return kinds[name]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_to_replace(folder: Path, kind: type[Saved]) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name} if folder.exists() else set()
    stored = read_json(folder / JSON) if folder.is_dir() and JSON in names else {}
    files = stored.get("files")
    is_older = stored.get("class") == kind.__name__ and isinstance(files, dict) and names <= {JSON, *files}
    if names and not is_older:
        raise ConfigError(
            f"'{folder}' exists and holds something else than a {kind.__name__}: {sorted(names)[:5]}. A result is a "
            f"folder of its own; give a new one, such as '{folder / kind.__name__}'."
        )


def _read_arrays(folder: Path, files: Any) -> dict[str, Tensor]:
    """The arrays, once every file is known to be the one that was written."""
    if not isinstance(files, dict):
        raise Misfit("files", f"must be an object, got {files!r:.80}")
    for name, digest in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise Misfit("files", f"names {name!r}, which is not there")
        if _digest(path) != digest:
            raise Misfit("files", f"gives {name} another SHA-256: that file was damaged or exchanged")
    return read_tensors(folder / ARRAYS) if ARRAYS in files else {}

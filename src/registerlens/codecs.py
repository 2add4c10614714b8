"""What single values are in files: text, numbers and words as JSON; arrays, tables and whole files beside it.

Both ways a value is held against its annotation; what does not fit is a `Misfit` that knows where it stands.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import numpy as np
import pandas as pd
from jaxtyping import AbstractArray

if TYPE_CHECKING:
    from torch import Tensor

JSON, ARRAYS = "result.json", "arrays.safetensors"
"""The files that values and arrays are written to."""


class Misfit(Exception):
    """A value is not what its annotation says; whoever knows the folder makes an error of it."""

    def __init__(self, place: str, what: str, file: str = JSON) -> None:
        self.place, self.what, self.file = place, what, file


@dataclass
class Parts:
    """What values consist of beside their JSON."""

    arrays: dict[str, Tensor] = field(default_factory=dict)
    """By the place of their field; reading takes them out."""
    files: dict[str, Callable[[Path], Any]] = field(default_factory=dict)
    """Other files by name, and how they are written."""
    folder: Path = Path()
    """Where they are read."""


@dataclass(frozen=True)
class Place:
    """Where a value stands in a result."""

    parts: Parts
    name: str = ""
    """Such as "detection.cutoff.value" or "conditions[3].name"."""
    axes: dict[str, int] = field(default_factory=dict)
    """Lengths of the named axes, of all arrays of one dataclass."""

    def of_field(self, name: str, axes: dict[str, int]) -> Place:
        """A field of a dataclass that stands here."""
        return Place(self.parts, f"{self.name}.{name}" if self.name else name, axes)

    def of_item(self, key: object) -> Place:
        """An entry of what stands here."""
        return Place(self.parts, f"{self.name}[{key}]", self.axes)

    def misfit(self, what: str, file: str = JSON) -> Misfit:
        """What is wrong here."""
        return Misfit(self.name, what, file)

    def must_be(self, expected: str, got: object) -> Misfit:
        """Something else stands here."""
        return self.misfit(f"must be {expected}, got {got!r:.80}")

    def object(self, stored: Any) -> dict[str, Any]:
        """What stands here, if it is a JSON object."""
        if not isinstance(stored, dict):
            raise self.must_be("an object", stored)
        return stored

    def make(self, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What a class makes of values that may be anything: whatever it raises, they are at fault."""
        try:
            return make(*args, **options)
        except Exception as error:
            raise self.misfit(f"is refused: {type(error).__name__}: {error}") from error


class Codec:
    """How a value of one kind of annotation becomes JSON (and arrays on the way), and how it comes back.

    This one is for what cannot be saved, such as a function, which may be one of several kinds that a field can have.
    """

    def expected(self) -> str:
        """What must stand there, for messages."""
        return "of a known kind"

    def fits(self, value: Any) -> bool:
        """Whether a value is of that kind, as far as its surface tells."""
        return False

    def encode(self, value: Any, at: Place) -> Any:
        """The JSON of a value that fits."""
        return value

    def decode(self, stored: Any, at: Place) -> Any:
        """The value of some JSON."""
        if not self.fits(stored):
            raise at.must_be(self.expected(), stored)
        return stored


# Plain values --------------------------------------------------------------------------------------------------------


class _Anything(Codec):
    """What is JSON already."""

    def fits(self, value: Any) -> bool:
        return True


@dataclass(frozen=True)
class _Plain(Codec):
    """Text, whole numbers, truth values, nothing."""

    name: str
    kinds: tuple[type, ...]
    """numpy's scalars are among them."""
    make: Callable[[Any], Any]

    def expected(self) -> str:
        return self.name

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.kinds) and (bool in self.kinds or not isinstance(value, bool))

    def encode(self, value: Any, at: Place) -> Any:
        return self.make(value)


class _Text(_Plain):
    """Text of a class of its own, which may refuse it."""

    def decode(self, stored: Any, at: Place) -> Any:
        return at.make(self.make, super().decode(stored, at))


@dataclass(frozen=True)
class _Number(Codec):
    """A float; JSON has no NaN and no infinity."""

    finite: bool

    def expected(self) -> str:
        return "a number"

    def fits(self, value: Any) -> bool:
        return isinstance(value, float | int | np.floating | np.integer) and not isinstance(value, bool)

    def encode(self, value: Any, at: Place) -> Any:
        value = self._checked(float(value), at)
        return value if math.isfinite(value) else {"float": str(value)}

    def decode(self, stored: Any, at: Place) -> Any:
        if isinstance(stored, dict) and stored.get("float") in ("nan", "inf", "-inf"):
            stored = float(stored["float"])
        return self._checked(at.make(float, super().decode(stored, at)), at)

    def _checked(self, value: float, at: Place) -> float:
        if self.finite and not math.isfinite(value):
            raise at.must_be("finite", value)
        return value


@dataclass(frozen=True)
class _Word(Codec):
    """One of a `Literal`'s words."""

    words: tuple[str, ...]

    def expected(self) -> str:
        return f"one of {list(self.words)}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.words


@dataclass(frozen=True)
class _Member(_Word):
    """A member of an enumeration of words."""

    kind: type[Enum]

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.kind)

    def encode(self, value: Any, at: Place) -> Any:
        return value.value

    def decode(self, stored: Any, at: Place) -> Any:
        return self.kind(_Word(self.words).decode(stored, at))


# Arrays, tables, files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Array(Codec):
    """A jaxtyping annotation; its JSON is its place, under which the array stands in the other file."""

    hint: Any
    finite: bool

    def fits(self, value: Any) -> bool:
        return isinstance(value, (np.ndarray, self.hint.array_type)) and _dtype(value) in self.hint.dtypes

    def encode(self, value: Any, at: Place) -> Any:
        tensor = _tensor(value) if isinstance(value, np.ndarray) else value.detach().cpu().contiguous().clone()
        self._check(tensor, at)
        at.parts.arrays[at.name] = tensor
        return at.name

    def decode(self, stored: Any, at: Place) -> Any:
        tensor = _take(stored, at)
        self._check(tensor, at)
        return tensor.numpy() if issubclass(self.hint.array_type, np.ndarray) else tensor

    def _check(self, array: Tensor, at: Place) -> None:
        axes, shape = self.hint.dim_str.split(), list(array.shape)
        if _dtype(array) not in self.hint.dtypes:
            raise at.misfit(f"must be {self.hint.__name__}, is {_dtype(array)}", ARRAYS)
        if not any(axis.startswith(("*", "...")) for axis in axes):
            if len(axes) != len(shape):
                raise at.misfit(f"must have the axes {axes}, has shape {shape}", ARRAYS)
            for axis, n in zip(axes, shape, strict=True):
                named = axis.isidentifier() and not axis.startswith("_")
                expected = at.axes.setdefault(axis, n) if named else int(axis) if axis.isdigit() else n
                if n != expected:
                    raise at.misfit(f"has shape {shape}, its axis '{axis}' must be {expected} long", ARRAYS)
        if self.finite and not bool(array.isfinite().all()):
            raise at.misfit("must be finite, holds NaN or infinity", ARRAYS)


@dataclass(frozen=True)
class _Table(Codec):
    """A frame: a column of numbers is an array; one of words an array of indices, -1 for none, into a list of them."""

    words: tuple[str, ...]
    numbers: tuple[str, ...]

    def fits(self, value: Any) -> bool:
        return isinstance(value, pd.DataFrame) and set(value) == {*self.words, *self.numbers}

    def encode(self, value: Any, at: Place) -> Any:
        stored = {}
        for name in value:
            if name in self.words:
                codes, words = pd.factorize(value[name])
                stored[name] = [str(word) for word in words]
            else:
                codes, stored[name] = value[name].to_numpy(dtype=None if len(value) else float), at.of_item(name).name
            at.parts.arrays[at.of_item(name).name] = _tensor(codes)
        return stored

    def decode(self, stored: Any, at: Place) -> Any:
        if wrong := sorted({*self.words, *self.numbers} ^ set(at.object(stored))):
            raise at.of_item(wrong[0]).misfit("is no column, or a missing one")
        return at.make(
            pd.DataFrame, {name: self._column(name, part, at.of_item(name)) for name, part in stored.items()}
        )

    def _column(self, name: str, stored: Any, at: Place) -> Any:
        values = _take(at.name if name in self.words else stored, at).numpy()
        if values.ndim != 1 or values.dtype.kind not in "biuf":
            raise at.misfit(f"must be numbers along one axis, is {values.dtype} of shape {list(values.shape)}", ARRAYS)
        if name in self.numbers:
            return values
        if not isinstance(stored, list) or not all(isinstance(word, str) for word in stored):
            raise at.must_be("a list of words", stored)
        if values.dtype.kind not in "iu" or not ((values >= -1) & (values < len(stored))).all():
            raise at.misfit(f"must be indices of {len(stored)} words", ARRAYS)
        return np.array([*stored, None], dtype=object)[values]


@dataclass(frozen=True)
class _OwnFile(Codec):
    """A field that is a file of its own, named after it."""

    suffix: str
    write: Callable[[Any, Path], Any]
    read: Callable[[Path], Any]

    def fits(self, value: Any) -> bool:
        return True

    def encode(self, value: Any, at: Place) -> Any:
        at.parts.files[at.name + self.suffix] = partial(self.write, value)
        return at.name + self.suffix

    def decode(self, stored: Any, at: Place) -> Any:
        if stored != at.name + self.suffix:
            raise at.must_be(f"'{at.name}{self.suffix}'", stored)
        return at.make(self.read, at.parts.folder / stored)


def table_of(*, words: Iterable[str], numbers: Iterable[str]) -> dict[str, Any]:
    """`field(metadata=table_of(...))`: the field is a frame with these columns."""
    return {"codec": _Table(tuple(words), tuple(numbers))}


def own_file(suffix: str, write: Callable[[Any, Path], Any], read: Callable[[Path], Any]) -> dict[str, Any]:
    """`field(metadata=own_file(...))`: the field is a file of its own."""
    return {"codec": _OwnFile(suffix, write, read)}


def _take(stored: Any, at: Place) -> Tensor:
    if stored != at.name:
        raise at.must_be(f"the array {at.name!r}", stored)
    if at.name not in at.parts.arrays:
        raise at.misfit("is missing", ARRAYS)
    return at.parts.arrays.pop(at.name)


def _tensor(array: np.ndarray) -> Tensor:
    """A copy: safetensors refuses arrays that share memory."""
    import torch  # whoever reads no arrays need not wait for it

    return torch.from_numpy(np.array(array, order="C"))


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


_PLAIN: dict[Any, Codec] = {
    Any: _Anything(),
    str: _Plain("text", (str,), str),
    int: _Plain("a whole number", (int, np.integer), operator.index),
    bool: _Plain("true or false", (bool, np.bool_), bool),
    NoneType: _Plain("null", (NoneType,), lambda value: value),
}


def codec_of_value(hint: Any, finite: bool) -> Codec | None:
    """The codec of an annotation of single values; None for one of values that are made of others."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if get_origin(hint) is not None:
        return _Word(get_args(hint)) if get_origin(hint) is Literal else None
    if hint is float:
        return _Number(finite)
    if issubclass(hint, AbstractArray):
        return _Array(hint, finite)
    if issubclass(hint, Enum):
        return _Member(tuple(member.value for member in hint), hint)
    return _Text(hint.__name__, (str,), hint) if issubclass(hint, str) else None

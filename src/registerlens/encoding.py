"""A dataclass as JSON and arrays and back, as its annotations say: one codec for each kind of annotation.

`Float[np.ndarray, "layer head"]` is an array of that dtype and rank whose named axes agree within its dataclass, a
`DataFrame` a table, a dataclass another description of fields, anything with `to_dict` and `from_dict` what those make
of it, and plain types are JSON. What single values are stands in `codecs.py`, what is made of them here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from registerlens.codecs import ARRAYS, Codec, Misfit, Parts, Place, codec_of_value

# Values made of others -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Many(Codec):
    """A tuple, list or other sequence: of any length, or with a codec for each entry."""

    kind: Any
    make: Callable[[Iterable[Any]], Any]
    entries: tuple[Codec, ...]
    any_length: bool

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.kind) or (self.kind is Sequence and isinstance(value, np.ndarray))

    def encode(self, value: Any, at: Place) -> Any:
        return [_encode(codec, part, place) for codec, part, place in self._each(value, at)]

    def decode(self, stored: Any, at: Place) -> Any:
        if not isinstance(stored, list):
            raise at.must_be("a list", stored)
        return self.make(codec.decode(part, place) for codec, part, place in self._each(stored, at))

    def _each(self, values: Any, at: Place) -> Iterator[tuple[Codec, Any, Place]]:
        if not self.any_length and len(values) != len(self.entries):
            raise at.must_be(f"{len(self.entries)} entries", values)
        for i, value in enumerate(values):
            yield self.entries[0 if self.any_length else i], value, at.of_item(i)


@dataclass(frozen=True)
class _Named(Codec):
    """A dict by names."""

    entry: Codec

    def fits(self, value: Any) -> bool:
        return isinstance(value, Mapping)

    def encode(self, value: Any, at: Place) -> Any:
        return {name: _encode(self.entry, part, at.of_item(name)) for name, part in value.items()}

    def decode(self, stored: Any, at: Place) -> Any:
        return {name: self.entry.decode(part, at.of_item(name)) for name, part in at.object(stored).items()}


@dataclass(frozen=True)
class _Class(Codec):
    """A class; this one has `to_dict` and `from_dict`."""

    kind: Any

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.kind)

    def encode(self, value: Any, at: Place) -> Any:
        return value.to_dict()

    def decode(self, stored: Any, at: Place) -> Any:
        return at.make(self.kind.from_dict, at.object(stored))


class _Fields(_Class):
    """A dataclass; what it keeps to itself has `metadata={"saved": False}`."""

    def encode(self, value: Any, at: Place) -> Any:
        axes: dict[str, int] = {}
        codecs = _codecs_of(self.kind)
        return {name: _encode(codec, getattr(value, name), at.of_field(name, axes)) for name, codec in codecs.items()}

    def decode(self, stored: Any, at: Place) -> Any:
        axes: dict[str, int] = {}
        codecs = _codecs_of(self.kind)
        for name in sorted(set(codecs) ^ set(at.object(stored))):
            what = "is missing" if name in codecs else f"is no field of {self.kind.__name__}"
            raise at.of_field(name, axes).misfit(what)
        values = {name: codec.decode(stored[name], at.of_field(name, axes)) for name, codec in codecs.items()}
        return at.make(self.kind, **values)


class _Derived(_Class):
    """Whatever is derived from an abstract class, identified by its name."""

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.kind) and is_dataclass(value)

    def encode(self, value: Any, at: Place) -> Any:
        return _Either(tuple(map(_Fields, concrete(self.kind))), named=True).encode(value, at)

    def decode(self, stored: Any, at: Place) -> Any:
        return _Either(tuple(map(_Fields, concrete(self.kind))), named=True).decode(stored, at)


@dataclass(frozen=True)
class _Either(Codec):
    """The first of several that fits; classes among each other are distinguished by their names."""

    codecs: tuple[Codec, ...]
    named: bool

    def fits(self, value: Any) -> bool:
        return any(codec.fits(value) for codec in self.codecs)

    def encode(self, value: Any, at: Place) -> Any:
        codec = next(codec for codec in self.codecs if codec.fits(value))
        stored = codec.encode(value, at)
        return {"class": codec.kind.__name__, **stored} if self.named and isinstance(codec, _Class) else stored

    def decode(self, stored: Any, at: Place) -> Any:
        misfits = []
        for codec in self.codecs:
            part = stored
            if self.named and isinstance(codec, _Class):
                if not isinstance(stored, dict) or stored.get("class") != codec.kind.__name__:
                    continue
                part = {key: value for key, value in stored.items() if key != "class"}
            try:
                return codec.decode(part, at)
            except Misfit as misfit:
                misfits.append(misfit)
        if not misfits:
            raise at.must_be("of a known class", stored)
        raise max(misfits, key=lambda misfit: (len(misfit.place), misfit.file == ARRAYS))  # what came furthest


# From annotations to codecs ------------------------------------------------------------------------------------------

_UNIONS = (Union, UnionType)
_SEQUENCES: dict[Any, Callable[[Iterable[Any]], Any]] = {tuple: tuple, list: list, Sequence: tuple}


@cache
def _codecs_of(kind: type[Any]) -> dict[str, Codec]:
    """The codec of each field that is saved."""
    hints = get_type_hints(kind)
    return {
        item.name: item.metadata.get("codec") or _codec(hints[item.name], item.metadata.get("finite", False))
        for item in fields(kind)
        if item.metadata.get("saved", True)
    }


def _codec(hint: Any, finite: bool) -> Codec:
    if (codec := codec_of_value(hint, finite)) is not None:
        return codec
    origin, args = get_origin(hint), get_args(hint)
    if origin is None:
        return _codec_of_class(hint)
    codecs = tuple(_codec(arg, finite) for arg in args if arg is not ...) if origin in (*_UNIONS, *_SEQUENCES) else ()
    if origin in _UNIONS:
        return _Either(codecs, named=sum(isinstance(codec, _Class) for codec in codecs) > 1)
    if origin in _SEQUENCES:
        return _Many(origin, _SEQUENCES[origin], codecs, any_length=origin is not tuple or ... in args)
    return _Named(_codec(args[1], finite)) if origin is dict else Codec()


def _codec_of_class(kind: type[Any]) -> Codec:
    if hasattr(kind, "from_dict"):
        return _Class(kind)
    if is_dataclass(kind):
        return _Fields(kind)
    return _Derived(kind) if isabstract(kind) else Codec()


def _encode(codec: Codec, value: Any, at: Place) -> Any:
    if not codec.fits(value):
        raise at.misfit(f"is of a kind that cannot be saved there: {type(value).__name__}")
    return codec.encode(value, at)


def encode(value: Any, parts: Parts) -> Any:
    """A dataclass as JSON; arrays and other files go into `parts`.

    Raises:
        Misfit: a field holds something else than its annotation says.
    """
    return _encode(_codec_of_class(type(value)), value, Place(parts))


def decode(kind: type[Any], stored: Any, parts: Parts) -> Any:
    """The dataclass that some JSON and the arrays in `parts`, which it takes out, describe.

    Raises:
        Misfit: they do not describe one.
    """
    return _codec_of_class(kind).decode(stored, Place(parts))


def concrete(kind: type[Any]) -> Iterator[type[Any]]:
    """The dataclasses among a class and all that are derived from it.

    Python knows of derived classes once their modules are imported: those beside an abstract class are imported here.
    """
    room = kind.__module__.rpartition(".")[0]
    if isabstract(kind) and room.startswith("registerlens."):
        for module in iter_modules(import_module(room).__path__, f"{room}."):
            import_module(module.name)
    if is_dataclass(kind) and not isabstract(kind):
        yield kind
    for derived in kind.__subclasses__():
        yield from concrete(derived)

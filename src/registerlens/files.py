"""Files that appear whole or not at all, and JSON with clear errors."""

from __future__ import annotations

import ctypes
import glob
import json
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from registerlens.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_DEEPEST = 64
"""Levels of a JSON file that are read: its parser recurses, and what is ours has some ten."""
_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)', re.DOTALL)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place at the end; after an exception nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # what the umask leaves
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own there, which is private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place at the end; after an exception all is as it was."""
    path = path.resolve()
    restore(path)
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)  # a private folder stays private
            if not exchanged(temporary, path):
                _replace(path, temporary)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore(path: Path) -> None:
    """Put a folder back that a process was about to replace when it was killed, where that takes two steps."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        if not path.exists():
            old.rename(path)


def exchanged(a: Path, b: Path) -> bool:
    """Whether two folders now stand in each other's place, which Linux does in one step on most file systems."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return bool(renameat2) and not renameat2(_WORKING_FOLDER, bytes(a), _WORKING_FOLDER, bytes(b), _EXCHANGE)


def _replace(path: Path, new: Path) -> None:
    """The same in two steps, between which only the older folder is there, as .NAME.….old."""
    old = new.with_name(f"{new.name}.old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it is missing, truncated, or holds no object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_depth(path, text)
        value = json.loads(text)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error}. Check the path and its permissions.") from error
    except ValueError as error:
        raise ConfigError(
            f"'{path}' is not valid JSON; it may be truncated: {error}. Write it anew, or restore it from a copy."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"'{path}' holds {type(value).__name__} instead of an object. Is it the right file?")
    return value


def _refuse_depth(path: Path, text: str) -> None:
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > _DEEPEST:
            raise ConfigError(f"'{path}' is nested more than {_DEEPEST} levels deep. Is it the right file?")


@contextmanager
def reading(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file, to be made sense of inside the `with` block.

    Raises:
        ConfigError: as `read_json`, or the block met a missing key or a value of the wrong kind; it names the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "answer.json"
        >>> write_json(path, {"question": "?"})
        >>> with reading(path) as told:
        ...     told["answer"]
        Traceback (most recent call last):
        registerlens.errors.ConfigError: '.../answer.json' lacks 'answer'; was it written by another version, or edited?
        ...
    """
    stored = read_json(path)
    try:
        yield stored
    except KeyError as error:
        raise ConfigError(f"'{path}' lacks {error}; was it written by another version, or edited?") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"'{path}' does not hold what it should: {error}. Write it anew, or restore it from a copy."
        ) from error


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Args:
        path: the file.
        names: those it must hold, no more and no fewer; None is any.

    Raises:
        ConfigError: it is missing or truncated, or holds others.
    """
    from safetensors.torch import load_file  # torch is slow to import

    try:
        tensors = load_file(path)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error}. Check the path and its permissions.") from error
    except SafetensorError as error:
        raise ConfigError(
            f"'{path}' is not a valid safetensors file; it may be truncated: {error}"
            ". Write it anew, or restore it from a copy."
        ) from error
    if names is not None and set(tensors) != set(names):
        raise ConfigError(
            f"'{path}' holds the tensors {sorted(tensors)}, expected {sorted(names)}. Is it the right file?"
        )
    return tensors


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")

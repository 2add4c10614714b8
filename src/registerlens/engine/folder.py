"""Where a store's files are: a folder of this machine, or whatever fsspec reaches. Files appear whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fsspec
from fsspec.implementations.local import LocalFileSystem

from registerlens.errors import StoreError
from registerlens.waiting import answer

UNFINISHED = ".registerlens-unfinished-"
"""How the name of a file begins until it is whole."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a folder."""

    name: str
    """Without the folder."""
    n_bytes: int
    """Its size."""
    modified: datetime | None
    """When it was last written, where that is known; UTC."""


@runtime_checkable
class Folder(Protocol):
    """A few files, by names such as "parts/g00000-s000000.parquet"; every method raises StoreError."""

    @property
    def where(self) -> str:
        """The path or URL, for messages."""
        ...

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if there is no such file."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole and for good or not at all; one that is there is replaced."""
        ...

    def rename(self, name: str, new: str) -> None:
        """Move a file; one that is there is replaced."""
        ...

    def entries(self, under: str) -> list[Entry]:
        """The files directly in a folder, by name; none if there is no such folder."""
        ...

    def sweep_up(self, under: str) -> None:
        """Delete what killed runs left half written."""
        ...


def folder_at(where: str | os.PathLike[str]) -> Folder:
    """The folder at a path or an fsspec URL such as "s3://bucket/sweep".

    Raises:
        StoreError: no such kind of URL, the package that reaches it is not installed, or no answer comes from there.

    Example:
        >>> type(folder_at("sweeps/mine")).__name__, type(folder_at("memory://sweeps/mine")).__name__
        ('LocalFolder', 'RemoteFolder')
    """
    try:
        system, path = answer(fsspec.core.url_to_fs, os.fspath(where))
    except (ValueError, ImportError, OSError) as error:
        raise StoreError(f"The store '{where}' cannot be reached: {error}") from error
    if isinstance(system, LocalFileSystem):
        return LocalFolder(Path(path))
    return RemoteFolder(system, path, os.fspath(where).rstrip("/"))


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine: written beside, flushed to the disk, renamed, and the folder flushed too.

    One on a network file system that hangs is waited for: the system's calls cannot be ended from inside a process.
    """

    root: Path

    @property
    def where(self) -> str:
        """See `Folder`."""
        return str(self.root)

    def read(self, name: str) -> bytes | None:
        """See `Folder`."""
        with explained(f"'{self.root / name}' cannot be read"):
            try:
                return (self.root / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, name: str, content: bytes) -> None:
        """See `Folder`."""
        path = self.root / name
        with explained(f"'{path}' cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(handle)
                Path(temporary).chmod(0o644)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            _flush_folder(path.parent)

    def rename(self, name: str, new: str) -> None:
        """See `Folder`."""
        with explained(f"'{self.root / name}' cannot be renamed"):
            (self.root / name).replace(self.root / new)
            _flush_folder((self.root / new).parent)

    def entries(self, under: str) -> list[Entry]:
        """See `Folder`."""
        with explained(f"'{self.root / under}' cannot be listed"):
            try:
                files = [(path.name, path.stat()) for path in sorted((self.root / under).iterdir()) if path.is_file()]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return [
            Entry(name=name, n_bytes=status.st_size, modified=datetime.fromtimestamp(status.st_mtime, UTC))
            for name, status in files
            if not name.startswith(".")
        ]

    def sweep_up(self, under: str) -> None:
        """See `Folder`."""
        with explained(f"'{self.root / under}' cannot be tidied up"):
            for path in (self.root / under).glob(f"{UNFINISHED}*"):
                path.unlink()


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that fsspec reaches. Object stores take a file whole or not; elsewhere checksums find damage.

    Storage that gives no answer ends in an error, see `registerlens.waiting`.
    """

    system: Any
    """The fsspec file system."""
    root: str
    """Path in it."""
    where: str

    def read(self, name: str) -> bytes | None:
        """See `Folder`."""
        with explained(f"'{self.where}/{name}' cannot be read"):
            try:
                return answer(self.system.cat_file, f"{self.root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """See `Folder`."""
        path = f"{self.root}/{name}"
        with explained(f"'{self.where}/{name}' cannot be written"):
            answer(self.system.makedirs, path.rpartition("/")[0], exist_ok=True)  # object stores have none to make
            answer(self.system.pipe_file, path, content)

    def rename(self, name: str, new: str) -> None:
        """See `Folder`."""
        with explained(f"'{self.where}/{name}' cannot be renamed"):
            answer(self.system.mv, f"{self.root}/{name}", f"{self.root}/{new}")

    def entries(self, under: str) -> list[Entry]:
        """See `Folder`."""
        with explained(f"'{self.where}/{under}' cannot be listed"):
            self.system.invalidate_cache()  # other machines write too
            try:
                listed = answer(self.system.ls, f"{self.root}/{under}", detail=True)
            except FileNotFoundError:
                return []
        files = [file for file in listed if file["type"] == "file"]
        named = [
            Entry(name=file["name"].rpartition("/")[2], n_bytes=file["size"] or 0, modified=_modified(file))
            for file in files
        ]
        return sorted(named, key=lambda entry: entry.name)

    def sweep_up(self, under: str) -> None:
        """See `Folder`; an upload that was cut off leaves nothing."""


def _modified(entry: dict[str, Any]) -> datetime | None:
    """When a file was written, under the names that fsspec's file systems have for it."""
    names = ("LastModified", "last_modified", "mtime", "updated", "created")
    when = next((entry[name] for name in names if name in entry), None)
    if isinstance(when, int | float):
        return datetime.fromtimestamp(when, UTC)
    return when if isinstance(when, datetime) else None


def _flush_folder(path: Path) -> None:
    """Make a rename outlive a power failure."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


ADVICE = {
    errno.ENOSPC: "The disk is full. Parts written before are intact: free some space and run the same call again.",
    errno.EDQUOT: "Your quota is used up. Parts written before are intact: free some space and run the call again.",
    errno.EACCES: "Permission is denied: choose a folder you may write to, or ask for the right to.",
    errno.EPERM: "Permission is denied: choose a folder you may write to, or ask for the right to.",
    errno.EROFS: "The disk is read-only: choose another folder.",
}


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Say what an operating system's error means for the store.

    Example:
        >>> with explained("'parts' cannot be written"):
        ...     raise OSError(errno.EROFS, "Read-only file system")
        Traceback (most recent call last):
        registerlens.errors.StoreError: 'parts' cannot be written. The disk is read-only: choose another folder.
        ...
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{problem}. {ADVICE.get(error.errno or 0, str(error))}") from error

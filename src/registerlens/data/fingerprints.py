"""What tells two files apart: by their content, or, where reading all of it costs too much, by size and time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from registerlens.errors import SourceError, check_choice
from registerlens.progress import track

Check = Literal["content", "stat"]
"""By SHA-256 of all bytes, or by size and time of the last change.

"content" is the default, since it is right wherever the files lie: a picture that was painted over at equal size is
another one, and a copy on another machine is the same. It reads each file once, without decoding it: on a local disk a
few per cent of what decoding costs (docs/scaling.md).

"stat" reads nothing. Any ordinary change moves the time, so that it is noticed; but so does a copy, which then counts
as another set of images. For storage that is slow to read and that all runs share.
"""

MISSING = -1
"""Size of a file that is not there."""


def fingerprints(paths: Sequence[Path], check: str) -> list[str]:
    """One text a file, equal for equal files; "missing" for one that is not there.

    Raises:
        ConfigError: there is no such check.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> _ = path.write_bytes(b"picture")
        >>> fingerprints([path, path.parent / "b.png"], "content")
        ['7 ...', 'missing']
    """
    check_choice("check", check, get_args(Check))
    with ThreadPoolExecutor(max_workers=8) as pool:  # files are waited for, and hashing leaves the interpreter free
        results = pool.map(partial(_fingerprint, check=check), paths)
        return list(track(results, "reading files", total=len(paths)))


def size_of(path: Path) -> int:
    """Bytes of a file; `MISSING` if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return MISSING


def check_unchanged(path: Path, listed: int) -> None:
    """Refuse a file that is no longer as long as it was, or is not there on this machine.

    Raises:
        SourceError: it is so.
    """
    now = size_of(path)
    if now == listed:
        return
    change = f"not there, but had {listed} bytes" if now == MISSING else f"{now} bytes long, but had {listed}"
    if listed == MISSING:
        change = "there, but was not"
    raise SourceError(
        f"'{path}' is {change} when the files were listed. Was it changed during the run? Every worker has to find the "
        "same files under the same path: put them on storage that all machines share, or copy them to each."
    )


def _fingerprint(path: Path, check: str) -> str:
    try:
        stat = path.stat()
        if check == "stat":
            return f"{stat.st_size} {stat.st_mtime_ns}"
        with path.open("rb") as file:
            return f"{stat.st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError:
        return "missing"

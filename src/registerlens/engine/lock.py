"""One run at a time on a store."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from registerlens.engine.folder import Folder, LocalFolder, explained
from registerlens.errors import StoreError

NAME = "run.lock"
"""The lock's file in a store; it says who holds it."""
BEAT = 15.0
"""Seconds between two signs of life (heartbeats) of a run on a store that is not local."""
DEAD = 90.0
"""Seconds without one after which such a run counts as dead."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The run that works on a store."""

    host: str
    """Machine."""
    pid: int
    """Process there."""
    since: str
    """When it began; UTC."""
    token: str = ""
    """Tells runs apart."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def locked(folder: Folder) -> Iterator[Callable[[], None]]:
    """Hold a store for the length of a `with` block; yields a check that it is still held, which raises if not.

    In a local folder it is the operating system's lock (flock): it dies with its process, so that a killed run leaves
    nothing to be cleaned up. Elsewhere it is a file with a sign of life every 15 s, which is taken over after 90 s
    without one. Object stores have no common way to compare and swap: of two runs that start within the same second
    both may, rarely, believe that they hold it, until the next sign of life tells one of them that it does not.

    Raises:
        StoreError: another run holds it; the message says which.
    """
    with _flock(folder.root) if isinstance(folder, LocalFolder) and fcntl else _beating(folder) as check:
        yield check


def holder_of(folder: Folder) -> Holder | None:
    """Who holds a store; None if nobody does."""
    if not (isinstance(folder, LocalFolder) and fcntl):
        beat = _read_beat(folder)
        return None if beat is None or beat[1] > DEAD else beat[0]
    path = folder.root / NAME
    if not path.exists():
        return None
    with explained(f"'{path}' cannot be read"), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder_in(file.read())
    return None


def _me() -> Holder:
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return Holder(host=socket.gethostname(), pid=os.getpid(), since=since, token=uuid.uuid4().hex)


def _holder_in(text: str) -> Holder:
    try:
        return Holder(**{key: value for key, value in json.loads(text).items() if key != "beat"})
    except (ValueError, TypeError, AttributeError):  # taken a moment ago: not written yet
        return Holder(host="a machine not known yet", pid=0, since="a moment ago")


def _refusal(where: str, holder: Holder) -> StoreError:
    return StoreError(
        f"'{where}' is in use by {holder}. Two runs on one store would do the same work twice: wait for it, stop it, "
        f"or choose another store."
    )


# A local folder ------------------------------------------------------------------------------------------------------

# Not the library filelock: all but its newest versions empty the file, which says who holds it, when another run tries;
# and it asks only by taking the lock, for which it must be allowed to write.
fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def _flock(root: Path) -> Iterator[Callable[[], None]]:
    path = root / NAME
    with explained(f"'{path}' cannot be written"):
        root.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _refusal(str(root), _holder_in(file.read())) from error
        with explained(f"'{path}' cannot be written"):
            file.truncate(0)
            file.write(json.dumps(asdict(_me())))
            file.flush()
        try:
            yield lambda: None
        finally:
            file.truncate(0)  # the file stays: a run that has just opened it would lock one that is gone


# Elsewhere -----------------------------------------------------------------------------------------------------------


@contextmanager
def _beating(folder: Folder) -> Iterator[Callable[[], None]]:
    if (beat := _read_beat(folder)) is not None and beat[1] <= DEAD:
        raise _refusal(folder.where, beat[0])
    mine = _me()
    _beat(folder, mine)
    _check_mine(folder, mine)  # another run may have written at the same moment; the last to write has it
    stop, lost = threading.Event(), []

    # Without a lock that dies with its process, only a heartbeat tells a running process from one that was killed.
    def live() -> None:
        while not stop.wait(BEAT):
            try:
                _check_mine(folder, mine)
                _beat(folder, mine)
            except StoreError as error:
                lost[:] = [error]
                return

    def check() -> None:
        if lost:
            raise StoreError(
                f"The store is no longer held by this run: {lost[0]}"
                " Call run_sweep again: it goes on from what is stored."
            )

    thread = threading.Thread(target=live, daemon=True, name="registerlens-lock")
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join(BEAT)
        if not lost and not thread.is_alive():  # storage that hangs in the thread would hang here too
            folder.write(NAME, b"")


def _beat(folder: Folder, holder: Holder) -> None:
    folder.write(NAME, json.dumps(asdict(holder) | {"beat": time.time()}).encode())


def _read_beat(folder: Folder) -> tuple[Holder, float] | None:
    """Who held it last, and seconds since the last sign of life."""
    text = folder.read(NAME)
    if not text:
        return None
    try:
        stored: dict[str, Any] = json.loads(text)
        return _holder_in(text.decode()), time.time() - float(stored["beat"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"'{folder.where}/{NAME}' cannot be understood; if no run works there, delete it.") from error


def _check_mine(folder: Folder, mine: Holder) -> None:
    beat = _read_beat(folder)
    if beat is None or beat[0].token != mine.token:
        raise _refusal(folder.where, beat[0] if beat else _holder_in(""))

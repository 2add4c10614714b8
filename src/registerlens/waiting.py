"""A limit to waiting for who may never answer: a storage, a server, a process that is stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def patience() -> float:
    """Seconds to wait for an answer: what the environment's REGISTERLENS_PATIENCE says, or 120."""
    return float(os.environ.get("REGISTERLENS_PATIENCE", "120"))


def answer(ask: Callable[..., T], *args: Any, seconds: float | int | None = None, **options: Any) -> T:
    """What a call returns that may block for ever, hence in a thread, which is left behind if no answer comes.

    Raises:
        TimeoutError: none came within so many seconds, or `patience()`; an OSError like others of networks and storage.

    Example:
        >>> answer(divmod, 7, 2)
        (3, 1)
    """
    future: Future[T] = Future()

    def wait() -> None:
        try:
            future.set_result(ask(*args, **options))
        except BaseException as error:  # whatever it is, who asked gets it
            future.set_exception(error)

    Thread(target=wait, daemon=True, name="registerlens-waiting").start()
    try:
        return future.result(seconds := seconds or patience())
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"No answer came within {seconds:g} s; set REGISTERLENS_PATIENCE to wait longer") from None


def each(items: Iterator[T]) -> Iterator[T]:
    """The same items, each of which has to come in time.

    Raises:
        TimeoutError: see `answer`.

    Example:
        >>> list(each(iter("ab")))
        ['a', 'b']
    """
    end: Any = object()
    while (item := answer(lambda: next(items, end))) is not end:
        yield item

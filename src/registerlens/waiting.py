"""A limit to waiting for who may never answer: a storage, a server, a process that is stopped."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread, get_ident
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


@contextmanager
def silence_ends(client: Any) -> Iterator[None]:
    """Within, no thread waits longer than `patience()` for a server that sends nothing; large files may take longer.

    Args:
        client: of httpx or the like. Its requests keep the limits they have, but all that go unanswered in a row share
            the patience: who sends them may repeat them many times.

    Example:
        >>> import huggingface_hub
        >>> client = huggingface_hub.get_session()
        >>> request = client.build_request("GET", "http://localhost", timeout=60.0)
        >>> with silence_ends(client):
        ...     for _ in range(3):
        ...         client.event_hooks["request"][-1](request)  # as when it is sent
        ...         print(request.extensions["timeout"]["read"])
        60.0
        60.0
        0.001
    """
    left: defaultdict[int, float] = defaultdict(patience)

    def ask(request: Any) -> None:
        limits = request.extensions["timeout"]
        seconds = min([left[get_ident()], *(limit for limit in limits.values() if limit)])
        left[get_ident()] -= seconds
        request.extensions["timeout"] = dict.fromkeys(limits, max(seconds, 1e-3))  # 0 would mean no limit to some

    def hear(response: Any) -> None:
        left.pop(get_ident(), None)

    hooks = {"request": ask, "response": hear}
    for event, hook in hooks.items():
        client.event_hooks[event].append(hook)
    try:
        yield
    finally:
        for event, hook in hooks.items():
            client.event_hooks[event].remove(hook)

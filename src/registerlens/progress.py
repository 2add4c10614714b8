"""Progress on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    weight: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """The same items; a progress bar on stderr while they go by, if stderr is a terminal.

    Args:
        items: whatever is worked through.
        description: what is being done.
        total: the sum of the items' weights, if known.
        weight: how far an item advances the bar, such as the images of a batch.

    Example:
        >>> list(track([1, 2], "counting"))
        [1, 2]
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console  # noqa: PLC0415  (only where something is drawn)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task, weight(item))

"""Progress on a terminal, silence elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(
    items: Iterable[Item],
    description: str,
    total: int | float | None = None,
    weight: Callable[[Item], int | float] = lambda item: 1,
    *,
    done: int | float = 0,
    unit: str = "",
) -> Iterator[Item]:
    """The same items; a progress bar on stderr while they go by, if stderr is a terminal.

    Args:
        items: whatever is worked through.
        description: what is being done.
        total: the sum of the items' weights, if known.
        weight: how far an item advances the bar, such as the images of a batch.
        done: how much of the total was done before.
        unit: what the weights count; if given, the rate is shown too.

    Example:
        >>> list(track([1, 2], "counting"))
        [1, 2]
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console  # only where something is drawn
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, completed=done, rate="")  # type: ignore[arg-type]
        for item in items:
            yield item
            progress.advance(task, weight(item))
            if unit and (speed := progress.tasks[0].speed):
                progress.update(task, rate=f"{unit}, {speed:.3g}/s")

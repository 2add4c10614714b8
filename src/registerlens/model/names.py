"""Hook names: exact, as globs, as lists, or as functions; never silently nothing."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from transformer_lens.hook_points import HookPoint

from registerlens.errors import HookNameError, close_matches

NamesFilter = str | HookPoint | Callable[[str], bool] | Collection[str | HookPoint] | None
Value = TypeVar("Value")


def match_names(names_filter: NamesFilter, known: Iterable[str]) -> list[str]:
    """The known hook names that a filter selects, in the model's order.

    Args:
        names_filter: an exact name, a glob, a hook point (`vit["blocks.0.hook_mlp_out"]`), a list, tuple or set of
            those, a function of the name, or None for all.
        known: every hook name of the model.

    Raises:
        HookNameError: a name or a glob in it matches nothing.

    Example:
        >>> match_names("blocks.*.hook_resid_post", ["blocks.0.hook_resid_post", "hook_embed"])
        ['blocks.0.hook_resid_post']
    """
    every = dict.fromkeys(known)  # in order, and quick to look up
    if names_filter is None:
        return list(every)
    if isinstance(names_filter, HookPoint):
        names_filter = str(names_filter.name)
    if isinstance(names_filter, str) and names_filter in every:
        return [names_filter]
    if callable(names_filter):
        accepted = [name for name in every if names_filter(name)]
        if not accepted:
            raise HookNameError(
                f"The names_filter function accepts none of the model's {len(every)} hook names."
                " List them with: list(vit.hook_dict)"
            )
        return accepted
    filters = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    patterns = [str(point.name) if isinstance(point, HookPoint) else point for point in filters]
    if not patterns:
        raise HookNameError("An empty list of hook names was given. Pass None for all names.")
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [pattern] if pattern in every else [name for name in every if fnmatchcase(name, pattern)]
        if not matched:
            raise HookNameError(
                f"No hook point matches {pattern!r}.{_close(pattern, every)} List them with: vit.hook_names()"
            )
        chosen.update(matched)
    return [name for name in every if name in chosen]


def _close(pattern: str, known: Collection[str]) -> str:
    """As `close_matches`, for globs too: each word replaced by the one most like it, or the block left open."""
    if not any(sign in pattern for sign in "*?["):
        return close_matches(pattern, known)
    words = {word for name in known for word in name.split(".")}
    mended = ".".join(_mended(word, sorted(words)) for word in pattern.split("."))
    if any(fnmatchcase(name, mended) for name in known):
        return f" Did you mean {mended!r}?"
    return close_matches(pattern, dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in known))


def _mended(word: str, known: list[str]) -> str:
    if word.isdigit() and word not in known:
        return "*"
    return (get_close_matches(word, known, 1, 0.5) or [word])[0]


def pooled(points: Mapping[str, Value]) -> list[tuple[str, int, Value]]:
    """Hook points whose names differ by the block only, and whose values agree, as one: name, how many, value.

    Example:
        >>> pooled({"hook_embed": 5} | {f"blocks.{i}.hook_mlp_out": 5 for i in (0, 1, 2, 4)})
        [('hook_embed', 1, 5), ('blocks.{0..2,4}.hook_mlp_out', 4, 5)]
    """
    groups: dict[tuple[str, Value], list[int]] = {}
    for name, value in points.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        place = name if block is None else f"blocks.{{}}.{name[block.end() :]}"
        groups.setdefault((place, value), []).append(-1 if block is None else int(block[1]))
    return [
        (place if blocks == [-1] else place.replace("{}", _brace(blocks), 1), len(blocks), value)
        for (place, value), blocks in groups.items()
    ]


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as runs of neighbours, first and last of each.

    Example:
        >>> runs([5, 0, 1, 2])
        [(0, 2), (5, 5)]
    """
    joined: list[tuple[int, int]] = []
    for number in sorted(numbers):
        first = joined.pop()[0] if joined and joined[-1][1] == number - 1 else number
        joined.append((first, number))
    return joined


def _brace(numbers: list[int]) -> str:
    """Numbers as {0..3,5}; one stands alone."""
    ranges = ",".join(f"{first}" if first == last else f"{first}..{last}" for first, last in runs(numbers))
    return ranges if len(numbers) == 1 else f"{{{ranges}}}"


TOKENS = "hook_tokens"
"""The point where tokens can be appended: the sequence as it enters block 0."""

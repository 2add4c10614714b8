"""Hook names: exact, as globs, as lists, or as functions; never silently nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase

from registerlens.errors import HookNameError, close_matches

NamesFilter = str | Callable[[str], bool] | Collection[str] | None


def match_names(names_filter: NamesFilter, known: Iterable[str]) -> list[str]:
    """The known hook names that a filter selects, in the model's order.

    Args:
        names_filter: an exact name, a glob, a list, tuple or set of those, a function of the name, or None for all.
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
    patterns = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    if not patterns:
        raise HookNameError("An empty list of hook names was given. Pass None for all names.")
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [pattern] if pattern in every else [name for name in every if fnmatchcase(name, pattern)]
        if not matched:
            raise HookNameError(
                f"No hook point matches {pattern!r}.{close_matches(pattern, every)} List them with: list(vit.hook_dict)"
            )
        chosen.update(matched)
    return [name for name in every if name in chosen]

"""What can be loaded and what cannot, with the reasons, as Markdown made from the registry itself."""

from __future__ import annotations

from itertools import groupby

from registerlens.loading.diagnosis import REFUSED
from registerlens.loading.registry import FAMILIES


def families_markdown() -> str:
    """A table of the supported classes, and lists of what is refused; the README holds it word for word.

    Example:
        >>> print(families_markdown().splitlines()[0])
        | library | class | a name to try | what comes out, and remarks |
    """
    rows = ["| library | class | a name to try | what comes out, and remarks |", "|---|---|---|---|"]
    rows += [
        f"| {family.library} | `{family.source_class}` | `{family.example}` | {family.note} |"
        for family in FAMILIES.values()
    ]
    return "\n".join([*rows, "", "Refused, with the reason in the message:", "", *_refused()])


def _refused() -> list[str]:
    """One line a library: parts that its supported classes can have and we cannot; then transformers' other classes."""
    parts: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        parts.setdefault(family.library, []).extend(refusal.part for refusal in family.refuse)
    inherited = set(parts["timm"])  # open_clip wraps timm's models
    lines = [
        f"- {library}: {'; '.join(sorted({*listed} - (inherited if library != 'timm' else set())))}."
        for library, listed in parts.items()
        if listed
    ]
    known = groupby(sorted((reason, start) for start, reason in REFUSED.items()), key=lambda pair: pair[0])
    others = [f"{', '.join(f'`{start}...`' for _, start in group)} ({why})" for why, group in known]
    return [*lines, f"- transformers' classes {', '.join(others)}."]

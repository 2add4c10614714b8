"""The registry of families: every class that can be loaded, by library and name, and what is said of them in lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

from registerlens.errors import ModelNotFoundError, UnsupportedArchitectureError, close_matches
from registerlens.loading import huggingface, open_clip, timm, torch_hub
from registerlens.loading.diagnosis import REFUSED
from registerlens.loading.family import Family


def _register(families: Iterable[Family]) -> dict[tuple[str, str], Family]:
    registry: dict[tuple[str, str], Family] = {}
    for family in families:
        key = (family.library, family.source_class)
        if key in registry:
            raise UnsupportedArchitectureError(f"Two families claim {key}.")
        registry[key] = family
    return registry


FAMILIES = _register([*huggingface.FAMILIES, *timm.FAMILIES, *open_clip.FAMILIES, *torch_hub.FAMILIES])
"""(library, class name) -> family: every class that `from_module` takes."""


def supported_families() -> list[str]:
    """One line a family: library, class, an example of a name, a note."""
    return [
        f"{family.library:13}{family.source_class:42}{family.example}{'  (' + family.note + ')' if family.note else ''}"
        for family in FAMILIES.values()
    ]


@contextmanager
def listing_families() -> Iterator[None]:
    """Let a refusal end with what is supported."""
    try:
        yield
    except UnsupportedArchitectureError as error:
        families = "".join(f"\n  {line}" for line in supported_families())
        raise UnsupportedArchitectureError(f"{error} Supported families:{families}") from error


def named_family(name: str) -> Family:
    """A family by its class, as "timm:VisionTransformer" or, where only one library has it, "Dinov2Model"; or by
    torch.hub's name of a DINO model.

    Raises:
        ModelNotFoundError: no family has this name, or several have.
    """
    if name in torch_hub.PUBLISHED:
        return torch_hub.PUBLISHED[name].family
    found = [family for key, family in FAMILIES.items() if name in (key[1], ":".join(key))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelNotFoundError(
            f"Several libraries have a {name}: give family= one of {[f'{family.library}:{name}' for family in found]}."
        )
    known = [*torch_hub.PUBLISHED, *(class_name for _, class_name in FAMILIES)]
    raise ModelNotFoundError(
        f"There is no family {name!r}.{close_matches(name, known)} Give a class listed by `registerlens models`, "
        f"'timm:NAME' or 'open_clip:NAME' with the library's name of an architecture, or one of "
        f"{[*torch_hub.PUBLISHED]}."
    )


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

"""The registry: every class that can be loaded, by library and name, and in words what cannot be, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from registerlens.errors import ModelNotFoundError, UnsupportedArchitectureError, close_matches
from registerlens.loading import huggingface, open_clip, timm, torch_hub
from registerlens.loading.family import Family

if TYPE_CHECKING:
    from torch import nn


FAMILIES = {
    (family.library, family.source_class): family
    for families in (huggingface.FAMILIES, timm.FAMILIES, open_clip.FAMILIES, torch_hub.FAMILIES)
    for family in families
}
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
    named = [family for key, family in FAMILIES.items() if name in (key[1], ":".join(key))]
    if len(named) == 1:
        return named[0]
    if named:
        raise ModelNotFoundError(
            f"Several libraries have a {name}: give family= one of {[f'{family.library}:{name}' for family in named]}."
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
    others = [f"{', '.join(f'`{start}...`' for start in sorted(starts))} ({why})" for why, starts in REFUSED.items()]
    return [*lines, f"- transformers' classes {', '.join(others)}."]


REFUSED: dict[str, tuple[str, ...]] = {
    "a convolutional backbone": ("DINOv3ConvNext", "ConvNext"),
    "a learned rotary position for [CLS]": ("MLCD",),
    "a tower of patches in space and time that feeds several layers of the text model": ("Qwen3VL",),
    "a tower of patches in space and time whose neighbours are merged at the end": ("Qwen2VL",),
    "positions by each image's fractional coordinates": ("Idefics2", "Idefics3", "SmolVLM"),
    "relative position biases": ("Beit", "Data2VecVision"),
    "rotary positions for images of mixed sizes packed into one sequence": ("Pixtral",),
    "several [CLS] tokens, whose mean is the output": ("Pixio",),
    "windowed attention": ("Swin",),
    "windowed attention in a tower of patches in space and time": ("Qwen2_5_VL",),
}
"""Why models cannot be loaded -> beginnings of the names of such classes of transformers."""

# Class-name fragments, most telling first.
_PARTS = (
    (("swin", "window"), "windowed attention"),
    (("relativeposition", "relpos"), "relative position biases"),
    (("batchnorm", "frozenbatchnorm"), "BatchNorm layers"),
    (("lstm", "gru", "mamba"), "recurrent layers"),
)

_CONFIG_PARTS = (
    ("window_size", "windowed attention"),
    ("vocab_size", "a text vocabulary: it is a text model"),
    ("depths", "several stages of different resolution"),
    ("num_channels", "an architecture that is no plain ViT"),
)


def parts_of_module(module: nn.Module) -> str:
    """What in a module keeps it from being a plain ViT, as a phrase; empty if nothing tells."""
    from torch import nn  # slow to import

    known = next((reason for part in module.modules() if (reason := _known(type(part).__name__))), "")
    if known:
        return known
    names = [type(part).__name__.lower() for part in module.modules()]
    parts = [
        phrase for fragments, phrase in _PARTS if any(fragment in name for name in names for fragment in fragments)
    ]
    convolutions = sum(isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in module.modules())
    if convolutions > 1:
        parts.insert(0, f"a convolutional stem or backbone ({convolutions} convolutions, a plain ViT has one)")
    if any(isinstance(part, nn.Embedding) and part.num_embeddings > 10_000 for part in module.modules()):
        parts.insert(0, "a text vocabulary")
    return ", ".join(parts)


def _known(class_name: str) -> str:
    return next((why for why, starts in REFUSED.items() if class_name.startswith(starts)), "")


def parts_of_config(config: object, class_name: str = "") -> str:
    """The same from a transformers config object and the name of its class."""
    return _known(class_name) or next((phrase for name, phrase in _CONFIG_PARTS if getattr(config, name, None)), "")


def unsupported(what: str, parts: str) -> UnsupportedArchitectureError:
    """What was found, which part is in the way, and what to do."""
    reason = f" It has {parts}." if parts else ""
    return UnsupportedArchitectureError(
        f"{what} is not a model RegisterLens can load.{reason} Take a model that is, or holds, a plain ViT."
    )

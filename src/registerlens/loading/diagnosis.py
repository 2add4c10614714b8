"""Saying what an unsupported model is, in words a person can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


REFUSED: dict[str, str] = {
    "Qwen2VL": "a tower of patches in space and time whose neighbours are merged at the end",
    "Qwen2_5_VL": "windowed attention in a tower of patches in space and time",
    "Qwen3VL": "a tower of patches in space and time that feeds several layers of the text model",
    "MLCD": "a learned rotary position for [CLS]",
    "Pixio": "several [CLS] tokens, whose mean is the output",
    "Swin": "windowed attention",
    "DINOv3ConvNext": "a convolutional backbone",
    "ConvNext": "a convolutional backbone",
    "Beit": "relative position biases",
    "Data2VecVision": "relative position biases",
    "Idefics2": "positions by each image's fractional coordinates",
    "Idefics3": "positions by each image's fractional coordinates",
    "SmolVLM": "positions by each image's fractional coordinates",
    "Pixtral": "rotary positions for images of mixed sizes packed into one sequence",
}
"""Beginnings of transformers' class names -> why those models cannot be loaded."""

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
    from torch import nn  # noqa: PLC0415  (slow to import)

    known = next((reason for part in module.modules() if (reason := _known(type(part).__name__))), "")
    if known:
        return known
    names = [type(part).__name__.lower() for part in module.modules()]
    found = [
        phrase for fragments, phrase in _PARTS if any(fragment in name for name in names for fragment in fragments)
    ]
    convolutions = sum(isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in module.modules())
    if convolutions > 1:
        found.insert(0, f"a convolutional stem or backbone ({convolutions} convolutions, a plain ViT has one)")
    if any(isinstance(part, nn.Embedding) and part.num_embeddings > 10_000 for part in module.modules()):
        found.insert(0, "a text vocabulary")
    return ", ".join(found)


def _known(class_name: str) -> str:
    return next((reason for start, reason in REFUSED.items() if class_name.startswith(start)), "")


def parts_of_config(config: object, class_name: str = "") -> str:
    """The same from a transformers config object and the name of its class."""
    return _known(class_name) or next((phrase for name, phrase in _CONFIG_PARTS if getattr(config, name, None)), "")


def refusal(found: str, parts: str) -> str:
    """The message: what was found, which part is in the way, and what to do."""
    reason = f" It has {parts}." if parts else ""
    return f"{found} is not a model RegisterLens can load.{reason} Take a model that is, or holds, a plain ViT."

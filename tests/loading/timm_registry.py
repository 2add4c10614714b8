"""What becomes of every name in timm's registry that builds a VisionTransformer or an Eva: no weights are needed.

`python tests/loading/timm_registry.py` goes through all of them.
"""

import re
from collections import defaultdict

import timm
import torch
from timm.models import _registry as registry

from registerlens import HookedViT
from registerlens.errors import UnsupportedArchitectureError

FILES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")
"""timm's files whose models are of these classes."""


def names() -> list[str]:
    """Every registered name of those files."""
    return sorted(name for name in timm.list_models() if registry._model_to_module[name] in FILES)


def outcome(name: str) -> str:
    """Why a model is refused; empty if every one of its weights finds its place. On the meta device, in two blocks."""
    with torch.device("meta"):
        try:
            module = timm.create_model(name, pretrained=False, depth=2)
        except AssertionError:  # settings that differ from block to block
            module = timm.create_model(name, pretrained=False)
    try:
        HookedViT.from_module(module)
    except UnsupportedArchitectureError as refusal:
        return re.sub(r"^timm's \w+: ", "", str(refusal).partition(" Supported families:")[0])
    return ""


if __name__ == "__main__":
    outcomes: dict[str, list[str]] = defaultdict(list)
    for each in names():
        outcomes[outcome(each)].append(each)
    print(f"{len(outcomes.pop('', []))} of {len(names())} supported")
    for reason, refused in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        print(f"{len(refused):4} {reason}\n     {', '.join(refused)}")

"""RegisterLens: every intermediate of a vision transformer has a name.

The public names below are imported on first use, so that `import registerlens` is instant and has no side effects.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registerlens.analysis.outliers import OutlierEvidence
    from registerlens.analysis.trace import Trace, trace
    from registerlens.config import Preprocess, TokenLayout, ViTConfig
    from registerlens.data.images import ImageStream, load_images
    from registerlens.errors import RegisterLensError
    from registerlens.loading import from_module, from_pretrained
    from registerlens.model.vit import HookedViT
    from registerlens.theory.planted import Planted, plant_register_neurons

__version__ = "0.1.0"

_HOMES = {
    "HookedViT": "registerlens.model.vit",
    "ImageStream": "registerlens.data.images",
    "OutlierEvidence": "registerlens.analysis.outliers",
    "Planted": "registerlens.theory.planted",
    "Preprocess": "registerlens.config",
    "RegisterLensError": "registerlens.errors",
    "TokenLayout": "registerlens.config",
    "Trace": "registerlens.analysis.trace",
    "ViTConfig": "registerlens.config",
    "from_module": "registerlens.loading",
    "from_pretrained": "registerlens.loading",
    "load_images": "registerlens.data.images",
    "plant_register_neurons": "registerlens.theory.planted",
    "trace": "registerlens.analysis.trace",
}

__all__ = [
    "HookedViT",
    "ImageStream",
    "OutlierEvidence",
    "Planted",
    "Preprocess",
    "RegisterLensError",
    "TokenLayout",
    "Trace",
    "ViTConfig",
    "from_module",
    "from_pretrained",
    "load_images",
    "plant_register_neurons",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'registerlens' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

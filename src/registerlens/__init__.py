"""RegisterLens: every intermediate of a vision transformer has a name.

The public names below are imported on first use, so that `import registerlens` is instant and has no side effects.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registerlens.analysis.detection import Outliers, find_outliers
    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.analysis.outliers import OutlierEvidence
    from registerlens.analysis.trace import Trace, trace
    from registerlens.config import Preprocess, TokenLayout, ViTConfig
    from registerlens.data.images import ImageStream, load_images
    from registerlens.errors import InterventionError, NoOutliersError, RegisterLensError
    from registerlens.evaluation.effects import Evaluation, evaluate_intervention
    from registerlens.interventions.ablation import Ablate, Heads, Tokens
    from registerlens.interventions.attach import attach
    from registerlens.interventions.attention_bias import AttentionBias
    from registerlens.interventions.interpolation import InterpolateOutliers
    from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
    from registerlens.interventions.search import find_register_neurons
    from registerlens.loading import from_module, from_pretrained
    from registerlens.model.vit import HookedViT
    from registerlens.theory.planted import Planted, plant_register_neurons

__version__ = "0.1.0"

_HOMES = {
    "Ablate": "registerlens.interventions.ablation",
    "AttentionBias": "registerlens.interventions.attention_bias",
    "Evaluation": "registerlens.evaluation.effects",
    "Heads": "registerlens.interventions.ablation",
    "HookedViT": "registerlens.model.vit",
    "ImageStream": "registerlens.data.images",
    "InterpolateOutliers": "registerlens.interventions.interpolation",
    "InterventionError": "registerlens.errors",
    "MoveOutliers": "registerlens.interventions.registers",
    "NoOutliersError": "registerlens.errors",
    "OutlierEvidence": "registerlens.analysis.outliers",
    "Outliers": "registerlens.analysis.detection",
    "Planted": "registerlens.theory.planted",
    "Preprocess": "registerlens.config",
    "RegisterLensError": "registerlens.errors",
    "RegisterNeurons": "registerlens.analysis.neurons",
    "TestTimeRegisters": "registerlens.interventions.registers",
    "TokenLayout": "registerlens.config",
    "Tokens": "registerlens.interventions.ablation",
    "Trace": "registerlens.analysis.trace",
    "ViTConfig": "registerlens.config",
    "attach": "registerlens.interventions.attach",
    "evaluate_intervention": "registerlens.evaluation.effects",
    "find_outliers": "registerlens.analysis.detection",
    "find_register_neurons": "registerlens.interventions.search",
    "from_module": "registerlens.loading",
    "from_pretrained": "registerlens.loading",
    "load_images": "registerlens.data.images",
    "plant_register_neurons": "registerlens.theory.planted",
    "trace": "registerlens.analysis.trace",
}

__all__ = [
    "Ablate",
    "AttentionBias",
    "Evaluation",
    "Heads",
    "HookedViT",
    "ImageStream",
    "InterpolateOutliers",
    "InterventionError",
    "MoveOutliers",
    "NoOutliersError",
    "OutlierEvidence",
    "Outliers",
    "Planted",
    "Preprocess",
    "RegisterLensError",
    "RegisterNeurons",
    "TestTimeRegisters",
    "TokenLayout",
    "Tokens",
    "Trace",
    "ViTConfig",
    "attach",
    "evaluate_intervention",
    "find_outliers",
    "find_register_neurons",
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

"""RegisterLens: every intermediate of a vision transformer has a name.

The public names below are imported on first use, so that `import registerlens` is instant and has no side effects.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registerlens.analysis.detection import Outliers, find_outliers
    from registerlens.analysis.faithfulness import Faithfulness, faithfulness, linear_cka
    from registerlens.analysis.massive import MassiveActivations, massive_activations
    from registerlens.analysis.mechanism import SinkEffects, sink_no_op
    from registerlens.analysis.neuron_evidence import ActivationDistributions, activation_distributions
    from registerlens.analysis.neuron_updates import NeuronUpdates, neuron_updates
    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.analysis.outliers import OutlierEvidence
    from registerlens.analysis.output_weights import OutputWeights, output_weights
    from registerlens.analysis.overlap import Overlap, observable_overlap
    from registerlens.analysis.singular_defects import SingularDefects, singular_defects
    from registerlens.analysis.sink_kinds import SinkKinds, classify_sinks
    from registerlens.analysis.trace import Trace, trace
    from registerlens.config import Preprocess, TokenLayout, ViTConfig
    from registerlens.data.images import ImageStream, load_images
    from registerlens.errors import InterventionError, NoOutliersError, RegisterLensError
    from registerlens.evaluation.causal_order import CausalOrder, causal_order
    from registerlens.evaluation.effects import Evaluation, evaluate_intervention
    from registerlens.evaluation.zero_shot import zero_shot_head
    from registerlens.interventions.ablation import Ablate, Heads, Tokens
    from registerlens.interventions.attach import attach
    from registerlens.interventions.attention_bias import AttentionBias
    from registerlens.interventions.interpolation import InterpolateOutliers
    from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
    from registerlens.interventions.search import find_register_neurons
    from registerlens.loading import from_module, from_pretrained
    from registerlens.model.vit import HookedViT
    from registerlens.theory.corollary import verify_corollary
    from registerlens.theory.general import GeneralModel
    from registerlens.theory.generalisation import verify_generalisation
    from registerlens.theory.kernels import KernelReport, check_kernels
    from registerlens.theory.planted import Planted, plant_register_neurons
    from registerlens.theory.proposition import verify_proposition
    from registerlens.theory.two_block import TwoBlockModel
    from registerlens.theory.value_update import ValueUpdate, value_update

__version__ = "0.1.0"

_HOMES = {
    "Ablate": "registerlens.interventions.ablation",
    "ActivationDistributions": "registerlens.analysis.neuron_evidence",
    "AttentionBias": "registerlens.interventions.attention_bias",
    "CausalOrder": "registerlens.evaluation.causal_order",
    "Evaluation": "registerlens.evaluation.effects",
    "Faithfulness": "registerlens.analysis.faithfulness",
    "GeneralModel": "registerlens.theory.general",
    "Heads": "registerlens.interventions.ablation",
    "HookedViT": "registerlens.model.vit",
    "ImageStream": "registerlens.data.images",
    "InterpolateOutliers": "registerlens.interventions.interpolation",
    "InterventionError": "registerlens.errors",
    "KernelReport": "registerlens.theory.kernels",
    "MassiveActivations": "registerlens.analysis.massive",
    "MoveOutliers": "registerlens.interventions.registers",
    "NeuronUpdates": "registerlens.analysis.neuron_updates",
    "NoOutliersError": "registerlens.errors",
    "OutlierEvidence": "registerlens.analysis.outliers",
    "Outliers": "registerlens.analysis.detection",
    "OutputWeights": "registerlens.analysis.output_weights",
    "Overlap": "registerlens.analysis.overlap",
    "Planted": "registerlens.theory.planted",
    "Preprocess": "registerlens.config",
    "RegisterLensError": "registerlens.errors",
    "RegisterNeurons": "registerlens.analysis.neurons",
    "SingularDefects": "registerlens.analysis.singular_defects",
    "SinkEffects": "registerlens.analysis.mechanism",
    "SinkKinds": "registerlens.analysis.sink_kinds",
    "TestTimeRegisters": "registerlens.interventions.registers",
    "TokenLayout": "registerlens.config",
    "Tokens": "registerlens.interventions.ablation",
    "Trace": "registerlens.analysis.trace",
    "TwoBlockModel": "registerlens.theory.two_block",
    "ValueUpdate": "registerlens.theory.value_update",
    "ViTConfig": "registerlens.config",
    "activation_distributions": "registerlens.analysis.neuron_evidence",
    "attach": "registerlens.interventions.attach",
    "causal_order": "registerlens.evaluation.causal_order",
    "check_kernels": "registerlens.theory.kernels",
    "classify_sinks": "registerlens.analysis.sink_kinds",
    "evaluate_intervention": "registerlens.evaluation.effects",
    "faithfulness": "registerlens.analysis.faithfulness",
    "find_outliers": "registerlens.analysis.detection",
    "find_register_neurons": "registerlens.interventions.search",
    "from_module": "registerlens.loading",
    "from_pretrained": "registerlens.loading",
    "linear_cka": "registerlens.analysis.faithfulness",
    "load_images": "registerlens.data.images",
    "massive_activations": "registerlens.analysis.massive",
    "neuron_updates": "registerlens.analysis.neuron_updates",
    "observable_overlap": "registerlens.analysis.overlap",
    "output_weights": "registerlens.analysis.output_weights",
    "plant_register_neurons": "registerlens.theory.planted",
    "singular_defects": "registerlens.analysis.singular_defects",
    "sink_no_op": "registerlens.analysis.mechanism",
    "trace": "registerlens.analysis.trace",
    "value_update": "registerlens.theory.value_update",
    "verify_corollary": "registerlens.theory.corollary",
    "verify_generalisation": "registerlens.theory.generalisation",
    "verify_proposition": "registerlens.theory.proposition",
    "zero_shot_head": "registerlens.evaluation.zero_shot",
}

__all__ = [
    "Ablate",
    "ActivationDistributions",
    "AttentionBias",
    "CausalOrder",
    "Evaluation",
    "Faithfulness",
    "GeneralModel",
    "Heads",
    "HookedViT",
    "ImageStream",
    "InterpolateOutliers",
    "InterventionError",
    "KernelReport",
    "MassiveActivations",
    "MoveOutliers",
    "NeuronUpdates",
    "NoOutliersError",
    "OutlierEvidence",
    "Outliers",
    "OutputWeights",
    "Overlap",
    "Planted",
    "Preprocess",
    "RegisterLensError",
    "RegisterNeurons",
    "SingularDefects",
    "SinkEffects",
    "SinkKinds",
    "TestTimeRegisters",
    "TokenLayout",
    "Tokens",
    "Trace",
    "TwoBlockModel",
    "ValueUpdate",
    "ViTConfig",
    "activation_distributions",
    "attach",
    "causal_order",
    "check_kernels",
    "classify_sinks",
    "evaluate_intervention",
    "faithfulness",
    "find_outliers",
    "find_register_neurons",
    "from_module",
    "from_pretrained",
    "linear_cka",
    "load_images",
    "massive_activations",
    "neuron_updates",
    "observable_overlap",
    "output_weights",
    "plant_register_neurons",
    "singular_defects",
    "sink_no_op",
    "trace",
    "value_update",
    "verify_corollary",
    "verify_generalisation",
    "verify_proposition",
    "zero_shot_head",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'registerlens' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

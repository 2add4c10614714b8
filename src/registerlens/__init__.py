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
    from registerlens.data.hub_sources import HuggingFaceSource
    from registerlens.data.images import ImageStream, load_images
    from registerlens.data.sources import FolderSource, TensorSource
    from registerlens.data.tar_sources import WebDatasetSource
    from registerlens.errors import (
        BackendError,
        InterventionError,
        NoOutliersError,
        RegisterLensError,
        SourceError,
        StoreError,
    )
    from registerlens.evaluation.causal_order import CausalOrder, causal_order
    from registerlens.evaluation.effects import Evaluation, evaluate_intervention
    from registerlens.evaluation.zero_shot import zero_shot_head
    from registerlens.interventions.ablation import Ablate
    from registerlens.interventions.attach import attach
    from registerlens.interventions.attention_bias import AttentionBias
    from registerlens.interventions.interpolation import InterpolateOutliers
    from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
    from registerlens.interventions.scaling import Scale
    from registerlens.interventions.search import find_register_neurons
    from registerlens.interventions.targets import Heads, Tokens
    from registerlens.loading import from_module, from_pretrained
    from registerlens.model.vit import HookedViT
    from registerlens.sweep.attribution import EdgeAttribution, attribute_edges
    from registerlens.sweep.conditions import Condition
    from registerlens.sweep.controls import with_controls
    from registerlens.sweep.dry_run import SweepPlan, plan_sweep
    from registerlens.sweep.fitting import fit_conditions
    from registerlens.sweep.grid import Conditions, grid, product
    from registerlens.sweep.metrics import Metric, View, default_metrics, metric
    from registerlens.sweep.planned import ablation
    from registerlens.sweep.ray import RayBackend
    from registerlens.sweep.result import Comparison, SweepResult
    from registerlens.sweep.run import read_sweep, run_sweep
    from registerlens.sweep.scale_plan import Rates, scale_plan
    from registerlens.sweep.screening import Screening, screen_neurons
    from registerlens.sweep.status import SweepStatus, sweep_status
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
    "BackendError": "registerlens.errors",
    "CausalOrder": "registerlens.evaluation.causal_order",
    "Comparison": "registerlens.sweep.result",
    "Condition": "registerlens.sweep.conditions",
    "Conditions": "registerlens.sweep.grid",
    "EdgeAttribution": "registerlens.sweep.attribution",
    "Evaluation": "registerlens.evaluation.effects",
    "Faithfulness": "registerlens.analysis.faithfulness",
    "FolderSource": "registerlens.data.sources",
    "GeneralModel": "registerlens.theory.general",
    "Heads": "registerlens.interventions.targets",
    "HookedViT": "registerlens.model.vit",
    "HuggingFaceSource": "registerlens.data.hub_sources",
    "ImageStream": "registerlens.data.images",
    "InterpolateOutliers": "registerlens.interventions.interpolation",
    "InterventionError": "registerlens.errors",
    "KernelReport": "registerlens.theory.kernels",
    "MassiveActivations": "registerlens.analysis.massive",
    "Metric": "registerlens.sweep.metrics",
    "MoveOutliers": "registerlens.interventions.registers",
    "NeuronUpdates": "registerlens.analysis.neuron_updates",
    "NoOutliersError": "registerlens.errors",
    "OutlierEvidence": "registerlens.analysis.outliers",
    "Outliers": "registerlens.analysis.detection",
    "OutputWeights": "registerlens.analysis.output_weights",
    "Overlap": "registerlens.analysis.overlap",
    "Planted": "registerlens.theory.planted",
    "Preprocess": "registerlens.config",
    "Rates": "registerlens.sweep.scale_plan",
    "RayBackend": "registerlens.sweep.ray",
    "RegisterLensError": "registerlens.errors",
    "RegisterNeurons": "registerlens.analysis.neurons",
    "Scale": "registerlens.interventions.scaling",
    "Screening": "registerlens.sweep.screening",
    "SingularDefects": "registerlens.analysis.singular_defects",
    "SinkEffects": "registerlens.analysis.mechanism",
    "SinkKinds": "registerlens.analysis.sink_kinds",
    "SourceError": "registerlens.errors",
    "StoreError": "registerlens.errors",
    "SweepPlan": "registerlens.sweep.dry_run",
    "SweepResult": "registerlens.sweep.result",
    "SweepStatus": "registerlens.sweep.status",
    "TensorSource": "registerlens.data.sources",
    "TestTimeRegisters": "registerlens.interventions.registers",
    "TokenLayout": "registerlens.config",
    "Tokens": "registerlens.interventions.targets",
    "Trace": "registerlens.analysis.trace",
    "TwoBlockModel": "registerlens.theory.two_block",
    "ValueUpdate": "registerlens.theory.value_update",
    "ViTConfig": "registerlens.config",
    "View": "registerlens.sweep.metrics",
    "WebDatasetSource": "registerlens.data.tar_sources",
    "ablation": "registerlens.sweep.planned",
    "activation_distributions": "registerlens.analysis.neuron_evidence",
    "attach": "registerlens.interventions.attach",
    "attribute_edges": "registerlens.sweep.attribution",
    "causal_order": "registerlens.evaluation.causal_order",
    "check_kernels": "registerlens.theory.kernels",
    "classify_sinks": "registerlens.analysis.sink_kinds",
    "default_metrics": "registerlens.sweep.metrics",
    "evaluate_intervention": "registerlens.evaluation.effects",
    "faithfulness": "registerlens.analysis.faithfulness",
    "find_outliers": "registerlens.analysis.detection",
    "find_register_neurons": "registerlens.interventions.search",
    "fit_conditions": "registerlens.sweep.fitting",
    "from_module": "registerlens.loading",
    "from_pretrained": "registerlens.loading",
    "grid": "registerlens.sweep.grid",
    "linear_cka": "registerlens.analysis.faithfulness",
    "load_images": "registerlens.data.images",
    "massive_activations": "registerlens.analysis.massive",
    "metric": "registerlens.sweep.metrics",
    "neuron_updates": "registerlens.analysis.neuron_updates",
    "observable_overlap": "registerlens.analysis.overlap",
    "output_weights": "registerlens.analysis.output_weights",
    "plan_sweep": "registerlens.sweep.dry_run",
    "plant_register_neurons": "registerlens.theory.planted",
    "product": "registerlens.sweep.grid",
    "read_sweep": "registerlens.sweep.run",
    "run_sweep": "registerlens.sweep.run",
    "scale_plan": "registerlens.sweep.scale_plan",
    "screen_neurons": "registerlens.sweep.screening",
    "singular_defects": "registerlens.analysis.singular_defects",
    "sink_no_op": "registerlens.analysis.mechanism",
    "sweep_status": "registerlens.sweep.status",
    "trace": "registerlens.analysis.trace",
    "value_update": "registerlens.theory.value_update",
    "verify_corollary": "registerlens.theory.corollary",
    "verify_generalisation": "registerlens.theory.generalisation",
    "verify_proposition": "registerlens.theory.proposition",
    "with_controls": "registerlens.sweep.controls",
    "zero_shot_head": "registerlens.evaluation.zero_shot",
}

__all__ = [
    "Ablate",
    "ActivationDistributions",
    "AttentionBias",
    "BackendError",
    "CausalOrder",
    "Comparison",
    "Condition",
    "Conditions",
    "EdgeAttribution",
    "Evaluation",
    "Faithfulness",
    "FolderSource",
    "GeneralModel",
    "Heads",
    "HookedViT",
    "HuggingFaceSource",
    "ImageStream",
    "InterpolateOutliers",
    "InterventionError",
    "KernelReport",
    "MassiveActivations",
    "Metric",
    "MoveOutliers",
    "NeuronUpdates",
    "NoOutliersError",
    "OutlierEvidence",
    "Outliers",
    "OutputWeights",
    "Overlap",
    "Planted",
    "Preprocess",
    "Rates",
    "RayBackend",
    "RegisterLensError",
    "RegisterNeurons",
    "Scale",
    "Screening",
    "SingularDefects",
    "SinkEffects",
    "SinkKinds",
    "SourceError",
    "StoreError",
    "SweepPlan",
    "SweepResult",
    "SweepStatus",
    "TensorSource",
    "TestTimeRegisters",
    "TokenLayout",
    "Tokens",
    "Trace",
    "TwoBlockModel",
    "ValueUpdate",
    "ViTConfig",
    "View",
    "WebDatasetSource",
    "ablation",
    "activation_distributions",
    "attach",
    "attribute_edges",
    "causal_order",
    "check_kernels",
    "classify_sinks",
    "default_metrics",
    "evaluate_intervention",
    "faithfulness",
    "find_outliers",
    "find_register_neurons",
    "fit_conditions",
    "from_module",
    "from_pretrained",
    "grid",
    "linear_cka",
    "load_images",
    "massive_activations",
    "metric",
    "neuron_updates",
    "observable_overlap",
    "output_weights",
    "plan_sweep",
    "plant_register_neurons",
    "product",
    "read_sweep",
    "run_sweep",
    "scale_plan",
    "screen_neurons",
    "singular_defects",
    "sink_no_op",
    "sweep_status",
    "trace",
    "value_update",
    "verify_corollary",
    "verify_generalisation",
    "verify_proposition",
    "with_controls",
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

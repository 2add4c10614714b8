"""RegisterLens: every intermediate of a vision transformer has a name.

The public names below are imported on first use, so that `import registerlens` is instant and has no side effects.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registerlens.analysis.detection import Outliers, find_outliers
    from registerlens.analysis.faithfulness import Faithfulness, faithfulness, linear_cka
    from registerlens.analysis.local_information import LocalInformation, local_information
    from registerlens.analysis.maps import NeuronMaps, neuron_maps
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
    from registerlens.circuits.attention_circuit import attention_circuit
    from registerlens.circuits.attribution_patching import attribution_patching
    from registerlens.circuits.attributions import Attributions
    from registerlens.circuits.direct import DirectContributions, direct_contributions
    from registerlens.circuits.edge_attribution import EdgeAttribution, attribute_edges
    from registerlens.circuits.heads import HeadCircuits, head_circuits
    from registerlens.circuits.key_share import KeyShare, key_share
    from registerlens.circuits.lens import PatchLens, patch_lens
    from registerlens.circuits.paths import PathEffects, path_patching
    from registerlens.circuits.records import AttentionCircuit
    from registerlens.circuits.screening import Screening, screen_neurons
    from registerlens.circuits.sites import Site
    from registerlens.config import Preprocess, TokenLayout, ViTConfig
    from registerlens.data.examples import example_images
    from registerlens.data.hub_sources import HuggingFaceSource
    from registerlens.data.images import ImageStream, load_images
    from registerlens.data.sources import FolderSource, TensorSource
    from registerlens.data.tar_sources import WebDatasetSource
    from registerlens.emergence.config import TrainingConfig
    from registerlens.emergence.criteria import EmergenceCriteria, emergence_criteria
    from registerlens.emergence.dynamics import Dynamics, training_dynamics
    from registerlens.emergence.research import results_table
    from registerlens.emergence.run import TrainingRun
    from registerlens.emergence.training import train
    from registerlens.engine.ray import RayBackend
    from registerlens.engine.views import View
    from registerlens.errors import (
        BackendError,
        DivergedError,
        InterventionError,
        NoOutliersError,
        RegisterLensError,
        SourceError,
        StoreError,
    )
    from registerlens.evaluation.causal_order import CausalOrder, causal_order
    from registerlens.evaluation.comparison import InterventionMaps, compare_maps
    from registerlens.evaluation.effects import Evaluation, evaluate_intervention
    from registerlens.evaluation.metrics import Metric, default_metrics, metric
    from registerlens.evaluation.shifts import OutlierShift, RandomPatches, measure_shift
    from registerlens.evaluation.zero_shot import zero_shot_head
    from registerlens.explorer.explorer import Explorer, explore
    from registerlens.interventions.ablation import Ablate
    from registerlens.interventions.attach import attach
    from registerlens.interventions.attention_bias import AttentionBias
    from registerlens.interventions.interpolation import InterpolateOutliers
    from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
    from registerlens.interventions.scaling import Scale
    from registerlens.interventions.search import find_register_neurons
    from registerlens.interventions.targets import Heads, Tokens
    from registerlens.loading import from_module, from_pretrained
    from registerlens.model.summary import ModelSummary
    from registerlens.model.vit import HookedViT
    from registerlens.sweep.conditions import Condition
    from registerlens.sweep.controls import with_controls
    from registerlens.sweep.dry_run import SweepPlan, plan_sweep
    from registerlens.sweep.fitting import fit_conditions
    from registerlens.sweep.grid import Conditions, grid, product
    from registerlens.sweep.planned import ablation
    from registerlens.sweep.result import Comparison, SweepResult
    from registerlens.sweep.run import read_sweep, run_sweep
    from registerlens.sweep.status import SweepStatus, sweep_status
    from registerlens.theory.corollary import verify_corollary
    from registerlens.theory.general import GeneralModel
    from registerlens.theory.generalisation import verify_generalisation
    from registerlens.theory.kernels import KernelReport, check_kernels
    from registerlens.theory.planted import Planted, plant_register_neurons
    from registerlens.theory.proposition import verify_proposition
    from registerlens.theory.two_block import TwoBlockModel
    from registerlens.theory.value_update import ValueUpdate, value_update
    from registerlens.viz.attention import AttentionView, attention_heads
    from registerlens.viz.overlay import overlay
    from registerlens.viz.paper import paper_figure, paper_figures
    from registerlens.viz.sizes import save_figure, sized
    from registerlens.viz.styled import styled

__version__ = "0.1.0"

_HOMES = {
    "Ablate": "registerlens.interventions.ablation",
    "ActivationDistributions": "registerlens.analysis.neuron_evidence",
    "AttentionBias": "registerlens.interventions.attention_bias",
    "AttentionCircuit": "registerlens.circuits.records",
    "AttentionView": "registerlens.viz.attention",
    "Attributions": "registerlens.circuits.attributions",
    "BackendError": "registerlens.errors",
    "CausalOrder": "registerlens.evaluation.causal_order",
    "Comparison": "registerlens.sweep.result",
    "Condition": "registerlens.sweep.conditions",
    "Conditions": "registerlens.sweep.grid",
    "DirectContributions": "registerlens.circuits.direct",
    "DivergedError": "registerlens.errors",
    "Dynamics": "registerlens.emergence.dynamics",
    "EdgeAttribution": "registerlens.circuits.edge_attribution",
    "EmergenceCriteria": "registerlens.emergence.criteria",
    "Evaluation": "registerlens.evaluation.effects",
    "Explorer": "registerlens.explorer.explorer",
    "Faithfulness": "registerlens.analysis.faithfulness",
    "FolderSource": "registerlens.data.sources",
    "GeneralModel": "registerlens.theory.general",
    "HeadCircuits": "registerlens.circuits.heads",
    "Heads": "registerlens.interventions.targets",
    "HookedViT": "registerlens.model.vit",
    "HuggingFaceSource": "registerlens.data.hub_sources",
    "ImageStream": "registerlens.data.images",
    "InterpolateOutliers": "registerlens.interventions.interpolation",
    "InterventionError": "registerlens.errors",
    "InterventionMaps": "registerlens.evaluation.comparison",
    "KernelReport": "registerlens.theory.kernels",
    "KeyShare": "registerlens.circuits.key_share",
    "LocalInformation": "registerlens.analysis.local_information",
    "MassiveActivations": "registerlens.analysis.massive",
    "Metric": "registerlens.evaluation.metrics",
    "ModelSummary": "registerlens.model.summary",
    "MoveOutliers": "registerlens.interventions.registers",
    "NeuronMaps": "registerlens.analysis.maps",
    "NeuronUpdates": "registerlens.analysis.neuron_updates",
    "NoOutliersError": "registerlens.errors",
    "OutlierEvidence": "registerlens.analysis.outliers",
    "OutlierShift": "registerlens.evaluation.shifts",
    "Outliers": "registerlens.analysis.detection",
    "OutputWeights": "registerlens.analysis.output_weights",
    "Overlap": "registerlens.analysis.overlap",
    "PatchLens": "registerlens.circuits.lens",
    "PathEffects": "registerlens.circuits.paths",
    "Planted": "registerlens.theory.planted",
    "Preprocess": "registerlens.config",
    "RandomPatches": "registerlens.evaluation.shifts",
    "RayBackend": "registerlens.engine.ray",
    "RegisterLensError": "registerlens.errors",
    "RegisterNeurons": "registerlens.analysis.neurons",
    "Scale": "registerlens.interventions.scaling",
    "Screening": "registerlens.circuits.screening",
    "SingularDefects": "registerlens.analysis.singular_defects",
    "SinkEffects": "registerlens.analysis.mechanism",
    "SinkKinds": "registerlens.analysis.sink_kinds",
    "Site": "registerlens.circuits.sites",
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
    "TrainingConfig": "registerlens.emergence.config",
    "TrainingRun": "registerlens.emergence.run",
    "TwoBlockModel": "registerlens.theory.two_block",
    "ValueUpdate": "registerlens.theory.value_update",
    "ViTConfig": "registerlens.config",
    "View": "registerlens.engine.views",
    "WebDatasetSource": "registerlens.data.tar_sources",
    "ablation": "registerlens.sweep.planned",
    "activation_distributions": "registerlens.analysis.neuron_evidence",
    "attach": "registerlens.interventions.attach",
    "attention_circuit": "registerlens.circuits.attention_circuit",
    "attention_heads": "registerlens.viz.attention",
    "attribute_edges": "registerlens.circuits.edge_attribution",
    "attribution_patching": "registerlens.circuits.attribution_patching",
    "causal_order": "registerlens.evaluation.causal_order",
    "check_kernels": "registerlens.theory.kernels",
    "classify_sinks": "registerlens.analysis.sink_kinds",
    "compare_maps": "registerlens.evaluation.comparison",
    "default_metrics": "registerlens.evaluation.metrics",
    "direct_contributions": "registerlens.circuits.direct",
    "emergence_criteria": "registerlens.emergence.criteria",
    "evaluate_intervention": "registerlens.evaluation.effects",
    "example_images": "registerlens.data.examples",
    "explore": "registerlens.explorer.explorer",
    "faithfulness": "registerlens.analysis.faithfulness",
    "find_outliers": "registerlens.analysis.detection",
    "find_register_neurons": "registerlens.interventions.search",
    "fit_conditions": "registerlens.sweep.fitting",
    "from_module": "registerlens.loading",
    "from_pretrained": "registerlens.loading",
    "grid": "registerlens.sweep.grid",
    "head_circuits": "registerlens.circuits.heads",
    "key_share": "registerlens.circuits.key_share",
    "linear_cka": "registerlens.analysis.faithfulness",
    "load_images": "registerlens.data.images",
    "local_information": "registerlens.analysis.local_information",
    "massive_activations": "registerlens.analysis.massive",
    "measure_shift": "registerlens.evaluation.shifts",
    "metric": "registerlens.evaluation.metrics",
    "neuron_maps": "registerlens.analysis.maps",
    "neuron_updates": "registerlens.analysis.neuron_updates",
    "observable_overlap": "registerlens.analysis.overlap",
    "output_weights": "registerlens.analysis.output_weights",
    "overlay": "registerlens.viz.overlay",
    "paper_figure": "registerlens.viz.paper",
    "paper_figures": "registerlens.viz.paper",
    "patch_lens": "registerlens.circuits.lens",
    "path_patching": "registerlens.circuits.paths",
    "plan_sweep": "registerlens.sweep.dry_run",
    "plant_register_neurons": "registerlens.theory.planted",
    "product": "registerlens.sweep.grid",
    "read_sweep": "registerlens.sweep.run",
    "results_table": "registerlens.emergence.research",
    "run_sweep": "registerlens.sweep.run",
    "save_figure": "registerlens.viz.sizes",
    "screen_neurons": "registerlens.circuits.screening",
    "singular_defects": "registerlens.analysis.singular_defects",
    "sink_no_op": "registerlens.analysis.mechanism",
    "sized": "registerlens.viz.sizes",
    "styled": "registerlens.viz.styled",
    "sweep_status": "registerlens.sweep.status",
    "trace": "registerlens.analysis.trace",
    "train": "registerlens.emergence.training",
    "training_dynamics": "registerlens.emergence.dynamics",
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
    "AttentionCircuit",
    "AttentionView",
    "Attributions",
    "BackendError",
    "CausalOrder",
    "Comparison",
    "Condition",
    "Conditions",
    "DirectContributions",
    "DivergedError",
    "Dynamics",
    "EdgeAttribution",
    "EmergenceCriteria",
    "Evaluation",
    "Explorer",
    "Faithfulness",
    "FolderSource",
    "GeneralModel",
    "HeadCircuits",
    "Heads",
    "HookedViT",
    "HuggingFaceSource",
    "ImageStream",
    "InterpolateOutliers",
    "InterventionError",
    "InterventionMaps",
    "KernelReport",
    "KeyShare",
    "LocalInformation",
    "MassiveActivations",
    "Metric",
    "ModelSummary",
    "MoveOutliers",
    "NeuronMaps",
    "NeuronUpdates",
    "NoOutliersError",
    "OutlierEvidence",
    "OutlierShift",
    "Outliers",
    "OutputWeights",
    "Overlap",
    "PatchLens",
    "PathEffects",
    "Planted",
    "Preprocess",
    "RandomPatches",
    "RayBackend",
    "RegisterLensError",
    "RegisterNeurons",
    "Scale",
    "Screening",
    "SingularDefects",
    "SinkEffects",
    "SinkKinds",
    "Site",
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
    "TrainingConfig",
    "TrainingRun",
    "TwoBlockModel",
    "ValueUpdate",
    "ViTConfig",
    "View",
    "WebDatasetSource",
    "ablation",
    "activation_distributions",
    "attach",
    "attention_circuit",
    "attention_heads",
    "attribute_edges",
    "attribution_patching",
    "causal_order",
    "check_kernels",
    "classify_sinks",
    "compare_maps",
    "default_metrics",
    "direct_contributions",
    "emergence_criteria",
    "evaluate_intervention",
    "example_images",
    "explore",
    "faithfulness",
    "find_outliers",
    "find_register_neurons",
    "fit_conditions",
    "from_module",
    "from_pretrained",
    "grid",
    "head_circuits",
    "key_share",
    "linear_cka",
    "load_images",
    "local_information",
    "massive_activations",
    "measure_shift",
    "metric",
    "neuron_maps",
    "neuron_updates",
    "observable_overlap",
    "output_weights",
    "overlay",
    "paper_figure",
    "paper_figures",
    "patch_lens",
    "path_patching",
    "plan_sweep",
    "plant_register_neurons",
    "product",
    "read_sweep",
    "results_table",
    "run_sweep",
    "save_figure",
    "screen_neurons",
    "singular_defects",
    "sink_no_op",
    "sized",
    "styled",
    "sweep_status",
    "trace",
    "train",
    "training_dynamics",
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

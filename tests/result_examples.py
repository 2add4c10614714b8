"""A small real example of every class that can be saved, made by the package's own functions, once a process."""

from functools import cache

import numpy as np
import torch
from helpers import randomise
from planted_sweeps import ablated, clean, result_of

import registerlens as rl
from registerlens.analysis.detection import Cutoff
from registerlens.data.synthetic import synthetic_images
from registerlens.emergence.config import TrainingConfig
from registerlens.emergence.run import TrainingRun, labels_of
from registerlens.emergence.training import initial_vit
from registerlens.evaluation.comparison import compare_maps
from registerlens.evaluation.shifts import measure_shift
from registerlens.interventions.ablation import Scale
from registerlens.loading.native import save
from registerlens.sweep.conditions import PlannedAblation, PlannedBias
from registerlens.theory.generalisation import verify_generalisation

PAIRS = [(1, n) for n in (183, 103, 219, 125, 55, 128, 177)]
NEURONS = rl.RegisterNeurons.from_pairs(PAIRS)


@cache
def tiny():
    """The embedded model, in which register neurons emerged."""
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@cache
def images(n=16):
    return synthetic_images(n, 0).images


@cache
def search():
    return rl.find_register_neurons(tiny(), images(32), top_k=2)


@cache
def on_planted():
    """A small model with [CLS] and planted register neurons, and images."""
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=3, d_mlp=40, image_size=(64, 64), patch_size=(8, 8), d_out=5)
    vit, truth = rl.plant_register_neurons(randomise(rl.HookedViT(cfg), std=0.15), layer=1, n=2)
    return vit, truth.calibration[:4]


def dynamics(folder):
    """Of a run whose checkpoints are random weights, and the embedded model's."""
    config = TrainingConfig(steps=400, log_every=100)
    run, vit, last = TrainingRun.make(folder / "run", config), initial_vit(config), tiny().state_dict()
    for step, share in ((0, 0.0), (200, 0.5), (400, 1.0)):
        mixed = {name: torch.lerp(first, last[name], share) for name, first in initial_vit(config).state_dict().items()}
        vit.load_state_dict(mixed)
        save(vit, run.checkpoint(step))
    return rl.emergence.training_dynamics(run, NEURONS, n_images=8)


def criteria():
    batch = synthetic_images(64, 2002)
    return rl.emergence.emergence_criteria(tiny(), batch.images, labels_of(batch, tiny().layout(batch.images)))


def sweep():
    rng, conditions = np.random.default_rng(0), [clean(), ablated(1, 183), ablated(1, 103)]
    return result_of(conditions, {"norm": rng.normal(size=(3, 6)), "share": rng.random((3, 6))})


MAKERS = {
    "RegisterNeurons": search,
    "NeuronSearch": lambda: search().search,
    "Trace": lambda: rl.trace(tiny(), images()),
    "Outliers": lambda: rl.find_outliers(tiny(), images()),
    "Faithfulness": lambda: rl.analysis.faithfulness(*on_planted()),
    "LocalInformation": lambda: rl.analysis.local_information(tiny(), synthetic_images(300, 5).images, batch_size=64),
    "MassiveActivations": lambda: rl.analysis.massive_activations(tiny(), images()),
    "SinkEffects": lambda: rl.analysis.sink_no_op(tiny(), images(), edits=["zero", "mean"]),
    "ActivationDistributions": lambda: rl.analysis.activation_distributions(tiny(), images(), NEURONS),
    "NeuronUpdates": lambda: rl.analysis.neuron_updates(tiny(), images(), NEURONS, draws=5),
    "OutputWeights": lambda: rl.analysis.output_weights(tiny(), NEURONS, draws=5),
    "Overlap": lambda: rl.analysis.observable_overlap(tiny(), images()),
    "SingularDefects": lambda: rl.analysis.singular_defects(tiny(), images()),
    "SinkKinds": lambda: rl.analysis.classify_sinks(tiny(), images()),
    "AttentionCircuit": lambda: rl.attention_circuit(tiny(), images(4), NEURONS),
    "Attributions": lambda: rl.circuits.attribution_patching(
        tiny(), images()[:3], images()[3:6], "blocks.1.mlp.hook_post", metric="largest_norm", exact=2, sample=2
    ),
    "PathEffects": lambda: rl.circuits.path_patching(
        tiny(), images()[:3], images()[3:6], "blocks.1.mlp.hook_post", "blocks.*.attn.hook_q", metric="largest_norm"
    ),
    "DirectContributions": lambda: rl.circuits.direct_contributions(
        *on_planted(), 1, detection=rl.find_outliers(*on_planted(), layer=1).detection
    ),
    "HeadCircuits": lambda: rl.circuits.head_circuits(tiny(), NEURONS, n_null=20),
    "KeyShare": lambda: rl.circuits.key_share(tiny(), images(), NEURONS, n_null=20),
    "PatchLens": lambda: rl.circuits.patch_lens(tiny(), images(3)),
    "CausalOrder": lambda: rl.evaluation.causal_order(
        tiny(), images(), rl.RegisterNeurons.from_pairs([*PAIRS, (3, 5)])
    ),
    "KernelReport": lambda: rl.check_kernels(tiny(), NEURONS.filter(top=2), images=images()),
    "ValueUpdate": lambda: rl.theory.value_update(tiny(), images(), NEURONS, registers=[1, 2]),
    "Evaluation": lambda: rl.evaluate_intervention(tiny(), images(), rl.TestTimeRegisters(NEURONS), controls=False),
    "Diagnosis": lambda: rl.diagnose(tiny(), images(), evaluated=4),
    "EmergenceCriteria": criteria,
    "Dynamics": dynamics,
    "InterventionMaps": lambda: compare_maps(
        tiny(), images(2), {"clean": None, "edited": rl.TestTimeRegisters(NEURONS)}, layers=[1, 4]
    ),
    "Pruning": lambda: rl.evaluation.prune(tiny(), images(), NEURONS),
    "OutlierShift": lambda: measure_shift(tiny(), images(), rl.MoveOutliers(NEURONS, 7), layer=4),
    "EdgeAttribution": lambda: rl.circuits.attribute_edges(tiny(), images(), NEURONS),
    "SweepResult": sweep,
    "Comparison": lambda: (found := sweep()).compare(*found.conditions[:2], "norm"),
    "PatchMaps": lambda: rl.analysis.patch_maps(tiny(), images(2), [0, 5]),
    "NeuronMaps": lambda: rl.analysis.neuron_maps(tiny(), images(2), PAIRS[:2]),
    "Screening": lambda: rl.circuits.screen_neurons(tiny(), images(), layers=[1], exact=2, sample=2),
    "PropositionReport": lambda: rl.theory.verify_proposition(rl.theory.TwoBlockModel.build()),
    "CorollaryReport": lambda: rl.theory.verify_corollary(rl.theory.TwoBlockModel.build()),
    "GeneralReport": lambda: verify_generalisation(rl.theory.GeneralModel.build(rl.theory.TwoBlockModel.build())),
    "Ablate": lambda: rl.Ablate.fit(tiny(), images(), rl.Heads([(2, 0)]), mode="resample"),
    "MoveOutliers": lambda: rl.MoveOutliers(NEURONS, torch.eye(6).bool(), extreme="shared", fill="mean"),
    "TestTimeRegisters": lambda: rl.TestTimeRegisters(NEURONS, n=2, init="gaussian", maxima_of=NEURONS),
    "AttentionBias": lambda: rl.AttentionBias.fit(tiny(), images(), NEURONS),
    "InterpolateOutliers": lambda: rl.InterpolateOutliers("1.attn", Cutoff(value=2.5, relative=True)),
    "Scale": lambda: Scale(rl.Tokens(1, [0, 3]), 0.25),
    "PlannedAblation": lambda: PlannedAblation(NEURONS, "mean", fitted=rl.Ablate.fit(tiny(), images(), NEURONS)),
    "PlannedBias": lambda: PlannedBias(NEURONS),
}

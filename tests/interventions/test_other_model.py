"""Neurons found in one model and used in another: a warning with both names, at every door, unless it is meant."""

import dataclasses
import sys
import warnings

import numpy as np
import pytest
import torch
from result_examples import images, search, tiny

import registerlens as rl
from registerlens.analysis.neurons import OtherModelWarning
from registerlens.errors import InterventionError
from registerlens.evaluation.controls import ConditionKind, judge_effect
from registerlens.theory.planted import _copy
from registerlens.viz import study


@pytest.fixture
def other():
    vit = _copy(tiny())
    with torch.no_grad():
        vit.blocks[2].mlp.out.weight *= 1.5
    return vit


def edited(vit, neurons):
    with vit.edit(rl.TestTimeRegisters(neurons)):
        vit(images(2))


DOORS = {
    "edit": edited,
    "ablate": lambda vit, neurons: rl.run_sweep(vit, images(2), [("mine", rl.Ablate(neurons))]),
    "evaluate": lambda vit, neurons: rl.evaluate_intervention(vit, images(), rl.Ablate(neurons), controls=False),
    "kernels": rl.check_kernels,
    "circuit": lambda vit, neurons: rl.attention_circuit(vit, images(4), neurons, check=False),
    "bias": lambda vit, neurons: rl.AttentionBias.fit(vit, images(2), neurons),
}


@pytest.mark.parametrize("door", DOORS)
def test_both_names_are_told(door, other):
    with pytest.warns(OtherModelWarning, match="found in registerlens:tiny .* used in registerlens:tiny, planted"):
        DOORS[door](other, search())
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherModelWarning)
        DOORS[door](other, search().taken_for(other))
        DOORS[door](tiny(), search())
        DOORS[door](other, rl.RegisterNeurons.from_pairs(search().pairs))


def test_the_same_weights_in_another_library_are_the_same_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    own = rl.RegisterNeurons.from_pairs([(0, 3)]).taken_for(rl.from_module(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherModelWarning)
        rl.attach(model, rl.TestTimeRegisters(own)).remove()
        rl.from_module(model).half().edit(rl.TestTimeRegisters(own))
    with pytest.warns(OtherModelWarning):
        rl.attach(model, rl.TestTimeRegisters(search().filter(layers=[1], top=1, where=lambda *_: False))).remove()


def test_a_circuit_stops_where_no_head_looks_at_outliers(monkeypatch):
    most = rl.attention_circuit(tiny(), images(4), search(), check=False).nodes["attention"].max()
    monkeypatch.setattr(sys.modules["registerlens.circuits.attention_circuit"], "LOOKS", most + 0.01)
    words = f"No head after block 1 looks at the outliers: the most that one of them pays these is {most:.2%}"
    with pytest.raises(InterventionError, match=words):
        rl.attention_circuit(tiny(), images(4), search(), check=False)


def test_heads_whose_sinks_are_edited_come_after_the_onset_and_look_at_outliers():
    detection = rl.find_outliers(tiny(), images()).detection
    sinks = rl.analysis.classify_sinks(tiny(), images(), queries=0.5)
    layers = study._effects(tiny(), images(8), sinks, detection).events.nonzero()[0]
    assert len(layers) and layers.min() >= 2
    first = dataclasses.replace(sinks, places=sinks.places * (torch.arange(6) < 2).int().numpy()[:, None])
    with pytest.raises(InterventionError, match="none to edit"):
        study._effects(tiny(), images(8), first, detection)


def test_a_register_of_random_neurons_that_draws_as_much_is_told():
    kinds = {"clean": ConditionKind.CLEAN, "mine": ConditionKind.TESTED, "random 1": ConditionKind.CONTROL}
    metrics = ["outliers", "old_outliers", "new_outliers", "sink_outliers", "sink_elsewhere", "sink_register"]
    clean, mine = [2.0, 2.0, 0.0, 0.9, 0.1, float("nan")], [0.0, 0.0, 0.0, 0.0, 0.1, 0.8]
    for drawn, told in ((0.7, True), (0.1, False)):
        values = np.array([clean, mine, [2.0, 2.0, 0.0, 0.9, 0.1, drawn]])[..., None]
        words = judge_effect(metrics, values, kinds, "mine").words
        assert ("a register of random neurons draws up to" in words) == told

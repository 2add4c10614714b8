"""What `save` of every result writes: a file that lacks something is a ConfigError with the file's name in it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import registerlens as rl
from registerlens.analysis.detection import Outliers
from registerlens.analysis.trace import Trace
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError
from registerlens.evaluation.effects import Evaluation
from registerlens.files import reading
from registerlens.interventions.files import load_intervention, save_intervention
from registerlens.interventions.search import NeuronSearch

NEURONS = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
LOADERS = {
    "trace.json": Trace.load,
    "outliers.json": Outliers.load,
    "register_neurons.json": rl.RegisterNeurons.load,
    "neuron_search.json": NeuronSearch.load,
    "ablation.json": rl.Ablate.load,
    "attention_bias.json": rl.AttentionBias.load,
    "intervention.json": load_intervention,
    "evaluation.json": Evaluation.load,
}
REQUIRED = {
    "trace.json": {"model", "config", "image_sizes", "sublayers", "sink_query", "n_images"},
    "outliers.json": {"model", "config", "grid", "sublayer", "cutoff", "relative", "rule", "onset", "evidence"},
    "register_neurons.json": {"neurons"},
    "neuron_search.json": {"model", "detection", "evidence", "n_images", "n_outliers", "top_k", "sweep_curve"},
    "ablation.json": {"target", "mode", "seed", "n_images"},
    "attention_bias.json": {"neurons", "n_images"},
    "intervention.json": {"kind", "options"},
    "evaluation.json": {"model", "detection", "verdicts", "conditions", "sublayers", "metrics"},
}
WRONG = {
    "trace.json": {"image_sizes": 3},
    "outliers.json": {"grid": 3},
    "register_neurons.json": {"neurons": 3},
    "neuron_search.json": {"sweep_curve": [3]},
    "ablation.json": {"target": ["neurons"]},
    "attention_bias.json": {"neurons": []},
    "intervention.json": {"options": {"colour": 3}},
    "evaluation.json": {"verdicts": ["worked"]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder with a file of every kind."""
    folder = tmp_path_factory.mktemp("saved")
    vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images
    register = rl.TestTimeRegisters(NEURONS)
    found = rl.find_register_neurons(vit, images, top_k=2)
    rl.trace(vit, images).save(folder)
    rl.find_outliers(vit, images).save(folder)
    found.save(folder)
    found.search.save(folder)
    rl.Ablate.fit(vit, NEURONS, images).save(folder)
    rl.AttentionBias.fit(vit, NEURONS, images).save(folder)
    save_intervention(register, folder)
    rl.evaluate_intervention(vit, images, register, controls=False).save(folder)
    return folder


@pytest.mark.parametrize("name", LOADERS)
def test_whole_files_are_read_and_a_missing_key_is_named(saved, name):
    path = saved / name
    whole = path.read_text()
    told = json.loads(whole)
    LOADERS[name](saved)
    try:
        for key in REQUIRED[name]:
            path.write_text(json.dumps({other: value for other, value in told.items() if other != key}))
            with pytest.raises(ConfigError) as caught:
                LOADERS[name](saved)
            assert str(path) in str(caught.value) and key in str(caught.value)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("name", LOADERS)
def test_a_value_of_the_wrong_kind_names_the_file(saved, name):
    path = saved / name
    whole = path.read_text()
    told = json.loads(whole)
    try:
        path.write_text(json.dumps(told | WRONG[name]))
        with pytest.raises(ConfigError, match=r"does not hold what it should") as caught:
            LOADERS[name](saved)
        assert str(path) in str(caught.value)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("name", ["trace", "outliers", "neuron_search", "attention_bias", "evaluation"])
def test_tensors_that_are_missing_or_too_many_are_named(saved, name):
    path = saved / f"{name}.safetensors"
    whole = load_file(path)
    some = sorted(whole)[0]
    try:
        for changed in ({k: v for k, v in whole.items() if k != some}, whole | {"extra": torch.zeros(1)}):
            save_file(changed, path)
            with pytest.raises(ConfigError, match=rf"{name}\.safetensors' holds the tensors .*, expected .*{some}"):
                LOADERS[f"{name}.json"](saved)
    finally:
        save_file(whole, path)


def test_errors_of_other_kinds_pass_through_the_reader(saved):
    with pytest.raises(ZeroDivisionError), reading(saved / "trace.json"):
        1 / 0  # noqa: B018
    with pytest.raises(ConfigError, match="cannot be read"), reading(saved / "nowhere.json"):
        pass

"""`registerlens bake`: model folders with an edit in them, their loader in a fresh process, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from families import SQUARE, TRANSFORMERS
from helpers import randomise, relative

import registerlens as rl
from registerlens import cli
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.registers import TestTimeRegisters

NEURONS = rl.RegisterNeurons.from_pairs([(0, 3), (1, 5), (1, 60)], "a test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved timm and a saved transformers model, lists of neurons, a bias for the latter, and images."""
    folder = tmp_path_factory.mktemp("bake")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    module = randomise(timm.create_model("vit_tiny_patch16_224", **arguments))
    timm.models.save_for_hf(module, folder / "timm", model_args=arguments, safe_serialization=True)
    module = randomise(TRANSFORMERS["Dinov2Model"].make(TRANSFORMERS["Dinov2Model"].native))
    module.save_pretrained(folder / "transformers")
    images = torch.randn(2, 3, *SQUARE, generator=torch.Generator().manual_seed(0))
    torch.save(images, folder / "images.pt")
    NEURONS.save(folder / "neurons.json")
    rl.RegisterNeurons.from_pairs([(1, 4000)]).save(folder / "elsewhere.json")
    rl.RegisterNeurons.from_pairs([]).save(folder / "none.json")
    (folder / "broken.json").write_text('{"neurons": [[1')
    AttentionBias.fit(rl.HookedViT.from_module(module), images, NEURONS).save(folder / "bias")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Exit code, stdout on one line, stderr on one line of `registerlens bake ...`; {} is the folder of the models."""

    def call(*arguments):
        words = [str(argument).replace("{}", str(folder)) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["registerlens", "bake", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        return stop.value.code or 0, " ".join(told.out.split()), " ".join(told.err.replace("│", " ").split())

    return call


MODELS = {"transformers": "{}/transformers", "timm": "timm:{}/timm"}
BAKED = {
    "two registers": ("transformers", ("--neurons", "{}/neurons.json", "--n", 2)),
    "bias": ("transformers", ("--bias", "{}/bias")),
    "register": ("timm", ("--neurons", "{}/neurons.json")),
}
_LOADING = """
import importlib, sys, torch
images, *folders = sys.argv[1:]
for folder in folders:
    sys.path.insert(0, folder)
    sys.modules.pop("load", None)
    model = importlib.import_module("load").load_model()
    assert not model.training
    output = model(torch.load(images, weights_only=True))
    torch.save(output if isinstance(output, torch.Tensor) else output.pooler_output, folder + "/output.pt")
"""


@pytest.mark.slow
def test_the_loaders_give_the_edited_models_in_a_fresh_process(run, folder, tmp_path):
    for name, (library, options) in BAKED.items():
        baked = tmp_path / "new" / name
        code, out, err = run(MODELS[library], *options, "--out", baked)
        assert (code, err) == (0, "") and f"Wrote {baked}." in out and "from load import load_model" in out
        told = json.loads((baked / "baked.json").read_text())
        assert told["source"] == library and told["version"] == rl.__version__
    source = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folders = [tmp_path / "new" / name for name in BAKED]
    command = [sys.executable, "-c", _LOADING, folder / "images.pt", *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout + done.stderr == ""
    images = torch.load(folder / "images.pt", weights_only=True)
    edits = {
        "two registers": TestTimeRegisters(NEURONS, n=2),
        "bias": AttentionBias.load(folder / "bias"),
        "register": TestTimeRegisters(NEURONS),
    }
    for name, (library, _) in BAKED.items():
        baked = tmp_path / "new" / name
        vit = rl.HookedViT.from_pretrained(MODELS[library].replace("{}", str(folder)))
        with torch.no_grad():
            unedited, plain = vit(images), rl.HookedViT.from_pretrained(baked)(images)
            with vit.edit(edits[name]):
                expected = vit(images)
        got = torch.load(baked / "output.pt", weights_only=True)
        assert relative(got, expected) <= 1e-5 < 1e-3 < relative(unedited, expected), name
        assert relative(plain, unedited) <= 1e-5  # without the loader it is an ordinary model folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give one of --neurons and --bias"),
        (("--neurons", "{}/neurons.json", "--bias", "{}/bias"), "give one of --neurons and --bias"),
        (("--neurons", "auto"), "give a file or a published list"),
        (("--neurons", "{}/nowhere.json"), "nowhere.json' cannot be read"),
        (("--neurons", "{}/broken.json"), "is not valid JSON"),
        (("--neurons", "{}/none.json"), "lists no neuron"),
        (("--neurons", "published:dinov2_vitl15"), "dinov2_vitl14"),
        (("--neurons", "{}/neurons.json", "--n", "0"), "--n"),
    ],
)
def test_wrong_usage_is_said_before_a_model_is_loaded(monkeypatch, run, tmp_path, options, said):
    monkeypatch.setattr("registerlens.interventions.bake.bake", lambda *a, **k: pytest.fail("it went to work"))
    code, out, err = run(MODELS["timm"], *options, "--out", tmp_path / "out")
    assert code == 2 and out == "" and said in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_must_be_given(run):
    code, _, err = run(MODELS["timm"], "--neurons", "{}/neurons.json")
    assert code == 2 and "--out" in err


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("timm", ("--neurons", "{}/elsewhere.json"), "Neurons [(1, 4000)] do not exist"),
        ("transformers", ("--neurons", "published:dinov2_vitl14"), "do not exist"),
        ("timm", ("--bias", "{}/nowhere"), "nowhere/result.json' cannot be read"),
        ("registerlens:tiny", ("--neurons", "{}/neurons.json"), "Baking needs a model of"),
        ("{}/nowhere", ("--neurons", "{}/neurons.json"), "nowhere"),
    ],
)
def test_what_cannot_be_baked_is_one_message_and_leaves_nothing(monkeypatch, run, tmp_path, model, options, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(MODELS.get(model, model), *options, "--out", tmp_path / "out")
    assert code == 1 and out == "" and err.startswith("registerlens: ") and said in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("hello")
    code, _, err = run(MODELS["timm"], "--neurons", "{}/neurons.json", "--out", tmp_path)
    assert code == 1 and "not an empty folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

"""What is wrong on the command line is said before torch is imported."""

import json
import subprocess
import sys

import pytest

CHILD = """
import contextlib, io, json, sys
from registerlens.cli import main

said = io.StringIO()
sys.argv = ["registerlens", *sys.argv[1:]]
code = 0
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
        main()
    except SystemExit as error:
        code = error.code
heavy = [name for name in ("torch", "transformer_lens", "transformers", "timm", "open_clip") if name in sys.modules]
print(json.dumps({"code": code, "said": said.getvalue(), "heavy": heavy}))
"""


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that transformers wrote, as far as its description goes."""
    folder = tmp_path_factory.mktemp("model")
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 12}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models"], "facebook/dinov2-"),
        (["models", "--markdown"], "Refused, with the reason in the message"),
        (["help"], "ShapeError"),
        (["help", "ShapeError"], "# ShapeError"),
    ],
)
def test_what_needs_no_model_loads_none(arguments, words):
    done = run(*arguments)
    assert done["code"] == 0 and words in done["said"] and not done["heavy"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nosuch/model", "could not be downloaded"),
        ("./nosuch", "neither an existing folder nor a valid hub id"),
        ("registerlens:tinny", "Did you mean 'tiny'?"),
        ("timm:vit_bse_patch16_224", "Did you mean 'vit_base_patch16_224'"),
        ("open_clip:ViT-B-61/openai", "Did you mean 'ViT-B-16'"),
        ("open_clip:ViT-B-16/openaii", "Did you mean 'openai'"),
        ("dinov2_vits14", "not downloaded here"),
        ("dinov2:vitt", "Known: ['dinov2_vits14'"),
    ],
)
def test_a_model_that_is_nowhere(name, words):
    done = run("trace", name, "x.png")
    assert done["code"] == 1 and words in done["said"] and not done["heavy"]


@pytest.mark.slow
def test_no_weights_of_open_clip_are_refused():
    """Tags are read in the library's file; the library itself has the list."""
    code = """
import sys
import open_clip
from registerlens.loading.sources import look_up

del sys.modules["open_clip"]  # names are looked up as before it is imported
for name, tag in open_clip.list_pretrained():
    look_up(f"open_clip:{name}/{tag}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["ablate", "registerlens:tiny", "--heads", "1.0,6.0"],
            "Heads [(6, 0)] do not exist: the model has blocks 0 to 5",
        ),
        (["ablate", "registerlens:tiny", "--tokens", "6:cls"], "Block 6 does not exist: there are 0 to 5"),
        (["ablate", "FOLDER", "--heads", "0.3"], "blocks 0 to 1 with heads 0 to 2 each"),
        (["ablate", "open_clip:ViT-B-16/openai", "--heads", "0.12"], "blocks 0 to 11 with heads 0 to 11 each"),
        (["neurons", "registerlens:tiny", "--layer", "6.mlp"], "There is no layer '6.mlp'"),
        (["neurons", "FOLDER", "--lowest-layer", "2"], "Block 2 does not exist: there are 0 to 1"),
        (["neurons", "FOLDER", "--top-layer", "2"], "Block 2 does not exist: there are 0 to 1"),
        (["register", "FOLDER", "--layer", "-3"], "There is no layer -3"),
        (["kernels", "FOLDER", "--layer", "2"], "There is no layer 2"),
        (["circuit", "FOLDER", "--block", "2"], "Block 2 does not exist: there are 0 to 1"),
    ],
)
def test_places_that_the_model_lacks(folder, arguments, words):
    command, model, *options = arguments
    done = run(command, folder if model == "FOLDER" else model, "x.png", *options)
    assert done["code"] == 1 and words in done["said"] and not done["heavy"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model:", "modell:", "line 1, column 1: Unknown key 'modell'. Did you mean 'model'"),
        ("tiny", "tinny", "Did you mean 'tiny'?"),
        ("heads: all", "heads: all, layers: 6", "line 4: Block 6 does not exist: there are 0 to 5"),
        ("heads: all", "heads: [[0, 0], [0, 1]]", "line 4: Heads [(0, 1)] do not exist"),
    ],
)
def test_what_is_wrong_in_a_sweeps_file(tmp_path, old, new, words):
    text = "model: registerlens:tiny\nimages: x.png\nconditions:\n  - {kind: ablate, heads: all}\n"
    (tmp_path / "sweep.yaml").write_text(text.replace(old, new))
    done = run("sweep", tmp_path / "sweep.yaml", "--dry-run")
    assert done["code"] == 1 and words in done["said"] and not done["heavy"]

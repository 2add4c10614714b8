"""`registerlens circuit`: what it prints and writes, and the errors it tells."""

import pandas as pd
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import registerlens as rl
from registerlens.circuits.records import AttentionCircuit
from registerlens.commands.explaining import circuit
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import InterventionError

PAIRS = [(1, 183), (1, 103)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny ViT, synthetic images as files (8 bits hold -4 to 4), a list of neurons."""
    folder = tmp_path_factory.mktemp("circuit")
    vit = rl.from_pretrained("registerlens:tiny")
    vit.preprocess = rl.config.Preprocess(resize=(48, 48), fit="exact", mean=(0.5,) * 3, std=(0.125,) * 3)
    vit.save_pretrained(folder / "tiny")
    (folder / "photos").mkdir()
    for i, image in enumerate(synthetic_images(8, 3).images):
        pixels = (image / 8 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    rl.RegisterNeurons.from_pairs(PAIRS, "a test").save(folder / "given.json")
    return folder


@pytest.fixture
def run(folder):
    app = typer.Typer()
    app.command()(circuit)

    def call(*options):
        told = CliRunner().invoke(app, [str(folder / "tiny"), str(folder / "photos"), *map(str, options)])
        return told, " ".join(told.output.split())

    return call


def test_given_neurons_are_followed_and_everything_is_written(run, folder, tmp_path):
    options = ("--neurons", folder / "given.json", "--out", tmp_path / "out", "--min-share", 0.05, "--target", 3)
    told, words = run(*options)
    assert told.exit_code == 0, told.output
    found = AttentionCircuit.load(tmp_path / "out" / "attention_circuit")
    assert " ".join(found.describe().split()) in words and "The neurons were given (a test)" in words
    assert found.neurons.pairs == tuple(PAIRS) and found.min_share == 0.05 and found.n_images == 8
    assert found.output == "output 3" and found.checked
    for table in ("edges", "nodes", "paths", "parts"):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / f"{table}.parquet"), found.to_dataframe(table))
    assert "neuron 1:183" in (tmp_path / "out" / "figure.html").read_text()
    assert len(rl.RegisterNeurons.load(tmp_path / "out")) == 2


@pytest.mark.slow
def test_without_neurons_they_are_found(run):
    told, words = run("--no-check")
    assert told.exit_code == 0 and "7 of 7" not in words and "1:183" in words
    assert "were found on the same 8 images" in words and "cut alone" not in words


def test_wrong_usage_and_errors(run, folder):
    told, words = run("--min-share", 2)
    assert told.exit_code == 2 and "--min-share" in words
    told, _ = run("--neurons", folder / "given.json", "--block", 0)
    assert told.exit_code == 1 and isinstance(told.exception, InterventionError)

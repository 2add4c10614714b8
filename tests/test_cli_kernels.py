"""`registerlens kernels`: what it prints and writes, with images and from weights alone, and the errors it tells."""

import sys

import pandas as pd
import pytest
import torch
from PIL import Image

import registerlens as rl
from registerlens import cli
from registerlens.data.synthetic import synthetic_images
from registerlens.theory.kernels import KernelReport, check_kernels
from registerlens.viz.tables import kernel_table

FOUND = {(1, n) for n in (183, 103, 219, 125, 55, 128, 177)}
PAIRS = [(1, 183), (2, 197)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny ViT, a copy without outliers, synthetic images as files (8 bits hold -4 to 4), a list of neurons."""
    folder = tmp_path_factory.mktemp("kernels")
    preprocess = rl.config.Preprocess(resize=(48, 48), fit="exact", mean=(0.5,) * 3, std=(0.125,) * 3)
    vit = rl.from_pretrained("registerlens:tiny")
    vit.preprocess = preprocess
    vit.save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    rl.HookedViT(vit.cfg, preprocess).save_pretrained(folder / "plain")
    (folder / "photos").mkdir()
    for i, image in enumerate(synthetic_images(12, 3).images):
        pixels = (image / 8 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    rl.RegisterNeurons.from_pairs(PAIRS, "a test").save(folder / "given.json")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, stdout on one line, stderr on one line of `registerlens ARGUMENTS`."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["registerlens", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        return stop.value.code or 0, " ".join(told.out.split()), " ".join(told.err.replace("│", " ").split())

    return call


def test_with_images_the_neurons_are_found_and_everything_is_written(run, folder, tmp_path):
    out = tmp_path / "new" / "out"
    code, told, err = run("kernels", folder / "tiny", folder / "photos", "--out", out)
    assert (code, err) == (0, "")
    report = KernelReport.load(out / "kernels")
    assert set(report.neurons.pairs) == set(rl.RegisterNeurons.load(out).pairs) == FOUND
    assert report.n_images == 12 and report.n_outliers > 12
    assert report.conclusion() in told and "7 neurons, 12 images" in told
    assert all(f"Note: {note}" in told for note in report.notes)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "kernels.parquet"), report.to_dataframe())
    assert "W_in of the MLP" in (out / "figure.html").read_text()
    assert "neuron 1:183" in (out / "weights.html").read_text()
    names = {"kernels", "kernels.parquet", "register_neurons.json"}
    assert {path.name for path in out.iterdir()} == names | {"figure.html", "weights.html"}


def test_weights_alone_need_no_image(run, folder, monkeypatch):
    monkeypatch.setattr("registerlens.commands.shared.load", lambda *a: pytest.fail("images were looked for"))
    code, told, err = run("kernels", folder / "tiny", "--neurons", folder / "given.json")
    assert (code, err) == (0, "") and "2 neurons, weights only" in told
    report = check_kernels(rl.from_pretrained(str(folder / "tiny")), rl.RegisterNeurons.from_pairs(PAIRS))
    assert report.conclusion() in told and report.finding("mlp").verdict in told
    for name, reason in report.not_applicable.items():
        assert f"Not applicable, {name}: {reason}." in told
    assert "alignment: it needs images" in told


def test_given_neurons_are_checked_on_images_without_a_search(run, folder, monkeypatch):
    monkeypatch.setattr(
        "registerlens.interventions.search.find_register_neurons", lambda *a, **k: pytest.fail("a search was made")
    )
    code, told, _ = run("kernels", folder / "plain", folder / "photos", "--neurons", folder / "given.json")
    assert code == 0 and "2 neurons, 12 images" in told
    assert "Not applicable, alignment: there are no outlier tokens" in told


def test_a_threshold_of_ones_own_reaches_the_search(run, folder, tmp_path):
    options = ("--threshold", 4, "--layer", "2.mlp", "--out", tmp_path)
    code, _, err = run("kernels", folder / "plain", folder / "photos", *options)
    assert (code, err) == (0, "")
    found = rl.RegisterNeurons.load(tmp_path).found
    assert "2.mlp" in str(found) and "fixed" in str(found)


def test_every_condition_is_a_row_with_its_number_both_nulls_and_the_verdict(run, folder):
    vit, neurons = rl.from_pretrained(str(folder / "tiny")), rl.RegisterNeurons.from_pairs(PAIRS)
    report = check_kernels(vit, neurons)
    frame = kernel_table(report)
    assert frame["verdict"].tolist() == [found.verdict for found in report.findings]
    assert all(
        found.words.startswith(f"{row['condition']}: {found.verdict}")
        for found, row in zip(report.findings, frame.to_dict("records"), strict=True)
    )
    rows = report.to_dataframe().query("condition == 'mlp' and quantity == 'residual' and vector == 'u2'")
    [mlp] = frame[frame["condition"].str.contains("u2.*W_in")].to_dict("records")
    violation = ((rows["value"] / rows["random"]) ** 2).mean() ** 0.5
    assert mlp["number"] == f"{rows['value'].median():.3g} ({violation:.3g} x random)"
    assert mlp["random"] == f"{rows['random'].median():.3g} (p = {rows['random_p'].median():.2g})"
    assert mlp["neurons"] == f"{rows['neurons'].median():.3g} (p = {rows['neurons_p'].median():.2g})"
    [dominance] = frame[frame["condition"].str.startswith("Dominance")].to_dict("records")
    assert dominance["random"] == "-" and "x random" not in dominance["number"]
    _, told, _ = run("kernels", folder / "tiny", "--neurons", folder / "given.json")
    for row in frame.to_dict("records"):
        assert row["number"] in told and row["unit"] in told
        assert row["random"].partition(" (")[0] in told and row["condition"][:25] in told


def test_without_outliers_it_says_what_neurons_says(run, folder):
    answers = [run(command, folder / "plain", folder / "photos") for command in ("kernels", "neurons")]
    assert answers[0] == answers[1]
    code, out, err = answers[0]
    assert code == 1 and out == "" and "needs outlier tokens, and there are none" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "weights alone do not say which neurons"),
        (("--neurons", "nowhere.json"), "--neurons"),
        (("--neurons", "published:dinov2_vitl15"), "dinov2_vitl14"),
        (("--neurons", "GIVEN", "--out", "GIVEN"), "--out"),
        (("--neurons", "GIVEN", "--threshold", "high"), "--threshold"),
    ],
)
def test_wrong_usage_is_said_before_the_work(monkeypatch, run, folder, arguments, said):
    monkeypatch.setattr(
        "registerlens.loading.pretrained.from_pretrained", lambda *a, **k: pytest.fail("the model was loaded")
    )
    words = (str(folder / "given.json") if word == "GIVEN" else word for word in arguments)
    code, _, err = run("kernels", folder / "tiny", *words)
    assert code == 2 and said in err and "Traceback" not in err


def test_neurons_of_another_model_are_one_message_and_exit_code_1(run, folder):
    code, _, err = run("kernels", folder / "tiny", "--neurons", "published:dinov2_vitl14")
    assert code == 1 and err.startswith("registerlens: ") and "do not exist" in err and "Traceback" not in err


def test_skipped_images_are_named(run, folder, tmp_path):
    (tmp_path / "not_an_image.jpg").write_text("hello")
    places = (folder / "photos", tmp_path / "not_an_image.jpg")
    code, told, err = run("kernels", folder / "tiny", *places, "--neurons", folder / "given.json")
    assert code == 0 and err.count("not_an_image.jpg") == 1 and "12 images" in told

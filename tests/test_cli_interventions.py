"""`registerlens neurons`, `ablate` and `register`: what they print, the files they write, the errors they tell."""

import json
import sys

import pandas as pd
import pytest
import torch
from PIL import Image

import registerlens as rl
from registerlens import cli
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.commands.options import read_heads, read_layer, read_threshold, read_tokens
from registerlens.commands.printing import print_evaluation, print_neurons
from registerlens.data.synthetic import synthetic_images
from registerlens.evaluation.effects import Evaluation
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.search_record import NeuronSearch

FOUND = {(1, n) for n in (183, 103, 219, 125, 55, 128, 177)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny ViT, a copy without outliers, and synthetic images as files: 8 bits hold -4 to 4, as the models know."""
    folder = tmp_path_factory.mktemp("cli")
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
    RegisterNeurons.from_pairs(sorted(FOUND), "a test").save(folder / "given.json")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Exit code, stdout on one line, stderr on one line of `registerlens COMMAND MODEL PHOTOS ...`."""

    def call(command, model, *arguments):
        words = [command, folder / model, folder / "photos", *arguments]
        monkeypatch.setattr(sys, "argv", ["registerlens", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        return stop.value.code or 0, " ".join(told.out.split()), " ".join(told.err.replace("│", " ").split())

    return call


# neurons -------------------------------------------------------------------------------------------------------------


def test_neurons_prints_what_it_found_and_writes_everything(run, tmp_path):
    code, out, err = run("neurons", "tiny", "--out", tmp_path / "new" / "out")
    assert (code, err) == (0, "")
    found = RegisterNeurons.load(tmp_path / "new" / "out")
    assert set(found.pairs) == FOUND
    search = NeuronSearch.load(tmp_path / "new" / "out" / "neuron_search")
    assert search.describe() in out
    assert f"Estimates of top_k: elbow {search.elbow}; sweep {search.sweep} ({search.sweep_note}); taken 7." in out
    assert "rank neuron mean mean abs contrast auc" in out and "1 1:183" in out
    frame = pd.read_parquet(tmp_path / "new" / "out" / "neurons.parquet")
    assert (
        len(frame) == 2 * 256 and set(map(tuple, frame.loc[frame["chosen"], ["layer", "neuron"]].to_numpy())) == FOUND
    )
    maps = (tmp_path / "new" / "out" / "maps.html").read_text()
    assert maps.count('<div class="maps"') == 4 and "neuron 1:183" in maps and "0.png" in maps
    assert "neuron 1:183" in (tmp_path / "new" / "out" / "figure.html").read_text()


def test_neurons_options_reach_the_search(run, tmp_path):
    options = ("--threshold", 300, "--layer", "3.mlp", "--lowest-layer", 1, "--top-layer", 2, "--top-k", 3)
    code, _, _ = run("neurons", "tiny", *options, "--score", "mean_abs", "--batch-size", 5, "--out", tmp_path)
    assert code == 0
    search = NeuronSearch.load(tmp_path / "neuron_search")
    assert (search.lowest_layer, search.top_layer, search.top_k, search.score) == (1, 2, 3, "mean_abs")
    detection = search.detection
    assert (detection.sublayer, detection.rule, detection.cutoff.value) == ("3.mlp", "fixed", 300.0)


def test_long_lists_are_cut_and_say_so(capsys):
    print_neurons(RegisterNeurons.from_pairs([(2, n) for n in range(60)]))
    out = capsys.readouterr().out
    assert "... and 10 more." in out and " 50 " in out and " 51 " not in out


@pytest.mark.parametrize("command", ["neurons", "ablate", "register"])
def test_without_outliers_it_says_why_and_what_to_do(run, command):
    code, out, err = run(command, "plain")
    assert code == 1 and "needs outlier tokens, and there are none" in err and "--threshold NUMBER" in err
    assert out == "" and "Traceback" not in err


# ablate --------------------------------------------------------------------------------------------------------------


def test_ablate_measures_given_neurons_beside_controls(run, folder, tmp_path):
    arguments = ("--neurons", folder / "given.json", "--mode", "mean", "--out", tmp_path)
    code, out, err = run("ablate", "tiny", *arguments)
    assert (code, err) == (0, "")
    done = Evaluation.load(tmp_path / "evaluation")
    assert done.conditions[:4] == ("clean", "ablated", "zeroed", "neighbours") and "matched 3" in done.conditions
    assert done.verdicts["ablated"].words in out and "The neurons were given (a test)" in out
    assert done.mean("outliers", "ablated") == 0 < done.mean("outliers", "random 1")
    for condition in done.conditions:
        assert condition in out
    clean = done.to_dataframe().set_index(["condition", "metric"]).loc[("clean", "outliers")]
    assert f"{clean['mean']:.3f}" in out and f"{clean['low']:.3f} to {clean['high']:.3f}" in out
    ablation = Ablate.load(tmp_path / "ablation")
    assert ablation.mode == "mean" and set(ablation.target.pairs) == FOUND and ablation.reference.n_images == 12
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "evaluation.parquet"), done.to_dataframe())
    assert "matched (3 draws)" in (tmp_path / "figure.html").read_text()


def test_ablate_finds_neurons_itself_and_says_that_the_images_are_the_same(run):
    code, out, _ = run("ablate", "tiny", "--no-controls")
    assert code == 0 and "found on the same 12 images" in out and "183" in out and "random" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--heads", "3.0,4.0"), "(3, 0), (4, 0)"), (("--tokens", "3:0,7"), "which=(0, 7)")],
)
def test_ablate_heads_and_tokens(run, options, said):
    code, out, _ = run("ablate", "tiny", *options)
    assert code == 0 and said in out and "ablated:" in out and "random" not in out


def test_ablate_works_without_outliers_where_a_threshold_is_given(run):
    code, out, _ = run("ablate", "plain", "--heads", "0.0", "--threshold", "4.0")
    assert code == 0 and "outliers above norm 4" in out


# register ------------------------------------------------------------------------------------------------------------


def test_register_shows_before_and_after(run, folder, tmp_path):
    code, out, err = run("register", "tiny", "--neurons", folder / "given.json", "--out", tmp_path)
    assert (code, err) == (0, "")
    done = Evaluation.load(tmp_path / "evaluation")
    assert done.verdicts["test-time register"].worked and "test-time register: Worked: " in out
    assert done.mean("outliers", "clean") > 1 and done.mean("outliers", "test-time register") == 0
    assert set(RegisterNeurons.load(tmp_path).pairs) == FOUND
    page = (tmp_path / "report.html").read_text()
    assert (
        "Test-time register: worked" in page and "norm after, same scale" in page and "Outlier tokens: present" in page
    )
    assert "The neurons were given (a test)" in page
    assert {path.name for path in tmp_path.iterdir()} == {
        *("report.html", "evaluation", "evaluation.parquet"),
        *("figure.html", "register_neurons.json"),
    }


def test_register_options_reach_the_intervention(run, folder, tmp_path):
    options = ("--n", 2, "--init", "mean", "--assign", "random", "--extreme", "shared", "--clear", "patches")
    arguments = ("--neurons", folder / "given.json", "--no-controls", "--out", tmp_path)
    code, out, _ = run("register", "tiny", *arguments, *options)
    assert code == 0 and "2 test-time registers:" in out
    done = Evaluation.load(tmp_path / "evaluation")
    assert done.conditions == ("clean", "2 test-time registers")
    made = done.interventions[1].replace('"', "'")
    for option in ("n=2", "init='mean'", "assign='random'", "extreme='shared'", "clear='patches'"):
        assert option in made


def test_register_with_a_bias_writes_it(run, folder, tmp_path):
    arguments = ("--neurons", folder / "given.json", "--bias", "--no-controls", "--out", tmp_path)
    code, out, _ = run("register", "tiny", *arguments)
    assert code == 0 and "attention bias: Worked: " in out and "The bias was fitted on these 12 images" in out
    bias = AttentionBias.load(tmp_path / "attention_bias")
    assert bias.n_images == 12 and set(bias.neurons.pairs) == FOUND
    assert "Attention bias: worked" in (tmp_path / "report.html").read_text()


# report --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_report_has_the_neurons_and_the_register(run, tmp_path):
    code, out, _ = run("report", "tiny", "--out", tmp_path / "p.html", "--shown", 2, "--evaluated", 8)
    text = (tmp_path / "p.html").read_text()
    assert code == 0 and "Test-time register: Worked: " in out
    assert "found on 12 images, and the register was evaluated on the first 8 of them" in text
    assert text.count('<div class="maps"') == 3 * 2 and "over 8 images" in text


@pytest.mark.slow
def test_report_explains_on_the_first_images_or_not_at_all(run, tmp_path):
    texts = []
    for n in (8, 0):
        assert run("report", "tiny", "--out", tmp_path / "p.html", "--evaluated", 8, "--explained", n)[0] == 0
        texts.append((tmp_path / "p.html").read_text())
    assert (
        'id="kernels"' in texts[0] and "Sinks found, 8 images" in texts[0] and "outlier tokens in 8 images" in texts[0]
    )
    assert 'id="kernels"' not in texts[1] and "Sinks found" not in texts[1]


def test_report_without_outliers_says_that_there_is_nothing_to_look_for(run, tmp_path):
    code, out, _ = run("report", "plain", "--out", tmp_path / "p.html")
    assert code == 0 and "Outlier tokens: absent" in out
    text = (tmp_path / "p.html").read_text()
    assert "There is nothing to look for" in text
    assert "Kernel conditions: not asked" in text and "Singular defects" in text and "No outliers were measured" in text


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("neurons", "--threshold", "high"), "--threshold"),
        (("neurons", "--threshold", "-3"), "--threshold"),
        (("neurons", "--threshold", "nan"), "--threshold"),
        (("neurons", "--layer", "five"), "--layer"),
        (("neurons", "--top-k", "0"), "--top-k"),
        (("neurons", "--top-layer", "x"), "--top-layer"),
        (("neurons", "--score", "best"), "--score"),
        (("ablate", "--mode", "half"), "--mode"),
        (("ablate", "--heads", "3"), "--heads"),
        (("ablate", "--heads", "3.0", "--tokens", "3:cls"), "give one of"),
        (("ablate", "--tokens", "3:eyes"), "--tokens"),
        (("ablate", "--neurons", "nowhere.json"), "--neurons"),
        (("register", "--neurons", "published:dinov2_vitl15"), "dinov2_vitl14"),
        (("register", "--n", "0"), "--n"),
        (("register", "--n", "2", "--bias"), "--bias"),
        (("register", "--init", "ones"), "--init"),
        (("register", "--out", "PHOTO"), "--out"),
    ],
)
def test_wrong_usage_is_said_before_the_work(monkeypatch, run, folder, arguments, said):
    monkeypatch.setattr(
        "registerlens.loading.pretrained.from_pretrained", lambda *a, **k: pytest.fail("the model was loaded")
    )
    command, *rest = (str(folder / "photos" / "0.png") if word == "PHOTO" else word for word in arguments)
    code, _, err = run(command, "tiny", *rest)
    assert code == 2 and said in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("neurons", "--top-layer", "9"), "Block 9 does not exist"),
        (("neurons", "--layer", "9"), "no layer 9"),
        (("ablate", "--heads", "3.1"), "Heads [(3, 1)] do not exist"),
        (("ablate", "--tokens", "3:cls"), "no tokens 'cls'"),
        (("register", "--neurons", "published:dinov2_vitl14"), "do not exist"),
    ],
)
def test_what_the_model_does_not_have_is_one_message_and_exit_code_1(run, arguments, said):
    command, *rest = arguments
    code, _, err = run(command, "tiny", *rest)
    assert code == 1 and err.startswith("registerlens: ") and said in err and "Traceback" not in err


@pytest.mark.parametrize(("listed", "said"), [("all", "list of register neurons"), ([], "lists no neuron")])
def test_a_damaged_or_empty_list_of_neurons_is_wrong_usage(run, tmp_path, listed, said):
    (tmp_path / "list.json").write_text(json.dumps({"neurons": listed}))
    code, _, err = run("ablate", "tiny", "--neurons", tmp_path / "list.json")
    assert code == 2 and "--neurons" in err and said in err


def test_skipped_images_are_named_once(run, folder, tmp_path):
    bad = tmp_path / "not_an_image.jpg"
    bad.write_text("hello")
    code, out, err = run("register", "tiny", bad, "--neurons", folder / "given.json", "--no-controls")
    assert code == 0 and err.count("Skipped") == 1 and err.count("not_an_image.jpg") == 1
    assert "searched for in these 12 images" in out


def test_readers_take_what_they_should():
    assert read_threshold("mad") == "mad" and read_threshold("1e2") == 100.0
    assert read_layer("5.attn") == "5.attn" and read_layer("embed") == "embed" and read_layer("11") == 11
    assert read_heads("10.11") == [(10, 11)]
    assert read_tokens("4:trained_registers") == (4, "trained_registers")


def test_print_evaluation_shows_brackets_as_they_are(capsys, folder):
    vit = rl.from_pretrained(str(folder / "tiny"))
    neurons = RegisterNeurons.from_pairs(sorted(FOUND))
    edit = {"[bold]x[/]": rl.TestTimeRegisters(neurons)}
    done = rl.evaluate_intervention(vit, synthetic_images(8, 1).images, edit, controls=False)
    print_evaluation(done, "From [/x].")
    out = capsys.readouterr().out
    assert "From [/x]." in out and out.count("[bold]x[/]") == 2

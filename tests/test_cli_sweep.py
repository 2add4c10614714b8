"""`registerlens sweep` as a user types it: a real sweep of the tiny model, its table, its store, and its mistakes."""

import sys

import pandas as pd
import pytest
from PIL import Image

import registerlens as rl
from registerlens import cli
from registerlens.data.synthetic import synthetic_images
from registerlens.sweep.from_config import prepare
from registerlens.sweep.result import SweepResult
from registerlens.sweep.yaml_config import SweepConfig

CONFIG = """\
model: registerlens:tiny
images: photos
metrics: [largest_norm, cos_patches]
conditions:
  - {kind: ablate, heads: all, layers: 4-5, modes: [zero, mean]}
  - kind: ablate
    neurons: {top_k: [1, 4, 7], of: neurons.json}
    controls: 2
batch_size: 4
shard_size: 4
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a configuration, ten images and a ranking."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "photos").mkdir()
    for i, image in enumerate(synthetic_images(10, 3).images):
        pixels = image.clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)]).save(folder / "neurons.json")
    (folder / "sweep.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, stdout, stderr of `registerlens sweep ARGUMENTS`, in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["registerlens", "sweep", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def edited(place, name, old, new):
    """The configuration with a change in it, under another name."""
    assert old in CONFIG
    (place / name).write_text(CONFIG.replace(old, new))
    return place / name


def test_a_sweep_is_run_stored_printed_and_written(run, place, tmp_path):
    store = tmp_path / "store"
    code, out, err = run(place / "sweep.yaml", "--store", store, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    heads = rl.HookedViT.from_pretrained("registerlens:tiny").cfg.n_heads
    n_tested = 2 * heads * 2 + 3
    assert f"{n_tested} conditions on 10 images" in out and "k=7" in out and "cos_patches" in out
    result = SweepResult.from_store(store)
    kinds = [one.kind for one in result.conditions]
    assert (kinds.count("clean"), kinds.count("tested"), kinds.count("control")) == (1, n_tested, 6)
    again = SweepResult.load(tmp_path / "out" / "sweep")
    frame = again.to_dataframe()
    pd.testing.assert_frame_equal(frame, result.to_dataframe())
    assert len(pd.read_parquet(tmp_path / "out" / "effects.parquet")) == len(frame) == 2 * len(kinds)
    k7 = frame[(frame["k"] == 7) & (frame["kind"] == "tested") & (frame["metric"] == "largest_norm")].iloc[0]
    assert k7["vs_controls_high"] < 0.8 * k7["difference"] < 0  # the register neurons, and not any neurons
    figures = {path.name for path in (tmp_path / "out").glob("*.html")}
    assert figures == {f"{m}-{kind}.html" for m in result.metrics for kind in ("heads", "dose", "layers")}
    assert "cdn" not in (tmp_path / "out" / "largest_norm-dose.html").read_text().split("</script>")[0][:400]

    code, out, _ = run("status", store)
    assert code == 0 and f"{len(kinds)} of {len(kinds)} conditions done" in out
    before = result.table.to_pandas()
    code, out, err = run(place / "sweep.yaml", "--store", store)
    assert code == 1 and "resume" in err  # not silently another run
    code, out, err = run("run", place / "sweep.yaml", "--resume", "--store", store)
    assert (code, err) == (0, "")
    pd.testing.assert_frame_equal(SweepResult.from_store(store).table.to_pandas(), before)


@pytest.mark.parametrize(
    ("grid", "n", "labels"),
    [
        ("{kind: ablate, neurons: all, layers: 2}", 256, {"layer=2 neuron=255"}),
        ("{kind: ablate, neurons: neurons.json}", 1, {"neurons=neurons.json"}),
        ("{kind: ablate, neurons: {each: neurons.json}}", 7, {"layer=1 neuron=183"}),
        ("{kind: ablate, neurons: {cumulative: neurons.json}, modes: [zero, mean]}", 14, {"k=3 mode=mean"}),
        ("{kind: ablate, neurons: {random: 3, of: neurons.json}}", 3, {"neurons=random 2"}),
        ("{kind: ablate, neurons: {matched: 2, of: neurons.json}}", 2, {"neurons=matched 1"}),
        ("{kind: ablate, neurons: {sets: {a: [[1, 2], [2, 3]], b: [0.1]}}}", 2, {"neurons=a", "neurons=b"}),
        ("{kind: ablate, neurons: [[1, 183], 2:7]}", 2, {"layer=1 neuron=183", "layer=2 neuron=7"}),
        ("{kind: ablate, heads: [[3, 0]], modes: [noise, resample]}", 2, {"layer=3 head=0 mode=noise"}),
        ("{kind: ablate, tokens: {corner: [0]}, layers: [1, 2]}", 2, {"layer=2 tokens=corner"}),
        ("{kind: scale, neurons: {top_k: 2, of: neurons.json}, scales: {low: 0, high: 2, n: 3}}", 3, {"k=2 scale=1.0"}),
        ("{kind: registers, neurons: {top_k: 2, of: neurons.json}, n: [0, 1, 2]}", 3, {"k=2 n=1"}),
        ("{kind: move, neurons: neurons.json, to: {corner: [0, 1]}}", 1, {"neurons=neurons.json to=corner"}),
        ("{kind: attention_bias, neurons: neurons.json}", 1, {"neurons=neurons.json"}),
        ("{kind: interpolate, cutoff: 30.5}", 1, {"neighbours"}),
        ("{kind: interpolate, layers: 2-3, cutoff: 30.5}", 2, {"layer=2", "layer=3"}),
    ],
)  # fmt: skip
def test_every_kind_of_grid_becomes_its_conditions(place, grid, n, labels):
    (place / "grid.yaml").write_text(f"model: registerlens:tiny\nimages: photos\nconditions:\n- {grid}\n")
    config = SweepConfig.from_file(place / "grid.yaml")
    prepared = prepare(config, {"model": rl.HookedViT.from_pretrained("registerlens:tiny")})
    clean, *tested = prepared.conditions
    assert clean.label == "clean" and len(tested) == n
    assert labels <= {one.label for one in tested}


@pytest.mark.slow
def test_options_may_come_first_and_worker_processes_give_the_same(run, place, tmp_path):
    few = edited(place, "few.yaml", "heads: all, layers: 4-5, modes: [zero, mean]", "heads: [[5, 0]]")
    assert run("--store", tmp_path / "one", few)[0] == 0
    assert run("--workers", 1, "--store", tmp_path / "two", few)[0] == 0
    one, two = (SweepResult.from_store(tmp_path / name).table.to_pandas() for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two)


def test_a_dry_run_says_what_it_costs_and_stores_nothing(run, place, tmp_path):
    code, out, err = run(place / "sweep.yaml", "--store", tmp_path / "store", "--dry-run")
    assert (code, err) == (0, "") and "conditions" in out and "Expected" in out
    assert not (tmp_path / "store").exists()


def test_every_wrong_key_is_named_before_anything_is_loaded(run, place, monkeypatch):
    monkeypatch.setattr("registerlens.commands.running.load_model", lambda *_: pytest.fail("loaded"))
    wrong = edited(place, "wrong.yaml", "batch_size: 4", "batch_sise: 4\nseed: x")
    wrong.write_text(wrong.read_text().replace("cos_patches", "cos_patch"))
    code, _, err = run(wrong, "--store", "x")
    assert code == 1 and "3 problems" in err
    assert "line 3, column" in err and "Did you mean 'cos_patches'" in err
    assert "line 9, column 1: Unknown key 'batch_sise'. Did you mean 'batch_size'" in err
    assert "line 10, column 1: 'seed' is 'x', expected a whole number from 0" in err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("4-5", "4-9", "line 5: Block 6 does not exist: there are 0 to 5"),
        ("[1, 4, 7]", "[1, 8]", "line 6: k must be from 1 to 7"),
        ("of: neurons.json", "of: missing.json", "line 6: "),
        ("of: neurons.json", "of: published:dinov2_vitl15", "line 6: No published list"),
        ("controls: 2", "layers: 0", "line 6: No neuron of 'neurons.json' lies in the layers [0]"),
        ("photos", "fotos", "fotos' is no file or folder"),
        ("cos_patches]", "cos_cls]", "'cos_cls' cannot be measured: the model has no [CLS] token"),
        ("batch_size", "labels: none.csv\nbatch_size", "none.csv"),
    ],
)
def test_what_does_not_fit_the_model_is_named_with_its_line(run, place, tmp_path, old, new, said):
    code, _, err = run(edited(place, "other.yaml", old, new), "--store", tmp_path / "store")
    assert code == 1 and said in err, err
    assert not (tmp_path / "store").exists()


def test_wrong_usage(run, place, tmp_path):
    assert run(place / "sweep.yaml")[0] == 2
    assert run(place / "sweep.yaml", "--store", tmp_path, "--ray", "auto", "--workers", 2)[0] == 2
    assert run("status", tmp_path / "nothing")[0] == 1
    code, out, _ = run("--help")
    assert code == 0 and "status" in out and "run" in out
    code, _, err = run(tmp_path / "missing.yaml", "--store", tmp_path / "s")
    assert code == 1 and "cannot be read" in err

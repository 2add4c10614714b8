"""What comes first: courses whose order is known, and a run between random weights and the embedded model's."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import small
from typer.testing import CliRunner

import registerlens as rl
from registerlens.cli import app
from registerlens.data.synthetic import FLAT
from registerlens.emergence.config import RECIPES, TrainingConfig, recipe_of
from registerlens.emergence.criteria import CRITERIA
from registerlens.emergence.dynamics import SIGNS, Dynamics, _halfway, order_of_signs, training_dynamics
from registerlens.emergence.research import RULES, judge_run, results_table, summarise
from registerlens.emergence.run import TrainingRun, held_out_images
from registerlens.emergence.training import DivergedError, initial_vit, train
from registerlens.errors import ConfigError, NoOutliersError
from registerlens.loading.native import save
from registerlens.viz.emergence import dynamics_figure, research_figure

NEURONS = rl.RegisterNeurons.from_pairs([(0, 1), (0, 2)])


def made_up(seed=0, order=("sink", "value drain", "norm"), n_images=40):
    """A course whose signs set in at steps 110, 210 and 310, each image a little earlier or later."""
    steps, draw = np.arange(0, 501, 20), np.random.default_rng(seed)
    at = {sign: 110 + 100 * order.index(sign) + draw.normal(0, 8, n_images) for sign in SIGNS}
    way = {sign: np.clip((steps[:, None] - at[sign] + 50) / 100, 0, 1) for sign in SIGNS}
    norm = np.ones((len(steps), 5, n_images))
    norm[:, 2:] = np.exp(2 * way["norm"])[:, None]
    sink = 0.1 + 0.8 * np.stack([0 * way["sink"], way["sink"]], 1)
    values = 1 - 0.7 * np.stack([0 * way["value drain"], way["value drain"]], 1)
    course = np.stack([way["norm"].mean(1)] * 2, 1)
    told = {name: course for name in ("activation", "elsewhere", "output_norm", "alignment")}
    arrays = {"norm": norm, "sink": sink, "value_ratio": values, **told}
    return Dynamics(
        run=f"run{seed}", seed=seed, steps=tuple(steps.tolist()), neurons=NEURONS, n_images=n_images, **arrays
    )


@pytest.mark.parametrize("order", [SIGNS, ("norm", "value drain", "sink"), ("value drain", "sink", "norm")])
def test_a_known_order_is_found_with_its_steps(order):
    onsets = made_up(order=order).onsets().set_index("sign")
    for place, sign in enumerate(order):
        row = onsets.loc[sign]
        assert row["step"] == pytest.approx(110 + 100 * place, abs=5)
        assert row["low"] < row["step"] < row["high"] and row["high"] - row["low"] < 15
        assert row["first"] == (1 if place == 0 else 0) and row["lasting"] == pytest.approx(row["step"])


def test_halfway_at_first_and_for_good_between_checkpoints():
    steps = np.array([0, 10, 20, 30])
    courses = np.array([[0.0, 2.0], [0.9, 1.0], [0.2, 0.0], [1.0, 0.0]])
    first, lasting = _halfway(steps, courses)
    assert first.tolist() == pytest.approx([10 * 0.5 / 0.9, 10.0])
    assert lasting.tolist() == pytest.approx([20 + 10 * 0.3 / 0.8, 10.0])
    assert np.isnan(_halfway(steps, np.ones((4, 1)))).all()  # nothing has changed


def test_several_runs_stand_side_by_side(tmp_path):
    found = [made_up(seed) for seed in range(3)]
    assert len(order_of_signs(found)) == 9 and order_of_signs(found)["seed"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    figure = dynamics_figure(found)
    assert len(figure.data) == 3 * 4 + 6 and figure.data[-1].x.tolist() == pytest.approx([310] * 3, abs=5)
    assert len(dynamics_figure(found[:1], "dark").data) == 10
    assert found[0].plot().data[0].y[-1] == 1 and "sink at 11" in found[0].describe()
    again = Dynamics.load(found[0].save(tmp_path))
    assert again.onsets().equals(found[0].onsets()) and again.to_dataframe().equals(found[0].to_dataframe())
    for empty in (order_of_signs, dynamics_figure):
        with pytest.raises(ConfigError):
            empty([])
    with pytest.raises(ConfigError, match="no sign 'attention'"):
        found[0].course("attention")


@pytest.fixture(scope="module")
def towards_tiny(tmp_path_factory):
    """A run whose checkpoints are random weights, those and the embedded model's in equal parts, and these."""
    config = TrainingConfig(steps=400, log_every=100)
    run = TrainingRun.make(tmp_path_factory.mktemp("runs") / "towards", config)
    vit, tiny = initial_vit(config), rl.HookedViT.from_pretrained("registerlens:tiny")
    first, last = vit.state_dict(), tiny.state_dict()
    for step, share in ((0, 0.0), (200, 0.5), (400, 1.0)):
        vit.load_state_dict({name: torch.lerp(first[name], last[name], share) for name in first})
        save(vit, run.checkpoint(step))
    return run


@pytest.mark.slow
def test_a_run_is_followed_checkpoint_by_checkpoint(towards_tiny):
    found = training_dynamics(towards_tiny, n_images=64)
    assert found.steps == (0, 200, 400) and found.layers == slice(2, None)
    assert set(found.neurons.pairs) == {(1, n) for n in (183, 103, 219, 125, 55, 128, 177)}
    images = held_out_images(towards_tiny.config, 64, part=4)
    flat = images.roles == FLAT
    for i, vit in enumerate(
        (initial_vit(towards_tiny.config), None, rl.HookedViT.from_pretrained("registerlens:tiny"))
    ):
        if vit is None:
            continue
        with torch.inference_mode():
            _, cache = vit.run_with_cache(images.images)
        norms = cache["blocks.1.hook_resid_post"].norm(dim=-1)
        relative = norms / norms.quantile(0.5, dim=1, keepdim=True)
        each = [float(row[there].mean()) for row, there in zip(relative, flat, strict=True)]
        assert found.norm[i, 4] == pytest.approx(each, rel=1e-4)
        drawn = [float((cache["blocks.3.attn.hook_pattern"][n, 0].mean(0) * flat[n]).sum()) for n in range(64)]
        assert found.sink[i, 3] == pytest.approx(drawn, rel=1e-4)
        values = cache["blocks.3.attn.hook_v"][:, :, 0].norm(dim=-1)
        ratio = [float(row[there].mean() / row[~there].mean()) for row, there in zip(values, flat, strict=True)]
        assert found.value_ratio[i, 3] == pytest.approx(ratio, rel=1e-4)
        post = cache["blocks.1.mlp.hook_post"][..., found.neurons.pairs[0][1]]
        assert found.activation[i, 0] == pytest.approx(float(post[flat].mean()), rel=1e-4, abs=1e-7)
        assert found.elsewhere[i, 0] == pytest.approx(float(post[~flat].mean()), rel=1e-4, abs=1e-7)
        row = vit.blocks[1].mlp.out.weight[:, found.neurons.pairs[0][1]]
        assert found.output_norm[i, 0] == pytest.approx(float(row.detach().norm()), rel=1e-4)
    assert found.alignment[-1].min() > 0.8 > found.alignment[0].max()  # they write one direction in the end


def test_nothing_to_follow(tmp_path):
    config = small()
    run = TrainingRun.make(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="at least two checkpoints"):
        training_dynamics(run)
    for step in (0, 4):
        save(initial_vit(config), run.checkpoint(step))
    with pytest.raises(NoOutliersError):
        training_dynamics(run, n_images=64)


@pytest.mark.slow
def test_a_table_of_runs_lists_those_that_fail(towards_tiny, tmp_path):
    towards_tiny.write_metrics({"step": 400, "seconds": 60.0, "cpu_seconds": 30.0, "accuracy_normal": 1.0})
    with pytest.raises(DivergedError):
        train(small(learning_rate=30.0), tmp_path / "diverged")
    table = results_table([towards_tiny.folder, tmp_path / "diverged"], n_images=32)
    emerged, failed = table.iloc[0], table.iloc[1]
    assert (emerged["recipe"], emerged["prefix_norm"], emerged["prefix_sink"]) == ("-", 0, 0)
    assert emerged["largest"] >= emerged["largest/median"]
    assert (emerged["settings"], emerged["ended"], emerged["minutes"]) == ("steps=400", "finished", 1.0)
    assert (emerged["outliers"], emerged["criteria"], emerged["failing"]) == ("present", emerged["of"], "")
    assert failed["ended"].startswith("diverged at") and "learning_rate=30.0" in failed["settings"]
    assert failed["outliers"] == "absent" and failed["criteria"] == 0
    assert summarise(table)["emerged"].tolist() == ["1 of 1", "0 of 1"]
    figure = research_figure(table)
    cells, points = figure.data[0], figure.data[1:]
    assert list(cells.y) == [f"- {emerged['settings']} (1)", f"- {failed['settings']} (1)"]
    assert cells.z.tolist() == [[1.0] * len(CRITERIA), [0.0] * len(CRITERIA)]  # one that diverged meets none
    assert points[0].x.tolist() == [emerged["largest"]] and "19 of 19" in points[0].text[0]
    with pytest.raises(ConfigError, match="no run"):
        research_figure(table.iloc[:0])
    kept = towards_tiny.folder / "criteria" / f"step_000400_rules_{RULES}_images_32" / "result.json"
    before = kept.stat().st_mtime_ns
    assert judge_run(towards_tiny, n_images=32).n_met == emerged["criteria"] and kept.stat().st_mtime_ns == before


def test_the_commands_train_end_with_the_table_and_list_runs(tmp_path):
    (tmp_path / "few.yaml").write_text(
        "{steps: 2, warm_up: 0, batch_size: 2, log_every: 2, checkpoint_every: 2, model: {n_layers: 1, d_mlp: 8},"
        " task: {grid: 4, patch: 4, n_triggers: 2}}"
    )
    command = ["emerge", "--config", str(tmp_path / "few.yaml"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and "nothing has emerged" in done.output and "register: outliers" in done.output
    assert len(pd.read_parquet(tmp_path / "run" / "criteria.parquet")) == 19
    with pytest.raises(ConfigError, match="seed is 0 there, 3 here"):
        CliRunner().invoke(app, [*command, "--seed", "3"], catch_exceptions=False)
    listing = ["runs", str(tmp_path / "run"), "--out", str(tmp_path / "table.parquet")]
    listed = CliRunner().invoke(app, listing, catch_exceptions=False)
    assert "finished" in listed.output and "0 of 1" in listed.output and "task.n_triggers=2" in listed.output
    table = pd.read_parquet(tmp_path / "table.parquet")
    assert table["recipe"].tolist() == ["-"] and table["criteria"].tolist() == [0]
    with pytest.raises(ConfigError, match="nothing"):
        CliRunner().invoke(app, ["runs", str(tmp_path / "nothing")], catch_exceptions=False)


def test_runs_that_stopped_early_are_listed_too(tmp_path):
    begun = train(small(), tmp_path / "begun")
    for path in begun.folder.glob("checkpoints/step_000008"):  # killed between the two checkpoints
        shutil.rmtree(path)
    TrainingRun.make(tmp_path / "new", small())
    table = results_table([begun.folder, tmp_path / "new"], n_images=32)
    assert table["ended"].tolist() == ["at step 4", "not begun"] and table["criteria"].isna().tolist() == [False, True]
    assert summarise(table)[["emerged", "criteria"]].to_numpy().tolist() == [["0 of 2", "0 -"]]
    figure = research_figure(table)
    assert figure.data[0].z.tolist() == [[0.0] * len(CRITERIA)]
    listed = CliRunner().invoke(app, ["runs", str(tmp_path / "new")], catch_exceptions=False)
    assert "not begun" in listed.output and "0 of 1" in listed.output
    with pytest.raises(ConfigError, match="no checkpoint to judge yet"):
        judge_run(TrainingRun.open(tmp_path / "new"))


def test_recipes_are_known_by_their_configuration(tmp_path):
    assert {recipe_of(one.config).name for one in RECIPES.values()} == set(RECIPES)
    assert recipe_of(RECIPES["cls"].config.changed(seed=4, log_every=100)).name == "cls"
    unknown = CliRunner().invoke(app, ["emerge", "--recipe", "gelu", "--out", str(tmp_path / "run")])
    assert isinstance(unknown.exception, ConfigError) and "Did you mean 'gelu-" in str(unknown.exception)
    both = ["emerge", "--recipe", "cls", "--config", "x.yaml", "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(app, both).exit_code == 2

"""The dry run, against counts by hand, the size of a real table, and the number of forward passes it may take."""

from dataclasses import dataclass, replace

import pyarrow as pa
import pytest
import torch
from sweep_vits import ablate_head, build, neurons, pixels

import registerlens as rl
from registerlens.data.sources import Shard, TensorSource
from registerlens.errors import ConfigError, ImageError, InterventionError
from registerlens.evaluation.metrics import Metric
from registerlens.sweep.conditions import Condition
from registerlens.sweep.dry_run import plan_sweep, time_clean
from registerlens.sweep.grid import Conditions, grid

VIT = build()
HEADS = grid(ablate_head, layer=[0, 1, 3], head=[0, 1])
METRICS = [Metric(name=name, measure=lambda edited, clean: edited.output[:, 0]) for name in ("a", "b", "c")]


def test_counts_by_hand():
    conditions = HEADS + Conditions.of([Condition(), ("register", rl.TestTimeRegisters(neurons((2, 1))))])
    plan = plan_sweep(VIT, pixels(10), conditions, METRICS, batch_size=4, shard_size=4, group_size=3)
    [run] = plan.runs
    assert run.first_layers == {0: 3, 1: 2, 3: 2, 4: 1}  # the register edits the sequence, the clean run nothing
    assert (plan.n_conditions, run.n_groups, plan.n_tasks, plan.n_rows, plan.n_metrics) == (8, 3, 9, 80, 3)
    assert run.forwards == 3 + 3 * 1 + 2 * 3 / 4 + 2 * 1 / 4 + 0
    assert plan.seconds == pytest.approx(8 * 10 * run.clean_seconds) and run.clean_seconds > 0
    assert plan.share == pytest.approx(8 / 8) and plan.batch_size == 4
    table = plan.to_dataframe()
    assert table["conditions"].tolist() == [3, 2, 2, 1]
    clean = run.n_groups * run.n_images * run.clean_seconds
    assert table["seconds"].sum() + clean == pytest.approx(plan.seconds)


def test_the_limit_of_uniform_ablations():
    """A clean run, and of the conditions on average half of the blocks, (n + 1) / 2n; the naive loop has one, too."""
    uniform = grid(ablate_head, layer=range(4), head=range(3))
    assert plan_sweep(VIT, pixels(2), uniform).share == pytest.approx((12 * 5 / 8 + 1) / 13)
    last = grid(ablate_head, layer=[3], head=range(3))
    assert plan_sweep(VIT, pixels(2), last).share == pytest.approx((3 / 4 + 1) / 4)


def test_it_plans_what_is_run():
    plan, result = plan_sweep(VIT, pixels(12), HEADS), rl.run_sweep(VIT, pixels(12), HEADS)
    assert (plan.n_rows, plan.n_metrics) == (result.table.num_rows, len(result.metrics))
    assert plan.n_conditions == len(result.conditions) == 7  # the clean run is added


def test_the_sizes_are_those_of_a_table():
    plan = plan_sweep(VIT, pixels(12), HEADS, METRICS)
    names = TensorSource(pixels(12)).shard(0).names
    rows = [{"condition": one.key, "shard": 0, "image": name} for one in (Condition(), *HEADS) for name in names]
    schema = pa.schema([("condition", pa.string()), ("shard", pa.int32()), ("image", pa.string())])
    real = pa.Table.from_pylist(rows, schema)
    for metric in METRICS:
        real = real.append_column(metric.name, pa.array(torch.rand(len(real)).double().numpy()))
    assert plan.batch_size == 12  # there are no more
    assert plan.raw_bytes == pytest.approx(real.nbytes, rel=0.01)
    large = plan_sweep(VIT, torch.zeros(256, 3, 24, 32), grid(ablate_head, layer=range(4), head=range(3)), METRICS)
    assert 3 * 3 < large.stored_row_bytes < large.raw_row_bytes  # no less than the bits of random float32 numbers
    assert large.stored_bytes == large.n_rows * large.stored_row_bytes and large.n_rows == 13 * 256


def test_the_calibration_is_one_pass_after_a_warm_up():
    seen = []
    handle = VIT.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    plan_sweep(VIT, pixels(40), HEADS, batch_size=16)
    handle.remove()
    assert seen == [16, 16]
    assert 0 < time_clean(VIT, pixels(2)) < 5


def test_several_models_and_image_sets():
    models = {"S": VIT, "deep": build(seed=1, n_layers=6)}
    sources = {"few": pixels(3), "many": TensorSource(pixels(20), shard_size=7)}
    conditions = HEADS.over(models=["S", "deep"], images=["few", "many"])
    plan = plan_sweep(models, sources, conditions, METRICS, shard_size=2)
    assert {(run.model, run.images): (run.n_images, run.n_tasks, run.n_layers) for run in plan.runs} == {
        ("S", "few"): (3, 2, 4),
        ("S", "many"): (20, 3, 4),
        ("deep", "few"): (3, 2, 6),
        ("deep", "many"): (20, 3, 6),
    }
    assert plan.n_rows == 2 * 7 * 23
    said = str(plan)
    assert "Conditions: 28. Tasks: 10. Rows: 322." in said and "deep on 20 many: conditions: 7, groups: 1" in said
    with pytest.raises(ConfigError, match=r"about the images 'images', but there are \['few', 'many'\]"):
        plan_sweep({"model": VIT}, sources, HEADS)


@dataclass(frozen=True)
class Stream:
    """A source that does not know how many images it has, and whose first shard has none that can be used."""

    usable: int = 5

    @property
    def n_shards(self):
        return 4

    @property
    def n_images(self):
        return None

    @property
    def identity(self):
        return "stream"

    def shard(self, index):
        n = self.usable if index else 0
        return Shard(names=tuple(f"{index}/{i}" for i in range(n)), images=pixels(n))


def test_a_source_of_unknown_length():
    assert plan_sweep(VIT, Stream(), HEADS).runs[0].n_images == 20
    with pytest.raises(ImageError, match="No image of this source"):
        plan_sweep(VIT, Stream(usable=0), HEADS)


def test_it_is_told_in_words():
    planned = grid(rl.Ablate, target=[rl.Heads([(3, 0)]), rl.Heads([(2, 0)])], mode=["mean"])
    plan = plan_sweep(VIT, pixels(5), planned + HEADS + Conditions.of([Condition()]), METRICS)
    said = plan.describe()
    assert (
        "Conditions: 9. Tasks: 1. Rows: 45." in said and "Passes over the reference images that come first: 1." in said
    )
    histogram = [line.split() for line in said.splitlines() if line.endswith("#")]
    assert [(row[0], row[1], len(row[-1])) for row in histogram if row[0] != "none"] == [
        ("0", "2", 27),
        ("1", "2", 27),
        ("2", "1", 13),
        ("3", "3", 40),
    ]
    assert "none (clean)" in said and "the edits themselves, extra tokens, metrics, fitting" in said
    forwards = 1 + 2 + 2 * 3 / 4 + 2 / 4 + 3 / 4
    slow = replace(plan, runs=(replace(plan.runs[0], clean_seconds=100.0),))
    assert slow.seconds == pytest.approx(forwards * 5 * 100) == 2875
    assert "Expected: 47 min 55 s, 0.64 of running" in slow.describe()


def test_what_does_not_fit_is_refused_before_anything_runs():
    counted = []
    handle = VIT.register_forward_pre_hook(lambda *_: counted.append(1))
    with pytest.raises(InterventionError, match="2 of 8 conditions cannot be run"):
        plan_sweep(VIT, pixels(2), HEADS + grid(ablate_head, layer=[7], head=[0, 1]))
    handle.remove()
    assert not counted

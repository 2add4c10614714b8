"""The runner against the loop of a notebook, over random grids; and what it does when memory is short."""

import dataclasses
from inspect import unwrap
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runner_cases import MODELS, edits_of, metrics_of, model, naive_loop, neurons, shard_of, sizes, together, values_of

import registerlens as rl
from registerlens.data.sources import Shard
from registerlens.errors import ConfigError, InterventionError, OutOfMemoryError, ShapeError
from registerlens.evaluation import edit_runs
from registerlens.evaluation.edit_runs import find_stack, floats_a_token, free_memory, out_of_memory_in
from registerlens.evaluation.metrics import Metric, metric
from registerlens.interventions.base import Edit, Intervention
from registerlens.sweep.conditions import Condition
from registerlens.sweep.job import run_task

MEAN = Metric(name="mean", measure=lambda edited, clean: edited.output.flatten(1).mean(1))


def conditions_of(name, size, chosen):
    made = edits_of(name, size)
    return [
        Condition(interventions=tuple(made[one] for one in group), factors={"edits": " ".join(group)})
        for group in chosen
    ]


def assert_equal(got, expected):
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = got.nan_to_num(), expected.nan_to_num()
    assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp_min(1)).all(), (got - expected).abs().max()


# Equal to the naive loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_equals_the_naive_loop_on_random_grids(name, data):
    vit, _ = model(name)
    size = data.draw(st.sampled_from(sizes(name)))
    kinds = st.lists(st.sampled_from(sorted(edits_of(name, size))), max_size=3).filter(together)
    conditions = conditions_of(name, size, data.draw(st.lists(kinds, min_size=1, max_size=7)))
    n, batch_size, stack = (data.draw(st.integers(1, most)) for most in (4, 5, 12))
    shard, metrics = shard_of(name, n, size, data.draw(st.integers(0, 3))), metrics_of(name)
    table = run_task(vit, shard, conditions, metrics, index=3, batch_size=batch_size, stack=stack)
    assert_equal(values_of(table, conditions, metrics, n), naive_loop(vit, shard, conditions, metrics))
    assert table["condition"].to_pylist() == [one.key for one in conditions for _ in range(n)]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_edit_in_one_stack_equals_the_naive_loop(name):
    vit, _ = model(name)
    size = sizes(name)[1]
    conditions = conditions_of(name, size, [[one] for one in edits_of(name, size)])
    shard, metrics = shard_of(name, 2, size), metrics_of(name)
    table = run_task(vit, shard, conditions, metrics, index=0, batch_size=2, stack=16)
    expected = naive_loop(vit, shard, conditions, metrics)
    assert_equal(values_of(table, conditions, metrics, 2), expected)
    clean = naive_loop(vit, shard, [Condition()], metrics)[0, -1]
    changed = ((expected[:, -1] - clean).abs() > 1e-6).any(-1)  # by every edit, so that equality says something
    assert [one.factors["edits"] for one, has in zip(conditions, changed, strict=True) if not has] == ["no register"]


def test_inside_an_edit_everything_is_relative_to_the_edited_model():
    vit, _ = model("planted")
    size = sizes("planted")[0]
    made = edits_of("planted", size)
    conditions = conditions_of("planted", size, [["zero head"], ["registers"], ["noise one neuron", "bias"]])
    shard, metrics = shard_of("planted", 3, size), metrics_of("planted")
    with vit.edit(made["register"], made["another bias"]):
        expected = naive_loop(vit, shard, conditions, metrics)
        table = run_task(vit, shard, conditions, metrics, index=0, batch_size=2, stack=6)
    assert_equal(values_of(table, conditions, metrics, 3), expected)


def test_hooks_of_the_caller_that_edit_in_place_fire_once_and_reach_no_other_condition():
    vit, _ = model("planted")
    size = sizes("planted")[0]
    names = ["zero head", "zero patches", "zero one neuron", "zero one early neuron"]
    conditions = conditions_of("planted", size, [[one] for one in names])
    shard, metrics = shard_of("planted", 3, size), metrics_of("planted")
    places = ["hook_tokens", "blocks.*.hook_resid_pre", "blocks.*.hook_resid_post"]
    with vit.hooks([(places, lambda resid, hook: resid.mul_(1.05))]):
        expected = naive_loop(vit, shard, conditions, metrics)
        table = run_task(vit, shard, conditions, metrics, index=0, batch_size=3, stack=9)
    assert_equal(values_of(table, conditions, metrics, 3), expected)


# As little as possible -----------------------------------------------------------------------------------------------


def sequences_through(vit, monkeypatch, task):
    """How many sequences each block saw while the task was done, and the table."""
    seen = [0] * vit.cfg.n_layers
    handles = [
        block.register_forward_pre_hook(lambda module, arguments, i=i: seen.__setitem__(i, seen[i] + len(arguments[0])))
        for i, block in enumerate(vit.blocks)
    ]
    try:
        table = task()
    finally:
        for handle in handles:
            handle.remove()
    return seen, table


def test_a_block_runs_only_for_conditions_edited_there_or_before(monkeypatch):
    vit, _ = model("planted")
    n_layers = vit.cfg.n_layers
    conditions = [Condition(interventions=(rl.Ablate(neurons((layer, 1))),)) for layer in range(n_layers)] * 2
    conditions += [Condition(), *conditions_of("planted", (32, 32), [["no register"]])]
    shard = shard_of("planted", 5, (32, 32))
    task = lambda: run_task(vit, shard, conditions, [MEAN], index=0, batch_size=2, stack=4)  # noqa: E731
    seen, _ = sequences_through(vit, monkeypatch, task)
    assert seen == [5 * (1 + 2 * (layer + 1)) for layer in range(n_layers)]


def test_the_stack_is_filled_and_never_exceeded(monkeypatch):
    vit, _ = model("planted")
    conditions = [Condition(interventions=(rl.Ablate(neurons((2, i))),)) for i in range(7)]
    shard, sizes_seen = shard_of("planted", 4, (32, 32)), []
    monkeypatch.setattr(edit_runs, "run_from", spy(edit_runs.run_from, lambda vit, x, *rest: sizes_seen.append(len(x))))
    run_task(vit, shard, conditions, [MEAN], index=0, batch_size=2, stack=7)
    assert sizes_seen == [6, 6, 2] * 2


def spy(function, note):
    def called(*arguments):
        note(*arguments)
        return function(*arguments)

    return called


def test_metrics_that_need_no_attention_do_not_pay_for_it(monkeypatch):
    vit, _ = model("planted")
    monkeypatch.setattr(
        "registerlens.engine.attention_received.received_attention", lambda *_: pytest.fail("attention was computed")
    )
    monkeypatch.setattr("registerlens.engine.views.token_norms", lambda *_: pytest.fail("norms were computed"))
    conditions = conditions_of("planted", (32, 32), [["zero head"]])
    run_task(vit, shard_of("planted", 2, (32, 32)), conditions, [MEAN], index=0, batch_size=2, stack=2)


# Tables --------------------------------------------------------------------------------------------------------------


def test_the_table_is_long_in_conditions_and_images():
    vit, _ = model("planted")
    conditions = conditions_of("planted", (32, 32), [["zero one neuron"], [], ["registers"], ["zero head"]])
    shard = shard_of("planted", 3, (32, 32), seed=2)
    table = run_task(vit, shard, conditions, [MEAN, metrics_of("planted")[0]], index=7, batch_size=2, stack=8)
    fixed = [("condition", pa.string()), ("shard", pa.int32()), ("image", pa.string())]
    assert table.schema == pa.schema([*fixed, ("mean", pa.float64()), ("largest_norm", pa.float64())])
    assert table["condition"].to_pylist() == [one.key for one in conditions for _ in range(3)]
    assert table["image"].to_pylist() == ["2/0", "2/1", "2/2"] * 4
    assert set(table["shard"].to_pylist()) == {7}
    with torch.no_grad():
        expected = vit(shard.images).mean(1)
    assert np.allclose(table["mean"].to_numpy()[3:6], expected, rtol=1e-5)


def test_the_same_task_gives_the_same_bits():
    vit, _ = model("planted")
    conditions = conditions_of(
        "planted", (32, 32), [["noise neurons"], ["register, gaussian"], ["bias"], ["resample patches"]]
    )
    shard, metrics = shard_of("planted", 3, (32, 32)), metrics_of("planted")
    first, again = (run_task(vit, shard, conditions, metrics, index=0, batch_size=2, stack=4) for _ in range(2))
    for one in metrics:
        assert np.array_equal(first[one.name].to_numpy(), again[one.name].to_numpy(), equal_nan=True)


def test_no_images_and_no_conditions_give_empty_tables():
    vit, _ = model("planted")
    nothing = Shard(names=(), images=torch.zeros(0, 3, 32, 32))
    conditions = conditions_of("planted", (32, 32), [["zero head"]])
    assert run_task(vit, nothing, conditions, [MEAN], index=0, batch_size=2, stack=2).shape == (0, 4)
    assert run_task(vit, shard_of("planted", 2, (32, 32)), [], [MEAN], index=0, batch_size=2, stack=2).shape == (0, 4)


def test_the_model_is_left_as_it_was():
    vit, _ = model("planted")
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    conditions = conditions_of("planted", (32, 32), [["registers"], ["bias"], ["zero cls"]])
    broken = metric(lambda edited, clean, layout: 1 / 0, name="broken")
    shard = shard_of("planted", 2, (32, 32))
    run_task(vit, shard, conditions, metrics_of("planted"), index=0, batch_size=2, stack=4)
    with pytest.raises(ZeroDivisionError):
        run_task(vit, shard, conditions, [broken], index=0, batch_size=2, stack=4)
    assert vit.n_test_time_registers == 0
    assert not any(point.has_hooks() for point in vit.hook_dict.values())
    assert not vit._forward_hooks and not vit._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())


# NaN -----------------------------------------------------------------------------------------------------------------


def test_what_is_not_a_number_is_recorded_and_the_others_stand():
    vit, _ = model("planted")

    def odd(edited, clean, layout):
        return edited.output[:, 0].where(edited.output[:, 0] != clean.output[:, 0], torch.nan)

    conditions = conditions_of("planted", (32, 32), [["zero head"], [], ["mean patches"]])
    table = run_task(vit, shard_of("planted", 3, (32, 32)), conditions, [metric(odd)], index=0, batch_size=2, stack=4)
    assert np.isnan(table["odd"].to_numpy()).tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert table["odd"].null_count == 0


def test_images_and_edits_that_break_the_model_spoil_no_other_number():
    vit, _ = model("planted")
    conditions = conditions_of("planted", (32, 32), [["zero head"], ["mean patches"]])
    conditions.append(Condition(interventions=(Spoil(),)))
    shard, metrics = shard_of("planted", 3, (32, 32)), metrics_of("planted")
    images = shard.images.clone()
    images[1] = torch.inf
    spoilt = dataclasses.replace(shard, images=images)
    got, whole = (
        values_of(run_task(vit, one, conditions, metrics, index=0, batch_size=3, stack=9), conditions, metrics, 3)
        for one in (spoilt, shard)
    )
    assert got[:, :, 1].isnan().all()
    assert got[2].isnan().sum() >= got[2].numel() - 3 * 1  # only attention before the edit can still be told
    assert_equal(got[:2][:, :, [0, 2]], whole[:2][:, :, [0, 2]])


@dataclasses.dataclass(frozen=True)
class Spoil(Intervention):
    """Makes the residual stream infinite after block 0."""

    def edits(self, host, first_register):
        return [Edit("blocks.0.hook_resid_post", lambda x, scene: x + torch.inf)]


# Errors --------------------------------------------------------------------------------------------------------------


def fails(error, match, **changes):
    vit, _ = model("planted")
    given = {
        "shard": shard_of("planted", 2, (32, 32)),
        "conditions": conditions_of("planted", (32, 32), [["zero head"], ["zero cls"]]),
        "metrics": [MEAN],
        "batch_size": 2,
        "stack": 4,
    } | changes
    with pytest.raises(error, match=match):
        run_task(vit, *(given.pop(key) for key in ("shard", "conditions", "metrics")), index=0, **given)


def test_what_is_wrong_is_said():
    fails(ConfigError, "batch_size and stack", batch_size=0)
    fails(ConfigError, "batch_size and stack", stack=0)
    fails(ConfigError, "Two metrics are named 'mean'", metrics=[MEAN, MEAN])
    ill = metric(lambda edited, clean, layout: edited.tokens.mean(1), name="ill")
    fails(ShapeError, r"Metric 'ill' gave a tensor of shape \[4, 32\] for a batch of 4", metrics=[MEAN, ill])
    odd = [Condition(interventions=(one,)) for one in (Append(), rl.Ablate(rl.Heads([(0, 1)])))]
    fails(InterventionError, "cannot share a batch.*n_keys", conditions=odd)


def test_labels_for_other_images_are_refused():
    vit, _ = model("planted")
    shard = SimpleNamespace(names=("a",), images=torch.zeros(1, 3, 32, 32), labels=torch.zeros(2).long())
    with pytest.raises(ShapeError, match="2 labels for 1 images"):
        unwrap(run_task)(vit, shard, [Condition()], [MEAN], index=0, batch_size=1, stack=1)


def test_an_edit_of_the_wrong_size_is_refused_as_in_vit_edit():
    made = edits_of("planted", (41, 24))["shuffle heads"]
    fails(InterventionError, "Fit on images of this size", conditions=[Condition(interventions=(made,))])


@dataclasses.dataclass(frozen=True)
class Append(Intervention):
    """Appends a key in block 0 without saying so."""

    def edits(self, host, first_register):
        def more(x, scene):
            return torch.cat([x, x[:, :1]], 1)

        return [Edit(f"blocks.0.attn.hook_{point}", more) for point in "kv"]


def test_an_edit_that_never_fires_is_an_error(monkeypatch):
    monkeypatch.setattr(edit_runs, "stacked_hooks", lambda plans, scenes: [])
    fails(InterventionError, "Ablate never fired")


# Memory --------------------------------------------------------------------------------------------------------------

TOO_MUCH = {
    "of a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "of a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    "of Windows": RuntimeError("not enough memory: you tried to allocate 1 bytes."),
    "of Python": MemoryError(),
}


def short_of_memory(monkeypatch, most, error, clean_too=True):
    """Runs fail with more than so many sequences; what was tried."""
    tried = []

    def check(x):
        tried.append(len(x))
        if len(x) > most:
            raise error

    real = edit_runs.run_from
    monkeypatch.setattr(edit_runs, "run_from", spy(real, lambda vit, x, *rest: check(x)))
    if clean_too:
        monkeypatch.setattr("registerlens.engine.views.run_from", spy(real, lambda vit, x, *rest: check(x)))
    return tried


@pytest.mark.parametrize("error", TOO_MUCH.values(), ids=list(TOO_MUCH))
def test_the_stack_is_halved_where_memory_is_short_and_stays_so(monkeypatch, error):
    vit, _ = model("planted")
    conditions = [Condition(interventions=(rl.Ablate(neurons((2, i))),)) for i in range(8)]
    shard, metrics = shard_of("planted", 4, (32, 32)), metrics_of("planted")
    expected = naive_loop(vit, shard, conditions, metrics)
    tried = short_of_memory(monkeypatch, 5, error)
    table = run_task(vit, shard, conditions, metrics, index=0, batch_size=2, stack=16)
    assert tried == [2, 16, 8, *[4] * 4, 2, *[4] * 4]
    assert_equal(values_of(table, conditions, metrics, 4), expected)


@pytest.mark.parametrize("clean_too", [True, False])
def test_the_batch_is_halved_where_it_is_too_large_itself(monkeypatch, clean_too):
    vit, _ = model("planted")
    size = (32, 32)
    conditions = conditions_of("planted", size, [["zero one neuron"], ["noise heads"], ["registers"], []])
    shard, metrics = shard_of("planted", 7, size), metrics_of("planted")
    expected = naive_loop(vit, shard, conditions, metrics)
    tried = short_of_memory(monkeypatch, 1, TOO_MUCH["of a CPU"], clean_too)
    table = run_task(vit, shard, conditions, metrics, index=0, batch_size=6, stack=12)
    assert max(tried[3:] if clean_too else tried[5:]) <= 3
    assert_equal(values_of(table, conditions, metrics, 7), expected)


def test_a_single_image_that_does_not_fit_says_what_to_do(monkeypatch):
    short_of_memory(monkeypatch, 0, TOO_MUCH["of a GPU"])
    fails(OutOfMemoryError, r"A single image of 32 x 32 pixels .*2.00 GiB.*vit.half\(\)")


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    tried = short_of_memory(monkeypatch, 2, RuntimeError("shapes cannot be multiplied"))
    fails(
        RuntimeError,
        "cannot be multiplied",
        conditions=conditions_of("planted", (32, 32), [["zero head"], ["mean head"]]),
    )
    assert tried == [2, 4]


def test_what_was_held_is_free_when_less_is_tried():
    held = []

    class Large:
        def __del__(self):
            held.append("freed")

    def work():
        large = Large()
        raise MemoryError(f"no room beside {type(large).__name__}")

    assert out_of_memory_in(work) == "no room beside Large"
    assert held == ["freed"]


def test_the_stack_found_is_a_multiple_of_the_batch_within_memory(monkeypatch):
    vit, _ = model("planted")
    tokens = vit.cfg.layout().n_tokens + 1
    assert free_memory(vit.device) > 2**20
    assert find_stack(vit, 1) == min(64, 4096 // tokens)
    assert find_stack(vit, 3) == 4096 // tokens // 3 * 3
    assert find_stack(vit, 4096) == 4096
    assert find_stack(vit, 1, size=320) == 1
    a_sequence = tokens * floats_a_token(vit.cfg) * 4
    kept = 2 * tokens * vit.cfg.d_model * (vit.cfg.n_layers + 2) * 4
    monkeypatch.setattr("registerlens.evaluation.edit_runs.free_memory", lambda device: 2 * (kept + 9.5 * a_sequence))
    assert find_stack(vit, 2) == 8
    monkeypatch.setattr("registerlens.evaluation.edit_runs.free_memory", lambda device: 0.0)
    assert find_stack(vit, 2) == 2
    with pytest.raises(ConfigError, match="batch_size"):
        find_stack(vit, 0)

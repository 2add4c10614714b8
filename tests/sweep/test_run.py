"""`run_sweep`: what it takes, what it checks before any work, and that its numbers are those of a plain loop."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from store_cases import METRICS, bits, neurons, part_bits, part_files, pixels, rows, sweep, tiny_vit

import registerlens as rl
from registerlens.data.sources import TensorSource
from registerlens.engine.backends import LocalBackend
from registerlens.errors import ConfigError, InterventionError, ShapeError, StoreError
from registerlens.evaluation.metrics import Metric
from registerlens.progress import track
from registerlens.sweep.conditions import Condition
from registerlens.sweep.grid import grid
from registerlens.sweep.store import SweepStore


def test_the_numbers_are_those_of_a_plain_loop():
    vit, images, conditions = tiny_vit(), pixels(), neurons(3)
    table = rows(sweep(None, conditions=conditions)).set_index(["condition", "image"])
    with torch.inference_mode():
        clean = vit(images)
        for one in conditions:
            with vit.edit(*one.interventions):
                drift = (vit(images) - clean).norm(dim=-1)
            found = table.loc[one.key].loc[[f"image {i}" for i in range(len(images))], "drift"]
            np.testing.assert_allclose(found, drift, rtol=1e-5, atol=1e-6)
    assert (table.loc[Condition().key, "drift"] == 0).all()


def test_several_models_and_image_sets():
    images = {"a": pixels(4), "b": pixels(3, seed=5)}
    models = {"one": tiny_vit(0), "two": tiny_vit(1)}
    conditions = [replace(one, model=model, images=at) for one in neurons(1) for model in models for at in images]
    result = sweep(None, vit=models, images=images, conditions=conditions)
    assert result.table.num_rows == (2 + 1) * 2 * (4 + 3)
    alone = rows(sweep(None, vit=tiny_vit(1), images=images["b"], conditions=neurons(1)))
    mine = rows(result)
    for one, there in zip(neurons(1), [c for c in conditions if (c.model, c.images) == ("two", "b")], strict=True):
        expected = alone[alone["condition"] == one.key]["drift"].to_numpy()
        assert np.array_equal(mine[mine["condition"] == there.key]["drift"].to_numpy(), expected)


def _label(edited, clean):
    return edited.labels.double()


def test_labels_reach_the_metrics():
    labels = torch.arange(10) * 3
    result = sweep(None, [Metric(name="label", measure=_label)], conditions=neurons(1), labels=labels.tolist())
    table = rows(result)
    assert (table["label"] == table["image"].str.removeprefix("image ").astype(int) * 3).all()


def test_means_are_fitted_once_and_kept(tmp_path, monkeypatch):
    conditions = grid(rl.Ablate, target=[rl.Heads([(0, 1)]), rl.Heads([(1, 0)])], mode=["zero", "mean", "shuffle"])
    options = {"conditions": conditions, "reference_images": pixels(6, seed=9)}
    first = sweep(tmp_path, **options)
    assert bits(first.table) == bits(sweep(None, **options).table)
    by_hand = rl.Ablate.fit(tiny_vit(), pixels(6, seed=9), rl.Heads([(0, 1)]), mode="mean", batch_size=2)
    vit, where = tiny_vit(), conditions["target=0.1 mode=mean"].key
    with torch.inference_mode():
        clean = vit(pixels())
        with vit.edit(by_hand):
            drift = (vit(pixels()) - clean).norm(dim=-1)
    found = rows(first)
    np.testing.assert_allclose(found[found["condition"] == where]["drift"], drift, rtol=1e-5, atol=1e-6)

    monkeypatch.setattr("registerlens.sweep.fitting.fit_planned", None)  # a resumed run must not need it
    part = tmp_path / "parts" / "g00000-s000001.parquet"
    expected = part_bits(tmp_path)
    part.unlink()
    sweep(tmp_path, conditions=conditions, reference_images=None)
    assert part_bits(tmp_path) == expected
    with pytest.raises(StoreError, match=r"the reference images changed: \w+ -> \w+"):
        sweep(tmp_path, conditions=conditions, reference_images=pixels(6, seed=8))


def test_the_sweeps_own_images_are_what_edits_are_fitted_on_where_nothing_else_is_given(tmp_path):
    conditions = grid(rl.Ablate, target=[rl.Heads([(0, 1)])], mode=["mean"])
    own, given = sweep(tmp_path, conditions=conditions), sweep(None, conditions=conditions, reference_images=pixels())
    np.testing.assert_allclose(rows(own)["drift"], rows(given)["drift"], rtol=1e-5, atol=1e-6)
    more = conditions + grid(rl.Ablate, target=[rl.Heads([(1, 1)])], mode=["mean"])
    with pytest.raises(StoreError, match="the reference images changed: the sweep's own images -> "):
        sweep(tmp_path, conditions=more, reference_images=pixels(6, seed=8))
    sweep(tmp_path, conditions=more)


def test_added_conditions_are_fitted_and_old_fits_stay(tmp_path):
    few = grid(rl.Ablate, target=[rl.Heads([(0, 1)])], mode=["mean"])
    more = few + grid(rl.Ablate, target=[rl.Heads([(1, 1)])], mode=["mean", "noise"])
    source = TensorSource(pixels(6, seed=9), shard_size=4)
    sweep(tmp_path, conditions=few, reference_images=source)
    before = part_files(tmp_path)
    with pytest.raises(ConfigError, match="needed for 2 of the edits"):  # on other images than the rest, they would mix
        sweep(tmp_path, conditions=more)
    result = sweep(tmp_path, conditions=more, reference_images=source)
    assert before.items() <= part_files(tmp_path).items()
    alone = sweep(None, conditions=more, reference_images=source)
    order = ["condition", "image"]
    assert rows(result).sort_values(order, ignore_index=True).equals(rows(alone).sort_values(order, ignore_index=True))
    fits = sorted((tmp_path / "fitted").iterdir())
    assert [path.name for path in fits] == ["00000.zip", "00001.zip"]
    fits[0].write_bytes(fits[0].read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"fitted/00000.zip' is damaged"):
        sweep(tmp_path, conditions=more, reference_images=source)


class Counting(LocalBackend):
    """Notes what was asked of it."""

    calls = 0

    def run(self, job, tasks):
        type(self).calls += 1
        return super().run(job, tasks)


OTHER_SIZE = torch.zeros(3, 3, 8, 12)
REFUSED = {
    "labels": ({"labels": [0] * 7}, ShapeError, "7 labels for 10 images"),
    "labels of a set": (
        {"images": {"images": pixels(4), "more": pixels(3)}, "labels": {"more": [1, 2]}},
        ShapeError,
        "2 labels for 3 images",
    ),
    "labels for nobody": ({"labels": {"other": [1]}}, ConfigError, r"labels for \['other'\], but image sets"),
    "labels of several sets": (
        {"images": {"images": pixels(4), "b": pixels(4)}, "labels": [1] * 4},
        ConfigError,
        "by name",
    ),
    "labels of a source": ({"images": TensorSource(pixels()), "labels": [1] * 10}, ConfigError, "labels of its own"),
    "a neuron that is not there": (
        {"conditions": neurons(13)},
        InterventionError,
        r"2 of 26 .*(?s:.)*layer=0 neuron=12",
    ),
    "an unknown model": ({"conditions": [replace(neurons(1)[0], model="big")]}, InterventionError, "no model 'big'"),
    "unknown images": ({"conditions": [replace(neurons(1)[0], images="imagse")]}, ConfigError, "Did you mean 'images'"),
    "a control of nothing": ({"conditions": [replace(neurons(1)[0], control_of="?")]}, InterventionError, "left out"),
    "images of a wrong kind": ({"images": ["a.png"]}, ConfigError, "are a list"),
    "images of a wrong shape": ({"images": pixels()[0]}, ConfigError, "expected .image, channel"),
    "images of a wrong size": ({"images": torch.zeros(3, 1, 8, 8)}, ShapeError, "Expected images of shape"),
    "no reference": (
        {
            "conditions": grid(rl.Ablate, target=[rl.Heads([(0, 1)])], mode=["mean"]).over(images=["a", "b"]),
            "images": {"a": pixels(), "b": pixels(4)},
        },
        ConfigError,
        "needed for 1 of the edits",
    ),
    "metrics of one name": ({"metrics": [METRICS[0]] * 2}, ConfigError, "Two metrics are named"),
    "a metric named image": ({"metrics": [replace(METRICS[0], name="image")]}, ConfigError, "name of its own"),
    "no metric": ({"metrics": []}, ConfigError, "at least one metric"),
    "batch size": ({"batch_size": 0}, ConfigError, "batch_size must be at least 1"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_wrong_is_told_before_any_work(tmp_path, wrong):
    options, error, said = REFUSED[wrong]
    Counting.calls = 0
    with pytest.raises(error, match=said):
        sweep(tmp_path / "store", backend=Counting(), **options)
    assert not Counting.calls and not list(tmp_path.rglob("*.parquet"))


def test_backends_are_named_and_options_belong_to_them(tmp_path):
    for options, said in (
        ({"backend": "gpu"}, "must be .local., .processes. or .ray."),
        ({"workers": 4}, "needs backend='processes'"),
        ({"workers": -1, "backend": "processes"}, "not be negative"),
        ({"address": "auto"}, "needs backend='ray'"),
    ):
        with pytest.raises(ConfigError, match=said):
            sweep(tmp_path, **options)
    vit = tiny_vit()
    vit.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * 2)
    with pytest.raises(ConfigError, match=r"'model' has hooks or edits in force at blocks.0.hook_resid_post"):
        sweep(tmp_path, vit=vit)


def test_threads_are_those_of_the_store_and_put_back(tmp_path):
    seen = []

    class Watching(LocalBackend):
        def run(self, job, tasks):
            seen.append((job.threads, job.stack))
            return super().run(job, tasks)

    before = torch.get_num_threads()
    sweep(tmp_path, conditions=neurons(1), threads=2, backend=Watching())
    (tmp_path / "parts" / "g00000-s000000.parquet").unlink()
    sweep(tmp_path, conditions=neurons(1), threads=1, backend=Watching())
    assert seen[0][0] == seen[1][0] == 2 == SweepStore.open(tmp_path).manifest.threads
    assert torch.get_num_threads() == before


def test_progress_counts_conditions(tmp_path, monkeypatch):
    told = {}

    def watching(items, description, total, weight, **options):
        told.update(options, total=total, weights=[])
        for item in items:
            yield item
            told["weights"].append(weight(item))

    monkeypatch.setattr("registerlens.sweep.run.track", watching)
    sweep(tmp_path, conditions=neurons(2))
    assert told["total"] == pytest.approx(5) and told["done"] == pytest.approx(0)
    assert told["weights"] == pytest.approx([1] * 5) and told["unit"] == "conditions"
    (tmp_path / "parts" / "g00000-s000001.parquet").unlink()
    sweep(tmp_path, conditions=neurons(2))
    assert told["done"] == pytest.approx(4) and told["weights"] == pytest.approx([1])


def test_the_progress_bar_shows_the_rate(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert list(track([1, 2, 3], "sweep", 10, lambda item: 2.5, done=2.5, unit="conditions")) == [1, 2, 3]

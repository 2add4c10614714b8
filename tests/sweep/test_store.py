"""The store: what it holds, what it refuses, and what it notices."""

import errno
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from dataclasses import replace
from itertools import product

import duckdb
import fsspec
import pandas as pd
import polars as pl
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from store_cases import METRICS, Spotty, bits, neurons, part_bits, part_files, pixels, rows, sweep, tiny_vit

import registerlens as rl
from registerlens.engine import lock
from registerlens.engine.backends import Task
from registerlens.engine.folder import LocalFolder, RemoteFolder, folder_at
from registerlens.engine.lock import holder_of, locked
from registerlens.engine.store import CorruptPartWarning, from_bytes, name_of, to_bytes
from registerlens.errors import StoreError
from registerlens.sweep.run import read_sweep
from registerlens.sweep.store import SweepStore, sweep_status


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    sweep(folder)
    return folder


@pytest.fixture
def filled(made, tmp_path):
    """A finished store that a test may damage."""
    return shutil.copytree(made, tmp_path / "store")


@pytest.fixture
def memory():
    return f"memory://{uuid.uuid4().hex}/sweep"


# What it holds -------------------------------------------------------------------------------------------------------


def test_rows_stand_by_group_shard_condition_and_image(filled):
    table, manifest = SweepStore.open(filled).table(), SweepStore.open(filled).manifest
    (group,) = manifest.groups
    images = [f"image {i}" for i in range(10)]
    expected = [(key, i // 2, images[i]) for shard in range(5) for key in group for i in (2 * shard, 2 * shard + 1)]
    assert list(zip(*(table[name].to_pylist() for name in ("condition", "shard", "image")), strict=True)) == expected
    assert table.column_names == ["condition", "shard", "image", "drift", "odd"]
    assert set(group) == {one.key for one in neurons()} | {rl.sweep.conditions.Condition().key}


def test_pandas_polars_and_duckdb_read_it(filled):
    pattern, table = f"{filled}/parts/*.parquet", SweepStore.open(filled).table().to_pandas()
    order = ["condition", "image"]
    table = table.sort_values(order, ignore_index=True)
    assert table["odd"].isna().any() and not table["odd"].isna().all()
    read = {
        "pandas": pd.read_parquet(filled / "parts"),
        "polars": pl.read_parquet(pattern).to_pandas(),
        "duckdb": duckdb.sql(f"FROM '{pattern}'").df(),
    }
    for name, frame in read.items():
        pd.testing.assert_frame_equal(frame.sort_values(order, ignore_index=True), table, obj=name)
    assert pl.read_parquet(pattern)["odd"].null_count() == 0, "NaN is a number that was measured, and not missing"


def test_a_url_holds_the_same_as_a_folder(filled, memory):
    sweep(memory)
    assert part_bits(memory) == part_bits(filled)
    status = sweep_status(memory)
    assert (status.tasks_done, status.rows, status.holder, status.finished) == (5, 50, None, True)
    assert status.last is not None and status.n_bytes > 0
    with pytest.warns(CorruptPartWarning, match="g00000-s000001"):
        folder_at(memory).write(name_of(Task(0, 1)), b"PAR1 nonsense")
        sweep(memory)
    assert part_bits(memory) == part_bits(filled)
    assert sweep_status(memory).corrupt == ("'g00000-s000001.parquet.corrupt' was set aside",)


def test_a_finished_sweep_is_not_done_again(filled):
    before = part_files(filled)
    result = sweep(filled)
    assert part_files(filled) == before
    assert bits(result.table) == bits(sweep(None).table)
    with pytest.raises(StoreError, match="holds a sweep already"):
        sweep(filled, resume=False)


def test_a_result_is_read_back_without_models_or_images(filled):
    read, made = read_sweep(filled), sweep(filled)  # the second is a resumed run with nothing left to do
    assert bits(read.table) == bits(made.table)
    assert (read.conditions, read.metrics, read.skipped) == (made.conditions, made.metrics, made.skipped)
    (filled / name_of(Task(0, 4))).unlink()
    assert read_sweep(filled).table.num_rows == 40
    with pytest.raises(StoreError, match="There is no sweep in"):
        read_sweep(filled / "parts")


# What it refuses -----------------------------------------------------------------------------------------------------


def other_weights():
    vit = tiny_vit()
    with torch.no_grad():
        vit.blocks[1].mlp.b_in[3] += 1e-6
    return vit


ONE_OTHER = [
    *neurons()[:-1],
    replace(neurons()[-1], interventions=(rl.Ablate(rl.RegisterNeurons.from_pairs([(0, 0)])),)),
]
CHANGES = {
    "weights": (lambda: {"vit": other_weights()}, r"the model 'model' changed \(other weights.*: \w{16} -> \w{16}"),
    "images": (lambda: {"images": pixels(seed=2)}, "the images 'images' changed: .*other files, pixels"),
    "fewer images": (
        lambda: {"images": pixels()[:7]},
        "the images 'images' changed: n_images 10 -> 7, n_shards 5 -> 4",
    ),
    "metrics": (lambda: {"metrics": METRICS[:1]}, "the metrics changed: drift, odd -> drift$"),
    "another metric": (
        lambda: {"metrics": [METRICS[0], replace(METRICS[1], norms=("0.mlp",))]},
        r"the metric 'odd' is another one of the same name \(norms: \[\] -> \[\"0.mlp\"\]\)",
    ),
    "batch size": (lambda: {"batch_size": 1}, "batch_size changed: 2 -> 1"),
    "seed": (lambda: {"seed": 5}, "seed changed: 0 -> 5"),
    "one condition fewer": (
        lambda: {"conditions": neurons()[:-1]},
        r"the condition 'layer=1 neuron=1' \(\w{16}\) is no",
    ),
    "one condition changed": (
        lambda: {"conditions": ONE_OTHER},
        r"'layer=1 neuron=1' changed: content\[0\].target.pairs\[0\]\[0\]: 1 -> 0",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_and_named(filled, change):
    options, said = CHANGES[change]
    before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=rf"(?ms)holds another sweep.*{said}"):
        sweep(filled, **options())
    assert {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()} == before


def test_every_change_is_named_at_once(filled):
    with pytest.raises(StoreError) as caught:
        sweep(filled, conditions=[], seed=1, batch_size=4)
    told = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(told) == 2 + 4


def test_conditions_that_are_only_added_extend_it(filled):
    before = part_files(filled)
    more = [*reversed(neurons(layers=(1,))), *neurons(layers=(0,))]
    more += [replace(one, factors=one.factors | {"again": True}) for one in neurons(2)]
    result = sweep(filled, conditions=more)
    after = part_files(filled)
    assert before.items() <= after.items() and len(after) == 2 * len(before)
    assert [len(keys) for keys in SweepStore.open(filled).manifest.groups] == [5, 4]
    alone = sweep(None, conditions=more)
    order = ["condition", "image"]
    assert rows(result).sort_values(order, ignore_index=True).equals(rows(alone).sort_values(order, ignore_index=True))


def test_a_newer_format_says_what_to_do(filled):
    path = filled / "manifest.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"format": 9, "versions": {"registerlens": "7.0"}, "unheard": "of"}))
    for attempt in (lambda: sweep(filled), lambda: SweepStore.open(filled), lambda: sweep_status(filled)):
        with pytest.raises(StoreError, match=r"format 9, written by registerlens 7.0; .*Update registerlens"):
            attempt()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"format": 1}', "lacks 'versions'"), (None, "no manifest")],
)
def test_a_manifest_that_cannot_be_read(filled, text, said):
    path = filled / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    before = part_files(filled)
    with pytest.raises(StoreError, match=said):
        sweep(filled)
    assert part_files(filled) == before
    with pytest.raises(StoreError, match="There is no sweep" if text is None else said):
        SweepStore.open(filled)


# What it notices -----------------------------------------------------------------------------------------------------


def test_a_corrupt_part_is_named_set_aside_and_made_again(filled):
    reference, path = part_bits(filled), filled / name_of(Task(0, 2))
    others = {name: told for name, told in part_files(filled).items() if name != path.name}
    damaged = path.read_bytes()[:-20]
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"g00000-s000002.parquet' is truncated or damaged"):
        SweepStore.open(filled).table()
    assert sweep_status(filled).tasks_done == 4 and "s000002" in sweep_status(filled).describe()
    with pytest.warns(CorruptPartWarning, match=r"g00000-s000002.parquet' is truncated or damaged"):
        sweep(filled)
    assert part_bits(filled) == reference and others.items() <= part_files(filled).items()
    assert path.with_name(path.name + ".corrupt").read_bytes() == damaged
    assert len(pl.read_parquet(f"{filled}/parts/*.parquet")) == 50


def test_any_damage_to_a_part_is_an_error_or_harmless(filled):
    store, task = SweepStore.open(filled), Task(0, 3)
    content = (filled / name_of(task)).read_bytes()
    expected, caught = bits(store.read(task)), 0
    cut = [content[:n] for n in range(0, len(content), 97)]
    flipped = [
        content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in range(0, len(content), 5)
    ]
    for damaged in (*cut, *flipped):
        try:
            assert bits(from_bytes(damaged, task)) == expected
        except StoreError:
            caught += 1
    assert len(cut) < caught < len(cut) + len(flipped), (caught, len(cut), len(flipped))


def test_a_part_of_another_task_is_no_part(filled):
    (filled / name_of(Task(0, 1))).write_bytes((filled / name_of(Task(0, 2))).read_bytes())
    with pytest.raises(
        StoreError, match=r"s000001.parquet' is no part of this store: it says that it is g00000-s000002"
    ):
        SweepStore.open(filled).table()
    store = SweepStore.open(filled)
    with pytest.raises(StoreError, match="task g00000-s000003 has rows of other conditions or shards"):
        store.write(Task(0, 3), store.read(Task(0, 2)))
    with pytest.raises(StoreError, match="has the columns"):
        store.write(Task(0, 2), store.read(Task(0, 2)).drop_columns(["odd"]))
    swapped = store.read(Task(0, 2)).rename_columns(["condition", "shard", "image", "odd", "drift"])
    (filled / name_of(Task(0, 2))).write_bytes(to_bytes(swapped, Task(0, 2)))
    with pytest.raises(StoreError, match="has the columns"):
        store.read(Task(0, 2))


FAILURES = {
    "full disk": (errno.ENOSPC, "The disk is full. Parts written before are intact"),
    "quota": (errno.EDQUOT, "Your quota is used up"),
    "no permission": (errno.EACCES, "Permission is denied"),
    "another": (errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize(
    ("where", "failure"),
    [*product(["mkstemp", "fsync", "replace"], ["full disk"]), *product(["fsync"], [*FAILURES][1:])],
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failure, where):
    number, said = FAILURES[failure]
    owner = {"mkstemp": tempfile, "fsync": os, "replace": type(tmp_path)}[where]
    real, calls = getattr(owner, where), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) > 6:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(StoreError, match=f"cannot be written. .*{said}"):
        patched.setattr(owner, where, failing)
        sweep(tmp_path, conditions=[], shard_size=1)
    there = part_files(tmp_path)
    assert 0 < len(there) < 10 and not list(tmp_path.rglob(".*"))
    assert holder_of(LocalFolder(tmp_path)) is None
    result = sweep(tmp_path, conditions=[], shard_size=1)
    assert there.items() <= part_files(tmp_path).items()
    assert bits(result.table) == bits(sweep(None, conditions=[], shard_size=1).table)


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        sweep(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be reached"):
        sweep("nosuch://bucket/sweep")


def test_nothing_of_the_users_is_swept_up(tmp_path):
    (tmp_path / ".bashrc").write_text("mine")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "notes.parquet.txt").write_text("mine too")
    sweep(tmp_path / ".")
    assert (tmp_path / ".bashrc").read_text() == "mine"
    assert (tmp_path / "parts" / "notes.parquet.txt").read_text() == "mine too"


# One run at a time ---------------------------------------------------------------------------------------------------


def test_two_runs_on_one_folder(filled):
    before = part_files(filled)
    with locked(LocalFolder(filled)):
        with pytest.raises(StoreError, match=rf"in use by process {os.getpid()} on .* since 20.*twice"):
            sweep(filled)
        assert sweep_status(filled).holder.pid == os.getpid()
        assert SweepStore.open(filled).table().num_rows == 50, "reading needs no lock"
    assert part_files(filled) == before and sweep_status(filled).holder is None
    sweep(filled)


def test_two_runs_on_one_url(memory, monkeypatch):
    sweep(memory)
    folder = folder_at(memory)
    with locked(folder), pytest.raises(StoreError, match=rf"in use by process {os.getpid()} on .* since 20"):
        sweep(memory)
    assert holder_of(folder) is None
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "DEAD", 0.5)
    with locked(folder) as check:
        first = folder.read(lock.NAME)
        until = torch.tensor(0)
        while folder.read(lock.NAME) == first:
            until += 1
            assert until < 1e6, "no sign of life"
        assert holder_of(folder).pid == os.getpid()
        folder.write(lock.NAME, first.replace(json.loads(first)["token"].encode(), b"somebody else"))
        with pytest.raises(StoreError, match="no longer held by this run"):
            while True:
                check()
    assert b"somebody else" in folder.read(lock.NAME), "a lost lock is not taken away from who has it"


class Silent(RemoteFolder):
    """Storage that gives no answer to signs of life."""

    def read(self, name):
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait()
        return super().read(name)


def test_a_run_ends_though_its_storage_is_silent(memory, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    there = folder_at(memory)
    folder = Silent(there.system, there.root, there.where)
    with locked(folder):
        time.sleep(0.1)  # the first sign of life is on its way
    assert holder_of(folder).pid == os.getpid(), "what is not given back is taken over when it has been silent"


class Deaf(MemoryFileSystem):
    """A file system whose server accepts what it is asked, and never answers."""

    def ls(self, *args, **options):
        threading.Event().wait()

    cat_file = makedirs = pipe_file = mv = ls


@pytest.mark.parametrize(
    "ask",
    [
        lambda folder: folder.read("a"),
        lambda folder: folder.write("a", b""),
        lambda folder: folder.rename("a", "b"),
        lambda folder: folder.entries("a"),
    ],
)
def test_storage_that_never_answers_is_an_error(monkeypatch, ask):
    monkeypatch.setenv("REGISTERLENS_PATIENCE", "0.1")
    with pytest.raises(StoreError, match=r"'deaf://x/.*' cannot be .* No answer came within 0\.1 s; .*_PATIENCE"):
        ask(RemoteFolder(Deaf(), "x", "deaf://x"))


def test_storage_that_never_lets_anybody_in_is_an_error(monkeypatch):
    monkeypatch.setenv("REGISTERLENS_PATIENCE", "0.1")
    monkeypatch.setattr(fsspec.core, "url_to_fs", Deaf().ls)
    with pytest.raises(StoreError, match=r"'deaf://x' cannot be reached: No answer came within 0\.1 s; .*_PATIENCE"):
        folder_at("deaf://x")


def test_a_dead_run_on_a_url_is_taken_over(memory):
    sweep(memory)
    folder = folder_at(memory)
    beat = {"host": "far", "pid": 7, "since": "yesterday", "token": "t"}
    folder.write(lock.NAME, json.dumps(beat | {"beat": time.time() - lock.DEAD - 1}).encode())
    assert holder_of(folder) is None
    sweep(memory)
    folder.write(lock.NAME, b"?")
    with pytest.raises(StoreError, match="if no run works there, delete it"):
        sweep(memory)


# Images that fail ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [True, False])
def test_images_that_fail_are_named_and_the_run_goes_on(tmp_path, store):
    result = sweep(tmp_path if store else None, images=Spotty(), conditions=neurons(2))
    assert sorted(set(result.table["image"].to_pylist())) == ["0.png", "6.png", "7.png"]
    assert result.table.num_rows == 3 * 5
    named = {
        "1.png": "truncated",
        "2.png": "no such file",
        "3.png": "no such file",
        "shard 2": "is no archive of images",
    }
    assert {one.name: one.reason for one in result.skipped} == named and len(result.skipped) == 4
    if store:
        assert len(part_files(tmp_path)) == 4, "a shard without usable images has a part without rows"
        assert sweep_status(tmp_path).skipped == result.skipped
        assert "skipped: 1.png: truncated" in sweep_status(tmp_path).describe()
        assert len(pl.read_parquet(f"{tmp_path}/parts/*.parquet")) == 15

"""What every class that can be saved must pass: whole or not at all, and a ConfigError with file and field."""

import importlib
import inspect
import json
import os
import pkgutil
import random
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from result_examples import MAKERS
from safetensors.torch import load_file, save_file

import registerlens
from registerlens import results
from registerlens.codecs import ARRAYS, JSON
from registerlens.encoding import concrete
from registerlens.errors import ConfigError
from registerlens.files import reading, write_json
from registerlens.results import ResultFile, Saved

for _module in pkgutil.walk_packages(registerlens.__path__, "registerlens."):
    importlib.import_module(_module.name)
FOUND = {kind for kind in concrete(Saved) if kind.__module__.startswith("registerlens.")}
KINDS = {kind.__name__: kind for kind in FOUND}
EVERY = pytest.mark.parametrize("name", sorted(KINDS))
FOLDERS = pytest.mark.parametrize("name", sorted(KINDS.keys() - {kind.__name__ for kind in concrete(ResultFile)}))


@cache
def example(name):
    make = MAKERS[name]
    return make(Path(mkdtemp())) if inspect.signature(make).parameters else make()


@cache
def _saved(name):
    return example(name).save(Path(mkdtemp()) / name)


@pytest.fixture
def saved(name, tmp_path):
    """What `save` wrote, to be spoiled: a folder, or a file."""
    source = _saved(name)
    copy = shutil.copytree if source.is_dir() else shutil.copyfile
    return Path(copy(source, tmp_path / source.name))


def described(path):
    """The JSON file."""
    return path / JSON if path.is_dir() else path


def rewrite(folder, changed):
    """Some arrays exchanged, or dropped where there is None, by someone who gives the right sum for them."""
    arrays = {key: array for key, array in (load_file(folder / ARRAYS) | changed).items() if array is not None}
    save_file(arrays, folder / ARRAYS)
    told = json.loads((folder / JSON).read_text())
    told["files"][ARRAYS] = results._digest(folder / ARRAYS)
    (folder / JSON).write_text(json.dumps(told))


def refused(name, path, *words):
    """One ConfigError that names a file of the result, and the field."""
    with pytest.raises(ConfigError) as caught:
        KINDS[name].load(path)
    text = str(caught.value)
    assert str(path) in text and all(word in text for word in words), text


def same(a, b):
    if isinstance(a, np.ndarray | torch.Tensor):
        assert type(a) is type(b) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b)
    elif isinstance(a, pa.Table):
        assert a.equals(b)
    elif is_dataclass(a):
        assert type(a) is type(b)
        for item in fields(a):
            if item.metadata.get("saved", True):
                same(getattr(a, item.name), getattr(b, item.name))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert a == b or (a != a and b != b)


def test_every_class_has_an_example_and_a_name_of_its_own():
    assert set(MAKERS) == set(KINDS)
    assert len(KINDS) == len(FOUND)


@EVERY
def test_what_is_loaded_equals_what_was_saved(name, saved):
    again = KINDS[name].load(saved)
    same(example(name), again)
    told = json.loads(described(saved).read_text())
    assert told["class"] == name and told["format"] == 1 and set(told["versions"]) == {"registerlens", "torch", "numpy"}
    if isinstance(again, results.Result):
        assert told["in_words"] == again.describe() == example(name).describe()
        assert repr(again).split(";")[0] == repr(example(name)).split(";")[0]  # Parquet packs its bytes in another way
        pd.testing.assert_frame_equal(again.to_dataframe(), example(name).to_dataframe())
    assert again.save(saved) == saved  # an older one of the same class is replaced
    same(again, KINDS[name].load(saved))


@EVERY
def test_files_of_another_class_are_refused(name, saved):
    other = next(other for other in sorted(KINDS) if other != name and not issubclass(KINDS[other], ResultFile))
    if saved.is_dir():
        refused(name, _saved(other), JSON, "class", other)
    told = json.loads(described(saved).read_text())
    described(saved).write_text(json.dumps(told | {"class": other}))
    refused(name, saved, "class", other)
    described(saved).write_text(json.dumps(told | {"format": 2}))
    refused(name, saved, "format")


@EVERY
def test_missing_empty_and_truncated_files_are_refused(name, saved, tmp_path):
    refused(name, tmp_path / "nowhere")
    file = described(saved)
    whole = file.read_text()
    for text in ("", whole[: len(whole) // 3], whole[: len(whole) * 2 // 3], whole[:-3], "[]", "null", "{}"):
        file.write_text(text)
        refused(name, saved)
    file.write_bytes(b"\xff\xfe" + whole.encode())
    refused(name, saved)
    file.write_text(whole)
    for part in [path for path in saved.iterdir() if path != file] if saved.is_dir() else []:
        content = part.read_bytes()
        for cut in (b"", content[:7], content[: len(content) // 2], content[:-1]):
            part.write_bytes(cut)
            refused(name, saved, part.name, "files")
        part.unlink()
        refused(name, saved, part.name, "files")
        part.write_bytes(content)
    KINDS[name].load(saved)


@EVERY
def test_json_of_a_hundred_thousand_levels_is_refused(name, saved):
    told = json.loads(described(saved).read_text())
    place = next(iter(told["values"] if saved.is_dir() else {"neurons"}))
    text = json.dumps({place: "here"} if not saved.is_dir() else told | {"values": {place: "here"}})
    for deep in ("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000):
        described(saved).write_text(text.replace('"here"', deep))
        refused(name, saved, "levels")


@FOLDERS
def test_a_field_that_is_missing_or_of_another_kind_is_named(name, saved):
    told = json.loads((saved / JSON).read_text())
    hints = get_type_hints(KINDS[name])
    for field in told["values"]:
        others = {key: value for key, value in told["values"].items() if key != field}
        (saved / JSON).write_text(json.dumps(told | {"values": others}))
        refused(name, saved, JSON, f"'{field}' is missing")
        if str(hints[field]) != "dict[str, typing.Any]":
            (saved / JSON).write_text(json.dumps(told | {"values": told["values"] | {field: {"colour": 3}}}))
            refused(name, saved, f"'{field}")
    (saved / JSON).write_text(json.dumps(told | {"values": told["values"] | {"colour": 3}}))
    refused(name, saved, JSON, "'colour' is no field")
    for key in ("class", "format", "files", "values"):
        (saved / JSON).write_text(json.dumps({other: value for other, value in told.items() if other != key}))
        refused(name, saved, JSON, key)


@FOLDERS
def test_arrays_of_another_shape_dtype_or_name_are_named(name, saved):
    arrays = load_file(saved / ARRAYS) if (saved / ARRAYS).exists() else {}
    for key, array in arrays.items():
        for wrong in (None, array[None].clone(), array.to(torch.complex64)):
            rewrite(saved, {key: wrong})
            refused(name, saved, ARRAYS, key)
        rewrite(saved, {key: array})
    if arrays:
        rewrite(saved, {"colour": torch.zeros(1)})
        refused(name, saved, ARRAYS, "colour")


@FOLDERS
def test_nan_and_infinity_are_refused_where_values_must_be_finite(name, saved):
    for item in fields(KINDS[name]):
        if item.metadata.get("finite"):
            array = load_file(saved / ARRAYS)[item.name]
            for wrong in (torch.nan, torch.inf):
                (spoiled := array.clone()).view(-1)[-1] = wrong
                rewrite(saved, {item.name: spoiled})
                refused(name, saved, ARRAYS, item.name, "finite")
            rewrite(saved, {item.name: array})


_OTHERS = [None, True, -1, 3, 10**400, 1.5, float("nan"), "x", [], {}, [[1]], {"float": "nan"}, {"class": []}]


def _spoil(value, draw):
    """A JSON value with one of its entries dropped, or exchanged for something else."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        if draw.random() < 0.2:
            return {other: part for other, part in value.items() if other != key}
        return value | {key: _spoil(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [_spoil(part, draw) if i == at else part for i, part in enumerate(value)]
    return draw.choice(_OTHERS)


@EVERY
def test_whatever_is_spoiled_only_a_config_error_comes_of_it(name, saved):
    """Flipped bytes and exchanged JSON values: refused with the file's name, or read as a result of the class."""
    draw, file, n_refused = random.Random(name), described(saved), 0

    def refused_or_read():
        try:
            assert type(KINDS[name].load(saved)) is KINDS[name]
        except ConfigError as error:
            assert str(saved) in str(error)
            return 1
        return 0

    whole = file.read_bytes()
    told = json.loads(whole)
    for _ in range(40):
        flipped = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        n_refused += refused_or_read()
        file.write_text(json.dumps(_spoil(told, draw)))
        n_refused += refused_or_read()
    assert n_refused > 30
    file.write_bytes(whole)
    for part in [path for path in saved.iterdir() if path != file] if saved.is_dir() else []:
        content = part.read_bytes()
        for _ in range(10):
            flipped = bytearray(content)
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            part.write_bytes(flipped)
            refused(name, saved, part.name)
            if part.name == ARRAYS:  # someone gives the right sum for it
                file.write_text(json.dumps(told | {"files": told["files"] | {ARRAYS: results._digest(part)}}))
                refused_or_read()
                file.write_bytes(whole)
        part.write_bytes(content)


class Killed(BaseException):
    """What ends the process."""


def _dies(*_, **__):
    raise Killed


@EVERY
@pytest.mark.parametrize("at", ["the second file", "the exchange", "the second renaming"])
def test_a_crash_leaves_the_old_result_whole_and_nothing_half(name, at, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in (saved.iterdir() if saved.is_dir() else [saved])}
    if at == "the second file":
        monkeypatch.setattr("registerlens.files.json.dumps", _dies)
    elif saved.is_dir():
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: rename(a, b) if "old" in a.name + b.name else _dies())
        monkeypatch.setattr("registerlens.files.exchanged", _dies if at == "the exchange" else lambda *_: False)
    else:
        monkeypatch.setattr(Path, "replace", _dies)
    for place in (saved, saved.with_name("new") / saved.name):
        with pytest.raises(Killed):
            example(name).save(place)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (saved.iterdir() if saved.is_dir() else [saved])} == before
    left = {path.name for path in saved.parent.iterdir()} - {saved.name}
    assert left <= {"new"} and not any(saved.with_name("new").glob("*"))
    same(example(name), KINDS[name].load(saved))


_KILLED = """
import os, sys
from pathlib import Path
from registerlens import files

def kill(*_, **__):
    os.kill(os.getpid(), 9)

rename, folder, at = Path.rename, Path(sys.argv[1]), sys.argv[2]
if at == "between two renamings":
    files.exchanged = lambda *_: False
    Path.rename = lambda a, b: (rename(a, b), kill())
elif at == "before the exchange":
    files.exchanged = kill
else:
    files.shutil.rmtree = kill
with files.whole_folder(folder) as whole:
    (whole / "result.json").write_text("half")
"""


@pytest.mark.parametrize("at", ["between two renamings", "before the exchange", "after the exchange"])
def test_a_process_killed_while_it_replaces_a_folder_leaves_one_that_is_whole(at, tmp_path):
    saved = shutil.copytree(_saved("Trace"), tmp_path / "the [trace]")
    killed = subprocess.run([sys.executable, "-c", _KILLED, saved, at], capture_output=True, timeout=60)
    assert killed.returncode == -9, killed.stderr.decode()
    if at == "after the exchange":
        assert (saved / JSON).read_text() == "half"
        return
    assert saved.exists() == (at == "before the exchange")
    same(example("Trace"), KINDS["Trace"].load(saved))
    assert example("Trace").save(saved) == saved
    assert not list(tmp_path.glob(".*.old"))


@EVERY
def test_permissions_are_what_the_umask_leaves(name, tmp_path):
    for umask in (0o077, 0o022):
        old = os.umask(umask)
        try:
            path = example(name).save(tmp_path / f"{umask:o}" / "result.json")
        finally:
            os.umask(old)
        for file in path.iterdir() if path.is_dir() else [path]:
            assert file.stat().st_mode & 0o777 == 0o666 & ~umask
        assert path.parent.stat().st_mode & 0o777 == 0o777 & ~umask


@FOLDERS
def test_a_folder_that_holds_something_else_is_not_replaced(name, saved, tmp_path):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds something else.*notes\.txt"):
        example(name).save(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    other = next(other for other in sorted(KINDS) if other != name and not issubclass(KINDS[other], ResultFile))
    place = shutil.copytree(_saved(other), tmp_path / "other")
    with pytest.raises(ConfigError, match="holds something else"):
        example(name).save(place)
    same(example(other), KINDS[other].load(place))
    (file := tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        example(name).save(file)
    (tmp_path / "private").mkdir(mode=0o700)
    assert example(name).save(tmp_path / "private").stat().st_mode & 0o777 == 0o700  # an empty folder's rights stay


def test_errors_of_other_kinds_pass_through_the_reader_of_json(tmp_path):
    write_json(tmp_path / "some.json", {})
    with pytest.raises(ZeroDivisionError), reading(tmp_path / "some.json"):
        1 / 0  # noqa: B018
    with pytest.raises(ConfigError, match="cannot be read"), reading(tmp_path / "nowhere.json"):
        pass

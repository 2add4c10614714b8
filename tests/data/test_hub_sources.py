"""Hugging Face datasets, streamed from local files: Parquet cut by row groups, folders, and what goes wrong."""

import io
import pickle
from threading import Event

import pytest
import torch
from PIL import Image

from registerlens.config import Preprocess
from registerlens.data import hub_sources
from registerlens.data.hub_sources import HuggingFaceSource
from registerlens.data.images import decode, preprocess_image
from registerlens.data.photographs import shipped_photographs
from registerlens.errors import ImageError, MissingExtraError, SourceError

datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install '.[streams]'")
PREPROCESS = Preprocess(resize=(24, 24))
N = 13


def photograph(i):
    """The bytes of a small real photograph."""
    file = io.BytesIO()
    paths = shipped_photographs()
    Image.open(paths[i % len(paths)]).convert("RGB").resize((40 + i, 40)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def parquet(tmp_path):
    """13 rows in two Parquet files, in row groups of 2; one image is damaged, one is missing."""
    values = [{"bytes": photograph(i), "path": f"p{i}.png"} for i in range(N)]
    values[4] = {"bytes": values[4]["bytes"][:300], "path": "p4.png"}
    values[5] = None
    features = datasets.Features(
        {"picture": datasets.Image(), "what": datasets.ClassLabel(num_classes=30), "t": datasets.Value("string")}
    )
    table = {"picture": values, "what": [10 + i if i != 7 else None for i in range(N)], "t": ["text"] * N}
    dataset = datasets.Dataset.from_dict(table, features=features)
    for name, rows in (("train-0", range(7)), ("train-1", range(7, N))):
        dataset.select(rows).to_parquet(str(tmp_path / f"{name}.parquet"), batch_size=2)
    return tmp_path


def read(source):
    shards = [source.shard(i) for i in range(source.n_shards)]
    found = {}
    for shard in shards:
        for name, image, label in zip(shard.names, shard.images, shard.labels.tolist(), strict=True):
            found[int(name.split(" p")[1].removesuffix(".png"))] = image, label
    return shards, found


@pytest.mark.parametrize(("shards", "made"), [(1, 1), (2, 2), (None, 2), (4, 4), (6, 6), (20, 20)])
def test_every_image_once_however_it_is_cut(parquet, shards, made):
    source = HuggingFaceSource(parquet, PREPROCESS, shards=shards)
    assert source.n_shards == made
    pieces, found = read(source)
    assert sorted(found) == [i for i in range(N) if i not in (4, 5)]
    assert sum(len(piece.names) for piece in pieces) == N - 2
    for i, (image, label) in found.items():
        assert torch.equal(image, preprocess_image(decode(photograph(i)), PREPROCESS))
        assert label == (10 + i if i != 7 else -1)
    skipped = [one for piece in pieces for one in piece.skipped]
    assert sorted("no image" in one.reason for one in skipped) == [False, True]
    assert any(one.name.endswith(" p4.png") and "truncated" in one.reason for one in skipped)
    names = [name for piece in pieces for name in (*piece.names, *(one.name for one in piece.skipped))]
    assert len(set(names)) == N
    assert torch.equal(source.shard(0).images, pieces[0].images)


def test_a_shard_reads_only_its_row_groups(parquet, monkeypatch):
    from datasets.packaged_modules.parquet.parquet import Parquet

    read_groups = []
    real = Parquet._generate_tables

    def spy(self, files, row_groups_list):
        read_groups.extend(zip(files, row_groups_list, strict=True))
        yield from real(self, files, row_groups_list)

    monkeypatch.setattr(Parquet, "_generate_tables", spy)
    from registerlens.data import hub_sources

    hub_sources._open.cache_clear()
    HuggingFaceSource(parquet, PREPROCESS, shards=4).shard(3)
    assert {(file[-9:], groups) for file, groups in read_groups} == {("1.parquet", (2,))}


def test_a_folder_of_classes(tmp_path):
    for i in range(6):
        folder = tmp_path / ("cat", "dog")[i % 2]
        folder.mkdir(exist_ok=True)
        (folder / f"p{i}.png").write_bytes(photograph(i))
    source = HuggingFaceSource(tmp_path, PREPROCESS, shards=2)
    assert (source.n_images, source.image_column, source.label_column) == (6, "image", "label")
    pieces, found = read(source)
    assert {i: label for i, (_, label) in found.items()} == {i: i % 2 for i in range(6)}
    assert sum(len(piece.names) for piece in pieces) == 6
    assert torch.equal(found[3][0], preprocess_image(decode(photograph(3)), PREPROCESS))
    assert HuggingFaceSource(tmp_path, PREPROCESS).n_shards == 1  # and not one for each picture


def test_identity_and_what_a_worker_is_sent(parquet, tmp_path_factory):
    import shutil

    source = HuggingFaceSource(parquet, PREPROCESS, shards=4)
    sent = pickle.dumps(source)
    assert len(sent) < 3000
    assert torch.equal(pickle.loads(sent).shard(1).images, source.shard(1).images)
    moved = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(parquet, moved)
    assert HuggingFaceSource(moved, PREPROCESS, shards=4).identity == source.identity
    others = [
        HuggingFaceSource(parquet, PREPROCESS, shards=2),
        HuggingFaceSource(parquet, PREPROCESS, shards=4, size=48),
        HuggingFaceSource("parquet", PREPROCESS, shards=4, data_files=str(parquet / "train-0.parquet")),
    ]
    assert len({one.identity for one in (source, *others)}) == 4
    path = parquet / "train-1.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"p9.png", b"p0.png"))
    assert HuggingFaceSource(parquet, PREPROCESS, shards=4).identity != source.identity
    path.write_bytes(whole[:-100])
    with pytest.raises(SourceError, match="bytes long, but had"):
        source.shard(0)


def test_a_damaged_file_is_named(parquet):
    source = HuggingFaceSource(parquet, PREPROCESS)
    path = parquet / "train-1.parquet"
    content = bytearray(path.read_bytes())
    content[-8:] = b"nonsense"
    path.write_bytes(content)
    with pytest.raises((ImageError, SourceError), match="Shard 1 of HuggingFaceSource"):
        source.shard(1)


@pytest.mark.parametrize("silent", ["opening", "reading"])
def test_a_server_that_falls_silent_is_an_error(parquet, monkeypatch, silent):
    source, waits = HuggingFaceSource(parquet, PREPROCESS), Event().wait
    if silent == "opening":
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: waits())
    else:
        monkeypatch.setattr(datasets.IterableDataset, "__iter__", lambda self: iter(waits, None))
    monkeypatch.setenv("REGISTERLENS_PATIENCE", "1")
    hub_sources._open.cache_clear()
    with pytest.raises(SourceError, match=r"(opened|read): TimeoutError: No answer came within 1 s.*_PATIENCE"):
        source.shard(0)


def test_refusals(parquet, monkeypatch):
    with pytest.raises(ImageError, match=r"has no column 'pictures'.*mean 'picture'"):
        HuggingFaceSource(parquet, PREPROCESS, image_column="pictures")
    with pytest.raises(ImageError, match=r"Labels must be integers; the column 't' of"):
        HuggingFaceSource(parquet, PREPROCESS, label_column="t")
    with pytest.raises(SourceError, match=r"split 'test'\) cannot be opened.*train"):
        HuggingFaceSource(parquet, PREPROCESS, split="test")
    with pytest.raises(SourceError, match=r"'nobody/nothing' \(split 'train'\) cannot.*HF_HUB_OFFLINE is set"):
        HuggingFaceSource("nobody/nothing", PREPROCESS)
    with pytest.raises(ImageError, match="at least 1"):
        HuggingFaceSource(parquet, PREPROCESS, shards=-1)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'datasets'.*registerlens\[streams\]"):
        HuggingFaceSource(parquet / "another", PREPROCESS)

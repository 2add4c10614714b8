"""Files in shards: every image once, only what a shard needs is read, and what changed is noticed."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import registerlens.data.images as images_module
from registerlens import load_images
from registerlens.config import Preprocess
from registerlens.data.photographs import shipped_photographs
from registerlens.data.sources import FolderSource, LastShard, Source, TensorSource, fingerprints
from registerlens.errors import ConfigError, ImageError, SourceError

PREPROCESS = Preprocess(resize=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture
def folder(tmp_path):
    """Seven real photographs, one of them truncated and one that is text."""
    photographs = shipped_photographs()[:5]
    assert len(photographs) == 5
    for i, path in zip((1, 2, 3, 10, 11), photographs, strict=True):
        Image.open(path).convert("RGB").resize((60, 40)).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "4.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "20.png").write_text("no picture")
    return tmp_path


def all_of(source):
    shards = [source.shard(i) for i in range(source.n_shards)]
    return [name for shard in shards for name in shard.names], torch.cat([shard.images for shard in shards]), shards


@pytest.mark.parametrize("shard_size", [1, 3, 100])
def test_shards_together_are_load_images(folder, shard_size):
    source = FolderSource(folder, PREPROCESS, shard_size=shard_size)
    names, images, shards = all_of(source)
    with pytest.warns(UserWarning, match="Skipped 2 of 7"):
        expected = load_images(folder, PREPROCESS)
    assert isinstance(source, Source)
    assert torch.equal(images, expected)
    assert names == ["1.png", "2.png", "3.png", "10.png", "11.png"]
    skipped = {one.name: one.reason for shard in shards for one in shard.skipped}
    assert set(skipped) == {"4.png", "20.png"}
    assert "truncated" in skipped["4.png"]
    assert "not an image" in skipped["20.png"]
    assert source.n_images == 7 == len(names) + len(skipped)


def test_a_shard_without_a_usable_image_is_empty(folder):
    shard = FolderSource(folder, PREPROCESS, shard_size=1, labels={"20.png": 3}).shard(6)
    assert (shard.names, shard.images.shape, shard.labels.shape) == ((), (0, 3, 32, 32), (0,))


def test_a_shard_opens_only_its_own_files(folder, monkeypatch):
    source = FolderSource(folder, PREPROCESS, shard_size=3)
    opened = []
    real = images_module._opened
    monkeypatch.setattr(images_module, "_opened", lambda path: opened.append(path.name) or real(path))
    source.shard(1)
    assert opened == ["4.png", "10.png", "11.png"]


def test_labels_follow_their_images_past_skipped_ones(folder):
    labels = {f"{i}.png": 100 + i for i in (1, 2, 3, 4, 10)}
    for shard_size, expected in ((4, [[101, 102, 103], [110, -1]]), (7, [[101, 102, 103, 110, -1]])):
        shards = all_of(FolderSource(folder, PREPROCESS, labels=labels, shard_size=shard_size))[2]
        assert [shard.labels.tolist() for shard in shards] == expected
    as_given = {str(folder / "3.png"): 5}
    assert FolderSource(folder, PREPROCESS, labels=as_given).shard(0).labels.tolist() == [-1, -1, 5, -1, -1]
    with pytest.raises(ImageError, match=r"none of the 1 names with labels, such as '10.jpg'.*mean '10.png'"):
        FolderSource(folder, PREPROCESS, labels={"10.jpg": 1})


def test_it_is_small_when_pickled_and_reads_the_same(folder):
    source = FolderSource(folder, PREPROCESS, shard_size=3)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert there.identity == source.identity
    assert torch.equal(there.shard(0).images, source.shard(0).images)


def test_identity_moves_with_the_folder_and_changes_with_anything_else(folder, tmp_path_factory):
    make = dict(images=folder, model=PREPROCESS, shard_size=3)
    before = FolderSource(**make).identity
    moved = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, moved)
    assert FolderSource(**make | {"images": moved}).identity == before
    assert FolderSource(**make | {"images": f"{folder}/*.png"}).identity == before
    others = [
        make | {"shard_size": 4},
        make | {"size": 64},
        make | {"labels": {"1.png": 0}},
        make | {"labels": {"1.png": 1}},
        make | {"model": Preprocess(resize=(32, 32))},
        make | {"images": sorted(folder.iterdir())[1:]},
        make | {"images": sorted(folder.iterdir())[::-1]},
    ]
    identities = {FolderSource(**other).identity for other in others}
    assert len(identities | {before}) == len(others) + 1
    (moved / "3.png").rename(moved / "30.png")
    assert FolderSource(**make | {"images": moved}).identity != before


@pytest.mark.parametrize("check", ["content", "stat"])
def test_a_picture_changed_at_equal_size_is_another(folder, check):
    path = folder / "3.png"
    before = FolderSource(folder, PREPROCESS, check=check).identity
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert path.stat().st_size == stat.st_size
    if check == "content":  # even where the time was set back
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FolderSource(folder, PREPROCESS, check=check).identity != before


def test_a_file_that_changed_or_is_not_on_this_machine_is_an_error_not_a_skipped_image(folder):
    source = FolderSource([folder, folder / "40.png"], PREPROCESS)
    assert "40.png: no such file" in map(str, source.shard(0).skipped)  # missing from the start: as in load_images
    shutil.copy(folder / "1.png", folder / "40.png")
    with pytest.raises(SourceError, match=r"40\.png' is there, but was not when"):
        source.shard(0)
    (folder / "40.png").unlink()
    (folder / "3.png").unlink()
    with pytest.raises(SourceError, match=r"3\.png' is not there, but had \d+ bytes.*share"):
        source.shard(0)
    (folder / "3.png").write_bytes(b"shorter")
    with pytest.raises(SourceError, match="is 7 bytes long, but had"):
        source.shard(0)


def test_names_are_unique_and_relative_to_what_holds_them_all(folder):
    (folder / "sub").mkdir()
    shutil.copy(folder / "1.png", folder / "sub" / "1.png")
    assert FolderSource(f"{folder}/**/1.png", PREPROCESS).names == ("1.png", "sub/1.png")
    with pytest.raises(ImageError, match=r"'1\.png' is listed twice"):
        FolderSource([folder, folder / "1.png"], PREPROCESS)


def test_what_is_no_file_is_refused(folder):
    with pytest.raises(ImageError, match="TensorSource"):
        FolderSource([folder / "1.png", np.zeros((8, 8, 3), dtype=np.uint8)], PREPROCESS)
    with pytest.raises(ImageError, match="There is no"):
        FolderSource(folder / "photos", PREPROCESS)
    with pytest.raises(ImageError, match="at least 1"):
        FolderSource(folder, PREPROCESS, shard_size=0)
    with pytest.raises(ConfigError, match="'hash'"):
        fingerprints([folder / "1.png"], "hash")


def test_the_last_shard_is_kept_and_only_that():
    source = TensorSource(torch.arange(4.0).reshape(4, 1, 1, 1).repeat(1, 3, 2, 2), shard_size=2)
    read = []

    class Counting(TensorSource):
        def shard(self, index):
            read.append(index)
            return super().shard(index)

    kept = LastShard(Counting(source.images, shard_size=2))
    got = [kept.shard(i).images[0, 0, 0, 0].item() for i in (0, 0, 1, 1, 0)]
    assert (got, read) == ([0, 0, 2, 2, 0], [0, 1, 0])
    assert (kept.n_shards, kept.n_images, kept.identity) == (2, 4, source.identity)

"""webdataset shards: real photographs in tars that webdataset's own writer made, and tars that are damaged."""

import io
import pickle
import socket
import tarfile
from contextlib import suppress
from http.server import HTTPServer, SimpleHTTPRequestHandler
from threading import Thread

import pytest
import torch
from PIL import Image

from registerlens.config import Preprocess
from registerlens.data.images import decode, preprocess_image
from registerlens.data.photographs import shipped_photographs
from registerlens.data.tar_sources import WebDatasetSource
from registerlens.errors import ConfigError, ImageError, MissingExtraError, SourceError

webdataset = pytest.importorskip("webdataset", reason="needs webdataset: pip install '.[streams]'")
PREPROCESS = Preprocess(resize=(24, 24))
SIZE = 50


def photograph(i, kind):
    """The bytes of a small real photograph."""
    file = io.BytesIO()
    paths = shipped_photographs()
    image = Image.open(paths[i % len(paths)]).convert("RGB").resize((SIZE - i, SIZE))
    image.save(file, {"jpg": "jpeg"}.get(kind, kind))
    return file.getvalue()


@pytest.fixture
def tars(tmp_path):
    """Two tars of 5 and 4 samples, of three formats, labelled 10, 11, ..."""
    for tar, numbers in enumerate((range(5), range(5, 9))):
        with webdataset.TarWriter(str(tmp_path / f"photos-{tar:02d}.tar")) as writer:
            for i in numbers:
                kind = ("jpg", "png", "webp")[i % 3]
                writer.write({"__key__": f"n{i:02d}", kind: photograph(i, kind), "cls": str(10 + i), "txt": "a photo"})
    return tmp_path


def rewritten(path, change):
    """The tar again, after `change` edited its list of (name, bytes)."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in change(members):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def offset_of(path, name):
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
        return member.offset, member.offset_data, member.size


def damage(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def expected(i):
    return preprocess_image(decode(photograph(i, ("jpg", "png", "webp")[i % 3])), PREPROCESS)


def test_every_sample_once_in_order_with_its_label(tars):
    source = WebDatasetSource(f"{tars}/photos-{{00..01}}.tar", PREPROCESS)
    shards = [source.shard(i) for i in range(source.n_shards)]
    assert [shard.names[0] for shard in shards] == ["photos-00.tar/n00", "photos-01.tar/n05"]
    assert [shard.labels.tolist() for shard in shards] == [[10, 11, 12, 13, 14], [15, 16, 17, 18]]
    assert torch.equal(torch.cat([shard.images for shard in shards]), torch.stack(list(map(expected, range(9)))))
    assert not any(shard.skipped for shard in shards)
    assert source.n_images is None


def test_as_webdataset_itself_reads_it(tars):
    urls = [str(tars / f"photos-{i:02d}.tar") for i in (0, 1)]
    theirs = [(one["__key__"], int(one["cls"])) for one in webdataset.WebDataset(urls, shardshuffle=False)]
    source = WebDatasetSource(urls, PREPROCESS)
    shards = [source.shard(i) for i in (0, 1)]
    ours = [(name.split("/")[1], label) for s in shards for name, label in zip(s.names, s.labels.tolist(), strict=True)]
    assert ours == theirs


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_share_a_tar_without_overlap(tars, parts):
    source = WebDatasetSource(str(tars / "photos-00.tar"), PREPROCESS, parts=parts)
    shards = [source.shard(i) for i in range(source.n_shards)]
    assert [len(shard.names) for shard in shards] == [len(range(part, 5, parts)) for part in range(parts)]
    assert sorted(name for shard in shards for name in shard.names) == [f"photos-00.tar/n{i:02d}" for i in range(5)]
    assert torch.equal(shards[1].images[0], expected(1))
    assert shards[1].labels[0] == 11


def test_bad_images_labels_and_samples_are_skipped_by_name(tars):
    def change(members):
        members = [(name, b"\xff\xd8 nonsense" if name == "n00.jpg" else content) for name, content in members]
        members = [(name, b"cat" if name == "n01.cls" else content) for name, content in members]
        members = [(name, content) for name, content in members if name not in ("n02.webp", "n03.cls")]
        return [*members, ("n04.later.txt", b"of n04 still"), ("a/n00.JPG", photograph(0, "jpg")), *members[-3:]]

    rewritten(tars / "photos-00.tar", change)
    shard = WebDatasetSource(str(tars / "photos-00.tar"), PREPROCESS).shard(0)
    assert shard.names == ("photos-00.tar/n03", "photos-00.tar/n04", "photos-00.tar/a/n00")
    assert shard.labels.tolist() == [-1, 14, -1]
    reasons = {one.name.removeprefix("photos-00.tar/"): one.reason for one in shard.skipped}
    assert set(reasons) == {"n00", "n01", "n02", "n04"}
    assert "not an image" in reasons["n00"]
    assert reasons["n01"] == "its label 'cat' is no integer"
    assert "no image: none of its files ends in jpg or jpeg or png or webp" in reasons["n02"]
    assert "earlier sample" in reasons["n04"]


def test_a_damaged_header_loses_one_member_and_says_so(tars):
    path = tars / "photos-00.tar"
    with tarfile.open(path) as tar:
        order = tar.getnames()
    headers = {name: offset_of(path, name)[1] - 512 for name in ("n02.webp", "n01.cls")}  # not the pax ones before
    for header in headers.values():
        damage(path, header + 148, b"9999999")
        shard = WebDatasetSource(str(path), PREPROCESS).shard(0)
        assert [name[-3:] for name in shard.names] == ["n00", "n01", "n03", "n04"]
        told = {one.name.removeprefix("photos-00.tar/"): one.reason for one in shard.skipped}
        assert "no image" in told["n02"]
        assert "damaged tar header" in told[f"(after {order[order.index('n02.webp') - 1]})"]
    assert "damaged tar header" in told["(after n00.txt)"]
    assert shard.labels.tolist() == [10, -1, 13, 14]  # the label whose header was hit
    damage(path, 148, b"9999999")  # a pax header: its member is still there
    shard = WebDatasetSource(str(path), PREPROCESS).shard(0)
    assert shard.names[0].endswith("n00")
    assert any(one.name.endswith("(after the start)") for one in shard.skipped)


def test_a_tar_that_breaks_off_keeps_what_came_before_and_names_where(tars):
    path = tars / "photos-00.tar"
    with tarfile.open(path) as tar:
        names = tar.getnames()
    image = next(name for name in names if name.startswith("n03.") and name.endswith(("jpg", "png", "webp")))
    _, start, size = offset_of(path, image)
    with path.open("r+b") as file:
        file.truncate(start + size // 2)
    shard = WebDatasetSource(str(path), PREPROCESS).shard(0)
    assert [name[-3:] for name in shard.names] == ["n00", "n01", "n02"]
    assert [(one.name[-3:], "breaks off here" in one.reason) for one in shard.skipped] == [("n03", True)]


def test_what_is_no_tar_has_no_samples(tars):
    for content in (b"no tar at all" * 999, b"", bytes(10240)):
        (tars / "text.tar").write_bytes(content)
        with pytest.raises(ImageError, match=r"text\.tar' holds no samples"):
            WebDatasetSource(str(tars / "text.tar"), PREPROCESS).shard(0)


def test_over_http_as_from_the_disk_and_a_broken_connection_is_an_error(tars):
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tars))

        def copyfile(self, source, target):
            content = source.read()
            target.write(content[: len(content) // 2] if self.path.startswith("/photos-01") else content)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = WebDatasetSource(f"http://127.0.0.1:{server.server_port}/photos-{{00..02}}.tar", PREPROCESS)
        here = WebDatasetSource(str(tars / "photos-00.tar"), PREPROCESS).shard(0)
        there = source.shard(0)
        assert torch.equal(there.images, here.images)
        assert there.names == here.names
        for lost in (1, 2):  # half of it came; there is no such file
            with pytest.raises(SourceError, match=r"photos-0\d.tar' cannot be read.*Without a network, copy"):
                source.shard(lost)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(SourceError, match="Is the address right, and the network there"):
        source.shard(0)


@pytest.mark.parametrize("begun", [False, True])
def test_a_server_that_falls_silent_is_an_error_and_nobody_waits_for_it(tars, monkeypatch, begun):
    monkeypatch.setenv("REGISTERLENS_PATIENCE", "1")

    def serve():
        connection, _ = server.accept()
        connection.recv(4096)
        if begun:
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + (tars / "photos-00.tar").read_bytes()[:4096])
        with suppress(ConnectionResetError):
            connection.recv(4096)  # comes back when who asked is gone

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/photos-00.tar"
        with pytest.raises(SourceError, match=r"photos-00.tar' cannot be read: No answer came within 1 s.*_PATIENCE"):
            WebDatasetSource(url, PREPROCESS).shard(0)
        thread.join(60)
    assert not thread.is_alive(), "the program that asked still waits"


def test_identity_and_what_a_worker_is_sent(tars):
    url = str(tars / "photos-00.tar")
    source = WebDatasetSource(url, PREPROCESS)
    there = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    assert torch.equal(there.shard(0).images, source.shard(0).images)
    remote = ["http://nowhere.invalid/a.tar", "http://nowhere.invalid/b.tar"]
    others = [
        WebDatasetSource(url, PREPROCESS, parts=2),
        WebDatasetSource(url, PREPROCESS, label_key=None),
        WebDatasetSource(url, PREPROCESS, image_key="png"),
        WebDatasetSource(url, PREPROCESS, size=48),
        WebDatasetSource(remote, PREPROCESS),
        WebDatasetSource(remote[::-1], PREPROCESS),
    ]
    assert len({one.identity for one in (source, *others)}) == 7
    assert WebDatasetSource(url, PREPROCESS, label_key=None).shard(0).labels is None
    damage(tars / "photos-00.tar", offset_of(url, "n00.txt")[1], b"A PHOTO")
    assert WebDatasetSource(url, PREPROCESS).identity != source.identity
    with (tars / "photos-00.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(SourceError, match="bytes long, but had"):
        source.shard(0)


def test_refusals(tars, monkeypatch):
    with pytest.raises(SourceError, match=r"There is no '.*photos-02.tar'"):
        WebDatasetSource(f"{tars}/photos-{{00..02}}.tar", PREPROCESS)
    with pytest.raises(ImageError, match="each once"):
        WebDatasetSource([str(tars / "photos-00.tar")] * 2, PREPROCESS)
    with pytest.raises(ConfigError, match="parts must be at least 1"):
        WebDatasetSource(str(tars / "photos-00.tar"), PREPROCESS, parts=0)
    with pytest.raises(SourceError, match="cannot be read"):
        WebDatasetSource("nosuch://bucket/a.tar", PREPROCESS).shard(0)
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'webdataset'.*registerlens\[streams\]"):
        WebDatasetSource(str(tars / "photos-00.tar"), PREPROCESS)

"""Images in shards, each of which can be read on its own, by whichever worker needs it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import Preprocess
from registerlens.data.images import HasPreprocess, ImageSource, Skipped, expand, preprocess_of, read_images
from registerlens.errors import ImageError, ShapeError, SourceError, check_choice, close_matches
from registerlens.progress import track

Check = Literal["content", "stat"]
"""By SHA-256 of all bytes, or by size and time of the last change.

"content" is the default, since it is right wherever the files lie: a picture that was painted over at equal size is
another one, and a copy on another machine is the same. It reads each file once, without decoding it: on a local disk a
few per cent of what decoding costs (docs/scaling.md).

"stat" reads nothing. Any ordinary change moves the time, so that it is noticed; but so does a copy, which then counts
as another set of images. For storage that is slow to read and that all runs share.
"""

MISSING = -1
"""Size of a file that is not there."""


def fingerprints(paths: Sequence[Path], check: str) -> list[str]:
    """One text a file, equal for equal files; "missing" for one that is not there.

    Raises:
        ConfigError: there is no such check.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.png"
        >>> _ = path.write_bytes(b"picture")
        >>> fingerprints([path, path.parent / "b.png"], "content")
        ['7 ...', 'missing']
    """
    check_choice("check", check, get_args(Check))
    with ThreadPoolExecutor(max_workers=8) as pool:  # files are waited for, and hashing leaves the interpreter free
        results = pool.map(partial(_fingerprint, check=check), paths)
        return list(track(results, "reading files", total=len(paths)))


def size_of(path: Path) -> int:
    """Bytes of a file; `MISSING` if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return MISSING


def check_unchanged(path: Path, listed: int) -> None:
    """Refuse a file that is no longer as long as it was, or is not there on this machine.

    Raises:
        SourceError: it is so.
    """
    now = size_of(path)
    if now == listed:
        return
    change = f"not there, but had {listed} bytes" if now == MISSING else f"{now} bytes long, but had {listed}"
    if listed == MISSING:
        change = "there, but was not"
    raise SourceError(
        f"'{path}' is {change} when the files were listed. Was it changed during the run? Every worker has to find the "
        "same files under the same path: put them on storage that all machines share, or copy them to each."
    )


def _fingerprint(path: Path, check: str) -> str:
    try:
        stat = path.stat()
        if check == "stat":
            return f"{stat.st_size} {stat.st_mtime_ns}"
        with path.open("rb") as file:
            return f"{stat.st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError:
        return "missing"


NO_LABEL = -1
"""Label of an image whose label is not known."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some images of a source, in its order."""

    names: tuple[str, ...]
    """One name an image, unique in the source."""
    images: Float[Tensor, "image channel height width"]
    """Preprocessed; float32 on the CPU."""
    labels: Int[Tensor, "image ..."] | None = None
    """One label an image, where the source has labels; `NO_LABEL` where one is missing."""
    skipped: tuple[Skipped, ...] = ()
    """Images of this shard that could not be used."""


def read_shard(
    named: Iterable[tuple[str, Any]],
    preprocess: Preprocess,
    labels: Mapping[str, int] | None,
    skipped: Sequence[Skipped] = (),
) -> Shard:
    """Decode and preprocess the images of a shard.

    Args:
        named: a name and something that `decode` takes, for each image.
        preprocess: how a decoded image becomes the model's pixels.
        labels: by name; like `skipped` it may be filled while `named` is read.
        skipped: what has been left out before.
    """
    names, images, unusable = read_images(named, preprocess)
    by_image = None if labels is None else torch.tensor([labels[name] for name in names], dtype=torch.long)
    return Shard(names=tuple(names), images=images, labels=by_image, skipped=(*skipped, *unusable))


@runtime_checkable
class Source(Protocol):
    """Images that are read shard by shard; small enough to be sent to a worker, which then reads what it needs."""

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        ...

    @property
    def n_images(self) -> int | None:
        """How many images there are, usable or not, where that is known."""
        ...

    @property
    def identity(self) -> str:
        """A hash of what is in it, in order: another list of images has another one."""
        ...

    def shard(self, index: int) -> Shard:
        """Read one shard, always the same.

        Raises:
            ImageError: it holds no images and never will; single images that cannot be used are in `Shard.skipped`.
            SourceError: it cannot be reached now, or is no longer what it was when the source was made.
        """
        ...


@dataclass(frozen=True)
class TensorSource:
    """Preprocessed images that are in memory.

    Args:
        images: all of them.
        labels: one an image.
        shard_size: images a shard.

    Raises:
        ImageError: there are no images, or the shard size is below 1.
        ShapeError: not one label an image.

    Example:
        >>> import torch
        >>> source = TensorSource(torch.zeros(5, 3, 8, 8), shard_size=2)
        >>> source.n_shards, source.shard(2).names
        (3, ('image 4',))
    """

    images: Float[Tensor, "image channel height width"]
    labels: Int[Tensor, "image ..."] | None = None
    shard_size: int = 256

    def __post_init__(self) -> None:
        if not len(self.images):
            raise ImageError("No image was given: the tensor is empty. Give at least one.")
        check_shard_size(self.shard_size)
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ShapeError(f"{len(self.labels)} labels for {len(self.images)} images; one for each is needed.")

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return -(-len(self.images) // self.shard_size)

    @property
    def n_images(self) -> int:
        """How many images there are."""
        return len(self.images)

    @property
    def identity(self) -> str:
        """SHA-256 of the pixels, the labels and the size of the shards."""
        parts = [self.images.float().cpu().contiguous().numpy().tobytes()]
        if self.labels is not None:
            parts.append(self.labels.cpu().contiguous().numpy().tobytes())
        return hash_of([hashlib.sha256(part).hexdigest() for part in parts], self.shard_size)

    def shard(self, index: int) -> Shard:
        """One shard."""
        where = slice(index * self.shard_size, (index + 1) * self.shard_size)
        images = self.images[where].float().cpu()
        names = tuple(f"image {where.start + i}" for i in range(len(images)))
        return Shard(names=names, images=images, labels=None if self.labels is None else self.labels[where])


class FolderSource:
    """Image files, of which each shard decodes only its own; the files are listed once, when the source is made.

    It holds names and sizes, no pixels: a worker gets it and reads the files itself. They have to lie at the same path
    on every machine. A file that changed, vanished or is not there on that machine is an error and not a skipped
    image, since a table must not depend on who computed it.

    Args:
        images: a folder, a glob such as "photos/**/*.jpg", a file, or a list of these, in natural order.
        model: a HookedViT, or a `Preprocess`.
        labels: from file names, as in `names` or as given, to labels; a file that is not in it gets `NO_LABEL`.
        shard_size: images a shard.
        size: height and width in pixels, if not the model's own; an int means a square.
        check: how files are told apart in `identity`, see `registerlens.data.sources.Check`.

    Raises:
        ImageError: there are no such files, one is listed twice, or no label belongs to any of them.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for i in (1, 2, 10):
        ...     Image.new("RGB", (20, 20)).save(folder / f"{i}.png")
        >>> source = FolderSource(folder, Preprocess(resize=(16, 16)), labels={"10.png": 7}, shard_size=2)
        >>> source.n_shards, source.shard(1).names, source.shard(1).labels
        (2, ('10.png',), tensor([7]))
    """

    names: tuple[str, ...]
    """File names, relative to the folder that holds them all, with forward slashes."""

    def __init__(
        self,
        images: ImageSource,
        model: Preprocess | HasPreprocess,
        *,
        labels: Mapping[str, int] | None = None,
        shard_size: int = 256,
        size: int | tuple[int, int] | None = None,
        check: Check = "content",
    ) -> None:
        check_shard_size(shard_size)
        self.preprocess, self.shard_size, self.check = preprocess_of(model, size), shard_size, check
        listed = expand(images)
        files = [path for path in listed if isinstance(path, Path)]
        if not files or len(files) < len(listed):
            raise ImageError("A FolderSource takes image files. Images in memory: TensorSource(load_images(...)).")
        paths = [path.absolute() for path in files]
        self.root = Path(os.path.commonpath([path.parent for path in paths]))
        self.names = tuple(path.relative_to(self.root).as_posix() for path in paths)
        if len(set(self.names)) < len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise ImageError(
                f"'{twice}' is listed twice; the rows of its images could not be told apart. List it once."
            )
        self._sizes = tuple(map(size_of, paths))
        self._labels = None if labels is None else _labels_of(self.names, list(map(str, files)), labels)

    def __repr__(self) -> str:
        return f"FolderSource({str(self.root)!r}, {self.n_images} images in {self.n_shards} shards)"

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return -(-len(self.names) // self.shard_size)

    @property
    def n_images(self) -> int:
        """How many files there are, usable or not."""
        return len(self.names)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of relative names, contents (or times), labels, preprocessing and the size of the shards."""
        marks = fingerprints([self.root / name for name in self.names], self.check)
        files = [f"{name} {mark}" for name, mark in zip(self.names, marks, strict=True)]
        return hash_of([*files, *map(str, self._labels or ()), preprocess_text(self.preprocess)], self.shard_size)

    def shard(self, index: int) -> Shard:
        """One shard.

        Raises:
            SourceError: a file is not as it was when the files were listed.
        """
        where = slice(index * self.shard_size, (index + 1) * self.shard_size)
        listed, sizes = self.names[where], self._sizes[where]
        for name, size in zip(listed, sizes, strict=True):
            check_unchanged(self.root / name, size)
        labels = None if self._labels is None else dict(zip(listed, self._labels[where], strict=True))
        return read_shard([(name, self.root / name) for name in listed], self.preprocess, labels)


def _labels_of(names: Sequence[str], as_listed: Sequence[str], labels: Mapping[str, int]) -> tuple[int, ...]:
    numbers = tuple(
        labels.get(name, labels.get(as_given, NO_LABEL)) for name, as_given in zip(names, as_listed, strict=True)
    )
    if all(label == NO_LABEL for label in numbers):
        example = next(iter(labels), "")
        raise ImageError(
            f"No image has a label: none of the {len(labels)} names with labels, such as {example!r}, is a file's. "
            f"Expected names such as {names[0]!r}.{close_matches(example, names)}"
        )
    return numbers


class LastShard:
    """A source that keeps the shard that was read last: for a worker that does several tasks on it.

    Args:
        source: where the images come from.

    Example:
        >>> kept = LastShard(TensorSource(torch.zeros(5, 3, 8, 8), shard_size=2))
        >>> kept.shard(1) is kept.shard(1)
        True
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._last: tuple[int, Shard] | None = None

    @property
    def n_shards(self) -> int:
        """The source's."""
        return self.source.n_shards

    @property
    def n_images(self) -> int | None:
        """The source's."""
        return self.source.n_images

    @property
    def identity(self) -> str:
        """The source's."""
        return self.source.identity

    def shard(self, index: int) -> Shard:
        """The source's; the one before is let go first, so that there is never a second one in memory."""
        if self._last is None or self._last[0] != index:
            self._last = None
            self._last = index, self.source.shard(index)
        return self._last[1]


@dataclass(frozen=True, eq=False)
class SourceBatches:
    """A source's images in batches, as often as they are asked for."""

    source: Source
    batch_size: int

    @property
    def n_images(self) -> int | None:
        """How many there are, where that is known."""
        return self.source.n_images

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.source.n_shards):
            images = self.source.shard(index).images
            if len(images):
                yield from images.split(self.batch_size)


def preprocess_text(preprocess: Preprocess) -> str:
    """How images are prepared, as text for a hash."""
    return json.dumps(preprocess.to_dict(), sort_keys=True)


def hash_of(names: Sequence[str], shard_size: int) -> str:
    """A hash of names in order, and of how they are cut.

    Example:
        >>> hash_of(["a", "b"], 2) == hash_of(["a", "b"], 2) != hash_of(["b", "a"], 2)
        True
    """
    return hashlib.sha256("\0".join([str(shard_size), *names]).encode()).hexdigest()


def check_shard_size(shard_size: int) -> None:
    """Refuse shards without images.

    Raises:
        ImageError: the size is below 1.
    """
    if shard_size < 1:
        raise ImageError(f"shard_size must be at least 1, got {shard_size}.")

"""Images in webdataset shards: tar files, local or behind URLs, whose members of one base name make one sample."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from posixpath import basename
from typing import Any

from registerlens.config import Preprocess
from registerlens.data import sources
from registerlens.data.images import HasPreprocess, Skipped, preprocess_of
from registerlens.errors import ImageError, SourceError, check_at_least, needing
from registerlens.waiting import answer


class WebDatasetSource:
    """Tar files as webdataset writes them; each is one shard, or `parts` of them.

    The order is that of the addresses and, within a tar, of its members. A damaged member, a sample without an image
    and an image that cannot be decoded are skipped by name; a connection that breaks is an error, so that a table does
    not depend on the weather.

    Args:
        urls: addresses with braces, such as "photos-{0000..0099}.tar", or a list of them: paths, or whatever
            webdataset opens (http, gs, hf, "pipe:command").
        model: a HookedViT, or a `Preprocess`.
        image_key: suffixes of images; the first one that a sample has is taken.
        label_key: suffix of a file that holds the label as a decimal integer; None if labels are not wanted.
        parts: into how many shards a tar is cut: sample n belongs to part n modulo `parts`. Each part reads its whole
            tar and decodes only its own samples: with 1,251 photographs a tar, 5 parts keep a shard near 250.
        size: height and width in pixels, if not the model's own; an int means a square.
        check: how local files are told apart in `identity`; a URL is taken at its word.

    Raises:
        MissingExtraError: webdataset is not installed.
        ImageError: no address was given, or one twice.
        SourceError: a local file does not exist.

    Example:
        >>> WebDatasetSource("no_such_place/photos-{00..03}.tar", Preprocess(resize=(16, 16)))
        Traceback (most recent call last):
        registerlens.errors.SourceError: There is no 'no_such_place/photos-00.tar'. ...
    """

    urls: tuple[str, ...]
    """One address a tar."""

    def __init__(
        self,
        urls: str | Sequence[str],
        model: Preprocess | HasPreprocess,
        *,
        image_key: str = "jpg;jpeg;png;webp",
        label_key: str | None = "cls",
        parts: int = 1,
        size: int | tuple[int, int] | None = None,
        check: sources.Check = "content",
    ) -> None:
        check_at_least(1, parts=parts)
        self.preprocess, self.parts, self.check = preprocess_of(model, size), parts, check
        self.image_keys, self.label_key = tuple(image_key.lower().split(";")), label_key
        patterns = [urls] if isinstance(urls, str) else urls
        self.urls = tuple(url for pattern in patterns for url in _webdataset().shardlists.expand_urls(str(pattern)))
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ImageError(f"Expected the addresses of one or more tar files, each once, got {urls!r}.")
        self._sizes = tuple(
            sources.MISSING if (path := _local(url)) is None else sources.size_of(path) for url in self.urls
        )
        for url, listed in zip(self.urls, self._sizes, strict=True):
            if _local(url) is not None and listed == sources.MISSING:
                raise SourceError(f"There is no '{url}'. Relative paths start at '{Path.cwd()}'. Check the path.")
        short = [basename(url) for url in self.urls]
        self._tars = tuple(short) if len(set(short)) == len(short) else self.urls

    def __repr__(self) -> str:
        return f"WebDatasetSource({self.urls[0]!r}{', ...' if len(self.urls) > 1 else ''}, {self.n_shards} shards)"

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return len(self.urls) * self.parts

    @property
    def n_images(self) -> None:
        """Unknown before all tars are read."""

    @cached_property
    def identity(self) -> str:
        """SHA-256 of local tars' names and contents (or times), of other addresses, and of how they are read."""
        local = {url: path for url in self.urls if (path := _local(url)) is not None}
        marks = dict(zip(local, sources.fingerprints(list(local.values()), self.check), strict=True))
        files = [f"{name} {marks.get(url, '')}" for name, url in zip(self._tars, self.urls, strict=True)]
        how = [";".join(self.image_keys), str(self.label_key), sources.preprocess_text(self.preprocess)]
        return sources.hash_of([*files, *how], self.parts)

    def shard(self, index: int) -> sources.Shard:
        """One shard.

        Raises:
            ImageError: the tar holds no samples.
            SourceError: it cannot be reached, or a local tar is not what it was.
        """
        tar, part = divmod(index, self.parts)
        skipped: list[Skipped] = []
        labels: dict[str, int] = {}
        named = self._named(tar, part, labels, skipped)
        return sources.read_shard(named, self.preprocess, labels if self.label_key else None, skipped)

    def _named(
        self, tar: int, part: int, labels: dict[str, int], skipped: list[Skipped]
    ) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of each image of one part; labels and what is wrong are noted on the way."""
        url, any_good = self.urls[tar], False
        if (path := _local(url)) is not None:
            sources.check_unchanged(path, self._sizes[tar])
        names: set[str] = set()
        for number, sample in enumerate(_samples(url, {*self.image_keys, self.label_key})):
            any_good |= not sample.damage
            name = f"{self._tars[tar]}/{sample.key}"
            repeated = name in names
            names.add(name)
            if number % self.parts != part:
                continue
            image = next((sample.files[key] for key in self.image_keys if key in sample.files), None)
            label = sample.files.get(self.label_key or "", str(sources.NO_LABEL).encode()).strip()
            reason = sample.damage
            if not reason and repeated:
                reason = "the tar has an earlier sample of this name"
            elif not reason and image is None:
                reason = f"has no image: none of its files ends in {' or '.join(self.image_keys)}"
            elif not reason and not re.fullmatch(rb"-?[0-9]{1,18}", label):
                reason = f"its label {label[:40].decode(errors='replace')!r} is no integer"
            if reason or image is None:
                skipped.append(Skipped(name, reason))
                continue
            labels[name] = int(label)
            yield name, image
        if not any_good:
            raise ImageError(f"'{url}' holds no samples; expected a tar file with images. Is it one?")


@dataclass
class _Sample:
    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    damage: str = ""


_DAMAGED = (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]


class _Tar(tarfile.TarFile):
    damaged = False
    """Whether a damaged header was met since the last member."""
    at_start = True


class _Header(tarfile.TarInfo):
    """A tar member that notes in its tar when its header is damaged; tarfile itself says nothing and ends there."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except _DAMAGED:
            tarfile.damaged = True
            raise


def _samples(url: str, wanted: set[str | None]) -> Iterator[_Sample]:
    """Consecutive members of one base name, with their bytes by lower-case suffix; damage is a sample of its own."""
    sample = None
    with _opened(url) as stream:
        for name, content in _members(stream, wanted):
            if name.startswith("("):  # a note between members; what it stands in goes on
                yield _Sample(name, damage=str(content))
                continue
            key, suffix = _split(name)
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            if isinstance(content, str):
                sample.damage = content
            else:
                sample.files[suffix] = content
    if sample is not None:
        yield sample


# webdataset's own reader gives up a tar at its first damaged header, with the sample before it, and hands out half of a
# sample where the tar breaks off; hence a reader that goes on after the damage and says what was lost.
def _members(stream: Any, wanted: set[str | None]) -> Iterator[tuple[str, bytes | str]]:
    """Name and bytes of each regular file of a tar (no bytes if its suffix is not wanted), or why it has none."""
    name = ""
    try:
        with _Tar.open(fileobj=stream, mode="r|*", bufsize=2**20, ignore_zeros=True, tarinfo=_Header) as tar:
            while True:
                member, good = _next(tar)
                if not good:
                    yield f"(after {name or 'the start'})", "a damaged tar header: what it headed is lost or misnamed"
                elif member is None:
                    return
                if member is None:
                    continue
                name = member.name
                if member.isreg() and not basename(name).startswith("__"):  # so webdataset marks its own notes
                    file = tar.extractfile(member) if _split(name)[1] in wanted else None
                    yield name, file.read() if file else b""
                tar.members = []  # type: ignore[attr-defined]  # which would otherwise grow with the tar
    except (tarfile.TarError, EOFError, zlib.error) as error:
        yield name or "(start)", f"the tar breaks off here ({error})"


def _next(tar: _Tar) -> tuple[tarfile.TarInfo | None, bool]:
    """The next member that there is, and whether no damage was met on the way; at the end None and True."""
    tar.damaged = tar.at_start and tar.damaged
    tar.at_start = False
    try:
        member = tar.next()
    except tarfile.ReadError:  # so tarfile takes damage behind a pax header, of which webdataset writes one a member
        if not tar.damaged:
            raise
        tar.offset = tar.fileobj.tell()  # type: ignore[attr-defined]  # on with the block after it
        return None, False
    return member, not tar.damaged


def _split(name: str) -> tuple[str, str]:
    """Base name and suffix as webdataset cuts them: at the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    base, _, suffix = file.partition(".")
    return folder + slash + base, suffix.lower()


class _Stream:
    """What webdataset opens at an address; where it is silent, reading ends in a TimeoutError."""

    def __init__(self, url: str) -> None:
        try:
            self._stream = answer(_webdataset().gopen, url)
        except ValueError as error:  # an address of a kind that webdataset does not know
            raise OSError(str(error)) from error

    def read(self, size: int) -> bytes:
        return answer(self._stream.read, size)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not TimeoutError:
            self._stream.close()  # raises where a connection broke, which to tarfile looks like the end
        else:
            with suppress(AttributeError):  # other addresses than paths are read through a program, such as curl
                self._stream.proc.kill()


@contextmanager
def _opened(url: str) -> Iterator[_Stream]:
    try:
        with _Stream(url) as stream:
            yield stream
    except OSError as error:
        raise SourceError(
            f"'{url}' cannot be read: {error}. Is the address right, and the network there? "
            "Without a network, copy the tar files to this machine and give their paths."
        ) from error


def _local(url: str) -> Path | None:
    """The path of a local file; None for what lies elsewhere."""
    if url.startswith("file:"):
        return Path(re.sub(r"^file:(//)?", "", url))
    return None if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", url) else Path(url)


def _webdataset() -> Any:
    with needing("webdataset", "streams", "Reading webdataset shards"):
        import webdataset  # an extra
    return webdataset

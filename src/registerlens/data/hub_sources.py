"""Images of a Hugging Face dataset, from the Hub or a local folder, streamed shard by shard."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from posixpath import basename
from typing import Any

from registerlens.config import Preprocess
from registerlens.data import sources
from registerlens.data.images import IMAGE_SUFFIXES, HasPreprocess, Skipped, preprocess_of
from registerlens.errors import ImageError, SourceError, close_matches, needing
from registerlens.waiting import answer, each


class HuggingFaceSource:
    """A split of a dataset, streamed: nothing is downloaded but what a shard reads.

    A streamed dataset has no random access: `skip(n)` reads what it skips. So shards follow the library's own, its
    files. If more are asked for than there are files, each file is cut: a Parquet file by its row groups, of which a
    shard then reads only its own; another file by taking every k-th row, which reads the whole file for each of its
    shards. Either way a shard is the same whoever reads it, in whatever order.

    The dataset is fixed when the source is made: of the Hub's, workers read the very commit; local files must not
    change.

    Args:
        name: a dataset's id on the Hub, a local folder, or a builder such as "parquet" together with `data_files`.
        model: a HookedViT, or a `Preprocess`.
        split: which split.
        image_column: the column with images; None takes the only one there is.
        label_column: a column of integers; None takes the only column of classes, if there is one.
        config: which of the dataset's configurations.
        revision: branch, tag or commit on the Hub.
        data_files: files or globs, for a builder.
        shards: about how many shards to make; None means one for each 256 images where the dataset says how many
            it has, and one for each file otherwise.
        size: height and width in pixels, if not the model's own; an int means a square.
        check: how local files are told apart in `identity`.

    Raises:
        MissingExtraError: datasets is not installed.
        SourceError: the dataset cannot be opened.
        ImageError: it has no such column.

    Example:
        >>> HuggingFaceSource("no_such_place/photos", Preprocess(resize=(16, 16)))
        Traceback (most recent call last):
        registerlens.errors.SourceError: The dataset 'no_such_place/photos' (split 'train') cannot be opened: ...
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        model: Preprocess | HasPreprocess,
        *,
        split: str = "train",
        image_column: str | None = None,
        label_column: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        data_files: str | Sequence[str] | None = None,
        shards: int | None = None,
        size: int | tuple[int, int] | None = None,
        check: sources.Check = "content",
    ) -> None:
        sources.check_shard_size(shards or 1)
        self.preprocess, self.check = preprocess_of(model, size), check
        files = (data_files,) if isinstance(data_files, str) else tuple(data_files or ())
        self._place = _Place(str(name), config, split, revision, files)
        opened = _open(self._place)
        self.image_column = image_column or _only_image(opened.features, self._place)
        self.label_column = label_column or _only_class(opened.features)
        self._check_columns(opened.features)
        self.n_images = opened.n_images
        n_files = opened.dataset.num_shards
        wanted = shards or (-(-self.n_images // 256) if self.n_images else n_files)
        self._cut = -(-wanted // n_files) if wanted > n_files else 1
        self.n_shards = n_files * self._cut if self._cut > 1 else wanted
        self._origins = opened.origins
        self._sizes = {path: sources.size_of(Path(path)) for path, origin in opened.origins if not origin}

    n_images: int | None
    """How many images there are, usable or not, where the dataset says so."""
    n_shards: int
    """How many shards there are."""

    def __repr__(self) -> str:
        return f"HuggingFaceSource({self._place.name!r}, split {self._place.split!r}, {self.n_shards} shards)"

    @cached_property
    def identity(self) -> str:
        """SHA-256 of local files' names and contents (or times), of the Hub's commit, and of how all is read."""
        local = [path for path, origin in self._origins if not origin]
        root = os.path.commonpath([Path(path).parent for path in local]) if local else ""
        marks = dict(zip(local, sources.fingerprints(list(map(Path, local)), self.check), strict=True))
        files = [
            f"{path} {origin}" if origin else f"{os.path.relpath(path, root)} {marks[path]}"
            for path, origin in self._origins
        ]
        how = [self._place.split, self.image_column, str(self.label_column), sources.preprocess_text(self.preprocess)]
        return sources.hash_of([*files, *how], self.n_shards)

    def shard(self, index: int) -> sources.Shard:
        """One shard.

        Raises:
            ImageError: its file is damaged.
            SourceError: it cannot be reached, or local files are not what they were.
        """
        skipped: list[Skipped] = []
        labels: dict[str, int] = {}
        try:
            named = each(self._named(index, labels, skipped))
            return sources.read_shard(named, self.preprocess, labels if self.label_column else None, skipped)
        except (SourceError, ImageError):
            raise
        except Exception as error:  # what a network, a file system or a reader raises is theirs to choose
            damaged = type(error).__name__ == "ArrowInvalid"
            kind, what = (ImageError, "is damaged") if damaged else (SourceError, "cannot be read")
            raise kind(f"Shard {index} of {self!r} {what}: {type(error).__name__}: {error}") from error

    def _named(self, index: int, labels: dict[str, int], skipped: list[Skipped]) -> Iterator[tuple[str, Any]]:
        """Name and undecoded image of each row; labels and rows without an image are noted on the way."""
        for number, row in enumerate(self._rows(index)):
            image = row[self.image_column] or {}
            path = image.get("path") or ""
            name = f"{index:05d}/{number:05d}" + (f" {basename(path)}" if path else "")
            label = row[self.label_column] if self.label_column else None
            labels[name] = sources.NO_LABEL if label is None else int(label)
            if image.get("bytes") is not None:
                yield name, image["bytes"]
            elif path:
                yield name, _read(path)
            else:
                skipped.append(Skipped(name, "the row has no image"))

    def _rows(self, index: int) -> Iterator[dict[str, Any]]:
        for path, size in self._sizes.items():
            sources.check_unchanged(Path(path), size)
        opened = _open(self._place)
        if [path for path, _ in opened.origins] != [path for path, _ in self._origins]:
            raise SourceError(f"{self!r} no longer has the files that it had. {_SAME_FILES}")
        columns = [self.image_column] + ([self.label_column] if self.label_column else [])
        dataset = opened.dataset.select_columns(columns)
        dataset = dataset.cast_column(self.image_column, _datasets().Image(decode=False))
        if self._cut == 1:
            return iter(dataset.shard(num_shards=self.n_shards, index=index))
        file, part = divmod(index, self._cut)
        whole = dataset.shard(num_shards=dataset.num_shards, index=file)
        groups = whole.reshard()
        if groups.num_shards >= self._cut:
            return iter(groups.shard(num_shards=self._cut, index=part))
        return islice(whole, part, None, self._cut)

    def _check_columns(self, features: Any) -> None:
        for column in filter(None, (self.image_column, self.label_column)):
            if column not in features:
                known = sorted(features)
                raise ImageError(
                    f"{self._place} has no column {column!r}. It has {known}.{close_matches(column, known)}"
                )
        if self.label_column is not None and "int" not in str(getattr(features[self.label_column], "dtype", "")):
            raise ImageError(
                f"Labels must be integers; the column {self.label_column!r} of {self._place} holds others."
            )


_SAME_FILES = (
    "Every worker has to find the same files: give a commit as `revision`, or storage that all machines share."
)


@dataclass(frozen=True)
class _Place:
    """Which dataset; hashable, so that a process opens it once."""

    name: str
    config: str | None
    split: str
    revision: str | None
    data_files: tuple[str, ...]

    def __str__(self) -> str:
        return f"The dataset '{self.name}' (split '{self.split}')"


@dataclass(frozen=True, kw_only=True)
class _Opened:
    dataset: Any
    features: Any
    n_images: int | None
    origins: tuple[tuple[str, str], ...]
    """Path or URL of each file, and what fixes its content; an empty text for local files."""


@lru_cache(maxsize=4)
def _open(place: _Place) -> _Opened:
    datasets = _datasets()
    try:
        return answer(_opened, datasets, place)
    except Exception as error:  # the library, the Hub's client and the file systems raise what they choose
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true") else ""
        raise SourceError(
            f"{place} cannot be opened: {type(error).__name__}: {error}.{offline} Expected a dataset's id on the Hub, "
            "a local folder, or a builder such as 'parquet' with data_files=... Without a network, give local files."
        ) from error


def _opened(datasets: Any, place: _Place) -> _Opened:
    builder = datasets.load_dataset_builder(
        place.name, place.config, revision=place.revision, data_files=list(place.data_files) or None
    )
    dataset = builder.as_streaming_dataset(split=place.split)
    features = dataset.features or dataset._resolve_features().features
    files = builder.config.data_files[place.split]
    known = (builder.info.splits or {}).get(place.split)
    pictures = sum(Path(path).suffix.lower() in IMAGE_SUFFIXES for path in files)
    marks = [" ".join(map(str, mark)) for mark in files.origin_metadata]
    origins = tuple((path, "" if Path(path).is_absolute() else mark) for path, mark in zip(files, marks, strict=True))
    return _Opened(
        dataset=dataset,
        features=features,
        n_images=known.num_examples if known else pictures or None,
        origins=origins,
    )


def _only_image(features: Any, place: _Place) -> str:
    columns = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if len(columns) != 1:
        raise ImageError(
            f"{place} has {len(columns)} columns of images among {sorted(features)}; name one as image_column."
        )
    return columns[0]


def _only_class(features: Any) -> str | None:
    columns = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    return columns[0] if len(columns) == 1 else None


def _read(path: str) -> bytes | str:
    """The bytes behind a path or URL of the library's; a local path is left for `decode` to open."""
    if Path(path).is_absolute():
        return path
    from datasets.utils.file_utils import xopen  # an extra

    with xopen(path, "rb") as file:
        return file.read()


def _datasets() -> Any:
    with needing("datasets", "streams", "Reading a Hugging Face dataset"):
        import datasets  # an extra
    return datasets

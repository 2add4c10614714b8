"""Image sets and labels, as a configuration names them, made into sources."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from registerlens.data.hub_sources import HuggingFaceSource
from registerlens.data.sources import FolderSource, Source, TensorSource
from registerlens.data.tar_sources import WebDatasetSource
from registerlens.errors import ConfigError
from registerlens.model.vit import HookedViT
from registerlens.sweep.yaml_config import ImagesSpec, SweepConfig


def sources_of(
    config: SweepConfig, models: Mapping[str, HookedViT]
) -> tuple[dict[str, Source], dict[str, dict[str, str]]]:
    """Every image set, prepared for every model: one source where models prepare images alike, several otherwise.

    Returns:
        the sources by name, and for each model the name of each of its image sets; "photos" is called "photos (large)"
        where the model "large" prepares it otherwise than the first model does.
    """
    first = next(iter(models.values())).preprocess
    sources: dict[str, Source] = {}
    names: dict[str, dict[str, str]] = {}
    for model, vit in models.items():
        alike = vit.preprocess == first
        names[model] = {images: images if alike else f"{images} ({model})" for images in config.named_images}
        for images, name in names[model].items():
            if name not in sources:
                sources[name] = source_of(config, config.named_images[images], vit)
    return sources, names


def source_of(config: SweepConfig, spec: ImagesSpec, vit: HookedViT) -> Source:
    """One image set, prepared for one model."""
    return SOURCES[spec.kind](config, spec, vit)


def _files(config: SweepConfig, spec: ImagesSpec, vit: HookedViT) -> Source:
    places = [config.place(name) for name in ([spec.where] if isinstance(spec.where, str) else spec.where)]
    missing = [place for place in places if not (set(place) & set("*?[") or Path(place).exists())]
    if missing:
        raise ConfigError(f"'{missing[0]}' is no file or folder. Names are relative to the folder of '{config.path}'.")
    options = {"labels": _labels_by_name(config), "shard_size": config.shard_size, **spec.options}
    return FolderSource(places, vit, **options)  # type: ignore[return-value]


def _tensors(config: SweepConfig, spec: ImagesSpec, vit: HookedViT) -> Source:
    images = torch.from_numpy(_array(config, str(spec.where)))
    if images.ndim != 4:
        raise ConfigError(f"'{spec.where}' has shape {list(images.shape)}, expected [image, channel, height, width].")
    labels = None if not config.labels else torch.from_numpy(_array(config, config.labels))
    return TensorSource(images.float(), labels, config.shard_size)


def _dataset(config: SweepConfig, spec: ImagesSpec, vit: HookedViT) -> Source:
    return HuggingFaceSource(str(spec.where), vit, **dict(spec.options))  # type: ignore[return-value]


def _webdataset(config: SweepConfig, spec: ImagesSpec, vit: HookedViT) -> Source:
    return WebDatasetSource(config.place(str(spec.where)), vit, **dict(spec.options))  # type: ignore[return-value]


SOURCES: dict[str, Callable[[SweepConfig, ImagesSpec, HookedViT], Source]] = {
    "files": _files,
    "folder": _files,
    "tensors": _tensors,
    "dataset": _dataset,
    "webdataset": _webdataset,
}
"""Where images come from -> what reads them."""


def _array(config: SweepConfig, name: str) -> np.ndarray:
    try:
        return np.load(config.place(name), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{config.place(name)}' is no readable .npy file: {error}") from error


def _labels_by_name(config: SweepConfig) -> dict[str, int] | None:
    """A .csv file of image names and whole numbers; a first line of words is taken for headings.

    Raises:
        ConfigError: it cannot be read; a line that is wrong is named.
    """
    if not config.labels:
        return None
    path = Path(config.place(config.labels))
    try:
        rows = list(csv.reader(path.read_text().splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"The labels '{path}' cannot be read: {error}") from error
    labels: dict[str, int] = {}
    for line, row in enumerate(rows, start=1):
        if not row or (line == 1 and not row[-1].strip().lstrip("-").isdigit()):
            continue
        try:
            name, label = row
            labels[name] = int(label)
        except ValueError as error:
            raise ConfigError(
                f"'{path}', line {line}: expected an image's name and its label, as in a.png,3; got {','.join(row)!r}."
            ) from error
    return labels

"""Edits are fitted once and kept in the store: elsewhere a mean has other last bits, a resumed run needs the same."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from registerlens.data.batches import Images
from registerlens.data.sources import Source, TensorSource
from registerlens.errors import ConfigError
from registerlens.interventions.ablation import Ablate
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Intervention
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition
from registerlens.sweep.content import content_hash
from registerlens.sweep.fitting import bind, fit_planned, unfitted
from registerlens.sweep.planned import Planned

References = Images | Source | Mapping[str, Images | Source]
"""Images to fit on; or those of each model by its name."""
Fits = dict[str, Intervention]
"""Fitted edits by the hash of what was to be fitted, and on which model."""
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Ablate, AttentionBias)}
"""What comes out of fitting."""


def fit_missing(
    models: Mapping[str, HookedViT],
    conditions: Iterable[Condition],
    references: References | None,
    batch_size: int,
    known: Mapping[str, Intervention],
) -> tuple[list[Condition], Fits]:
    """The same conditions with every planned edit fitted, and the edits that were not known before.

    Args:
        models: by name.
        conditions: in any order; their keys stay.
        references: images to fit on.
        batch_size: images at once.
        known: edits fitted earlier.

    Raises:
        ConfigError: edits are to be fitted, and there are no reference images.
    """
    bound, new = list(conditions), {}
    for name, vit in models.items():
        planned = {_identity(name, one): one for one in unfitted(one for one in bound if one.model == name)}
        waiting = [one for identity, one in planned.items() if identity not in known]
        fits = {one: _with(one, known[at]) for at, one in planned.items() if at in known}
        if waiting:
            fits |= fit_planned(vit, waiting, _batches(references, name, len(waiting), batch_size), batch_size)
            new |= {_identity(name, one): fits[one].fitted for one in waiting}
        bound = [bind(one, fits) if one.model == name else one for one in bound]
    return bound, new


def identity_of(references: References | None) -> str:
    """A hash of the images to fit on; empty where there are none, or where it cannot be known (a stream)."""
    if isinstance(references, Mapping):
        return content_hash({name: identity_of(images) for name, images in references.items()})
    if isinstance(references, Tensor):
        return TensorSource(references).identity[:16]
    return references.identity[:16] if isinstance(references, Source) else ""


def pack_fits(fits: Fits) -> bytes:
    """Fitted edits as one file: a zip archive of what `save` of each writes."""
    archive = io.BytesIO()
    with TemporaryDirectory() as folder, zipfile.ZipFile(archive, "w") as file:
        for identity, fitted in fits.items():
            place = Path(type(fitted).__name__) / identity
            KINDS[type(fitted).__name__].save(fitted, Path(folder) / place)
            for written in sorted((Path(folder) / place).iterdir()):
                file.write(written, str(place / written.name))
    return archive.getvalue()


def unpack_fits(content: bytes) -> Fits:
    """Fitted edits, bit for bit those that were packed."""
    with TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(content)) as file:
        file.extractall(folder)
        places = sorted(Path(folder).glob("*/*"))
        return {place.name: KINDS[place.parent.name].load(place) for place in places}


def _with(planned: Any, fitted: Intervention) -> Planned:
    """A planned edit (a dataclass), fitted."""
    return replace(planned, fitted=fitted)


def _identity(model: str, planned: Planned) -> str:
    return content_hash([model, planned])


def _batches(references: References | None, model: str, n: int, batch_size: int) -> Images:
    """The reference images of a model.

    Raises:
        ConfigError: there are none.
    """
    images: Any = references.get(model) if isinstance(references, Mapping) else references  # type: ignore[arg-type]
    if images is None:
        raise ConfigError(
            f"Fitting is needed for {n} of the edits of the model '{model}' (to means, noise, other images' "
            f"activations, or as an attention bias). Give run_sweep the images to fit on: reference_images=..."
        )
    return _ShardBatches(images, batch_size) if isinstance(images, Source) else images


@dataclass(frozen=True)
class _ShardBatches:
    """A source's images in batches, as often as they are asked for."""

    source: Source
    batch_size: int

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.source.n_shards):
            images = self.source.shard(index).images
            if len(images):
                yield from images.split(self.batch_size)

"""What a store says about itself: everything that decides its numbers, and how a later call compares with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import pyarrow as pa
import torch

from registerlens.data.sources import Source
from registerlens.engine.backends import Task, tasks_of
from registerlens.errors import StoreError
from registerlens.evaluation.metrics import Metric
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition, content, content_hash
from registerlens.sweep.job import part_schema
from registerlens.version import __version__

FORMAT = 1
"""Version of the store's format that this code writes; it reads no newer one."""
OWN = "the sweep's own images"
"""What edits are fitted on where nothing else is given."""
LONG = 2000
"""Characters of a condition's content above which only its hash is stored: sets of thousands of neurons."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that decides a store's numbers but the code."""

    format: int = FORMAT
    """Version of the store's format."""
    versions: dict[str, str]
    """Versions of registerlens and torch when the store was begun."""
    models: dict[str, str]
    """Hash of each model's architecture and weights, by name."""
    images: dict[str, dict[str, Any]]
    """For each image set: identity, n_shards, n_images."""
    reference: str
    """Identity of the images on which means and the like were fitted, or OWN; empty if none were."""
    metrics: dict[str, dict[str, Any]]
    """What each metric reads, and its description, in the order of the columns; a change of its code goes unnoticed."""
    batch_size: int
    """Images whose clean run is made at once."""
    stack: int
    """Sequences that go through the model at once."""
    threads: int
    """Torch threads of a worker."""
    seed: int
    """The seed of the sweep."""
    conditions: dict[str, dict[str, Any]]
    """By key: label, factors, model, images, control_of, and content (what it is, in JSON)."""
    groups: tuple[tuple[str, ...], ...]
    """Keys of each group's conditions."""
    fitted: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of fitted edits."""

    def tasks(self) -> list[Task]:
        """Every task, in order."""
        n_shards = [self.images[self.conditions[keys[0]]["images"]]["n_shards"] for keys in self.groups]
        return list(tasks_of(len(self.groups), dict(enumerate(n_shards))))

    def check(self, task: Task, table: pa.Table) -> None:
        """Whether a table is one that this task can have.

        Raises:
            StoreError: it has other columns, or rows of other conditions or shards.
        """
        schema = part_schema(self.metrics)
        if not table.schema.equals(schema):
            raise StoreError(f"has the columns {table.schema.names} instead of {schema.names}")
        strange = set(table["condition"].unique().to_pylist()) - set(self.groups[task.group])
        if strange or set(table["shard"].unique().to_pylist()) - {task.shard}:
            raise StoreError(f"has rows of other conditions or shards {sorted(map(str, strange))[:3]}")

    def to_json(self) -> str:
        """As it stands in the store."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            StoreError: it is damaged, or of a newer version; the message names `where` it is.
        """
        try:
            stored = json.loads(text)
            version = int(stored["format"])
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"'{where}' is damaged: {error!r}. The parts beside it are not touched; restore the file from a copy."
            ) from error
        if version > FORMAT:
            writer = stored.get("versions", {}).get("registerlens")
            raise StoreError(
                f"'{where}' has format {version}, written by registerlens {writer}; this version reads formats up to "
                f"{FORMAT}. Update registerlens, or choose another store."
            )
        try:
            values: dict[str, Any] = {item.name: stored[item.name] for item in fields(cls)}
            values["groups"] = tuple(map(tuple, values["groups"]))
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise StoreError(f"'{where}' lacks {error}; was it edited? Restore it from a copy.") from error


def manifest_of(
    models: Mapping[str, HookedViT],
    sources: Mapping[str, Source],
    conditions: Iterable[Condition],
    metrics: Iterable[Metric],
    *,
    reference: str = "",
    batch_size: int,
    stack: int,
    threads: int,
    seed: int,
) -> Manifest:
    """The manifest of a call, its conditions not grouped yet."""
    return Manifest(
        versions={"registerlens": __version__, "torch": torch.__version__},
        models={name: model_hash(vit) for name, vit in models.items()},
        images={
            name: {"identity": source.identity, "n_shards": source.n_shards, "n_images": source.n_images}
            for name, source in sources.items()
        },
        reference=reference,
        metrics={
            metric.name: {"norms": list(metric.norms), "attention": list(metric.attention), "words": metric.words}
            for metric in metrics
        },
        batch_size=batch_size,
        stack=stack,
        threads=threads,
        seed=seed,
        conditions={condition.key: _described(condition) for condition in conditions},
        groups=(),
    )


def model_hash(vit: HookedViT) -> str:
    """A hash of a model's architecture and of the bits of its weights.

    Example:
        >>> import registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> before = model_hash(vit)
        >>> with torch.no_grad():
        ...     _ = vit.blocks[3].mlp.b_in[5].add_(1e-3)
        >>> model_hash(vit) == before
        False
    """
    return content_hash([vit.cfg.to_dict(), vit.state_dict()])


def extended(stored: Manifest, asked: Manifest, where: str) -> Manifest:
    """The stored manifest with the conditions that were added, still to be grouped.

    How work is cut (stack, threads) stays as it was stored, so that new parts fit the old to the last bit.

    Raises:
        StoreError: something else differs; the message says what.
    """
    changes = [*_changes(stored, asked), *_removed(stored, asked)]
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise StoreError(
            f"'{where}' holds another sweep than the one asked for:\n{listed}\n"
            f"Conditions may be added to a store, nothing else may change: ask for what is stored, or choose another."
        )
    return replace(
        stored,
        models=stored.models | asked.models,
        images=stored.images | asked.images,
        reference=stored.reference or asked.reference,
        conditions=stored.conditions | asked.conditions,
    )


def _changes(stored: Manifest, asked: Manifest) -> Iterable[str]:
    yield from _of_names("model", stored.models, asked.models, "other weights or another architecture")
    for name, new in asked.images.items():
        if (old := stored.images.get(name)) and old != new:
            differences = [
                f"{key} {old[key]} -> {new[key]}" for key in ("n_images", "n_shards") if old[key] != new[key]
            ]
            differences = differences or ["as many, but other files, pixels, labels or another order"]
            yield f"the images '{name}' changed: {', '.join(differences)}"
    yield from _of_names("images", stored.images, asked.images, "")
    if stored.reference and asked.reference not in ("", OWN, stored.reference):
        yield f"the reference images changed: {stored.reference} -> {asked.reference}"
    if list(stored.metrics) != list(asked.metrics):
        yield f"the metrics changed: {', '.join(stored.metrics)} -> {', '.join(asked.metrics)}"
    else:
        other = [name for name in stored.metrics if stored.metrics[name] != asked.metrics[name]]
        for name in other:
            differences = _difference(stored.metrics[name], asked.metrics[name])
            yield f"the metric '{name}' is another one of the same name ({differences})"
    for name in ("batch_size", "seed"):
        old, new = getattr(stored, name), getattr(asked, name)
        if old != new:
            yield f"{name} changed: {old} -> {new}"


def _of_names(kind: str, stored: Mapping[str, Any], asked: Mapping[str, Any], why: str) -> Iterable[str]:
    if gone := sorted(set(stored) - set(asked)):
        yield f"{kind} no longer given: {', '.join(gone)}"
    if why:
        for name in sorted(set(stored) & set(asked)):
            if stored[name] != asked[name]:
                yield f"the {kind} '{name}' changed ({why}): {stored[name]} -> {asked[name]}"


def _removed(stored: Manifest, asked: Manifest) -> Iterable[str]:
    """Conditions that are gone, told apart from those whose content changed under the same label."""
    gone = [key for key in stored.conditions if key not in asked.conditions]
    if not gone:
        return
    new = {entry["label"]: entry for key, entry in asked.conditions.items() if key not in stored.conditions}
    for key in gone[:5]:
        old = stored.conditions[key]
        now = new.get(old["label"])
        if now is None:
            yield f"the condition '{old['label']}' ({key}) is no longer there"
        else:
            yield f"the condition '{old['label']}' changed: {_difference(old, now)}"
    if len(gone) > 5:
        yield f"and {len(gone) - 5} more conditions"


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())}
        places = {f"{path}.{key}" if path else key: pair for key, pair in pairs.items()}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        places = {f"{path}[{i}]": pair for i, pair in enumerate(zip(old, new, strict=True))}
    else:
        return f"{path}: {_short(old)} -> {_short(new)}"
    inner = next((place for place, (a, b) in places.items() if json.dumps(a) != json.dumps(b)), None)
    return f"{path}: {_short(old)} -> {_short(new)}" if inner is None else _difference(*places[inner], inner)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _described(condition: Condition) -> dict[str, Any]:
    description = content(list(condition.interventions))
    return {
        "label": condition.label,
        "factors": dict(condition.factors),
        "model": condition.model,
        "images": condition.images,
        "control_of": condition.control_of,
        "content": description if len(json.dumps(description)) <= LONG else content_hash(description),
    }

"""The built-in metrics that a configuration names, set up for its models."""

from __future__ import annotations

from collections.abc import Mapping

from registerlens.analysis.detection import Detection, detect
from registerlens.data.sources import Source
from registerlens.errors import ConfigError, ImageError
from registerlens.evaluation.metrics import Metric, default_metrics
from registerlens.model.vit import HookedViT
from registerlens.sweep.yaml_config import SweepConfig

METRICS = {
    "largest_norm": "",
    "outliers": "the model has no outliers on the first images",
    "sink_outliers": "the model has no outliers on the first images",
    "sink_patch": "the model has no outliers on the first images",
    "cos_cls": "the model has no [CLS] token",
    "cos_patches": "",
    "cos_output": "the model pools no output",
    "kl": "the model predicts no classes",
    "agreement": "the model predicts no classes",
    "cross_entropy": "the images have no labels",
    "accuracy": "the images have no labels",
}
"""Names of the built-in metrics, with why a model may lack one."""


def metrics_of(
    config: SweepConfig, models: Mapping[str, HookedViT], sources: Mapping[str, Source]
) -> tuple[Metric, ...]:
    """The metrics that were asked for, or all that the models have alike.

    Args:
        config: the configuration.
        models: by name.
        sources: images of each model; the first usable shard decides where outliers show, and whether there are labels.

    Raises:
        ConfigError: a model lacks one that was asked for, or models would measure it at different places.
    """
    own = {name: _metrics(vit, sources[name], config.batch_size) for name, vit in models.items()}
    first = next(iter(own.values()))
    alike = {one: first[one] for one in first if all(_same(first[one], other.get(one)) for other in own.values())}
    for name in config.metrics:
        lacking = [model for model, metrics in own.items() if name not in metrics]
        if lacking:
            raise ConfigError(
                f"'{config.path}': the metric {name!r} cannot be measured: {METRICS[name]} ({lacking[0]})."
            )
        if name not in alike:
            raise ConfigError(
                f"'{config.path}': the models would measure {name!r} at different places ("
                f"{'; '.join(metrics[name].words for metrics in own.values())}). Sweep them one by one."
            )
    return tuple(alike[name] for name in config.metrics or alike)


def _same(one: Metric, other: Metric | None) -> bool:
    return other is not None and (one.words, one.norms, one.attention) == (other.words, other.norms, other.attention)


def _metrics(vit: HookedViT, source: Source, batch_size: int) -> dict[str, Metric]:
    shards = (source.shard(index) for index in range(source.n_shards))
    shard = next((one for one in shards if len(one.names)), None)
    if shard is None:
        raise ImageError("No image could be read. Check the paths in the file.")
    detection: Detection = detect(vit, shard.images, batch_size=batch_size)
    return {one.name: one for one in default_metrics(vit, detection, labels=shard.labels is not None)}

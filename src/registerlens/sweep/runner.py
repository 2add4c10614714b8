"""One task of a sweep: a group of conditions on a shard of images. (The simplest form: every condition from the images.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from registerlens.analysis.detection import hook_of
from registerlens.analysis.outliers import token_norms
from registerlens.analysis.sinks import attention_hooks
from registerlens.data.sources import Shard
from registerlens.model.vit import HookedViT
from registerlens.sweep.conditions import Condition
from registerlens.sweep.metrics import Metric, View, check_metrics, measured


def run_task(
    vit: HookedViT,
    shard: Shard,
    conditions: Sequence[Condition],
    metrics: Sequence[Metric],
    *,
    index: int,
    batch_size: int,
    stack: int,
) -> pa.Table:
    """Every condition on every image of a shard."""
    check_metrics(metrics, vit.cfg)
    values = torch.full((len(conditions), len(metrics), len(shard.images)), torch.nan, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, len(shard.images), batch_size):
            part = slice(start, start + batch_size)
            images = shard.images[part].to(vit.device)
            labels = None if shard.labels is None else shard.labels[part].to(vit.device)
            clean = _look(vit, images, labels, metrics)
            for i, condition in enumerate(conditions):
                with vit.edit(*condition.interventions):
                    values[i, :, part] = measured(metrics, _look(vit, images, labels, metrics), clean)
    n = len(shard.names)
    columns: dict[str, Any] = {
        "condition": pa.array([one.key for one in conditions for _ in range(n)], pa.string()),
        "shard": pa.array([index] * (n * len(conditions)), pa.int32()),
        "image": pa.array(list(shard.names) * len(conditions), pa.string()),
    }
    columns |= {one.name: pa.array(values[:, m].reshape(-1).numpy()) for m, one in enumerate(metrics)}
    return pa.table(columns)


def _look(vit: HookedViT, images: Tensor, labels: Tensor | None, metrics: Sequence[Metric]) -> View:
    layout = vit.layout(images)
    norms: dict[str, Tensor] = {}
    attention: dict[int, Tensor] = {}
    places = {hook_of(place): place for one in metrics for place in one.norms}
    layers = sorted({layer for one in metrics for layer in one.attention})

    def keep(resid: Tensor, hook: Any) -> None:
        norms[places[hook.name]] = token_norms(resid)

    hooks: list[Any] = [(name, keep) for name in places]
    with vit.hooks([*hooks, *attention_hooks(vit, layout, layers, attention.__setitem__)]):
        tokens = vit(images, return_type="tokens")
    output = vit.head(tokens, layout)
    return View(layout=layout, tokens=tokens, output=output, norms=norms, attention=attention, labels=labels)

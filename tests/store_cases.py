"""A tiny sweep that the store's tests run, whole or in processes that are killed; nothing here needs pytest."""

import os
import signal
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pyarrow as pa
import torch

import registerlens as rl
from registerlens.data.images import Skipped
from registerlens.data.sources import Shard, TensorSource
from registerlens.engine.processes import _context
from registerlens.errors import ImageError
from registerlens.evaluation.metrics import Metric
from registerlens.sweep.conditions import Condition
from registerlens.sweep.run import run_sweep
from registerlens.sweep.store import SweepStore

CFG = rl.ViTConfig(n_layers=2, d_model=8, n_heads=2, d_mlp=12, image_size=(8, 8), patch_size=(4, 4))
PAUSE = 0.005


def tiny_vit(seed=0, cfg=CFG):
    """A few hundred parameters, all random."""
    generator = torch.Generator().manual_seed(seed)
    vit = rl.HookedViT(cfg)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return vit.eval()


def pixels(n=10, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def neurons(n=2, layers=(0, 1)):
    return [
        Condition(
            interventions=(rl.Ablate(rl.RegisterNeurons.from_pairs([(layer, neuron)])),),
            factors={"layer": layer, "neuron": neuron},
        )
        for layer in layers
        for neuron in range(n)
    ]


def _drift(edited, clean):
    return (edited.output - clean.output).norm(dim=-1)


def _sometimes_nan(edited, clean):
    first = edited.output[:, 0].double()
    return torch.where((first * 100).frac().abs() > 0.5, first, torch.nan)


METRICS = [Metric(name="drift", measure=_drift), Metric(name="odd", measure=_sometimes_nan)]


class Slow:
    """Images whose every shard takes a moment to read."""

    def __init__(self, n, seed=1):
        self.inner = TensorSource(pixels(n, seed), shard_size=2)
        self.n_shards, self.n_images, self.identity = self.inner.n_shards, n, self.inner.identity

    def shard(self, index):
        time.sleep(PAUSE)
        return self.inner.shard(index)


class Spotty:
    """A source in which image 3 cannot be used, shard 1 has no usable image, and shard 2 is no images at all."""

    n_shards, n_images, identity = 4, 8, "spotty"

    def shard(self, index):
        names, images = (f"{2 * index}.png", f"{2 * index + 1}.png"), pixels(8)[2 * index : 2 * index + 2]
        if index == 0:
            return Shard(names=names[:1], images=images[:1], skipped=(Skipped("1.png", "truncated"),))
        if index == 1:
            return Shard(names=(), images=images[:0], skipped=tuple(Skipped(name, "no such file") for name in names))
        if index == 2:
            raise ImageError("is no archive of images")
        return Shard(names=names, images=images)


def bits(table):
    """Names, order and every bit of a table's numbers."""
    return {
        name: column.to_numpy().tobytes() if pa.types.is_primitive(column.type) else column.to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def rows(result):
    """A result's table as a data frame of plain strings and numbers."""
    return result.table.to_pandas().astype({"condition": str, "image": str})


def part_bits(folder):
    """The rows of every part file."""
    store = SweepStore.open(folder)
    return {task.name: bits(table) for task, table in store.tables()}


def part_files(folder):
    """Which files are there, and since when: a part that is made twice has another time or inode."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(folder, "parts").glob("*.parquet")
    }


def sweep(folder, metrics=METRICS, conditions=None, images=None, vit=None, **options):
    """The sweep of these tests: by default 5 conditions on 10 images in 5 shards.

    On one thread, as the processes that are killed here: with others, torch adds in another order and bits differ.
    """
    options = {"shard_size": 2, "batch_size": 2, "threads": 1} | options
    return run_sweep(
        vit or tiny_vit(),
        pixels() if images is None else images,
        neurons() if conditions is None else conditions,
        metrics,
        store=folder,
        **options,
    )


# What runs in processes that are killed ------------------------------------------------------------------------------


def long_sweep(folder, **options):
    """Two groups of conditions on 40 and 20 shards: 60 tasks."""
    conditions = [*neurons(1), replace(neurons(1)[0], images="others")]
    return sweep(folder, conditions=conditions, images={"images": Slow(80), "others": Slow(40, seed=2)}, **options)


def victim(folder, pipe):
    """Says when it starts and sweeps slowly."""
    torch.set_num_threads(1)
    pipe.send("started")
    long_sweep(folder)
    pipe.send("finished")


def victim_at(folder, pipe, moment, count):
    """Stops for good at a moment of the count-th write of a part: until it is killed."""
    torch.set_num_threads(1)
    seen = [0]

    def stop_at(owner, name, before):
        real = getattr(owner, name)

        def stopping(first, *rest):
            part = "parquet" in str(rest[0] if rest else first) or name == "fsync"
            seen[0] += part
            if part and seen[0] == count and before:
                _stop()
            made = real(first, *rest)
            if part and seen[0] == count and not before:
                _stop()
            return made

        setattr(owner, name, stopping)

    def _stop():
        pipe.send("there")
        time.sleep(60)

    if moment == "before fsync":
        stop_at(os, "fsync", True)
    else:
        stop_at(Path, "replace", moment == "before rename")
    sweep(folder)
    pipe.send("finished")


def driver(folder, pipe, server):
    """A sweep with worker processes of its own, each of which notes its process id.

    They are forked by the server of the test's process, which has imported everything.
    """
    forkserver._forkserver._forkserver_address = server
    forkserver._forkserver.ensure_running = lambda: None
    noting = Noting(folder)
    pipe.send("started")
    try:
        sweep(Path(folder) / "store", images=noting, backend="processes", workers=2)
    except KeyboardInterrupt:
        pipe.send("interrupted")


class Noting(Slow):
    """Writes down which processes read it, and a dot for every time that a shard is read."""

    def __init__(self, folder):
        super().__init__(2000)
        self.folder = Path(folder)

    def shard(self, index):
        (self.folder / f"{os.getpid()}.pid").touch()
        with (self.folder / f"{index}.shard").open("a") as file:
            file.write(".")
        return super().shard(index)


class DeadlyOnce:
    """Ends the process the first few times that a shard is read: kills it, stops it, or never comes back."""

    n_shards, n_images = 5, 10
    identity = TensorSource(pixels(), shard_size=2).identity

    def __init__(self, folder, times, shard=2, how="SIGKILL"):
        self.folder, self.times, self.deadly, self.how = Path(folder), times, shard, how

    def shard(self, index):
        if index == self.deadly and len(list(self.folder.iterdir())) < self.times:
            (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
            time.sleep(1000) if self.how == "sleep" else os.kill(os.getpid(), getattr(signal, self.how))
        return TensorSource(pixels(), shard_size=2).shard(index)


def start(target, *arguments):
    """A process forked from a server that has torch and registerlens imported; returns when it has said something."""
    context = _context()
    mine, its = context.Pipe()
    process = context.Process(target=target, args=(arguments[0], its, *arguments[1:]))
    process.start()
    its.close()
    assert mine.poll(200), "the process never started"
    return process, mine, mine.recv()

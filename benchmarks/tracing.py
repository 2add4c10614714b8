"""`trace` against the plain forward pass, and its memory as the stream of images gets longer."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import registerlens as rl
from benchmarks.harness import FULL, TINY, Row, Scale, Task, in_pairs, peak_memory
from benchmarks.models import focus_vit, pixels


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """One row a size, and two of memory."""
    vit = focus_vit(scale)
    for size, batch in scale.sizes:
        images = pixels(size, batch)
        # No progress bar beside our own table: `trace` draws one only if stderr is a terminal.
        with contextlib.redirect_stderr(io.StringIO()):
            times = in_pairs(lambda x=images: rl.trace(vit, [x]), lambda x=images: vit(x), pairs)
        yield times.row(
            benchmark="trace",
            what=f"trace, {size} px, batch {batch}",
            peer="our plain forward",
            at_most=1.15,
            missed_because="norms at every sublayer, one query row a layer, quantiles and histograms",
        )
    few, many = (peak_memory(stream, tiny=scale.tiny, n_images=n) for n in scale.streamed)
    for kind, at_most in (("peak", 1.05), ("growth", None)):
        yield Row(
            benchmark="trace",
            what=f"{_KINDS[kind]}, {scale.streamed[1]} streamed images",
            peer=f"{scale.streamed[0]} streamed images",
            ours=many[kind],
            theirs=few[kind],
            ratio=many[kind] / few[kind],
            unit="MiB",
            at_most=at_most,
            missed_because=_BECAUSE if at_most else "",
            details={"few": few, "many": many},
        )


_BECAUSE = (
    "peaks vary by some 10% from run to run with how the heap happens to be filled; they stop growing (1024 "
    "images needed no more than 512 in the runs tried)"
)

_KINDS = {"peak": "peak memory of the process", "growth": "peak memory above the loaded model"}


def stream(tiny: bool, n_images: int) -> Task:
    """A trace of image files, decoded on the fly; the files are eight photograph-sized pictures over and over."""
    scale = TINY if tiny else FULL
    vit = focus_vit(scale)
    size, batch = scale.sizes[0]
    folder = tempfile.TemporaryDirectory()
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(Path(folder.name) / f"{i}.jpg")
    files = [Path(folder.name) / f"{i % 8}.jpg" for i in range(n_images)]
    images = rl.data.ImageStream(files, vit, batch_size=batch, size=size)

    def task() -> rl.analysis.Trace:
        with folder:
            found = rl.trace(vit, images)
        if found.n_images != n_images:
            raise RuntimeError(f"{found.n_images} images went through, not {n_images}.")
        return found

    return task

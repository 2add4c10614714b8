"""`classify_sinks` against the plain forward pass, and its memory as the stream of images gets longer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from benchmarks.harness import FULL, TINY, Row, Scale, Task, flat_memory, in_pairs
from benchmarks.models import focus_vit, pixels
from registerlens.analysis.sink_kinds import SinkKinds, classify_sinks
from registerlens.model.vit import HookedViT


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """One row a size, one with every head's most attended key an event, and one of memory."""
    vit = focus_vit(scale)
    for size, batch in scale.sizes:
        yield _against_forward(vit, size, batch, pairs)
    yield _against_forward(vit, *scale.sizes[0], pairs, everything=True)
    yield flat_memory(stream, scale, benchmark="sinks", what="classify_sinks")


def _against_forward(vit: HookedViT, size: int, batch: int, pairs: int, everything: bool = False) -> Row:
    images = pixels(size, batch)
    options = {"thresholds": [1e-6], "queries": 0.5} if everything else {}  # an event in every image and head
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar beside our own table
        times = in_pairs(lambda: classify_sinks(vit, [images], **options), lambda: vit(images), pairs)
        found = classify_sinks(vit, [images], **options)
    return times.row(
        benchmark="sinks",
        what=f"classify_sinks, {size} px, batch {batch}{', an event in every head' if everything else ''}",
        peer="our plain forward",
        at_most=None if everything else 1.5,
        missed_because="the pattern of every layer is computed explicitly, and read once for the mean of its columns",
        details={"events": int(found.events[-1].sum()), "of": batch * found.received.size},
    )


# In a process of its own: memory -------------------------------------------------------------------------------------


def stream(tiny: bool, n_images: int) -> Task:
    """Sinks of batches that are made on the fly."""
    scale = TINY if tiny else FULL
    vit = focus_vit(scale)
    size, batch = scale.sizes[0]

    def task() -> SinkKinds:
        found = classify_sinks(vit, (pixels(size, batch) for _ in range(n_images // batch)))
        if found.n_images != n_images:
            raise RuntimeError(f"{found.n_images} images went through, not {n_images}.")
        return found

    return task

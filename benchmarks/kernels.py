"""Kernel checks against the decompositions they need, and against the plain forward pass; memory as streams grow."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

import registerlens as rl
from benchmarks.harness import FULL, TINY, Row, Scale, Task, flat_memory, in_pairs
from benchmarks.neurons import photographs, planted
from registerlens.theory.kernels import check_kernels
from registerlens.theory.observed import observe
from registerlens.theory.readers import Reader, fold, readers_of

_LATER = 1
"""Blocks that follow the neurons in the random ViT-L: cost is by the block, and one is enough to time."""


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """Rows on weights, on images, and on memory."""
    yield from _weights(scale, pairs)
    yield _images(scale, pairs)
    yield flat_memory(stream, scale, benchmark="kernels", what="kernel checks")


def random_vit_large(scale: Scale) -> tuple[rl.HookedViT, rl.RegisterNeurons]:
    """A random ViT-L/14 with a head of 1000 classes (tiny: small), and three of its neurons."""
    sizes = (4, 32, 4, 64, 28) if scale.tiny else (24, 1024, 16, 4096, 224)
    n_layers, d_model, n_heads, d_mlp, size = sizes
    torch.manual_seed(0)
    cfg = rl.ViTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_mlp=d_mlp,
        image_size=(size, size),
        patch_size=(14, 14),
        layer_scale=True,
        d_out=10 if scale.tiny else 1000,
    )
    layer = n_layers - 1 - _LATER
    return rl.HookedViT(cfg).eval(), rl.RegisterNeurons.from_pairs([(layer, n) for n in (3, 17, 40)])


def folded(readers: list[Reader]) -> list[Tensor]:
    """The matrices whose singular values and vectors the check needs, in float64."""
    return [fold(reader.norm, reader.weight) for reader in readers]


def _weights(scale: Scale, pairs: int) -> Iterator[Row]:
    vit, neurons = random_vit_large(scale)
    matrices = folded(list(readers_of(vit, vit.cfg.n_layers - _LATER)))

    def ours() -> rl.HookedViT:
        with contextlib.redirect_stderr(io.StringIO()):  # no progress bar beside our own table
            return cast(rl.HookedViT, check_kernels(vit, neurons))

    def svd() -> None:
        for matrix in matrices:
            torch.linalg.svd(matrix, full_matrices=False)

    def eigh() -> None:
        for matrix in matrices:
            torch.linalg.eigh(matrix @ matrix.T if matrix.shape[1] >= matrix.shape[0] else matrix.T @ matrix)

    details = {"matrices": [list(matrix.shape) for matrix in matrices]}
    what = f"kernel checks, weights only, ViT-L, {_LATER} later block"
    peers = {"torch.linalg.svd of the same matrices": svd, "the decompositions it does, bare": eigh}
    for peer, theirs in peers.items():
        yield in_pairs(ours, theirs, pairs).row(
            benchmark="kernels",
            what=what,
            peer=peer,
            at_most=2.0,
            missed_because="folding, W_V W_O and the nulls come on top",
            details=details,
        )


def _images(scale: Scale, pairs: int) -> Row:
    vit, layer = planted(scale)
    size, batch = scale.sizes[0]
    images = photographs(vit, scale, size, 64)

    def ours() -> object:
        with contextlib.redirect_stderr(io.StringIO()):
            return observe(vit, images, [layer], layer + 1, batch_size=batch)

    def forward() -> None:
        for part in images.split(batch):
            vit(part)

    return in_pairs(ours, forward, pairs).row(
        benchmark="kernels",
        what=f"kernel checks, what images add, {len(images)} images, {size} px",
        peer="our plain forward",
        at_most=1.5,
        missed_because="an eighth of the images passes twice, to find where outliers arise",
    )


# In a process of its own: memory -------------------------------------------------------------------------------------


class _Stream:
    """The same few images over and over, so that only what is kept of them can grow."""

    def __init__(self, images: Tensor, n_images: int, batch: int) -> None:
        self.images, self.n_images, self.batch = images, n_images, batch

    def __iter__(self):
        for start in range(0, self.n_images, self.batch):
            yield self.images[: min(self.batch, self.n_images - start)].clone()


def stream(tiny: bool, n_images: int) -> Task:
    """What images add, on a stream of that many."""
    scale = TINY if tiny else FULL
    vit, layer = planted(scale)
    size, batch = scale.sizes[0]
    batches = _Stream(photographs(vit, scale, size, batch), n_images, batch)

    def task() -> object:
        # The first eighth is held; of an unknown number 64 are, which a stream of any length holds.
        found = observe(vit, iter(batches), [layer], layer + 1)
        if found.n_images != n_images:
            raise RuntimeError(f"{found.n_images} images went through, not {n_images}.")
        return found

    return task

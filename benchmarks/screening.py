"""`screen_neurons` against the plain forward pass: every neuron of every layer from one forward and one backward."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Row, Scale, in_pairs
from benchmarks.models import focus_vit, pixels
from registerlens.circuits.screening import Mode, Screening, screen_neurons
from registerlens.model.vit import HookedViT


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """Two rows a size: a metric at the end, and the largest norm of the last block; and one of mean ablation."""
    with torch.inference_mode(False):  # weights made in inference mode cannot take part in a graph
        vit = focus_vit(scale)
    last = f"largest_norm@{vit.cfg.n_layers - 1}.mlp"
    for size, batch in scale.sizes:
        yield _against_forward(vit, pixels(size, batch), "cls", "zero", pairs)
        yield _against_forward(vit, pixels(size, batch), last, "zero", pairs)
    yield _against_forward(vit, pixels(*scale.sizes[0]), "cls", "mean", pairs)


def _against_forward(vit: HookedViT, images: Tensor, metric: str, mode: Mode, pairs: int) -> Row:
    n, size = len(images), images.shape[-1]

    def screen() -> Screening:
        return screen_neurons(vit, images, metric, mode=mode, exact=0, sample=0, batch_size=n)

    def forward() -> Tensor:
        with torch.inference_mode():
            return vit(images)

    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar beside our own table
        times = in_pairs(screen, forward, pairs)
        neurons = screen().effects.size
    return times.row(
        benchmark="screening",
        what=f"screen_neurons, {neurons} neurons, {metric}, {mode} ablation, {size} px, batch {n}",
        peer="our plain forward",
        at_most=5.0 if mode == "zero" else None,
        details={"neurons": neurons},
    )

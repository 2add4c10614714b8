"""Many edits on the same images, with as little computed as possible.

A batch's clean run is made once. An edit starts from the clean residual stream before the first block it changes, and
edits that start at the same block go through the rest of the model together, each changing its share of the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.config import ViTConfig
from registerlens.engine.backends import GROUP
from registerlens.engine.views import View, Watched, repeated, run_clean, run_from
from registerlens.errors import ConfigError, OutOfMemoryError, ShapeError
from registerlens.evaluation.metrics import Metric, check_metrics, measured
from registerlens.interventions.base import Intervention, Plan, Scene, plan, stacked_hooks
from registerlens.model.names import TOKENS
from registerlens.model.vit import HookedViT


def measure_edits(
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    conditions: Sequence[Sequence[Intervention]],
    metrics: Sequence[Metric],
    *,
    labels: Int[Tensor, "label ..."] | None = None,
    batch_size: int,
    stack: int,
) -> Float[Tensor, "condition image metric"]:
    """Every metric of every condition on every image, as if each condition had been run with `vit.edit`.

    Where memory does not suffice, less goes through the model at once from there on, and the run goes on.

    Args:
        vit: the model; hooks and edits that are in force on it hold for the clean run, too.
        images: preprocessed.
        conditions: the interventions of each, fitted; none for the clean run.
        metrics: the columns, in order.
        labels: one an image, where metrics want them.
        batch_size: images whose clean run is made at once.
        stack: sequences (images x conditions) that go through the model at once; at least `batch_size` do.

    Returns:
        float64. What is not a number, in a metric or in the model's output, is NaN here, too.

    Raises:
        ConfigError: a size is below 1, two metrics share a name, or one looks where the model has nothing.
        InterventionError: a condition does not fit the model, or never fires.
        OutOfMemoryError: a single sequence does not fit.
        ShapeError: labels do not fit the images, or a metric gives something else than one number an image.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.evaluation.metrics import default_metrics
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> heads = [[rl.Ablate(rl.Heads([(layer, 0)]))] for layer in (1, 4)]
        >>> measure_edits(vit, torch.rand(2, 3, 48, 48), heads, default_metrics(vit), batch_size=2, stack=4).shape
        torch.Size([2, 2, 4])
    """
    if batch_size < 1 or stack < 1:
        raise ConfigError(f"batch_size and stack must be at least 1, got {batch_size} and {stack}.")
    if labels is not None and len(labels) != len(images):
        raise ShapeError(f"{len(labels)} labels for {len(images)} images; one for each is needed.")
    check_metrics(metrics, vit.cfg)
    run = _Run(
        vit=vit,
        images=images,
        labels=labels,
        metrics=metrics,
        planned=[_planned(vit, i, one) for i, one in enumerate(conditions)],
        values=torch.full((len(conditions), len(images), len(metrics)), torch.nan, dtype=torch.float64),
        batch_size=batch_size,
        stack=max(stack, batch_size),
    )
    with torch.inference_mode():
        run.run()
    return run.values


@dataclass(frozen=True)
class _Planned:
    """A condition, ready to be run."""

    index: int
    """Its place among the conditions."""
    plan: Plan
    first: int
    """The first block that it edits."""
    n_keys: int
    """Keys that it appends in every layer."""

    @property
    def kind(self) -> tuple[int, int, int]:
        """Conditions of one kind have sequences of one length and start together, so that they can share a batch."""
        return self.first, self.plan.n_registers, self.n_keys


def _planned(vit: HookedViT, index: int, interventions: Sequence[Intervention]) -> _Planned:
    edits = plan(vit, interventions, vit.n_test_time_registers)
    return _Planned(index, edits, edits.first_block(vit.cfg.n_layers), sum(one.n_keys for one in interventions))


@dataclass
class _Batch:
    """Some images: their clean run, and where conditions start from."""

    part: slice
    """Which of the images."""
    clean: View
    resid: dict[int, Float[Tensor, "batch pos d_model"]]
    """The clean stream before blocks."""
    scene: Scene
    """Without test-time registers of the conditions."""
    scenes: dict[int, Scene] = field(default_factory=dict)
    """Scenes by the number of test-time registers."""

    def scene_with(self, n_registers: int) -> Scene:
        """The same images with that many more tokens; made once, so that the images are hashed once."""
        if n_registers not in self.scenes:
            before = self.scene.layout
            layout = replace(before, n_test_time_registers=before.n_test_time_registers + n_registers)
            self.scenes[n_registers] = replace(self.scene, layout=layout)
        return self.scenes[n_registers]


@dataclass
class _Run:
    """In progress; `batch_size` and `stack` shrink where memory does not suffice."""

    vit: HookedViT
    images: Tensor
    labels: Tensor | None
    metrics: Sequence[Metric]
    planned: Sequence[_Planned]
    values: Float[Tensor, "condition image metric"]
    batch_size: int
    stack: int

    def __post_init__(self) -> None:
        self.watched = Watched.by(self.metrics)

    def run(self) -> None:
        """Batch after batch."""
        done = 0
        while done < len(self.images):
            part = slice(done, min(done + self.batch_size, len(self.images)))
            failed = out_of_memory_in(partial(self._batch, part))
            if failed is None:
                done = part.stop
                continue
            n = part.stop - part.start
            if n == 1:
                size = " x ".join(map(str, self.images.shape[2:]))
                raise OutOfMemoryError(
                    f"A single image of {size} pixels does not fit into memory ({failed}). Use smaller images, a model "
                    f"in half precision (vit.half()), or a device with more memory."
                )
            self.batch_size = self.stack = n // 2
        for one in self.planned if len(self.images) else ():
            one.plan.check_fired()

    def _batch(self, part: slice) -> None:
        images = self.images[part].to(self.vit.device)
        labels = None if self.labels is None else self.labels[part].to(self.vit.device)
        last = self.vit.cfg.n_layers
        starts = {one.first for one in self.planned if one.first < last}
        clean, resid = run_clean(self.vit, images, labels, self.watched, starts)
        batch = _Batch(part, clean, resid, Scene(clean.layout, images))
        for (first, _, _), alike in groupby(sorted(self.planned, key=_order), key=lambda one: one.kind):
            left = list(alike)
            if first == last:  # nothing is edited
                self._record(left, batch, clean, clean)
                continue
            for passed in [at for at in resid if at < first]:
                del resid[passed]
            self._stacked(left, batch)

    def _stacked(self, left: list[_Planned], batch: _Batch) -> None:
        """Conditions of one kind, as many at once as the stack holds."""
        n = batch.part.stop - batch.part.start
        while left:
            now = left[: max(1, self.stack // n)]
            failed = out_of_memory_in(partial(self._together, now, batch))
            if failed is None:
                left = left[len(now) :]
            elif len(now) == 1:
                raise OutOfMemoryError(failed)  # the batch itself is too large
            else:
                self.stack = len(now) // 2 * n

    def _together(self, now: list[_Planned], batch: _Batch) -> None:
        plans = [one.plan for one in now]
        first, n_registers, _ = now[0].kind
        scene, resid = batch.scene_with(n_registers), batch.resid[first]
        if first == 0:  # the sequence itself may be edited
            start = torch.cat([one.change(TOKENS, resid, scene) for one in plans])
        else:
            start = resid.repeat(len(now), 1, 1) if len(now) > 1 else resid
        clean = repeated(batch.clean, len(now))
        hooks = stacked_hooks(plans, [scene] * len(plans))
        edited = run_from(self.vit, start, first, scene.layout, self.watched, hooks, clean)
        self._record(now, batch, edited, clean)

    def _record(self, now: list[_Planned], batch: _Batch, edited: View, clean: View) -> None:
        """The numbers of some conditions; where nothing is edited, one run stands for all of them."""
        numbers = measured(self.metrics, edited, clean).unflatten(1, (-1, batch.part.stop - batch.part.start))
        self.values[[one.index for one in now], batch.part] = numbers.permute(1, 2, 0)


def _order(one: _Planned) -> tuple[int, ...]:
    return *one.kind, one.index


CPU_TOKENS = 4096
"""Tokens at once on a CPU: more make nothing faster, and their activations leave the cache."""
GPU_TOKENS = 2**17
"""Tokens at once on a GPU: more than enough to keep it busy."""
UNKNOWN = 4 * 2**30
"""Bytes taken to be free where the system does not say."""
SHARE = 0.5
"""Share of the free memory that is planned with; the rest is for metrics, fragments and other programs."""


def find_stack(vit: HookedViT, batch_size: int, size: int | tuple[int, int] | None = None) -> int:
    """How many sequences to run at once: a multiple of the batch that fits into memory and is fast.

    Args:
        vit: the model, on its device.
        batch_size: images whose clean run is made at once.
        size: of the images in pixels, (height, width) or both; default: the model's own.

    Returns:
        `stack` for `measure_edits`; `batch_size` where memory is short or the batch keeps the device busy.

    Raises:
        ConfigError: the batch size is below 1.

    Example:
        >>> import registerlens as rl
        >>> find_stack(rl.HookedViT.from_pretrained("registerlens:tiny"), 8) % 8
        0
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    height, width = (size, size) if isinstance(size, int) else size or vit.cfg.image_size
    tokens = vit.cfg.layout(height, width).n_tokens + 1
    item = vit.embed.patch.weight.element_size()
    kept = batch_size * tokens * vit.cfg.d_model * (vit.cfg.n_layers + 2) * item  # clean stream before every block
    # Counting tokens is cheap and errs on the safe side; what still does not fit is halved by `measure_edits`.
    room = SHARE * free_memory(vit.device) - kept
    most = (CPU_TOKENS if vit.device.type == "cpu" else GPU_TOKENS) // tokens
    fitting = min(most, int(room // (tokens * floats_a_token(vit.cfg) * item)), GROUP * batch_size)
    return max(1, fitting // batch_size) * batch_size


def floats_a_token(cfg: ViTConfig) -> int:
    """Numbers that a block holds at once for each token, at most: what its hidden layer is made of, edited and joined.

    Example:
        >>> floats_a_token(ViTConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=32, image_size=(8, 8), patch_size=(4, 4)))
        176
    """
    return 4 * cfg.d_mlp + 6 * cfg.d_model


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had: of the GPU, or of this machine (or of this container, where it may use less)."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    free = (_number(Path("/proc/meminfo"), "MemAvailable:") * 1024, limit - used)
    return min((amount for amount in free if not math.isnan(amount)), default=UNKNOWN)


def _number(file: Path, after: str = "") -> float:
    """The first number of a file, after a word; NaN where there is none."""
    try:
        return float(file.read_text().partition(after)[2].split()[0] if after else file.read_text())
    except (OSError, ValueError, IndexError):
        return math.nan


def out_of_memory_in(work: Callable[[], None]) -> str | None:
    """None once the work is done; the allocator's message if memory ran out, with what the work held freed again.

    Example:
        >>> out_of_memory_in(lambda: None)
        >>> out_of_memory_in(lambda: bytearray(2**62))
        'MemoryError'
    """
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
    else:
        return None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    # PyTorch's allocator on the CPU raises a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in ("DefaultCPUAllocator", "not enough memory", "out of memory"))

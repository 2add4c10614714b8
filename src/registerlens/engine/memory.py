"""How many sequences go through a model at once, and what happens when they were too many."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from registerlens.config import ViTConfig
from registerlens.engine.backends import GROUP
from registerlens.errors import ConfigError
from registerlens.model.vit import HookedViT

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

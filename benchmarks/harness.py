"""How a ratio is taken: in pairs, in alternating order, after a check that both sides compute the same."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
Task = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much a run measures: FULL is what `make bench` reports, TINY is a smoke test on small random models."""

    tiny: bool
    threads: int
    sizes: tuple[tuple[int, int], ...]
    """(pixels, batch) of the forward and trace benchmarks."""
    streamed: tuple[int, int]
    """Images of the two streams whose peak memories are compared."""
    cached_batch: int
    """Images of the run_with_cache benchmark."""


FULL = Scale(tiny=False, threads=2, sizes=((224, 16), (518, 4)), streamed=(64, 512), cached_batch=4)
TINY = Scale(tiny=True, threads=1, sizes=((28, 2), (42, 2)), streamed=(4, 8), cached_batch=2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: ours against a peer, with the target and what stands behind the numbers."""

    benchmark: str
    what: str
    peer: str
    ours: float
    """Median, in `unit`."""
    theirs: float
    """The peer's, in the same unit."""
    ratio: float
    """What the target is about; for times the median of the pairs' ratios."""
    unit: Literal["s", "MiB"] = "s"
    at_most: float | None = None
    at_least: float | None = None
    missed_because: str = ""
    """Printed where the target is missed."""
    details: dict[str, Any] = field(default_factory=dict)
    """Every single measurement, and what else a reader may want to check."""

    @property
    def target(self) -> str:
        """The target in words; empty where the row only informs."""
        if self.at_most is not None:
            return f"<= {self.at_most:.2f}"
        return f">= {self.at_least:.2f}" if self.at_least is not None else ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.at_most is not None:
            return self.ratio <= self.at_most
        return self.ratio >= self.at_least if self.at_least is not None else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self) | {"target": self.target, "reached": self.reached}


@dataclass(frozen=True)
class Times:
    """Seconds of both sides, pair by pair."""

    ours: list[float]
    theirs: list[float]

    def row(self, *, invert: bool = False, **values: Any) -> Row:
        """A row of medians; the ratio is ours / theirs, or theirs / ours with `invert`."""
        ratios = [b / a if invert else a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        return Row(
            ours=statistics.median(self.ours),
            theirs=statistics.median(self.theirs),
            ratio=statistics.median(ratios),
            details=asdict(self) | {"ratios": ratios} | values.pop("details", {}),
            **values,
        )


def in_pairs(ours: Task, theirs: Task, pairs: int, warm_up: int = 1) -> Times:
    """Time both sides in turn, the first of a pair alternating: drift and noise hit both alike."""
    for _ in range(warm_up):
        ours()
        theirs()
    times = Times([], [])
    gc.collect()
    gc.freeze()  # what stands now need not be searched for garbage before every measurement
    try:
        for pair in range(pairs):
            order = ((ours, times.ours), (theirs, times.theirs))
            for task, seconds in order if pair % 2 == 0 else reversed(order):
                seconds.append(_seconds(task))
    finally:
        gc.unfreeze()
    return times


def _seconds(task: Task) -> float:
    # As timeit does it: no garbage collector meanwhile. What the task returns is freed after the clock has stopped.
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        result = task()
        seconds = time.perf_counter() - start
        del result
    finally:
        gc.enable()
    return seconds


def check_equal(what: str, ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> float:
    """The largest difference relative to the peer's largest value, which must be within `tolerance`.

    Raises:
        RuntimeError: the two sides do not compute the same, so that comparing their times would mean nothing.
    """
    if ours.shape != theirs.shape:
        raise RuntimeError(f"{what}: shapes differ, {list(ours.shape)} and {list(theirs.shape)}.")
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"{what}: outputs differ by {difference:.1e} relative, more than {tolerance:.0e}.")
    return difference


# Memory --------------------------------------------------------------------------------------------------------------


def peak_memory(prepare: Callable[..., Task], **arguments: Any) -> dict[str, float]:
    """Peak memory of a task in a process of its own, in MiB.

    `prepare`, a function of a module under benchmarks/, is called there with JSON-ready `arguments` and returns the
    task; the task alone is measured.

    Returns:
        "before": resident when the task starts, "peak": the most while it runs, "growth": the difference.
    """
    command = [sys.executable, "-m", "benchmarks.harness", f"{prepare.__module__}:{prepare.__name__}"]
    done = subprocess.run(
        [*command, json.dumps(arguments)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def flat_memory(stream: Callable[..., Task], scale: Scale, *, benchmark: str, what: str) -> Row:
    """Whether the peak memory of the process grows with the images that `stream(tiny, n_images)` lets go by."""
    few, many = (peak_memory(stream, tiny=scale.tiny, n_images=n) for n in scale.streamed)
    return Row(
        benchmark=benchmark,
        what=f"{what}, peak memory of the process, {scale.streamed[1]} streamed images",
        peer=f"{scale.streamed[0]} streamed images",
        ours=many["peak"],
        theirs=few["peak"],
        ratio=many["peak"] / few["peak"],
        unit="MiB",
        at_most=1.05,
        missed_because="peaks vary by some 10% from run to run with how the heap happens to be filled",
        details={"few": few, "many": many},
    )


def _measure_peak(prepare: Callable[..., Task], arguments: dict[str, Any]) -> dict[str, float]:
    with torch.inference_mode():
        task = prepare(**arguments)
        gc.collect()
        forget_loading()
        before = resident("VmRSS")
        task()
        peak = resident("VmHWM")
    return {"before": before, "peak": peak, "growth": peak - before}


def forget_loading() -> None:
    """Give memory freed since loading back and let Linux forget the peak so far; elsewhere both stay."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def resident(which: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident memory now, or at most since the start or `forget_loading`, in MiB.

    Linux is asked for its own books: there ru_maxrss survives exec, so that a child of a large process would start
    with its parent's peak. Elsewhere ru_maxrss stands in for both.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(which))
        return int(line.split()[1]) / 1024
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


# Where it ran --------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Machine, threads and versions."""
    packages = ("registerlens", "torch", "transformers", "timm", "transformer-lens")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "dtype": "float32",
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":  # the process of its own in which `peak_memory` runs a task
    module, _, name = sys.argv[1].partition(":")
    torch.set_num_threads(FULL.threads)
    print(json.dumps(_measure_peak(getattr(import_module(module), name), json.loads(sys.argv[2]))))

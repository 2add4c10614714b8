"""`python -m benchmarks`: every benchmark, one table, one JSON file."""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import (
    caching,
    emergence,
    explorer,
    forward,
    kernels,
    loading,
    neurons,
    screening,
    sinks,
    sweeps,
    tracing,
)
from benchmarks.harness import FULL, ROOT, TINY, Row, Scale, environment
from registerlens.errors import RegisterLensError
from registerlens.files import write_json

_WIDTH = 140
"""Columns where the table goes to a file or a pipe."""

BENCHMARKS = {
    "loading": loading.run,
    "forward": forward.run,
    "trace": tracing.run,
    "cache": caching.run,
    "neurons": neurons.run,
    "sinks": sinks.run,
    "kernels": kernels.run,
    "screening": screening.run,
    "sweeps": sweeps.run,
    "explorer": explorer.run,
    "emergence": emergence.run,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen benchmarks; 0 also where a target is missed, 1 where one could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--pairs", type=int, default=10, help="measurements of each side (default: 10)")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for benchmarks.json")
    parser.add_argument("--tiny", action="store_true", help="small random models: checks the harness, says nothing")
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    try:
        scale = TINY if options.tiny else FULL
        measure(scale, options.pairs, options.only or list(BENCHMARKS), console, options.out / "benchmarks.json")
    except (RegisterLensError, ImportError, RuntimeError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    return 0


def measure(scale: Scale, pairs: int, names: list[str], console: Console, file: Path) -> None:
    """Measure; every row is printed and written as soon as it is there, the whole table at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(scale.threads)
    where, start, rows = environment(), time.perf_counter(), []
    try:
        for name in names:
            with torch.inference_mode(), console.status(f"{name}, {pairs} pairs"):
                for row in BENCHMARKS[name](scale, pairs):
                    rows.append(row)
                    console.print(said(row), markup=False, highlight=False, soft_wrap=True)
                    write_json(file, _report(scale, pairs, where, time.perf_counter() - start, rows))
    finally:
        torch.set_num_threads(threads)
    console.print(table(rows, f"{where['cpu']}, {where['threads']} threads, float32, medians of {pairs} pairs"))
    for row in rows:
        if row.reached is False:
            console.print(missed(row), markup=False, highlight=False)
    console.print(f"Written to {file}")


def _report(scale: Scale, pairs: int, where: dict[str, Any], seconds: float, rows: list[Row]) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tiny": scale.tiny,
        "pairs": pairs,
        "seconds": seconds,
        "environment": where,
        "rows": [row.to_dict() for row in rows],
    }


def said(row: Row) -> str:
    """A row in one line, for those who watch."""
    return f"{row.benchmark}: {row.what} / {row.peer}: {row.ratio:.2f} {row.target}"


def missed(row: Row) -> str:
    """What was reached where a target was missed, and why."""
    because = f": {row.missed_because}" if row.missed_because else ""
    ratios = row.details.get("ratios")
    spread = f" (single pairs from {min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
    return f"Missed: {row.what}, {row.peer}: {row.ratio:.2f}{spread}, not {row.target}{because}."


def table(rows: list[Row], title: str) -> Table:
    """What a reader wants to see of the rows."""
    result = Table(title=title)
    for column in ("what", "peer"):
        result.add_column(column)
    for column in ("ours", "peer's", "ratio", "target", "reached"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        digits = 3 if row.unit == "s" else 0
        reached = {True: "[green]yes", False: "[red]no", None: ""}[row.reached]
        numbers = (f"{value:.{digits}f} {row.unit}" for value in (row.ours, row.theirs))
        result.add_row(row.what, row.peer, *numbers, f"{row.ratio:.2f}", row.target, reached)
    return result


if __name__ == "__main__":
    raise SystemExit(main())

"""The harness measures what it says it measures; never how fast anything is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.__main__ as module

    return module


@pytest.fixture
def in_process(benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory tasks run here: starting six interpreters takes too long for a test."""
    from benchmarks import caching, harness, loading, neurons, tracing

    def here(prepare: Any, **arguments: Any) -> dict[str, float]:
        return {key: value + 1 for key, value in harness._measure_peak(prepare, arguments).items()}

    monkeypatch.setattr(tracing, "peak_memory", here)
    monkeypatch.setattr(caching, "peak_memory", here)
    monkeypatch.setattr(neurons, "peak_memory", here)
    monkeypatch.setattr(loading, "peak_memory", here)
    monkeypatch.setattr(harness, "peak_memory", here)  # of flat_memory


ROWS = {
    "loading": 2,
    "forward": 6,
    "trace": 4,
    "cache": 6,
    "neurons": 9,
    "sinks": 4,
    "kernels": 4,
    "screening": 5,
    "sweeps": 4,
    "explorer": 1,
    "emergence": 1,
}
"""Benchmarks, and how many rows each has at the tiny scale."""


def test_every_benchmark_is_run(benchmarks: ModuleType) -> None:
    assert list(benchmarks.BENCHMARKS) == list(ROWS)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ROWS)
def test_a_tiny_run_writes_a_complete_report(
    name: str, benchmarks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, pairs = torch.get_num_threads(), 2 if name == "forward" else 1
    assert benchmarks.main(["--tiny", "--pairs", str(pairs), "--only", name, "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    assert [path.name for path in tmp_path.iterdir()] == ["benchmarks.json"]
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report["tiny"]
    assert report["environment"]["threads"] == 1
    assert report["environment"]["versions"]["torch"]
    rows = report["rows"]
    assert [row["benchmark"] for row in rows] == [name] * ROWS[name]
    for row in rows:
        assert row["reached"] in {True, False} if row["target"] else row["reached"] is None
        if row["unit"] == "s":
            assert len(row["details"]["ours"]) == len(row["details"]["ratios"]) == pairs
            assert row["ours"] > 0 < row["theirs"]
    printed = capsys.readouterr().out
    assert all(row["peer"].split()[0] in printed for row in rows)
    assert printed.count("Missed:") == sum(row["reached"] is False for row in rows)


def test_both_caches_hold_the_same_tensors(benchmarks: ModuleType) -> None:
    from benchmarks.caching import check_same_tensors, describe, ours, theirs

    with torch.inference_mode():
        cache, bridge_cache = (side(True, "same")()[1] for side in (ours, theirs))
    check_same_tensors(cache, bridge_cache)
    sizes = [describe(each) for each in (cache, bridge_cache)]
    assert sizes[0]["storages"] <= sizes[1]["storages"]
    assert sizes[0]["MiB"] == pytest.approx(sizes[1]["MiB"], rel=0.05)


def test_different_outputs_are_never_timed(benchmarks: ModuleType) -> None:
    from benchmarks.harness import check_equal

    with pytest.raises(RuntimeError, match="differ by"):
        check_equal("x", torch.ones(3), torch.tensor([1.0, 1.0, 1.001]))
    with pytest.raises(RuntimeError, match="shapes differ"):
        check_equal("x", torch.ones(3), torch.ones(2))
    with pytest.raises(RuntimeError, match="differ by"):
        check_equal("x", torch.tensor([float("nan")]), torch.ones(1))


def test_pairs_alternate(benchmarks: ModuleType) -> None:
    from benchmarks.harness import in_pairs

    calls: list[str] = []
    times = in_pairs(lambda: calls.append("a"), lambda: calls.append("b"), pairs=3, warm_up=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(times.ours) == len(times.theirs) == 3


def test_the_ratio_is_the_median_of_pairs(benchmarks: ModuleType) -> None:
    from benchmarks.harness import Times

    times = Times([1.0, 2.0, 30.0], [2.0, 2.0, 10.0])
    assert times.row(benchmark="", what="", peer="", at_most=1.0).ratio == 1.0
    share = times.row(invert=True, benchmark="", what="", peer="", at_least=1.1)
    assert share.ratio == 1.0
    assert share.reached is False


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="runs on Linux: elsewhere the peak of loading counts too"
)
def test_peak_memory_sees_the_task_and_nothing_before_it(
    benchmarks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.harness import peak_memory

    (tmp_path / "allocating.py").write_text(
        "import torch\n"
        "def prepare(mib):\n"
        "    torch.ones(300 * 2**18)  # gone before the task starts\n"
        "    return lambda: torch.ones(mib * 2**18)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import allocating  # pyright: ignore[reportMissingImports]

    found = peak_memory(allocating.prepare, mib=100)
    assert 99 < found["growth"] < 130
    assert found["peak"] == found["before"] + found["growth"]
    with pytest.raises(RuntimeError, match="unexpected keyword"):
        peak_memory(allocating.prepare, size=1)


def test_the_matrix_products_add_up(benchmarks: ModuleType) -> None:
    from benchmarks.forward import MatmulLimit
    from benchmarks.harness import TINY
    from benchmarks.models import focus_vit, pixels

    with torch.inference_mode():
        limit = MatmulLimit(focus_vit(TINY), pixels(42, 2))
        with FlopCounterMode(display=False) as counter:
            limit()
    assert counter.get_total_flops() == limit.flop()


def test_the_verdict_has_no_false_alarm_and_finds_outliers(benchmarks: ModuleType) -> None:
    from benchmarks.verdicts import answers

    found = answers(3, images=(1, 16), patches=(196,))
    present = (found["verdict"] == "present").groupby([found["outliers"], found["family"], found["images"]]).mean()
    assert not present[False].any()
    assert present[True]["outliers at 20 x"].tolist() == [1, 1] and present[True]["outliers at 3 x", 16] > 0.5

"""Runs that are killed: nothing lost, nothing twice, and the same bits in the end."""

import os
import random
import signal
import time
from multiprocessing import forkserver

import pytest
from store_cases import bits, long_sweep, part_bits, part_files, start, sweep, victim, victim_at

from registerlens.engine.processes import _context
from registerlens.errors import StoreError
from registerlens.sweep.store import sweep_status

N_TASKS = 60


@pytest.fixture(scope="module", autouse=True)
def server():
    """The process that has imported everything, from which victims are forked."""
    _context()
    forkserver.ensure_running()


def kill(process):
    process.kill()
    process.join()
    return process.exitcode


def test_who_meets_a_stopped_run_is_told_at_once(tmp_path):
    process, pipe, _ = start(victim, tmp_path)
    until = time.monotonic() + 120
    while not part_files(tmp_path):
        assert time.monotonic() < until and not pipe.poll(), "the sweep finished before it could be stopped"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreError, match=rf"in use by process {process.pid} .*wait for it, stop it"):
            long_sweep(tmp_path)
    finally:
        kill(process)
    assert sweep_status(tmp_path).holder is None, "a stopped run that is killed leaves its store free"


@pytest.mark.slow
def test_ten_kills_in_a_row_at_random_moments(tmp_path):
    """Each run is killed when it has written a random number of parts (none, for some), and a random moment later."""
    draw, counts, seen = random.Random(0), [], {}
    while len(counts) < 10:
        process, pipe, _ = start(victim, tmp_path)
        enough, until = len(seen) + draw.randint(0, 4), time.monotonic() + 120
        while len(part_files(tmp_path)) < enough:
            assert time.monotonic() < until and not pipe.poll(), "the sweep finished before it could be killed"
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        assert kill(process) == -9, "the sweep finished before it could be killed"
        now = part_files(tmp_path)
        assert seen.items() <= now.items(), "a part was lost or made twice"
        counts.append(len(now) - len(seen))
        seen = now
    print("parts that each of ten killed runs wrote:", counts)
    assert 0 in counts and max(counts) > 2 and len(seen) < N_TASKS
    status = sweep_status(tmp_path)
    assert status.tasks_done == len(seen) and status.holder is None and not status.corrupt
    done, whole = long_sweep(tmp_path), long_sweep(tmp_path / "whole")
    now = part_files(tmp_path)
    assert seen.items() <= now.items() and len(now) == N_TASKS, "the last run made parts again"
    assert bits(done.table) == bits(whole.table)
    assert part_bits(tmp_path) == part_bits(tmp_path / "whole")
    assert not [path for path in tmp_path.rglob(".*")], "half-written files were left"


@pytest.mark.parametrize("moment", ["before fsync", "before rename", "after rename"])
def test_a_kill_within_a_write(tmp_path, moment):
    count = 7 if moment == "before fsync" else 3  # the manifest and its folder, then every part and its folder
    process, _pipe, said = start(victim_at, tmp_path, moment, count)
    assert said == "there"
    half = list((tmp_path / "parts").glob(".*"))
    assert kill(process) == -9
    there = part_files(tmp_path)
    assert (len(there), len(half)) == ((3, 0) if moment == "after rename" else (2, 1))
    sweep(tmp_path)
    assert there.items() <= part_files(tmp_path).items() and not list((tmp_path / "parts").glob(".*"))
    reference = tmp_path / "reference"
    sweep(reference)
    assert part_bits(tmp_path) == part_bits(reference)


def test_a_killed_run_leaves_no_lock_and_a_living_one_is_named(tmp_path):
    process, _pipe, _ = start(victim_at, tmp_path, "before rename", 2)
    with pytest.raises(OSError, match=f"in use by process {process.pid} on {os.uname().nodename} since 20"):
        sweep(tmp_path)
    assert sweep_status(tmp_path).holder.pid == process.pid
    kill(process)
    assert sweep_status(tmp_path).holder is None
    assert sweep(tmp_path).table.num_rows == 50

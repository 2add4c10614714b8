"""Worker processes: the same bits, deaths noticed, nothing piled up, and nobody left behind."""

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
import torch
from store_cases import METRICS, DeadlyOnce, Noting, bits, driver, neurons, part_bits, pixels, start, sweep, tiny_vit

import registerlens as rl
from registerlens.data.sources import TensorSource
from registerlens.engine import processes
from registerlens.engine.backends import LocalBackend, Task, pack
from registerlens.engine.processes import ProcessBackend, _context
from registerlens.errors import BackendError, ConfigError
from registerlens.evaluation.metrics import Metric
from registerlens.sweep.job import SweepJob


def a_job(metrics=METRICS, source=None):
    conditions = {one.key: one for one in neurons(2)}
    return SweepJob(
        models={"model": tiny_vit()},
        sources={"images": source or TensorSource(pixels(40), shard_size=2)},
        conditions=conditions,
        groups=(tuple(conditions),),
        metrics=tuple(metrics),
        batch_size=2,
        stack=8,
        threads=1,
    )


def test_the_same_bits_as_in_one_process(tmp_path):
    sweep(tmp_path / "one")
    result = sweep(tmp_path / "two", backend="processes", workers=2)
    assert part_bits(tmp_path / "two") == part_bits(tmp_path / "one")
    assert bits(result.table) == bits(sweep(None).table)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("how", "times"), [("SIGKILL", 3), slow("SIGSTOP", 1), slow("sleep", 1)])
def test_a_worker_that_dies_or_hangs_is_replaced_and_its_task_done_again(tmp_path, how, times):
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    backend = ProcessBackend(workers=2, patience=300 if how == "SIGKILL" else 10)
    sweep(tmp_path / "store", images=DeadlyOnce(deaths, times, how=how), backend=backend)
    sweep(tmp_path / "one")
    assert len(list(deaths.iterdir())) == times
    assert part_bits(tmp_path / "store") == part_bits(tmp_path / "one")


@pytest.mark.parametrize(
    ("how", "patience", "fate"),
    [("SIGKILL", 300, r"died.* with signal SIGKILL\).*memory"), slow("SIGSTOP", 8, r"hung.* work for 8 s\).*stopped")],
)
def test_a_task_that_always_ends_its_worker_is_named_and_the_rest_is_kept(tmp_path, monkeypatch, how, patience, fate):
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    monkeypatch.setattr(processes, "RETRIES", 1)
    deadly = DeadlyOnce(deaths, times=99, shard=4, how=how)
    with pytest.raises(BackendError, match=fate.replace(".*", r".* 2 times in \d+ s on the task g00000-s000004 .*", 1)):
        sweep(tmp_path / "store", images=deadly, backend=ProcessBackend(workers=1, patience=patience))
    assert sorted(part_bits(tmp_path / "store")) == [f"g00000-s00000{shard}" for shard in range(4)]
    assert not any(psutil.pid_exists(int(path.name.split("-")[0])) for path in deaths.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="runs on Linux: workers are forked from a server there")
@pytest.mark.parametrize("woken", [True, False])
def test_a_fork_server_that_is_stopped_is_woken_and_one_that_gives_no_answer_not_waited_for(monkeypatch, woken):
    _context()
    forkserver.ensure_running()
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGSTOP)
    if not woken:
        monkeypatch.setattr(processes, "STARTING", 0.3)
        monkeypatch.setattr(processes, "_wake_server", lambda: None)
    try:
        with nullcontext() if woken else pytest.raises(BackendError, match=r"within 0\.3 s: the server .* no answer"):
            ((task, _),) = ProcessBackend(workers=1, patience=300 if woken else 0.3).run(a_job(), [Task(0, 0)])
            assert task == Task(0, 0)
    finally:
        os.kill(server, signal.SIGCONT)


def test_no_more_is_done_than_the_driver_takes(tmp_path):
    results = ProcessBackend(workers=2).run(a_job(source=Noting(tmp_path)), [Task(0, shard) for shard in range(40)])
    for done, _ in enumerate(results, 1):
        time.sleep(0.03)  # a driver that is slow to write
        assert len(list(tmp_path.glob("*.shard"))) <= done + 2 * 2  # at work, and done but not taken yet
        if done == 8:
            break


def test_a_worker_stays_on_its_shard(tmp_path):
    job = a_job(source=Noting(tmp_path))
    job = replace(job, groups=tuple((key,) for key in job.conditions))
    tasks = [Task(group, shard) for group in range(4) for shard in range(6)]
    assert len(list(ProcessBackend(workers=2).run(job, tasks))) == 24
    reads = [path.read_text() for path in tmp_path.glob("*.shard")]
    assert len(reads) == 6 and sum(map(len, reads)) <= 6 + 2  # whoever is last to find work helps on another's shard


def test_each_task_once_and_in_the_tables_of_one_process():
    job, tasks = a_job(), [Task(0, shard) for shard in range(20)]
    found = {task: bits(table) for task, table in ProcessBackend(workers=2).run(job, iter(tasks))}
    assert found == {task: bits(table) for task, table in LocalBackend().run(job, tasks)}
    assert list(ProcessBackend(workers=2).run(job, [])) == []


def alive(folder):
    """The workers of a driver that are not dead, and not waiting to be buried."""
    found = []
    for path in folder.glob("*.pid"):
        try:
            state = Path(f"/proc/{path.stem}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(int(path.stem))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="runs on Linux: it looks at processes through /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_driver(tmp_path, how):
    _context()
    forkserver.ensure_running()
    process, pipe, _ = start(driver, tmp_path, forkserver._forkserver._forkserver_address)
    until = time.monotonic() + 200
    while len(alive(tmp_path)) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, how)
    process.join(100)
    assert process.exitcode == (0 if how == signal.SIGINT else -9)
    if how == signal.SIGINT:
        assert pipe.recv() == "interrupted"
    until = time.monotonic() + 60
    while alive(tmp_path):
        assert time.monotonic() < until, "workers were left behind"
        time.sleep(0.02)
    assert len(list(tmp_path.glob("*.pid"))) == 2


def _broken(edited, clean):
    raise ZeroDivisionError("of all things")


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def _unsendable(edited, clean):
    raise Unsendable(1, 2)


@pytest.mark.parametrize(("measure", "error"), [(_broken, ZeroDivisionError), (_unsendable, BackendError)])
def test_an_error_in_a_worker_is_raised_here_and_names_the_task(tmp_path, measure, error):
    job = a_job([Metric(name="broken", measure=measure)], Noting(tmp_path))
    with pytest.raises(error) as caught:
        list(ProcessBackend(workers=1).run(job, [Task(0, 0), Task(0, 1)]))
    told = str(caught.value) + "".join(caught.value.__notes__)
    assert "In task g00000-s000000, in a worker process" in told and measure.__name__ in told
    assert [path.read_text() for path in tmp_path.glob("*.shard")] == ["."], "a task that fails is not tried again"


def test_a_lambda_is_sent_or_refused(monkeypatch):
    job = a_job([Metric(name="drift", measure=lambda edited, clean: edited.output[:, 0])])
    ((_, table),) = ProcessBackend(workers=1).run(job, [Task(0, 1)])
    ((_, local),) = LocalBackend().run(job, [Task(0, 1)])
    assert bits(table) == bits(local)
    monkeypatch.setitem(__import__("sys").modules, "cloudpickle", None)
    with pytest.raises(ConfigError, match=r"top level of a module \(no lambda\)"):
        list(ProcessBackend(workers=1).run(job, [Task(0, 0)]))


def test_a_packed_model_is_the_model():
    vit = tiny_vit(3).to(torch.bfloat16)
    there = pack(vit).unpack()
    assert there.cfg == vit.cfg and there.preprocess == vit.preprocess and not there.training
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(there.parameters(), vit.parameters(), strict=True)
    )
    with vit.edit(rl.Ablate(rl.Heads([(0, 0)]))), pytest.raises(ConfigError, match=r"in force at blocks.0.attn.hook_z"):
        try:
            pack(vit)
        finally:
            vit(pixels(1).bfloat16())


def test_jobs_stay_what_they_are():
    job = a_job()
    packed = job.packed()
    assert packed.packed().models == packed.models and job.unpacked().models["model"] is job.models["model"]
    with pytest.raises(TypeError, match="unpacked"):
        packed.perform(Task(0, 0))
    with pytest.raises(ConfigError, match="at least one worker"):
        ProcessBackend(workers=0)
    assert replace(job, threads=2).threads == 2

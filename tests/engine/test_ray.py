"""A real Ray cluster of two nodes on this machine, whose workers and nodes are killed while a sweep runs."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import registerlens as rl
from registerlens.data.sources import TensorSource
from registerlens.data.synthetic import synthetic_images
from registerlens.engine.backends import LocalBackend, Task, tasks_of
from registerlens.engine.crew import Worker
from registerlens.engine.ray import RayBackend, _Launcher, _room
from registerlens.errors import BackendError, ConfigError, MissingExtraError
from registerlens.evaluation.metrics import Metric
from registerlens.sweep.conditions import Condition, group_conditions
from registerlens.sweep.job import SweepJob

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402  (after its settings)

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]  # what they share is made once

SETTINGS = {
    "worker_niceness": 0,
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 200,
    "health_check_failure_threshold": 3,
}
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a core each; afterwards not one of their processes is left."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"_system_config": SETTINGS})
    cluster.second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    session = cluster.head_node.get_session_dir_path()
    assert len(alive(session)) >= 3  # or the check below would see nothing
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        deadline = time.time() + 10
        while (left := alive(session)) and time.time() < deadline:
            time.sleep(0.1)
        assert not left


def alive(session):
    """Processes of a Ray session: those that are called with its folder, or write their logs there."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            places = [*(process.info["cmdline"] or ()), *(file.path for file in process.open_files())]
            other = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if other and any(session in place for place in places):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


@pytest.fixture(scope="module")
def vit():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


def job_of(vit, metrics, *, n_images=12, source=None, group=2):
    """Six head ablations in groups of two, on shards of two images."""
    conditions = [Condition(interventions=(rl.Ablate(rl.Heads([(layer, 0)])),)) for layer in range(6)]
    groups = group_conditions(conditions, {"model": vit}, group)
    source = source or TensorSource(synthetic_images(n_images, 3).images, shard_size=2)
    job = SweepJob(
        models={"model": vit},
        sources={"images": source},
        conditions={condition.key: condition for condition in conditions},
        groups=groups,
        metrics=tuple(metrics),
        batch_size=2,
        stack=4,
        threads=1,
    )
    return job, list(tasks_of(len(groups), dict.fromkeys(range(len(groups)), source.n_shards)))


def drift():
    def measure(edited, clean):
        return (edited.tokens - clean.tokens).flatten(1).norm(dim=-1)

    return Metric(name="drift", measure=measure)


def diary(folder: Path, seconds=0.0, nodes=1):
    """A metric that writes down where it was computed, takes its time, and waits until so many nodes are at work."""

    def measure(edited, clean):
        import ray

        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        (folder / f"{node} {os.getpid()} {time.time_ns()}").touch()
        time.sleep(seconds)
        while len({path.name.split()[0] for path in folder.iterdir()}) < nodes:
            time.sleep(0.05)
        return edited.tokens.flatten(1).amax(dim=-1)

    return Metric(name="largest", measure=measure)


def written(folder):
    """(node, process) of every entry, in order of time."""
    entries = sorted((path.name.split() for path in folder.iterdir()), key=lambda entry: int(entry[2]))
    return [(node, int(pid)) for node, pid, _ in entries]


def by_task(results):
    results = list(results)
    tables = dict(results)
    assert len(tables) == len(results), "a task was done twice"
    return tables


def assert_equal_bits(got, expected):
    assert got.keys() == expected.keys()
    for task, table in expected.items():
        assert got[task].schema.equals(table.schema, check_metadata=True)
        assert got[task].equals(table)
        for name in ("drift", "largest"):
            assert got[task][name].combine_chunks().to_numpy().tobytes() == table[name].to_numpy().tobytes()


def test_a_worker_and_a_node_are_killed_and_the_table_is_that_of_one_process(cluster, vit, tmp_path, capfd):
    (tmp_path / "there").mkdir()
    job, tasks = job_of(vit, [drift(), diary(tmp_path / "there", 0.1, nodes=2)])
    backend = RayBackend(address=cluster.address)
    results, killed, nodes = [], None, set()
    for task, table in backend.run(job, tasks):
        results.append((task, table))
        nodes |= {node for node, _ in written(tmp_path / "there")}
        if killed is None and len(nodes) == 2:  # both nodes are at work
            second = cluster.second.node_id
            killed = next(pid for node, pid in written(tmp_path / "there")[::-1] if node != second)
            os.kill(killed, signal.SIGKILL)
            at_kill = len(results)
        elif killed and len(results) == at_kill + 3:
            assert len(results) < len(tasks) - 4
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = None
    assert killed is not None
    assert cluster.second is None
    assert not ray.is_initialized()  # the connection was the backend's own
    workers = {pid for node, pid in written(tmp_path / "there") if node != second}
    assert len(workers) == 2, "the killed worker was not replaced"
    (tmp_path / "here").mkdir()
    job, _ = job_of(vit, [drift(), diary(tmp_path / "here")])
    assert_equal_bits(by_task(results), by_task(LocalBackend().run(job, tasks)))
    out, err = capfd.readouterr()
    assert err == ""
    assert "INFO" not in out  # what Ray itself says of the dead ("(raylet) ... died") cannot be turned off


class Witness(TensorSource):
    """Images that tell, in a folder, who unpickles and who reads them."""

    def __reduce__(self):
        return _witness, (self.images, self.shard_size, self.folder)

    def shard(self, index):
        (self.folder / f"read {index} {os.getpid()} {time.time_ns()}").touch()
        return super().shard(index)


def _witness(images, shard_size, folder):
    source = Witness(images, shard_size=shard_size)
    object.__setattr__(source, "folder", folder)
    (folder / f"sent {os.getpid()} {time.time_ns()}").touch()
    return source


@pytest.fixture
def connected(cluster):
    """This process, connected to what is left of the cluster."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def test_a_worker_gets_the_job_once_reads_a_shard_once_and_waits_for_the_driver(connected, cluster, vit, tmp_path):
    """One run, since a worker takes seconds to start; at its end a task fails, and the worker is stopped."""
    for name in ("images", "metric"):
        (tmp_path / name).mkdir()
    source = Witness(synthetic_images(6, 3).images, shard_size=2)
    object.__setattr__(source, "folder", tmp_path / "images")
    calm = diary(tmp_path / "metric")

    def measure(edited, clean):
        if len(list((tmp_path / "metric").iterdir())) == 8 * 2:  # the ninth and last task
            raise ConfigError("no such thing")
        return calm.measure(edited, clean)

    job, tasks = job_of(vit, [drift(), Metric(name="wrong", measure=measure)], source=source)
    done, begun, seen, session = [], [], [], cluster.head_node.get_session_dir_path()
    with pytest.raises(ConfigError, match="no such thing") as caught:
        for task, _ in RayBackend(max_in_flight=1, workers=1).run(job, tasks):
            time.sleep(0.1)  # the driver writes slowly
            done.append(task)
            begun.append(len(written(tmp_path / "metric")) // 2)
            seen = seen or alive(session)
    assert begun == list(range(1, 9)), "more was begun than may be in flight"
    assert done == sorted(tasks, key=lambda task: (task.shard, task.group))[:8]
    assert type(caught.value) is ConfigError
    assert caught.value.__notes__[-1] == "In task g00002-s000002, in a worker process."
    assert len(list((tmp_path / "images").glob("sent *"))) == 1
    assert sorted(path.name.split()[1] for path in (tmp_path / "images").glob("read *")) == ["0", "1", "2"]
    assert ray.is_initialized()  # a connection that was there stays
    (pid,) = {pid for _, pid in written(tmp_path / "metric")}
    assert pid in seen
    assert psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)[1] == []


def test_a_task_that_kills_its_worker_is_named(connected, vit, tmp_path):
    def measure(edited, clean):
        (tmp_path / f"{time.time_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    job, tasks = job_of(vit, [Metric(name="deadly", measure=measure)])
    with pytest.raises(BackendError, match=r"(?s)died 1 times in \d+ s on the task g00000-s000000 .*intact"):
        list(RayBackend(retries=0, workers=1).run(job, tasks))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def impatient(monkeypatch):
    """Workers have as long to start as ever, and 10 s for a sign of life."""
    made = _Launcher.__init__

    def make(launcher, *args):
        made(launcher, *args)
        launcher.hung_after, launcher.beat = 10, 2.5

    monkeypatch.setattr(_Launcher, "__init__", make)


def test_a_worker_that_is_stopped_is_killed_and_its_task_done_by_another(connected, impatient, vit, tmp_path):
    (tmp_path / "there").mkdir()
    calm = diary(tmp_path / "there")

    def measure(edited, clean):
        if not (tmp_path / "once").exists():
            (tmp_path / "once").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return calm.measure(edited, clean)

    job, tasks = job_of(vit, [drift(), Metric(name="largest", measure=measure)])
    results = by_task(RayBackend(workers=1).run(job, tasks))
    stopped = int((tmp_path / "once").read_text())
    workers = {pid for _, pid in written(tmp_path / "there")}
    assert len(workers) == 1 and stopped not in workers
    assert psutil.wait_procs([psutil.Process(stopped)] if psutil.pid_exists(stopped) else [], timeout=10)[1] == []
    assert_equal_bits(results, by_task(LocalBackend().run(job, tasks)))


def test_a_task_that_waits_for_ever_is_named(connected, impatient, vit):
    """It sleeps, as when a server gives no answer: Ray's own threads go on working."""

    def measure(edited, clean):
        threading.Event().wait()

    job, tasks = job_of(vit, [Metric(name="waits", measure=measure)])
    with pytest.raises(BackendError, match=r"hung 1 times in \d+ s on the task g00000-s000000 .* work for 10 s"):
        list(RayBackend(retries=0, workers=1).run(job, tasks))


class UnpackedLate:
    """A metric that waits when it is unpacked for the first time, as a module on a file system that hangs does."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__ = state
        if not (self.folder / "once").exists():
            (self.folder / "once").write_text(str(os.getpid()))
            threading.Event().wait()

    def __call__(self, edited, clean):
        return edited.output.flatten(1).norm(dim=-1)


def test_a_worker_that_waits_for_ever_while_it_starts_is_replaced(connected, impatient, vit, tmp_path):
    job, tasks = job_of(vit, [drift(), Metric(name="largest", measure=UnpackedLate(tmp_path))])
    results = by_task(RayBackend(workers=1).run(job, tasks))
    first = int((tmp_path / "once").read_text())
    assert psutil.wait_procs([psutil.Process(first)] if psutil.pid_exists(first) else [], timeout=10)[1] == []
    assert_equal_bits(results, by_task(LocalBackend().run(job, tasks)))
    (tmp_path / "once").unlink()
    with pytest.raises(BackendError, match=r"none could be started.* was lost with no sign of work for 10 s"):
        list(RayBackend(workers=1, retries=0).run(job, tasks))


class NoRay:
    """As much of Ray as losing a worker needs."""

    class exceptions:
        RayTaskError, RayError = KeyError, ValueError

    def remote(self, **options):
        return lambda actor: None

    def wait(self, refs, **options):
        return refs[:1], refs[1:]

    def get(self, ref):
        raise ValueError(ref)

    def kill(self, actor):
        pass

    def cluster_resources(self):
        return {}


def test_who_is_lost_and_why_is_told_once_there_is_nobody():
    launcher = _Launcher(NoRay(), RayBackend(num_cpus=1), None)
    starting, working = Worker(), Worker(tasks=[Task(0, 0)], ready=True)
    launcher.awaited = {"gone": (working, Task(0, 0)), "next": (working, Task(1, 0)), "no memory": (starting, None)}
    worker, task, lost = launcher.wait([working])
    assert (worker, task, lost.why) == (working, Task(0, 0), "so: gone") and "memory" in lost.advice
    launcher.stop(working)
    worker, task, lost = launcher.wait([starting])
    assert (worker, task, lost.why) == (starting, None, "so: no memory")
    with pytest.raises(BackendError, match=r"no worker and none could be started.*while it started: no memory"):
        launcher.wait([])


def test_where_there_is_no_room_or_no_cluster(connected, vit, monkeypatch):
    job, tasks = job_of(vit, [drift()])
    with pytest.raises(
        BackendError, match=r"No node has room for a worker of 1 CPUs and 1 GPUs. The cluster has .*CPU"
    ):
        list(RayBackend(num_gpus=1).run(job, tasks))
    with pytest.raises(BackendError, match=r"There was no worker for 0.3 s.*resume"):
        list(RayBackend(num_gpus=1, workers=1, patience=0.3).run(job, tasks))
    with pytest.raises(BackendError, match=r"connected to the Ray cluster at .* but '127.0.0.1:9'"):
        list(RayBackend(address="127.0.0.1:9").run(job, tasks))
    ray.shutdown()
    with pytest.raises(BackendError, match=r"There is no Ray cluster at '127.0.0.1:9': .*ray start --head"):
        list(RayBackend(address="127.0.0.1:9").run(job, tasks))
    monkeypatch.setenv("REGISTERLENS_PATIENCE", "0.3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BackendError, match=rf"There is no Ray cluster at '{address}': timed out"):
            list(RayBackend(address=address).run(job, tasks))
    assert list(RayBackend(address="127.0.0.1:9").run(job, [])) == []  # nothing to do: nobody is asked
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"run_sweep\(backend='ray'\) needs the package 'ray'"):
        list(RayBackend().run(job, tasks))


def test_room_on_a_node():
    node = {"CPU": 16.0, "GPU": 4.0, "memory": 1e9}
    assert _room(node, RayBackend(num_cpus=4, num_gpus=1)) == 4
    assert _room(node, RayBackend(num_cpus=8, num_gpus=1)) == 2
    assert _room(node, RayBackend(num_cpus=1.5)) == 10
    assert _room({"CPU": 16.0}, RayBackend(num_cpus=1, num_gpus=1)) == 0
    for wrong in ({"workers": 0}, {"max_in_flight": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            RayBackend(**wrong)

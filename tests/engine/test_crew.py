"""The loop that all workers share: who is blamed, who is replaced, and that nothing piles up."""

from collections import deque

import pyarrow as pa
import pytest

from registerlens.engine.backends import Task, TaskQueue
from registerlens.engine.crew import Crew, Lost, Started
from registerlens.errors import BackendError

TABLE = pa.table({"x": [1.0]})


class Script:
    """Workers that say what stands in a script, one line each time somebody waits."""

    def __init__(self, *lines):
        self.lines, self.started, self.stopped, self.given = deque(lines), [], [], []

    def start(self, worker):
        self.started.append(worker)

    def give(self, worker, task):
        self.given.append((self.started.index(worker), task))

    def wait(self, workers):
        at, answer = self.lines.popleft()
        worker = self.started[at]
        assert worker in workers
        return worker, worker.tasks[0] if worker.tasks else None, answer

    def stop(self, worker):
        self.stopped.append(worker)


def crew_of(script, tasks, **options):
    return Crew(script, TaskQueue(tasks, lambda task: task.shard), **{"size": 2, "limit": 4, "ahead": 2} | options)


def test_only_the_task_in_work_is_blamed_and_each_is_retried_so_often():
    gone = Lost("so: gone", "Buy memory.")
    lines = [(0, Started()), (0, gone), (0, Started()), (0, gone), (0, Started()), (0, gone)]
    script = Script(*lines)
    crew = crew_of(script, [Task(0, 0), Task(1, 0)], size=1, retries=2)
    with pytest.raises(BackendError, match=r"died 3 times in 0 s on .* g00000-s000000 .*gone.*intact. Buy memory"):
        list(crew.work())
    assert crew.losses == {Task(0, 0): 3}
    assert script.given == [(0, Task(0, 0)), (0, Task(1, 0))] * 3
    assert script.stopped[-1] is script.started[0]


def test_a_place_whose_workers_die_at_the_start_is_given_up():
    script = Script(*[(0, Lost("no memory"))] * 3, (1, Started()), (1, TABLE), (1, TABLE))
    crew = crew_of(script, [Task(0, 0), Task(1, 0)], retries=2)
    assert [task for task, _ in crew.work()] == [Task(0, 0), Task(1, 0)]
    bad, good = script.started[:2]
    assert script.started == [bad, good, bad, bad] and crew.workers == [good] and script.stopped[-1] is good


def test_a_start_that_succeeds_is_forgiven_those_that_did_not():
    script = Script((0, Lost("a")), (0, Started()), (0, Lost("b")), (0, Lost("c")), (0, Started()), (0, TABLE))
    crew = crew_of(script, [Task(0, 0)], retries=1)
    assert len(list(crew.work())) == 1 and crew.losses == {Task(0, 0): 1}


def test_no_more_is_sent_out_than_may_be_and_everybody_has_one_before_anybody_has_two():
    tasks = [Task(0, shard) for shard in range(5)]
    script = Script((0, Started()), (1, Started()), *[(0, TABLE), (1, TABLE)] * 2, (0, TABLE))
    crew = crew_of(script, tasks, limit=3)
    for done, _ in enumerate(crew.work(), 1):
        assert len(script.given) <= done - 1 + 3  # a table that the driver has not dealt with counts
    assert len(script.given) == 5
    assert [at for at, _ in script.given[:3]] == [0, 0, 1]  # the second started later


def test_an_error_names_its_task_and_ends_all():
    script = Script((0, Started()), (1, Started()), (1, ZeroDivisionError("of all things")))
    crew = crew_of(script, [Task(0, shard) for shard in range(4)], ahead=1)
    with pytest.raises(ZeroDivisionError) as caught:
        list(crew.work())
    assert caught.value.__notes__ == ["In task g00000-s000001, in a worker process."]
    assert script.stopped == script.started


def test_whoever_stops_listening_stops_the_workers():
    script = Script((0, Started()), (0, TABLE))
    results = crew_of(script, [Task(0, 0), Task(0, 1)], size=1).work()
    next(results)
    results.close()
    assert script.stopped == script.started and not script.lines

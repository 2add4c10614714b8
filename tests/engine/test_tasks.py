"""Who does what next: every task once, on images that the worker already has where that is possible."""

import random

from registerlens.engine.backends import Task, TaskQueue


def tasks(groups, shards):
    return [Task(group, shard) for group in range(groups) for shard in range(shards)]


def place(task):
    return task.shard


def test_every_task_once_though_some_come_back():
    rng = random.Random(0)
    queue = TaskQueue(tasks(5, 7), place)
    done, places, returned = [], [None] * 3, 0
    while len(queue):
        worker = rng.randrange(3)
        task = queue.take(places[worker])
        if rng.random() < 0.3:
            queue.put_back(task)
            returned += 1
        else:
            done.append(task)
            places[worker] = place(task)
    assert sorted(done) == sorted(tasks(5, 7))
    assert returned > 5
    assert queue.take(None) is None


def test_each_shard_is_read_by_one_worker_where_there_are_enough():
    queue = TaskQueue(tasks(4, 6), place)
    places, reads = [None] * 3, 0
    while len(queue):
        for worker in range(3):
            task = queue.take(places[worker])
            reads += places[worker] != place(task)
            places[worker] = place(task)
    assert reads == 6


def test_workers_without_a_shard_help_where_most_is_left():
    queue = TaskQueue([*tasks(2, 2), Task(2, 1)], place)
    assert [queue.take(at) for at in (None, None)] == [Task(0, 0), Task(0, 1)]
    assert queue.take("elsewhere") == Task(1, 1)
    assert queue.take(1) == Task(2, 1)
    assert queue.take(1) == Task(1, 0)


def test_what_comes_back_is_next():
    queue = TaskQueue(tasks(3, 1), place)
    first, second = queue.take(0), queue.take(0)
    queue.put_back(second)
    queue.put_back(first)
    assert [queue.take(0) for _ in range(3)] == tasks(3, 1)

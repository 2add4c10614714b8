"""The plan of a large sweep, by hand and against counting; and the page that shows one."""

import doctest
from dataclasses import replace
from pathlib import Path

import pytest

from registerlens.errors import ConfigError
from registerlens.sweep.scale_plan import Rates, scale_plan

RATES = Rates(
    forwards=10.0,
    share=0.5,
    decodes=20.0,
    image_bytes=1e5,
    model_bytes=1e8,
    row_bytes=20.0,
    part_seconds=0.5,
)


def test_it_is_what_counting_gives():
    """Task by task, as a runner would do them."""
    n_images, n_conditions, size, group = 23, 11, 5, 4
    plan = scale_plan(
        n_images=n_images, n_conditions=n_conditions, n_workers=3, n_nodes=2, rates=RATES, shard_size=size, group=group
    )
    shards = [range(n_images)[at : at + size] for at in range(0, n_images, size)]
    groups = [range(n_conditions)[at : at + group] for at in range(0, n_conditions, group)]
    tasks = [(g, s) for g in groups for s in shards]
    seconds = sum(len(s) / 10 + len(s) * len(g) * 0.5 / 10 for g, s in tasks)
    assert (plan.n_groups, plan.n_shards, plan.n_tasks) == (3, 5, len(tasks))
    assert plan.n_rows == sum(len(g) * len(s) for g, s in tasks)
    assert plan.part_rows == max(len(g) * len(s) for g, s in tasks)
    assert plan.compute_seconds == pytest.approx(seconds)
    assert plan.task_seconds == pytest.approx(5 / 10 + 5 * 4 * 0.5 / 10)
    assert plan.decode_seconds_again == pytest.approx(sum(len(s) for _, s in tasks) / 20)
    assert plan.decode_seconds_kept == pytest.approx(sum(map(len, shards)) / 20)
    assert plan.image_traffic_again == pytest.approx(sum(len(s) for _, s in tasks) * 1e5)
    assert plan.image_traffic_kept == pytest.approx(n_images * 1e5)
    assert plan.table_bytes == plan.n_rows * 20
    assert plan.model_traffic == 2e8
    assert plan.wall_seconds == pytest.approx((seconds + n_images / 20) / 3)
    assert plan.driver_seconds == len(tasks) * 0.5
    assert plan.seconds == max(plan.wall_seconds, plan.driver_seconds)
    assert plan.cost(3600.0) == pytest.approx(3 * plan.seconds)


def test_the_longer_of_workers_and_driver_counts():
    slow = scale_plan(n_images=10, n_conditions=2, n_workers=1, n_nodes=1, rates=replace(RATES, part_seconds=100.0))
    assert slow.seconds == slow.driver_seconds == 100
    assert scale_plan(n_images=10, n_conditions=2, n_workers=1, n_nodes=1, rates=RATES).seconds == 2.5
    assert "driver's time" in slow.describe()
    frame = slow.to_dataframe().set_index("quantity")["value"]
    assert (frame["n_rows"], frame["rates.part_seconds"]) == (20, 100)


@pytest.mark.parametrize("name", ["n_images", "n_workers", "shard_size", "group"])
def test_refusals(name):
    numbers = {"n_images": 1, "n_conditions": 1, "n_workers": 1, "n_nodes": 1, "rates": RATES}
    with pytest.raises(ConfigError, match=f"{name} must be positive, got 0"):
        scale_plan(**numbers | {name: 0})
    with pytest.raises(ConfigError, match="share must be positive"):
        scale_plan(**numbers | {"rates": replace(RATES, share=0.0)})


def test_the_page_says_what_the_code_gives():
    page = Path(__file__).parents[2] / "docs" / "scaling.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert (failed, tried > 6) == (0, True)

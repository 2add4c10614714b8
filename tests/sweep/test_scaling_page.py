"""The page that plans a large sweep: it says what its code gives, and that is what counting gives."""

import doctest
from pathlib import Path

import pytest

RATES = {
    "forwards": 10.0,
    "share": 0.5,
    "decodes": 20.0,
    "image_bytes": 1e5,
    "model_bytes": 1e8,
    "row_bytes": 20.0,
    "part_seconds": 0.5,
}


@pytest.fixture(scope="module")
def plan():
    """The page's function, after everything on the page was run."""
    page = Path(__file__).parents[2] / "docs" / "scaling.md"
    test = doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)
    failed, tried = doctest.DocTestRunner().run(test, clear_globs=False)
    assert (failed, tried > 6) == (0, True)
    return test.globs["plan"]


def test_it_is_what_counting_gives(plan):
    """Task by task, as a runner would do them."""
    images, conditions, shard, group = 23, 11, 5, 4
    it = plan(RATES, images=images, conditions=conditions, workers=3, nodes=2, shard=shard, group=group)
    shards = [range(images)[at : at + shard] for at in range(0, images, shard)]
    groups = [range(conditions)[at : at + group] for at in range(0, conditions, group)]
    tasks = [(g, s) for g in groups for s in shards]
    seconds = sum(len(s) / 10 + len(s) * len(g) * 0.5 / 10 for g, s in tasks)
    rows = sum(len(g) * len(s) for g, s in tasks)
    assert (it["groups"], it["shards"], it["tasks"], it["rows"]) == (3, 5, len(tasks), rows)
    assert it["rows of a full task"] == max(len(g) * len(s) for g, s in tasks)
    assert it["seconds of a full task"] == pytest.approx(5 / 10 + 5 * 4 * 0.5 / 10)
    assert it["worker-hours in the model"] == pytest.approx(seconds / 3600)
    assert it["worker-hours of decoding"] == pytest.approx(sum(map(len, shards)) / 20 / 3600)
    assert it["hours, by every task again"] == pytest.approx(sum(len(s) for _, s in tasks) / 20 / 3600)
    assert it["GB of images read"] == pytest.approx(images * 1e5 / 1e9)
    assert it["GB, read by every task again"] == pytest.approx(sum(len(s) for _, s in tasks) * 1e5 / 1e9)
    assert it["GB of the table"] == pytest.approx(rows * 20 / 1e9)
    assert it["GB of models sent"] == pytest.approx(0.2)
    assert it["hours of the workers"] == pytest.approx((seconds + images / 20) / 3 / 3600)
    assert it["hours of the driver"] == pytest.approx(len(tasks) * 0.5 / 3600)

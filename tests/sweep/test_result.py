"""What a sweep's table amounts to: planted numbers come back, paired, corrected and named."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from planted_sweeps import ablated, best, clean, result_of, table_of
from scipy import stats

from registerlens.data.images import Skipped
from registerlens.errors import ConfigError
from registerlens.evaluation.metrics import Metric
from registerlens.stats.intervals import mean_intervals
from registerlens.stats.permutation import holm, sign_flip_p
from registerlens.sweep.result import SweepResult

N = 20


def planted(seed=0):
    """Three neurons and three unequal controls of the first on 20 images: effects -2, 0.5, 0 and -0.6, 0.1, 0.2."""
    rng = np.random.default_rng(seed)
    strong = ablated(3, 7)
    conditions = [
        clean(),
        strong,
        ablated(3, 8),
        ablated(4, 0),
        *(ablated(3, 90 + i, control_of=strong.key, control=i) for i in range(3)),
    ]
    base = rng.normal(10, 5, N)  # images differ by far more than conditions do
    effects = np.array([0, -2, 0.5, 0, -0.6, 0.1, 0.2])[:, None]
    noise = rng.normal(0, 0.3, (7, N)) * (np.arange(7) > 0)[:, None]
    norm = base + effects + noise
    return conditions, {"norm": norm, "kl": rng.random((7, N)) * (np.arange(7) > 0)[:, None]}


@pytest.fixture(scope="module")
def result():
    conditions, values = planted()
    words = [
        Metric(name="norm", measure=lambda edited, clean: edited.tokens[:, 0, 0], words="largest patch norm"),
        "kl",
    ]
    return result_of(conditions, values, words, [Skipped("b.png", "truncated")])


def row(result, condition, metric="norm"):
    frame = result.to_dataframe()
    [found] = frame[(frame["condition"] == condition.key) & (frame["metric"] == metric)].to_dict("records")
    return found


def test_numbers_come_back_image_by_image_whatever_the_order_of_rows(result):
    conditions, values = planted()
    for c, condition in enumerate(conditions):
        assert (result.of("norm", condition) == values["norm"][c]).all()
    assert result.n_images == N and result.places["images"].names == tuple(f"image {i}" for i in range(N))
    shuffled = table_of(conditions, values).take(np.random.default_rng(0).permutation(7 * N))
    again = SweepResult.from_table(shuffled, conditions, ["norm", "kl"])
    order = [again.places["images"].names.index(f"image {i}") for i in range(N)]
    for c, condition in enumerate(conditions):
        assert (again.of("norm", condition)[order] == values["norm"][c]).all()


def test_means_differences_and_controls_against_scipy(result):
    conditions, values = planted()
    norm, strong = values["norm"], conditions[1]
    found = row(result, strong)
    assert found["label"] == "layer=3 neuron=7 mode=zero" and found["kind"] == "tested" and found["layer"] == 3
    assert found["n_images"] == N and found["n_controls"] == 3
    beside = norm[4:].mean(0)
    cases = {"mean": norm[1], "difference": norm[1] - norm[0], "vs_controls": norm[1] - beside}
    ends = {"mean": ("low", "high")} | {name: (f"{name}_low", f"{name}_high") for name in ("difference", "vs_controls")}
    for name, one in cases.items():
        assert found[name] == pytest.approx(one.mean())
        _, *expected = mean_intervals(one[None])
        assert [found[end] for end in ends[name]] == pytest.approx([end[0] for end in expected])
    assert found["p"] == 2.0 ** (1 - N) == found["p_least"]  # every difference is negative
    assert found["p_controls"] == sign_flip_p((norm[1] - beside)[None])[0] < 1e-4


def test_pairing_finds_what_unpaired_means_would_hide(result):
    conditions, values = planted()
    small = row(result, conditions[2])
    assert small["p_holm"] < 0.01 and small["difference_low"] > 0.3
    assert stats.ttest_ind(values["norm"][2], values["norm"][0]).pvalue > 0.5
    assert row(result, conditions[3])["p_holm"] > 0.05


def test_holm_counts_tested_conditions_only_and_each_metric_for_itself(result):
    frame = result.to_dataframe()
    for metric in ("norm", "kl"):
        part = frame[frame["metric"] == metric]
        tested = part[part["kind"] == "tested"]
        assert len(tested) == 3 and tested["p_holm"].to_numpy() == pytest.approx(holm(tested["p"].to_numpy()))
        assert part[part["kind"] != "tested"]["p_holm"].isna().all()
        assert part[part["kind"] == "control"]["p"].notna().all()
        assert part[part["kind"] == "clean"]["p"].isna().all()
        assert part[part["kind"] == "clean"]["difference"].tolist() == [0.0]


def test_the_frame_is_one_row_a_condition_and_metric_in_order(result):
    frame = result.to_dataframe()
    conditions, _ = planted()
    assert frame["condition"].tolist() == [one.key for one in conditions for _ in range(2)]
    assert frame["metric"].tolist() == ["norm", "kl"] * 7
    assert {"layer", "neuron", "mode", "control"} <= set(frame.columns)
    assert frame.equals(result.to_dataframe())
    frame.loc[0, "mean"] = 1e9  # a copy
    assert result.to_dataframe().loc[0, "mean"] != 1e9
    assert result.to_dataframe(seed=1).equals(result.to_dataframe())  # 20 images: every pattern of signs counts


def test_nan_leaves_its_image_out_of_every_number_it_touches():
    conditions, values = planted()
    norm = values["norm"].copy()
    norm[1, 3] = np.nan  # the condition
    norm[0, 5] = np.nan  # the clean run
    norm[4, 6] = np.nan  # a control
    norm[3] = np.nan  # a condition altogether
    found = result_of(conditions, {"norm": norm})
    strong = row(found, conditions[1])
    pairs = np.setdiff1d(np.arange(N), [3, 5])
    against = np.setdiff1d(np.arange(N), [3, 6])
    assert strong["n_images"] == N - 1
    assert strong["difference"] == pytest.approx((norm[1] - norm[0])[pairs].mean())
    assert strong["p_least"] == 2.0 ** (1 - 18)
    assert strong["vs_controls"] == pytest.approx((norm[1] - norm[4:].mean(0))[against].mean())
    nothing = row(found, conditions[3])
    assert nothing["n_images"] == 0 and np.isnan([nothing["mean"], nothing["difference"], nothing["p"]]).all()
    assert row(found, conditions[2])["p_holm"] == pytest.approx(
        2 * row(found, conditions[2])["p"], rel=1
    )  # of 2, not 3


def test_a_sweep_that_is_not_finished_counts_the_images_there_are():
    conditions, values = planted()
    table = table_of(conditions, values)
    missing = pa.array([i % 8 != 2 for i in range(table.num_rows)])
    found = SweepResult.from_table(table.filter(missing), conditions, ["norm"])
    for c, condition in enumerate(conditions):
        there = [
            i
            for i in range(N)
            if np.isfinite(found.of("norm", condition)[found.places["images"].names.index(f"image {i}")])
        ]
        assert row(found, condition)["n_images"] == len(there) < N
        assert row(found, condition)["mean"] == pytest.approx(values["norm"][c][there].mean())
    none = SweepResult.from_table(table.slice(0, 0), conditions, ["norm"])
    assert none.to_dataframe()["n_images"].tolist() == [0] * 7 and none.n_images == 0


def test_each_model_and_image_set_has_its_own_clean_run():
    sets = {(m, s): (clean(model=m, images=s), ablated(1, 2, model=m, images=s)) for m in "ab" for s in ("x", "y")}
    conditions = [one for pair in sets.values() for one in pair]
    tables = []
    for number, ((_, images), pair) in enumerate(sets.items()):
        n = 4 if images == "x" else 6
        base = np.full(n, 10.0 * number)
        tables.append(table_of(pair, {"norm": [base, base + number + 1]}, names=[f"{images}{i}" for i in range(n)]))
    found = SweepResult.from_table(pa.concat_tables(tables), conditions, ["norm"])
    frame = found.to_dataframe()
    tested = frame[frame["kind"] == "tested"]
    assert tested["difference"].tolist() == [1.0, 2.0, 3.0, 4.0] and tested["n_images"].tolist() == [4, 6, 4, 6]
    assert tested["model"].tolist() == ["a", "a", "b", "b"] and found.n_images == 10
    across = found.compare(sets["a", "x"][1], sets["b", "x"][1], "norm")
    assert across.difference == pytest.approx(1.0 - 23.0) and across.n_images == 4
    with pytest.raises(ConfigError, match="no image in common"):
        found.compare(sets["a", "x"][1], sets["a", "y"][1], "norm")
    with pytest.raises(ConfigError, match="4 conditions are called 'clean'; give a key"):
        found.of("norm", "clean")


def test_without_a_clean_run_means_stand_and_differences_do_not():
    found = result_of([best(1), best(2)], {"norm": [[1.0, 2.0], [3.0, 4.0]]})
    assert found.to_dataframe()["mean"].tolist() == [1.5, 3.5] and found.to_dataframe()["difference"].isna().all()
    with pytest.raises(ConfigError, match="no clean condition"):
        found.top("norm")
    assert found.top("norm", by="mean")["k"].tolist() == [2, 1]


def test_top_orders_by_size_and_p_values_by_smallness(result):
    conditions, _ = planted()
    assert result.top("norm", 2)["condition"].tolist() == [conditions[1].key, conditions[2].key]
    assert result.top("norm", by="p")["condition"].tolist() == [one.key for one in conditions[1:4]]
    assert result.top("norm", by="vs_controls")["condition"].tolist() == [conditions[1].key]
    with pytest.raises(ConfigError, match="Did you mean 'difference'"):
        result.top("norm", by="diference")
    with pytest.raises(ConfigError, match=r"No metric 'nrm'.*Did you mean 'norm'"):
        result.top("nrm")


def test_compare_is_paired_and_takes_label_key_or_condition(result):
    conditions, values = planted()
    a, b = conditions[1], conditions[2]
    found = result.compare(a, b, "norm")
    d = values["norm"][1] - values["norm"][2]
    assert found.difference == pytest.approx(d.mean()) == found.mean_a - found.mean_b
    assert found.differences == pytest.approx(d) and found.p == 2.0 ** (1 - N)
    assert found.low < found.difference < found.high
    same = [result.compare(x, y, "norm").p for x, y in ((a.key, b.label), (a.label, b.key))]
    assert same == [found.p] * 2
    assert "20 images" in found.describe() and "layer=3 neuron=7" in found.describe()
    assert found.to_dataframe()["difference"].tolist() == found.differences.tolist()
    assert result.compare(b, a, "norm").difference == pytest.approx(-found.difference)
    with pytest.raises(
        ConfigError, match=r"No condition 'layer=3 neuron=77 mode=zero'.*Did you mean 'layer=3 neuron=7"
    ):
        result.of("norm", "layer=3 neuron=77 mode=zero")


def test_select_keeps_clean_runs_and_controls(result):
    conditions, _ = planted()
    part = result.select(layer=3, neuron=[7, 100])
    assert [one.key for one in part.conditions] == [conditions[i].key for i in (0, 1, 4, 5, 6)]
    assert row(part, conditions[1])["vs_controls"] == row(result, conditions[1])["vs_controls"]
    assert row(part, conditions[1])["p_holm"] == row(part, conditions[1])["p"]  # one test now
    with pytest.raises(ConfigError, match="No tested condition"):
        result.select(layer=99)


def test_raw_numbers_with_labels(result):
    frame = result.images()
    conditions, values = planted()
    one = frame[(frame["label"] == conditions[2].label) & (frame["image"] == "image 13")]
    assert one["norm"].tolist() == [values["norm"][2, 13]] and one["condition"].tolist() == [conditions[2].key]
    assert len(frame) == 7 * N and one["model"].tolist() == ["model"]


def test_factors_called_like_other_columns_are_renamed():
    conditions = [clean(), ablated(1, 2, mean=3, p="x", n=4), ablated(1, 2, mean=4, p="y", n=4)]
    frame = result_of(conditions, {"norm": np.ones((3, 2))}).to_dataframe()
    assert frame["factor_mean"].dropna().tolist() == [3, 4] and frame["factor_p"].dropna().tolist() == ["x", "y"]
    assert frame["n"].dropna().tolist() == [4, 4] and frame["mean"].tolist() == [1.0] * 3


def test_save_and_load(result, tmp_path):
    again = SweepResult.load(result.save(tmp_path))
    assert again.conditions == result.conditions and again.metrics == result.metrics == {
        "norm": "largest patch norm",
        "kl": "",
    }
    assert again.skipped == result.skipped
    pd.testing.assert_frame_equal(again.to_dataframe(), result.to_dataframe())
    assert pd.read_parquet(tmp_path / "table.parquet").shape == (7 * N, 5)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="valid JSON"):
        SweepResult.load(tmp_path)
    (result.save(tmp_path / "again") / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"table\.parquet"):
        SweepResult.load(tmp_path / "again")


def test_a_wrong_table_is_refused():
    conditions, values = planted()
    table = table_of(conditions, values)
    with pytest.raises(ConfigError, match=r"lacks the columns \['cosine'\]"):
        SweepResult.from_table(table, conditions, ["norm", "cosine"])
    with pytest.raises(ConfigError, match="not in the list of conditions"):
        SweepResult.from_table(table, conditions[1:], ["norm"])
    with pytest.raises(ConfigError, match="two rows of one condition and image"):
        SweepResult.from_table(pa.concat_tables([table, table.slice(5, 1)]), conditions, ["norm"])

"""The figures of a sweep show the numbers of its table."""

import numpy as np
import pyarrow as pa
import pytest
from planted_sweeps import ablated, best, clean, head, result_of

from registerlens.errors import ConfigError
from registerlens.sweep.aggregate import Swept
from registerlens.sweep.result import SweepResult
from registerlens.viz.sweep import drawable, sweep_figure

N = 24


def noisy(effects, seed=0):
    """Values of a clean run and of conditions with these effects, image by image."""
    rng = np.random.default_rng(seed)
    base = rng.normal(10, 3, N)
    return np.stack([base, *(base + effect + rng.normal(0, 0.5, N) for effect in effects)])


@pytest.fixture(scope="module")
def layers():
    conditions = [clean(), *(ablated(layer, 0, mode) for mode in ("zero", "mean") for layer in range(6))]
    for one in conditions[1:]:
        del one.factors["neuron"]
    return result_of(conditions, {"norm": noisy([-layer for layer in range(6)] * 2), "kl": noisy([1.0] * 12, 1)})


@pytest.fixture(scope="module")
def dose():
    ks = (1, 2, 5, 10, 20)
    tested = [best(k) for k in ks]
    controls = [
        best(k, control=f"random {i}", control_of=one.key) for k, one in zip(ks, tested, strict=True) for i in range(3)
    ]
    return result_of([clean(), *tested, *controls], {"norm": noisy([-np.log(k) for k in ks] + [0.2] * 15)})


@pytest.fixture(scope="module")
def heads():
    effects = np.zeros((4, 6))
    effects[2, 3], effects[1, 0] = -4.0, 2.0
    conditions = [clean(), *(head(layer, h) for layer in range(4) for h in range(6))]
    return result_of(conditions, {"norm": noisy(effects.ravel())})


@pytest.fixture(scope="module")
def neurons():
    effects = np.zeros(200)
    effects[[17, 150]] = -5.0, 3.0
    conditions = [clean(), *(ablated(i // 100, i % 100) for i in range(200))]
    return result_of(conditions, {"norm": noisy(effects)})


def rows(result, metric="norm"):
    frame = result.to_dataframe()
    return frame[(frame["metric"] == metric) & (frame["kind"] == "tested")]


def trace(figure, name):
    [found] = [one for one in figure.data if one.name == name]
    return found


def test_the_effect_per_layer_is_the_table_with_its_intervals(layers):
    figure = layers.plot()
    table = rows(layers)
    for mode in ("zero", "mean"):
        curve, part = trace(figure, f"mode={mode}"), table[table["mode"] == mode]
        assert curve.x.tolist() == list(range(6)) and curve.y == pytest.approx(part["difference"].to_numpy())
        assert curve.y + curve.error_y.array == pytest.approx(part["difference_high"].to_numpy())
        assert curve.y - curve.error_y.arrayminus == pytest.approx(part["difference_low"].to_numpy())
    assert figure.layout.yaxis.title.text == "norm: difference to the clean run"
    assert trace(layers.plot(by="mean"), "mode=zero").y == pytest.approx(
        table[table["mode"] == "zero"]["mean"].to_numpy()
    )
    assert "kl" in layers.plot("layers", "kl").layout.title.text and f"{N} images" in figure.layout.title.text
    assert trace(figure, "mode=zero").marker.symbol != trace(figure, "mode=mean").marker.symbol  # not by colour alone


def test_many_conditions_in_a_layer_are_points_and_their_mean(neurons):
    figure = neurons.plot("layers")
    points, means = figure.data
    table = rows(neurons)
    assert sorted(points.y) == pytest.approx(sorted(table["difference"]), rel=1e-5)
    assert means.y == pytest.approx(table.groupby("layer")["difference"].mean().to_numpy())


def test_the_dose_response_has_every_control_beside_it(dose):
    figure = dose.plot()
    tested, means, marks = figure.data
    table, frame = rows(dose), dose.to_dataframe()
    assert tested.x.tolist() == [1, 2, 5, 10, 20] and tested.y == pytest.approx(table["difference"].to_numpy())
    controls = frame[frame["kind"] == "control"]
    assert sorted(marks.y) == pytest.approx(sorted(controls["difference"])) and len(marks.x) == 15
    by_k = [controls[controls["control_of"] == key]["difference"].mean() for key in table["condition"]]
    assert means.y == pytest.approx(by_k) and means.x.tolist() == [1, 2, 5, 10, 20]
    assert figure.layout.xaxis.type == "log" and list(figure.layout.xaxis.ticktext) == ["1", "2", "5", "10", "20"]
    assert len(dose.plot(by="vs_controls").data) == 1


def test_the_map_of_heads_is_the_table_with_dots_where_holm_is_passed(heads):
    figure = heads.plot()
    shown, dots = figure.data
    table = rows(heads).set_index(["layer", "head"])
    for (layer, number), row in table.iterrows():
        assert shown.z[layer, number] == pytest.approx(row["difference"])
    sure = set(table.index[table["p_holm"] < 0.05])
    assert set(zip(dots.y, dots.x, strict=True)) == sure and {(2, 3), (1, 0)} <= sure
    axis = figure.layout.coloraxis
    assert axis.cmax == -axis.cmin == pytest.approx(table["difference"].abs().max())  # zero is white


def test_the_volcano_colours_what_passes_holm_and_names_the_top(neurons):
    figure = neurons.plot()
    table = rows(neurons)
    lower, higher = (trace(figure, f"{name}, Holm p < 0.05") for name in ("lower", "higher"))
    sure = table[table["p_holm"] < 0.05]
    assert (len(lower.x), len(higher.x)) == ((sure["difference"] < 0).sum(), (sure["difference"] > 0).sum())
    assert [0, 17] in lower.customdata.tolist() and [1, 50] in higher.customdata.tolist()
    every = sorted(y for one in figure.data[:3] for y in one.y)
    assert every == pytest.approx(sorted(-np.log10(table["p"])), rel=1e-5)
    assert {"0.17", "1.50"} <= set(figure.data[3].text)
    assert f"{len(sure)} of 200 neurons" in figure.layout.title.text


def test_a_volcano_says_when_too_few_images_make_significance_impossible():
    conditions = [clean(), *(ablated(0, i) for i in range(50))]
    few = result_of(conditions, {"norm": noisy([-5.0] * 50)[:, :6]})
    assert "none can: 6 images give no p below 0.031" in few.plot("volcano").layout.title.text


def test_panels_for_modes_and_a_limit_that_says_what_to_do():
    conditions = [clean(), *(ablated(0, i, mode) for mode in ("zero", "mean") for i in range(5))]
    two = result_of(conditions, {"norm": noisy([0.0] * 10)})
    assert [note.text for note in two.plot("volcano").layout.annotations][:2] == ["mode=zero", "mode=mean"]
    conditions = [clean(), *(ablated(0, i, f"m{m}") for m in range(6) for i in range(2))]
    many = result_of(conditions, {"norm": noisy([0.0] * 12)})
    with pytest.raises(ConfigError, match=r"6 series, at most 4.*result.select"):
        many.plot("volcano")
    assert len(many.select(mode=["m0", "m1"]).plot("volcano").layout.annotations) == 2


def test_the_kind_follows_from_the_factors(layers, dose, heads, neurons):
    assert [drawable(one, "norm")[0] for one in (neurons, heads, dose, layers)] == [
        "volcano",
        "heads",
        "dose",
        "layers",
    ]
    with pytest.raises(
        ConfigError, match=r"'heads' needs the factor 'head'.*have \['layer', 'mode'\].*\['layers'\] can"
    ):
        layers.plot("heads")
    with pytest.raises(ConfigError, match="'dose' needs the factor 'k' or 'scale'"):
        heads.plot("dose")
    with pytest.raises(ConfigError, match=r"No kind of figure 'vulcano'. Did you mean 'volcano'"):
        neurons.plot("vulcano")
    with pytest.raises(ConfigError, match="No metric 'nrm'"):
        neurons.plot(metric="nrm")
    with pytest.raises(ConfigError, match="no tested condition has the difference to random controls"):
        neurons.plot(by="vs_controls")
    with pytest.raises(ConfigError, match="by='difference'"):
        neurons.plot("volcano", by="mean")


def test_every_figure_is_for_dark_pages_too(neurons, heads):
    for result in (neurons, heads):
        dark = sweep_figure(result, mode="dark")
        assert dark.layout.paper_bgcolor == "#15181c"


def test_18432_neurons_take_less_than_two_megabytes():
    where = {"model": "model", "images": "images", "control_of": ""}
    swept = [Swept(key="c", label="clean", factors={}, edited=False, **where)]
    for i in range(18_432):
        factors = {"layer": i // 1536, "neuron": i % 1536}
        swept.append(Swept(key=str(i), label=f"neuron {i}", factors=factors, edited=True, **where))
    keys, names = [one.key for one in swept], ["a", "b", "c"]
    values = np.random.default_rng(0).normal(size=len(keys) * 3)
    columns = {"condition": np.repeat(keys, 3), "shard": np.zeros(len(values), np.int32), "image": names * len(keys)}
    result = SweepResult.from_table(pa.table({**columns, "norm": values}), swept, ["norm"])
    figure = result.plot("volcano")
    size = len(figure.to_json())
    assert size < 2_000_000, size
    assert sum(len(one.x) for one in figure.data[:3]) == 18_432
    assert all(one.type == "scattergl" for one in figure.data[:3])


def test_conditions_of_several_grids_do_not_get_into_each_others_figures():
    conditions = [
        clean(),
        *(head(layer, h) for layer in range(3) for h in range(2)),
        *(ablated(layer, n) for layer in range(3) for n in range(4)),
        *(best(k) for k in (1, 2, 4)),
    ]
    mixed = result_of(conditions, {"norm": noisy([float(i) for i in range(21)])})
    assert drawable(mixed, "norm") == ["volcano", "heads", "dose", "layers"]
    table = rows(mixed)
    assert sum(len(one.x) for one in mixed.plot("volcano").data[:3]) == 12
    assert np.isfinite(mixed.plot("heads").data[0].z.astype(float)).sum() == 6
    assert mixed.plot("dose").data[0].y == pytest.approx(table[table["k"].notna()]["difference"].to_numpy())
    figure = mixed.plot("layers")
    heads = table[table["head"].notna()]
    assert trace(figure, "of=heads, mean").y == pytest.approx(heads.groupby("layer")["difference"].mean().to_numpy())
    assert len(trace(figure, "mode=zero of=neurons, each").x) == 12


def test_a_comparison_shows_every_difference_in_order_and_the_interval_of_the_mean():
    found = result_of([clean(), ablated(1, 3)], {"norm": noisy([-1.0])})
    comparison = found.compare(*found.conditions, "norm")
    figure = comparison.plot()
    points, band = figure.data[0], figure.layout.shapes[1]
    assert list(points.y) == sorted(comparison.differences) and len(points.y) == N
    assert [comparison.names[i] for i in np.argsort(comparison.differences)] == list(points.text)
    assert (band.y0, band.y1) == (comparison.low, comparison.high) and band.y0 < band.y1
    few = result_of([clean(), ablated(1, 3)], {"norm": noisy([-1.0])[:, :4]})
    assert len(few.compare(*few.conditions, "norm").plot().layout.shapes) == 1

"""Values for axes: complete, matched in what they must match, and bad input named."""

from inspect import unwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_vits import build, neurons

import registerlens as rl
from registerlens.errors import ConfigError, InterventionError
from registerlens.sweep import axes
from registerlens.sweep.axes import Level, levels

VIT = build()


def pairs_of(axis):
    return [level.value.pairs for level in axis.values()]


def test_every_place_once_and_in_order():
    assert pairs_of(axes.every_neuron(VIT, [3, 1])) == [((layer, n),) for layer in (3, 1) for n in range(20)]
    assert pairs_of(axes.every_head(VIT)) == [((layer, head),) for layer in range(4) for head in range(3)]
    for axis, names in ((axes.every_neuron(VIT), ("layer", "neuron")), (axes.every_head(VIT), ("layer", "head"))):
        assert all(tuple(one.factors[name] for name in names) == one.value.pairs[0] for one in axis.values())
    tokens = axes.every_token(VIT, patches={"corners": [0, 3]})
    assert [(one.value.layer, one.value.which) for one in tokens.values()] == [
        (layer, which) for layer in range(4) for which in ("cls", "trained_registers", (0, 3))
    ]
    assert tokens["2 corners"].factors == {"layer": 2, "tokens": "corners"}


def test_tokens_that_a_model_lacks_are_left_out():
    plain = build(class_token=False, pooling=("mean",), n_trained_registers=0)
    assert list(axes.every_token(plain, [1], {"all": range(12)})) == ["1 all"]
    with pytest.raises(ConfigError, match=r"no \[CLS\] and no trained registers; give sets of patches"):
        axes.every_token(plain)


@pytest.mark.parametrize("axis", [axes.every_neuron, axes.every_head, axes.every_token])
def test_layers_must_exist(axis):
    with pytest.raises(ConfigError, match=r"Layers \[4, -1\] do not exist: the model has blocks 0 to 3"):
        axis(VIT, [0, 4, -1])
    with pytest.raises(ConfigError, match="No layer was given"):
        axis(VIT, [])


RANKING = neurons((2, 7), (1, 3), (2, 0), (1, 19))


def test_the_top_of_a_ranking():
    top = axes.top_k(RANKING, [4, 1, 2])
    assert {k: level.value.pairs for k, level in top.items()} == {k: RANKING.pairs[:k] for k in (4, 1, 2)}
    assert [level.factors for level in top.values()] == [{"k": 4}, {"k": 1}, {"k": 2}]
    assert pairs_of(axes.cumulative(RANKING)) == [RANKING.pairs[:k] for k in (1, 2, 3, 4)]
    for wrong in ([0, 1], [5], [-1]):
        with pytest.raises(ConfigError, match=r"k must be from 1 to 4, the length of the ranking \(given\)"):
            axes.top_k(RANKING, wrong)
    with pytest.raises(ConfigError, match="No k was given"):
        axes.top_k(RANKING, [])
    for empty in (lambda: axes.top_k(neurons(), [1]), lambda: axes.cumulative(neurons())):
        with pytest.raises(ConfigError, match="has no neurons"):
            empty()


@given(
    pairs=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 19)), min_size=1, max_size=12),
    n=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_random_sets_match_in_number_and_layer_and_never_hold_the_neurons(pairs, n, seed):
    chosen = neurons(*sorted(pairs))
    activity = {layer: torch.rand(20, generator=torch.Generator().manual_seed(layer)) for layer in range(4)}
    counts = {layer: len(listed) for layer, listed in chosen.by_layer().items()}
    if max(counts.values()) > 10:
        with pytest.raises(InterventionError, match="too few others"):
            axes.random_sets(chosen, n, 20, seed)
        return
    for draw in (
        lambda n: axes.random_sets(chosen, n, 20, seed),
        lambda n: axes.matched_sets(chosen, n, activity, seed),
    ):
        sets = draw(n)
        assert len(sets) == n and len({frozenset(one.pairs) for one in sets.values()}) >= min(n, 2)
        for one in sets.values():
            assert {layer: len(listed) for layer, listed in one.by_layer().items()} == counts
            assert not set(one.pairs) & pairs
        assert list(draw(n + 1).items())[:n] == list(sets.items())


def test_random_sets_differ_from_each_other_and_by_seed():
    sets = axes.random_sets(neurons((1, 3)), 19, 20, 0)  # there are 19 others: all of them are drawn
    assert len({one.pairs for one in sets.values()}) >= 16
    assert axes.random_sets(RANKING, 1, 20, 0) != axes.random_sets(RANKING, 1, 20, 1)


def test_matched_sets_are_the_nearest():
    activity = {1: torch.cat([torch.arange(20.0, 30.0), torch.arange(0.0, 40.0)])}
    sets = axes.matched_sets(neurons((1, 0)), 10, activity)
    allowed = activity[1].sub(20).abs().argsort(stable=True)[1:11].tolist()
    drawn = {one.pairs[0][1] for one in sets.values()}
    assert drawn <= set(allowed) and len(drawn) > 5
    with pytest.raises(ConfigError, match=r"activity of layers \[2\] is missing"):
        axes.matched_sets(neurons((1, 0), (2, 0)), 1, activity)


def test_sets_need_a_number_and_neurons():
    with pytest.raises(ConfigError, match="At least one random set is needed, got n=0"):
        axes.random_sets(RANKING, 0, 20)
    with pytest.raises(ConfigError, match="no neurons"):
        axes.random_sets(neurons(), 1, 20)


def test_doses():
    assert axes.scales(-1, 1, 3) == [-1.0, 0.0, 1.0] and axes.scales(0, 2, 2) == [0.0, 2.0]
    for low, high, n in ((0, 1, 1), (1, 1, 3), (0, float("inf"), 3)):
        with pytest.raises(ConfigError, match="scales needs low < high"):
            axes.scales(low, high, n)
    assert axes.register_counts(1) == [0, 1] and axes.register_counts(5) == [0, 1, 2, 4, 5]
    with pytest.raises(ConfigError, match="at least one register"):
        axes.register_counts(0)
    with pytest.raises(ConfigError, match=r"no mode 'meen'\. Did you mean 'mean'"):
        axes.modes("zero", "meen")


def test_labels():
    numbers = levels("x", np.arange(2) / 2)
    assert [(one.value, one.factors) for one in numbers] == [(0.0, {"x": 0.0}), (0.5, {"x": 0.5})]
    assert all(type(one.value) is float and type(one.factors["x"]) is float for one in numbers)
    assert [one.factors["x"] for one in levels("x", ["a", None, True, 3])] == ["a", None, True, 3]
    assert levels("x", {np.int64(3): "three"}) == [Level("three", {"x": 3})]
    many = rl.RegisterNeurons.published("dinov2_vitl14")
    assert "45 neurons (Jiang" in str(levels("x", [many])[0].factors["x"])
    given_levels = [Level(1, {"a": 1}), Level(2, {"a": 2})]
    assert levels("x", given_levels) == given_levels
    assert levels("x", {"one": given_levels[0], "plain": 5})[1].factors == {"x": "plain"}


def test_bad_axes_are_named():
    raw = unwrap(levels)
    for wrong in ("zero", RANKING, 3, {1, 2}):
        with pytest.raises(ConfigError, match=rf"axis 'x' must be a list or a mapping .*, got {type(wrong).__name__}"):
            raw("x", wrong)
    for empty in ([], {}, range(0)):
        with pytest.raises(ConfigError, match="axis 'x' has no values"):
            levels("x", empty)
    with pytest.raises(ConfigError, match=r"has a object, which has no name of its own\. Give a mapping"):
        levels("x", [object()])
    with pytest.raises(ConfigError, match=r"must be finite, got nan"):
        levels("x", {float("nan"): 1})
    with pytest.raises(ConfigError, match=r"must be a string or a number, got tuple"):
        levels("x", {(1, 2): 1})
    patches = [rl.Tokens(1, [0, 1]), rl.Tokens(1, [2, 3])]
    with pytest.raises(ConfigError, match=r"Two different values of the axis 'x' are both called .*1 2 patches"):
        levels("x", patches)
    assert [one.factors["x"] for one in levels("x", {"left": patches[0], "right": patches[1]})] == ["left", "right"]

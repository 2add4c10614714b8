"""Conditions: every combination once and in order, hashes that stay, contradictions and misfits named at once."""

import hashlib
import itertools
from dataclasses import replace
from inspect import unwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_vits import ablate_head, build, neurons

import registerlens as rl
from registerlens.errors import ConfigError, InterventionError
from registerlens.interventions.ablation import Scale
from registerlens.sweep.axes import every_head, top_k
from registerlens.sweep.conditions import Condition
from registerlens.sweep.grid import Conditions, grid, product

VIT = build()
RANKING = neurons((2, 7), (1, 3), (2, 0), (1, 19))
HEADS = grid(ablate_head, layer=[0, 2], head=[1, 0])


def heads(name, layer, n=3):
    return grid(lambda **axis: ablate_head(layer, axis[name]), **{name: range(n)})


def test_every_combination_the_last_axis_fastest():
    assert HEADS.labels == ("layer=0 head=1", "layer=0 head=0", "layer=2 head=1", "layer=2 head=0")
    assert [one.interventions[0].target.pairs for one in HEADS] == [((0, 1),), ((0, 0),), ((2, 1),), ((2, 0),)]
    assert [one.factors for one in HEADS][1] == {"layer": 0, "head": 0}


def test_levels_bring_their_own_factors():
    made = grid(Scale, target=every_head(VIT, [1]), factor={"half": 0.5, "twice": 2.0})
    assert made.labels[:2] == ("layer=1 head=0 factor=half", "layer=1 head=0 factor=twice") and len(made) == 6
    assert made[1].interventions == (Scale(rl.Heads([(1, 0)]), 2.0),)
    swept = grid(rl.TestTimeRegisters, neurons=top_k(RANKING, [1, 3]), n=[0, 2])
    assert swept.labels == ("k=1 n=0", "k=1 n=2", "k=3 n=0", "k=3 n=2")
    assert [one.n_registers for one in swept] == [0, 2, 0, 2]
    assert [one.first_layer(VIT) for one in swept] == [4, 0, 4, 0]


def test_a_function_may_make_several_edits_or_none():
    made = grid(lambda n: (ablate_head(1, 0),) * n, n=[0, 1, 2])
    assert [len(one.interventions) for one in made] == [0, 1, 2]
    assert made.labels == ("clean", "n=1", "n=2")


# The keys are what a store is resumed by: they must be the same on every machine, in every run and every version.
PINNED = {
    "clean": (Condition(), "3e93d4045ef033ea"),
    "head": (Condition(interventions=(ablate_head(2, 0),), factors={"layer": 2, "head": 0}), "0c9f2390488467e5"),
    "scale": (
        Condition(interventions=(Scale(neurons((1, 3), (2, 0)), 0.5),), model="S", images="val"),
        "7f5788ec8b731684",
    ),
    "planned": (grid(rl.Ablate, target={"cls": rl.Tokens(1, "cls")}, mode=["mean"])[0], "1149904a5ec842a1"),
    "registers": (grid(rl.TestTimeRegisters, neurons={"a": RANKING}, n=[2])[0], "10fc5893e96e70b7"),
}


@pytest.mark.parametrize("name", PINNED)
def test_keys_are_pinned(name):
    condition, key = PINNED[name]
    assert condition.key == key


def test_a_key_is_a_hash_of_what_can_be_written_down():
    scale = '{"factor":0.5,"target":{"pairs":[[1,3],[2,0]],"type":"RegisterNeurons"},"type":"Scale"}'
    mean = '{"mode":"mean","seed":0,"target":{"layer":1,"type":"Tokens","which":"cls"},"type":"PlannedAblation"}'
    written = {
        "clean": '[[],{},"model","images",""]',
        "scale": f'[[{scale}],{{}},"S","val",""]',
        "planned": f'[[{mean}],{{"mode":"mean","target":"cls"}},"model","images",""]',
    }
    for name, text in written.items():
        assert PINNED[name][0].key == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_key_tells_everything_apart_that_decides_the_result():
    base = Condition(interventions=(Scale(RANKING, 0.5),), factors={"k": 4})
    others = [
        base,
        replace(base, interventions=(Scale(RANKING, 0.25),)),
        replace(base, interventions=(Scale(neurons(*RANKING.pairs[::-1]), 0.5),)),
        replace(base, interventions=(Scale(RANKING, 0.5), Scale(RANKING, 0.5))),
        replace(base, factors={"k": 5}),
        replace(base, model="S"),
        replace(base, images="val"),
        replace(base, control_of="0" * 16),
    ]
    assert len({one.key for one in others}) == len(others)
    scored = rl.RegisterNeurons(pairs=RANKING.pairs, scores=(4.0, 3.0, 2.0, 1.0), source="elsewhere")
    assert replace(base, interventions=(Scale(scored, 0.5),)).key == base.key
    assert replace(base, interventions=(Scale(RANKING, 0.5),)).key == base.key


# Combining -----------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_products_equal_nested_loops(sizes):
    collections = [heads(f"head {i}", i, n) for i, n in enumerate(sizes)]
    made = product(*collections)
    expected = list(itertools.product(*map(range, sizes)))
    assert [tuple(one.factors.values()) for one in made] == expected
    assert [tuple(edit.target.pairs[0] for edit in one.interventions) for one in made] == [
        tuple(enumerate(chosen)) for chosen in expected
    ]
    if len(sizes) == 3:
        a, b, c = collections
        assert ((a * b) * c).keys == (a * (b * c)).keys == made.keys
    assert len(set(made.keys)) == len(made)


@given(n=st.integers(1, 5), m=st.integers(1, 5), cut=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_sums_slices_and_zips(n, m, cut):
    first, second = grid(ablate_head, layer=[0], head=range(n)), grid(ablate_head, layer=[1], head=range(m))
    both = first + second
    assert both.keys == first.keys + second.keys and len(both) == n + m and list(both) == [*first, *second]
    assert both[:cut].keys == both.keys[:cut] and both[-1] is both.listed[-1]
    assert all(both[one.key] is one and both[one.label] is one and one.key in both for one in both)
    other = heads("other", 3, m)
    left = heads("one", 2, n)
    if n != m:
        with pytest.raises(ConfigError, match=f"as many conditions on both sides, got {n} and {m}"):
            left.zip(other)
    else:
        assert left.zip(other).keys == tuple((left * other)[i * n + i].key for i in range(n))


def test_a_shared_factor_must_agree():
    scaled = grid(lambda layer, factor: Scale(rl.Tokens(layer, "cls"), factor), layer=[1, 2], factor=[0.5])
    ablated = grid(lambda layer: ablate_head(layer, 0), layer=[1])
    with pytest.raises(ConfigError, match=r"contradiction: the factor 'layer' would be 2 and 1 in one condition"):
        scaled * ablated
    with pytest.raises(ConfigError, match="contradiction"):
        ablated.zip(scaled[1:])
    together = ablated.zip(scaled[:1])
    assert together.labels == ("layer=1 factor=0.5",) and len(together[0].interventions) == 2
    with pytest.raises(ConfigError, match="contradiction: the factor 'layer'"):
        grid(lambda one, other: rl.Ablate(one), one=every_head(VIT, [1]), other=every_head(VIT, [2]))


def test_models_and_image_sets():
    control = replace(HEADS[0], control_of=HEADS[0].key, factors=HEADS[0].factors | {"control": "random 1"})
    moved = Conditions.of([*HEADS, control]).over(models=["S", "B"], images=["val", "sketch"])
    assert len(moved) == 20 and len(set(moved.keys)) == 20
    assert [(one.model, one.images) for one in moved[::5]] == list(itertools.product(["S", "B"], ["val", "sketch"]))
    for start in range(0, 20, 5):
        assert moved[start + 4].control_of == moved[start].key
    with pytest.raises(ConfigError, match=r"different models or images\. Combine first"):
        HEADS.over(models=["S"]) * heads("other", 3)
    with pytest.raises(ConfigError, match="Controls cannot be combined"):
        Conditions.of([control]) * heads("other", 3)
    for wrong in ("S", []):
        with pytest.raises(ConfigError, match="models takes a list of names"):
            HEADS.over(models=wrong)


def test_what_is_dropped_takes_its_controls_along():
    controls = [replace(one, control_of=one.key, factors=one.factors | {"control": "random 1"}) for one in HEADS]
    kept = Conditions.of([*HEADS, *controls]).filter(lambda one: one.control_of or one.factors["layer"] == 2)
    assert kept.labels == (*HEADS.labels[2:], *(f"{label} control=random 1" for label in HEADS.labels[2:]))
    with pytest.raises(ConfigError, match="a filter has left nothing"):
        HEADS.filter(lambda one: False)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_the_same_condition_twice():
    with pytest.raises(ConfigError, match=r"twice: 'layer=0 head=1' and 'layer=0 head=1' make the same edit"):
        HEADS + HEADS
    with pytest.raises(ConfigError, match="twice"):
        grid(ablate_head, layer=[1, 1], head=[0])
    with pytest.raises(ConfigError, match=r"twice: 'layer=0 head=1' \(S\)"):
        HEADS.over(models=["S", "S"])
    assert len(HEADS + HEADS.over(models=["S"])) == 8


def test_bad_grids_are_named():
    with pytest.raises(ConfigError, match="at least one axis"):
        grid(ablate_head)
    with pytest.raises(ConfigError, match=r"axes \['layer', 'heads'\] do not fit ablate_head.*Did you mean 'head'"):
        grid(ablate_head, layer=[1], heads=[2])
    with pytest.raises(ConfigError, match=r"axes .* do not fit ablate_head"):
        grid(ablate_head, layer=[1])
    with pytest.raises(ConfigError, match=r"For n=2 an intervention such as .* got str"):
        grid(lambda n: ablate_head(1, 0) if n < 2 else "head", n=[1, 2])
    with pytest.raises(
        ConfigError, match=r"No condition can be made for n=-1: n, the number of test-time registers, must"
    ):
        grid(lambda n: rl.TestTimeRegisters(RANKING, n), n=[1, -1])
    for column in ("image", "model", "condition"):
        with pytest.raises(ConfigError, match=f"'{column}' cannot be a factor"):
            grid(lambda **axis: ablate_head(1, 0), **{column: [1]})
    for wrong in (["zero"], [("a", 3)]):
        with pytest.raises(ConfigError, match="xpected"):
            unwrap(Conditions.of.__func__)(Conditions, wrong)
    with pytest.raises(ConfigError, match="There is no condition"):
        Conditions.of([])
    with pytest.raises(ConfigError, match="at least one collection"):
        product()


def test_unknown_and_ambiguous_labels():
    with pytest.raises(ConfigError, match=r"0 conditions are called 'layer=2 head=3'\. Did you mean 'layer=2 head="):
        HEADS["layer=2 head=3"]
    with pytest.raises(ConfigError, match=r"2 conditions are called .* position or the key"):
        HEADS.over(images=["a", "b"])["layer=2 head=0"]


def test_everything_that_does_not_fit_is_told_at_once():
    wrong = grid(ablate_head, layer=[1, 4, 9], head=[0, 7])
    with pytest.raises(InterventionError) as told:
        wrong.check(VIT)
    lines = str(told.value).splitlines()
    assert lines[0] == "5 of 6 conditions cannot be run:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [f"'{label}'" for label in wrong.labels[1:]]
    many = grid(lambda n: rl.Ablate(neurons((1, n))), n=range(15, 40))
    with pytest.raises(InterventionError, match=r"20 of 25 .*\n(.*\n){5}  and 15 more"):
        many.check(VIT)
    assert many[:5].check(VIT).keys == many.keys[:5]
    assert HEADS.check({"model": VIT}).keys == HEADS.keys
    with pytest.raises(InterventionError, match=r"layer=0 head=1' \(S\): there is no model 'S', only \['model'\]"):
        HEADS.over(models=["S"]).check(VIT)
    plain = build(n_trained_registers=0)
    names = {"cls": "cls", "no": "trained_registers"}
    tokens = Conditions.of([(name, rl.Ablate(rl.Tokens(1, which))) for name, which in names.items()])
    with pytest.raises(InterventionError, match=r"1 of 2 conditions cannot be run:\n  'no': Nothing to ablate"):
        tokens.check(plain)
    alone = Conditions.of([replace(HEADS[0], control_of="0" * 16)])
    with pytest.raises(InterventionError, match="whose control it is has been left out"):
        alone.check(VIT)


def test_planned_edits_are_checked_before_they_are_fitted():
    planned = grid(rl.Ablate, target=[rl.Heads([(1, 0)]), rl.Heads([(1, 5)])], mode=["mean", "shuffle"])
    with pytest.raises(InterventionError, match="2 of 4 conditions"):
        planned.check(VIT)
    beside = grid(lambda mode: (rl.TestTimeRegisters(RANKING), ablation_of_head(mode)), mode=["mean", "shuffle"])
    with pytest.raises(InterventionError, match=r"1 of 2 .*\n.*'mode=shuffle': .* test-time register"):
        beside.check(VIT)


def ablation_of_head(mode):
    from registerlens.sweep.conditions import ablation

    return ablation(rl.Heads([(1, 0)]), mode)


def test_the_table_has_a_row_a_condition():
    made = Conditions.of([Condition(), *HEADS[:1], ("by hand", ablate_head(3, 1))]).to_dataframe()
    assert list(made.columns) == ["condition", "label", "model", "images", "control_of", "layer", "head", "edit"]
    assert made["label"].tolist() == ["clean", "layer=0 head=1", "by hand"]
    assert made["layer"].tolist()[1] == 0 and made["layer"].isna().tolist() == [True, False, True]
    assert made["condition"].tolist() == [Condition().key, HEADS[0].key, made["condition"][2]]

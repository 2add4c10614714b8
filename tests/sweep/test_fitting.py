"""Planned edits: the same keys and places as fitted ones, and bit for bit what Ablate.fit makes of each alone."""

import dataclasses
import pickle
from functools import partial
from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_vits import build, neurons, pixels

import registerlens as rl
from registerlens.errors import ConfigError, ImageError, InterventionError, ShapeError
from registerlens.sweep.conditions import Condition, PlannedAblation, PlannedBias, ablation, plannable
from registerlens.sweep.fitting import fit_conditions, n_passes, unfitted
from registerlens.sweep.grid import Conditions, grid

VIT = build()
IMAGES = pixels(41, seed=3)  # more than the bank holds
TARGETS = {
    "neurons": neurons((1, 19), (1, 3), (2, 7)),
    "overlapping": neurons((2, 0), (1, 3), (2, 7)),
    "heads": rl.Heads([(1, 2), (3, 0), (1, 0)]),
    "head": rl.Heads([(1, 2)]),
    "cls": rl.Tokens(1, "cls"),
    "patches": rl.Tokens(1, [0, 3]),
}
MODES = ["zero", "mean", "noise", "shuffle", "resample"]
EVERY = grid(rl.Ablate, target=TARGETS, mode=MODES)


def forwards(vit, counted):
    return vit.register_forward_pre_hook(lambda *_: counted.append(1))


def outputs(intervention, images=None):
    with torch.no_grad(), VIT.edit(intervention):
        return VIT(pixels(3, seed=8) if images is None else images, return_type="tokens")


def same_reference(ours, theirs):
    for kind in ("mean", "std", "bank"):
        one, two = getattr(ours, kind), getattr(theirs, kind)
        assert list(one) == list(two) and all(torch.equal(one[point], two[point]) for point in one), kind
    assert ours.n_images == theirs.n_images


@pytest.fixture(scope="module")
def bound():
    return fit_conditions(VIT, IMAGES, EVERY, batch_size=16)


@pytest.mark.parametrize("label", EVERY.labels)
def test_each_is_what_it_would_be_alone_bit_for_bit(bound, label):
    before, after = EVERY[label], bound[label]
    mode, target = before.factors["mode"], TARGETS[before.factors["target"]]
    [edit] = after.interventions
    if mode == "zero":
        assert type(edit) is rl.Ablate and (edit.target, edit.mode) == (target, "zero")
        return
    alone = rl.Ablate.fit(VIT, IMAGES, target, mode, batch_size=16)
    assert (edit.fitted.target, edit.fitted.mode, edit.fitted.seed) == (target, mode, 0)
    same_reference(edit.fitted.reference, alone.reference)
    assert torch.equal(outputs(edit), outputs(alone)) and not torch.equal(outputs(edit), outputs(rl.Ablate(target)))


@given(
    chosen=st.lists(
        st.tuples(
            st.one_of(
                st.lists(st.tuples(st.integers(0, 3), st.integers(0, 19)), min_size=1, max_size=5, unique=True).map(
                    rl.RegisterNeurons.from_pairs
                ),
                st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=3).map(rl.Heads),
            ),
            st.sampled_from(MODES[1:]),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=5,
        unique_by=repr,
    )
)
@settings(max_examples=8, deadline=None)
def test_random_sets_with_seeds_of_their_own(chosen):
    conditions = Conditions.of([(f"{i}", ablation(t, mode, seed=seed)) for i, (t, mode, seed) in enumerate(chosen)])
    counted = []
    handle = forwards(VIT, counted)
    fitted = fit_conditions(VIT, IMAGES, conditions, batch_size=16)
    handle.remove()
    assert len(counted) == 3  # one pass of three batches
    for (target, mode, seed), one in zip(chosen, fitted, strict=True):
        alone = rl.Ablate.fit(VIT, IMAGES, target, mode, seed=seed, batch_size=16)
        same_reference(one.interventions[0].fitted.reference, alone.reference)
        assert one.interventions[0].fitted.seed == seed


def test_keys_labels_and_places_stay(bound):
    assert bound.keys == EVERY.keys and bound.labels == EVERY.labels
    first = {"neurons": 1, "overlapping": 1, "heads": 1, "head": 1, "cls": 1, "patches": 1}
    for one, two in zip(EVERY, bound, strict=True):
        assert one.first_layer(VIT) == two.first_layer(VIT) == first[one.factors["target"]]
        own = [[edit.point for edit in made.interventions[0].edits(VIT, 0)] for made in (one, two)]
        assert own[0] == own[1]
    later = grid(rl.Ablate, target=[neurons((3, 1)), neurons((2, 1))], mode=["noise"])
    assert [one.first_layer(VIT) for one in later] == [3, 2]
    # The key is that of the contents: nothing is remembered that could be out of date.
    moved = dataclasses.replace(bound[1], interventions=bound[2].interventions)
    assert moved.key != bound[1].key


def test_bound_conditions_survive_being_sent(bound):
    again = pickle.loads(pickle.dumps(bound))
    assert again.keys == bound.keys
    for one, two in zip(bound[1:5], again[1:5], strict=True):
        assert torch.equal(outputs(one.interventions[0]), outputs(two.interventions[0]))


def test_unfitted_edits_refuse_to_run():
    for planned in (ablation(TARGETS["cls"], "mean"), PlannedBias(TARGETS["neurons"])):
        with pytest.raises(InterventionError, match=rf"This {type(planned).__name__} has not been fitted\. .*fit_cond"):
            outputs(planned)
    assert not any(point.has_hooks() for point in VIT.hook_dict.values())


def test_attention_biases_take_a_pass_each_and_equal_their_own_fit():
    listed = grid(rl.AttentionBias, neurons={"a": TARGETS["neurons"], "b": TARGETS["overlapping"]})
    mixed = (
        listed
        + EVERY[:5]
        + grid(lambda twice: (PlannedBias(TARGETS["neurons"]), ablation(TARGETS["cls"], "mean")), twice=[1])
    )
    assert n_passes(mixed) == 3 and n_passes(listed) == 2 and n_passes(EVERY) == 1 and n_passes(EVERY[:1]) == 0
    counted = []
    handle = forwards(VIT, counted)
    fitted = fit_conditions(VIT, IMAGES[:8], mixed, batch_size=4)
    handle.remove()
    assert len(counted) == 6 and fitted.keys == mixed.keys and not unfitted(fitted) and n_passes(fitted) == 0
    for name, one in zip(("neurons", "overlapping"), fitted, strict=False):
        alone = rl.AttentionBias.fit(VIT, IMAGES[:8], TARGETS[name], batch_size=4)
        own = one.interventions[0].fitted
        assert torch.equal(own.k, alone.k) and torch.equal(own.v, alone.v)
        assert torch.equal(outputs(one.interventions[0]), outputs(alone))
        assert [edit.point for edit in one.interventions[0].edits(VIT, 0)] == [
            edit.point for edit in PlannedBias(TARGETS[name]).edits(VIT, 0)
        ]
    assert fitted[-1].interventions[0].fitted is fitted[0].interventions[0].fitted  # made once, used twice
    again = fit_conditions(VIT, iter([]), fitted)
    assert again.keys == mixed.keys and again[0].interventions[0].fitted is fitted[0].interventions[0].fitted


def test_streams_and_iterators():
    stream = list(IMAGES.split([5, 16, 20]))
    once = fit_conditions(VIT, iter(stream), EVERY[:5])
    again = fit_conditions(VIT, stream, EVERY[:5])
    for one, two in zip(once[1:], again[1:], strict=True):
        same_reference(one.interventions[0].fitted.reference, two.interventions[0].fitted.reference)
    both = EVERY[:2] + grid(rl.AttentionBias, neurons={"a": TARGETS["neurons"]})
    with pytest.raises(ImageError, match="2 passes over the reference images are needed, but an iterator"):
        fit_conditions(VIT, iter(stream), both)
    with pytest.raises(ImageError, match="No image"):
        fit_conditions(VIT, [], EVERY[:2])
    mixed_sizes = [pixels(2), pixels(2, size=(32, 32))]
    assert fit_conditions(VIT, mixed_sizes, EVERY[1:3])[0].interventions[0].fitted.reference.n_images == 4
    with pytest.raises(ShapeError, match="Images of one size"):
        fit_conditions(VIT, mixed_sizes, EVERY[1:4])


def test_every_model_is_fitted_with_its_own_activations():
    other = build(seed=7)
    conditions = EVERY[1:2].over(models=["S", "B"])
    fitted = fit_conditions({"S": VIT, "B": other}, {"S": IMAGES[:8], "B": IMAGES[8:20]}, conditions)
    for one, vit, images in zip(fitted, (VIT, other), (IMAGES[:8], IMAGES[8:20]), strict=True):
        alone = rl.Ablate.fit(vit, images, TARGETS["neurons"], "mean")
        same_reference(one.interventions[0].fitted.reference, alone.reference)
    with pytest.raises(ConfigError, match=r"about the model 'S'; there are \['model'\]"):
        fit_conditions(VIT, IMAGES, conditions)
    with pytest.raises(ConfigError, match=r"images for \['S'\], but none for the model 'B'"):
        fit_conditions({"S": VIT, "B": other}, {"S": IMAGES}, conditions)
    with pytest.raises(ImageError, match="An iterator of reference images lasts for one model"):
        fit_conditions({"S": VIT, "B": other}, iter([IMAGES]), conditions)


def test_a_grid_takes_the_classes_by_name():
    assert plannable(rl.Ablate) is ablation and plannable(rl.AttentionBias) is PlannedBias
    seeded = grid(partial(rl.Ablate, mode="noise", seed=4), target=[TARGETS["cls"]])
    assert seeded[0].interventions == (PlannedAblation(TARGETS["cls"], "noise", seed=4),)
    for zero in (grid(rl.Ablate, target=[TARGETS["cls"]], mode=["zero"]), grid(rl.Ablate, target=[TARGETS["cls"]])):
        assert type(zero[0].interventions[0]) is rl.Ablate and zero[0].interventions[0].mode == "zero"
    with pytest.raises(ConfigError, match=r"mode must be one of \['zero', 'mean', 'noise', 'shuffle', 'resample'\]"):
        unwrap(PlannedAblation.__init__)(object.__new__(PlannedAblation), TARGETS["cls"], "average")
    with pytest.raises(ConfigError, match=r"mode must be one of .* got 'zero'"):
        PlannedAblation(TARGETS["cls"], "zero")


def test_the_hash_leaves_out_what_comparisons_leave_out():
    planned = Condition(interventions=(PlannedAblation(TARGETS["cls"], "mean"),))
    seeded = Condition(interventions=(PlannedAblation(TARGETS["cls"], "mean", seed=1),))
    assert planned.key != seeded.key
    fitted = rl.Ablate.fit(VIT, IMAGES[:4], TARGETS["cls"])
    assert Condition(interventions=(PlannedAblation(TARGETS["cls"], "mean", fitted=fitted),)).key == planned.key

"""Matched controls: same edit, same layers, other neurons; the same ones whatever else is in the grid."""

from inspect import unwrap

import pytest
import torch
from sweep_vits import ablate_head, build, neurons, pixels

import registerlens as rl
from registerlens.errors import ConfigError, InterventionError
from registerlens.evaluation.controls import neuron_activity
from registerlens.interventions.ablation import Scale
from registerlens.interventions.base import neurons_of
from registerlens.sweep.axes import top_k
from registerlens.sweep.conditions import Condition, PlannedBias
from registerlens.sweep.controls import with_controls
from registerlens.sweep.fitting import fit_conditions
from registerlens.sweep.grid import Conditions, grid

VIT = build()
IMAGES = pixels(6)
RANKING = neurons((2, 7), (1, 3), (2, 0), (1, 19))
DOSES = grid(Scale, target=top_k(RANKING, [1, 4]), factor=[0.0, 0.5])


def drawn(conditions, control):
    return [neurons_of(one.interventions[0]) for one in conditions if one.factors.get("control") == control]


def test_each_is_followed_by_its_controls():
    mixed = Conditions.of([Condition(), ("head", ablate_head(1, 0))]) + DOSES
    every = with_controls(VIT, mixed, images=IMAGES, n=2)
    assert len(every) == 2 + 4 * 5 and every.labels[:2] == ("clean", "head")
    names = ["random 1", "random 2", "matched 1", "matched 2"]
    for own in range(2, 22, 5):
        one, controls = every[own], list(every[own + 1 : own + 5])
        assert not one.control_of and one.key in DOSES.keys
        assert [control.factors["control"] for control in controls] == names
        for control in controls:
            assert control.control_of == one.key and {**control.factors} == {
                **one.factors,
                "control": control.factors["control"],
            }
            ours, theirs = neurons_of(one.interventions[0]), neurons_of(control.interventions[0])
            assert [layer for layer, _ in sorted(ours.pairs)] == [layer for layer, _ in sorted(theirs.pairs)]
            assert not set(ours.pairs) & set(theirs.pairs)
            assert control.interventions[0].factor == one.interventions[0].factor
    assert every.check(VIT).over(models=["S"])[4].control_of == every.over(models=["S"])[2].key


def test_controls_depend_on_the_neurons_and_the_seed_alone():
    every = with_controls(VIT, DOSES, images=IMAGES)
    for control in ("random 1", "random 3", "matched 2"):
        sets = drawn(every, control)
        assert sets[0] == sets[1] and sets[2] == sets[3] and sets[0] != sets[2]  # in both doses
    more = with_controls(VIT, DOSES[2:3], images=IMAGES, n=5)  # another grid, and more draws
    before = {one.factors["control"]: one.key for one in every if one.control_of == DOSES[2].key}
    after = {one.factors["control"]: one.key for one in more[1:]}
    assert len(before) == 6 and len(after) == 10 and before.items() <= after.items()
    matched = with_controls(
        VIT, with_controls(VIT, DOSES, n=1, kinds=("random",)), images=IMAGES, n=1, kinds=("matched",)
    )
    assert {*matched.keys} == {*with_controls(VIT, DOSES, images=IMAGES, n=1).keys}  # controls get no controls
    other = with_controls(VIT, DOSES, images=IMAGES, seed=1)
    assert drawn(other, "random 1") != drawn(every, "random 1")


def test_matched_neurons_get_about_as_active():
    one = neurons((1, 3))
    every = with_controls(VIT, grid(rl.Ablate, target=[one]), images=IMAGES, n=8, kinds=("matched",))
    active = neuron_activity(VIT, IMAGES, [1])[1]
    nearest = (active - active[3]).abs().argsort()[1:11].tolist()
    chosen = [neurons_of(control.interventions[0]).pairs[0][1] for control in every[1:]]
    assert set(chosen) <= set(nearest) and len(set(chosen)) >= 6


def test_edits_together_get_the_same_neurons():
    pair = grid(lambda n: (rl.TestTimeRegisters(RANKING, n), Scale(RANKING, 0.5), ablate_head(1, 0)), n=[1])
    control = with_controls(VIT, pair, kinds=("random",), n=1)[1]
    register, scale, head = control.interventions
    assert register.neurons == scale.target != RANKING and head is pair[0].interventions[2]


def test_planned_edits_have_controls_that_are_fitted_with_them():
    planned = grid(rl.Ablate, target={"a": RANKING}, mode=["mean"]) + grid(rl.AttentionBias, neurons={"a": RANKING})
    every = with_controls(VIT, planned, images=IMAGES, n=1)
    fitted = fit_conditions(VIT, IMAGES, every)
    for one in fitted:
        edit = one.interventions[0]
        alone = rl.AttentionBias.fit(VIT, IMAGES, edit.neurons) if isinstance(edit, PlannedBias) else None
        if alone is None:
            mean = rl.Ablate.fit(VIT, IMAGES, edit.target).reference.mean
            assert all(torch.equal(edit.fitted.reference.mean[point], mean[point]) for point in mean)
        else:
            assert torch.equal(edit.fitted.k, alone.k) and edit.fitted.neurons == edit.neurons
    late = with_controls(VIT, fit_conditions(VIT, IMAGES, planned), images=IMAGES, n=1)
    assert late.keys == every.keys and late[1].interventions[0].fitted is None


def test_errors():
    with pytest.raises(InterventionError, match="No condition is about neurons"):
        with_controls(VIT, grid(ablate_head, layer=[1], head=[0]), images=IMAGES)
    with pytest.raises(ConfigError, match="need images on which activity is measured"):
        with_controls(VIT, DOSES)
    with pytest.raises(ConfigError, match=r"There are \['random', 'matched'\] controls, not 'same'"):
        unwrap(with_controls)(VIT, DOSES, images=IMAGES, kinds=("same",))
    with pytest.raises(ConfigError, match="n=0"):
        with_controls(VIT, DOSES, images=IMAGES, n=0)
    with pytest.raises(ConfigError, match="about the model 'S'"):
        with_controls(VIT, DOSES.over(models=["S"]), images=IMAGES)
    crowd = grid(rl.Ablate, target={"crowd": neurons(*((1, n) for n in range(11)))})
    with pytest.raises(InterventionError, match=r"'target=crowd' cannot have controls: Layer 1 has 20 neurons, 11"):
        with_controls(VIT, crowd, images=IMAGES)
    fitted = Conditions.of([("mean", rl.Ablate.fit(VIT, IMAGES, RANKING))])
    with pytest.raises(InterventionError, match=r"'mean' cannot have controls: .* was fitted for its own neurons"):
        with_controls(VIT, fitted, images=IMAGES)

"""Scaling, against the same multiplication by plain hooks, and against its two limits."""

from inspect import unwrap

import pytest
import torch
from edited_vits import NEURONS, OTHERS, build, pixels
from helpers import relative
from hypothesis import given, settings
from hypothesis import strategies as st

import registerlens as rl
from registerlens.errors import ConfigError, InterventionError
from registerlens.evaluation.controls import with_neurons
from registerlens.interventions.ablation import Scale
from registerlens.interventions.base import neurons_of

VIT = build("clip")


def by_neuron(x, hook, factor):
    x = x.clone()
    for layer, neuron in NEURONS.pairs:
        if layer == hook.layer():
            x[..., neuron] = factor * x[..., neuron]
    return x


def by_head(x, hook, factor):
    x = x.clone()
    x[:, :, 0] *= factor
    return x


def by_position(*positions):
    def change(x, hook, factor):
        x = x.clone()
        for position in positions:
            x[:, position] *= factor
        return x

    return change


TARGETS = {
    "neurons": (NEURONS, "blocks.*.mlp.hook_post", by_neuron),
    "heads": (rl.Heads([(1, 0)]), "blocks.1.attn.hook_z", by_head),
    "cls": (rl.Tokens(2, "cls"), "blocks.2.hook_resid_post", by_position(0)),
    "trained": (rl.Tokens(0, "trained_registers"), "blocks.0.hook_resid_post", by_position(1, 2)),
    "patches": (rl.Tokens(1, [0, 7]), "blocks.1.hook_resid_post", by_position(3, 10)),
}


def run(images, *edits):
    with torch.no_grad(), VIT.edit(*edits):
        return VIT(images, return_type="tokens")


@pytest.mark.parametrize("name", TARGETS)
@given(factor=st.floats(-3, 3), size=st.sampled_from([(24, 32), (20, 43)]))
@settings(max_examples=8, deadline=None)
def test_it_multiplies_what_it_names_and_nothing_else(name, factor, size):
    target, point, change = TARGETS[name]
    if name == "patches" and size != (24, 32):
        target, change = rl.Tokens(1, [0, 9]), by_position(3, 12)
    images = pixels(2, size)
    with torch.no_grad(), VIT.hooks([(point, lambda x, hook: change(x, hook, factor))]):
        expected = VIT(images, return_type="tokens")
    assert torch.equal(run(images, Scale(target, factor)), expected)


@pytest.mark.parametrize("name", TARGETS)
def test_its_limits_are_nothing_and_zero_ablation(name):
    target, images = TARGETS[name][0], pixels(3)
    clean = run(images)
    assert torch.equal(run(images, Scale(target, 1)), clean)
    assert torch.equal(run(images, Scale(target, 0)), run(images, rl.Ablate(target)))
    assert relative(run(images, Scale(target, 0)), clean) > 1e-3
    assert torch.equal(run(images, Scale(target, 2), Scale(target, 0.5)), clean)  # powers of two are exact


def test_the_factor_can_be_followed_by_gradients():
    images = pixels(1).requires_grad_()
    with VIT.edit(Scale(NEURONS, 0.5)):
        VIT(images).sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().max() > 0


def test_it_is_about_neurons_and_can_be_moved_to_others():
    assert neurons_of(Scale(NEURONS, 0.5)) == NEURONS and neurons_of(Scale(rl.Heads([(1, 0)]), 0.5)) is None
    moved = with_neurons(Scale(NEURONS, 0.5), OTHERS)
    assert moved == Scale(OTHERS, 0.5) and moved != Scale(NEURONS, 0.5)


def test_errors():
    make = unwrap(Scale.__init__)
    with pytest.raises(ConfigError, match=r"Scale takes a RegisterNeurons, .* got list\. .*from_pairs"):
        make(object.__new__(Scale), [(1, 2)], 0.5)
    for factor in (float("nan"), float("inf"), "half", None):
        with pytest.raises(ConfigError, match="factor must be a finite number"):
            make(object.__new__(Scale), NEURONS, factor)
    with pytest.raises(InterventionError, match=r"Heads \[\(1, 3\)\] do not exist"):
        run(pixels(1), Scale(rl.Heads([(1, 3)]), 0.5))

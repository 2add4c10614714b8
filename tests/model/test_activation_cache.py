"""TransformerLens's ActivationCache helpers on a ViT with [CLS], ln_pre and LayerScale: exact decompositions."""

import pytest
import torch
from helpers import relative
from small_vits import CONFIGS, build, images

from registerlens.errors import ShapeError

TOLERANCE = 1e-5


@pytest.fixture(params=CONFIGS)
def run(request):
    """A model and the cache of everything, at another size than the native one."""
    vit = build(request.param)
    with torch.no_grad():
        _, cache = vit.run_with_cache(images(vit, size=(32, 24)))
        yield vit, cache


def stream(cache, layer, mlp_input=False):
    """The residual stream that enters a block's attention or MLP, or the final norm."""
    if layer == 3:
        return cache["blocks.2.hook_resid_post"]
    return cache[f"blocks.{layer}.hook_resid_{'mid' if mlp_input else 'pre'}"]


def norm_of(vit, layer, mlp_input):
    """The LayerNorm that reads this stream, and its name."""
    name = "ln_final" if layer == 3 else f"blocks.{layer}.ln{2 if mlp_input else 1}"
    return vit.get_submodule(name), name


READS = [(layer, mlp_input) for layer in range(3) for mlp_input in (False, True)] + [(3, False)]


@pytest.mark.parametrize(("layer", "mlp_input"), READS)
def test_decompositions_sum_to_the_residual_stream(run, layer, mlp_input):
    _, cache = run
    expected = stream(cache, layer, mlp_input)
    stacks = {"decompose_resid": cache.decompose_resid(layer, mlp_input=mlp_input)}
    for expand in (True, False):
        stack, labels = cache.get_full_resid_decomposition(
            layer, mlp_input=mlp_input, expand_neurons=expand, return_labels=True
        )
        assert len(labels) == len(stack)
        stacks[f"get_full_resid_decomposition {expand}"] = stack
    if layer and not mlp_input:
        stacks["stack_head_results"] = cache.stack_head_results(layer, incl_remainder=True)
        stacks["stack_neuron_results"] = cache.stack_neuron_results(layer, incl_remainder=True)
    for name, stack in stacks.items():
        assert relative(stack.sum(0), expected) <= TOLERANCE, name


@pytest.mark.parametrize(("layer", "mlp_input"), READS)
def test_normalised_decompositions_sum_to_the_normalised_stream(run, layer, mlp_input):
    vit, cache = run
    norm, name = norm_of(vit, layer, mlp_input)
    expected = cache[f"{name}.hook_normalized"]
    stacks = [
        cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True),
        cache.get_full_resid_decomposition(layer, mlp_input=mlp_input, apply_ln=True),
        cache.get_full_resid_decomposition(layer, mlp_input=mlp_input, apply_ln=True, expand_neurons=False),
    ]
    if layer and not mlp_input:
        stacks.append(cache.stack_head_results(layer, incl_remainder=True, apply_ln=True))
        stacks.append(cache.stack_neuron_results(layer, incl_remainder=True, apply_ln=True))
    for stack in stacks:
        assert relative(stack.sum(0) * norm.w + getattr(norm, "b", 0), expected) <= TOLERANCE


def test_projected_decompositions_sum_to_the_projected_stream(run):
    vit, cache = run
    direction = torch.randn(vit.cfg.d_model)
    for apply_ln in (False, True):
        projected = cache.get_full_resid_decomposition(apply_ln=apply_ln, project_output_onto=direction)
        whole = cache.get_full_resid_decomposition(apply_ln=apply_ln)
        assert relative(projected, whole @ direction) <= 1e-4


def test_the_parts_are_the_heads_neurons_and_sublayers(run):
    vit, cache = run
    stack, labels = cache.get_full_resid_decomposition(return_labels=True)
    parts = dict(zip(labels, stack, strict=True))
    assert len(labels) == 3 * vit.cfg.n_heads + 3 * vit.cfg.d_mlp + 3
    assert relative(parts["L1H2"], cache["blocks.1.attn.hook_result"][:, :, 2]) <= TOLERANCE
    neuron = cache["blocks.2.mlp.hook_post"][..., 7, None] * vit.blocks[2].mlp.W_out[7]
    assert relative(parts["L2N7"], neuron) <= TOLERANCE
    assert relative(parts["bias"][0, 0], vit.accumulated_bias(3)) <= TOLERANCE
    stack, labels = cache.decompose_resid(return_labels=True)
    parts = dict(zip(labels, stack, strict=True))
    assert torch.equal(parts["embed"], cache["hook_embed"]) and torch.equal(parts["pos_embed"], cache["hook_pos_embed"])
    assert torch.equal(parts["1_attn_out"], cache["blocks.1.hook_attn_out"])
    assert relative(cache["hook_embed"] + cache["hook_pos_embed"], cache["hook_tokens"]) <= TOLERANCE
    for mode, name in (("attn", "hook_attn_out"), ("mlp", "hook_mlp_out")):
        stack = cache.decompose_resid(mode=mode, incl_embeds=False)
        assert torch.equal(stack, torch.stack([cache[f"blocks.{layer}.{name}"] for layer in range(3)]))


def test_head_results_are_computed_where_they_were_not_cached(run):
    vit, cache = run
    names = ["blocks.*.attn.hook_z", "blocks.*.hook_resid_post", "hook_embed"]
    with torch.no_grad():
        _, small = vit.run_with_cache(images(vit, size=(32, 24)), names_filter=names)
    assert relative(small.stack_head_results(), cache.stack_head_results()) <= TOLERANCE


def test_accumulated_resid(run):
    vit, cache = run
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    expected = [stream(cache, layer, mlp_input) for layer, mlp_input in READS]
    assert torch.equal(stack, torch.stack(expected))
    normalised = cache.accumulated_resid(incl_mid=True, apply_ln=True)
    assert relative(normalised, torch.stack([vit.ln_final(resid) for resid in expected])) <= TOLERANCE
    assert relative(normalised[-1], cache["ln_final.hook_normalized"]) <= TOLERANCE
    for layer, mlp_input in READS[:-1]:
        norm, name = norm_of(vit, layer, mlp_input)
        scaled = cache.accumulated_resid(layer, mlp_input=mlp_input, apply_ln=True)[-1]
        assert relative(scaled * norm.w + getattr(norm, "b", 0), cache[f"{name}.hook_normalized"]) <= TOLERANCE


@pytest.mark.parametrize("pos_slice", [0, (0, 3), [1, 4]])
def test_helpers_take_a_slice_of_positions(run, pos_slice):
    _, cache = run
    index = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice
    expected = cache["blocks.2.hook_resid_post"][:, index]
    for stack in (
        cache.decompose_resid(pos_slice=pos_slice),
        cache.get_full_resid_decomposition(pos_slice=pos_slice),
        cache.stack_head_results(incl_remainder=True, pos_slice=pos_slice),
    ):
        assert relative(stack.sum(0), expected) <= TOLERANCE


def test_helpers_work_without_a_batch_axis():
    vit = build()
    with torch.no_grad():
        _, cache = vit.run_with_cache(images(vit, batch=1), remove_batch_dim=True)
        stack = cache.get_full_resid_decomposition(apply_ln=True)
        normalised = cache.accumulated_resid(apply_ln=True)
    assert relative(stack.sum(0) * vit.ln_final.w + vit.ln_final.b, cache["ln_final.hook_normalized"]) <= TOLERANCE
    assert relative(normalised[-1], cache["ln_final.hook_normalized"]) <= TOLERANCE


# Class directions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", [("cls",), ("mean",)])
def test_logit_attributions_sum_to_the_logits_less_their_constant(pooling):
    vit = build(pooling=pooling, head_act=None)
    x = images(vit, batch=3)
    layout = vit.layout(x)
    classes, others = torch.tensor([4, 0, 2]), torch.tensor([1, 1, 3])
    with torch.no_grad():
        logits, cache = vit.run_with_cache(x)
        stack = cache.get_full_resid_decomposition()
        selected = 0 if pooling == ("cls",) else layout.patches
        constant = vit.head.linear.weight @ vit.ln_final.b + vit.head.linear.bias
        for tokens in (3, classes):
            attributed = cache.logit_attrs(stack, tokens).sum(0)[:, selected]
            attributed = attributed if attributed.ndim == 1 else attributed.mean(1)
            expected = (logits - constant)[torch.arange(3), tokens]
            assert relative(attributed, expected) <= 1e-4
        attributed = cache.logit_attrs(stack, classes, incorrect_tokens=others).sum(0)[:, selected]
        attributed = attributed if attributed.ndim == 1 else attributed.mean(1)
        rows = torch.arange(3)
        expected = (logits - constant)[rows, classes] - (logits - constant)[rows, others]
        assert relative(attributed, expected) <= 1e-4


def test_class_directions_are_the_heads_rows_where_no_norm_precedes_it():
    vit = build(pooling=("cls",), head_act=None, final_norm=False)
    assert torch.equal(vit.tokens_to_residual_directions(torch.tensor([4, 2])), vit.head.linear.weight[[4, 2]])
    assert torch.equal(vit.tokens_to_residual_directions(1), vit.head.linear.weight[1])


@pytest.mark.parametrize("changes", [{"d_out": None}, {"pooling": ("cls", "mean")}])
def test_class_directions_need_a_head_over_one_token(changes):
    vit = build(**changes)
    with pytest.raises(ShapeError, match="linear head over one pooled token"):
        vit.tokens_to_residual_directions(0)

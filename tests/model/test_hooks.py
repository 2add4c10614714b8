"""Hook points: complete, of TransformerLens's shapes, live, editable in place, differentiable, and gone afterwards."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import relative
from jaxtyping import TypeCheckError
from small_vits import CONFIGS, build, images
from torch import nn

from registerlens.errors import HookNameError, RegisterLensError
from registerlens.model import attention

ATTENTION = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
BLOCK = {
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    *ATTENTION,
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_result",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
}


NORM = ("hook_scale", "hook_normalized")
OF_THE_PARTS = {
    "full": (set(), {f"ln_pre.{hook}" for hook in NORM}),
    "plain": (set(), set()),
    "rotary": (
        {"attn.hook_rot_q", "attn.hook_rot_k", "mlp.hook_pre_linear", "mlp.hook_mid"}
        | {f"{norm}.{hook}" for norm in ("attn.ln", "mlp.ln", "attn.q_norm.norm", "attn.k_norm.norm") for hook in NORM}
        | {f"attn.{kind}_norm.hook_normalized" for kind in "qk"},
        {f"ln_pre.{hook}" for hook in NORM},
    ),
    "attention-pooled": (
        {"attn.hook_rot_q", "attn.hook_rot_k"}
        | {f"attn.{kind}_norm.norm.{hook}" for kind in "qk" for hook in NORM}
        | {f"attn.{kind}_norm.hook_normalized" for kind in "qk"},
        {f"{norm}.{hook}" for norm in ("embed.norm", "head.ln") for hook in NORM}
        | {f"head.attn.mlp.ln.{hook}" for hook in NORM}
        | {f"head.attn.hook_{point}" for point in ("q", "k", "v", "attn_scores", "pattern", "z", "out")}
        | {"head.attn.mlp.hook_pre", "head.attn.mlp.hook_post"},
    ),
}
"""Further hook points of each model: in every block, and outside."""


def shape_of(hook: str, cfg, batch: int) -> tuple[int, ...]:
    """The shape TransformerLens's users expect under a name."""
    layout = cfg.layout()
    pos, name = layout.n_tokens, hook.split(".", 2)[-1] if hook.startswith("blocks.") else hook
    pool = cfg.attn_pool
    shapes = {
        "attn.ln.hook_normalized": (batch, pos, cfg.n_heads * cfg.d_head),
        "mlp.ln.hook_normalized": (batch, pos, cfg.d_mlp),
        "embed.norm.hook_scale": (batch, layout.n_patches, 1),
        "embed.norm.hook_normalized": (batch, layout.n_patches, cfg.d_model),
        "head.ln.hook_scale": (batch, 1),
    }
    if cfg.qk_norm is not None:
        groups, width = (1, cfg.n_heads * cfg.d_head) if cfg.qk_norm.over == "all" else (cfg.n_heads, cfg.d_head)
        shapes |= {f"attn.{kind}_norm.norm.hook_scale": (batch, pos, groups, 1) for kind in "qk"}
        shapes |= {f"attn.{kind}_norm.norm.hook_normalized": (batch, pos, groups, width) for kind in "qk"}
    if pool is not None:
        d_head, seen = pool.d_attn // pool.n_heads, layout.n_patches if pool.over == "patches" else pos
        shapes |= {
            "head.attn.hook_q": (batch, 1, pool.n_heads, d_head),
            "head.attn.hook_k": (batch, seen, pool.n_heads, d_head),
            "head.attn.hook_v": (batch, seen, pool.n_heads, d_head),
            "head.attn.hook_attn_scores": (batch, pool.n_heads, 1, seen),
            "head.attn.hook_pattern": (batch, pool.n_heads, 1, seen),
            "head.attn.hook_z": (batch, 1, pool.n_heads, d_head),
            "head.attn.hook_out": (batch, pool.d_attn),
            "head.attn.mlp.ln.hook_scale": (batch, 1),
            "head.attn.mlp.ln.hook_normalized": (batch, pool.d_attn),
            "head.attn.mlp.hook_pre": (batch, pool.d_mlp),
            "head.attn.mlp.hook_post": (batch, pool.d_mlp),
            "head.ln.hook_normalized": (batch, pool.d_attn),
        }
    shapes |= {
        "hook_patch_embed": (batch, layout.n_patches, cfg.d_model),
        "attn.hook_attn_scores": (batch, cfg.n_heads, pos, pos),
        "attn.hook_pattern": (batch, cfg.n_heads, pos, pos),
        "attn.hook_result": (batch, pos, cfg.n_heads, cfg.d_model),
        "mlp.hook_pre": (batch, pos, cfg.d_mlp),
        "mlp.hook_post": (batch, pos, cfg.d_mlp),
        "mlp.hook_mid": (batch, pos, cfg.d_mlp),
        "mlp.hook_pre_linear": (batch, pos, cfg.d_mlp),
        "head.hook_out": (batch, *([] if cfg.pooling else [pos]), cfg.d_out or cfg.d_model),
    }
    heads = (*ATTENTION, "attn.hook_rot_q", "attn.hook_rot_k", *(f"attn.{kind}_norm.hook_normalized" for kind in "qk"))
    shapes |= dict.fromkeys(heads, (batch, pos, cfg.n_heads, cfg.d_head))
    if name.endswith("hook_scale") and name not in shapes:
        return (batch, pos, 1)
    return shapes.get(name, (batch, pos, cfg.d_model))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hook_point_exists_and_has_its_shape(name):
    vit = build(name)
    expected = {f"blocks.{layer}.{hook}" for layer in range(3) for hook in BLOCK}
    expected |= {"hook_patch_embed", "hook_embed", "hook_pos_embed", "hook_tokens", "head.hook_out"}
    expected |= {f"ln_final.{hook}" for hook in NORM}
    in_blocks, outside = OF_THE_PARTS[name]
    expected |= {f"blocks.{layer}.{hook}" for layer in range(3) for hook in in_blocks} | outside
    assert set(vit.hook_dict) == expected
    _, cache = vit.run_with_cache(images(vit), names_filter="*")
    assert set(cache.keys()) == expected
    for hook in expected:
        assert cache[hook].shape == shape_of(hook, vit.cfg, 2), hook


@pytest.mark.parametrize("name", CONFIGS)
def test_every_hook_point_is_live(name):
    """What a hook returns flows on: other values give another output, the same values the same output."""
    vit = build(name, n_layers=2)
    x = images(vit)

    def replace(act, hook, change):
        noise = torch.rand(act.shape, generator=torch.Generator().manual_seed(3)) + 0.5
        return act + change * noise

    with torch.no_grad():
        expected = vit(x)
        for hook in vit.hook_dict:
            same = vit.run_with_hooks(x, fwd_hooks=[(hook, partial(replace, change=0.0))])
            other = vit.run_with_hooks(x, fwd_hooks=[(hook, partial(replace, change=1.0))])
            assert relative(same, expected) <= 1e-5, hook
            assert relative(other, expected) >= 1e-3, hook


def by_hand(norm, x):
    """An RMSNorm in formulas."""
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.w


@pytest.mark.parametrize("name", CONFIGS)
def test_listening_changes_nothing(name):
    """The explicit paths (scores, patterns, per-head results, scales, neurons) agree with the fused ones."""
    vit = build(name)
    x = images(vit)
    with torch.no_grad():
        expected, tokens = vit(x), vit(x, return_type="tokens")
        for hook in vit.hook_dict:
            got, cache = vit.run_with_cache(x, names_filter=hook)
            assert list(cache.keys()) == [hook]
            assert relative(got, expected) <= 1e-5, hook
        got, cache = vit.run_with_cache(x, names_filter="*")
    assert relative(got, expected) <= 1e-5
    assert relative(cache["ln_final.hook_normalized"], tokens) <= 1e-5
    for layer in range(3):
        prefix = f"blocks.{layer}"
        pattern, scores = cache[f"{prefix}.attn.hook_pattern"], cache[f"{prefix}.attn.hook_attn_scores"]
        q, k, v, z = (cache[f"{prefix}.{point}"] for point in ATTENTION)
        seen_q, seen_k = (cache[f"{prefix}.attn.{attention.final_point(vit.cfg, kind)}"] for kind in ("q", "k"))
        assert relative(torch.einsum("bqhd,bkhd->bhqk", seen_q, seen_k) * vit.cfg.d_head**-0.5, scores) <= 1e-5
        assert relative(scores.softmax(-1), pattern) <= 1e-5
        attn = vit.blocks[layer].attn
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        assert relative(mixed if attn.ln is None else by_hand(attn.ln, mixed.flatten(2)).view_as(z), z) <= 1e-5
        assert relative(cache[f"{prefix}.attn.hook_result"].sum(2) + attn.b_O, cache[f"{prefix}.hook_attn_out"]) <= 1e-5
        ln1 = cache[f"{prefix}.ln1.hook_normalized"]
        for weight, bias, got in ((attn.W_Q, attn.b_Q, q), (attn.W_K, attn.b_K, k), (attn.W_V, attn.b_V, v)):
            assert relative(torch.einsum("bpd,hde->bphe", ln1, weight) + bias, got) <= 1e-5
        mlp, normalized = vit.blocks[layer].mlp, cache[f"{prefix}.ln2.hook_normalized"]
        linear, post = normalized @ mlp.W_in + mlp.b_in, cache[f"{prefix}.mlp.hook_post"]
        assert relative(linear, cache[f"{prefix}.mlp.{mlp.points[-1]}"]) <= 1e-5
        if vit.cfg.gated_mlp:
            gate = normalized @ mlp.W_gate + mlp.b_gate
            assert relative(gate, cache[f"{prefix}.mlp.hook_pre"]) <= 1e-5
            assert relative(F.silu(gate) * linear, cache[f"{prefix}.mlp.hook_mid"]) <= 1e-5
            assert relative(by_hand(mlp.ln, F.silu(gate) * linear), post) <= 1e-5
        assert relative(mlp.neurons(normalized), post) <= 1e-5
        assert relative(post @ mlp.W_out + mlp.b_out, cache[f"{prefix}.hook_mlp_out"]) <= 1e-5


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_scores_patterns_and_results_exist_only_while_somebody_listens(direction, monkeypatch):
    vit = build()
    calls = {"fused": 0, "explicit": 0, "result": 0}

    def counting(kind, function):
        def wrapped(*args, **kwargs):
            calls[kind] += 1
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting("fused", F.scaled_dot_product_attention))
    monkeypatch.setattr(attention.Attention, "_explicit", counting("explicit", attention.Attention._explicit))
    monkeypatch.setattr(attention, "einsum", counting("result", attention.einsum))

    def count(*hooks):
        calls.update(fused=0, explicit=0, result=0)
        listeners = [(hook, lambda tensor, hook: None) for hook in hooks]
        with vit.hooks(**{f"{direction}_hooks": listeners}):
            vit(images(vit))
        return tuple(calls.values())

    assert count() == (3, 0, 0)
    assert count("blocks.?.hook_*", "blocks.*.mlp.*", "blocks.*.attn.hook_[qkvz]", "blocks.*.ln?.*") == (3, 0, 0)
    assert count("blocks.1.attn.hook_pattern") == (2, 1, 0)
    assert count("blocks.*.attn.hook_attn_scores") == (0, 3, 0)
    assert count("blocks.2.attn.hook_result") == (3, 0, 1)
    assert count() == (3, 0, 0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("grad", "returning"), [(True, False), (False, True)], ids=["grad", "no grad"])
def test_hooks_may_edit_in_place(name, grad, returning):
    """Return the edited tensor or None: the output, and the gradients, are those of an edited copy."""
    vit = build(name, n_layers=2)
    x = images(vit)

    def in_place(act, hook):
        act[:, 0] = act[:, 0] * 0.5
        return act if returning else None

    def copying(act, hook):
        act = act.clone()
        act[:, 0] = act[:, 0] * 0.5
        return act

    def run(hook, edit):
        with torch.set_grad_enabled(grad):
            out = vit.run_with_hooks(x, fwd_hooks=[(hook, edit)])
        return out, *(torch.autograd.grad(out.square().sum(), vit.embed.patch.weight) if grad else ())

    for hook in vit.hook_dict:
        for got, expected in zip(run(hook, in_place), run(hook, copying), strict=True):
            assert relative(got, expected) <= 1e-5, hook


def test_a_hook_that_edits_a_given_residual_stream_in_place_does_not_reach_the_caller():
    vit = build()
    resid = vit(images(vit), stop_at_layer=1).detach()
    kept = resid.clone()
    vit.run_with_hooks(resid, fwd_hooks=[("blocks.1.hook_resid_pre", lambda act, hook: act.zero_())], start_at_layer=1)
    assert torch.equal(resid, kept)
    leaf = resid.requires_grad_()
    out = vit.run_with_hooks(
        leaf, fwd_hooks=[("blocks.1.hook_resid_pre", lambda act, hook: act.mul_(2))], start_at_layer=1
    )
    out.square().sum().backward()
    assert leaf.grad.norm() > 0


# Gradients -----------------------------------------------------------------------------------------------------------


def with_gradient(vit):
    """Fixed positions are constants, unless a norm before block 0 mixes them with the patches."""
    constant = vit.cfg.positions != "learned" and not vit.cfg.ln_pre
    return [hook for hook in vit.hook_dict if not (constant and hook == "hook_pos_embed")]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_hook_point(name):
    vit = build(name)
    forward, backward = {}, {}

    def keep(act, hook):
        act.retain_grad()
        forward[hook.name] = act

    def keep_grad(grad, hook):
        backward[hook.name] = grad.clone()

    with vit.hooks(fwd_hooks=[(with_gradient(vit), keep)], bwd_hooks=[("*", keep_grad)]):
        vit(images(vit)).square().sum().backward()
    assert set(backward) == set(forward) == set(with_gradient(vit))
    for hook, grad in backward.items():
        assert grad.norm() > 0, hook
        assert grad.shape == forward[hook].shape
    assert all(parameter.grad.norm() > 0 for parameter in vit.parameters() if parameter.numel())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_backward_hook_sees_the_gradient_and_can_replace_it(name):
    vit = build(name, n_layers=2)
    x = images(vit).requires_grad_()
    added = [] if vit.embed.W_pos is None else [vit.embed.W_pos]
    added += [] if vit.head.attn is None else [vit.head.attn.queries]
    kept, grads = {}, {}

    def keep(act, hook):
        act.retain_grad()
        kept[hook.name] = act

    def halve(grad, hook):
        grads[hook.name] = grad
        return 0.5 * grad

    def gradients():
        return torch.cat([g.flatten() for g in torch.autograd.grad(vit(x).square().sum(), [x, *added])])

    plain = gradients()
    with vit.hooks(fwd_hooks=[(with_gradient(vit), keep)]):
        vit(x).square().sum().backward()
    for hook in with_gradient(vit):
        if hook == "hook_pos_embed" and vit.embed.W_pos is None:  # nothing lies before a constant
            continue
        with vit.hooks(bwd_hooks=[(hook, halve)]):
            changed = gradients()
        assert relative(grads[hook], kept[hook].grad) <= 1e-5, hook
        assert relative(changed, plain) >= 1e-4, hook


# Names and lifetime --------------------------------------------------------------------------------------------------


def run_with_cache(vit, names):
    return vit.run_with_cache(images(vit), names_filter=names)


def with_hooks(vit, names, direction="fwd_hooks"):
    with vit.hooks(**{direction: [(names, lambda tensor, hook: None)]}):
        return vit(images(vit))


def run_with_hooks(vit, names):
    return vit.run_with_hooks(images(vit), fwd_hooks=[(names, lambda act, hook: None)])


def add_hook(vit, names):
    return vit.add_hook(names, lambda act, hook: None)


WAYS_IN = [run_with_cache, with_hooks, partial(with_hooks, direction="bwd_hooks"), run_with_hooks, add_hook]


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("blocks.0.hook_resid_pots", "'blocks.0.hook_resid_pots'. Did you mean 'blocks.0.hook_resid_post'"),
        ("blocks.3.hook_resid_post", "Did you mean 'blocks.2.hook_resid_post'"),
        ("blocks.*.attn.hook_patern", "'blocks.*.attn.hook_patern'. Did you mean"),
        (["hook_embed", "hook_tokns"], "'hook_tokns'. Did you mean 'hook_tokens'"),
        ((), "empty list"),
        (lambda name: name == "nothing", "accepts none of the model's"),
        ("Hook_Embed", "Did you mean 'hook_embed'"),
    ],
)
def test_unknown_names_show_the_closest(way, names, words):
    vit = build()
    with pytest.raises(HookNameError) as caught:
        way(vit, names)
    assert words in str(caught.value)
    assert isinstance(caught.value, RegisterLensError) and isinstance(caught.value, KeyError)
    assert not any(point.has_hooks() for point in vit.hook_dict.values())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("hook_embed", ["hook_embed"]),
        ("blocks.*.hook_resid_post", [f"blocks.{layer}.hook_resid_post" for layer in range(3)]),
        (
            "blocks.[02].mlp.hook_p*",
            [f"blocks.{layer}.mlp.hook_{name}" for layer in (0, 2) for name in ("pre", "post")],
        ),
        (["hook_tokens", "hook_e*"], ["hook_embed", "hook_tokens"]),
        (("hook_tokens", "hook_tokens"), ["hook_tokens"]),
        ({"hook_tokens"}, ["hook_tokens"]),
        (lambda name: name.endswith("hook_out"), ["head.hook_out"]),
        ("*", None),
    ],
)
def test_names_may_be_globs_lists_tuples_sets_and_functions(names, expected):
    vit = build()
    expected = list(vit.hook_dict) if expected is None else expected
    assert sorted(run_with_cache(vit, names)[1].keys()) == sorted(expected)
    fired = []
    vit.run_with_hooks(images(vit), fwd_hooks=[(names, lambda act, hook: fired.append(hook.name))])
    assert sorted(fired) == sorted(expected)


def test_by_default_everything_is_cached_but_per_head_results_which_the_cache_computes():
    vit = build()
    _, cache = vit.run_with_cache(images(vit))
    assert set(vit.hook_dict) - set(cache.keys()) == {f"blocks.{layer}.attn.hook_result" for layer in range(3)}
    _, everything = vit.run_with_cache(images(vit), names_filter="*")
    for results in (cache.stack_head_results(3), everything.stack_head_results(3)):
        assert relative(results[1], everything["blocks.0.attn.hook_result"][:, :, 1]) <= 1e-5


def test_hooks_are_gone_after_use_and_after_an_exception():
    vit = build()
    x = images(vit)
    expected = vit(x)

    def fail(act, hook):
        raise ZeroDivisionError

    for names in (["blocks.1.hook_resid_mid"], ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid"]):
        with pytest.raises(ZeroDivisionError):
            vit.run_with_hooks(x, fwd_hooks=[(names, fail)])
        with pytest.raises(ZeroDivisionError), vit.hooks(fwd_hooks=[(names, fail)], bwd_hooks=[(names, fail)]):
            vit(x)
    with pytest.raises((RegisterLensError, TypeCheckError)):
        vit.run_with_cache(x[0])
    vit.run_with_cache(x)
    assert not any(point.has_hooks() for point in vit.hook_dict.values())
    assert torch.equal(vit(x), expected)


def test_hook_contexts_nest():
    vit = build()
    x = images(vit)
    order = []
    note = lambda word: lambda act, hook: order.append(word)  # noqa: E731
    with vit.hooks([("hook_tokens", note("outer"))]):
        with vit.hooks([("hook_tokens", note("inner"))]):
            vit(x)
            vit.run_with_cache(x, names_filter="hook_tokens")
        order.append("|")
        vit(x)
    vit(x)
    assert order == ["outer", "inner", "outer", "inner", "|", "outer"]


def test_added_hooks_stay_until_they_are_reset():
    vit = build()
    x = images(vit)
    fired = []
    vit.add_hook("blocks.*.hook_mlp_out", lambda act, hook: fired.append(hook.name))
    vit.run_with_cache(x)
    assert len(fired) == 3
    vit.reset_hooks()
    vit(x)
    assert len(fired) == 3
    vit.add_perma_hook("hook_tokens", lambda act, hook: fired.append(hook.name))
    vit.reset_hooks()
    vit(x)
    assert len(fired) == 4


def test_reset_hooks_end_leaves_backward_hooks_for_a_later_backward_pass():
    vit = build()
    grads = []
    out = vit.run_with_hooks(
        images(vit), bwd_hooks=[("hook_tokens", lambda grad, hook: grads.append(grad))], reset_hooks_end=False
    )
    out.square().sum().backward()
    vit.reset_hooks()
    assert len(grads) == 1 and not vit.hook_dict["hook_tokens"].has_hooks()


def test_a_deep_copy_has_hook_points_of_its_own():
    vit = build()
    twin = copy.deepcopy(vit)
    fired = []
    twin.add_hook("hook_tokens", lambda act, hook: fired.append(hook.name))
    vit(images(vit))
    assert fired == []
    twin(images(vit))
    assert fired == ["hook_tokens"]


KINDS = {
    "register_forward_hook": lambda heard: lambda module, args, output: heard.append(module),
    "register_forward_pre_hook": lambda heard: lambda module, args: heard.append(module),
    "register_full_backward_hook": lambda heard: lambda module, grad_input, grad_output: heard.append(module),
    "register_full_backward_pre_hook": lambda heard: lambda module, grad_output: heard.append(module),
}
"""PyTorch's own hooks, as captum, nnsight and Grad-CAM libraries put them on modules."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_of_pytorch_are_heard_at_every_point_and_module(name, kind):
    """Once a pass, whoever put them there: tensors that are made only for listeners are made for them."""
    vit = build(name, n_layers=1)
    x, modules = images(vit), dict(vit.named_modules())
    modules = {key: module for key, module in modules.items() if key in vit.hook_dict or isinstance(module, nn.Linear)}
    for key, module in modules.items():
        heard = []
        handle = getattr(module, kind)(KINDS[kind](heard))
        with torch.set_grad_enabled("backward" in kind):
            out = vit(x)
            if "backward" in kind:
                out.square().sum().backward()
        handle.remove()
        constant = (
            key == "hook_pos_embed" and vit.embed.W_pos is None and vit.ln_pre is None
        )  # so that it has no gradient
        expected = [] if constant and "backward" in kind else [module]
        assert heard == expected, key
        with torch.no_grad():
            vit(x)
        assert heard == expected, key


@pytest.mark.slow
def test_a_compiled_model_hears_hooks_that_come_later_and_forgets_those_that_went():
    torch.compiler.reset()
    vit = build("plain", n_layers=1)
    x, compiled = images(vit), torch.compile(vit, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)
        for hook in ("blocks.0.hook_resid_pre", "blocks.0.attn.hook_pattern"):
            for factor in (0.0, 2.0):  # another hook at the same place
                with vit.hooks([(hook, lambda act, hook, factor=factor: act * factor)]):
                    torch.testing.assert_close(compiled(x), vit(x))
                    assert relative(compiled(x), expected) > 1e-3
            heard = []
            handle = vit[hook].register_forward_hook(KINDS["register_forward_hook"](heard))
            compiled(x)
            handle.remove()
            torch.testing.assert_close(compiled(x), expected)
            assert heard == [vit[hook]]

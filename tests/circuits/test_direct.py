"""Direct contributions beside TransformerLens's own decomposition and sums written out token by token."""

import numpy as np
import pytest
import torch
from helpers import randomise
from small_vits import build, images

import registerlens as rl
from registerlens.circuits.direct import KEYS, DirectContributions, direct_contributions
from registerlens.errors import ConfigError, ImageError, ShapeError
from registerlens.viz.heads import direct_figure

ABSENT = {}


def detection_of(vit, batch):
    if vit.cfg not in ABSENT:
        ABSENT[vit.cfg] = rl.find_outliers(vit, batch).detection
    return ABSENT[vit.cfg]


VARIANTS = [
    ("full", {}),
    ("plain", {}),
    ("rotary", {}),
    ("full", dict(pooling=("cls", "mean"))),
    ("full", dict(pooling=("mean",), pool_norm=True, final_norm=False)),
    ("full", dict(pooling=("cls", "distillation"), pool_norm=True)),
    ("rotary", dict(pooling=("mean_all",))),
    ("full", dict(pooling=("cls", "mean"), d_out=None, head_act=None)),
    ("full", dict(pooling=("cls",), final_norm=False, head_act=None)),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_parts_add_up_to_the_output_itself(name, changes):
    """The output is taken from a plain run; nothing but the sum of the parts can equal it."""
    vit = build(name, **changes).double()
    batch = images(vit, 3).double()
    width = vit.cfg.d_out or vit.cfg.d_pooled
    direction = torch.randn(width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        output = vit(batch)
        output = torch.atanh(output) if vit.cfg.head_act else output
        if output.ndim == 3:
            output = output[:, 0] if vit.cfg.class_token else output[:, vit.layout(batch).patches].mean(1)
        expected = output @ direction
    found = direct_contributions(vit, batch, direction, detection=detection_of(vit, batch), batch_size=2)
    assert found.value == pytest.approx(expected.mean().item(), abs=1e-9)
    biases = found.attn_bias.sum() + found.mlp_bias.sum() + found.constant
    total = found.embedding + found.position + biases + found.heads.sum() + found.neurons.sum()
    assert total == pytest.approx(expected.mean().item(), abs=1e-9)
    assert found.largest_remainder < 1e-9 and abs(found.remainder) < 1e-9
    if vit.cfg.attn_norm:
        assert np.isnan(found.by_key).all() and "a norm before W_O mixes them" in found.describe()
    else:
        np.testing.assert_allclose(found.by_key.sum(0), found.heads, atol=1e-12)


def by_hand(vit, batch, direction):
    """Each head's and neuron's part at [CLS], written out: (write - its mean) x weight / scale . direction."""
    with torch.no_grad():
        _, cache = vit.run_with_cache(batch, names_filter="*")
    scale = cache["ln_final.hook_scale"][:, 0]
    row = direction * vit.ln_final.w

    def share(write):
        return ((write - write.mean(-1, keepdim=True)) / scale * row).sum(-1)

    heads, neurons, by_token = [], [], []
    for layer, block in enumerate(vit.blocks):
        result = cache[f"blocks.{layer}.attn.hook_result"][:, 0]
        heads.append([share(result[:, head]).mean().item() for head in range(4)])
        post = cache[f"blocks.{layer}.mlp.hook_post"][:, 0]
        neurons.append([share(post[:, n, None] * block.mlp.W_out[n]).mean().item() for n in range(40)])
        pattern, v = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, 0], cache[f"blocks.{layer}.attn.hook_v"]
        writes = pattern.transpose(1, 2)[..., None] * torch.einsum("bkhd,hdm->bkhm", v, block.attn.W_O)
        by_token.append([[share(writes[:, key, head]) for key in range(v.shape[1])] for head in range(4)])
    return np.array(heads), np.array(neurons), by_token


def test_heads_neurons_and_keys_are_those_written_out():
    vit = build("full").double()
    batch = images(vit, 3).double()
    norms = rl.find_outliers(vit, batch, layer="embed").norms
    outliers = rl.find_outliers(vit, batch, layer="embed", threshold=float(norms.quantile(0.8)))
    mask = outliers.mask
    assert mask.any(1).all() and mask.sum() < 9
    with torch.no_grad():
        heads, neurons, by_token = by_hand(vit, batch, vit.head.linear.weight[2])
        found = direct_contributions(vit, batch, 2, detection=outliers.detection, batch_size=2)
    np.testing.assert_allclose(found.heads, heads, atol=1e-11)
    np.testing.assert_allclose(found.neurons, neurons, atol=1e-11)
    layout = vit.layout(batch)
    for layer in range(3):
        for head in range(4):
            each = torch.stack(by_token[layer][head])  # key batch
            patches = each[layout.patches]
            expected = {
                "[CLS]": each[0].mean(),
                "other prefix tokens": each[1].mean(),
                "trained registers": each[layout.trained_registers].sum(0).mean(),
                "outliers": torch.where(mask.T, patches, 0.0).sum(0).mean(),
                "other patches": torch.where(mask.T, 0.0, patches).sum(0).mean(),
            }
            for kind, value in expected.items():
                assert found.by_key[KEYS.index(kind), layer, head] == pytest.approx(value.item(), abs=1e-11)
    table = found.to_dataframe()
    assert table["contribution"].sum() == pytest.approx(found.value, abs=1e-10)
    assert len(table) == 3 * 4 + 3 * 40 + 3 + 3 + 4
    top = found.top(3)
    sizes = np.sort(np.abs(np.concatenate([heads.ravel(), neurons.ravel()])))[::-1]
    np.testing.assert_allclose(np.abs(top["contribution"]), sizes[:3], atol=1e-11)
    one = table[(table["component"] == "neuron") & (table["layer"] == 1) & (table["index"] == 7)].iloc[0]
    assert one["contribution"] == pytest.approx(neurons[1, 7]) and one["standard_error"] == found.neurons_error[1, 7]


def test_edits_count_as_keys_of_their_own_and_what_writes_past_the_components_is_left_over():
    vit = build("full").double()
    batch = images(vit, 3).double()
    neurons = rl.RegisterNeurons.from_pairs([(0, 3), (1, 5)])
    detection = detection_of(vit, batch)
    with vit.edit(rl.TestTimeRegisters(neurons)):
        register = direct_contributions(vit, batch, 1, detection=detection)
    assert np.abs(register.by_key[KEYS.index("test-time registers")]).max() > 1e-4
    assert register.largest_remainder < 1e-9
    bias = rl.AttentionBias.fit(vit, batch, neurons)
    with vit.edit(bias):
        biased = direct_contributions(vit, batch, 1, detection=detection)
    assert np.abs(biased.by_key[KEYS.index("keys without a token")]).max() > 1e-4
    assert biased.largest_remainder < 1e-9
    np.testing.assert_allclose(biased.by_key.sum(0), biased.heads, atol=1e-12)
    with vit.edit(rl.Ablate(rl.Tokens(1, "cls"))):
        past = direct_contributions(vit, batch, 1, detection=detection)
    assert past.largest_remainder > 1e-2 and "left over" in past.describe()


def test_directions_of_tokens_are_read_at_cls_or_the_mean_patch_also_where_a_head_pools_by_attention():
    for name in ("full", "attention-pooled"):
        vit = build(name).double()
        batch = images(vit, 2).double()
        direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            tokens = vit(batch, return_type="tokens")
        token = tokens[:, 0] if vit.cfg.class_token else tokens[:, vit.layout(batch).patches].mean(1)
        found = direct_contributions(vit, batch, direction, detection=detection_of(vit, batch))
        assert found.value == pytest.approx((token @ direction.double()).mean().item())
        assert found.largest_remainder < 1e-9
        assert found.direction.endswith("[CLS]" if vit.cfg.class_token else "the mean patch")


def test_in_float32_and_half_precision_rounding_is_reported():
    vit = build("full")
    batch = images(vit, 2)
    detection = detection_of(vit, batch)
    assert direct_contributions(vit, batch, 0, detection=detection).largest_remainder < 1e-4
    half = build("full").to(torch.bfloat16)
    rounded = direct_contributions(half, batch.bfloat16(), 0, detection=detection).largest_remainder
    assert 1e-4 < rounded < 0.5


@pytest.mark.slow
def test_planted_outliers_write_nothing_into_the_output_but_draw_attention():
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=3, d_mlp=40, image_size=(64, 64), patch_size=(8, 8), d_out=5)
    plain = randomise(rl.HookedViT(cfg), std=0.15)
    size = {}
    for violation in (0.0, 1.0):
        vit, truth = rl.plant_register_neurons(plain, layer=1, n=2, violation=violation)
        batch = truth.calibration[truth.fires.any(0).any(1)][:8]
        detection = rl.find_outliers(vit, batch, layer=1).detection
        found = direct_contributions(vit, batch, 1, detection=detection)
        listed = {n for _, n in truth.neurons.pairs}
        assert np.abs(found.neurons[1, sorted(listed)]).max() < 1e-4 or violation
        size[violation] = np.abs(found.by_key[KEYS.index("outliers"), 2:]).sum()
    assert size[1.0] > 3 * size[0.0]


def test_the_result_is_drawn_and_goes_through_files(tmp_path):
    vit = build("full")
    batch = images(vit, 3)
    found = direct_contributions(vit, batch, 1, detection=detection_of(vit, batch))
    again = DirectContributions.load(found.save(tmp_path))
    assert again.describe() == found.describe() and again.to_dataframe().equals(found.to_dataframe())
    assert "By what heads attend to" in found.describe() and "Class 1 at [CLS]" in found.describe()
    for mode in ("light", "dark"):
        figure = direct_figure(found, mode)
        drawn = sum(np.array(bars.y) for bars in figure.data[:-1])
        expected = found.heads.sum(1) + found.neurons.sum(1) + found.attn_bias + found.mlp_bias
        np.testing.assert_allclose(drawn, expected, atol=1e-5)


BAD = [
    (build("full"), 5, {}, ShapeError, "Class 5 does not exist"),
    (build("full"), torch.ones(7), {}, ShapeError, "7 numbers does not fit"),
    (build("full"), torch.ones(5), dict(space="tokens"), ShapeError, "does not fit space='tokens'"),
    (build("full", d_out=None, head_act=None), 0, {}, ConfigError, "this model has no head. Give a direction"),
    (build("attention-pooled"), 0, {}, ConfigError, "pools by attention"),
]


@pytest.mark.parametrize(("vit", "direction", "options", "error", "words"), BAD)
def test_bad_input_is_told(vit, direction, options, error, words):
    with pytest.raises(error, match=words):
        direct_contributions(vit, images(vit, 2), direction, **options)


def test_no_image_is_told():
    vit = build("full")
    with pytest.raises(ImageError, match="No image"):
        direct_contributions(vit, images(vit, 2)[:0], 0, detection=detection_of(vit, images(vit, 2)))

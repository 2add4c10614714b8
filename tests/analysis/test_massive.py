"""Massive activations on streams made by hand, and against whole caches in float64."""

import numpy as np
import pytest
import torch
from helpers import randomise
from scipy.stats import kurtosis as scipy_kurtosis

import registerlens as rl
from registerlens.analysis.massive import KINDS, MassiveActivations, massive_activations
from registerlens.errors import ConfigError, ImageError, NonFiniteError

CFG = rl.ViTConfig(
    n_layers=3, d_model=32, n_heads=4, d_mlp=40, image_size=(24, 32), patch_size=(8, 8), n_trained_registers=2
)


def model(seed=0):
    return randomise(rl.HookedViT(CFG), seed)


def images(n=5, seed=0):
    return torch.randn(n, 3, 24, 32, generator=torch.Generator().manual_seed(seed))


def with_stream(vit, made):
    """Hooks that put made(layer, stream) after each block; layer -1 is what enters block 0."""

    def after(x, hook):
        return made(hook.layer(), x)

    return vit.hooks([("blocks.0.hook_resid_pre", lambda x, hook: made(-1, x)), ("blocks.*.hook_resid_post", after)])


def test_a_stream_made_by_hand_is_counted_entry_by_entry():
    """Median 0.5 everywhere; at block 1 the first image has 600 in a patch and -700 in [CLS], the second 499."""

    def made(layer, x):
        x = torch.full_like(x, 0.5) * torch.where(torch.arange(x.shape[2]) % 2 == 0, 1.0, -1.0)
        if layer == 1:
            x[0, 7, 3], x[0, 0, 3], x[1, 9, 5] = 600.0, -700.0, 499.0
        return x

    vit = model()
    with with_stream(vit, made):
        found = massive_activations(vit, images(2))
    assert found.places == ("embed", "0.mlp", "1.mlp", "2.mlp")
    np.testing.assert_allclose(found.largest, [0.5, 0.5, (700 + 499) / 2, 0.5])
    np.testing.assert_allclose(found.median, 0.5)
    np.testing.assert_allclose(found.ratio, [1, 1, (1400 + 998) / 2, 1])
    np.testing.assert_allclose(found.per_image, [0, 0, 1.0, 0])  # two in the first; 499 is below 1000 x the median
    np.testing.assert_allclose(found.share_of_images, [0, 0, 0.5, 0])
    assert dict(zip(KINDS, found.tokens[2], strict=True)) == {
        "prefix": 0.5,
        "trained_registers": 0,
        "patches": 0.5,
        "test_time_registers": 0,
    }
    assert found.channels[2].nonzero()[0].tolist() == [3] and found.channels[2, 3] == 1
    assert found.top_channels[2, :2].tolist() == [3, 5]
    assert found.to_dataframe().loc[2, "channel_1_largest"] == (700 + 0.5) / 2
    assert "from 1.mlp to 1.mlp" in found.describe() and "0.50 prefix and 0.50 patches" in found.describe()


def test_both_parts_of_the_definition_count():
    for value, scale, expected in ((99.0, 1e-3, 0), (101.0, 1e-3, 1), (101.0, 1.0, 0), (1001.0, 1.0, 1)):

        def made(layer, x, value=value, scale=scale):
            x = torch.full_like(x, scale)
            x[:, 4, 2] = value
            return x

        vit = model()
        with with_stream(vit, made):
            assert (massive_activations(vit, images(1)).per_image == expected).all(), (value, scale)


def test_companions_equal_whole_caches_in_float64():
    vit = model(1)
    x = images(5)
    found = massive_activations(vit, x, batch_size=2)
    expected = {name: np.zeros(4) for name in ("largest", "median", "ratio", "kurtosis", "typical_kurtosis")}
    by_channel = np.zeros((4, 32))
    for image in x:
        with torch.no_grad():
            _, cache = vit.run_with_cache(image[None])
        names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(3))]
        for place, name in enumerate(names):
            stream = cache[name][0].double().numpy()
            size = np.abs(stream)
            middle = np.sort(size.ravel())[(size.size - 1) // 2]
            peaked = scipy_kurtosis(stream, axis=1, fisher=False)
            values = (size.max(), middle, size.max() / middle, peaked.max(), peaked.mean())
            for total, value in zip(expected.values(), values, strict=True):
                total[place] += value / len(x)
            by_channel[place] += size.max(0) / len(x)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(found.channel_largest, by_channel, rtol=1e-5)
    assert (found.top_channels == np.argsort(-by_channel, 1)[:, :3]).all()


def test_batching_changes_nothing():
    vit, x = model(2), images(7)
    one, other = massive_activations(vit, x, batch_size=1), massive_activations(vit, [x[:4], x[4:]])
    for name in ("largest", "ratio", "kurtosis", "channel_largest", "tokens"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5)
    assert one.n_images == other.n_images == 7


def test_companions_do_not_know_the_scale_of_the_stream_but_the_definition_does():
    """A pre-LayerNorm model whose stream is 1000 times as large is the same model."""
    vit = model(3)
    x = images(4)
    before, out = massive_activations(vit, x), vit(x)
    with torch.no_grad():
        for part in (vit.embed.patch, *(w for b in vit.blocks for w in (b.attn.out, b.mlp.out))):
            part.weight.mul_(1000)
            part.bias.mul_(1000)
        vit.embed.prefix.mul_(1000)
        vit.embed.W_pos.mul_(1000)
    torch.testing.assert_close(vit(x), out, rtol=1e-3, atol=1e-3)
    after = massive_activations(vit, x)
    for name in ("ratio", "kurtosis", "typical_kurtosis"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), rtol=1e-3)
    np.testing.assert_allclose(after.largest, 1000 * before.largest, rtol=1e-3)


def test_a_model_without_any_says_so_and_names_the_strongest_channels():
    found = massive_activations(model(6), images(2))
    assert found.per_image.max() == 0 and found.describe().startswith("No activation is massive")
    assert ", ".join(map(str, found.top_channels[found.ratio.argmax()])) in found.describe()


def test_saved_loaded_and_damaged(tmp_path):
    vit = model(4)
    found = massive_activations(vit, images(2))
    back = MassiveActivations.load(found.save(tmp_path))
    assert back.describe() == found.describe() and back.to_dataframe().equals(found.to_dataframe())
    assert back.config == CFG and back.places == found.places
    (tmp_path / "arrays.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="damaged"):
        MassiveActivations.load(tmp_path)
    (tmp_path / "result.json").write_text('{"values": {"modell": 1}}')
    with pytest.raises(ConfigError):
        MassiveActivations.load(tmp_path)


def test_bad_input_is_named():
    vit = model(5)
    with pytest.raises(ImageError, match="No image"):
        massive_activations(vit, torch.zeros(0, 3, 24, 32))

    def broken(layer, x):
        return torch.full_like(x, float("inf")) if layer == 1 else x

    with with_stream(vit, broken), pytest.raises(NonFiniteError, match=r"NaN or infinite at 1\.mlp"):
        massive_activations(vit, images(1))
    with torch.no_grad():
        vit.blocks[2].mlp.out.bias[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2\.mlp"):
        massive_activations(vit, images(1))

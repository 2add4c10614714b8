"""The share of outliers' key scores along a direction: taken out of the keys by hand, and on a planted model."""

import numpy as np
import pytest
import torch
from helpers import randomise
from small_vits import build, images

import registerlens as rl
from registerlens.circuits.key_share import KeyShare, key_share
from registerlens.errors import ConfigError, ImageError, NoOutliersError
from registerlens.model.attention import final_point
from registerlens.viz.heads import key_share_figure

CFG = rl.ViTConfig(n_layers=4, d_model=48, n_heads=3, d_mlp=40, image_size=(64, 64), patch_size=(8, 8), d_out=5)


@pytest.fixture(scope="module")
def planted():
    vit, truth = rl.plant_register_neurons(randomise(rl.HookedViT(CFG), std=0.15), layer=1, n=2)
    batch = truth.calibration[truth.fires.any(0).any(1)][:6]
    return vit, truth, batch, rl.find_outliers(vit, batch, layer=1)


def scores_of(vit, batch, layer, change=None):
    """Scores of [CLS] (or the mean query), with something taken out of the keys' input and all scales as they were."""
    _, clean = vit.run_with_cache(batch, names_filter="*")
    name = f"blocks.{layer}"
    q, k = (f"{name}.attn.{final_point(vit.cfg, kind)}" for kind in "qk")
    kept = {}
    if change is None:
        keys = clean[k]
    else:
        block = vit.blocks[layer]
        part = change / clean[f"{name}.ln1.hook_scale"] * block.ln1.w
        hooks = [
            (f"{name}.attn.hook_k", lambda x, hook: x - torch.einsum("bpm,hmd->bphd", part, block.attn.W_K)),
            (k, lambda x, hook: kept.update(k=x)),
        ]
        if vit.cfg.qk_norm is not None:
            scale = f"{name}.attn.k_norm.norm.hook_scale"
            hooks.append((scale, lambda x, hook: clean[scale]))
        with vit.hooks(hooks):
            vit(batch)
        keys = kept["k"]
    layout = vit.layout(batch)
    query = clean[q].mean(1) if layout.cls is None else clean[q][:, layout.cls]
    return torch.einsum("bphd,bhd->bhp", keys[:, layout.patches], query) / vit.cfg.d_head**0.5


@pytest.mark.parametrize("name", ["full", "rotary", "attention-pooled"])
def test_it_is_what_goes_when_the_direction_is_taken_out_of_the_keys(name):
    vit = build(name).double()
    batch = images(vit, 3).double()
    norms = rl.find_outliers(vit, batch, layer="embed").norms
    found = rl.find_outliers(vit, batch, layer="embed", threshold=float(norms.quantile(0.8)))
    present = rl.find_outliers(*_tiny()).detection
    detection = type(present)(**{**vars(found.detection), "evidence": present.evidence})  # called present by force
    u = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    got = key_share(vit, batch, u, detection=detection, n_null=20, batch_size=2)
    unit = u - u.mean() if vit.cfg.norm == "layer" else u
    unit = unit / unit.norm()
    mask = found.mask
    with torch.no_grad():
        _, clean = vit.run_with_cache(batch)
        for layer in (0, 2):
            part = (clean[f"blocks.{layer}.hook_resid_pre"] @ unit)[..., None] * unit
            whole, less = scores_of(vit, batch, layer), scores_of(vit, batch, layer, part)
            advantage, rest = (
                torch.stack([(s[i][:, mask[i]].mean(1) - s[i][:, ~mask[i]].mean(1)) for i in range(3) if mask[i].any()])
                for s in (whole, less)
            )
            np.testing.assert_allclose(got.advantage[layer], advantage.mean(0), atol=1e-10)
            np.testing.assert_allclose(got.along[layer], (advantage - rest).mean(0), atol=1e-10)


def _tiny():
    from registerlens.data.synthetic import synthetic_images

    return rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images


@pytest.mark.slow
def test_planted_heads_prefer_outliers_for_what_was_planted(planted, tmp_path):
    vit, truth, batch, outliers = planted
    found = key_share(vit, batch, truth.neurons, detection=outliers.detection, n_null=50)
    assert np.isnan(found.along[:2]).all()
    for pair in truth.sink_heads:
        assert found.advantage[pair] > 3 and found.share[pair] == pytest.approx(1, abs=0.2)
        assert found.along[pair] > found.null[pair]
    assert found.n_used == len(batch) and "share of it along what 2 register neurons" in found.describe()
    again = KeyShare.load(found.save(tmp_path))
    assert again.describe() == found.describe() and again.to_dataframe().equals(found.to_dataframe())
    for mode in ("light", "dark"):
        np.testing.assert_allclose(np.array(key_share_figure(found, mode).data[1].z), found.along)


@pytest.mark.slow
def test_bad_input_is_told(planted):
    vit, truth, batch, outliers = planted
    with pytest.raises(ConfigError, match="at least 20"):
        key_share(vit, batch, truth.neurons, detection=outliers.detection, n_null=3)
    with pytest.raises(ImageError, match="No image came"):
        key_share(vit, batch[:0], truth.neurons, detection=outliers.detection)
    plain = build("full")
    with pytest.raises(NoOutliersError, match="keys"):
        key_share(plain, images(plain, 2), torch.randn(32))

"""Attribution patching: derivatives by central differences, exact where the model is linear, complete along the way."""

import numpy as np
import pytest
import torch
from small_vits import build, images

from registerlens.circuits.attribution_patching import attribution_patching
from registerlens.circuits.attributions import Attributions
from registerlens.circuits.paths import path_patching
from registerlens.circuits.sites import Site
from registerlens.errors import ConfigError, HookNameError, ImageError, ShapeError
from registerlens.viz.patching import attributions_figure


def metric(edited, clean):
    return edited.output.flatten(1)[:, 2].sin() + edited.output.flatten(1)[:, 4] ** 2


def pair_of(vit, n=3):
    return images(vit, n, seed=1).to(vit.dtype), images(vit, n, seed=2).to(vit.dtype)


POINTS = {
    "full": ["blocks.1.attn.hook_z", "blocks.0.mlp.hook_post", "hook_pos_embed", "hook_embed", "ln_final.hook_scale"],
    "plain": ["blocks.1.attn.hook_pattern", "blocks.2.attn.hook_result", "blocks.0.hook_resid_mid"],
    "rotary": ["blocks.1.attn.hook_rot_k", "blocks.2.mlp.hook_pre_linear", "blocks.0.attn.q_norm.norm.hook_normalized"],
    "attention-pooled": ["blocks.2.attn.k_norm.hook_normalized", "head.attn.hook_v", "head.attn.mlp.hook_post"],
}


@pytest.mark.parametrize("model", POINTS)
def test_to_first_order_they_are_derivatives_along_the_change(model):
    vit = build(model).double()
    clean, corrupted = pair_of(vit)
    found = attribution_patching(vit, clean, corrupted, POINTS[model], metric=metric, exact=0, sample=0, batch_size=2)
    assert sorted(found.names) == sorted(POINTS[model])
    with torch.no_grad():
        was, sent = (vit.run_with_cache(batch, names_filter="*")[1] for batch in (clean, corrupted))
        starts = np.cumsum([0, *found.n_units])
        for i, name in enumerate(found.names):
            change = sent[name] - was[name]
            by_head = name.endswith("pattern")
            axis = 1 if by_head else 2 if found.kinds[i] == "head" else change.ndim - 1
            for unit in {0, found.n_units[i] - 1}:
                one = torch.zeros_like(change)
                one.select(axis, unit).copy_(change.select(axis, unit))
                values = []
                for share in (1e-5, -1e-5):
                    with vit.hooks([(name, lambda x, hook, share=share, one=one: x + share * one)]):
                        output = vit(clean).flatten(1)
                    values.append(output[:, 2].sin() + output[:, 4] ** 2)
                slope = ((values[0] - values[1]) / 2e-5).mean().item()
                assert found.by_unit[starts[i] + unit] == pytest.approx(slope, rel=1e-5, abs=1e-9)
    summed = np.nansum(found.by_position, 1)
    for i, name in enumerate(found.names):
        if not name.startswith("head.attn.mlp"):
            assert summed[i] == pytest.approx(found.by_name[i], abs=1e-10)


def test_where_what_follows_is_linear_they_are_exact():
    vit = build("full", pooling=("cls",), d_out=None, head_act=None, final_norm=False).double()
    clean, corrupted = pair_of(vit)
    found = attribution_patching(
        vit, clean, corrupted, ["blocks.2.mlp.hook_post", "blocks.2.hook_mlp_out"], metric=lambda e, c: e.output[:, 3]
    )
    np.testing.assert_allclose(found.by_unit[found.checked], found.exact, atol=1e-12)
    np.testing.assert_allclose(found.by_name, found.whole, atol=1e-12)
    assert found.on_sample.rho > 0.999 and found.on_candidates.rho > 0.999
    assert "poor" not in found.trust()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["full", "rotary"])
def test_along_the_way_they_add_up_to_patching_the_whole_point(model):
    vit = build(model).double()
    clean, corrupted = pair_of(vit)
    names = ["blocks.1.attn.hook_q", "blocks.1.mlp.hook_post", "hook_embed"]
    found = attribution_patching(vit, clean, corrupted, names, metric=metric, steps=64, exact=2, sample=2)
    once = attribution_patching(vit, clean, corrupted, names, metric=metric, exact=0, sample=0)
    for i, name in enumerate(found.names):
        exact = path_patching(vit, clean, corrupted, name, metric=metric).together.mean()
        assert found.whole[i] == pytest.approx(exact, abs=1e-10)
        assert found.by_name[i] == pytest.approx(exact, rel=1e-6)
    assert np.abs(once.by_name - once.whole).max() > 10 * np.abs(found.by_name - found.whole).max()


@pytest.mark.slow
def test_units_are_patched_exactly_one_at_a_time_and_positions_can_be_chosen():
    vit = build("full").double()
    clean, corrupted = pair_of(vit)
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    for positions in (None, "cls", mask):
        found = attribution_patching(
            vit, clean, corrupted, ["blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"], metric=metric,
            positions=positions, exact=3, sample=3, batch_size=2, seed=1,
        )  # fmt: skip
        assert len(found.checked) == 6 and found.is_candidate.sum() == 3 and len(set(found.checked)) == 6
        assert set(found.checked[:3]) == set(np.argsort(-np.abs(found.by_unit))[:3])
        for unit, exact in zip(found.checked, found.exact, strict=True):
            name, axis, index = ("blocks.0.attn.hook_z", "heads", unit) if unit < 4 else (
                "blocks.1.mlp.hook_post", "neurons", unit - 4
            )  # fmt: skip
            site = Site(name, positions=positions, **{axis: int(index)})
            expected = path_patching(vit, clean, corrupted, site, metric=metric).together.mean()
            assert exact == pytest.approx(expected, abs=1e-11)
    table = found.to_dataframe()
    assert table["exact"].notna().sum() == 6 and list(table["kind"].unique()) == ["head", "neuron"]
    assert "patches of each image" in found.describe()


def test_the_result_says_whether_to_trust_it_and_goes_through_files(tmp_path):
    vit = build("full")
    clean, corrupted = pair_of(vit, 4)
    found = attribution_patching(vit, clean, corrupted, "blocks.*.mlp.hook_post", metric=metric)
    assert "Spearman's rank correlation with exact patching" in found.describe()
    assert "furthest off" in found.describe()
    again = Attributions.load(found.save(tmp_path))
    assert again.describe() == found.describe() and again.to_dataframe().equals(found.to_dataframe())
    for mode in ("light", "dark"):
        assert len(attributions_figure(found, mode).data) == 5
    none = attribution_patching(vit, clean, corrupted, "hook_embed", metric=metric, exact=0, sample=0)
    assert "No unit was patched exactly" in none.describe() and len(none.plot().data) == 2
    wrong = Attributions(**{**vars(found), "exact": -found.exact})
    assert "That is poor on a random sample and the largest: raise steps=" in wrong.trust()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in vit.parameters())


BAD = [
    (dict(metric=lambda e, c: (e.output - c.output).square().flatten(1).sum(1)), ConfigError, "First order cannot see"),
    (dict(metric=lambda e, c: e.output.detach().flatten(1).sum(1)), ConfigError, "not differentiable"),
    (dict(metric=lambda e, c: e.output), ShapeError, "one number for each image"),
    (dict(names="blocks.0.attn.hook_zz"), HookNameError, "Did you mean"),
    (dict(steps=0), ConfigError, "steps must be at least 1"),
    (dict(corrupted=torch.randn(2, 3, 24, 32)), ShapeError, "3 clean and 2 corrupted"),
    (dict(positions="test_time_registers"), ShapeError, "no tokens"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_input_is_told(options, error, words):
    vit = build("full")
    clean, corrupted = pair_of(vit)
    options = {
        "names": "blocks.1.attn.hook_z",
        "metric": metric,
        "corrupted": corrupted,
        "exact": 4,
        "sample": 4,
    } | options
    with pytest.raises(error, match=words):
        attribution_patching(vit, clean, **options)


def test_distances_have_attributions_along_the_way():
    vit = build("full").double()
    clean, corrupted = pair_of(vit)

    def distance(e, c):
        return (e.output - c.output).square().flatten(1).sum(1)

    found = attribution_patching(
        vit, clean, corrupted, "blocks.1.mlp.hook_post", metric=distance, steps=8, exact=0, sample=0
    )
    assert found.by_name[0] == pytest.approx(found.whole[0], rel=1e-3)


def test_images_of_several_sizes_are_refused_and_one_image_twice_too():
    vit = build("full")
    clean, corrupted = pair_of(vit)
    other = images(vit, 1, (32, 32), seed=3)
    with pytest.raises(ShapeError, match="must have one size"):
        attribution_patching(vit, [clean, other], [corrupted, other + 1], "blocks.1.mlp.hook_post", metric=metric)
    with pytest.raises(ImageError, match="one image twice"):
        attribution_patching(vit, clean, clean.clone(), "blocks.1.mlp.hook_post", metric=metric)

"""CKA against a second formula; the restricted [CLS] against attention recomputed by hand."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise

import registerlens as rl
from registerlens.analysis.faithfulness import CKASums, Faithfulness, faithfulness, linear_cka
from registerlens.errors import ConfigError, ImageError, ShapeError

CFG = rl.ViTConfig(
    n_layers=3,
    d_model=16,
    n_heads=2,
    d_mlp=24,
    image_size=(24, 32),
    patch_size=(8, 8),
    n_trained_registers=2,
    layer_scale=True,
    d_out=5,
)
LOUD = 100.0
"""A norm of the embedding between those of noise (up to 18) and of loud noise (from 297)."""
NEURONS = rl.RegisterNeurons.from_pairs([(0, 1), (1, 2)])


def model(cfg=CFG, seed=0):
    return randomise(rl.HookedViT(cfg), seed)


def noise(n, seed=0, size=(24, 32)):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def loud_at(mask):
    """Noise with loud patches, which the embedding's norms give away."""
    loud = mask.unflatten(1, (3, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return noise(len(mask)) * torch.where(loud, 30.0, 1.0)[:, None]


# CKA -----------------------------------------------------------------------------------------------------------------


def hsic_cka(x, y):
    """By kernels and centring matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC(K, L) = tr(K H L H)."""
    n = len(x)
    H = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    K, L = (z.double() @ z.double().T for z in (x, y))
    hsic = lambda a, b: torch.trace(a @ H @ b @ H)  # noqa: E731
    return float(hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt())


@pytest.mark.parametrize("n, p, q", [(30, 4, 7), (5, 12, 3), (2, 3, 3), (60, 1, 1)])
def test_cka_equals_the_kernel_formula(n, p, q):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, p, generator=generator) + 100
    y = torch.randn(n, q, generator=generator) * 3 + x[:, :1]
    assert linear_cka(x, y) == pytest.approx(hsic_cka(x, y), rel=1e-9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), rel=1e-9)


def test_cka_ignores_rotation_scale_and_shift_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert linear_cka(x, 5 * x @ Q - 3) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, x * torch.tensor([9.0, 1, 1, 1, 1, 1])) < 0.9
    assert linear_cka(torch.randn(4000, 3, generator=generator), torch.randn(4000, 3, generator=generator)) < 0.01
    assert np.isnan(linear_cka(x, torch.ones(40, 2))) and np.isnan(linear_cka(x[:1], x[:1]))
    with pytest.raises(ShapeError, match="40 and 39"):
        linear_cka(x, x[1:])


def test_cka_of_a_stream_equals_cka_at_once():
    """Also with a large mean and a first batch far from it."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(33, 5, generator=generator) + 1e4, torch.randn(33, 4, generator=generator) - 1e3
    y[:, 0] += x[:, 0] - 1e4
    x[:2] += 5
    sums = CKASums()
    for a, b in zip(x.split(2), y.split(2), strict=True):
        sums.add(a, b)
    assert sums.result() == pytest.approx(hsic_cka(x - x.mean(0), y - y.mean(0)), rel=1e-6)


# Restricting [CLS] ---------------------------------------------------------------------------------------------------


def by_hand(vit, image, keys):
    """[CLS] output and update with its last attention over `keys` alone, from weights, without hooks on attention."""
    last = vit.blocks[-1]
    attn = last.attn
    with torch.no_grad():
        resid = vit(image, stop_at_layer=vit.cfg.n_layers - 1)
        x = last.ln1(resid)[0]
        q, k, v = (x @ W + b[:, None] for W, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V)))
        weights = torch.einsum("hd,hkd->hk", q[:, 0], k[:, keys])
        weights = (weights / vit.cfg.d_head**0.5).softmax(-1)
        update = torch.einsum("hk,hkd,hdm->m", weights, v[:, keys], attn.W_O) + attn.b_O
        cls = resid[0, 0] + update
        cls = cls + last.mlp(last.ln2(cls[None, None]))[0, 0]
        full = torch.einsum("hd,hkd->hk", q[:, 0], k).div(vit.cfg.d_head**0.5).softmax(-1)[:, keys].sum(-1).mean()
        return vit.ln_final(cls[None])[0], update, full.item()


def test_every_restriction_equals_attention_by_hand():
    vit = model()
    mask = torch.zeros(6, 12, dtype=torch.bool)
    mask[[0, 2, 2, 5], [3, 0, 7, 11]] = True  # images 1, 3 and 4 have none
    images = loud_at(mask)
    outliers = rl.find_outliers(vit, images, layer="embed", threshold=LOUD)
    assert torch.equal(outliers.mask, mask)
    found = faithfulness(vit, images, detection=outliers.detection, batch_size=4)
    layout = vit.layout(images)
    patches = range(layout.patches.start, layout.patches.stop)
    keys = {
        "patches": lambda i: list(patches),
        "normal_patches": lambda i: [p for p in patches if not mask[i, p - layout.patches.start]],
        "outliers": lambda i: [p for p in patches if mask[i, p - layout.patches.start]],
        "trained_registers": lambda i: [1, 2],
        "cls": lambda i: [0],
    }
    assert found.restrictions == tuple(keys)
    assert found.n_images.tolist() == [6, 6, 3, 6, 6]
    for at, (name, choose) in enumerate(keys.items()):
        chosen = [i for i in range(6) if choose(i)]
        full = [by_hand(vit, images[i : i + 1], list(range(layout.n_tokens))) for i in chosen]
        some = [by_hand(vit, images[i : i + 1], choose(i)) for i in chosen]
        for column, field, cka in ((0, found.cosine, found.cka), (1, found.update_cosine, found.update_cka)):
            a, b = (torch.stack([row[column] for row in rows]) for rows in (some, full))
            assert field[at] == pytest.approx(F.cosine_similarity(a, b).mean().item(), abs=1e-5), name
            assert cka[at] == pytest.approx(hsic_cka(a, b), abs=1e-4), name
        assert found.attention[at] == pytest.approx(np.mean([row[2] for row in some]), abs=1e-5), name


def test_test_time_registers_are_there_while_they_are_in_force():
    vit, images = model(), noise(5)
    with vit.edit(rl.TestTimeRegisters(NEURONS, n=2)):
        found = faithfulness(vit, images, batch_size=2)
        at = found.restrictions.index("test_time_registers")
        keys = list(range(15, 17))
        some = [by_hand(vit, image, keys) for image in images.split(1)]
        full = [by_hand(vit, image, list(range(17))) for image in images.split(1)]
    a, b = (torch.stack([row[0] for row in rows]) for rows in (some, full))
    assert found.cosine[at] == pytest.approx(F.cosine_similarity(a, b).mean().item(), abs=1e-5)
    assert found.attention[at] == pytest.approx(np.mean([row[2] for row in some]), abs=1e-5)


def test_the_whole_sequence_would_give_everything_back():
    """[CLS], registers and patches share out all of its attention."""
    vit, images = model(), noise(3)
    found = faithfulness(vit, images)
    assert found.attention.sum() == pytest.approx(1, abs=1e-5)
    assert (found.cosine <= 1 + 1e-6).all() and (found.cosine < 0.9999).any()


def test_result_comes_back_from_disk_and_becomes_table_and_figure(tmp_path):
    found = faithfulness(model(), noise(4))
    again = Faithfulness.load(found.save(tmp_path))
    for name in ("n_images", "attention", "cosine", "update_cosine", "cka", "update_cka"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert (again.restrictions, again.model, again.config) == (found.restrictions, found.model, found.config)
    table = found.to_dataframe().set_index("restriction")
    assert table.loc["cls", "cka"] == found.cka[-1]
    np.testing.assert_array_equal(found.plot().data[1].y, found.cka)
    assert "fewer images than the 16 dimensions" in found.describe()


def test_bad_input_is_refused():
    vit, images = model(), noise(3)
    without = model(dataclasses.replace(CFG, class_token=False, pooling=("mean",)))
    with pytest.raises(ConfigError, match=r"has no \[CLS\].*sink_no_op"):
        faithfulness(without, images)
    with pytest.raises(ImageError, match="No image"):
        faithfulness(vit, images[:0])

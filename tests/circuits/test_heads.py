"""Circuits of heads: eigenvalues of the full matrices, scores of real tokens, and heads whose answer is known."""

import numpy as np
import pytest
import torch
from helpers import randomise
from small_vits import build, images

import registerlens as rl
from registerlens.circuits.heads import QUANTITIES, HeadCircuits, head_circuits
from registerlens.errors import ConfigError, InterventionError, NonFiniteError, ShapeError
from registerlens.viz.heads import heads_figure


def centring(vit):
    n = vit.cfg.d_model
    return torch.eye(n).double() - (1 / n if vit.cfg.norm == "layer" else 0)


def full_matrices(vit, layer, head):
    """W_Q W_K^T / sqrt(d_head) and W_V W_O as d_model x d_model matrices, everything folded by plain products."""
    block = vit.blocks[layer]
    attn, P, d = block.attn, centring(vit), vit.cfg.d_head
    read = P @ torch.diag(block.ln1.w.double())
    Q, K, V = (read @ w[head].double() for w in (attn.W_Q, attn.W_K, attn.W_V))
    if attn.q_norm is not None:
        together = attn.q_norm.together > 1
        C = torch.eye(d).double() - (1 / d if type(attn.q_norm.norm).__name__ == "LayerNorm" else 0)
        for norm, name in ((attn.q_norm, "Q"), (attn.k_norm, "K")):
            w = norm.norm.w.double()
            w = w[head * d : (head + 1) * d] if together else w
            Q, K = (Q @ C * w, K) if name == "Q" else (Q, K @ C * w)
    out = attn.W_O.double().flatten(0, 1)
    if attn.ln is not None:
        n = len(out)
        C = torch.eye(n).double() - (1 / n if vit.cfg.norm == "layer" else 0)
        out = C @ torch.diag(attn.ln.w.double()) @ out
    return Q @ K.T / d**0.5, V @ out[head * d : (head + 1) * d]


@pytest.mark.parametrize("name", ["full", "plain", "rotary", "attention-pooled"])
def test_eigenvalues_are_those_of_the_full_matrices(name):
    vit = build(name)
    found = head_circuits(vit)
    d = vit.cfg.d_head
    with torch.no_grad():
        for layer, head in ((0, 0), (2, 3)):
            for got, full in zip(
                (found.qk_eigenvalues, found.ov_eigenvalues), full_matrices(vit, layer, head), strict=True
            ):
                values = torch.linalg.eigvals(full)
                values = values[values.abs().argsort(descending=True)]
                assert values[d:].abs().max() < 1e-6 * values[0].abs()  # the others are zero
                mine = torch.from_numpy(got[layer, head])
                distance = (mine[:, None] - values[None, :d]).abs()
                assert distance.amin(0).max() < 1e-8 and distance.amin(1).max() < 1e-8
            score = torch.trace(full) / values.abs().sum()
            assert found.copying[layer, head] == pytest.approx(score.item(), abs=1e-8)
    assert not found.direction and np.isnan(found.observed).all()


def set_head(vit, layer, head, **weights):
    attn = vit.blocks[layer].attn
    with torch.no_grad():
        for name, value in weights.items():
            getattr(attn, name)[head] = value


def test_a_head_that_copies_scores_one_and_one_that_erases_minus_one():
    vit = build("plain", d_head=8)  # without LayerScale, whose W_O is no view
    P = centring(vit).float()
    with torch.no_grad():
        vit.blocks[1].ln1.w.fill_(1)
        basis = torch.linalg.qr(P @ torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))[0]
    for head, sign in ((0, 1.0), (2, -1.0)):
        set_head(vit, 1, head, W_V=basis, W_O=sign * basis.T, W_Q=basis, W_K=sign * basis)
    u = basis[:, 0]
    found = head_circuits(vit, u)
    for head, sign in ((0, 1.0), (2, -1.0)):
        assert found.copying[1, head] == pytest.approx(sign, abs=1e-6)
        assert found.matching[1, head] == pytest.approx(sign, abs=1e-6)
        assert found.value("ov_cosine")[1, head] == pytest.approx(sign, abs=1e-6)
        # all of u goes through, of a random direction 8 parts of 31
        assert found.value("ov_gain")[1, head] == pytest.approx((31 / 8) ** 0.5, rel=1e-5)
        assert found.value("key_gain")[1, head] == pytest.approx((31 / 8) ** 0.5, rel=1e-5)
        assert found.beyond_null("ov_gain")[1, head] == 1 and found.beyond_null("ov_cosine")[1, head] == sign
    assert abs(found.copying[0]).max() < 0.9


@pytest.mark.parametrize("name", ["full", "rotary"])
def test_the_query_bias_reads_a_dominated_token_as_the_model_does(name):
    """Tokens along +u and -u in the model itself: half the difference of their scores for a query of bias alone."""
    vit = build(name, qk_norm=None, rope=None, attn_norm=False).double()
    u = torch.randn(32, generator=torch.Generator().manual_seed(2)).double()
    found = head_circuits(vit, u)
    block = vit.blocks[1]
    # Constant tokens are normalised to the bias, where there is one.
    query = block.ln1(torch.ones(32).double()) if vit.cfg.norm == "layer" else torch.zeros(32).double()
    with torch.no_grad():
        tokens = torch.stack([1e6 * u, -1e6 * u])
        keys = block.ln1(tokens)
        for head in range(4):
            q = query @ block.attn.W_Q[head] + block.attn.b_Q[head]
            k = keys @ block.attn.W_K[head]
            score = (k @ q) / vit.cfg.d_head**0.5
            expected = (score[0] - score[1]) / 2
            assert found.value("query_reading")[1, head] == pytest.approx(expected.item(), rel=1e-6)
            written = (keys[0] - keys[1]) / 2 @ block.attn.W_V[head] @ block.attn.W_O[head]
            cosine = torch.cosine_similarity(written, u, dim=0)
            assert found.value("ov_cosine")[1, head] == pytest.approx(cosine.item(), abs=1e-8)


@pytest.mark.slow
def test_gains_are_one_in_the_root_mean_square_over_random_directions():
    vit = build("full")
    directions = torch.randn(400, 32, generator=torch.Generator().manual_seed(4))
    gains = np.stack([head_circuits(vit, u, n_null=20).observed[[0, 2], 1] for u in directions[:30]])
    np.testing.assert_allclose((gains**2).mean(0) ** 0.5, 1, atol=0.2)
    found = head_circuits(vit, directions[0], n_null=400, seed=3)
    assert (found.null[..., 0] < found.null[..., 1]).all() and (found.null[..., 1] < found.null[..., 2]).all()
    beyond = np.mean(
        [np.abs(head_circuits(vit, u, n_null=200).beyond_null("key_gain")).mean() for u in directions[:20]]
    )
    assert 0.01 < beyond < 0.12  # 5% of random directions lie outside


@pytest.mark.slow
def test_planted_register_neurons_are_sought_by_the_planted_heads_and_silenced_by_all():
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=3, d_mlp=40, image_size=(64, 64), patch_size=(8, 8), d_out=5)
    vit, truth = rl.plant_register_neurons(randomise(rl.HookedViT(cfg), std=0.15), layer=1, n=2)
    found = head_circuits(vit, truth.neurons)
    reading = found.value("query_reading")
    assert np.isnan(reading[:2]).all() and np.isfinite(reading[2:]).all()  # earlier heads never meet it
    others = [(layer, head) for layer in (2, 3) for head in range(3) if (layer, head) not in truth.sink_heads]
    least = min(reading[pair] for pair in truth.sink_heads)
    assert least > 3 and least > 3 * max(abs(reading[pair]) for pair in others)
    assert all(found.beyond_null("query_reading")[pair] == 1 for pair in truth.sink_heads)
    assert found.value("ov_gain")[2:].max() < 1e-5
    again = head_circuits(vit, truth.direction)
    np.testing.assert_allclose(again.value("query_reading")[2:], reading[2:], rtol=1e-5)
    assert "register neurons" in found.describe() and "sought most by head" in found.describe()


def test_neurons_of_several_layers_add_up_as_layers_go_by():
    vit = build("full")
    found = head_circuits(vit, rl.RegisterNeurons.from_pairs([(0, 3), (1, 5)]), n_null=20)
    rows = [vit.blocks[0].mlp.W_out[3].detach(), vit.blocks[1].mlp.W_out[5].detach()]
    for layer, direction in ((1, rows[0]), (2, rows[0] + rows[1])):
        alone = head_circuits(vit, direction, n_null=20)
        np.testing.assert_allclose(found.observed[:, layer], alone.observed[:, layer], rtol=1e-5)


def test_a_layer_norm_over_all_heads_mixes_them_so_that_qk_is_unknown():
    vit = build("attention-pooled", qk_norm=rl.config_parts.QKNormConfig(kind="layer", over="all"))
    found = head_circuits(vit, torch.randn(32, generator=torch.Generator().manual_seed(0)))
    assert np.isnan(found.matching).all() and np.isfinite(found.copying).all()
    assert np.isnan(found.value("key_gain")).all() and np.isfinite(found.value("ov_gain")).all()
    assert "heads come after it" in found.describe()


def test_the_result_is_drawn_and_goes_through_files(tmp_path):
    vit = build("full")
    found = head_circuits(vit, torch.randn(32, generator=torch.Generator().manual_seed(0)))
    again = HeadCircuits.load(found.save(tmp_path))
    assert again.describe() == found.describe() and again.to_dataframe().equals(found.to_dataframe())
    assert len(found.to_dataframe()) == 12
    for mode in ("light", "dark"):
        figure = heads_figure(found, mode)
        np.testing.assert_allclose(np.array(figure.data[0].z), found.copying)
        rings = [trace for trace in figure.data if trace.type == "scatter"]
        expected = [int(np.abs(found.beyond_null(quantity)).sum()) for quantity in QUANTITIES]
        assert [len(ring.x) for ring in rings] == expected
    with pytest.raises(ConfigError, match="no quantity 'gain'"):
        found.value("gain")


BAD = [
    (torch.ones(31), {}, ShapeError, "32 numbers"),
    (torch.ones(32), {}, ShapeError, "zero once its mean"),
    (torch.full((32,), torch.nan), {}, ShapeError, "not finite"),
    (rl.RegisterNeurons.from_pairs([]), {}, InterventionError, "No neuron"),
    (rl.RegisterNeurons.from_pairs([(0, 40)]), {}, InterventionError, "do not exist"),
    (None, dict(n_null=10), ConfigError, "at least 20"),
]


@pytest.mark.parametrize(("direction", "options", "error", "words"), BAD)
def test_bad_input_is_told(direction, options, error, words):
    with pytest.raises(error, match=words):
        head_circuits(build("full"), direction, **options)


def test_weights_that_are_no_numbers_are_told():
    vit = build("full")
    with torch.no_grad():
        vit.blocks[1].attn.out.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="block 1"):
        head_circuits(vit)
    assert images(vit).shape == (2, 3, 24, 32)

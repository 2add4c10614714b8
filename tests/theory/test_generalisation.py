"""Arbitrary attention and LayerNorm: limit, rate, sink rule and the no-op on the value side."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from two_blocks import GRID, by_hand, sized

from registerlens.errors import ConfigError, NonFiniteError, ShapeError
from registerlens.theory.general import ExactLayerNorm, GeneralModel
from registerlens.theory.generalisation import GeneralReport, verify_generalisation
from registerlens.theory.proposition import verify_proposition
from registerlens.theory.two_block import CLS, TwoBlockModel


def layer_norm(d, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    w = 0.5 + torch.rand(d, generator=generator, dtype=torch.float64)
    return ExactLayerNorm(w=w, b=torch.randn(d, generator=generator, dtype=torch.float64), **options)


def general(base, seed=0, norm=True, **options):
    d = base.tokens.shape[1]
    return GeneralModel.build(base, norm=layer_norm(d, seed) if norm else None, d_head=3, seed=seed, **options)


def identity(base):
    eye = torch.eye(base.tokens.shape[1], dtype=torch.float64)[None]
    return GeneralModel(base=base, W_Q=eye, W_K=eye, W_V=eye, W_O=eye)


def test_with_identities_and_one_head_it_is_the_proposition():
    for seed in range(20):
        base = sized(seed, broken={"u2_mlp": 0.2}) if seed % 2 else by_hand(seed)
        one, other = verify_proposition(base, GRID), verify_generalisation(identity(base), GRID)
        np.testing.assert_allclose(other.beside[:, 0], one.beside, rtol=1e-9, atol=1e-300)
        np.testing.assert_allclose(other.beside_bound[:, 0], one.beside_bound, rtol=1e-9, atol=1e-300)
        np.testing.assert_allclose(other.deviation, one.deviation, rtol=1e-9, atol=float(one.rounding[-1]))
        assert (other.deviation_bound <= one.deviation_bound * (1 + 1e-9) + one.rounding).all()


def test_layer_norm_is_torchs_and_its_limit_is_reached_at_the_rate():
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        d = 3 + seed % 9
        norm = layer_norm(d, seed, eps=10.0 ** -(1 + seed % 6))
        x, v = torch.randn(2, d, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(norm(x), F.layer_norm(x, (d,), norm.w, norm.b, norm.eps))
        a = torch.tensor([0.0, 0.1, 1.0, 10.0, 1e4, 1e5], dtype=torch.float64)[1:, None]
        distance = (norm(x + a * v) - norm.limit(v)).norm(dim=-1)
        bound = norm.distance_bound(x.expand(5, d), a * v)
        assert (distance <= bound * (1 + 1e-12)).all()
        assert float(bound[-2] / bound[-1]) == pytest.approx(10, rel=1e-2)  # O(1 / a)
        assert float(bound[-1]) < 1e-2
        far = F.layer_norm(x + 1e12 * v, (d,), norm.w, norm.b, norm.eps)
        torch.testing.assert_close(norm.limit(v), far, rtol=1e-8, atol=1e-8)
        step = torch.randn(d, generator=generator, dtype=torch.float64) * 10.0 ** (seed % 5 - 2)
        assert (norm(x + step) - norm(x)).norm() <= norm.lipschitz(x) * step.norm()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("others_fire", [0.0, 0.5])
def test_bounds_hold_with_any_attention(norm, others_fire):
    for seed in range(16):
        broken = {} if seed % 3 else {"dominance": 0.4}
        base = by_hand(seed) if seed % 4 == 3 and seed % 6 > 1 else sized(seed, others_fire=others_fire, broken=broken)
        model = general(base, seed, norm, seeks=(3.0, 10.0, -10.0), value_kernel=seed % 2 == 0)
        assert verify_generalisation(model, (0.1, 1.0, 30.0, 1e3, 1e6)).within_bounds, seed


def test_the_sink_rule_under_layer_norm():
    """x_s is the favourite of exactly the queries for which its limit score is above every other."""
    counted = {True: 0, False: 0}
    for seed in range(15):
        model = general(sized(seed, others_fire=0.0), seed, seeks=(20.0, 5.0, -20.0))
        report = verify_generalisation(model, (1.0, 1e7))
        z = model.norm(model.base.after_block1(torch.tensor(1e7, dtype=torch.float64)))
        favourite = (model.scores(z).argmax(-1) == model.base.sink).numpy()
        clear = np.abs(report.limit_gap) > 1e-4
        np.testing.assert_array_equal(favourite[clear], (report.limit_gap > 0)[clear])
        for is_sink in (True, False):
            counted[is_sink] += int((favourite[clear] == is_sink).sum())
        # the limit itself, from torch's LayerNorm far out
        np.testing.assert_allclose(1 - report.beside[-1], report.limit_sink, atol=1e-4)
        assert (report.limit_sink < 1).all()
    assert min(counted.values()) > 100


def test_the_limit_key_is_that_of_the_centred_normalised_u2():
    for seed in range(10):
        model = general(sized(seed, others_fire=0.0), seed)
        v2 = model.base.v2
        centred = v2 - v2.mean()
        expected = model.norm.w * centred / centred.pow(2).mean().sqrt() + model.norm.b
        report = verify_generalisation(model, (1e2, 1e3, 1e4))
        z = F.layer_norm(
            model.base.after_block1(torch.tensor(1e3, dtype=torch.float64)),
            v2.shape,
            model.norm.w,
            model.norm.b,
            model.norm.eps,
        )
        assert report.key_distance[1] == pytest.approx(float((z[model.base.sink] - expected).norm()), rel=1e-6)
        assert report.key_distance[1] / report.key_distance[2] == pytest.approx(10, rel=0.1)


def test_no_op_on_the_value_side_where_the_head_sees_u2():
    for seed in range(12):
        base = sized(seed, broken={"u2_head": 0.5, "u2_mlp": 0.3, "u1_head": 0.3})
        assert not verify_proposition(base, GRID).no_op
        hidden = verify_generalisation(general(base, seed, norm=False, seeks=(1.0, 2.0)), GRID)
        seen = verify_generalisation(general(base, seed, norm=False, seeks=(1.0, 2.0), value_kernel=False), GRID)
        assert hidden.no_op, (seed, hidden.describe())
        assert not seen.no_op, seed
        avoided = verify_generalisation(general(base, seed, norm=False, seeks=(-1.0,)), GRID)
        assert 1 - avoided.beside[-1, 0, CLS] < 1e-6 and not avoided.no_op, seed


def test_no_op_on_the_value_side_under_layer_norm():
    """What x_s brings tends to zero as 1 / a; all of attention does only as far as the limit share is near one."""
    for seed in range(8):
        base = sized(seed, others_fire=0.0, broken={"u2_head": 0.5})
        hidden = verify_generalisation(general(base, seed, seeks=(2000.0, 2000.0)), (1e4, 1e5, 1e6))
        seen = verify_generalisation(general(base, seed, seeks=(2000.0, 2000.0), value_kernel=False), (1e4, 1e5, 1e6))
        assert hidden.brought[0] / hidden.brought[1] == pytest.approx(10, rel=0.1)
        assert hidden.brought_bound[-1] < 1e-2 * seen.brought_bound[-1]
        assert seen.brought[0] / seen.brought[-1] < 1.1
        weak = verify_generalisation(general(base, seed, seeks=(1.0, 1.0)), (1e4, 1e5, 1e6))
        assert weak.limit_sink[:, CLS].max() < 0.99
        assert weak.deviation[-1] == pytest.approx(weak.deviation[-2], rel=1e-2)  # it stays: no no-op


def test_a_permutation_of_heads_and_scales_that_cancel_change_nothing():
    model = general(sized(4), 4, seeks=(3.0, 8.0, -5.0))
    order = [2, 0, 1]
    swapped = dataclasses.replace(
        model,
        W_Q=7 * model.W_Q[order],
        W_K=model.W_K[order] / 7,
        W_V=model.W_V[order] / 3,
        W_O=3 * model.W_O[order],
    )
    one, other = verify_generalisation(model, GRID), verify_generalisation(swapped, GRID)
    np.testing.assert_allclose(other.beside, one.beside[:, order], rtol=1e-9)
    for name in ("deviation", "deviation_bound", "brought", "brought_bound"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=1e-8)


@pytest.mark.parametrize("norm", [True, False])
def test_table_words_and_files(tmp_path, norm):
    report = verify_generalisation(general(sized(2), 2, norm, seeks=(3.0, 8.0, -5.0)), GRID)
    frame = report.to_dataframe()
    assert len(frame) == 3 * len(GRID) and ("limit_cls" in frame) == norm
    assert ("LayerNorm" in report.describe()) == norm
    again = GeneralReport.load(report.save(tmp_path))
    assert again.describe() == report.describe()
    for field in dataclasses.fields(report):
        value = getattr(report, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, field.name), value)
        elif value is None:
            assert getattr(again, field.name) is None


def test_bad_input_is_named():
    base = TwoBlockModel.build()
    model = GeneralModel.build(base)
    ones = torch.ones(16, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="W_V has NaN"):
        dataclasses.replace(model, W_V=torch.full_like(model.W_V, torch.nan))
    with pytest.raises(ShapeError, match="W_Q must read 16"):
        dataclasses.replace(
            model, W_Q=model.W_Q[:, :5], W_K=model.W_K[:, :5], W_V=model.W_V[:, :5], W_O=model.W_O[..., :5]
        )
    with pytest.raises(ConfigError, match="zero throughout"):
        ExactLayerNorm(w=0 * ones, b=ones)
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        ExactLayerNorm(w=ones.float(), b=ones.float())
    with pytest.raises(ConfigError, match="eps must be positive"):
        ExactLayerNorm(w=ones, b=ones, eps=0.0)
    with pytest.raises(ShapeError, match="LayerNorm must have 16"):
        dataclasses.replace(model, norm=ExactLayerNorm(w=ones[:5], b=ones[:5]))
    flat = dataclasses.replace(base, W_out1=torch.ones_like(base.W_out1))
    with pytest.raises(ConfigError, match="all-ones"):
        verify_generalisation(dataclasses.replace(model, base=flat, norm=ExactLayerNorm(w=ones, b=ones)))

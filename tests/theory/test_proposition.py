"""Proposition 1: the bounds on hundreds of models, conditions broken one by one, and a second implementation."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import scipy.linalg
import torch
from jaxtyping import TypeCheckError
from two_blocks import GRID, PHIS, Reference, by_hand, phi_of, sized

from registerlens.errors import ConfigError, NonFiniteError, ShapeError
from registerlens.model.parts import ACTIVATIONS
from registerlens.theory.conditions import attention_beside, check_conditions, lipschitz
from registerlens.theory.proposition import PropositionReport, verify_proposition
from registerlens.theory.two_block import CLS, CONDITIONS, TwoBlockModel

KERNELS = ("u1_mlp", "u2_mlp", "u1_head", "u2_head")
RANGES = {
    **dict.fromkeys(KERNELS, (0.05, 0.8)),
    "dominance": (0.05, 1.0),
    "alignment": (1.0, 2.0),
    "query_key": (0.1, 1.0),
    "silence": (0.05, 1.0),
    "alone": (0.1, 1.0),
}


@cache
def broken_models(name):
    """Models with this condition broken by a random amount: (model, amount, report)."""
    low, high = RANGES[name]
    made = []
    for seed in range(25):
        amount = low + (high - low) * float(np.random.default_rng(seed + 999).random())
        model = sized(seed, broken={name: amount})
        made.append((model, amount, verify_proposition(model, GRID)))
    return made


# All conditions hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", PHIS)
def test_with_all_conditions_the_conclusion_holds_within_the_bounds(phi):
    for seed in range(40):
        report = verify_proposition(sized(seed, phi=phi), np.array(GRID))
        assert report.broken == (), seed
        assert report.within_bounds, seed
        assert report.sink and report.no_op, (seed, report.describe())
        assert report.deviation[0] > 1e-3 * report.output_norm[0]  # at small activation it is no no-op yet
        assert report.direction[-1] > 1 - 1e-5


def test_small_and_lopsided_sizes():
    for n, d_model, d_mlp, d_out, rank in ((1, 3, 1, 1, 1), (1, 40, 3, 1, 2), (30, 3, 2, 7, 5), (3, 5, 60, 2, 40)):
        report = verify_proposition(
            TwoBlockModel.build(n=n, d_model=d_model, d_mlp=d_mlp, d_out=d_out, rank=rank, seed=n), GRID
        )
        assert report.broken == () and report.sink and report.no_op and report.within_bounds


def test_the_attention_bound_is_reached_where_all_others_score_alike():
    scores = torch.tensor([[2.0, 0.5, 0.5, 0.5], [-3.0, 0.5, 0.5, 0.5]], dtype=torch.float64)
    _, beside, bound = attention_beside(scores, 0)
    closed_form = 1 - 1 / (1 + 3 * torch.exp(-torch.tensor([1.5, -3.5], dtype=torch.float64)))
    torch.testing.assert_close(bound, closed_form, rtol=1e-12, atol=0)
    torch.testing.assert_close(beside, bound, rtol=1e-12, atol=0)
    uneven = attention_beside(torch.tensor([[2.0, 0.5, 0.0, -9.0]]), 0)
    assert uneven[1] < 0.8 * uneven[2]


def test_the_deviation_bound_is_tight_where_the_head_sees_u2():
    # Then |W_head^T D| -> a |W_head^T v2|, and the bound has nothing to spare.
    for seed in range(20):
        report = verify_proposition(sized(seed, broken={"u2_head": 0.5}), GRID)
        assert 0.98 < report.deviation[-1] / report.deviation_bound[-1] <= 1 + 1e-12


def test_bounds_hold_for_models_that_keep_no_condition():
    seen = set()
    for seed in range(100):
        report = verify_proposition(by_hand(seed), (0.01, 0.3, 1.0, 30.0, 1e3))
        assert report.within_bounds, seed
        seen.add((report.sink, report.no_op))
    assert len(seen) > 1


# One condition broken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONS)
def test_one_broken_condition_is_named_and_its_amount_measured(name):
    for model, amount, report in broken_models(name):
        assert report.broken == (name,), model.seed
        assert report.within_bounds, model.seed
        assert not (report.sink and report.no_op), (model.seed, report.describe())
        [found] = [found for found in report.conditions if found.name == name]
        assert found.statement in report.describe()
        if name in (*KERNELS, "dominance", "alignment", "silence"):
            assert found.measured == pytest.approx(amount, rel=1e-9)


@pytest.mark.parametrize("name", [*KERNELS, "dominance", "silence"])
def test_what_is_seen_spoils_the_no_op_but_not_the_sink(name):
    for model, _, report in broken_models(name):
        seed = model.seed
        assert report.sink and not report.no_op, seed
        last = report.deviation[-1] / report.deviation[-2]  # from a = 1,000 to 10,000
        if name in ("u1_head", "silence"):
            assert last == pytest.approx(1, rel=1e-3), seed  # what is seen does not grow
        if name in ("u2_head", "dominance", "u2_mlp"):
            assert last > 5, seed


def test_without_dominance_the_direction_differs():
    for _, amount, report in broken_models("dominance"):
        assert report.direction[-1] == pytest.approx(1 / np.sqrt(1 + amount**2), abs=1e-3)
        assert report.row_ratio[-1] == pytest.approx(1 / amount)


def test_with_beta_not_positive_x_s_is_no_sink():
    exact = [(model, 0, verify_proposition(model, GRID)) for model in (_aligned(seed, 1.0) for seed in range(10))]
    opposite = [(model, 0, verify_proposition(model, GRID)) for model in (_aligned(seed, 2.0) for seed in range(10))]
    for model, _, report in [*broken_models("alignment"), *exact, *opposite]:
        assert float(model.tokens[model.sink] @ model.u1) <= 1e-12
        assert report.beside[-1, CLS] > 0.5, model.seed
        assert not report.no_op, model.seed


def _aligned(seed, amount):
    """beta = 0 at 1, beta < 0 and x_s along -u1 at 2."""
    return sized(seed, broken={"alignment": amount})


def test_misaligned_but_firing_x_s_is_a_sink_that_is_seen():
    for seed in range(20):
        report = verify_proposition(sized(seed, broken={"alignment": 0.05}), GRID)
        assert report.broken == ("alignment",) and report.sink and not report.no_op, seed


def test_with_negative_q_k_the_token_is_avoided():
    for model, _, report in broken_models("query_key"):
        others = np.arange(model.n + 1) != model.sink
        assert (1 - report.beside[-1, others] < 1e-6).all(), model.seed
        assert not report.no_op, model.seed


def test_a_token_that_fires_more_takes_the_sinks_place():
    for model, _, report in broken_models("alone"):
        strongest = int(model.firing.argmax())
        taken = dataclasses.replace(model, sink=strongest)
        assert strongest != model.sink
        assert report.beside[-1].min() > 0.99
        assert verify_proposition(taken, GRID).sink


@pytest.mark.parametrize("name", ["dominance", "silence"])
def test_a_second_neuron_does_not_change_how_tokens_seek_v2(name):
    for seed in range(8):
        held, model = sized(seed, others_fire=0.0), sized(seed, others_fire=0.0, broken={name: 0.5})
        others = torch.arange(model.n + 1) != model.sink
        torch.testing.assert_close(model.rest[others] @ model.v2, held.rest[others] @ held.v2)
        assert verify_proposition(model, GRID).broken == (name,), seed


def test_several_broken_conditions_are_all_named():
    for broken in (
        {"u1_mlp": 0.3, "u2_mlp": 0.4},
        {"dominance": 0.5, "silence": 0.2},
        {"u2_head": 0.2, "query_key": 0.5, "alone": 0.5, "alignment": 1.5},
    ):
        for seed in range(5):
            report = verify_proposition(sized(seed, broken=broken), GRID)
            assert set(report.broken) == set(broken)
            measured = {found.name: found.measured for found in report.conditions}
            for name in broken.keys() & {*KERNELS, "dominance", "silence", "alignment"}:
                assert measured[name] == pytest.approx(broken[name], rel=1e-9)


# Against something independent --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", PHIS)
def test_against_a_second_implementation(phi):
    for seed in range(4):
        for model in (sized(seed, phi=phi, broken={"dominance": 0.3, "u2_mlp": 0.1}), by_hand(seed)):
            model = dataclasses.replace(model, phi=phi)
            report = verify_proposition(model, (0.5, 3.0, 20.0))
            for row, activation in enumerate(report.activations):
                reference = Reference(model, activation)
                stream = reference.block1()
                pattern = reference.attend(stream, stream)
                without = reference.output(stream[CLS])
                deviation = np.linalg.norm(reference.output(stream[CLS] + pattern[CLS] @ stream) - without)
                beside = np.delete(pattern, model.sink, axis=1).sum(1)
                x_s = stream[model.sink]
                v2 = model.W_out1[0].numpy() / np.linalg.norm(model.W_out1[0])
                lengths = np.linalg.norm(reference.rows, axis=1)
                np.testing.assert_allclose(report.beside[row], beside, rtol=1e-9)
                np.testing.assert_allclose(report.deviation[row], deviation, rtol=1e-8)
                np.testing.assert_allclose(report.output_norm[row], np.linalg.norm(without), rtol=1e-9)
                np.testing.assert_allclose(report.direction[row], x_s @ v2 / np.linalg.norm(x_s), rtol=1e-9)
                ratio = lengths[0] / max([0.0, *lengths[1:]]) if len(lengths) > 1 else np.inf
                np.testing.assert_allclose(report.row_ratio[row], ratio, rtol=1e-9)


@pytest.mark.parametrize(("reader", "weights"), [("mlp", "W_in2"), ("head", "W_head")])
def test_kernels_against_scipy(reader, weights):
    for seed in range(15):
        held = sized(seed)
        broken = sized(seed, broken={f"u1_{reader}": 0.3, f"u2_{reader}": 0.4})
        assert float((getattr(broken, weights).T @ broken.v2).sum()) > 0  # it excites: ReLUs cannot hide it
        for model, expected in ((held, (0, 0)), (broken, (0.3, 0.4))):
            kernel = scipy.linalg.null_space(getattr(model, weights).numpy().T)
            assert kernel.shape[1] >= 1
            for u, residual in zip((model.u1, model.v2), expected, strict=True):
                unit = u.numpy() / np.linalg.norm(u)
                outside = np.linalg.norm(unit - kernel @ (kernel.T @ unit))
                assert outside == pytest.approx(residual, abs=1e-10)
            conditions = {found.name: found for found in check_conditions(model, 1e4)}
            for u, residual in zip(("u1", "u2"), expected, strict=True):
                found = conditions[f"{u}_{reader}"]
                assert found.measured == pytest.approx(residual, abs=1e-10)
                assert found.holds == (residual == 0)


@pytest.mark.parametrize("phi", PHIS)
def test_lipschitz_constants_are_upper_bounds_and_not_loose(phi):
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[phi](x).sum(), x)
    constant = float(lipschitz(phi, torch.tensor(12.0)))
    assert float(slope.abs().max()) <= constant <= 1.001 * float(slope.abs().max())
    assert float(ACTIVATIONS[phi](torch.tensor(0.7, dtype=torch.float64))) == pytest.approx(phi_of(phi, 0.7), rel=1e-6)


def test_residuals_do_not_depend_on_scale():
    model = sized(3, broken={"u1_mlp": 0.3, "u2_head": 0.2})
    scaled = dataclasses.replace(model, W_in2=7 * model.W_in2, W_head=model.W_head / 9, W_out1=model.W_out1.clone())
    scaled.W_out1[0] *= 5  # only its direction counts
    for one, other in zip(check_conditions(model, 1e3), check_conditions(scaled, 1e3), strict=True):
        assert other.measured == pytest.approx(one.measured, abs=1e-12)
    one, other = verify_proposition(model, GRID), verify_proposition(scaled, GRID)
    np.testing.assert_allclose(one.beside, other.beside, rtol=1e-6, atol=1e-300)


def test_equal_seeds_give_equal_models_and_others_do_not():
    one, two, other = (TwoBlockModel.build(seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.W_head, two.W_head)
    assert not torch.equal(one.tokens, other.tokens)


# Results ------------------------------------------------------------------------------------------------------------


def test_table_words_and_files(tmp_path):
    report = verify_proposition(sized(1, broken={"silence": 0.4}), GRID)
    frame = report.to_dataframe()
    assert list(frame["activation"]) == list(GRID)
    np.testing.assert_array_equal(frame["beside_worst"], report.beside.max(1))
    assert "1 of 9 conditions fails" in report.describe() and "no no-op" in report.describe()
    again = PropositionReport.load(report.save(tmp_path / "deep" / "folder"))
    assert again.describe() == report.describe() and again.conditions == report.conditions
    assert again.setup == report.setup
    for field in dataclasses.fields(report):
        if isinstance(getattr(report, field.name), np.ndarray):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(report, field.name))
    (tmp_path / "deep" / "folder" / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="'class' must be PropositionReport"):
        PropositionReport.load(tmp_path / "deep" / "folder")
    with pytest.raises(ConfigError, match="cannot be read"):
        PropositionReport.load(tmp_path / "nowhere")


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"broken": {"u1_heads": 0.1}}, "Did you mean 'u1_head'"),
        ({"broken": {"u1_mlp": 0.0}}, "above 0 and at most 1"),
        ({"broken": {"alignment": 2.5}}, "at most 2"),
        ({"broken": {"silence": float("nan")}}, "got nan"),
        ({"broken": {"u1_mlp": 0.9, "u2_mlp": 0.9}}, "more than a direction can have"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 1, "broken": {"alone": 0.5}}, "n must be at least 2"),
        ({"d_model": 2}, "d_model must be at least 3"),
        ({"d_mlp": 2, "broken": {"dominance": 0.5, "silence": 0.5}}, "d_mlp must be at least 3"),
        ({"others_fire": 1.0}, "below 1"),
    ],
)
def test_what_cannot_be_built_is_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        TwoBlockModel.build(**options)


def test_tensors_that_do_not_fit_are_named():
    model = sized(0)
    with pytest.raises(NonFiniteError, match="W_out2 has NaN"):
        dataclasses.replace(model, W_out2=torch.full_like(model.W_out2, torch.nan))
    with pytest.raises((ShapeError, TypeCheckError), match="W_head"):
        dataclasses.replace(model, W_head=torch.cat([model.W_head, model.W_head]))
    with pytest.raises(ConfigError, match=r"W_head is torch\.float32"):
        dataclasses.replace(model, W_head=model.W_head.float())
    with pytest.raises(ConfigError, match="x_s is zero"):
        dataclasses.replace(model, tokens=torch.zeros_like(model.tokens))
    with pytest.raises(ConfigError, match="sink must be the index of a patch"):
        dataclasses.replace(model, sink=0)
    with pytest.raises(ConfigError, match=r"grows\[0\]"):
        dataclasses.replace(model, grows=torch.zeros_like(model.grows))


@pytest.mark.parametrize("activations", [(), (0.0, 1.0), (1.0, float("inf")), (2.0, 1.0), (1.0, 1.0)])
def test_activations_must_be_positive_finite_and_increase(activations):
    with pytest.raises(ConfigError, match="activations must"):
        verify_proposition(sized(0), activations)

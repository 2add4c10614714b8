"""Corollary 1: the explicit pair against the register neuron, token by token, and the exact limit."""

import dataclasses

import numpy as np
import pytest
from two_blocks import GRID, Reference, by_hand, sized

from registerlens.errors import ConfigError
from registerlens.theory.proposition import CorollaryReport, verify_corollary
from registerlens.theory.two_block import CLS, CONDITIONS


def test_the_difference_tends_to_beta_u1_and_the_outputs_agree():
    own = set()
    for seed in range(50):
        model = sized(seed)
        report = verify_corollary(model, GRID)
        assert report.within_bounds, seed
        assert report.equal, (seed, report.describe())
        length = float(model.tokens[model.sink].norm())
        np.testing.assert_allclose(report.limit, length, rtol=1e-9)
        others = np.arange(model.n + 1) != model.sink
        assert report.attends[others].all(), seed
        np.testing.assert_allclose(report.difference[-1, others], length, rtol=1e-6)
        assert (report.from_limit[-1, others] <= 1e-6 * length).all()
        assert report.from_limit[0].max() > 1e-3  # not there yet
        # x_s itself attends to the pair if u1 . u2 > 0: then score a u1 . u2 beats its own.
        match = float(model.u1 @ model.v2 / model.u1.norm())
        if abs(match) > 0.1:
            assert bool(report.attends[model.sink]) == (match > 0), seed
            own.add(match > 0)
    assert own == {True, False}


@pytest.mark.parametrize("name", CONDITIONS)
def test_bounds_hold_with_any_condition_broken(name):
    for seed in range(8):
        report = verify_corollary(sized(seed, broken={name: 0.4 if name != "alignment" else 1.6}), GRID)
        assert report.within_bounds, seed
        if name in ("u1_mlp", "u1_head", "silence"):  # c_s is what differs, and here it is seen
            assert not report.equal, seed
        if name in ("query_key", "alone", "dominance"):
            assert not report.attends.all()


def test_bounds_hold_for_models_that_keep_no_condition():
    for seed in range(40):
        assert verify_corollary(by_hand(seed), (0.01, 0.3, 1.0, 30.0, 1e3)).within_bounds, seed


def test_against_a_second_implementation():
    for seed in range(6):
        for model in (sized(seed, broken={"silence": 0.3}), by_hand(seed)):
            report = verify_corollary(model, (0.5, 3.0, 20.0))
            for row, activation in enumerate(report.activations):
                reference = Reference(model, activation)
                stream, bare = reference.block1(), reference.block1(without_register=True)
                u1, u2 = reference.m["W_in1"][:, 0], reference.rows[0]
                pair = reference.phi(reference.m["tokens"][model.sink] @ u1) * u2
                keys = np.vstack([bare, pair])
                update = reference.attend(stream, stream) @ stream
                biased = reference.attend(bare, keys) @ keys
                c_s = bare[model.sink]
                np.testing.assert_allclose(
                    report.difference[row], np.linalg.norm(update - biased, axis=1), rtol=1e-8, atol=1e-12
                )
                np.testing.assert_allclose(
                    report.from_limit[row], np.linalg.norm(update - biased - c_s, axis=1), rtol=1e-7, atol=1e-12
                )
                np.testing.assert_allclose(report.limit[row], np.linalg.norm(c_s), rtol=1e-9)
                outputs = [reference.output(x[CLS] + y[CLS]) for x, y in ((stream, update), (bare, biased))]
                distance = np.linalg.norm(outputs[0] - outputs[1])
                np.testing.assert_allclose(report.output_difference[row], distance, rtol=1e-7, atol=1e-11)


def test_table_words_and_files(tmp_path):
    model = sized(1)
    report = verify_corollary(model, GRID)
    frame = report.to_dataframe()
    assert len(frame) == len(GRID) * (model.n + 1)
    last = frame[(frame["activation"] == GRID[-1]) & (frame["token"] == CLS)].iloc[0]
    assert last["relative_difference"] == pytest.approx(report.limit[-1] / GRID[-1], rel=1e-6)
    assert "The outputs agree" in report.describe()
    again = CorollaryReport.load(report.save(tmp_path))
    assert again.describe() == report.describe()
    for field in dataclasses.fields(report):
        if isinstance(getattr(report, field.name), np.ndarray):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(report, field.name))


def test_activations_must_increase():
    with pytest.raises(ConfigError, match="activations must increase"):
        verify_corollary(sized(0), (2.0, 1.0))

"""The convergence figures show the reports' numbers, bounds dashed."""

import numpy as np
import pytest
import torch

from registerlens.theory.general import ExactLayerNorm, GeneralModel
from registerlens.theory.generalisation import verify_generalisation
from registerlens.theory.proposition import verify_corollary, verify_proposition
from registerlens.theory.two_block import CLS, TwoBlockModel
from registerlens.viz.theory import proposition_figure


def curves(figure):
    """What is drawn left and right, by name."""
    sides = ({}, {})
    for curve in figure.data:
        sides[curve.legend == "legend2"][curve.name] = curve
    return sides


def test_the_proposition_is_drawn_as_measured():
    report = verify_proposition(TwoBlockModel.build(broken={"silence": 0.3}))
    left, right = curves(report.plot())
    drawn = np.asarray(left["[CLS]"].y, float)
    visible = report.beside[:, CLS] >= 1e-18
    np.testing.assert_array_equal(drawn[visible], report.beside[visible, CLS])
    assert np.isnan(drawn[~visible]).all() and (~visible).any()
    np.testing.assert_array_equal(np.asarray(right["from no attention"].y, float), report.deviation)
    np.testing.assert_array_equal(np.asarray(right["from no attention, bound"].y, float), report.deviation_bound)
    assert right["from no attention, bound"].line.dash == "dash"
    assert "no other neuron of block 1" in report.plot().layout.title.text


def test_the_corollary_is_drawn_for_the_tokens_that_attend():
    report = verify_corollary(TwoBlockModel.build(seed=0))
    assert not report.attends.all()
    left, right = curves(report.plot())
    difference = report.difference[:, report.attends].max(1)
    np.testing.assert_array_equal(np.asarray(left["difference"].y, float), difference)
    np.testing.assert_array_equal(np.asarray(right["distance"].y, float), report.output_difference)
    nobody = verify_corollary(TwoBlockModel.build(broken={"query_key": 1.0}))
    assert not nobody.attends.any() and len(nobody.plot().data) == 9


@pytest.mark.parametrize("with_norm", [True, False])
def test_every_head_is_drawn_with_its_limit_if_there_is_one(with_norm):
    ones = torch.ones(16, dtype=torch.float64)
    norm = ExactLayerNorm(w=ones, b=ones) if with_norm else None
    report = verify_generalisation(GeneralModel.build(TwoBlockModel.build(), seeks=(5.0, -5.0, 1.0), norm=norm))
    left, right = curves(report.plot())
    assert len(left) == (6 if with_norm else 3)
    np.testing.assert_array_equal(np.asarray(left["head 1"].y, float), 1 - report.beside[:, 1, CLS])
    assert any("key of" in name for name in right) == with_norm


def test_dark_and_light_differ_only_in_looks():
    report = verify_proposition(TwoBlockModel.build())
    light, dark = proposition_figure(report), proposition_figure(report, "dark")
    assert light.layout.paper_bgcolor != dark.layout.paper_bgcolor
    for one, other in zip(light.data, dark.data, strict=True):
        told, same = one.to_plotly_json(), other.to_plotly_json()
        told["line"].pop("color"), same["line"].pop("color")
        np.testing.assert_equal(told, same)  # gaps are NaN

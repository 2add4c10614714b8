"""Each cause planted into two models must be found, and nothing in models that have none: the confusion matrix."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from planted_causes import CAUSES, planted, quiet_tiny

import registerlens as rl
from registerlens.data.images import load_images
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import synthetic_images
from registerlens.diagnosis.findings import SOUND, Cause
from registerlens.errors import ConfigError, ImageError


@cache
def quiet():
    return quiet_tiny()


def row(cause, host, seeds, n):
    """Headlines over seeds; printed, so that the documentation's table can be made from it."""
    headlines = Counter(rl.diagnose(*planted(cause, host, seed, n), evaluated=8).cause for seed in seeds)
    print(f"{cause}: {dict(headlines)}")
    return headlines


def test_every_cause_but_one_is_planted():
    told = set(Cause.__args__)
    assert told - CAUSES.keys() == {"too few images"}  # tests of the verdict plant that
    assert set(SOUND) <= told


@pytest.mark.parametrize("cause", CAUSES)
def test_a_planted_cause_is_the_headline(cause):
    assert row(cause, quiet(), range(2), 16) == {cause: 2}


@pytest.mark.slow
@pytest.mark.parametrize("cause", CAUSES)
def test_the_confusion_matrix_of_the_tiny_model_is_diagonal(cause):
    assert row(cause, quiet(), range(50), 16) == {cause: 50}


@pytest.mark.slow
@pytest.mark.parametrize("cause", CAUSES)
def test_the_confusion_matrix_of_a_real_backbone_is_diagonal(cause, focus_vit):
    assert row(cause, focus_vit, range(1), 8) == {cause: 1}  # a quarter of the documentation's seeds: each takes long


@pytest.mark.slow
def test_nothing_is_wrong_with_a_real_backbone_on_photographs(focus_vit):
    found = rl.diagnose(focus_vit, load_images(shipped_photographs(), focus_vit))
    assert found.cause == "none" and len(found.findings) == 1 and found.neurons is None


def test_the_embedded_model_and_its_random_twin():
    images = synthetic_images(32, 0).images
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    found = rl.diagnose(vit, images, evaluated=16)
    [finding] = found.findings
    assert {neuron for _, neuron, _ in found.neurons} >= {183, 103, 219} and finding.evidence["onset"] == "1.mlp"
    assert found.cure == "test-time register" and "Cure: test-time register" in finding.advice
    assert 0 < finding.evidence["cost of the test-time register"] < 0.05
    assert found.evaluation.n_images == 16 and set(found.evaluation.verdicts) == {
        "test-time register",
        "attention bias",
    }
    twin = rl.diagnose(rl.HookedViT(vit.cfg), images)
    assert [one.cause for one in twin.findings] == ["untrained weights"]


def test_what_is_named_is_what_was_planted():
    host = quiet()
    found = rl.diagnose(*planted("position embedding", host, 3, 16)).findings[0]
    assert found.evidence["position over the mean"] > 12 and 0.7 < found.evidence["share in that dimension"] < 0.9
    assert found.evidence["share of variance between places"] > 0.9
    vit, images = planted("massive channel", host, 3, 16)
    found = rl.diagnose(vit, images).findings[0]
    out = vit.blocks[int(found.evidence["place"].partition(".")[0])].mlp.out
    assert out.bias.abs().argmax() == found.evidence["channel"]
    vit, images = planted("untrained weights", host, 1, 16)  # one block
    [found] = rl.diagnose(vit, images).findings
    assert sum(stretch < 1.2 for stretch in found.evidence.values()) == 1
    assert "register in" in rl.diagnose(*planted("sinks without outliers", host, 0, 16)).findings[0].words


def test_several_findings_stand_in_order():
    """Photographs to the tiny model: that they are not its images comes first."""
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    found = rl.diagnose(vit, load_images(shipped_photographs(), vit))
    assert found.cause == "other images" and "MODEL synthetic" in found.findings[0].advice
    order = [Cause.__args__.index(one.cause) for one in found.findings]
    assert order == sorted(order) and found.describe().count("\n") == len(order) - 1
    assert set(found.to_dataframe()["cause"]) == {one.cause for one in found.findings}


def test_noise_is_other_images_and_its_range_says_nothing_of_preprocessing():
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    like_clip = rl.HookedViT(vit.cfg, replace(vit.preprocess, mean=(0.5,) * 3, std=(0.5,) * 3))
    like_clip.load_state_dict(vit.state_dict())
    noise = 5 * torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    causes = [one.cause for one in rl.diagnose(like_clip, noise).findings]
    assert causes[0] == "other images" and "wrong preprocessing" not in causes


def test_not_finite_inside_is_told_with_its_place():
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    images = synthetic_images(4, 0).images
    images[1, 0, 0, 0] = torch.nan
    found = rl.diagnose(vit, images)
    assert found.cause == "not finite" and "embed" in found.findings[0].words and found.trace is None
    with pytest.raises(ConfigError, match="nothing to draw"):
        found.plot()
    with pytest.raises(ImageError):
        rl.diagnose(vit, images[:0])

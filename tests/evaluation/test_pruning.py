"""Pruning: the smallest set by the definition, and curves that are those of an evaluation."""

from itertools import combinations

import numpy as np
import pytest
import torch

import registerlens as rl
from registerlens.analysis.detection import Cutoff
from registerlens.config import TokenLayout
from registerlens.data.synthetic import synthetic_images
from registerlens.engine.views import View
from registerlens.errors import InterventionError, NoOutliersError
from registerlens.evaluation.pruning import _Measures, prune
from registerlens.model.sublayers import Sublayer

SEVEN = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])


@pytest.fixture(scope="module")
def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def images():
    return synthetic_images(16, 4).images


@pytest.fixture(scope="module")
def pruned(tiny, images):
    return prune(tiny, images, SEVEN)


def left(vit, images, pairs):
    """Outliers an image anywhere, above the clean run's cut-offs, by a trace's thresholds and plain caches."""
    traced = rl.trace(vit, images)
    points = [place.hook_name for place in traced.sublayers]
    with torch.no_grad():
        _, clean = vit.run_with_cache(images, names_filter=points)
        with vit.edit(rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs(pairs))):
            _, edited = vit.run_with_cache(images, names_filter=points)
    anywhere = torch.zeros(len(images), 36, dtype=torch.bool)
    for point, evidence in zip(points, traced.evidence, strict=True):
        if evidence.present:
            median = clean[point].norm(dim=-1).quantile(0.5, dim=1, keepdim=True)
            anywhere |= edited[point][:, :36].norm(dim=-1) > evidence.threshold * median
    return anywhere.sum().item() / len(images)


def test_the_curve_is_that_of_the_sets_and_the_smallest_leaves_none(tiny, images, pruned):
    for number, expected in enumerate(pruned.outliers):
        assert left(tiny, images, pruned.neurons.pairs[:number]) == pytest.approx(expected), number
    assert (
        set(pruned.neurons.pairs) == set(SEVEN.pairs) and pruned.kept.pairs == pruned.neurons.pairs[: pruned.smallest]
    )
    assert pruned.outliers[pruned.smallest] == 0 < pruned.outliers[pruned.smallest - 1]
    one_less = combinations(SEVEN.pairs, pruned.smallest - 1)
    assert min(left(tiny, images, pairs) for pairs in one_less) > 0  # greedy is exact here
    done = rl.evaluate_intervention(tiny, images, {"all": rl.TestTimeRegisters(SEVEN)}, controls=False)
    assert pruned.cos_normal[-1] == pytest.approx(done.mean("cos_normal", "all"), abs=1e-4)
    assert pruned.cos_normal[0] == pytest.approx(1) and np.isnan(pruned.cos_cls).all()
    assert f"{pruned.smallest} of 7 neurons leave no outlier" in pruned.describe()
    assert pruned.to_dataframe()["neuron"].tolist()[1:] == [n for _, n in pruned.neurons.pairs]


def test_neurons_that_do_nothing_come_last(tiny, images):
    found = prune(tiny, images, rl.RegisterNeurons.from_pairs([(1, 3), (4, 9), *SEVEN.pairs]))
    assert set(found.kept.pairs) < set(SEVEN.pairs) and found.neurons.pairs[-2:] != SEVEN.pairs[-2:]


def test_patches_that_become_outliers_are_not_normal():
    """Of four patches one is an outlier in the clean run and another afterwards; the other two keep their direction."""
    layout = TokenLayout(grid=(2, 2), n_prefix=0)
    norms = {"clean": [9.0, 1.0, 1.0, 1.0], "edited": [1.0, 9.0, 1.0, 1.0]}
    tokens = torch.eye(4)[None].clone()
    views = {
        name: View(
            layout=layout,
            norms={"0.mlp": torch.tensor([norms[name]])},
            attention={},
            tokens=tokens.roll(1, 2) if name == "edited" else tokens,
            output=tokens[:, 0],
        )
        for name in norms
    }
    views["edited"].tokens[0, 2:] = tokens[0, 2:]
    measures = _Measures({Sublayer("0.mlp"): Cutoff(value=3.0, relative=True)})
    assert measures.cos_normal(views["edited"], views["clean"]).tolist() == [1.0]
    assert measures.outliers(views["edited"], views["clean"]).tolist() == [1.0]


def test_where_no_set_suffices_all_are_kept(tiny, images):
    found = prune(tiny, images, rl.RegisterNeurons.from_pairs([(1, 3), (1, 183)]))
    assert found.smallest is None and len(found.kept) == 2 and found.outliers[-1] > 0
    assert "2 of 2 neurons leave" in found.describe()


def test_a_model_with_cls():
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8))
    torch.manual_seed(0)
    planted, truth = rl.plant_register_neurons(rl.HookedViT(cfg).eval(), layer=1, n=3)
    found = prune(planted, truth.calibration, truth.neurons)
    assert found.smallest and np.isfinite(found.cos_cls).all() and "[CLS]" in found.describe()
    assert [one.name for one in found.plot().data] == ["outliers left", "[CLS]", "normal patches"]


def test_errors(tiny, images):
    with pytest.raises(InterventionError, match="No neuron was given"):
        prune(tiny, images, rl.RegisterNeurons.from_pairs([]))
    with pytest.raises(NoOutliersError, match="Pruning"):
        prune(rl.HookedViT(tiny.cfg), images, SEVEN)

"""Register neurons' activations, updates and output weights: planted models, whole caches, hand-made weights."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis, skew

import registerlens as rl
from registerlens.analysis.detection import Cutoff, detect
from registerlens.analysis.neuron_evidence import ActivationDistributions, activation_distributions
from registerlens.analysis.neuron_updates import COSINE_BINS, NeuronUpdates, neuron_updates
from registerlens.analysis.output_weights import OutputWeights, output_weights
from registerlens.analysis.top_outliers import pick, random_sets
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, ImageError, InterventionError, NonFiniteError, NoOutliersError
from registerlens.stats.histograms import count_signed, signed_edges
from registerlens.theory.planted import plant_register_neurons

CFG = rl.ViTConfig(n_layers=3, d_model=32, n_heads=4, d_mlp=40, image_size=(40, 48), patch_size=(8, 8))
MEASURES = (activation_distributions, neuron_updates)


@pytest.fixture(scope="module")
def planted():
    torch.manual_seed(0)
    return plant_register_neurons(randomise(rl.HookedViT(CFG), 0, std=0.1), layer=1, n=3)


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def tiny_neurons():
    return rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])


def everywhere(vit, images, n):
    """A detection for a model without outliers: the largest norms of block 1, by a cut-off of our own."""
    detection = detect(vit, images, layer=1)
    return dataclasses.replace(detection, rule="fixed", cutoff=Cutoff(value=n, relative=True))


def at_top_outliers(vit, images, detection, layers):
    """Activations of every neuron at each image's top outlier, from whole caches: {layer: [image, neuron]}."""
    rows = {layer: [] for layer in layers}
    for image in images:
        with torch.no_grad():
            _, cache = vit.run_with_cache(image[None])
        patches = vit.layout(image[None]).patches
        norms = cache[detection.hook_name][0, patches].double().norm(dim=-1)
        if (norms > detection.cutoff.value * np.median(norms)).any():
            for layer in layers:
                rows[layer].append(cache[f"blocks.{layer}.mlp.hook_post"][0, patches][norms.argmax()].double())
    return {layer: torch.stack(found) for layer, found in rows.items()}


# Which tokens --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 7))
def test_the_two_tokens_are_the_largest_outlier_and_each_normal_patch_equally(seed, n, p):
    generator = torch.Generator().manual_seed(seed)
    norms, mask = torch.rand(n, p, generator=generator), torch.rand(n, p, generator=generator) > 0.5
    images, patches = pick(norms, mask, torch.rand(n, generator=generator))
    both = [i for i in range(n) if mask[i].any() and not mask[i].all()]
    assert images.tolist() == both
    for row, i in enumerate(both):
        assert mask[i, patches[0, row]] and norms[i, patches[0, row]] == norms[i][mask[i]].max()
        normal = (~mask[i]).nonzero()[:, 0].tolist()
        share = (torch.arange(len(normal)) + 0.5) / len(normal)
        drawn = [int(pick(norms[i : i + 1], mask[i : i + 1], u[None])[1][1, 0]) for u in share]
        assert drawn == normal and int(patches[1, row]) in normal


def test_random_sets_leave_out_the_listed_ones_and_repeat_none():
    sets = random_sets([3, 5, 9], 12, 200, torch.Generator().manual_seed(0))
    assert sets.shape == (200, 3) and not set(sets.flatten().tolist()) & {3, 5, 9}
    assert all(len(set(row)) == 3 for row in sets.tolist()) and set(sets.flatten().tolist()) == set(range(12)) - {
        3,
        5,
        9,
    }
    with pytest.raises(InterventionError, match="7 of a layer's 12 neurons are listed: too few"):
        random_sets(range(7), 12, 1, torch.Generator())


def test_signed_histograms_equal_numpys():
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [3.0], [400.0]])
    expected = [np.histogram(row.double().numpy(), signed_edges())[0] for row in values]
    assert np.abs(count_signed(values).numpy() - expected).sum() <= 4  # float32 at the edges of bins
    assert count_signed(torch.tensor([[1e30, -1e30]]))[0, [0, -1]].tolist() == [1, 1]


# Activations ---------------------------------------------------------------------------------------------------------


def test_distributions_equal_whole_caches(planted):
    vit, truth = planted
    images = truth.calibration
    detection = detect(vit, images)
    neurons = rl.RegisterNeurons.from_pairs([truth.neurons.pairs[2], (0, 5), truth.neurons.pairs[0], (2, 7)])
    found = activation_distributions(vit, images, neurons, detection=detection, batch_size=5)
    expected = at_top_outliers(vit, images, detection, (0, 1, 2))
    assert found.layers == (0, 1, 2) and found.n_with_outliers == len(expected[0]) <= found.n_images == len(images)
    for i in range(3):
        x = expected[i].numpy()
        np.testing.assert_allclose(found.mean[0, i], x.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.std[0, i], x.std(0), rtol=1e-3, atol=1e-4)
        assert found.skewness[0, i] == pytest.approx(skew(x, axis=1).mean(), rel=1e-3)
        assert np.abs(found.histogram[0, i] - np.histogram(x, signed_edges())[0]).sum() <= 6
    for j, (layer, neuron) in enumerate(neurons.pairs):
        exact = np.histogram(expected[layer][:, neuron].numpy(), signed_edges())[0]
        assert np.abs(found.neuron_histogram[0, j] - exact).sum() <= 2
    table = found.to_dataframe()
    assert list(zip(table["layer"], table["neuron"], strict=True)) == list(neurons.pairs)
    for row in table.to_dict("records"):
        means = expected[row["layer"]].mean(0)
        assert row["mean_outlier"] == pytest.approx(float(means[row["neuron"]]), rel=1e-3, abs=1e-4)
        assert row["rank_in_layer"] == int((means > means[row["neuron"]]).sum())


def test_planted_neurons_are_the_few_large_values(planted):
    """Exactly the planted three stand above everything at a normal patch, where they are silent."""
    vit, truth = planted
    found = activation_distributions(vit, truth.calibration, truth.neurons)
    assert found.large_listed[0] == pytest.approx(3, abs=0.05) and 3 <= found.large[0] < 4
    table = found.to_dataframe()
    assert sorted(table["rank_in_layer"]) == [0, 1, 2]
    assert (table["mean_outlier"] > 20 * table["mean_normal"].abs()).all()
    assert found.skewness[0, 0] > found.skewness[1, 0] + 0.5


def test_normal_patches_do_not_depend_on_the_batching_but_on_the_seed(planted):
    vit, truth = planted
    images, detection = truth.calibration, detect(planted[0], truth.calibration)
    one = activation_distributions(vit, images, truth.neurons, detection=detection, batch_size=1)
    other = activation_distributions(vit, images, truth.neurons, detection=detection, batch_size=32)
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-4, atol=1e-5)
    fresh = activation_distributions(vit, images, truth.neurons, detection=detection, seed=1)
    assert np.abs(fresh.mean[0] - one.mean[0]).max() < 1e-4 < np.abs(fresh.mean[1] - one.mean[1]).max()


def test_an_edit_in_force_is_seen(planted):
    vit, truth = planted
    detection = detect(vit, truth.calibration, layer=1)
    free = dataclasses.replace(detection, rule="fixed", cutoff=Cutoff(value=1.01, relative=True))
    with vit.edit(rl.Ablate(truth.neurons)):
        found = activation_distributions(vit, truth.calibration, truth.neurons, detection=free)
    assert (found.listed(found.mean) == 0).all()


# Updates -------------------------------------------------------------------------------------------------------------


def test_updates_equal_whole_caches_and_all_pairs_of_images(planted):
    vit, truth = planted
    images = truth.calibration
    detection = detect(vit, images)
    neurons = rl.RegisterNeurons.from_pairs([(0, 5), truth.neurons.pairs[1], (0, 11), truth.neurons.pairs[0]])
    found = neuron_updates(vit, images, neurons, detection=detection, draws=4, batch_size=7, seed=3)
    expected = at_top_outliers(vit, images, detection, (0, 1))
    generator = torch.Generator().manual_seed(3)
    for i, listed in neurons.by_layer().items():
        sets = [torch.tensor(listed), *random_sets(listed, CFG.d_mlp, 4, generator)]
        for j, chosen in enumerate(sets):
            updates = (expected[i][:, chosen] @ vit.blocks[i].mlp.W_out.detach().double()[chosen]).numpy()
            norms = np.linalg.norm(updates, axis=1)
            cosines = (updates @ updates.T) / np.outer(norms, norms)
            assert found.norm[i, j] == pytest.approx(norms.mean(), rel=1e-3)
            upper = cosines[np.triu_indices(len(updates), 1)]
            assert found.cosine[i, j] == pytest.approx(upper.mean(), abs=1e-4)
            if j == 0:
                successive = np.diagonal(cosines, 1).clip(-1, 1)
                exact = np.histogram(successive, np.linspace(-1, 1, COSINE_BINS + 1))[0]
                assert np.abs(found.cosine_histogram[i, 0] - exact).sum() <= 4
                assert np.abs(found.norm_histogram[i, 0] - np.histogram(norms, signed_edges())[0]).sum() <= 2
    assert (found.cosine_histogram[:, 1].sum(1) == 4 * (found.n_with_outliers - 1)).all()


def test_planted_updates_are_large_and_constant_where_random_ones_are_neither(planted):
    vit, truth = planted
    found = neuron_updates(vit, truth.calibration, truth.neurons)
    assert found.cosine[0, 0] > 0.999 and found.silent.max() == 0
    assert found.norm[0, 0] > 10 * found.norm[0, 1:].max()
    for values in (found.norm, found.cosine):
        assert found.p_value(values) == pytest.approx(1 / 101) and found.percentile(values) == 100


def test_random_activations_have_updates_of_no_common_direction():
    """Neurons made to fire at random, of either sign: the cosines of a set's updates average to nothing."""
    vit = randomise(rl.HookedViT(CFG), 1)
    images = torch.randn(128, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)

    def fire(post, hook):
        return torch.randn(post.shape, generator=generator)

    detection = everywhere(vit, images, 1.01)
    with vit.hooks([("blocks.1.mlp.hook_post", fire)]):
        found = neuron_updates(
            vit, images, rl.RegisterNeurons.from_pairs([(1, n) for n in range(5)]), detection=detection
        )
    assert np.abs(found.cosine).max() < 0.06 and np.abs(found.cosine.mean()) < 0.01
    assert 0.02 < found.p_value(found.norm)[0] < 0.98 or found.percentile(found.norm)[0] > 2


def test_sets_that_write_nothing_have_no_direction(planted):
    vit, truth = planted
    images = truth.calibration
    detection = detect(vit, images)
    silent = [n for n in range(CFG.d_mlp) if (1, n) not in truth.neurons]

    def mute(post, hook):
        post = post.clone()
        post[..., silent] = 0
        return post

    with vit.hooks([("blocks.1.mlp.hook_post", mute)]):
        found = neuron_updates(vit, images, truth.neurons, detection=detection, draws=6)
    assert (found.silent[0] == [0, *[1] * 6]).all() and np.isnan(found.cosine[0, 1:]).all()
    assert found.cosine[0, 0] > 0.999 and found.cosine_histogram[0, 1].sum() == 0
    assert np.isnan(found.to_dataframe().loc[0, "cosine_random"]) and found.p_value(found.norm) == pytest.approx(1 / 7)
    alone = neuron_updates(vit, images[:1].repeat(1, 1, 1, 1), truth.neurons, detection=detection, draws=2)
    assert np.isnan(alone.cosine).all() and "nan" in alone.describe()


# Output weights ------------------------------------------------------------------------------------------------------


def test_weights_made_by_hand_are_named_with_their_null():
    vit = randomise(rl.HookedViT(dataclasses.replace(CFG, layer_scale=True)), 2)
    neurons = rl.RegisterNeurons.from_pairs([(1, 4), (0, 6), (1, 9)])
    with torch.no_grad():
        for layer, neuron in neurons.pairs:
            column = torch.full((32,), 0.1)
            column[13], column[20] = -50.0, 20.0
            vit.blocks[layer].mlp.out.weight[:, neuron] = column / vit.blocks[layer].mlp.out.gamma
    found = output_weights(vit, neurons, draws=200)
    assert found.shared_dimensions[:2].tolist() == [13, 20] and found.layers == (0, 1)
    expected = np.full(32, 0.1)
    expected[13], expected[20] = -50, 20
    np.testing.assert_allclose(found.rows, np.tile(expected, (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(found.kurtosis, kurtosis(expected, fisher=False), rtol=1e-5)
    np.testing.assert_allclose(found.shared, np.abs(expected) / np.sqrt((expected**2).mean()), rtol=1e-5)
    assert (found.norm_percentile == 100).all() and (found.kurtosis_percentile == 100).all()
    assert found.p_value == pytest.approx(1 / 201) and found.shared_null.max() < 4 < found.shared.max()
    table = found.to_dataframe()
    assert table[["dimension_1", "dimension_2"]].drop_duplicates().values.tolist() == [[13, 20]]
    np.testing.assert_allclose(table["weight_1"], -50, rtol=1e-5)
    assert found.others_histogram.sum(1).tolist() == [39 * 32, 38 * 32]


def test_the_null_is_uniform_for_random_neurons():
    """Random neurons as 'register neurons' of random models: the p-value is no smaller than it should be."""
    p = []
    for seed in range(24):
        vit = randomise(rl.HookedViT(CFG), seed)
        neurons = rl.RegisterNeurons.from_pairs([(0, 1), (0, 2), (2, 3)])
        p.append(output_weights(vit, neurons, draws=99, seed=seed).p_value)
    assert 0.3 < np.mean(p) < 0.7 and (np.array(p) <= 0.1).mean() < 0.3


def test_scale_does_not_matter_for_what_is_relative():
    vit, twin = (randomise(rl.HookedViT(CFG), 3) for _ in range(2))
    with torch.no_grad():
        twin.blocks[1].mlp.out.weight[:, 4] *= 1000
    neurons = rl.RegisterNeurons.from_pairs([(1, 4), (1, 9)])
    one, other = output_weights(vit, neurons, draws=20), output_weights(twin, neurons, draws=20)
    np.testing.assert_allclose(other.shared, one.shared, rtol=1e-5)
    np.testing.assert_allclose(other.kurtosis, one.kurtosis, rtol=1e-4)
    np.testing.assert_allclose(other.relative, one.relative, rtol=1e-5)
    assert other.norm_percentile[0] == 100 and np.linalg.norm(other.rows[0]) > 900 * np.linalg.norm(one.rows[0])


# The tiny model, bad input, files ------------------------------------------------------------------------------------


def test_register_neurons_of_the_tiny_model(tiny, tiny_neurons):
    images = synthetic_images(48, 3).images
    fired = activation_distributions(tiny, images, tiny_neurons)
    assert fired.large_listed[0] > 6 and sorted(fired.to_dataframe()["rank_in_layer"]) == list(range(7))
    written = neuron_updates(tiny, images, tiny_neurons)
    assert written.cosine[0, 0] > 0.999 and written.norm[0, 0] > 100 * written.norm[0, 1:].max()
    weights = output_weights(tiny, tiny_neurons)
    assert weights.shared_dimensions[0] == 31 and weights.p_value < 0.01 and (weights.kurtosis_percentile > 99).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_without_outliers_it_is_refused_with_the_evidence(measure, focus_vit):
    images = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NoOutliersError, match="needs outlier tokens") as caught:
        measure(focus_vit, images, rl.RegisterNeurons.from_pairs([(9, 3)]))
    assert caught.value.evidence.verdict == "absent"


@pytest.mark.parametrize("measure", MEASURES)
def test_bad_images_and_neurons_are_named(measure, planted):
    vit, truth = planted
    detection = detect(vit, truth.calibration)
    with pytest.raises(InterventionError, match="No neuron was given"):
        measure(vit, truth.calibration, rl.RegisterNeurons.from_pairs([]))
    with pytest.raises(InterventionError, match=r"\[\(3, 0\)\] do not exist"):
        measure(vit, truth.calibration, rl.RegisterNeurons.from_pairs([(3, 0)]))
    with pytest.raises(ImageError, match="could be iterated only once"):
        measure(vit, iter([]), truth.neurons, detection=detection)
    unreachable = dataclasses.replace(detection, cutoff=Cutoff(value=1e9, relative=True))
    with pytest.raises(ImageError, match="has an outlier"):
        measure(vit, truth.calibration, truth.neurons, detection=unreachable)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        measure(vit, truth.calibration * float("nan"), truth.neurons, detection=detection)


def test_bad_weights_and_draws_are_named(planted):
    vit, truth = planted
    with pytest.raises(ConfigError, match="draws must be at least 1, got 0"):
        neuron_updates(vit, truth.calibration, truth.neurons, draws=0)
    with pytest.raises(InterventionError, match="No neuron was given"):
        output_weights(vit, rl.RegisterNeurons.from_pairs([]))
    with pytest.raises(InterventionError, match="too few others"):
        output_weights(vit, rl.RegisterNeurons.from_pairs([(0, n) for n in range(21)]))
    broken = randomise(rl.HookedViT(CFG), 0)
    with torch.no_grad():
        broken.blocks[2].mlp.out.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="block 2's MLP"):
        output_weights(broken, rl.RegisterNeurons.from_pairs([(2, 0)]))


def test_saved_and_loaded_they_are_the_same(planted, tmp_path):
    vit, truth = planted
    for kind, found in (
        (ActivationDistributions, activation_distributions(vit, truth.calibration, truth.neurons)),
        (NeuronUpdates, neuron_updates(vit, truth.calibration, truth.neurons, draws=3)),
        (OutputWeights, output_weights(vit, truth.neurons, draws=5)),
    ):
        back = kind.load(found.save(tmp_path / kind.__name__))
        assert back.describe() == found.describe() and back.to_dataframe().equals(found.to_dataframe())
        assert back.neurons == found.neurons and back.config == CFG and back.layers == found.layers

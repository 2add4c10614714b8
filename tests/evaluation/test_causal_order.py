"""Which register neurons drive which: a chain made by hand, and whole caches under hooks."""

import numpy as np
import pytest
import torch

import registerlens as rl
from registerlens.analysis.detection import detect
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ImageError, InterventionError, NoOutliersError
from registerlens.evaluation.causal_order import CONDITIONS, CausalOrder, causal_order
from registerlens.interventions.ablation import Ablate
from registerlens.theory.planted import plant_register_neurons

CFG = rl.ViTConfig(n_layers=4, d_model=32, n_heads=4, d_mlp=40, image_size=(40, 48), patch_size=(8, 8))
READER, DEAF = 5, 6


@pytest.fixture(scope="module")
def chain():
    """Neurons planted in block 1; in block 2 one neuron that reads their direction, and one that reads nothing."""
    torch.manual_seed(0)
    vit, truth = plant_register_neurons(rl.HookedViT(CFG).eval(), layer=1, n=3)
    block = vit.blocks[2]
    with torch.no_grad():
        block.mlp.up.weight[[READER, DEAF]] = 0
        block.mlp.up.weight[READER] = truth.direction / block.ln2.w
        block.mlp.up.bias[READER], block.mlp.up.bias[DEAF] = -2.0, 3.0
    return vit, truth, truth.neurons | rl.RegisterNeurons.from_pairs([(2, READER), (2, DEAF)])


def test_the_reader_is_driven_and_the_deaf_one_is_not(chain):
    vit, truth, neurons = chain
    found = causal_order(vit, truth.calibration, neurons)
    assert found.layers == (1, 2) and np.isnan(found.edited[:, 0, :3]).all() and np.isnan(found.edited[:, 1]).all()
    change = dict(zip(CONDITIONS, found.change[:, 0, 3:], strict=True))
    assert found.clean[3] > 3 and found.clean[4] == pytest.approx(3, abs=0.01)
    assert change["zero"][0] < -0.95 and abs(change["random, zero"][0]) < 0.05
    assert all(abs(row[1]) < 1e-6 for row in change.values())
    whole = (found.edited[0, 0, 3:] - found.clean[3:]).sum() / found.clean[3:].sum()
    assert found.between("zero")[0, 1] == pytest.approx(whole) and np.isnan(found.between("zero")[1]).all()
    assert f"changes those of block 2 by {whole:+.0%}" in found.describe()


def test_everything_equals_whole_caches_under_hooks(chain):
    vit, truth, neurons = chain
    neurons = rl.RegisterNeurons.from_pairs([(3, 2), *neurons.pairs, (0, 8)])
    images = truth.calibration[:6]
    detection = detect(vit, truth.calibration)
    found = causal_order(vit, images, neurons, detection=detection, batch_size=5)
    means = Ablate.fit(vit, images, neurons, "mean").reference.mean
    clean, edited, n = np.zeros(len(neurons)), np.zeros((2, 3, len(neurons))), 0
    for image in images:
        with torch.no_grad():
            _, cache = vit.run_with_cache(image[None])
        layout = vit.layout(image[None])
        norms = cache[detection.hook_name][0, layout.patches].norm(dim=-1)
        if not (norms > detection.cutoff.value * np.median(norms)).any():
            continue
        n += 1
        top = int(norms.argmax()) + layout.patches.start
        clean += [float(cache[f"blocks.{a}.mlp.hook_post"][0, top, b]) for a, b in neurons.pairs]
        for c, value in enumerate(("zero", "mean")):
            for i, layer in enumerate((0, 1, 2)):
                listed = list(neurons.by_layer()[layer])
                mean = means[f"blocks.{layer}.mlp.hook_post"]

                def edit(post, hook, listed=listed, mean=mean, value=value):
                    new = torch.stack([mean[min(pos, len(mean) - 1)] for pos in range(post.shape[1])])
                    post[:, :, listed] = 0 if value == "zero" else new
                    return post

                with torch.no_grad(), vit.hooks([(f"blocks.{layer}.mlp.hook_post", edit)]):
                    _, after = vit.run_with_cache(image[None], names_filter="blocks.*.mlp.hook_post")
                edited[c, i] += [float(after[f"blocks.{a}.mlp.hook_post"][0, top, b]) for a, b in neurons.pairs]
    assert found.n_with_outliers == n > 1
    np.testing.assert_allclose(found.clean, clean / n, rtol=1e-4, atol=1e-5)
    later = np.array([[at > layer for at, _ in neurons.pairs] for layer in (0, 1, 2)])
    for c in range(2):
        np.testing.assert_allclose(found.edited[c, :3][later], (edited[c] / n)[later], rtol=1e-3, atol=1e-4)
    assert (np.isnan(found.edited[:, :3]) == ~later).all()
    table = found.to_dataframe()
    assert len(table) == 3 * later.sum() and (table["layer"] > table["edited_layer"]).all()


def test_the_tiny_models_neurons_are_driven_from_block_0():
    vit, images = rl.from_pretrained("registerlens:tiny"), synthetic_images(24, 5).images
    first = [(0, n) for n in (214, 188, 192, 183, 32, 95, 247)]  # the seven most active of block 0 at outliers
    neurons = rl.RegisterNeurons.from_pairs([*first, (1, 183), (1, 103), (2, 119)])
    found = causal_order(vit, images, neurons)
    assert found.between("zero")[0, 1] < -0.9 and abs(found.between("random, zero")[0, 1]) < 0.1


def test_under_a_test_time_register_the_edited_model_is_asked(chain):
    vit, truth, neurons = chain
    detection = detect(vit, truth.calibration)
    with vit.edit(rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(0, 3)]), clear="none")):
        found = causal_order(vit, truth.calibration, neurons, detection=detection)
    assert found.change[0, 0, 3] < -0.95


def test_bad_input_is_named(chain, focus_vit):
    vit, truth, neurons = chain
    with pytest.raises(InterventionError, match="All 3 neurons are of block 1, so that none comes later"):
        causal_order(vit, truth.calibration, truth.neurons)
    with pytest.raises(InterventionError, match="No neuron was given"):
        causal_order(vit, truth.calibration, rl.RegisterNeurons.from_pairs([]))
    with pytest.raises(ImageError):
        causal_order(vit, torch.zeros(0, 3, 40, 48), neurons, detection=detect(vit, truth.calibration))
    images = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NoOutliersError, match="The causal order") as caught:
        causal_order(focus_vit, images, rl.RegisterNeurons.from_pairs([(3, 1), (9, 3)]))
    assert caught.value.evidence.verdict == "absent"


def test_saved_and_loaded_it_is_the_same(chain, tmp_path):
    vit, truth, neurons = chain
    found = causal_order(vit, truth.calibration, neurons)
    back = CausalOrder.load(found.save(tmp_path))
    assert back.describe() == found.describe() and back.to_dataframe().equals(found.to_dataframe())
    assert back.neurons == neurons and back.detection == found.detection

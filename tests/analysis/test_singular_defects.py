"""Singular defects: closed forms on linear toys, a dense second computation, planted neurons, the null."""

import dataclasses

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from helpers import randomise
from scipy import stats

import registerlens as rl
from registerlens.analysis.detection import find_outliers
from registerlens.analysis.linear_blocks import activation_moments, block_map, fit_mlp
from registerlens.analysis.singular_defects import SingularDefects, random_cosine_p, singular_defects
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ImageError, InterventionError, NonFiniteError, NoOutliersError, ShapeError
from registerlens.model.parts import ACTIVATIONS
from registerlens.theory.planted import plant_register_neurons

CFG = rl.ViTConfig(n_layers=3, d_model=24, n_heads=3, d_mlp=40, image_size=(32, 32), patch_size=(8, 8))


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny")


def model(seed=0, **changes):
    return randomise(rl.HookedViT(dataclasses.replace(CFG, **changes)), seed)


def silent(vit):
    """The same model with blocks that write nothing."""
    with torch.no_grad():
        for block in vit.blocks:
            for out in (block.attn.out, block.mlp.out):
                out.weight.zero_()
    return vit


def orthogonal(n, seed=0):
    """Unit vectors [n, d_model], orthogonal to each other and to the all-ones vector."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(CFG.d_model, n + 1, generator=generator, dtype=torch.float64)
    raw[:, 0] = 1
    return torch.linalg.qr(raw)[0].T[1:]


def slopes(mlp):
    """E[act'(pre-activation)] of each neuron for X ~ N(0, I), by a sum on a fine grid (Stein's lemma)."""
    nodes = np.linspace(-9, 9, 100_001)
    weights = stats.norm.pdf(nodes)
    with torch.enable_grad():
        norms = mlp.W_in.detach().double().norm(dim=0)[:, None]
        pre = (mlp.b_in.detach().double()[:, None] + norms * torch.tensor(nodes)).requires_grad_()
        gradient = torch.autograd.grad(mlp.act(pre).sum(), pre)[0]
    return (gradient * torch.tensor(weights / weights.sum())).sum(1)


# Linear toys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.3, 1.0, 8.0])
def test_one_rank_one_write_has_its_direction_in_closed_form(size):
    """E = I + s u v' with u, v orthonormal: its first left vector lies in their plane, at a known angle to u."""
    vit = silent(model(act_fn="relu"))
    u, v = orthogonal(2)
    mlp = vit.blocks[1].mlp
    with torch.no_grad():
        vit.blocks[1].ln2.w.fill_(1)
        mlp.up.weight[7] = v
        mlp.up.bias[7] = 100.0  # far above 0: the neuron is linear
        mlp.out.weight[:, 7] = size * u
    found = singular_defects(vit)
    # E E' in the basis (u, v) is [[1 + s^2, s], [s, 1]]
    angle = 0.5 * np.arctan2(2 * size, size**2)
    expected = (np.cos(angle) * u + np.sin(angle) * v).numpy()
    for layer in (1, 2):
        assert abs(found.directions[layer] @ expected) == pytest.approx(1, abs=1e-6)
        assert found.dominance[layer] == pytest.approx(np.sqrt(1 + size**2 / 2 + size * np.sqrt(1 + size**2 / 4)), 1e-5)
        assert found.angles_to(np.tile(u, (3, 1)))[layer] == pytest.approx(np.degrees(angle), abs=1e-3)
    assert found.dominance[0] == pytest.approx(1, abs=1e-9)
    assert found.alignment[1, 7] == pytest.approx(np.cos(angle), abs=1e-6) and found.ranks()[1, 7] == 0
    assert found.write_norm[1, 7] == pytest.approx(size, rel=1e-6) and found.alignment[1].argsort()[-1] == 7


def test_attention_values_write_and_layer_scale_counts():
    """A single head that copies v to u, scaled by LayerScale on the way out."""
    vit = silent(model(layer_scale=True, n_heads=1))
    u, v = orthogonal(2, 1)
    attn = vit.blocks[0].attn
    with torch.no_grad():
        for block in vit.blocks:
            block.ln1.w.fill_(2.0)
            block.attn.out.gamma.fill_(0.5)
        attn.W_V[0] = 0
        attn.W_V[0][:, 4] = v.float()
        attn.out.weight[:, 4] = 3 * u.float()
    exact = torch.eye(CFG.d_model, dtype=torch.float64) + 0.5 * 3 * 2 * torch.outer(u, v)
    torch.testing.assert_close(block_map(vit.blocks[0]), exact, rtol=1e-5, atol=1e-5)


def test_what_a_layernorm_does_not_read_does_not_count():
    """The centring: a value direction along the all-ones vector reads nothing; nor does a channel whose scale is 0."""
    vit = silent(model(n_heads=1))
    u, _ = orthogonal(2, 2)
    attn = vit.blocks[0].attn
    with torch.no_grad():
        attn.out.weight[:, 0] = 50 * u.float()
        attn.W_V[0] = 0
        vit.blocks[0].ln1.w.fill_(1.0)
        attn.W_V[0][:, 0] = 1.0
    identity = torch.eye(CFG.d_model, dtype=torch.float64)
    torch.testing.assert_close(block_map(vit.blocks[0]), identity, rtol=0, atol=1e-5)
    with torch.no_grad():
        attn.W_V[0][:, 0] = torch.nn.functional.one_hot(torch.tensor(3), CFG.d_model)
        vit.blocks[0].ln1.w[3] = 0.0
    torch.testing.assert_close(block_map(vit.blocks[0]), identity, rtol=0, atol=1e-5)


def test_blocks_that_write_nothing_leave_the_direction_arbitrary_and_say_so():
    found = singular_defects(silent(model()))
    np.testing.assert_allclose(found.dominance, 1, atol=1e-9)
    assert (found.alignment == 0).all() and "1 would be arbitrary" in found.describe()


# A second computation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"layer_scale": True, "act_fn": "quick_gelu"}, {"act_fn": "relu2"}])
def test_directions_equal_a_dense_computation_with_exact_fits(changes):
    """Column by column in numpy, all written anew."""
    vit = model(3, **changes)
    d = CFG.d_model
    product, expected = np.eye(d), []
    for block in vit.blocks:
        attn, mlp = block.attn, block.mlp
        gains = [1.0 if out.gamma is None else out.gamma.detach().double().numpy() for out in (attn.out, mlp.out)]
        values = attn.qkv.weight.detach().double().numpy()[2 * d :]
        readings = {}
        for norm in (block.ln1, block.ln2):
            eye = np.eye(d)
            readings[norm] = np.stack([norm.w.detach().double().numpy() * (e - e.mean()) for e in eye], 1)
        step = (
            np.eye(d)
            + np.diag(np.ones(d) * gains[0]) @ attn.out.weight.detach().double().numpy() @ values @ readings[block.ln1]
        )
        fit = slopes(mlp).numpy()[:, None] * mlp.W_in.detach().double().numpy().T
        mlp_step = np.diag(np.ones(d) * gains[1]) @ mlp.out.weight.detach().double().numpy() @ fit @ readings[block.ln2]
        product = (np.eye(d) + mlp_step) @ step @ product
        left, singular, _ = scipy.linalg.svd(product)
        expected.append((left[:, 0], singular / singular[0]))
    found = singular_defects(vit)
    for layer, (direction, singular) in enumerate(expected):
        assert abs(found.directions[layer] @ direction) >= 1 - 1e-9, layer
        np.testing.assert_allclose(found.singular_values[layer], singular, atol=1e-6)
        written = vit.blocks[layer].mlp.W_out.detach().double().numpy()
        cosine = np.abs(written @ found.directions[layer]) / np.linalg.norm(written, axis=1)
        np.testing.assert_allclose(found.alignment[layer], cosine, atol=1e-9)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_moments_under_a_normal_input_are_those_of_adaptive_quadrature(act):
    def at(x, order):
        x = torch.tensor(float(x), dtype=torch.float64, requires_grad=True)
        value = ACTIVATIONS[act](x)
        for _ in range(order):
            [value] = torch.autograd.grad(value, x, create_graph=True)
        return value.item()

    # A ReLU's second derivative is a spike that no quadrature sees.
    orders = (0, 1) if act == "relu" else (0, 1, 2)
    for mean, std in ((0.7, 0.3), (-3.0, 4.0), (1.0, 30.0)):
        kinks = [edge for edge in ((side - mean) / std for side in (-40, -8, 0, 8, 40)) if -12 < edge < 12]
        found = activation_moments(
            ACTIVATIONS[act], torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64)
        )
        for order in orders:
            area = scipy.integrate.quad(
                lambda z, order=order, mean=mean, std=std: at(mean + std * z, order) * stats.norm.pdf(z),
                *(-12, 12),
                points=kinks,
                epsabs=1e-13,
                limit=500,
            )
            assert found[order].item() == pytest.approx(area[0], rel=1e-11, abs=1e-12), (order, mean, std)


@pytest.mark.parametrize(
    "changes", [{"act_fn": "gelu"}, {"act_fn": "silu"}, {"act_fn": "relu2"}, {"act_fn": "silu", "gated_mlp": True}]
)
def test_the_fit_is_least_squares_on_normal_inputs(changes):
    """On samples in pairs X, -X, so that what is even in X, which has no slope, drops out."""
    mlp = model(4, **changes).double().blocks[0].mlp
    x = torch.randn(200_000, CFG.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        odd = (mlp.neurons(x) - mlp.neurons(-x)) / 2 @ mlp.W_out
        sampled = torch.linalg.lstsq(x, odd).solution.T
        exact = fit_mlp(mlp)
    assert (sampled - exact).norm() < 0.02 * exact.norm()


def test_two_runs_give_equal_bits(tiny):
    one, same = singular_defects(tiny), singular_defects(tiny)
    assert (one.directions == same.directions).all() and (one.alignment == same.alignment).all()


def test_edits_in_force_do_not_count():
    vit = model(6)
    before = singular_defects(vit)
    with vit.hooks([("blocks.*.mlp.hook_post", lambda x, hook: torch.zeros_like(x))]):
        assert (singular_defects(vit).directions == before.directions).all()


def test_permuting_heads_and_neurons_changes_nothing_but_their_order():
    vit, twin = model(7), model(7)
    d_head, order = CFG.d_head, torch.randperm(CFG.d_mlp, generator=torch.Generator().manual_seed(0))
    columns = torch.arange(3 * d_head).view(3, d_head)[[2, 0, 1]].flatten()
    with torch.no_grad():
        for block in twin.blocks:
            qkv = block.attn.qkv.weight.view(3, CFG.d_model, CFG.d_model)
            block.attn.qkv.weight.copy_(qkv[:, columns].flatten(0, 1))
            block.attn.out.weight.copy_(block.attn.out.weight[:, columns])
            block.mlp.up.weight.copy_(block.mlp.up.weight[order])
            block.mlp.up.bias.copy_(block.mlp.up.bias[order])
            block.mlp.out.weight.copy_(block.mlp.out.weight[:, order])
    one, other = singular_defects(vit), singular_defects(twin)
    np.testing.assert_allclose(other.directions, one.directions, atol=1e-4)
    np.testing.assert_allclose(other.alignment, one.alignment[:, order], atol=1e-4)


def test_scaling_what_a_relu_reads_against_what_it_writes_changes_nothing():
    """relu(c x) / c is relu(x): the same function, the same direction, the same cosines, but other norms."""
    vit, twin = model(8, act_fn="relu"), model(8, act_fn="relu")
    with torch.no_grad():
        for block in twin.blocks:
            block.mlp.up.weight.mul_(4)
            block.mlp.up.bias.mul_(4)
            block.mlp.out.weight.div_(4)
    one, other = singular_defects(vit), singular_defects(twin)
    np.testing.assert_allclose(other.directions, one.directions, atol=1e-4)
    np.testing.assert_allclose(other.alignment, one.alignment, atol=1e-4)
    np.testing.assert_allclose(other.write_norm, one.write_norm / 4, rtol=1e-5)


# The null ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3, 24, 384, 1024])
def test_the_null_is_the_beta_distribution_and_what_random_directions_do(d):
    cosines = np.array([0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.9, 1.0])
    exact = stats.beta.sf(cosines**2, 0.5, (d - 1) / 2)
    np.testing.assert_allclose(random_cosine_p(cosines, d), exact, rtol=1e-3, atol=1e-12)
    drawn = np.random.default_rng(0).standard_normal((4000, d))
    drawn = np.abs(drawn[:, 0]) / np.linalg.norm(drawn, axis=1)
    p = np.sort(random_cosine_p(drawn, d))
    assert np.abs(p - (np.arange(4000) + 0.5) / 4000).max() < 0.03  # uniform, by Kolmogorov and Smirnov


def test_one_random_direction_in_twenty_lies_below_the_random_angle():
    found = singular_defects(model(9))
    drawn = np.random.default_rng(1).standard_normal((20_000, CFG.d_model))
    cosine = np.abs(drawn @ found.directions[1]) / np.linalg.norm(drawn, axis=1)
    below = (np.degrees(np.arccos(cosine)) < found.random_angle).mean()
    assert below == pytest.approx(0.05, abs=0.007)


# Models with answers -------------------------------------------------------------------------------------------------


def test_in_the_tiny_model_the_weights_alone_name_all_register_neurons(tiny):
    """Algorithm 1 finds seven neurons of block 1 from images; seven of 256 are the best by the weights, p < 1e-15."""
    known = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
    found = singular_defects(tiny)
    table = found.neurons(known)
    assert sorted(table["rank_in_layer"]) == list(range(7)) and table["p_value"].max() < 1e-15
    assert table["alignment"].min() > 0.95 and list(table["neuron"]) == [n for _, n in known.pairs]
    assert found.neurons(top=3)["layer"].tolist() == [1, 1, 1]


def test_measured_outliers_of_the_tiny_model_lie_near_the_direction_where_they_arise(tiny):
    images = synthetic_images(32, 0).images
    found = singular_defects(tiny, images, batch_size=10)
    outliers = find_outliers(tiny, images)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(images)
    for layer in range(6):
        x = cache[f"blocks.{layer}.hook_resid_post"].double()
        cosine = (x @ torch.tensor(found.directions[layer])).abs() / x.norm(dim=-1)
        angle = cosine.acos().rad2deg()
        assert found.outlier_angle[layer] == pytest.approx(float(angle[outliers.mask].mean()), abs=1e-2)
        assert found.normal_angle[layer] == pytest.approx(float(angle[~outliers.mask].mean()), abs=1e-2)
    assert found.outlier_angle[1] < 15 and found.normal_angle[1] > 60 and found.n_images == 32


def planted_with_open_neurons(norm, layer=1):
    """Planted neurons whose biases are 0: unlike detectors with a threshold they are linear on half of all inputs."""
    torch.manual_seed(0)
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8))
    planted, truth = plant_register_neurons(rl.HookedViT(cfg).eval(), layer=layer, n=3, norm=norm)
    with torch.no_grad():
        planted.blocks[layer].mlp.up.bias[[n for _, n in truth.neurons.pairs]] = 0
    return planted, truth


def gain(vit, truth):
    """Size of the planted rank-one map in the linearised block: |what is written| x |summed slopes of what is read|."""
    block, chosen = vit.blocks[truth.layer], [n for _, n in truth.neurons.pairs]
    read = slopes(block.mlp)[chosen] @ (block.mlp.W_in.detach().double().T[chosen] * block.ln2.w.detach().double())
    return float(block.mlp.W_out.detach().double()[chosen[0]].norm() * (read - read.mean()).norm())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_planted_neurons_rank_first_where_their_gain_dominates(layer):
    planted, truth = planted_with_open_neurons(norm=20.0, layer=layer)
    assert gain(planted, truth) > 3
    found = singular_defects(planted)
    table = found.neurons(truth.neurons)
    assert set(table["rank_in_layer"]) == {0, 1, 2} and table["p_value"].max() < 1e-6
    angles = found.angles_to(np.tile(truth.direction.double().numpy(), (4, 1)))
    # tan(2 angle) = 2 / gain for a rank-one write on the identity; the rest of the block adds a little
    assert angles[layer] == pytest.approx(np.degrees(0.5 * np.arctan2(2, gain(planted, truth))), abs=5)
    assert angles[layer:].max() < 15  # later blocks neither read nor write it


def test_a_detector_with_a_threshold_is_invisible_to_the_linearisation():
    """As planted: the neurons never fire on a normal input, their slope there is nothing, and no weight can show it."""
    torch.manual_seed(0)
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8))
    planted, truth = plant_register_neurons(rl.HookedViT(cfg).eval(), layer=1, n=3)
    assert gain(planted, truth) < 0.01 and rl.trace(planted, truth.calibration).verdict == "present"
    found = singular_defects(planted, truth.calibration)
    assert found.neurons(truth.neurons)["rank_in_layer"].min() > 3
    assert found.outlier_angle[1:].min() > 60  # so that the measured angle says the prediction has failed


# Bad input -----------------------------------------------------------------------------------------------------------


def test_without_outliers_only_the_measurement_is_refused(focus_vit):
    images = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NoOutliersError, match="Measuring the angle of outliers") as caught:
        singular_defects(focus_vit, images)
    assert caught.value.evidence.verdict == "absent"
    found = singular_defects(model(11))
    assert np.isnan(found.outlier_angle).all() and "No outliers were measured" in found.describe()


def test_bad_input_is_named(tiny):
    vit = model(10)
    found = singular_defects(vit)
    with pytest.raises(ShapeError, match=r"\[3, 24\], got \[2, 24\]"):
        found.angles_to(np.zeros((2, 24)))
    with pytest.raises(InterventionError, match=r"\[\(3, 0\)\] do not exist"):
        found.neurons(rl.RegisterNeurons.from_pairs([(3, 0)]))
    assert len(found.neurons(rl.RegisterNeurons.from_pairs([]))) == 0
    with pytest.raises(ImageError):
        singular_defects(tiny, torch.zeros(0, 3, 48, 48))
    with torch.no_grad():
        vit.blocks[1].ln2.w[3] = float("nan")
        vit.blocks[2].attn.qkv.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.ln2\.w, blocks\.2\.attn\.qkv\.weight"):
        singular_defects(vit)


def test_saved_and_loaded_it_is_the_same(tiny, tmp_path):
    for images in (None, synthetic_images(16, 0).images):
        found = singular_defects(tiny, images)
        back = SingularDefects.load(found.save(tmp_path))
        assert back.describe() == found.describe() and back.detection == found.detection
        assert back.to_dataframe().equals(found.to_dataframe()) and back.neurons().equals(found.neurons())

"""Kernel checks: against numpy and scipy, on planted models, on the embedded one, and what is refused or reported."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import randomise
from scipy import linalg
from test_planted import CFG, backbone

import registerlens as rl
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ConfigError, ImageError, InterventionError, NonFiniteError, WeightsError
from registerlens.theory.kernels import KernelReport, check_kernels
from registerlens.theory.measurements import other_neurons, random_units, stand
from registerlens.theory.observed import observe
from registerlens.theory.readers import EPSILONS, KERNELS, decompose, directions
from registerlens.theory.verdicts import find, judge, select, with_verdicts

SMALL = rl.ViTConfig(
    n_layers=3, d_model=24, n_heads=3, d_mlp=40, image_size=(24, 32), patch_size=(8, 8), layer_scale=True, d_out=7
)
SEVEN = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])


def small(seed=0, **changes):
    return randomise(rl.HookedViT(dataclasses.replace(SMALL, **changes)), seed)


def rows(report, **columns):
    return select(report.table, **columns)


def array(tensor):
    return tensor.detach().double().numpy()


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def seen(tiny):
    return check_kernels(tiny, SEVEN, images=synthetic_images(64, 1).images)


# Independent computations --------------------------------------------------------------------------------------------


def matrices(vit, layer):
    """{(condition, head): matrix from the raw stream}, spelled out with numpy."""
    block, d = vit.blocks[layer], vit.cfg.d_model
    centre = np.eye(d) - np.ones((d, d)) / d
    W_V, W_O = array(block.attn.W_V), array(block.attn.W_O)
    first, second = centre @ np.diag(array(block.ln1.w)), centre @ np.diag(array(block.ln2.w))
    found = {("value", -1): first @ np.hstack(list(W_V)), ("mlp", -1): second @ array(block.mlp.up.weight).T}
    found[("ov", -1)] = first @ sum(v @ o for v, o in zip(W_V, W_O, strict=True))
    return found | {("ov_head", h): first @ v @ o for h, (v, o) in enumerate(zip(W_V, W_O, strict=True))}


def u1_of(vit, layer, neuron):
    u = array(vit.blocks[layer].ln2.w) * array(vit.blocks[layer].mlp.up.weight)[neuron]
    return u - u.mean()


def u2_of(vit, layer, neuron):
    out = vit.blocks[layer].mlp.out
    return array(out.weight)[:, neuron] * (1 if out.gamma is None else array(out.gamma))


def test_every_residual_and_kernel_share_agrees_with_numpy_and_scipy():
    vit = small()
    with torch.no_grad():  # low rank, so that there is a kernel to find
        for block in vit.blocks:
            up = block.mlp.up.weight
            up.copy_(torch.randn(40, 9) @ torch.randn(9, 24) * 0.1)
    pairs = [(0, 3), (0, 17), (1, 5)]
    report = check_kernels(vit, rl.RegisterNeurons.from_pairs(pairs))
    checked = 0
    for layer, neuron in pairs:
        for vector, u in (("u1", u1_of(vit, layer, neuron)), ("u2", u2_of(vit, layer, neuron))):
            u = u - u.mean()
            u /= np.linalg.norm(u)
            for reader in range(layer + 1, 3):
                for (condition, head), matrix in matrices(vit, reader).items():
                    place = {"neuron_layer": layer, "neuron": neuron, "vector": vector, "layer": reader}
                    mine = rows(report, condition=condition, head=head, **place)
                    [residual] = select(mine, quantity="residual")["value"]
                    expected = np.linalg.norm(matrix.T @ u) / np.linalg.norm(matrix, 2)
                    assert residual == pytest.approx(expected, rel=1e-6, abs=1e-7)
                    for epsilon in EPSILONS:
                        [share] = select(mine, eps=epsilon)["value"]
                        kernel = linalg.null_space(matrix.T, rcond=epsilon)
                        assert share == pytest.approx(np.sum((kernel.T @ u) ** 2), abs=1e-6)
                        checked += 1
    assert checked == len(EPSILONS) * 2 * (2 * 2 * 6 + 6)
    assert rows(report, condition="mlp", eps=0.001)["value"].min() > 0.1  # not trivially zero


def test_the_head_is_read_through_the_final_norm_in_every_pooled_part():
    vit = small(pooling=("cls", "mean"))
    report = check_kernels(vit, rl.RegisterNeurons.from_pairs([(2, 4)]))
    u = u2_of(vit, 2, 4) - u2_of(vit, 2, 4).mean()
    W, w = array(vit.head.linear.weight), array(vit.ln_final.w)
    matrix = np.hstack([np.diag(w) @ W[:, :24].T, np.diag(w) @ W[:, 24:].T])
    matrix = matrix - matrix.mean(0)
    [value] = rows(report, condition="head", vector="u2", quantity="residual")["value"]
    assert value == pytest.approx(np.linalg.norm(matrix.T @ u) / np.linalg.norm(matrix, 2) / np.linalg.norm(u))


def test_without_a_final_norm_the_head_sees_the_mean():
    vit = small(final_norm=False)
    report = check_kernels(vit, rl.RegisterNeurons.from_pairs([(2, 4)]))
    u, matrix = u2_of(vit, 2, 4), array(vit.head.linear.weight)
    [value] = rows(report, condition="head", vector="u2", quantity="residual")["value"]
    assert value == pytest.approx(np.linalg.norm(matrix @ u) / np.linalg.norm(matrix, 2) / np.linalg.norm(u))


def test_what_must_not_matter_does_not():
    vit, neurons = small(), rl.RegisterNeurons.from_pairs([(0, 3), (1, 5)])
    before = check_kernels(vit, neurons).table
    scaled = small()
    with torch.no_grad():
        scaled.blocks[2].attn.qkv.weight.view(3, -1, 24)[2] *= 3  # values of all heads
        scaled.blocks[2].mlp.up.weight *= 0.2
        scaled.head.linear.weight *= 50
        scaled.blocks[1].mlp.up.weight *= scaled.blocks[1].ln2.w  # a norm's scale moved into the weights behind it
        scaled.blocks[1].ln2.w.fill_(1)
        out = scaled.blocks[0].mlp.out
        out.weight[:, 3] += 4 / out.gamma  # the all-ones direction, which no LayerNorm lets pass
    after = check_kernels(scaled, neurons).table
    kernels = select(before, condition=list(KERNELS)).index
    for column in ("value", "random", "random_p"):
        np.testing.assert_allclose(after.loc[kernels, column], before.loc[kernels, column], rtol=1e-4, atol=1e-6)
    assert not np.allclose(
        select(after, condition="dominance")["value"], select(before, condition="dominance")["value"]
    )


def test_heads_in_another_order_are_the_same_heads():
    vit, shuffled, order = small(), small(), [2, 0, 1]
    neurons = rl.RegisterNeurons.from_pairs([(0, 3)])
    with torch.no_grad():
        for old, new in zip(vit.blocks, shuffled.blocks, strict=True):
            for name in ("weight", "bias"):
                parameter = getattr(new.attn.qkv, name)
                parameter.copy_(getattr(old.attn.qkv, name).unflatten(0, (3, 3, 8))[:, order].flatten(0, 2))
            new.attn.out.weight.copy_(old.attn.out.weight.unflatten(1, (3, 8))[:, order].flatten(1))
    before, after = check_kernels(vit, neurons), check_kernels(shuffled, neurons)
    for condition in ("value", "ov", "mlp", "head"):
        got, expected = (rows(report, condition=condition)["value"] for report in (after, before))
        np.testing.assert_allclose(got, expected, atol=1e-7)
    for condition in ("ov_head", "key"):
        for new, old in enumerate(order):
            got, expected = rows(after, condition=condition, head=new), rows(before, condition=condition, head=old)
            np.testing.assert_allclose(got["value"], expected["value"], atol=1e-6)
            assert len(got)


# Nulls ---------------------------------------------------------------------------------------------------------------


def test_standing_counts_ties_and_both_tails():
    null = torch.tensor([1.0, 2.0, 2.0, 3.5]).double()  # skewed: the median is not the mean
    low = stand(torch.tensor([0.0, 2.0, 4.0]).double(), null, "low")
    high = stand(torch.tensor([0.0, 2.0, 4.0]).double(), null, "high")
    assert low.percentile.tolist() == high.percentile.tolist() == [0.0, 50.0, 100.0]
    np.testing.assert_allclose(low.p, [1 / 5, 4 / 5, 1])
    np.testing.assert_allclose(high.p, [1, 4 / 5, 1 / 5])
    assert low.typical.tolist() == [2, 2, 2] and low.spread[0].item() == pytest.approx(np.std([1, 2, 2, 3.5]))
    assert math.isnan(stand(torch.tensor([1.0]).double(), null[:0], "low").p.item())


def test_random_directions_in_the_singular_basis_are_random_directions():
    vit = small()
    spectrum = decompose(vit.blocks[1].ln2, vit.blocks[1].mlp.W_in)
    generator = torch.Generator().manual_seed(0)
    direct = directions(vit.blocks[1].ln2, torch.randn(20_000, 24, generator=generator))
    direct = spectrum.measure(spectrum.shares(direct))
    short = spectrum.measure(random_units(20_000, spectrum.dimensions, generator).square())
    levels = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99]).double()
    torch.testing.assert_close(direct.quantile(levels, 0), short.quantile(levels, 0), atol=0.02, rtol=0)
    assert spectrum.typical_residual == pytest.approx(direct[:, 0].square().mean().sqrt().item(), rel=0.01)


def test_p_values_of_neurons_without_any_story_are_uniform():
    vit = small(d_mlp=400)
    neurons = rl.RegisterNeurons.from_pairs([(0, n) for n in range(200)])
    report = check_kernels(vit, neurons)
    for null in ("random", "neurons"):
        p = rows(report, condition="mlp", vector="u2", layer=1, quantity="residual")[f"{null}_p"].to_numpy()
        assert len(p) == 200
        assert np.abs(np.sort(p) - np.linspace(0, 1, 200)).max() < 0.12  # Kolmogorov and Smirnov's 1% bound
    assert report.no_op == "fails"


def test_dominance_is_over_every_other_row():
    vit = small(d_mlp=700)
    with torch.no_grad():
        vit.blocks[1].mlp.out.weight[:, 650] *= 9
    for pairs, largest in (([(1, 5)], 650), ([(1, 5), (1, 650)], None)):
        report = check_kernels(vit, rl.RegisterNeurons.from_pairs(pairs))
        norms = np.array([np.linalg.norm(u2_of(vit, 1, n)) for n in range(700)])
        others = np.delete(norms, [n for _, n in pairs])
        assert largest is None or others.max() == norms[largest]
        for quantity, unit in (
            ("over_largest", others.max()),
            ("over_median", np.sort(others)[(len(others) - 1) // 2]),
        ):
            [value] = rows(report, condition="dominance", quantity=quantity, neuron=5)["value"]
            assert value == pytest.approx(norms[5] / unit)
    assert set(rows(report, condition="dominance", neuron=650)["verdict"]) == {"holds", ""}


def test_other_neurons_are_others():
    vit, neurons = small(), rl.RegisterNeurons.from_pairs([(1, 5), (1, 9)])
    others = other_neurons(vit, 1, neurons, torch.Generator().manual_seed(0))
    assert len(others["u1"]) == len(others["u2"]) == 38
    for neuron in (5, 9):
        own = torch.from_numpy(u2_of(vit, 1, neuron))
        assert (others["u2"] - own).norm(dim=1).min() > 1e-3
    expected = {round(float(np.linalg.norm(u2_of(vit, 1, n))), 5) for n in range(40) if n not in (5, 9)}
    assert {round(float(norm), 5) for norm in others["u2"].norm(dim=1)} == expected


# Planted models ------------------------------------------------------------------------------------------------------

WIDE = dataclasses.replace(CFG, n_layers=5, d_model=128, d_mlp=512, n_heads=4, image_size=(48, 48))
PLANTED = {
    "plain": CFG,
    "layer scale": dataclasses.replace(CFG, layer_scale=True),
    "ln_pre": dataclasses.replace(CFG, ln_pre=True, act_fn="quick_gelu"),
    "every token": dataclasses.replace(CFG, class_token=False, pooling=(), act_fn="relu2", n_heads=1),
    "cls and mean": dataclasses.replace(CFG, n_trained_registers=3, distillation_token=True, pooling=("cls", "mean")),
    "no head, no final norm": dataclasses.replace(CFG, d_out=None, final_norm=False),
}


def test_an_exact_kernel_holds_in_every_case():
    for seed, name in enumerate([*PLANTED, "plain", "plain"]):
        vit, layer, n = backbone(PLANTED[name], seed), seed % 3, 1 + seed % 5
        planted, truth = rl.plant_register_neurons(vit, layer=layer, n=n, seed=seed)
        report = check_kernels(planted, truth.neurons)
        kernels = [found for found in report.findings if found.vector == "u2" and found.condition in KERNELS]
        assert len(kernels) == 5 - (planted.cfg.n_heads == 1) - (planted.head.linear is None)
        assert all(found.verdict == "holds" and found.effect < 1e-5 for found in kernels), report.describe()
        assert set(rows(report, vector="u2", quantity="residual")["verdict"]) == {"holds"}
        assert report.no_op == "holds" and report.finding("dominance").verdict != "fails"
        assert report.violation() < 1e-5 and "Yes: attention" in report.conclusion()
        # What was not planted is not found: the neurons' input is read like any direction.
        assert {found.verdict for found in report.findings if found.vector == "u1"} == {"fails"}


@pytest.mark.parametrize("violation", [0.1, 0.3, 1.0])
def test_a_violation_is_measured_reader_by_reader(violation):
    """Against what the model read of the same direction before the planting."""
    for seed, (layer, n) in enumerate([(0, 1), (1, 3), (2, 5)]):
        vit = backbone(dataclasses.replace(CFG, layer_scale=seed == 1), seed)
        planted, truth = rl.plant_register_neurons(vit, layer=layer, n=n, violation=violation, seed=seed)
        report = check_kernels(planted, truth.neurons)
        u = array(truth.direction)
        measured = []
        for reader in range(layer + 1, 4):
            old, new = matrices(vit, reader), matrices(planted, reader)
            for (condition, head), matrix in new.items():
                found = rows(report, condition=condition, head=head, layer=reader, vector="u2", quantity="residual")
                before = np.linalg.norm(old[condition, head].T @ u) / np.linalg.norm(matrix, 2)
                measured += list(found["value"] / before)
        assert len(measured) == n * (3 - layer) * 7
        np.testing.assert_allclose(measured, violation, rtol=0.05)
        expected = "holds approximately" if violation < 0.5 else "fails"
        assert report.finding("mlp").verdict == report.finding("value").verdict == expected


def test_a_violation_is_measured_without_the_unplanted_model():
    """Against random directions: exact on average, and as exact in one model as its size allows."""
    measured = []
    for seed, violation in enumerate([0.1, 0.3, 0.6, 1.0, 0.2]):
        layer, n = seed % 3, 1 + seed % 4
        vit = backbone(WIDE, seed)
        planted, truth = rl.plant_register_neurons(vit, layer=layer, n=n, violation=violation, seed=seed)
        measured.append(check_kernels(planted, truth.neurons).violation() / violation)
    assert np.mean(measured) == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(measured, 1, atol=0.1)


@pytest.mark.parametrize("with_images", [False, True])
def test_the_key_side_names_exactly_the_heads_made_to_seek(with_images):
    for seed in range(3):
        vit = backbone(seed=seed)
        planted, truth = rl.plant_register_neurons(vit, layer=seed % 2, n=2, sink_heads=1, seed=seed)
        report = check_kernels(planted, truth.neurons, images=truth.calibration if with_images else None)
        vectors = ("u2", "outlier") if with_images else ("u2",)
        for vector in vectors:
            seeking = rows(report, condition="key", vector=vector, verdict="holds")
            assert set(zip(seeking["layer"], seeking["head"], strict=True)) == set(truth.sink_heads)
            assert report.finding("key", vector).verdict == "holds"
        assert any("stands in" in note for note in report.notes) != with_images


def test_a_head_that_avoids_the_direction_fails():
    planted, truth = rl.plant_register_neurons(backbone(), layer=2, n=1, sink_heads=1)
    [(layer, head)] = truth.sink_heads
    with torch.no_grad():
        planted.blocks[layer].attn.W_K[head].neg_()
    report = check_kernels(planted, truth.neurons)
    [row] = rows(report, condition="key", head=head).to_dict("records")
    assert row["value"] < -5 and row["verdict"] == "fails" and row["random_p"] > 0.99
    assert report.finding("key").verdict == "fails"


# With images ---------------------------------------------------------------------------------------------------------


def test_the_key_side_is_the_mean_score_of_a_dominated_token():
    planted, truth = rl.plant_register_neurons(backbone(), layer=0, n=1, violation=0.5)
    images = truth.calibration[:12]
    report = check_kernels(planted, truth.neurons, images=images, batch_size=5)
    with torch.inference_mode():
        _, cache = planted.run_with_cache(images, names_filter=["blocks.*.attn.hook_[qk]", "blocks.0.hook_resid_post"])
    detection = observe(planted, images, [0], 1).detection
    norms = cache["blocks.0.hook_resid_post"][:, planted.layout(images).patches].norm(dim=-1)
    ordinary = torch.ones(len(images), planted.layout(images).n_tokens, dtype=torch.bool)
    ordinary[:, planted.layout(images).patches] = ~detection.cutoff.above(norms)
    assert report.n_outliers == (~ordinary).sum() > 5
    u = torch.from_numpy(u2_of(planted, 0, truth.neurons.pairs[0][1])).float()
    for layer in (1, 2, 3):
        block = planted.blocks[layer]
        dominated = block.ln1(1e6 * u)
        for head in range(4):
            q, k = (cache[f"blocks.{layer}.attn.hook_{name}"][ordinary][:, head].double() for name in "qk")
            key = dominated.double() @ block.attn.W_K[head].double() + block.attn.b_K[head].double()
            expected = ((q @ key).mean() - (q @ k.T).mean()) / math.sqrt(planted.cfg.d_head)
            [value] = rows(report, condition="key", vector="u2", layer=layer, head=head)["value"]
            assert value == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


def test_alignment_and_agreement_are_mean_cosines(tiny, seen):
    batch = synthetic_images(64, 1)
    with torch.inference_mode():
        _, cache = tiny.run_with_cache(batch.images, names_filter="blocks.1.hook_resid_*")
    flat = batch.roles == FLAT
    assert seen.n_outliers == flat.sum() and seen.n_images == 64
    for neuron in (183, 177):
        for condition, vector, u, place in (
            ("alignment", "u1", u1_of(tiny, 1, neuron), "mid"),
            ("agreement", "u2", u2_of(tiny, 1, neuron), "post"),
        ):
            tokens = array(cache[f"blocks.1.hook_resid_{place}"][flat])
            centred, u = tokens - tokens.mean(1, keepdims=True), u - u.mean()
            cosines = centred @ u / np.linalg.norm(centred, axis=1) / np.linalg.norm(u)
            [value] = rows(seen, condition=condition, vector=vector, neuron=neuron)["value"]
            assert value == pytest.approx(cosines.mean(), abs=1e-4)


def test_batches_and_streams_give_the_same(tiny):
    images = synthetic_images(40, 3).images
    whole = observe(tiny, images, [1], 2, batch_size=40)
    for other in (observe(tiny, images, [1], 2, batch_size=7), observe(tiny, iter(images.split(9)), [1], 2)):
        assert (other.n_images, other.n_outliers) == (40, whole.n_outliers)
        torch.testing.assert_close(other.after, whole.after, atol=1e-6, rtol=0)
        torch.testing.assert_close(other.before[1], whole.before[1], atol=1e-6, rtol=0)
        for layer in range(2, 6):
            torch.testing.assert_close(other.query[layer], whole.query[layer], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other.key[layer], whole.key[layer], atol=1e-4, rtol=1e-4)
    assert not any(point.has_hooks() for point in tiny.hook_dict.values())


def test_without_outliers_the_conditions_on_them_do_not_apply():
    vit = backbone()
    report = check_kernels(vit, rl.RegisterNeurons.from_pairs([(1, 3)]), images=torch.randn(8, 3, 64, 64))
    assert report.n_outliers == 0 and "outlier" not in set(report.table["vector"])
    assert all("no outlier tokens" in report.not_applicable[name] for name in ("alignment", "agreement"))


# The embedded model --------------------------------------------------------------------------------------------------


def test_the_embedded_model_has_a_reading_for_every_condition(seen):
    verdicts = {(found.condition, found.vector): found.verdict for found in seen.findings}
    for vector in ("u2", "outlier"):
        assert verdicts["value", vector] == verdicts["ov", vector] == "holds approximately"
        assert verdicts["mlp", vector] == verdicts["head", vector] == "fails"
        assert verdicts["key", vector] == "holds"
    assert verdicts["concentration", "u2"] == verdicts["agreement", "u2"] == "holds"
    assert verdicts["dominance", "u2"] == verdicts["alignment", "u1"] == "holds approximately"
    assert {verdicts[name, "u1"] for name in ("value", "ov", "mlp", "head")} == {"fails"}
    words = seen.describe()
    assert all(found.words in words for found in seen.findings)
    assert seen.no_op == "holds approximately" and "no-ops, as far as weights can tell? In part" in words
    assert all(f"{name}, blocks 2 to 5" in words for name in ("(W_V)", "later MLPs (W_in)", "as a key"))


def test_what_weights_say_of_the_values_is_what_images_show(tiny, seen):
    """The value norm of flat patches over that of others, block by block: 0.42 0.20 0.20 0.30 when it was trained."""
    batch = synthetic_images(64, 1)
    with torch.inference_mode():
        _, cache = tiny.run_with_cache(batch.images, names_filter="blocks.*.attn.hook_v")
    flat = batch.roles == FLAT
    for layer in range(2, 6):
        norms = cache[f"blocks.{layer}.attn.hook_v"].flatten(2).norm(dim=-1)
        [row] = rows(seen, condition="value", vector="outlier", layer=layer, quantity="residual").to_dict("records")
        assert row["value"] / row["random"] == pytest.approx((norms[flat].mean() / norms[~flat].mean()).item(), abs=0.1)


# Verdicts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "effect", "random_p", "neurons_p", "expected"),
    [
        ("mlp", 0.05, 0.01, 1.0, "holds"),
        ("mlp", 0.051, 0.01, 1.0, "holds approximately"),
        ("value", 0.5, 0.01, 1.0, "holds approximately"),
        ("value", 0.51, 0.001, 0.001, "fails"),
        ("ov", 0.01, 0.011, 0.001, "fails"),
        ("dominance", 2.0, math.nan, 1.0, "holds"),
        ("dominance", 1.0, math.nan, 1.0, "holds approximately"),
        ("dominance", 0.9, math.nan, 0.01, "holds approximately"),
        ("dominance", 0.9, math.nan, 0.02, "fails"),
        ("concentration", 0.5, 0.01, 1.0, "holds"),
        ("concentration", 0.4, 0.01, 0.05, "holds approximately"),
        ("concentration", 0.4, 0.01, 0.06, "fails"),
        ("key", math.log(50), 0.01, 1.0, "holds"),
        ("key", 0.1, 0.01, 1.0, "holds approximately"),
        ("key", -0.1, 0.01, 1.0, "fails"),
        ("agreement", 0.9, 0.01, 1.0, "holds"),
        ("alignment", 0.5, 0.01, 1.0, "holds approximately"),
        ("alignment", 0.5, 0.02, 1.0, "fails"),
    ],
)
def test_verdicts_at_their_bounds(condition, effect, random_p, neurons_p, expected):
    assert judge(condition, effect, random_p, neurons_p, 50) == expected


def test_one_seeking_head_a_block_is_enough_and_every_block_needs_one():
    report = check_kernels(small(), rl.RegisterNeurons.from_pairs([(0, 3)]))
    key = rows(report, condition="key", vector="u2").drop(columns="verdict")
    assert len(key) == 6
    for leads, expected in (
        ([9, -9, 0, -9, 9, 0], "holds"),
        ([9, 9, 9, -9, 0, -9], "holds approximately"),
        ([9, 0, 0, 1, 0, 0], "holds approximately"),
        ([-9, 0, -9, -9, 0, -9], "fails"),
    ):
        table = key.assign(value=np.array(leads, dtype=float), random_p=0.001)
        [found] = find(with_verdicts(table, 50), 50)
        assert found.verdict == expected


def test_a_missing_finding_says_why():
    report = check_kernels(small(d_out=None), rl.RegisterNeurons.from_pairs([(1, 3)]))
    with pytest.raises(ConfigError, match="No finding on 'head' for 'u2': the model has no head or projection"):
        report.finding("head")
    with pytest.raises(ConfigError, match="Nothing reads 'u2' in block 1"):
        report.violation(layer=1)


# Bad input, and what is reported -------------------------------------------------------------------------------------


def test_no_neuron_or_one_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="No neuron to check: the list is empty"):
        check_kernels(small(), rl.RegisterNeurons.from_pairs([]))
    with pytest.raises(InterventionError, match="blocks 0 to 2 with neurons 0 to 39"):
        check_kernels(small(), rl.RegisterNeurons.from_pairs([(1, 40)]))
    with pytest.raises(ImageError, match="No image"):
        check_kernels(small(), rl.RegisterNeurons.from_pairs([(1, 4)]), images=torch.zeros(0, 3, 24, 32))


def test_a_block_without_later_blocks_is_reported():
    neurons = rl.RegisterNeurons.from_pairs([(2, 3)])
    report = check_kernels(small(), neurons)
    assert {found.condition for found in report.findings} == {"head", "dominance", "concentration"}
    for name in ("value", "ov", "ov_head", "mlp", "key"):
        assert report.not_applicable[name] == "block 2 is the last: no block reads what its neurons write"
    assert report.no_op is None and "no later block's attention" in report.describe()
    headless = check_kernels(small(d_out=None), neurons)
    assert {found.condition for found in headless.findings} == {"dominance", "concentration"}
    assert "Not applicable, head: the model has no head or projection" in headless.describe()


@pytest.mark.parametrize(
    "name", ["blocks.2.mlp.up.weight", "blocks.1.attn.qkv.bias", "ln_final.w", "head.linear.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(name, value):
    vit = small()
    with torch.no_grad():
        vit.get_parameter(name).view(-1)[3] = value
    with pytest.raises(NonFiniteError, match=rf"{name} holds NaN or infinity in 1 of \d+ places"):
        check_kernels(vit, rl.RegisterNeurons.from_pairs([(0, 3)]))


def test_what_lies_before_the_neurons_need_not_be_finite():
    vit = small()
    with torch.no_grad():
        vit.blocks[0].mlp.up.weight[0, 0] = math.nan
    assert check_kernels(vit, rl.RegisterNeurons.from_pairs([(1, 3)])).findings


def test_dimensions_a_layernorm_closes_are_noted_and_lie_in_the_kernel():
    vit = small()
    with torch.no_grad():
        vit.blocks[2].ln2.w[:5] = 0
        vit.ln_final.w[7] = 1e-12
        out = vit.blocks[1].mlp.out
        out.weight[:, 3] = torch.tensor([1.0, -3.0, 2.0, -4.0, 4.0] + 19 * [0.0]) / out.gamma
    report = check_kernels(vit, rl.RegisterNeurons.from_pairs([(1, 3)]))
    assert "blocks.2.ln2 scales 5 of 24 dimensions to nothing: they lie in the kernel of all" in report.describe()
    assert any(note.startswith("ln_final scales 1 of 24") for note in report.notes) and len(report.notes) == 3
    # u2 lives in the closed dimensions of the MLP's norm, those of attention are open.
    mlp, value = (rows(report, condition=name, vector="u2", layer=2) for name in ("mlp", "value"))
    assert select(mlp, quantity="kernel_share")["value"].min() == pytest.approx(1)
    assert mlp["value"].iloc[0] < 1e-6 < 0.1 < value["value"].iloc[0]


def test_a_norm_or_a_layer_scale_of_zeros_leaves_no_reader():
    vit = small()
    with torch.no_grad():
        vit.blocks[2].ln2.w.zero_()
        vit.blocks[2].attn.out.gamma.zero_()
    report = check_kernels(vit, rl.RegisterNeurons.from_pairs([(1, 3)]))
    idle = {note.split(" reads")[0] for note in report.notes if "reads nothing at all" in note}
    assert idle == {"Block 2, ov", *(f"Block 2, ov_head {head}" for head in range(3)), "Block 2, mlp"}
    assert {found.condition for found in report.findings if found.vector == "u2"} == {
        *("value", "head", "key", "dominance", "concentration")
    }


def test_neurons_that_read_or_write_nothing_are_noted_or_refused():
    vit = small()
    with torch.no_grad():
        vit.blocks[1].mlp.out.weight[:, 3] = 0
        vit.blocks[1].mlp.up.weight[5] = 0
    report = check_kernels(vit, rl.RegisterNeurons.from_pairs([(1, 3), (1, 5), (1, 7)]))
    assert "Neuron [3] of block 1 writes nothing: its u2 is zero." in report.notes
    assert "Neuron [5] of block 1 reads nothing: its u1 is zero." in report.notes
    assert set(rows(report, vector="u2")["neuron"]) == {5, 7} and set(rows(report, vector="u1")["neuron"]) == {3, 7}
    with pytest.raises(WeightsError, match="None of these neurons writes anything"):
        check_kernels(vit, rl.RegisterNeurons.from_pairs([(1, 3)]))


def test_without_biases_the_key_side_needs_images():
    vit = small(qkv_bias=False)
    with torch.no_grad():
        for block in vit.blocks:
            block.ln1.b.zero_()
    neurons = rl.RegisterNeurons.from_pairs([(0, 3)])
    report = check_kernels(vit, neurons)
    assert "weights alone do not say what queries seek" in report.not_applicable["key"]
    assert not len(rows(report, condition="key")) and not any("stands in" in note for note in report.notes)
    assert len(rows(check_kernels(vit, neurons, images=torch.randn(4, 3, 24, 32)), condition="key"))


def test_all_neurons_of_a_block_leave_no_others_to_compare_with():
    report = check_kernels(small(d_mlp=4), rl.RegisterNeurons.from_pairs([(1, n) for n in range(4)]))
    residuals = rows(report, quantity="residual")
    assert residuals["neurons_p"].isna().all() and residuals["random_p"].notna().all()
    assert "dominance" not in set(report.table["condition"])
    assert "other neurons" not in report.describe()


def test_half_precision_and_gradients_do_not_disturb():
    vit, neurons = small(), rl.RegisterNeurons.from_pairs([(0, 3)])
    half = check_kernels(small().bfloat16(), neurons).table
    full = check_kernels(vit, neurons).table
    chosen = select(full, quantity="residual").index
    np.testing.assert_allclose(half.loc[chosen, "value"], full.loc[chosen, "value"], atol=0.02)
    assert all(parameter.grad is None for parameter in vit.parameters())


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_report_survives_the_disk(tmp_path, seen):
    loaded = KernelReport.load(seen.save(tmp_path / "kernels"))
    assert "a single head is the sum" in loaded.not_applicable["ov_head"]
    assert sorted(path.name for path in (tmp_path / "kernels").iterdir()) == ["arrays.safetensors", "result.json"]
    assert loaded.to_dataframe().equals(seen.to_dataframe())
    assert loaded.describe() == seen.describe() and loaded.neurons == seen.neurons and loaded.config == seen.config
    np.testing.assert_array_equal(loaded.written, seen.written)
    (tmp_path / "kernels" / "arrays.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="damaged"):
        KernelReport.load(tmp_path / "kernels")


def test_equal_seeds_give_equal_reports():
    vit, neurons = small(d_mlp=700), rl.RegisterNeurons.from_pairs([(0, 3)])
    first, same, other = (check_kernels(vit, neurons, seed=seed) for seed in (1, 1, 2))
    assert first.table.equals(same.table)
    assert (first.table["value"] == other.table["value"]).all()
    assert not (first.table["random_p"] == other.table["random_p"]).all()
    assert not (first.table["neurons"] == other.table["neurons"]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"gated_mlp": True, "act_fn": "silu", "norm": "rms", "mlp_norm": True, "attn_norm": True},
        {"rope": {"theta": 100.0}, "qk_norm": {"kind": "rms", "over": "all"}, "positions": "none"},
        {"pooling": ("attention",), "attn_pool": {"n_heads": 2, "d_attn": 24, "d_mlp": 16}, "pool_norm": True},
    ],
    ids=["gated, RMSNorm, inner norms", "rotary", "attention pooling"],
)
def test_other_parts_are_read_too_or_reported(changes):
    """A direction hidden by hand from all that reads it is in every kernel, whatever the parts."""
    base = rl.ViTConfig(n_layers=3, d_model=32, n_heads=4, d_mlp=48, image_size=(32, 32), patch_size=(8, 8), d_out=6)
    cfg = rl.ViTConfig.from_dict(base.to_dict() | changes)
    torch.manual_seed(0)
    vit = rl.HookedViT(cfg).eval()
    u = vit.blocks[0].mlp.out.weight[:, 3].detach() - vit.blocks[0].mlp.out.weight[:, 3].detach().mean()
    with torch.no_grad():
        vit.blocks[0].mlp.out.weight[:, 3] = u
        readers = [vit.head.linear if vit.head.attn is None else vit.head.attn.kv]
        for block in vit.blocks[1:]:
            readers += [block.attn.qkv, block.mlp.up, *([block.mlp.gate] if cfg.gated_mlp else [])]
        for reader in readers:
            reader.weight -= (reader.weight @ u / (u @ u))[:, None] * u
    neurons = rl.RegisterNeurons.from_pairs([(0, 3)])
    report = check_kernels(vit, neurons)
    residuals = report.table.query("vector == 'u2' and quantity == 'residual'")
    assert set(residuals["condition"]) >= {"value", "ov", "mlp", "head"}
    assert residuals["value"].max() < 1e-5
    assert ("turned by their positions" in report.not_applicable.get("key", "")) == (cfg.rope is not None)
    if cfg.gated_mlp:  # the gate alone betrays the direction
        with torch.no_grad():
            vit.blocks[2].mlp.gate.weight += u * 5
        worse = check_kernels(vit, neurons).table.query("vector == 'u2' and quantity == 'residual'")
        assert worse.query("condition == 'mlp' and layer == 2")["value"].max() > 0.1

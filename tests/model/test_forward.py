"""The forward pass: sizes, layouts, prefixes and suffixes of the model, number types, caches."""

import jaxtyping
import pytest
import torch
from helpers import randomise, relative
from small_vits import CONFIGS, build, images
from transformer_lens import ActivationCache

from registerlens import HookedViT
from registerlens.config import Preprocess, TokenLayout
from registerlens.errors import ConfigError, HookNameError, ShapeError
from registerlens.model import mlp

SIZES = [(24, 32), (40, 16), (8, 8), (27, 33)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_stopped_run_goes_on_where_it_stopped(name, size):
    vit = build(name)
    x = images(vit, size=size)
    with torch.no_grad():
        expected, cache = vit.run_with_cache(x)
        tokens = vit(x, return_type="tokens")
        for layer in (0, 1, 2, 3, -1, -3):
            resid = vit(x, stop_at_layer=layer)
            index = layer % 3 if layer < 0 else layer
            stream = "blocks.2.hook_resid_post" if index == 3 else f"blocks.{index}.hook_resid_pre"
            assert relative(resid, cache[stream]) <= 1e-5
            assert relative(vit(resid, start_at_layer=layer, layout=vit.layout(x)), expected) <= 1e-5
            got = vit(resid, start_at_layer=layer, layout=vit.layout(x), return_type="tokens")
            assert relative(got, tokens) <= 1e-5
        middle = vit(vit(x, stop_at_layer=1), start_at_layer=1, stop_at_layer=2, layout=vit.layout(x))
        assert relative(middle, cache["blocks.1.hook_resid_post"]) <= 1e-5


@pytest.mark.parametrize("pooling", [(), ("cls",), ("cls", "distillation"), ("mean",), ("cls", "mean")])
@pytest.mark.parametrize("d_out", [None, 5])
def test_the_output_reads_the_tokens_it_says(pooling, d_out):
    vit = build(pooling=pooling, d_out=d_out, head_act=None)
    x = images(vit, size=(32, 24))
    layout = vit.layout(x)
    with torch.no_grad():
        out, tokens = vit(x), vit(x, return_type="tokens")
    parts = {"cls": tokens[:, 0], "distillation": tokens[:, 1], "mean": tokens[:, layout.patches].mean(1)}
    pooled = torch.cat([parts[part] for part in pooling], -1) if pooling else tokens
    expected = pooled if d_out is None else vit.head.linear(pooled)
    assert relative(out, expected) <= 1e-6
    assert out.shape[-1] == (d_out or pooled.shape[-1])


def test_test_time_registers_take_part_but_stay_out_of_the_output():
    vit = build(pooling=())
    x = images(vit)
    resid = vit(x, stop_at_layer=1)
    extended = torch.cat([resid, resid[:, :2] * 0.5], dim=1)
    layout = vit.cfg.layout(n_test_time_registers=2)
    out = vit(extended, start_at_layer=1, layout=layout)
    tokens = vit(extended, start_at_layer=1, layout=layout, return_type="tokens")
    assert tokens.shape[1] == layout.n_tokens == resid.shape[1] + 2
    assert out.shape[1] == resid.shape[1]
    assert relative(out, vit(x)) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_is_its_images_one_by_one(name):
    vit = build(name)
    x = images(vit, batch=3)
    with torch.no_grad():
        assert relative(vit(x), torch.cat([vit(image[None]) for image in x])) <= 1e-5


def test_pixels_beyond_the_last_whole_patch_are_dropped():
    vit = build()
    x = images(vit, size=(29, 39))
    with torch.no_grad():
        assert torch.equal(vit(x), vit(x[..., :24, :32]))
    assert vit.layout(x).grid == (3, 4)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 24, 32), r"images\[None\]"),
        ((2, 1, 24, 32), r"\[batch, 3, height, width\], got \[2, 1, 24, 32\]"),
        ((0, 3, 24, 32), r"got \[0, 3, 24, 32\]"),
        ((2, 3, 7, 32), "7 x 32 pixels is smaller than one patch of 8 x 8"),
        ((2, 12, 32), r"got \[2, 12, 32\]"),
    ],
)
def test_images_that_do_not_fit(shape, words):
    with pytest.raises(ShapeError, match=words):
        build()(torch.zeros(shape))


def test_layers_that_do_not_exist_and_streams_that_do_not_fit():
    vit = build()
    x = images(vit)
    for arguments in ({"stop_at_layer": 4}, {"stop_at_layer": -4}, {"start_at_layer": 5}):
        with pytest.raises(ShapeError, match="does not exist: the model has blocks 0 to 2"):
            vit(x, **arguments)
    with pytest.raises(ShapeError, match="comes after"):
        vit(vit(x, stop_at_layer=2), start_at_layer=2, stop_at_layer=1)
    resid = vit(images(vit, size=(32, 32)), stop_at_layer=1)
    with pytest.raises(ShapeError, match=r"\[batch, 16, 32\], got \[2, 20, 32\].*layout=vit\.layout\(images\)"):
        vit(resid, start_at_layer=1)
    with pytest.raises(ShapeError, match="residual stream"):
        vit(x, start_at_layer=0)


def test_a_return_type_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks would be quicker than the model
    with pytest.raises(ConfigError, match="must be 'output' or 'tokens', got 'logits'"):
        build()(images(build()), return_type="logits")


# Layout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_layout_finds_every_token(size):
    vit = build()
    x = images(vit, size=size)
    layout = vit.layout(x)
    assert (layout.grid_height, layout.grid_width) == layout.grid == (size[0] // 8, size[1] // 8)
    _, cache = vit.run_with_cache(x, names_filter=["hook_embed", "hook_patch_embed", "hook_tokens"])
    assert cache["hook_tokens"].shape[1] == layout.n_tokens == 4 + layout.n_patches
    vit = build(ln_pre=False)
    embed = vit.run_with_cache(x, names_filter="hook_embed")[1]["hook_embed"]
    prefix = vit.embed.prefix
    assert torch.equal(embed[:, layout.prefix], prefix[:2].expand(2, -1, -1))
    assert torch.equal(embed[:, layout.trained_registers], prefix[2:].expand(2, -1, -1))
    with torch.no_grad():
        convolved = vit.embed.patch(x)
    assert relative(layout.to_grid(embed).permute(0, 3, 1, 2), convolved) <= 1e-6
    assert relative(layout.to_grid(embed[:, layout.patches]).permute(0, 3, 1, 2), convolved) <= 1e-6
    assert embed[:, layout.test_time_registers].shape[1] == 0


def test_slices_cover_the_sequence_once():
    layout = TokenLayout(grid=(3, 5), n_prefix=2, n_trained_registers=4, n_test_time_registers=3)
    order = [layout.prefix, layout.trained_registers, layout.patches, layout.test_time_registers]
    positions = [index for part in order for index in range(layout.n_tokens)[part]]
    assert positions == list(range(2 + 4 + 15 + 3))
    assert layout.cls == 0
    assert TokenLayout(grid=(3, 5), n_prefix=1, class_token=False).cls is None
    assert TokenLayout(grid=(3, 5), n_prefix=0).cls is None


def test_to_grid_keeps_further_axes_and_refuses_other_lengths():
    layout = TokenLayout(grid=(3, 5), n_prefix=1)
    patches = torch.arange(15).expand(2, 15)
    assert torch.equal(layout.to_grid(patches)[1], torch.arange(15).view(3, 5))
    assert layout.to_grid(torch.zeros(2, 16, 4, 6)).shape == (2, 3, 5, 4, 6)
    assert layout.to_grid(torch.zeros(2, 16, dtype=torch.bool)).dtype == torch.bool
    for wrong in (torch.zeros(2, 14), torch.zeros(2, 17, 3)):
        with pytest.raises(ShapeError, match="16 tokens or 15 patches"):
            layout.to_grid(wrong)


# Positions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [True, False])
def test_positions_are_resampled_as_the_config_says(antialias):
    vit = build(pos_interpolation="bicubic_antialias" if antialias else "bicubic", ln_pre=False)
    x = images(vit, size=(16, 16))
    pos = vit.run_with_cache(x, names_filter="hook_pos_embed")[1]["hook_pos_embed"]
    native = vit.embed.W_pos[4:].reshape(1, 3, 4, 32).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(native, size=(2, 2), mode="bicubic", antialias=antialias)
    assert relative(pos[1, 4:], expected[0].flatten(1).T) <= 1e-6
    assert torch.equal(pos[0, :4], vit.embed.W_pos[:4])


# Number types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 5e-2)])
def test_moves_to_another_number_type(name, dtype, tolerance):
    vit = build(name)
    x = images(vit, size=(32, 40))
    with torch.no_grad():
        expected = vit(x)
        vit = vit.to(dtype)
        fused = vit(x)  # images follow the model
        explicit, cache = vit.run_with_cache(x)
        again = vit(vit(x, stop_at_layer=1).float(), start_at_layer=1, layout=vit.layout(x))
    for got in (fused, explicit, again):
        assert got.dtype == dtype
        assert relative(got, expected) <= tolerance
    narrow = {key: value.dtype for key, value in cache.items() if value.dtype != dtype}
    assert all(key.endswith("hook_scale") and kind == torch.float32 for key, kind in narrow.items())
    if dtype == torch.float64:
        assert narrow == {}
        assert relative(explicit, fused) <= 1e-13
    with torch.no_grad():
        assert relative(vit.to("cpu", torch.float32)(x), expected) <= tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mlp_in_pieces_is_the_whole_mlp(name, monkeypatch):
    vit = build(name)
    x = images(vit, batch=3)
    expected = vit(x)
    for cached in (1, 300, 2**20):
        monkeypatch.setattr(mlp, "_CACHED_FLOATS", cached)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert relative(vit(x), expected) <= 1e-5


@pytest.mark.parametrize("act_fn", ["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"])
def test_the_nonlinearity_is_the_one_the_config_names(act_fn):
    functions = {
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
        "relu": lambda x: x.clamp(min=0),
        "relu2": lambda x: x.clamp(min=0) ** 2,
    }
    vit = build(act_fn=act_fn)
    _, cache = vit.run_with_cache(images(vit), names_filter="blocks.0.mlp.*")
    pre, post = (cache[f"blocks.0.mlp.hook_{end}"] for end in ("pre", "post"))
    assert relative(post, functions[act_fn](pre)) <= 1e-6


# Caches --------------------------------------------------------------------------------------------------------------


def test_a_cache_may_be_cut_short_moved_and_plain():
    vit = build(pooling=("cls",))
    x = images(vit)
    out, cache = vit.run_with_cache(x, stop_at_layer=1, device="cpu")
    assert isinstance(cache, ActivationCache) and cache.has_batch_dim
    assert relative(out, vit(x, stop_at_layer=1)) <= 1e-6
    assert not any(name.startswith(("blocks.1", "blocks.2", "ln_final", "head")) for name in cache.keys())  # noqa: SIM118
    _, plain = vit.run_with_cache(x, names_filter="hook_tokens", return_cache_object=False)
    assert type(plain) is dict and list(plain) == ["hook_tokens"]
    _, elsewhere = vit.run_with_cache(x, names_filter="hook_tokens", device="meta")
    assert elsewhere["hook_tokens"].device.type == "meta"
    assert not cache["hook_tokens"].requires_grad


def test_positions_of_a_cache_may_be_selected():
    vit = build(pooling=("cls",))
    x = images(vit)
    _, full = vit.run_with_cache(x)
    for pos_slice, index in ((0, [0]), ((1, 5), slice(1, 5)), ([0, 7], [0, 7])):
        out, cache = vit.run_with_cache(x, pos_slice=pos_slice)
        assert relative(out, full["head.hook_out"]) <= 1e-6
        for name in full.keys():  # noqa: SIM118
            if name in ("hook_patch_embed", "head.hook_out"):
                expected = full[name]
            elif name.endswith(("attn_scores", "pattern")):
                expected = full[name][:, :, index]
            else:
                expected = full[name][:, index]
            assert torch.equal(cache[name], expected), name


def test_the_batch_axis_may_be_removed():
    vit = build()
    x = images(vit, batch=1)
    _, full = vit.run_with_cache(x)
    _, cache = vit.run_with_cache(x, remove_batch_dim=True)
    assert not cache.has_batch_dim
    assert all(torch.equal(cache[name], full[name][0]) for name in full.keys())  # noqa: SIM118
    with pytest.raises(ShapeError, match="batch of one, got 2"):
        vit.run_with_cache(images(vit), remove_batch_dim=True)


def test_gradients_may_be_cached_with_a_one_number_output():
    vit = build(pooling=("mean",), d_out=1)
    x = images(vit, batch=1)
    _, cache = vit.run_with_cache(x, names_filter="*", incl_bwd=True)
    assert set(cache.keys()) == {f"{name}{end}" for name in vit.hook_dict for end in ("", "_grad")}
    assert all(cache[f"{name}_grad"].shape == cache[name].shape for name in vit.hook_dict)
    assert all(cache[f"{name}_grad"].norm() > 0 for name in vit.hook_dict)
    with pytest.raises(ShapeError, match=r"one number, but the output has shape \[2, 1\]"):
        vit.run_with_cache(images(vit), incl_bwd=True)
    assert not any(point.has_hooks() for point in vit.hook_dict.values())


# The model itself ----------------------------------------------------------------------------------------------------


def test_a_model_from_a_config_says_what_it_is():
    vit = HookedViT(CONFIGS["plain"])
    assert vit.preprocess == Preprocess(resize=(24, 32), fit="exact")
    assert vit.source == "random weights"
    assert "random weights" in repr(vit) and "blocks: 3, width 32, 4 heads of 6, 40 neurons (relu)" in repr(vit)
    assert torch.isfinite(randomise(vit)(images(vit))).all()


def test_an_unknown_return_type_is_refused():
    vit = build()
    with pytest.raises((ValueError, TypeError)):
        vit(images(vit), return_type="logits")


def test_names_beyond_the_stop_are_no_empty_cache():
    vit = build()
    with pytest.raises(HookNameError, match="stop_at_layer"):
        vit.run_with_cache(images(vit), names_filter="blocks.2.*", stop_at_layer=2)


def test_a_module_hooked_or_swapped_inside_the_mlp_acts_with_and_without_gradients():
    vit = build()
    x = images(vit)
    vit.blocks[0].mlp.up.register_forward_hook(lambda module, inputs, output: output * 0.5)
    with torch.no_grad():
        without = vit(x)
    assert relative(without, vit(x)) <= 1e-5

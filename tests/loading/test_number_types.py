"""Half precision and the meta device: models keep their number type, and can be built without any weights."""

import pytest
import torch
from families import CASES, run
from helpers import randomise, relative

from registerlens import HookedViT

NAMES = (
    "DINOv3ViTModel",
    "InternVLVisionModel, mean",
    "Aimv2VisionModel, native sizes",
    "SiglipVisionModel",
    "Dinov2Model, SwiGLU",
    "timm EVA-02 base",
    "timm mixed RoPE",
    "timm Perception Encoder core",
    "open_clip CoCa",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_in_bfloat16_stays_so_and_agrees_with_its_source(name):
    case = CASES[name]
    module = randomise(case.make(case.native)).to(torch.bfloat16)
    vit = HookedViT.from_module(module)
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.bfloat16}
    images = torch.randn(2, vit.cfg.n_channels, *case.native, generator=torch.Generator().manual_seed(1))
    _, _, output = run(case, module, images.bfloat16(), at_native=True)
    with torch.no_grad():
        got = vit(images)
        exact = HookedViT.from_module(module).float()(images)
    assert got.dtype == torch.bfloat16
    assert relative(got.float(), exact) <= 0.1
    assert relative(got.float(), exact) <= 2 * relative(output.float(), exact) + 0.01  # no worse than the source


@pytest.mark.parametrize("name", NAMES)
def test_a_module_on_the_meta_device_gives_an_architecture_without_weights(name):
    case = CASES[name]
    module = case.make(case.native)
    vit, bare = HookedViT.from_module(module), HookedViT.from_module(module.to("meta"))
    assert bare.cfg == vit.cfg and bare.device.type == "meta"
    assert {key: (t.shape, t.dtype) for key, t in bare.state_dict().items()} == {
        key: (t.shape, t.dtype) for key, t in vit.state_dict().items()
    }
    images = torch.empty(2, vit.cfg.n_channels, *case.native, device="meta")
    assert bare(images).shape == vit(torch.randn(images.shape)).shape


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "Dinov2Model"])
def test_number_type_and_device_may_be_asked_for(name, tmp_path):
    case = CASES[name]
    module = randomise(case.make(case.native))
    module.save_pretrained(tmp_path)
    half = HookedViT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert HookedViT.from_pretrained(tmp_path, device="meta").device.type == "meta"
    images = torch.randn(1, 3, *case.native)
    with torch.no_grad():
        assert relative(half(images).float(), HookedViT.from_pretrained(tmp_path)(images)) <= 0.1

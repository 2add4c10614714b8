"""Parity with the source libraries: every block's residual stream, the normalised tokens and the main output."""

import pytest
import torch
from families import CASES, run
from helpers import randomise, relative
from parity import TOLERANCE, errors_at, loaded

from registerlens import HookedViT
from registerlens.loading.registry import FAMILIES


def test_every_family_has_a_parity_case():
    covered = {(case.library, case.source_class) for case in CASES.values()}
    assert covered == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_parity(name, record_property):
    case = CASES[name]
    module, vit = loaded(case)
    for size in filter(None, (case.native, case.other)):
        errors = errors_at(case, module, vit, size)
        assert all(error <= TOLERANCE for error in errors.values()), (size, errors)
        record_property(f"largest relative error at {size}", max(errors.values()))


ODD_SIZES = (
    "ViTModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "CLIPVisionModel",
    "SiglipVisionModel",
    "DINOv3ViTModel",
    "InternVLVisionModel, mean",
    "Aimv2VisionModel, native sizes",
)


@pytest.mark.parametrize("name", ODD_SIZES)
@pytest.mark.parametrize("size", [(45, 59), (64, 16), (32, 36)], ids=str)
def test_parity_where_patches_do_not_fill_the_image_or_are_as_many_as_at_the_native_size(name, size):
    case = CASES[name]
    module = randomise(case.make(case.native))
    vit = HookedViT.from_module(module)
    images = torch.randn(2, 3, *size)
    streams, _, output = run(case, module, images, at_native=False)
    with torch.no_grad():
        assert relative(vit(images, stop_at_layer=0), streams[0]) <= TOLERANCE
        assert relative(vit(images), output) <= TOLERANCE


def test_a_loaded_model_does_not_depend_on_its_source():
    case = CASES["timm supervised"]
    module = randomise(case.make(case.native))
    images = torch.randn(1, 3, *case.native)
    vit = HookedViT.from_module(module)
    before, source_before = vit(images), module(images)
    randomise(vit, seed=5)
    assert torch.equal(module(images), source_before)
    vit = HookedViT.from_module(module)
    randomise(module, seed=6)
    assert torch.equal(vit(images), before)
    assert not torch.equal(module(images), source_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_of_another_number_type_keeps_it(dtype):
    case = CASES["timm average pooling without [CLS]"]
    vit = HookedViT.from_module(randomise(case.make(case.native)).to(dtype))
    assert {parameter.dtype for parameter in vit.parameters()} == {dtype}
    assert vit(torch.randn(2, 3, *case.native)).dtype == dtype


def test_half_weights_beside_float32_norms_become_one_number_type():
    case = CASES["open_clip LAION GELU"]
    module = randomise(case.make(case.native))
    expected = HookedViT.from_module(module)(images := torch.randn(2, 3, *case.native))
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data if ".ln_" in name else parameter.data.bfloat16()
    vit = HookedViT.from_module(module)
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.bfloat16}
    assert relative(vit(images).float(), expected) < 5e-2

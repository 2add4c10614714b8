"""Weights written back under their source library's names: bit for bit, and nothing lost that the model uses."""

from fnmatch import fnmatchcase
from functools import partial

import pytest
import timm
import torch
from families import CASES
from helpers import randomise, relative

from registerlens import HookedViT
from registerlens.errors import ModelNotFoundError, WeightsError
from registerlens.loading import huggingface, open_clip, torch_hub
from registerlens.loading import timm as timm_families
from registerlens.loading.keymap import canonical, export
from registerlens.loading.registry import FAMILIES


def source_of(case):
    """The module whose weights a family reads: all of it, or open_clip's tower."""
    module = randomise(case.make(case.native))
    return getattr(module, "visual", module) if case.library == "open_clip" else module


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exports])
def test_export_is_the_source_bit_for_bit(name):
    case = CASES[name]
    module, family = source_of(case), FAMILIES[case.library, case.source_class]
    source = module.state_dict()
    written = export(family, HookedViT.from_module(module))
    assert set(written) <= set(source)
    for key, tensor in written.items():
        assert tensor.dtype == source[key].dtype and torch.equal(tensor, source[key]), key
    lost = canonical(family, {key: tensor for key, tensor in source.items() if key not in written})
    assert [key for key in lost if not any(fnmatchcase(key, glob) for glob in family.ignore)] == []


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "timm EVA", "timm EVA-02 base", "timm DINOv3"])
def test_biases_of_zero_are_written_where_the_source_has_them(name):
    """What an untrained model's biases are; leaving them out would make a strict load fail."""
    case = CASES[name]
    module, family = source_of(case), FAMILIES[case.library, case.source_class]
    expected = set(export(family, HookedViT.from_module(module)))
    with torch.no_grad():
        for key, tensor in module.named_parameters():
            if key.endswith("bias"):
                tensor.zero_()
    assert set(export(family, HookedViT.from_module(module))) == expected


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.exports])
def test_weights_that_became_one_are_not_written_back(name):
    case = CASES[name]
    vit = HookedViT.from_module(source_of(case))
    with pytest.raises(WeightsError, match="cannot be told apart"):
        export(FAMILIES[case.library, case.source_class], vit)


def test_a_model_of_another_family_has_no_place():
    vit = HookedViT.from_module(source_of(CASES["DINOv3ViTModel, gated MLP, no registers"]))
    with pytest.raises(WeightsError, match=r"no place for 'blocks\.0\.attn\.out\.gamma'"):
        export(FAMILIES["transformers", "ViTModel"], vit)


def test_a_model_moves_from_one_library_to_another():
    """DINOv2 of transformers written under timm's names is timm's model with the same output."""
    vit = HookedViT.from_module(randomise(CASES["Dinov2Model"].make((32, 32))))
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 3}
    norm = partial(torch.nn.LayerNorm, eps=vit.cfg.norm_eps)
    target = timm.create_model("vit_small_patch14_dinov2", init_values=1.0, num_classes=0, norm_layer=norm, **options)
    target.load_state_dict(vit.to_state_dict("timm:VisionTransformer"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative(target.eval()(images), vit(images)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("VisionTransformer", "Several libraries have a VisionTransformer"),
        ("Dinov2Modle", "Did you mean 'Dinov2Model'"),
    ],
)
def test_a_family_must_be_named_well(name, words):
    vit = HookedViT.from_module(CASES["Dinov2Model"].make((32, 32)))
    with pytest.raises(ModelNotFoundError, match=words):
        vit.to_state_dict(name)


def test_every_family_has_a_name_of_its_own():
    assert len(FAMILIES) == sum(len(library.FAMILIES) for library in (huggingface, open_clip, timm_families, torch_hub))

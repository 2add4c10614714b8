"""The vision towers inside models of images and texts: in memory, and read from their checkpoints alone."""

import json

import pytest
import torch
import transformers
from families import SIZES, main_output, parts, vision_part
from helpers import randomise, relative
from torch import nn

from registerlens import HookedViT, RegisterNeurons, attach
from registerlens.errors import UnsupportedArchitectureError, WeightsError
from registerlens.interventions.registers import TestTimeRegisters
from registerlens.loading.huggingface import TOWERS

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 50,
}
IMAGE = {"patch_size": 8, "image_size": 32}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
MODELS = {
    "llava": ("LlavaForConditionalGeneration", {"model_type": "clip_vision_model"}, "llama"),
    "llava_next": ("LlavaNextForConditionalGeneration", {"model_type": "clip_vision_model"}, "llama"),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", SIGLIP, "qwen2"),
    "vipllava": ("VipLlavaForConditionalGeneration", {"model_type": "clip_vision_model"}, "llama"),
    "paligemma": ("PaliGemmaForConditionalGeneration", SIGLIP, "gemma"),
    "internvl": ("InternVLForConditionalGeneration", {"model_type": "internvl_vision"}, "qwen2"),
    "gemma3": ("Gemma3ForConditionalGeneration", SIGLIP, "gemma3_text"),
    "aya_vision": ("AyaVisionForConditionalGeneration", SIGLIP, "cohere2"),
}


def make(model_type: str) -> nn.Module:
    name, vision, text = MODELS[model_type]
    model_class = getattr(transformers, name)
    config = model_class.config_class(
        vision_config=SIZES | IMAGE | vision, text_config=TEXT | {"model_type": text}, **{"projection_dim": 16}
    )
    return randomise(model_class(config))


def check(vit: HookedViT, tower: nn.Module) -> None:
    """The same residual streams as the tower, in every block."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    blocks, _ = parts("transformers", vision_part(tower))
    streams: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, out: streams.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        tokens = tower(pixel_values=images)
        _, cache = vit.run_with_cache(images, names_filter="blocks.*.hook_resid_post")
    for handle in handles:
        handle.remove()
    assert len(streams) == vit.cfg.n_layers
    for i, stream in enumerate(streams):
        assert relative(cache[f"blocks.{i}.hook_resid_post"], stream) <= 1e-5
    if vit.cfg.pooling == ("cls",):
        assert relative(vit(images), main_output(tokens)) <= 1e-5


def test_every_place_in_the_table_is_tested():
    assert set(MODELS) == set(TOWERS)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_tower_in_memory_and_on_disk(model_type, tmp_path):
    module = make(model_type)
    tower = module.model.vision_tower
    vit = HookedViT.from_module(module)
    assert vit.source == f"transformers's {type(tower).__name__} in transformers's {MODELS[model_type][0]}"
    check(vit, tower)
    module.save_pretrained(tmp_path)
    from_disk = HookedViT.from_pretrained(tmp_path)
    assert from_disk.cfg == vit.cfg
    assert all(torch.equal(tensor, vit.state_dict()[key]) for key, tensor in from_disk.state_dict().items())


def test_only_shards_that_hold_the_tower_are_needed(tmp_path):
    module = make("llava")
    module.save_pretrained(tmp_path, max_shard_size="5KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    of_tower = {file for key, file in places.items() if "vision_tower" in key}
    others = set(places.values()) - of_tower
    assert others and len(of_tower) > 1
    for file in others:
        (tmp_path / file).unlink()
    check(HookedViT.from_pretrained(tmp_path), module.model.vision_tower)
    (tmp_path / sorted(of_tower)[0]).unlink()
    with pytest.raises(WeightsError, match="lists the shard"):
        HookedViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", ["model.vision_tower.", "vision_tower.vision_model."])
def test_both_ways_in_which_the_keys_of_a_tower_begin(prefix, tmp_path):
    module = make("llava")
    module.config.architectures = ["LlavaForConditionalGeneration"]
    module.config.save_pretrained(tmp_path)
    state = {f"{prefix}{key}": tensor for key, tensor in module.model.vision_tower.state_dict().items()}
    torch.save(state | {"language_model.anything": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    check(HookedViT.from_pretrained(tmp_path), module.model.vision_tower)


def test_a_checkpoint_without_its_tower_is_refused(tmp_path):
    module = make("llava")
    module.save_pretrained(tmp_path)
    torch.save(module.model.language_model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing"):
        HookedViT.from_pretrained(tmp_path)


def test_a_tower_of_another_kind_is_named(tmp_path):
    vision = {"model_type": "pixtral", **IMAGE, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = transformers.LlavaConfig(vision_config=vision, text_config=TEXT | {"model_type": "llama"})
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=r"vision tower PixtralVisionModel of .*packed"):
        HookedViT.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="packed"):
        HookedViT.from_module(transformers.LlavaForConditionalGeneration(config))


def test_edits_inside_a_tower():
    module = make("llava_onevision")
    tower, vit = module.model.vision_tower, HookedViT.from_module(module)
    register = TestTimeRegisters(RegisterNeurons.from_pairs([(0, 3), (1, 40)]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(module, register):
        tokens = tower(images).last_hidden_state
    with torch.no_grad(), vit.edit(register):
        expected = vit(images, return_type="tokens")[:, :16]
    assert relative(tokens, expected) <= 1e-5
    assert relative(tokens, tower(images).last_hidden_state) > 1e-3

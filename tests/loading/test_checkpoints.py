"""Checkpoints of one's own: whatever a training run saved, the model in it is the one that was trained."""

import argparse
import json
from dataclasses import replace
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from families import CASES, SIZES, SQUARE, TINY_CLIP, TORCH_HUB, TRANSFORMERS, clip_model, coca_model, main_output
from helpers import randomise, relative
from safetensors.torch import save_file
from torch import nn

from registerlens import HookedViT
from registerlens.errors import (
    ConfigError,
    ModelNotFoundError,
    RegisterLensError,
    UnsupportedArchitectureError,
    WeightsError,
)
from registerlens.loading.checkpoints import select
from registerlens.loading.registry import FAMILIES
from registerlens.loading.torch_hub import PUBLISHED

TOLERANCE = 1e-5
ARCH = "timm:vit_tiny_patch16_224"
OPTIONS = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 32, "patch_size": 8}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit_of_timm(seed: int = 0, classes: int = 7) -> nn.Module:
    return randomise(timm.create_model("vit_tiny_patch16_224", num_classes=classes, **OPTIONS), seed)


def prefixed(module: nn.Module, prefix: str) -> dict:
    return {prefix + key: tensor for key, tensor in module.state_dict().items()}


def agrees(vit: HookedViT, module: nn.Module, images: torch.Tensor = IMAGES) -> bool:
    with torch.no_grad():
        expected = module(images)
        expected = expected if isinstance(expected, torch.Tensor) else main_output(expected)
        return relative(vit(images), expected) <= TOLERANCE


# Where the model stands ----------------------------------------------------------------------------------------------

_mine, _other = vit_of_timm(), vit_of_timm(seed=9)
_optimiser = torch.optim.AdamW(_mine.parameters())
_mine(IMAGES).sum().backward()
_optimiser.step()
_mine.zero_grad()

LAYOUTS = {
    "state dict": _mine.state_dict(),
    "DataParallel": prefixed(_mine, "module."),
    "torch.compile": prefixed(_mine, "_orig_mod."),
    "torch.compile inside DDP": prefixed(_mine, "module._orig_mod."),
    "FSDP inside": {
        key.replace(".attn.", "._fsdp_wrapped_module.attn."): value for key, value in _mine.state_dict().items()
    },
    "Sequential after a normalisation": {"0.mean": torch.zeros(3)} | prefixed(_mine, "1."),
    "Lightning": {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(_mine, "model.backbone.") | {"criterion.weight": torch.ones(7), "head.weight": IMAGES},
        "optimizer_states": [_optimiser.state_dict()],
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"EMA": {"ema_state": prefixed(_other, "model.backbone.")}},
    },
    "timm's train.py": {
        "arch": "vit_tiny_patch16_224",
        "args": argparse.Namespace(lr=0.1),
        "state_dict": _mine.state_dict(),
        "state_dict_ema": _other.state_dict(),
        "optimizer": _optimiser.state_dict(),
    },
    "model and averages beside it": prefixed(_mine, "net.") | prefixed(_other, "net_ema.module."),
    "model_state_dict": {"model_state_dict": prefixed(_mine, "module."), "optimizer": _optimiser.state_dict()},
    "DINO's training": {
        "student": prefixed(_other, "module.backbone.") | {"module.head.last_layer.weight": torch.ones(3, 3)},
        "teacher": prefixed(_mine, "backbone.") | {"head.last_layer.weight": torch.ones(3, 3)},
        "args": argparse.Namespace(arch="vit_small"),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_found_wherever_it_stands(layout, tmp_path):
    torch.save(LAYOUTS[layout], path := tmp_path / "checkpoint.pth")
    vit = HookedViT.from_pretrained(path, family=ARCH, **OPTIONS)
    assert agrees(vit, _mine) and not agrees(vit, _other)
    assert vit.source.startswith("timm:vit_tiny_patch16_224 with checkpoint.pth")
    assert ("(state_dict.model.backbone.)" in vit.source) == (layout == "Lightning")


def test_the_two_ways_to_give_a_file_are_one(tmp_path):
    save_file(_mine.state_dict(), path := tmp_path / "vit.safetensors")
    by_family = HookedViT.from_pretrained(str(path), family=ARCH, config=OPTIONS)
    by_name = HookedViT.from_pretrained(ARCH, weights=path, **OPTIONS)
    by_class = HookedViT.from_pretrained(path, family="VisionTransformer", source="timm", config=OPTIONS)
    assert by_family.cfg == by_name.cfg and by_family.source == by_name.source
    assert all(agrees(vit, _mine) for vit in (by_family, by_name, by_class))
    half = HookedViT.from_pretrained(path, family=ARCH, config=OPTIONS, dtype=torch.float64)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float64}


def test_of_several_models_one_must_be_named(tmp_path):
    torch.save(prefixed(_mine, "online.vit.") | prefixed(_other, "target.vit."), path := tmp_path / "byol.pt")
    with pytest.raises(WeightsError, match=r"several models.*prefix=, one of \['online.vit.', 'target.vit.'\]"):
        HookedViT.from_pretrained(path, family=ARCH, **OPTIONS)
    with pytest.raises(WeightsError, match=r"not one model under 'teacher'.*'online.vit.'"):
        HookedViT.from_pretrained(path, family=ARCH, prefix="teacher", **OPTIONS)
    assert agrees(HookedViT.from_pretrained(path, family=ARCH, prefix="target", **OPTIONS), _other)
    torch.save({"student": _mine.state_dict(), "teacher": _other.state_dict()}, path)
    assert agrees(HookedViT.from_pretrained(path, family=ARCH, prefix="student", **OPTIONS), _mine)
    torch.save({"ema": _mine.state_dict()}, path)  # averages alone are a model like any other
    with pytest.raises(WeightsError, match="twice"):
        torch.save(_mine.state_dict() | prefixed(_other, "module."), twice := tmp_path / "twice.pt")
        HookedViT.from_pretrained(twice, family=ARCH, **OPTIONS)
    assert agrees(HookedViT.from_pretrained(path, family=ARCH, **OPTIONS), _mine)


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_found_under_a_prefix_beside_other_weights(name):
    """Of a whole module's weights, those that the family reads, whatever stands around them."""
    case = CASES[name]
    family = FAMILIES[case.library, case.source_class]
    whole = case.make(case.native).state_dict()
    decoy = {f"decoder.{i}.norm.weight": torch.zeros(3) for i in range(3)} | {"head.weight": torch.zeros(3)}
    decoy[f"another.{family.weights['embed.patch.weight'].keys[0]}"] = torch.zeros(3)
    state, _ = select(family, decoy | {f"net.{key}": value for key, value in whole.items()}, "checkpoint")
    alone, outer = select(family, whole, "checkpoint")
    assert outer == "" and set(state) == set(alone)
    assert all(state[key] is tensor for key, tensor in alone.items())
    taken = {id(tensor) for tensor in alone.values()}
    lost = [key for key, tensor in whole.items() if id(tensor) not in taken]
    for own in family.prefixes:
        lost = [key.removeprefix(own) for key in lost]
    if not any(key.startswith("visual.") for key in whole):  # beside the tower, only what the family passes over
        assert all(any(fnmatchcase(key, glob) for glob in family.ignore) for key in lost), lost


# Families ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["object", "dict", "file", "folder"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2Model", "CLIPVisionModelWithProjection"])
def test_a_transformers_class_with_its_configuration(name, how, tmp_path):
    case = TRANSFORMERS[name]
    module = randomise(case.make(case.native))
    torch.save({"state_dict": prefixed(module, "model.") | {"loss.weight": torch.ones(2)}}, tmp_path / "last.ckpt")
    module.config.save_pretrained(tmp_path)
    described = module.config.to_dict()
    config = {"object": module.config, "dict": described, "file": tmp_path / "config.json", "folder": tmp_path}[how]
    vit = HookedViT.from_pretrained(tmp_path / "last.ckpt", family=name, config=config)
    assert agrees(vit, module)
    assert vit.source == f"transformers:{name} with last.ckpt (state_dict.model.)"


_pooler = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5}
_described = {
    "CLIP": TINY_CLIP,
    "CoCa": TINY_CLIP | {"quick_gelu": False, "vision_cfg": TINY_CLIP["vision_cfg"] | _pooler},
}


@pytest.mark.parametrize("kind", ["CLIP by name", "CLIP", "CoCa"])
def test_an_open_clip_training_checkpoint(kind, tmp_path, tiny_clip):
    """open_clip's training writes epoch_N.pt."""
    module = randomise(coca_model(SQUARE) if kind == "CoCa" else clip_model(SQUARE, quick_gelu=True))
    torch.save({"epoch": 7, "name": "run", "state_dict": prefixed(module, "module.")}, path := tmp_path / "epoch_7.pt")
    if kind == "CLIP by name":
        vit = HookedViT.from_pretrained(path, family=f"open_clip:{tiny_clip}")
    else:
        (tmp_path / "model.json").write_text(json.dumps(_described[kind]))
        vit = HookedViT.from_pretrained(path, family="open_clip:VisionTransformer", config=tmp_path / "model.json")
    with torch.no_grad():
        expected = module.visual(IMAGES)
        assert relative(vit(IMAGES), expected[0] if kind == "CoCa" else expected) <= TOLERANCE


def in_chunks(state: dict[str, torch.Tensor]) -> dict:
    """As DINOv2's training saves its teacher."""
    return {"teacher": {f"backbone.{key.replace('blocks.', 'blocks.0.')}": tensor for key, tensor in state.items()}}


@pytest.mark.parametrize(
    ("case", "saved"),
    [(case, dict) for case in TORCH_HUB] + [(case, in_chunks) for case in TORCH_HUB if case != "DINO"],
)
def test_a_torch_hub_checkpoint(case, saved, tmp_path):
    module = randomise(CASES[case].make(SQUARE))
    torch.save(saved(module.state_dict()), path := tmp_path / "pretrain.pth")
    family = f"{CASES[case].library}:{CASES[case].source_class}"
    loaded = HookedViT.from_pretrained(path, family=family, config={"num_heads": 4})
    assert (loaded.cfg.norm_eps, loaded.cfg.n_trained_registers) == (1e-6, 4 if "registers" in case else 0)
    vit = HookedViT(replace(loaded.cfg, norm_eps=1e-2)).eval()  # the small models' is large
    vit.load_state_dict(loaded.state_dict())
    assert agrees(vit, module)


@pytest.mark.parametrize("key", ["cls_token", "pos_embed", "blocks.0.mlp.fc2.weight", "blocks.1.norm2.bias"])
def test_a_torch_hub_checkpoint_that_lacks_something(key, tmp_path):
    state = CASES["DINOv2"].make(SQUARE).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != key}, path := tmp_path / "pretrain.pth")
    with pytest.raises(WeightsError, match=f"'{key}'"):
        HookedViT.from_pretrained(path, family="DinoVisionTransformer", config={"num_heads": 4})
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    torch.save(state, path)
    with pytest.raises(WeightsError, match="no convolution"):
        HookedViT.from_pretrained(path, family="DinoVisionTransformer", config={"num_heads": 4})


def hub_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """transformers' DINOv2 with registers under the names of DINOv2's own code, by hand."""
    theirs = module.state_dict()
    state = {
        "cls_token": theirs["embeddings.cls_token"],
        "mask_token": theirs["embeddings.mask_token"],
        "register_tokens": theirs["embeddings.register_tokens"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = theirs[f"embeddings.patch_embeddings.projection.{kind}"]
        for i in range(module.config.num_hidden_layers):
            at = f"encoder.layer.{i}."
            parts = [theirs[f"{at}attention.{p}_proj.{kind}"] for p in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"blocks.{i}.attn.proj.{kind}"] = theirs[f"{at}attention.o_proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"blocks.{i}.{name}.{kind}"] = theirs[f"{at}{name}.{kind}"]
            for n in (1, 2):
                state[f"blocks.{i}.ls{n}.gamma"] = theirs[f"{at}layer_scale{n}.lambda1"]
    return state


def test_a_published_name_gives_what_transformers_has(tmp_path):
    """Width, depth and patches of dinov2_vits14_reg, with few positions and neurons."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 1, "patch_size": 14}
    config = transformers.Dinov2WithRegistersConfig(**sizes, image_size=28, num_register_tokens=4)
    module = randomise(transformers.Dinov2WithRegistersModel(config), std=0.05)
    torch.save(hub_names(module), path := tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    vit = HookedViT.from_pretrained(path, family="dinov2_vits14_reg")
    for size in (28, 42):
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            streams = module(images, output_hidden_states=True).hidden_states
            _, cache = vit.run_with_cache(images, names_filter="blocks.*.hook_resid_post")
        for i, stream in enumerate(streams[1:]):
            assert relative(cache[f"blocks.{i}.hook_resid_post"], stream) <= TOLERANCE
    assert vit.preprocess.crop == (224, 224)
    with pytest.raises(WeightsError, match=r"expected 24 blocks.*1024.*12, 384.*the size of .*dinov2_vits14"):
        HookedViT.from_pretrained(path, family="dinov2_vitl14")
    assert PUBLISHED["dinov2_vitg14_reg"].description == {"num_heads": 24}


# Wrapped modules -----------------------------------------------------------------------------------------------------


def test_wrapped_modules_are_unwrapped():
    for make in (lambda: vit_of_timm(), lambda: randomise(clip_model(SQUARE))):
        module = make()
        inner = getattr(module, "visual", module)
        averaged = torch.optim.swa_utils.AveragedModel(module)
        for wrapped in (
            torch.compile(module),
            nn.DataParallel(module),
            nn.DataParallel(torch.compile(module)),
            averaged,
        ):
            vit = HookedViT.from_module(wrapped)
            assert agrees(vit, inner)
            assert not any("_orig_mod" in key or "module" in key for key in vit.state_dict())
    module.visual = torch.compile(module.visual)
    assert agrees(HookedViT.from_module(module), inner)


class Adapter(nn.Module):
    """What PEFT puts in the place of a linear map."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})


def test_adapters_are_to_be_merged_first(tmp_path):
    module = vit_of_timm()
    for block in module.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    with pytest.raises(WeightsError, match=r"merge_and_unload\(\)"):
        HookedViT.from_module(module)
    with pytest.raises(WeightsError, match=r"merge_and_unload\(\)"):
        HookedViT.from_module(nn.DataParallel(module))
    save_file(prefixed(module, "base_model.model."), tmp_path / "vit.safetensors")
    with pytest.raises(
        WeightsError, match=r"'base_model.model.blocks.0.attn.qkv.base_layer.bias'.*merge_and_unload\(\)"
    ):
        HookedViT.from_pretrained(tmp_path / "vit.safetensors", family=ARCH, **OPTIONS)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"adapters only.*merge_and_unload\(\)"):
        HookedViT.from_pretrained(tmp_path)
    # merged, but saved under the names of the wrapper
    save_file(prefixed(_mine, "base_model.model."), tmp_path / "vit.safetensors")
    assert agrees(HookedViT.from_pretrained(tmp_path / "vit.safetensors", family=ARCH, **OPTIONS), _mine)


# Bad input -----------------------------------------------------------------------------------------------------------

CONFIGS = {
    "none": ("Dinov2Model", None, ConfigError, "Dinov2Model needs config=, a Dinov2Config"),
    "of another class": (
        "Dinov2Model",
        {"model_type": "clip", "hidden_size": 32},
        ConfigError,
        "model_type 'dinov2', got 'clip'",
    ),
    "no JSON": ("timm:VisionTransformer", 3, ConfigError, "a dict or the path of a JSON file"),
    "no vision tower": ("open_clip:VisionTransformer", {"embed_dim": 3}, ConfigError, "vision_cfg"),
    "no heads": ("DinoVisionTransformer", None, ConfigError, "num_heads"),
    "a typo": ("Dinov2Modle", {}, ModelNotFoundError, "Did you mean 'Dinov2Model'"),
    "a typo in timm": ("timm:vit_tiny_patch16_244", None, ModelNotFoundError, "'vit_tiny_patch16_224'"),
    "a typo of torch.hub": ("dinov2_vitx14", None, ModelNotFoundError, "'dinov2_vit"),
    "a typo of a transformers class": ("transformers:ViTModle", {}, ModelNotFoundError, "'ViTModel'"),
    "ambiguous": (
        "VisionTransformer",
        {},
        ModelNotFoundError,
        "'timm:VisionTransformer', 'open_clip:VisionTransformer'",
    ),
    "a ConvNet": ("timm:resnet18", None, UnsupportedArchitectureError, "convolution"),
    "of another kind": (
        "ViTModel",
        SIZES | {"image_size": 32, "patch_size": 8},
        WeightsError,
        "no weights of.*ViTModel",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_that_does_not_fit(name, tmp_path):
    family, config, error, words = CONFIGS[name]
    save_file(_mine.state_dict(), path := tmp_path / "vit.safetensors")
    with pytest.raises(error, match=words):
        HookedViT.from_pretrained(path, family=family, config=config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 48}, r"'patch_embed.proj.weight' \[32, 3, 8, 8\].*expects \[48, 3, 8, 8\]"),
        ({"img_size": 64}, r"'pos_embed' \[1, 17, 32\].*4 x 4 patches.*8 x 8"),
        ({"depth": 4}, "missing: 'blocks.3.norm1.weight'"),
        ({"depth": 2}, "unexpected: 'blocks.2.norm1.weight'"),
    ],
)
def test_a_model_of_another_size_names_the_shapes(options, words, tmp_path):
    save_file(_mine.state_dict(), path := tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError, match="(?s)" + words):
        HookedViT.from_pretrained(path, family=ARCH, **OPTIONS | options)


def test_files_and_folders_that_are_not_there_or_say_too_little(tmp_path, monkeypatch):
    save_file(_mine.state_dict(), path := tmp_path / "model.safetensors")
    for name, error, words in (
        (path, ModelNotFoundError, "is a file, and weights do not tell.*family="),
        (tmp_path, ModelNotFoundError, r"no config\.json.*from_pretrained\('.*model.safetensors', family="),
        (tmp_path / "mine.pth", ModelNotFoundError, "no file"),
        ("mine.pth", ModelNotFoundError, "no file 'mine.pth'"),
        ("dinov2_vits14", ModelNotFoundError, r"from_pretrained\(FILE, family='dinov2_vits14'\)"),
    ):
        with pytest.raises(error, match=words):
            HookedViT.from_pretrained(name)
    with pytest.raises(WeightsError, match=r"no weight file at.*it is a folder"):
        HookedViT.from_pretrained(tmp_path, family=ARCH)
    with pytest.raises(ConfigError, match="once"):
        HookedViT.from_pretrained(path, family=ARCH, weights=path)
    with pytest.raises(ConfigError, match="config= goes with a checkpoint file"):
        HookedViT.from_pretrained("registerlens:tiny", config={})
    with pytest.raises(ModelNotFoundError, match="weights= goes with"):
        HookedViT.from_pretrained(path, family="registerlens:tiny")


def test_a_file_that_could_run_code_is_not_read(tmp_path):
    class Mine:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": _mine.state_dict(), "callback": Mine()}, path := tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match="could run code"):
        HookedViT.from_pretrained(path, family=ARCH, **OPTIONS)
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": _mine.state_dict(), "args": SimpleNamespace(lr=1)}, path)
    with pytest.raises(RegisterLensError, match="could run code"):
        HookedViT.from_pretrained(path, family=ARCH, **OPTIONS)


def test_a_timm_class_reads_the_arguments_of_a_saved_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "model_args": OPTIONS}))
    save_file(_mine.state_dict(), path := tmp_path / "vit.safetensors")
    vit = HookedViT.from_pretrained(path, family="timm:VisionTransformer", config=tmp_path / "config.json")
    assert agrees(vit, _mine)

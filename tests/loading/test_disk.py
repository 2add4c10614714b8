"""Parity through disk: folders and files of every source library, and our own format."""

import json
from functools import partial

import open_clip
import pytest
import timm
import torch
import transformers
from families import NATIVE, OPEN_CLIP, SQUARE, TIMM, TINY_CLIP, TRANSFORMERS, Case, clip_model, run
from helpers import randomise, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitImageProcessor

from registerlens import HookedViT, load_images
from registerlens.config import Preprocess
from registerlens.data.photographs import shipped_photographs
from registerlens.errors import ConfigError, WeightsError
from registerlens.loading import native

TOLERANCE = 1e-5


def check(vit: HookedViT, case: Case, module: nn.Module) -> None:
    """The loaded model does what the module in memory does."""
    images = torch.randn(3, vit.cfg.n_channels, *case.native, generator=torch.Generator().manual_seed(1))
    streams, _, output = run(case, module, images, at_native=True)
    with torch.no_grad():
        got, cache = vit.run_with_cache(images, names_filter="blocks.*.hook_resid_post")
    for i, stream in enumerate(streams[1:]):
        assert relative(cache[f"blocks.{i}.hook_resid_post"], stream) <= TOLERANCE
    assert relative(got, output) <= TOLERANCE


# transformers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_saved_transformers_folder(name, tmp_path):
    case = TRANSFORMERS[name]
    module = randomise(case.make(case.native))
    module.save_pretrained(tmp_path)
    vit = HookedViT.from_pretrained(tmp_path)
    check(vit, case, module)
    assert vit.source == str(tmp_path)
    # DINOv2 is used at 224 pixels whatever its position embeddings are, as transformers uses it
    assert vit.preprocess.output_size == ((224, 224) if "Dinov2" in name else case.native)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"size": {"height": 40, "width": 48}, "do_center_crop": False, "resample": 2},
    ],
)
def test_an_image_processor_means_what_transformers_makes_of_it(settings, nested, tmp_path):
    case = TRANSFORMERS["Dinov2Model"]
    case.make(case.native).save_pretrained(tmp_path)
    usual = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    processor = BitImageProcessor(**{**usual, "do_convert_rgb": True, **settings})
    written = json.loads(processor.to_json_string())
    name, content = (
        ("processor_config.json", {"image_processor": written}) if nested else ("preprocessor_config.json", written)
    )
    (tmp_path / name).write_text(json.dumps(content))
    photograph = Image.open(shipped_photographs()[0])
    theirs = processor(photograph, return_tensors="pt")["pixel_values"]
    mine = load_images(photograph, HookedViT.from_pretrained(tmp_path))
    step = 255 * processor.rescale_factor if processor.do_rescale else 255
    step = step / min(processor.image_std) if processor.do_normalize else step
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= 2.001 / 255 * step


PROCESSORS = {
    "SiglipVisionModel": ("SiglipImageProcessor", {"size": {"height": 40, "width": 48}}),
    "ViTMAEModel": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 3}),
    "DINOv3ViTModel": ("DINOv3ViTImageProcessor", {"size": {"height": 40, "width": 48}}),
    "IJepaModel": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    "Aimv2VisionModel": ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": 32}),
    "InternVLVisionModel, mean": (
        "GotOcr2ImageProcessor",
        {"size": {"height": 32, "width": 32}, "min_patches": 1, "max_patches": 1},
    ),
}


NULL = ("do_center_crop", "do_rescale", "do_normalize", "rescale_factor", "image_mean", "resample")
USUAL = ("SiglipVisionModel", "DINOv3ViTModel", "IJepaModel", "Aimv2VisionModel")
"""Families whose usual steps are also the processor's own where a file does not say them."""


@pytest.mark.parametrize(
    ("name", "all_said"), [(name, True) for name in PROCESSORS] + [(name, False) for name in USUAL]
)
def test_the_image_processors_of_the_families(name, all_said, tmp_path):
    """As saved; and with everything left out but the size, which then must be the family's usual steps."""
    class_name, settings = PROCESSORS[name]
    processor = getattr(transformers, class_name)(**settings)
    TRANSFORMERS[name].make(SQUARE).save_pretrained(tmp_path)
    written = json.loads(processor.to_json_string()) if all_said else settings | dict.fromkeys(NULL)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    photograph = Image.open(shipped_photographs()[0]).convert("RGB")
    theirs = processor(photograph, return_tensors="pt")["pixel_values"]
    mine = load_images(photograph, HookedViT.from_pretrained(tmp_path))
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= 2.001 / 255 / min(processor.image_std)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"resample": 4}, "resample=4"),
        ({"size": {"longest_edge": 9}}, "longest"),
    ],
)
def test_an_image_processor_that_cannot_be_reproduced_is_refused(settings, word, tmp_path):
    case = TRANSFORMERS["Dinov2Model"]
    case.make(case.native).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=word):
        HookedViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPModel", "Dinov2Model"])
def test_a_sharded_transformers_folder_with_its_image_processor(name, tmp_path):
    case = TRANSFORMERS[name]
    module = randomise(case.make(case.native))
    module.save_pretrained(tmp_path, max_shard_size="30KB")
    processor = {"size": {"height": 40, "width": 48}, "resample": 1, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    vit = HookedViT.from_pretrained(tmp_path)
    check(vit, case, module)
    expected = Preprocess(resize=(40, 48), fit="exact", arithmetic="transformers", interpolation="lanczos")
    assert (vit.preprocess.resize, vit.preprocess.fit, vit.preprocess.interpolation) == (
        expected.resize,
        expected.fit,
        expected.interpolation,
    )
    assert vit.preprocess.mean == (0.1,) * 3 and vit.preprocess.std == (0.2,) * 3

    next(iter(tmp_path.glob("model-00002*"))).unlink()
    with pytest.raises(WeightsError, match="model-00002"):
        HookedViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "renames"),
    [
        (
            "ViTForImageClassification",
            {
                "vit.layers.": "vit.encoder.layer.",
                ".attention.q_proj.": ".attention.attention.query.",
                ".attention.k_proj.": ".attention.attention.key.",
                ".attention.v_proj.": ".attention.attention.value.",
                ".attention.o_proj.": ".attention.output.dense.",
                ".mlp.fc1.": ".intermediate.dense.",
                ".mlp.fc2.": ".output.dense.",
            },
        ),
        (
            "Dinov2WithRegistersModel",
            {
                ".attention.q_proj.": ".attention.attention.query.",
                ".attention.k_proj.": ".attention.attention.key.",
                ".attention.v_proj.": ".attention.attention.value.",
                ".attention.o_proj.": ".attention.output.dense.",
            },
        ),
        ("CLIPVisionModel", {"": "vision_model."}),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_transformers_checkpoints_with_older_key_names(name, renames, suffix, tmp_path):
    case = TRANSFORMERS[name]
    module = randomise(case.make(case.native))
    module.config.architectures = [case.source_class]
    module.config.save_pretrained(tmp_path)
    state = {}
    for key, tensor in module.state_dict().items():
        for new, old in renames.items():
            key = key.replace(new, old) if new else old + key
        state[key] = tensor
    if suffix == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    check(HookedViT.from_pretrained(str(tmp_path), source="transformers"), case, module)


def test_the_base_class_is_taken_where_a_folder_names_none(tmp_path):
    case = TRANSFORMERS["Dinov2Model"]
    module = randomise(case.make(case.native))
    module.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    del described["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    check(HookedViT.from_pretrained(tmp_path), case, module)


# timm ----------------------------------------------------------------------------------------------------------------


def test_a_timm_safetensors_file(tmp_path):
    options = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 32, "patch_size": 8}
    for classes in (0, 7):
        module = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=classes, **options))
        state = {f"module.{key}": tensor for key, tensor in module.state_dict().items()}  # as parallel training saves
        save_file(state if classes else module.state_dict(), tmp_path / "vit.safetensors")
        weights = tmp_path / "vit.safetensors"
        vit = HookedViT.from_pretrained("timm:vit_tiny_patch16_224", weights=weights, **options)
        check(vit, Case("timm", partial(lambda module, size: module, module), "VisionTransformer", SQUARE), module)
        assert vit.source == "timm:vit_tiny_patch16_224 with vit.safetensors"


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 7}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 7}),
        ("vit_small_patch14_reg4_dinov2", {"num_classes": 0, "reg_tokens": 4, "no_embed_class": True}),
        ("vit_base_patch16_siglip_224", {"num_classes": 0}),
        ("vit_giant_patch14_dinov2", {"num_classes": 7}),
        ("aimv2_large_patch14_224", {"num_classes": 0}),
        ("eva02_base_patch14_224", {"num_classes": 7}),
        ("vit_small_patch16_dinov3", {"num_classes": 0}),
        ("vit_pe_core_tiny_patch16_384", {"num_classes": 7}),
        ("vit_small_patch16_rope_mixed_224", {"num_classes": 7}),
    ],
)
def test_a_folder_saved_by_timm(arch, options, safe, tmp_path):
    arguments = {"img_size": NATIVE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4} | options
    module = randomise(timm.create_model(arch, **arguments))
    timm.models.save_for_hf(module, tmp_path, model_args=arguments, safe_serialization=safe)
    for vit in (HookedViT.from_pretrained(tmp_path), HookedViT.from_pretrained(f"timm:{tmp_path}")):
        check(vit, Case("timm", lambda size: module, type(module).__name__, NATIVE), module)
    next(path for path in tmp_path.iterdir() if path.name != "config.json").unlink()
    with pytest.raises(WeightsError, match="no weights"):
        HookedViT.from_pretrained(tmp_path)


# open_clip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("kind", ["whole", "tower", "module"])
def test_an_open_clip_checkpoint(kind, quick_gelu, tmp_path, tiny_clip):
    module = randomise(clip_model(SQUARE, quick_gelu=quick_gelu))
    state = module.visual.state_dict() if kind == "tower" else module.state_dict()
    if kind == "module":
        state = {"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    torch.save(state, tmp_path / "clip.pt")
    options = {} if quick_gelu else {"quick_gelu": False}
    vit = HookedViT.from_pretrained(f"open_clip:{tiny_clip}", weights=tmp_path / "clip.pt", **options)
    assert vit.cfg.act_fn == ("quick_gelu" if quick_gelu else "gelu")
    check(vit, OPEN_CLIP["open_clip LAION GELU"], module)


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_folder_of_open_clip(file, tmp_path):
    module = randomise(clip_model(SQUARE, quick_gelu=True))
    steps = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    described = {"model_cfg": TINY_CLIP, "preprocess_cfg": steps}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(WeightsError, match="no weights"):
        HookedViT.from_pretrained(tmp_path)
    state = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
    save_file(state, tmp_path / file) if file.endswith("safetensors") else torch.save(state, tmp_path / file)
    vit = HookedViT.from_pretrained(tmp_path)
    check(vit, OPEN_CLIP["open_clip OpenAI quick_gelu"], module)
    assert vit.preprocess == Preprocess(
        resize=SQUARE, fit="exact", interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )


@pytest.mark.parametrize(("tag", "activation"), [("openai", "quick_gelu"), ("laion2b_s34b_b88k", "gelu")])
def test_published_open_clip_weights_run_with_the_nonlinearity_they_were_trained_with(tag, activation, monkeypatch):
    def create_model(name, pretrained, force_quick_gelu, weights_only):
        assert (name, pretrained, weights_only) == ("ViT-B-16", tag, True)
        return clip_model(SQUARE, quick_gelu=force_quick_gelu)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    assert HookedViT.from_pretrained(f"open_clip:ViT-B-16/{tag}").cfg.act_fn == activation


# RegisterLens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dinov2WithRegistersForImageClassification", "CLIPVisionModelWithProjection"])
def test_our_own_folder_is_bit_exact(name, tmp_path):
    case = TRANSFORMERS[name]
    vit = HookedViT.from_module(randomise(case.make(case.native)))
    assert vit.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    again = HookedViT.from_pretrained(tmp_path / "new" / "folder")
    assert (again.cfg, again.preprocess, again.source) == (vit.cfg, vit.preprocess, vit.source)
    assert not again.training
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in vit.state_dict().items())
    moved = HookedViT.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float64, device="cpu")
    assert {parameter.dtype for parameter in moved.parameters()} == {torch.float64}


def test_a_crash_while_saving_leaves_nothing_or_the_model_that_was_there(tmp_path, monkeypatch):
    case = TIMM["timm supervised"]
    vit = HookedViT.from_module(randomise(case.make(case.native)))

    def crash(state, path, metadata):
        save_file(state, path, metadata)
        path.write_bytes(path.read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        vit.save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.undo()
    vit.save_pretrained(tmp_path / "old")
    monkeypatch.setattr(native, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        HookedViT.from_module(randomise(case.make(case.native), seed=9)).save_pretrained(tmp_path / "old")
    kept = HookedViT.from_pretrained(tmp_path / "old").state_dict()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in vit.state_dict().items())


def test_the_embedded_model(tmp_path):
    vit = HookedViT.from_pretrained("registerlens:tiny")
    assert vit.source == "registerlens:tiny"
    assert (vit.cfg.n_layers, vit.cfg.d_model, vit.cfg.act_fn) == (6, 64, "relu2")
    assert torch.equal(HookedViT.from_pretrained("tiny", source="registerlens").embed.W_pos, vit.embed.W_pos)
    assert HookedViT.from_pretrained(vit.save_pretrained(tmp_path)).source == "registerlens:tiny"


@pytest.mark.parametrize("damage", ["architecture", "n_layers", "unknown", "weights", "preprocess"])
def test_a_damaged_folder_of_ours_says_what_is_wrong(damage, tmp_path):
    HookedViT.from_pretrained("registerlens:tiny").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    error, match = ConfigError, damage
    if damage in ("architecture", "preprocess"):
        del described[damage]
    elif damage == "n_layers":
        del described["architecture"]["n_layers"]
    elif damage == "unknown":
        described["architecture"]["unknown"] = 1
    else:
        state = load_file(tmp_path / "model.safetensors")
        del state["blocks.3.attn.qkv.weight"]
        save_file(state, tmp_path / "model.safetensors")
        error, match = WeightsError, r"blocks\.3\.attn\.qkv\.weight"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(error, match=match):
        HookedViT.from_pretrained(tmp_path)

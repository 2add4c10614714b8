"""Interventions as folders, and model folders with an intervention in them."""

import importlib.util
import json

import pytest
import timm
import torch
import transformers
from families import SQUARE, TINY_CLIP, TRANSFORMERS, clip_model
from helpers import randomise, relative
from safetensors.torch import save_file

import registerlens as rl
from registerlens.analysis.detection import Cutoff
from registerlens.errors import ConfigError, InterventionError, UnsupportedArchitectureError
from registerlens.interventions.ablation import Scale
from registerlens.interventions.bake import bake, load_baked
from registerlens.interventions.base import Intervention

NEURONS = rl.RegisterNeurons.from_pairs([(0, 3), (1, 5), (1, 60)])
TOLERANCE = 1e-5

PLAIN = {
    "register": rl.TestTimeRegisters(NEURONS, n=2, init="gaussian", assign="random", seed=4, clear="patches"),
    "copied": rl.TestTimeRegisters(NEURONS, maxima_of=rl.RegisterNeurons.from_pairs([(0, 1), (1, 1), (1, 2)])),
    "move": rl.MoveOutliers(NEURONS, 3, extreme="shared", fill="mean"),
    "move several": rl.MoveOutliers(NEURONS, [3, 5]),
    "interpolate": rl.InterpolateOutliers("1.attn", Cutoff(value=2.5, relative=True)),
    "scale": Scale(NEURONS, 0.5),
    "scale heads": Scale(rl.Heads([(1, 0), (2, 3)]), -2),
    "scale tokens": Scale(rl.Tokens(1, [0, 3]), 0.25),
    "zero heads": rl.Ablate(rl.Heads([(1, 0), (2, 3)])),
    "zero tokens": rl.Ablate(rl.Tokens(1, "cls")),
}


@pytest.mark.parametrize("name", PLAIN)
def test_an_intervention_survives_a_folder(name, tmp_path):
    again = Intervention.load(PLAIN[name].save(tmp_path))
    assert type(again) is type(PLAIN[name])
    vit = rl.HookedViT(
        rl.ViTConfig(n_layers=3, d_model=32, n_heads=4, d_mlp=80, image_size=(32, 32), patch_size=(8, 8))
    )
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    with torch.no_grad():
        for intervention in (PLAIN[name], again):
            with vit.edit(intervention):
                outputs.append(vit(images, return_type="tokens"))
    assert torch.equal(*outputs)


def test_grids_and_tensors_survive_too(tmp_path):
    heart = torch.zeros(4, 4, dtype=torch.bool)
    heart[1:3, 1] = True
    moved = Intervention.load(rl.MoveOutliers(NEURONS, heart).save(tmp_path / "a"))
    assert torch.equal(moved.positions, heart)
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    bias = rl.AttentionBias.fit(vit, torch.rand(2, 3, 48, 48), NEURONS)
    again = Intervention.load(bias.save(tmp_path / "b"))
    assert torch.equal(again.k, bias.k) and torch.equal(again.v, bias.v) and again.neurons == bias.neurons
    with pytest.raises(ConfigError, match=r"'positions' .*function"):
        rl.MoveOutliers(NEURONS, lambda images: torch.zeros(len(images), 1).long()).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_damaged_folder_is_named(tmp_path):
    path = PLAIN["register"].save(tmp_path) / "result.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"class": "Telepathy"}))
    with pytest.raises(ConfigError, match="Telepathy"):
        Intervention.load(tmp_path)
    told["values"]["colour"] = 3
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="colour"):
        Intervention.load(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        Intervention.load(tmp_path)


# Baked model folders -------------------------------------------------------------------------------------------------


def saved_transformers(name, folder):
    module = randomise(TRANSFORMERS[name].make(TRANSFORMERS[name].native))
    module.save_pretrained(folder)
    return module, str(folder)


def saved_timm(folder):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    module = randomise(timm.create_model("vit_tiny_patch16_224", **arguments))
    timm.models.save_for_hf(module, folder, model_args=arguments, safe_serialization=True)
    return module, f"timm:{folder}"


def saved_open_clip(folder):
    folder.mkdir()
    module = randomise(clip_model(SQUARE[0], quick_gelu=True))
    save_file(module.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return module, f"open_clip:{folder}"


def pooled(module, images):
    with torch.no_grad():
        if hasattr(module, "encode_image"):
            return module.encode_image(images)
        output = module(images)
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
@pytest.mark.parametrize("kind", ["register", "bias"])
def test_a_baked_folder_is_the_edited_model(library, kind, tmp_path):
    made = tmp_path / "original"
    module, name = {
        "transformers": lambda: saved_transformers("Dinov2Model", made),
        "timm": lambda: saved_timm(made),
        "open_clip": lambda: saved_open_clip(made),
    }[library]()
    images = torch.randn(2, 3, *SQUARE, generator=torch.Generator().manual_seed(0))
    vit = rl.HookedViT.from_module(module)
    intervention = rl.TestTimeRegisters(NEURONS) if kind == "register" else rl.AttentionBias.fit(vit, images, NEURONS)
    out = bake(name, intervention, tmp_path / "baked")
    assert [path.name for path in tmp_path.iterdir()].count("baked") == 1 and len(list(tmp_path.iterdir())) == 2
    with torch.no_grad(), vit.edit(intervention):
        expected = vit(images)
    loaded = load_baked(out)
    assert type(loaded) is type(module) and not loaded.training
    assert relative(pooled(loaded, images), expected) <= TOLERANCE
    assert relative(pooled(module, images), expected) > 1e-3  # the edit matters
    # the loader in the folder does the same
    spec = importlib.util.spec_from_file_location("baked_loader", out / "load.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    assert torch.equal(pooled(loader.load_model(), images), pooled(loaded, images))
    # without RegisterLens's loader the folder is the unedited model, for us and for its own library
    plain = rl.HookedViT.from_pretrained(out)
    with torch.no_grad():
        assert relative(plain(images), pooled(module, images)) <= TOLERANCE


def test_transformers_alone_loads_the_folder_unedited(tmp_path):
    module, name = saved_transformers("ViTForImageClassification", tmp_path / "original")
    (tmp_path / "original" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    out = bake(name, rl.TestTimeRegisters(NEURONS), tmp_path / "baked")
    again = transformers.ViTForImageClassification.from_pretrained(out)
    images = torch.randn(1, 3, *SQUARE)
    with torch.no_grad():
        assert relative(again(images).logits, module(images).logits) <= 1e-6
    assert (out / "preprocessor_config.json").is_file()


def test_nothing_is_written_when_something_is_wrong(tmp_path):
    _, name = saved_transformers("ViTModel", tmp_path / "original")
    register = rl.TestTimeRegisters(NEURONS)
    with pytest.raises(InterventionError, match="do not exist"):
        bake(name, rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(1, 4000)])), tmp_path / "out")
    with pytest.raises(ConfigError, match="not an empty folder"):
        bake(name, register, tmp_path / "original")
    with pytest.raises(UnsupportedArchitectureError, match="registerlens"):
        bake("registerlens:tiny", register, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
    with pytest.raises(ConfigError, match="cannot be read"):
        load_baked(tmp_path / "original")

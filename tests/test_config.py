"""ViTConfig and Preprocess: what they refuse, and the way through JSON and back."""

import json

import pytest

from registerlens import ViTConfig
from registerlens.config import Preprocess
from registerlens.errors import ConfigError, RegisterLensError, ShapeError

SIZE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_mlp": 40, "image_size": (24, 32), "patch_size": (8, 8)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooling": ("cls", "mean"), "d_out": 7, "head_act": "tanh", "layer_scale": True, "ln_pre": True},
        {"attention": "sigmoid", "norm_after": True},
        {"class_token": False, "pooling": (), "act_fn": "relu2", "d_head": 5, "n_trained_registers": 4},
        {"d_out": 8, "n_label_sets": 4},
        {"distillation_token": True, "pooling": ("cls", "distillation"), "pos_interpolation": "bicubic_antialias"},
    ],
)
def test_a_config_goes_through_json_and_back(changes):
    cfg = ViTConfig(**SIZE, **changes)
    again = ViTConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg and hash(again) == hash(cfg)
    assert set(cfg.to_dict()).isdisjoint({"attn_only", "normalization_type", "final_rms"})


def test_preprocessing_goes_through_json_and_back():
    for steps in (Preprocess(resize=(256, 256), crop=(224, 224), mean=(0.5,), std=(0.2,)), Preprocess(resize=(3, 4))):
        assert Preprocess.from_dict(json.loads(json.dumps(steps.to_dict()))) == steps


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"d_mlp": -1}, "d_mlp must be at least 1"),
        ({"n_heads": 5}, "d_model=32 is not divisible by n_heads=5; give d_head"),
        ({"image_size": (24, 7)}, r"image_size \(24, 7\) is smaller than patch_size \(8, 8\)"),
        ({"class_token": False}, "pooling asks for 'cls'"),
        ({"class_token": False, "distillation_token": True, "pooling": ()}, "no \\[CLS\\]"),
        ({"n_trained_registers": -2}, "n_trained_registers must be at least 0, got -2"),
        ({"n_label_sets": 0}, "n_label_sets must be at least 1, got 0"),
        ({"d_out": 7, "n_label_sets": 2}, "7 outputs do not fall into 2 equal label sets"),
        ({"pooling": ("cls", "distillation")}, "pooling asks for 'distillation'"),
    ],
)
def test_an_inconsistent_config_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        ViTConfig(**SIZE | changes)
    assert isinstance(caught.value, RegisterLensError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("kind", "values"), [(ViTConfig, SIZE), (Preprocess, {"resize": (3, 4)})])
def test_unknown_and_missing_fields_are_named(kind, values):
    with pytest.raises(ConfigError, match=r"\['dropout'\]"):
        kind.from_dict(values | {"dropout": 0.1})
    lacking = dict(values)
    name = next(iter(values))
    del lacking[name]
    with pytest.raises(ConfigError, match=name):
        kind.from_dict(lacking)


def test_derived_sizes():
    cfg = ViTConfig(**SIZE | {"image_size": (31, 33)}, distillation_token=True, n_trained_registers=3)
    assert (cfg.grid, cfg.d_head, cfg.n_prefix) == ((3, 4), 8, 2)
    assert cfg.layout().n_tokens == 2 + 3 + 12
    assert cfg.layout(16, 40).grid == (2, 5)
    assert cfg.layout(n_test_time_registers=2).n_tokens == 2 + 3 + 12 + 2
    with pytest.raises(ShapeError, match="smaller than one patch"):
        cfg.layout(40, 7)


def test_preprocessing_for_another_size():
    cover = Preprocess(resize=(256, 256), crop=(224, 224), mean=(0.1,))
    assert cover.output_size == (224, 224)
    assert cover.at((42, 56)) == Preprocess(resize=(42, 56), crop=(42, 56), mean=(0.1,))
    exact = Preprocess(resize=(256, 256), fit="exact").at((42, 56))
    assert (exact.output_size, exact.crop) == ((42, 56), None)

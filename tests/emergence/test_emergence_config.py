"""Training configurations: read strictly, and the schedules they stand for."""

import json

import pytest
import torch
import yaml
from small_runs import small

from registerlens.data.synthetic import CONTRAST, FLAT, KEY, NORMAL, flat_contents, synthetic_images
from registerlens.data.synthetic_task import SyntheticTask
from registerlens.emergence.config import ModelShape, TrainingConfig
from registerlens.errors import ConfigError


def test_files_give_back_what_was_written(tmp_path):
    config = small(optimiser="sgd", model=ModelShape(class_token=True, act_fn="gelu"), image_loss=0.5)
    values = config.model_dump(mode="json")
    for name, written in (("a.json", json.dumps(values)), ("a.yaml", yaml.safe_dump(values))):
        (tmp_path / name).write_text(written)
        assert TrainingConfig.from_file(tmp_path / name) == config
    (tmp_path / "few.yaml").write_text("learning_rate: 4e-3\ntask: {flats: [1, 2]}\n")  # YAML 1.1 reads 4e-3 as text
    few = TrainingConfig.from_file(tmp_path / "few.yaml")
    assert few == TrainingConfig(learning_rate=4e-3, task=SyntheticTask(flats=(1, 2)))
    (tmp_path / "empty.yaml").write_text("# the default recipe\n")
    assert TrainingConfig.from_file(tmp_path / "empty.yaml") == TrainingConfig()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"stepz": 10}, r"Unknown key 'stepz'. Did you mean 'steps'\?"),
        ({"task": {"n_trigers": 10}}, r"Unknown key 'task.n_trigers'. Did you mean 'n_triggers'"),
        ({"model": {"act": "relu"}}, r"Unknown key 'model.act'. Did you mean 'act_fn'"),
        ({"model": 3}, "'model' is 3, expected keys with values: n_layers"),
        ({"steps": "10"}, "'steps' is '10', expected a whole number from 1"),
        ({"steps": 10.5}, "'steps' is 10.5, expected a whole number from 1"),
        ({"steps": True}, "'steps' is True, expected a whole number from 1"),
        ({"learning_rate": "fast"}, "'learning_rate' is 'fast', expected a number above 0"),
        ({"model": {"class_token": "yes"}}, "'model.class_token' is 'yes', expected true or false"),
        ({"model": {"act_fn": "gelo"}}, "'model.act_fn' is 'gelo', expected 'gelu', .*Did you mean 'gelu'"),
        (
            {"model": {"attention": "sigmoids"}},
            "'sigmoids', expected 'softmax' or 'sigmoid'. Did you mean 'sigmoid'",
        ),
        ({"model": {"n_heads": 3}}, "not divisible by n_heads=3"),
        ({"optimiser": "adam"}, "'optimiser' is 'adam', expected 'adamw' or 'sgd'. Did you mean 'adamw'"),
        ({"optimiser": "sgd", "beta2": 0.9}, "beta2 means nothing with the optimiser 'sgd'"),
        ({"image_loss": 1}, "image_loss is the loss on .CLS., but class_token is off"),
        ({"steps": 100}, "leave no plateau between warm_up 200"),
        ({"decay_share": 1.5}, "'decay_share' is 1.5, expected 0 to 1"),
        ({"checkpoint_every": 30}, "checkpoint_every 30 must be a multiple of log_every 50"),
        ({"log_every": 0}, "'log_every' is 0, expected a whole number from 1"),
        ({"seed": -1}, "'seed' is -1, expected a whole number from 0"),
        ({"learning_rate": float("nan")}, "'learning_rate' is nan, expected a number above 0"),
        ({"momentum": 1.0}, "'momentum' is 1.0, expected at least 0 and below 1"),
        ({"task": {"n_triggers": 40}}, "4 keys, 40 triggers and 3 flat patches are more than the 36 patches"),
        ({"task": {"flats": [3]}}, "'task.flats' is a list of 1 items, expected two whole numbers"),
        ({"task": {"flats": [1, 2, 3]}}, "'task.flats' is a list of 3 items, expected two whole numbers"),
        ({"steps": [10]}, "'steps' is a list of 1 items, expected a whole number from 1"),
        ({"task": {"flat_noise": -0.1}}, "'task.flat_noise' is -0.1, expected a number from 0"),
        ({"task": {"flats": [3, 1]}}, "'task': flats are the fewest, then the most, got .3, 1."),
        ({"task": {"flat_content": "gradient"}}, "'task.flat_content' is 'gradient', expected a list"),
        (
            {"task": {"flat_content": ["grad"]}},
            "'task.flat_content.0.' is 'grad', .*Did you mean 'gradient'",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(values, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        TrainingConfig(**values)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"wrong\.yaml"):
        TrainingConfig.from_file(tmp_path / "wrong.yaml")


def test_wrong_settings_are_refused_in_python_too():
    for wrong in ({"steps": 100}, {"image_loss": 1.0}, {"optimiser": "sgd", "beta2": 0.9}):
        with pytest.raises(ConfigError):
            TrainingConfig(**wrong)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nsteps: 9\nseed: 2\n", "line 3, column 1: 'seed' stands twice, first in line 1"),
        ('{"steps": 9, "steps": 9}', "line 1, column 14: 'steps' stands twice, first in line 1"),
        ("seed: 1\ntask: {noise: 0.1, noise: 0.2}\n", "line 2, column 20: 'noise' stands twice, first in line 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text, told, tmp_path):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)twice\.yaml' is no valid configuration .*\n  {told}"):
        TrainingConfig.from_file(tmp_path / "twice.yaml")


def test_files_that_are_no_configuration(tmp_path):
    for text, told in (("[1, 2]", "The file is a list of 2 items"), ("a: [", "line 1.*No valid YAML")):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ConfigError, match=told):
            TrainingConfig.from_file(tmp_path / "wrong.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainingConfig.from_file(tmp_path / "none.yaml")


def test_the_schedules_are_the_experiments():
    config = TrainingConfig()
    for step in range(3001):  # the formulas of the run that registerlens:tiny came from
        share = min(1, (step + 1) / 200)
        if step > 0.85 * 3000:
            share *= max(0.05, (3000 - step) / (0.15 * 3000))
        assert config.learning_rate_at(step) == pytest.approx(4e-3 * share)
        assert config.flat_weight_at(step) == pytest.approx(max(0.0, 1 - step / 1000))
    assert config.changed(flat_loss_until=0).flat_weight_at(0) == 0
    assert config.changed(warm_up=0).learning_rate_at(0) == 4e-3


def test_image_labels_are_the_most_frequent_classes():
    batch = synthetic_images(32, 3)
    for roles, labels, image in zip(batch.roles, batch.labels, batch.image_labels, strict=True):
        for k in range(4):
            shown = [int(label[k]) for role, label in zip(roles, labels, strict=True) if role in (NORMAL, KEY)]
            counts = [shown.count(c) for c in range(12)]
            assert int(image[k]) == counts.index(max(counts))


@pytest.mark.parametrize("kind", ["gradient", "soft_noise", "photographs"])
def test_flat_patches_show_their_content_and_nothing_else_changes(kind):
    plain = SyntheticTask(flat_noise=0.0)
    varied = plain.changed(flat_content=(kind,))
    before, after = (synthetic_images(64, 5, task) for task in (plain, varied))
    assert torch.equal(before.labels, after.labels) and torch.equal(before.roles, after.roles)
    shown = (after.images - before.images).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    flat = after.roles == FLAT
    assert not shown[~flat].any()
    assert shown[flat].mean((2, 3)).abs().max() < 1e-4  # photographs are amplified up to 400 times
    assert shown[flat].square().mean().sqrt().item() == pytest.approx(CONTRAST, rel=0.15)
    flattened = torch.nn.functional.normalize(shown[flat].flatten(1), dim=1)
    assert (flattened @ flattened.T - torch.eye(len(flattened))).abs().mean() < 0.4  # not all of one kind


def test_each_flat_patch_draws_one_of_the_kinds():
    shown = flat_contents(300, 8, ("colour", "gradient"), torch.Generator().manual_seed(0))
    assert 0.4 < (shown.flatten(1).abs().sum(1) == 0).float().mean() < 0.6
    with pytest.raises(ConfigError, match="none is installed"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("registerlens.data.synthetic.shipped_photographs", list)
        flat_contents(2, 7, ("photographs",), torch.Generator().manual_seed(0))

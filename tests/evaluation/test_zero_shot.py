"""Class directions from text towers, against the source libraries' own text features."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from families import TINY_CLIP
from helpers import randomise

from registerlens import HookedViT
from registerlens.errors import ConfigError, ModelNotFoundError, UnsupportedArchitectureError
from registerlens.evaluation import zero_shot
from registerlens.evaluation.zero_shot import zero_shot_head

CLASSES = ["cat", "dog", "tench"]
TEMPLATES = ["a photo of a {}.", "a bad {} photo", "{}"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIPModel with a small byte-pair tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["."]
    vocabulary = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "ca",
        "cat</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = transformers.CLIPTokenizer(
        {word: index for index, word in enumerate(vocabulary)}, [("c", "a"), ("ca", "t</w>")], model_max_length=24
    )
    tokenizer.save_pretrained(folder)
    text = SMALL | {"vocab_size": len(vocabulary), "max_position_embeddings": 24}
    text |= {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 0}
    vision = SMALL | {"image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12))
    randomise(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    config = TINY_CLIP | {"text_cfg": TINY_CLIP["text_cfg"] | {"vocab_size": 49408, "context_length": 12}}
    model = randomise(open_clip.CLIP(**config))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def averaged(features):
    """Radford et al.'s average, class by class."""
    columns = []
    for of_class in features:
        unit = [row / row.norm() for row in of_class]
        mean = sum(unit) / len(unit)
        columns.append(mean / mean.norm())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_transformers_directions_are_the_average_of_its_own_text_features(clip, tmp_path, batch_size):
    head = zero_shot_head(clip, CLASSES, TEMPLATES, batch_size=batch_size, cache=tmp_path)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    features = []
    for label in CLASSES:  # one prompt at a time, unpadded: a second way
        prompts = [tokenizer(template.format(label), return_tensors="pt") for template in TEMPLATES]
        with torch.no_grad():
            features.append([model.get_text_features(**prompt).pooler_output[0] for prompt in prompts])
    assert head.shape == (12, 3)
    torch.testing.assert_close(head, averaged(features), rtol=1e-4, atol=1e-5)


def test_open_clip_directions_are_the_average_of_its_own_text_features(open_clip_folder, tmp_path):
    head = zero_shot_head(open_clip_folder, CLASSES, TEMPLATES, batch_size=4, cache=tmp_path)
    model = open_clip.create_model(f"local-dir:{open_clip_folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")
    with torch.no_grad():
        features = [[model.encode_text(tokenizer(t.format(label)))[0] for t in TEMPLATES] for label in CLASSES]
    torch.testing.assert_close(head, averaged(features), rtol=1e-4, atol=1e-5)


def test_it_fits_the_vision_tower_of_the_same_folder(clip, tmp_path):
    vit = HookedViT.from_pretrained(clip)
    head = zero_shot_head(clip, CLASSES, cache=tmp_path)
    with torch.no_grad():
        cosines = F.normalize(vit(torch.randn(2, 3, 16, 16)), dim=-1) @ head
    assert cosines.shape == (2, 3) and cosines.abs().max() <= 1 + 1e-5


def test_a_second_request_is_answered_from_disk_and_another_is_not(clip, tmp_path, monkeypatch):
    first = zero_shot_head(clip, CLASSES, TEMPLATES, cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(zero_shot._ENCODERS, "transformers", lambda *arguments: pytest.fail("encoded again"))
        assert torch.equal(zero_shot_head(clip, CLASSES, TEMPLATES, cache=tmp_path), first)
        for classes, templates in ((CLASSES[::-1], TEMPLATES), (CLASSES, TEMPLATES[:2])):
            with pytest.raises(pytest.fail.Exception):
                zero_shot_head(clip, classes, templates, cache=tmp_path)
    state = transformers.CLIPModel.from_pretrained(clip)
    randomise(state, seed=7).save_pretrained(clip)  # other weights under the same name
    assert not torch.equal(zero_shot_head(clip, CLASSES, TEMPLATES, cache=tmp_path), first)


@pytest.mark.parametrize(
    ("classes", "templates", "words"),
    [
        ([], ["{}"], "at least one class"),
        (["cat"], [], "at least one class"),
        (["cat", "cat"], ["{}"], "given more than once: \\['cat'\\]"),
        (["cat"], ["a photo"], "exactly one '{}'"),
        (["cat"], ["{} and {}"], "exactly one '{}'"),
    ],
)
def test_requests_that_make_no_sense(classes, templates, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        zero_shot_head("openai/clip-vit-base-patch16", classes, templates, cache=tmp_path)


def test_models_without_a_text_side(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="no text side"):
        zero_shot_head("timm:vit_base_patch16_clip_224.openai", CLASSES, cache=tmp_path)
    config = transformers.Dinov2Config(**SMALL, image_size=16, patch_size=8)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    with pytest.raises(UnsupportedArchitectureError, match="Dinov2Model, which has no text side"):
        zero_shot_head(tmp_path / "dino", CLASSES, cache=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_without_a_network_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="could not be downloaded"):
        zero_shot_head("somebody/no-such-clip", CLASSES, cache=tmp_path)

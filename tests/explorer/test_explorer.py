"""Tokens by name, the answers of the live widget, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import decode, decoding_error

import registerlens as rl
from registerlens.config import TokenLayout
from registerlens.errors import ConfigError, ImageError, InterventionError, MissingExtraError, ShapeError
from registerlens.explorer.codes import LEVELS, encode
from registerlens.explorer.explorer import explore
from registerlens.explorer.manifest import manifest
from registerlens.explorer.tokens import token_index, token_names
from registerlens.explorer.widget import answer
from registerlens.pictures import photograph_uri

ASKED = {"id": 1, "image": 0, "conditions": ["clean"], "layer": 2, "head": "mean", "token": "(1,2)", "role": "query"}


def test_names_lead_back_to_their_tokens():
    layout = TokenLayout(grid=(2, 3), n_prefix=2, n_trained_registers=2, n_test_time_registers=1)
    names = token_names(layout, layout.n_tokens + 2)
    assert len(set(names)) == len(names) == layout.n_tokens + 2
    assert names[:4] == ["[CLS]", "[DIST]", "trained register 0", "trained register 1"]
    assert names[layout.patches] == ["(0,0)", "(0,1)", "(0,2)", "(1,0)", "(1,1)", "(1,2)"]
    assert [token_index(layout, name, len(names)) for name in names] == list(range(len(names)))
    assert token_index(layout, (1, 2)) == token_index(layout, 5) == layout.patches.stop - 1
    assert token_names(TokenLayout(grid=(1, 1), n_prefix=1, class_token=False))[0] == "prefix 0"


@pytest.mark.parametrize("token", [(2, 0), (0, -1), 6, -1, "(2,0)", "register 7", "cls"])
def test_a_token_outside_is_refused(token):
    with pytest.raises(ShapeError, match=r"outside the grid|does not exist|no token"):
        token_index(TokenLayout(grid=(2, 3), n_prefix=0, class_token=False), token)


def test_codes_are_as_close_as_they_say():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.full(200, 0.05), 50).astype(np.float32)  # sinks, and many tiny values beside them
    rows = np.concatenate([rows, np.eye(200, dtype=np.float32)[:2], np.full((1, 200), 0.005, np.float32)])
    decoded = decode(*encode(rows))
    assert (np.abs(decoded - rows) <= decoding_error(rows) + 1e-7).all()
    assert (decoding_error(rows) <= rows.max(1, keepdims=True) * (1 / LEVELS + 1e-5)).all()
    assert np.allclose(decoded.max(1), rows.max(1))
    assert (decode(*encode(np.zeros((1, 4), np.float32))) == 0).all()


def test_large_pictures_shrink_in_their_own_shape():
    import base64
    import io

    from PIL import Image

    found = photograph_uri(np.zeros((400, 1600, 3), np.uint8))
    image = Image.open(io.BytesIO(base64.b64decode(found.partition(",")[2])))
    assert (image.format, image.size) == ("JPEG", (640, 160))
    assert photograph_uri(np.zeros((48, 48, 3), np.uint8)).startswith("data:image/png")


@pytest.mark.parametrize(("head", "role"), [("mean", "query"), (0, "key"), ("rollout", "query")])
def test_answers_are_the_models_numbers(explorer, vit, images, head, role):
    told, buffers = answer(explorer, ASKED | {"head": head, "role": role, "conditions": ["clean", "attention bias"]})
    json.dumps(told, allow_nan=False)
    assert [len(buffer) for buffer in buffers] == ([36, 36, 37, 37] if role == "query" else [36, 36, 36, 37])
    for i, condition in enumerate(["clean", "attention bias"]):
        with torch.no_grad(), vit.edit(*explorer.conditions[condition]):
            cache = vit.run_with_cache(images[:1])[1]
        codes, largest = np.frombuffer(buffers[2 * i], np.uint8), told["panels"][i]["largest"][0]
        if head != "rollout":
            whole = cache["blocks.2.attn.hook_pattern"][0].mean(0)
            expected = (whole[8] if role == "query" else whole[:, 8]).numpy()
            got = decode(codes[None], np.array([largest], np.float32))[0]
            assert (np.abs(got - expected) <= decoding_error(expected[None])[0] + 1e-6).all()
        norms = [cache["blocks.0.hook_resid_pre"]]
        norms += [cache[f"blocks.{layer}.hook_resid_{at}"] for layer in range(6) for at in ("mid", "post")]
        assert told["panels"][i]["norms"] == pytest.approx([float(x[0, 8].norm()) for x in norms], rel=1e-5)
        posts = cache["blocks.1.mlp.hook_post"][0, 8]
        assert told["panels"][i]["chosen"] == pytest.approx(
            [float(posts[n]) for _, n in explorer.neurons.pairs], abs=1e-5
        )


def test_the_cutoff_is_that_of_find_outliers(explorer, vit, images):
    found = rl.find_outliers(vit, images)
    told, _ = answer(explorer, ASKED | {"conditions": ["zeroed"]})
    patches = found.norms[0]
    assert found.sublayer == explorer.trace.strongest
    assert torch.equal(patches > told["panels"][0]["cutoff"], found.mask[0])


def test_a_condition_without_the_token_has_no_panel(explorer):
    both = ["clean", "test-time register"]
    told, buffers = answer(explorer, ASKED | {"token": "test-time register 0", "conditions": both})
    assert told["panels"][0] is None and told["panels"][1]["largest"] and len(buffers) == 2
    told, buffers = answer(explorer, ASKED | {"token": "attention bias", "conditions": ["attention bias"]})
    assert told["panels"] == [None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer": 6},
        {"layer": -1},
        {"head": 1},
        {"head": "max"},
        {"role": "value"},
        {"image": 2},
        {"conditions": ["none"]},
        {"layer": "1"},
    ],
)
def test_a_wrong_question_is_answered_in_words(explorer, wrong):
    told, buffers = answer(explorer, ASKED | wrong)
    assert told["id"] == 1 and told["error"] and not buffers


@pytest.mark.parametrize(
    ("layer", "head"), [(6, "mean"), (-1, "mean"), (-1, "rollout"), (6, "rollout"), (0, 1), (0, -1)]
)
def test_no_such_block_or_head_is_an_error_however_it_is_asked_for(explorer, layer, head):
    attention = explorer.attention(0, "clean")
    for ask in (
        lambda: attention.whole(layer, head),
        lambda: attention.reference(layer, head),
        lambda: attention.of(3, "query", layer, head),
        lambda: attention.of(3, "key", layer, head),
    ):
        with pytest.raises(ShapeError, match=r"(Block|Head) \S+ does not exist: there are 0 to"):
            ask()


def test_no_such_token_is_an_error(explorer):
    attention = explorer.attention(0, "attention bias")
    assert attention.of(36, "key", 1, 0).shape == (36,)
    for index, role in ((36, "query"), (37, "key"), (-1, "query")):
        with pytest.raises(ShapeError, match=f"is no {role}: these count 0 to"):
            attention.of(index, role, 1, "mean")


def test_the_manifest_starts_at_an_outlier_and_is_plain_json(explorer):
    told = manifest(explorer)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["start"] | {"token": ""} == {
        "image": 0,
        "condition": "clean",
        "compare": "test-time register",
        "layer": 2,
        "head": "mean",
        "token": "",
        "role": "key",
    }
    norms = explorer.attention(0, "clean").recording.norms[-1]
    assert token_names(explorer.vit.cfg.layout())[int(norms.argmax())] == told["start"]["token"]
    assert [len(condition["tokens"]) for condition in told["conditions"]] == [36, 36, 37, 37]
    assert [condition["n_tokens"] for condition in told["conditions"]] == [36, 36, 37, 36]


def test_a_model_without_outliers_says_so(vit):
    found = explore(vit, torch.rand(1, 3, 48, 64))
    told = manifest(found)
    assert told["outliers"]["verdict"] == "absent" and told["outliers"]["threshold"] is None
    assert (told["start"]["role"], told["start"]["layer"], told["start"]["compare"]) == ("query", 5, None)
    assert told["grid"]["columns"] == 8


def test_the_widget_answers_messages(explorer, monkeypatch):
    widget = explorer.widget()
    sent = []
    monkeypatch.setattr(widget, "send", lambda content, buffers: sent.append((content, buffers)))
    widget._handle_custom_msg(ASKED, [])
    assert sent == [answer(explorer, ASKED)]
    assert "mount(" in widget._esm and widget.manifest["layers"] == 6


def test_without_anywidget_the_error_names_the_extra(explorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(MissingExtraError, match=r"registerlens\[notebooks\]"):
        explorer.widget()


def test_bad_input(vit, images, neurons):
    with pytest.raises(ImageError, match="empty"):
        explore(vit, images[:0])
    with pytest.raises(ImageError, match="2 images came with 1 names"):
        explore(vit, images, names=["one"])
    with pytest.raises(ShapeError, match="smaller than one patch"):
        explore(vit, torch.rand(1, 3, 4, 48))
    with pytest.raises(InterventionError, match="another name"):
        explore(vit, images, interventions={"clean": rl.Ablate(neurons)})
    with pytest.raises(InterventionError, match="do not exist"):
        explore(vit, images, rl.RegisterNeurons.from_pairs([(9, 0)]))
    with pytest.raises(InterventionError, match="do not exist"):
        explore(vit, images, interventions={"zeroed": rl.Ablate(rl.RegisterNeurons.from_pairs([(9, 0)]))})
    other = rl.HookedViT(
        rl.ViTConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, image_size=(48, 48), patch_size=(8, 8))
    )
    with pytest.raises(ConfigError, match=r"6 blocks, this one has 1.*rl\.trace"):
        explore(other, images, trace=rl.trace(vit, images))
    with pytest.raises(ShapeError, match=r"no condition 'x'.*'clean'"):
        explore(vit, images, interventions={"again": None}).tokens("x")

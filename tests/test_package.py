"""`import registerlens`: light, without side effects, with every public name behind it."""

import json
import subprocess
import sys
from collections import Counter
from types import ModuleType

import pytest
from helpers import rooms

import registerlens
from registerlens import errors

PROBE = """
import json, os, pathlib, random, sys, threading, warnings
before = (dict(os.environ), sorted(os.listdir()), warnings.filters[:], random.getstate(), threading.active_count())
import registerlens
registerlens.__version__, dir(registerlens)
after = (dict(os.environ), sorted(os.listdir()), warnings.filters[:], random.getstate(), threading.active_count())
heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1:]))
print(json.dumps({"heavy": heavy, "unchanged": before == after, "names": dir(registerlens)}))
"""

HEAVY = ["torch", "transformers", "transformer_lens", "timm", "open_clip", "numpy", "pandas", "plotly", "PIL", "typer"]


def test_import_is_light_and_has_no_side_effects(tmp_path):
    command = [sys.executable, "-c", PROBE, *HEAVY]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60)
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    assert answer["heavy"] == []
    assert answer["unchanged"]
    assert set(registerlens.__all__) <= set(answer["names"])


@pytest.mark.slow
def test_loading_needs_neither_timm_nor_open_clip(tmp_path):
    """A model of ours or of transformers loads where the optional libraries are not installed."""
    probe = """
import sys
sys.modules["timm"] = sys.modules["open_clip"] = sys.modules["onnx"] = None
import registerlens
vit = registerlens.HookedViT.from_pretrained("registerlens:tiny")
vit.save_pretrained("copy")
registerlens.from_pretrained("copy")
"""
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=tmp_path, timeout=120)


def test_every_public_name_is_there_and_stands_in_one_place():
    names = Counter()
    for room in (registerlens, *rooms()):
        for name in getattr(room, "__all__", ()):
            value = getattr(room, name)
            names[name] += 1
            assert isinstance(value, ModuleType) or getattr(value, "__name__", name) == name
    assert {name for name, places in names.items() if places > 1} == set()
    with pytest.raises(AttributeError, match="HookdViT"):
        _ = registerlens.HookdViT


def test_what_stands_at_the_top_is_little():
    """The first page's names and the rooms; more belongs into a room."""
    assert len([name for name in registerlens.__all__ if not isinstance(getattr(registerlens, name), ModuleType)]) <= 27


def test_names_are_found_before_and_after_the_modules_called_like_them():
    probe = """
import registerlens.sweep.grid, registerlens.analysis.faithfulness, registerlens as rl
assert callable(rl.sweep.grid) and callable(rl.analysis.faithfulness)
import registerlens.evaluation.causal_order
assert callable(rl.evaluation.causal_order)
"""
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=120)


def test_every_error_is_caught_by_the_base_class():
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(kinds) >= 9
    assert all(issubclass(kind, registerlens.RegisterLensError) for kind in kinds)
    missing = errors.MissingExtraError("timm", "timm", "Loading this")
    assert "pip install 'registerlens[timm]'" in str(missing) and isinstance(missing, ImportError)
    assert str(errors.HookNameError("a 'name'")) == "a 'name'"


def test_close_matches():
    known = ["hook_embed", "hook_pos_embed", "ln_final.hook_scale"]
    assert errors.close_matches("hook_embd", known) == " Did you mean 'hook_embed' or 'hook_pos_embed'?"
    assert errors.close_matches("xyz", ["hook_embed"]) == ""


@pytest.mark.slow
def test_what_is_no_tensor_is_refused_with_the_way_to_make_one():
    """In a process of its own: here the type checks of the tests would answer first."""
    code = """
import registerlens as rl
vit = rl.from_pretrained("registerlens:tiny")
def swish():
    rl.ViTConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, image_size=16, patch_size=8, act_fn="swish")
for wrong in (lambda: vit([[1.0]]), lambda: rl.trace(vit, "photos/"), lambda: rl.trace(vit, [(1, 2)]), swish):
    try:
        wrong()
    except rl.RegisterLensError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("load_images" in line for line in lines[:3])
    assert "act_fn must be one of" in lines[3] and "'swish'" in lines[3]

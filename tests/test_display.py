"""Finding one's way: names, tab completion, what models, caches and results say of themselves, what a model costs."""

import copy
import dataclasses
import pickle
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rooms
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from small_vits import CONFIGS, build, images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import ActivationCache

import registerlens as rl
from registerlens.display import Shown, card, line, memory
from registerlens.encoding import concrete
from registerlens.errors import HookNameError, ShapeError
from registerlens.interventions.base import Intervention
from registerlens.model.names import pooled

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def tiny():
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    with torch.no_grad():
        _, cache = vit.run_with_cache(torch.rand(2, 3, 48, 48))
    return vit, cache


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_names_come_in_the_order_in_which_they_are_reached(config):
    vit = build(config)
    _, cache = vit.run_with_cache(images(vit), names_filter="*")
    reached = list(cache.keys())
    if vit.cfg.ln_pre:  # its scale belongs to both summands, so that it is known before either
        reached.remove("ln_pre.hook_scale")
        reached.insert(reached.index("ln_pre.hook_normalized"), "ln_pre.hook_scale")
    assert vit.hook_names() == reached


def test_names_of_a_glob_a_list_and_a_function():
    vit = build()
    assert vit.hook_names("blocks.2.hook_*") == [
        f"blocks.2.hook_{name}" for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    ]
    assert vit.hook_names(["hook_tokens", "hook_embed"]) == ["hook_embed", "hook_tokens"]
    assert vit.hook_names(lambda name: name.endswith("pattern")) == [f"blocks.{i}.attn.hook_pattern" for i in range(3)]


def test_ten_blocks_stand_in_the_order_of_numbers():
    cfg = rl.ViTConfig(n_layers=12, d_model=8, n_heads=1, d_mlp=8, image_size=(8, 8), patch_size=(4, 4))
    names = rl.HookedViT(cfg).hook_names("blocks.*.hook_mlp_out")
    assert names == [f"blocks.{layer}.hook_mlp_out" for layer in range(12)]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("blokcs.*", "'blocks.*'"),
        ("blocks.*.atn.hook_patern", "'blocks.*.attn.hook_pattern'"),
        ("blocks.7.mlp.*", "'blocks.*.mlp.*'"),
        ("blocks.*.mlp.hook_resid_post", "'blocks.*.hook_resid_post'"),
        ("blocks.1.hook_resid_pots", "'blocks.1.hook_resid_post'"),
    ],
)
def test_a_glob_that_matches_nothing_names_what_was_meant(wrong, meant):
    with pytest.raises(HookNameError) as error:
        build().hook_names(wrong)
    assert f"Did you mean {meant}" in str(error.value) and str(error.value).endswith("vit.hook_names()")


def test_a_hook_point_stands_for_its_name_and_a_model_is_no_sequence():
    vit = build()
    point = vit["blocks.1.mlp.hook_post"]
    assert point is vit.blocks[1].mlp.hook_post
    fired = []
    note = lambda act, hook: fired.append(hook.name)  # noqa: E731
    for names in (point, [point, "hook_tokens"]):
        vit.run_with_hooks(images(vit), fwd_hooks=[(names, note)])
    assert fired == ["blocks.1.mlp.hook_post", "hook_tokens", "blocks.1.mlp.hook_post"]
    assert list(vit.run_with_cache(images(vit), names_filter=point)[1].keys()) == [point.name]
    with pytest.raises(HookNameError, match=r"'blocks.1.mlp.hook_post'.*vit\.hook_names\(\)"):
        vit["blocks.1.mlp.hook_pots"]
    with pytest.raises(TypeError, match="not iterable"):
        list(vit)


def completions(text, **names):
    shell = InteractiveShell.instance()
    shell.user_ns.update(names)
    found = []
    for jedi in (True, False):
        shell.Completer.use_jedi = jedi
        with provisionalcompleter():
            found.append([one.text for one in shell.Completer.completions(text, len(text))])
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('cache["blocks.3.mlp.', ["blocks.3.mlp.hook_post", "blocks.3.mlp.hook_pre"]),
        ('vit["blocks.3.mlp.', ["blocks.3.mlp.hook_post", "blocks.3.mlp.hook_pre"]),
        ('vit.run_with_cache(images, names_filter=vit["hook_pat', ["hook_patch_embed"]),
        ('with vit.hooks([(vit["ln_final.hook_s', ["ln_final.hook_scale"]),
    ],
)
def test_ipython_completes_names_of_models_and_caches(tiny, text, expected):
    vit, cache = tiny
    assert completions(text, vit=vit, cache=cache) == [expected, expected]


# Caches --------------------------------------------------------------------------------------------------------------


def test_the_cache_is_transformerlenss_and_says_what_it_holds(tiny):
    vit, cache = tiny
    assert isinstance(cache, ActivationCache) and cache.has_batch_dim and cache.model is vit
    rows = repr(cache).splitlines()
    assert rows[0].startswith("ActivationCache of registerlens:tiny: 109 entries, ")
    assert rows[-7].split() == ["blocks.{0..5}.mlp.hook_pre", "[2,", "36,", "256]", "float32", "6", "x", "73.7", "kB"]
    assert len(rows) == 2 + 4 + 17 + 3  # head and headers; before the blocks, one block, after them
    frame = cache.to_dataframe()
    assert list(frame["name"]) == list(cache.keys()) and frame["bytes"].sum() == sum(t.nbytes for t in cache.values())
    sliced = cache.apply_slice_to_batch_dim(slice(0, 1))
    assert isinstance(sliced, type(cache)) and "blocks.{0..5}.mlp.hook_pre" in repr(sliced)
    assert type(copy.copy(cache)) is type(cache)
    assert torch.equal(pickle.loads(pickle.dumps(cache))["resid_post", 3], cache["resid_post", 3])


def test_bytes_of_a_cache_are_those_of_its_storages():
    vit = build("plain")
    with torch.no_grad():
        _, cache = vit.run_with_cache(images(vit), names_filter=["blocks.*.hook_resid_*", "blocks.0.attn.hook_[qkv]"])
    separate = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cache.values()}
    stream = cache["blocks.0.hook_resid_pre"].nbytes
    qkv = 3 * cache["blocks.0.attn.hook_q"].nbytes
    assert cache.nbytes == sum(separate.values()) == 7 * stream + qkv  # what leaves a block enters the next one


def test_what_a_cache_lacks_is_named_with_what_to_do():
    vit = build()
    _, cache = vit.run_with_cache(images(vit), names_filter="blocks.*.hook_resid_post")
    assert cache["resid_post", -1] is cache["blocks.2.hook_resid_post"]
    with pytest.raises(HookNameError, match=r"lacks 'blocks.1.attn.hook_pattern'.*names_filter=\['blocks.1.attn"):
        cache["pattern", 1]
    with pytest.raises(HookNameError, match=r"no hook point 'blocks.1.hook_resid_pots'. Did you mean .*list\(cache\)"):
        cache["blocks.1.hook_resid_pots"]
    with pytest.raises(KeyError):
        cache["blocks.7.hook_resid_post"]


def test_pooled_names_keep_what_differs_apart():
    points = {"blocks.0.a": 1, "blocks.1.a": 1, "blocks.2.a": 2, "blocks.4.a": 1, "head.a": 1, "blocks.3.b": 1}
    assert pooled(points) == [
        ("blocks.{0..1,4}.a", 3, 1),
        ("blocks.2.a", 1, 2),
        ("head.a", 1, 1),
        ("blocks.3.b", 1, 1),
    ]


# Models --------------------------------------------------------------------------------------------------------------


def test_a_model_says_what_it_is_and_which_edits_are_in_force():
    vit = build("rotary")
    told = repr(vit)
    assert "3, width 32, 4 heads of 8, gated MLPs of 40 neurons (silu)" in told
    assert "24 x 32 pixels in patches of 8 x 8: 3 x 4 patches, [CLS] and 2 trained registers" in told
    n = sum(parameter.numel() for parameter in vit.parameters())
    assert f"{n:,} parameters, {n * 4 / 1000:.3g} kB, float32 on cpu" in told
    assert "edits in force: none" in told and "hooked" not in told
    assert "(blocks): ModuleList" in nn.Module.__repr__(vit) and "(blocks): ModuleList" in vit._repr_html_()
    inner, fitted = rl.Ablate(rl.Heads([(1, 0)])), rl.Ablate.fit(vit, images(vit), rl.Heads([(2, 0)]), mode="mean")
    with vit.edit(inner):
        with pytest.raises(ZeroDivisionError), vit.edit(fitted):
            assert vit.edits == (inner, fitted)
            raise ZeroDivisionError
        assert vit.edits == (inner,)
        assert "edits in force: Ablate(" in repr(vit) and "hooked: 1 of" in repr(vit)
        vit(images(vit))
    assert vit.edits == () and "edits in force: none" in repr(vit)


def test_half_precision_is_said():
    vit = build("plain").to(torch.bfloat16)
    n = sum(parameter.numel() for parameter in vit.parameters())
    assert f"{n * 2 / 1000:.3g} kB, bfloat16" in repr(vit)
    assert {point.dtype for point in vit.summary().points if "scale" not in point.name} == {"bfloat16"}


# Summary -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [None, (32, 24)])
def test_the_summary_agrees_with_a_run(config, size):
    vit = build(config)
    found = vit.summary(size)
    x = torch.randn(1, vit.cfg.n_channels, *(size or vit.cfg.image_size))
    with torch.no_grad():
        _, cache = vit.run_with_cache(x)
        _, every = vit.run_with_cache(x, names_filter="*")
    told = [(point.name, point.shape, point.dtype, point.n_bytes) for point in found.points]
    assert told == [(name, tuple(t.shape), str(t.dtype)[6:], t.nbytes) for name, t in every.items()]
    assert [point.name for point in found.points if point.by_default] == list(cache.keys())
    assert found.cache_bytes == cache.nbytes
    vit.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        vit(x)
    assert found.flops == counter.get_total_flops()
    assert found.parameters == sum(parameter.numel() for parameter in vit.parameters())
    assert found.weight_bytes == 4 * found.parameters


def test_flops_and_parameters_of_parts_in_closed_form():
    cfg = rl.ViTConfig(n_layers=2, d_model=12, n_heads=3, d_mlp=20, image_size=(16, 24), patch_size=(8, 8), d_out=5)
    parts = {part.name: part for part in rl.HookedViT(cfg).summary().parts}
    n, patches, d, heads, width, mlp = 7, 6, 12, 3, 4, 20
    assert parts["embedding"].flops == 2 * patches * 3 * 64 * d
    assert parts["embedding"].parameters == 3 * 64 * d + d + d + n * d
    for layer in range(2):
        attention, neurons = parts[f"blocks.{layer}.attn"], parts[f"blocks.{layer}.mlp"]
        assert attention.flops == 2 * n * d * 3 * d + 2 * 2 * heads * n * n * width + 2 * n * d * d
        assert attention.parameters == 2 * d + 3 * d * d + 3 * d + d * d + d
        assert neurons.flops == 2 * 2 * n * d * mlp
        assert neurons.parameters == 2 * d + 2 * d * mlp + mlp + d
    assert (parts["ln_final"].flops, parts["ln_final"].parameters) == (0, 2 * d)
    assert (parts["head"].flops, parts["head"].parameters) == (2 * d * 5, 5 * d + 5)


def test_the_summary_runs_nothing_and_leaves_edits_out(tiny):
    vit, _ = tiny
    fired = []
    with vit.hooks([("hook_tokens", lambda act, hook: fired.append(1))]):
        before = vit.summary()
        with vit.edit(rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(1, 183)]))):
            assert vit.summary() == before
            vit(torch.rand(1, 3, 48, 48))
    assert len(fired) == 1
    assert {point.name: point.shape for point in before.points}["blocks.0.hook_resid_pre"] == (1, 36, 64)
    assert before.to_dataframe().shape == (115, 5) and before.parts_to_dataframe()["flops"].sum() == before.flops
    told = repr(before)
    assert "blocks.{0..5}.attn  6 x 16,768  6 x 1.51 MFLOPs" in told and "blocks.{0..5}.attn.hook_result" in told
    with pytest.raises(ShapeError, match="smaller than one patch"):
        vit.summary((4, 48))


# Results -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Result(Shown):
    model: str
    values: np.ndarray
    tensor: torch.Tensor
    sizes: tuple[int, ...]
    few: tuple[int, int] = (1, 2)
    n: int = 3
    nested: dict = dataclasses.field(default_factory=dict)

    def describe(self):
        return f"In words: <{self.model}>\nand more."


def test_a_result_is_shown_in_a_line_without_its_arrays():
    result = Result(model="m" * 100, values=np.zeros((3, 4)), tensor=torch.zeros(2), sizes=(1,) * 9)
    assert repr(result) == f"Result(model='{'m' * 46}…, 9 sizes, few=(1, 2); 2 arrays up to [3, 4], 104 bytes)"
    assert memory(dataclasses.replace(result, nested={"a": [np.zeros(2)]})) == 104 + 16
    assert "few" in line(result) and "n=" not in line(result) and "n=4" in line(dataclasses.replace(result, n=4))


def test_html_is_escaped_everywhere(tiny):
    vit, cache = copy.copy(tiny[0]), copy.copy(tiny[1])
    vit.source, cache.model = HOSTILE, vit
    result = Result(model=HOSTILE, values=np.zeros(1), tensor=torch.zeros(1), sizes=(), nested={"k": HOSTILE})
    neurons = rl.RegisterNeurons.from_pairs([(1, 5)], source=HOSTILE)
    for shown in (vit, cache, vit.summary(), result, neurons):
        text = shown._repr_html_()
        assert "<img" not in text and "</script" not in text and "&lt;/script&gt;&lt;img" in text
    assert "In words: &lt;&lt;/script" in card(result)


def test_every_result_with_arrays_is_shown_in_a_line():
    """Whatever is exported and can be saved: a class to come must inherit `Shown` too, or `Result`, which does."""
    exported = [getattr(room, name) for room in (rl, *rooms()) for name in getattr(room, "__all__", ())]
    kinds = {kind for kind in exported if dataclasses.is_dataclass(kind) and hasattr(kind, "load")}
    kinds = {kind for kind in kinds if not issubclass(kind, Intervention)}  # they say what was done, without arrays
    assert len(kinds) > 15
    for kind in kinds | set(concrete(Shown)):
        assert issubclass(kind, Shown), kind
        assert kind.__repr__.__qualname__ in ("Shown.__repr__", f"{kind.__name__}.__repr__"), kind


def test_results_of_a_model_are_shown_and_otherwise_as_before(tiny, tmp_path):
    vit, _ = tiny
    found = rl.trace(vit, torch.rand(2, 3, 48, 48))
    assert re.fullmatch(
        r"Trace\(model='registerlens:tiny', fingerprint='\w+', image_sizes=\(\(48, 48\),\), 13 sublayers, "
        r"sink_query='mean', n_images=2; 10 arrays up to \[13, \d+\], [\d.]+ kB\)",
        repr(found),
    )
    text = found._repr_html_()
    assert "Outlier tokens: " in text and "<td>largest_norm</td><td>[13] float64</td><td>104 bytes</td>" in text
    loaded = rl.analysis.Trace.load(found.save(tmp_path))
    assert found != loaded and repr(loaded) == repr(found)  # as before: no equality by value
    assert repr(pickle.loads(pickle.dumps(found))) == repr(found)
    neurons = rl.RegisterNeurons(pairs=((1, 183), (1, 103)), scores=(2.0, 1.0))
    assert pickle.loads(pickle.dumps(neurons)) == neurons == rl.RegisterNeurons.load(neurons.save(tmp_path))
    assert "<td>1</td><td>183, 103</td>" in neurons._repr_html_()


def test_a_notebook_shows_models_caches_and_results(tiny):
    vit, cache = tiny
    formatter = InteractiveShell.instance().display_formatter
    for value in (vit, cache, vit.summary(), rl.RegisterNeurons.from_pairs([(1, 183)])):
        shown, _ = formatter.format(value)
        assert shown["text/html"].startswith("<div>") and shown["text/plain"] == repr(value)


SOURCES = [path.read_text() for path in Path(rl.__file__).parent.rglob("*.py")]
DRAWN = {name for source in SOURCES for name in re.findall(r'= drawn_by\("(.*)"\)', source)}


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_what_draws_a_result_is_there(name):
    module, _, function = name.rpartition(".")
    assert callable(getattr(import_module(f"registerlens.viz.{module}"), function))

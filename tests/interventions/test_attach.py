"""Edits inside other libraries' models, against the other route: the same edits in a HookedViT with their weights."""

import copy
import gc
import inspect
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import pytest
import timm
import torch
import transformers
from families import CASES, SQUARE, clip_model, hugging, main_output, parts, run, timmed, vision_part
from helpers import randomise, relative
from jaxtyping import TypeCheckError
from torch import nn

from registerlens import HookedViT, RegisterNeurons
from registerlens.errors import InterventionError, UnsupportedArchitectureError
from registerlens.interventions.attach import attach
from registerlens.interventions.attention_bias import AttentionBias
from registerlens.interventions.base import Edit, Intervention, Scene
from registerlens.interventions.registers import MoveOutliers, TestTimeRegisters
from registerlens.loading.registry import FAMILIES
from registerlens.model.attention import final_point

TOLERANCE = 1e-5
NEURONS = RegisterNeurons.from_pairs([(0, 3), (0, 40), (2, 7)])
REGISTER = TestTimeRegisters(NEURONS)
MAPPED = {"timm": "timm supervised", "transformers": "CLIPVisionModel", "open_clip": "open_clip LAION GELU"}
"""One case a library."""


@dataclass(frozen=True)
class At(Intervention):
    """Any change at any point."""

    point: str
    change: Callable = lambda x, scene: x * 0

    def edits(self, host, first_register):
        return [Edit(self.point, self.change)]


def same(x, scene):
    return x


def without_head(x, scene):
    return x * torch.tensor([1.0, 0, 1, 1]).to(x)[:, None]


def patch_of(images):
    """A patch that depends on the image."""
    return (images.mean((1, 2, 3)).abs()[:, None] * 100).long() % 9


MOVED = MoveOutliers(NEURONS, patch_of)


def made(name):
    """A module with random weights, its vision part, and a HookedViT with the same weights."""
    case = CASES[name]
    module = randomise(case.make(case.native))
    return module, vision_part(module), HookedViT.from_module(module)


def images_for(vit, size=None, batch=3, seed=1):
    size = size or vit.cfg.image_size
    return torch.randn(batch, vit.cfg.n_channels, *size, generator=torch.Generator().manual_seed(seed))


def bias_for(vit):
    return AttentionBias.fit(vit, images_for(vit, seed=2), NEURONS)


def output_of(module, images):
    result = module(images)
    return result if isinstance(result, torch.Tensor) else main_output(result)


def worth(output):
    """A number whose gradient is not zero."""
    return output.square().mean()


# Parity --------------------------------------------------------------------------------------------------------------

ALL_EDITS = (
    "ViTModel",
    "CLIPVisionModel",
    "Dinov2WithRegistersModel",
    "DINOv3ViTModel",
    "SiglipVisionModel",
    "InternVLVisionModel, mean",
    "timm supervised",
    "timm CLIP",
    "timm DINOv2 reg4",
    "timm EVA-02 base",
    "open_clip LAION GELU",
    "open_clip CoCa",
)


@pytest.mark.parametrize("name", CASES)
def test_edits_equal_those_of_hooked_vit(name):
    case = CASES[name]
    module = randomise(case.make(case.native))
    vit = HookedViT.from_module(module)
    edits = {
        "register": REGISTER,
        "several registers": TestTimeRegisters(NEURONS, n=2, init="gaussian", assign="random"),
        "attention bias": bias_for(vit),
        "moved outliers": MOVED,
        "head": At("blocks.1.attn.hook_z", without_head),
    }
    if vit.ln_pre is not None:
        edits["before ln_pre"] = TestTimeRegisters(NEURONS, before_ln_pre=True)
    for size in filter(None, (case.native, case.other)):
        images = images_for(vit, size)
        at_native = size == case.native
        resized = module if at_native else case.resize(module, size)
        before = run(case, resized, images, at_native)
        # Every family at every kind of place; all edits in one family of each way to be built. At another size only
        # positions are new, which the library computes itself and appended tokens meet.
        places = ("register", "attention bias", "head") if name not in ALL_EDITS else tuple(edits)
        for kind in places if at_native else ("register",) if name in ALL_EDITS else ():
            edit = edits[kind]
            with attach(resized, edit):
                streams, tokens, output = run(case, resized, images, at_native)
            with torch.no_grad(), vit.edit(edit):
                expected, cache = vit.run_with_cache(images, names_filter="blocks.*.hook_resid_*")
                expected_tokens = vit(images, return_type="tokens")[:, : tokens.shape[1]]
            if not vit.cfg.pooling:
                expected = expected[:, : output.shape[1]]
            pairs = [(f"blocks.{i}.hook_resid_pre", stream) for i, stream in enumerate(streams[:-1])]
            pairs += [(f"blocks.{i}.hook_resid_post", stream) for i, stream in enumerate(streams[1:])]
            errors = {hook: relative(stream, cache[hook][:, : stream.shape[1]]) for hook, stream in pairs}
            errors |= {"tokens": relative(tokens, expected_tokens), "output": relative(output, expected)}
            assert all(error <= TOLERANCE for error in errors.values()), (size, kind, errors)
            assert [stream.shape for stream in streams] == [stream.shape for stream in before[0]]
            assert relative(output, before[2]) > 1e-3, kind
        after = run(case, resized, images, at_native)
        assert all(torch.equal(got, was) for got, was in zip(after[0], before[0], strict=True))
        assert torch.equal(after[2], before[2])


@pytest.mark.parametrize("name", MAPPED.values())
@pytest.mark.parametrize(
    "point",
    ["hook_tokens"]
    + [f"blocks.1.{p}" for p in ("hook_resid_pre", "hook_resid_post", "mlp.hook_post")]
    + [f"blocks.1.attn.hook_{kind}" for kind in "qkvz"],
)
def test_every_place_holds_the_tensor_of_hooked_vit_with_the_appended_token(name, point):
    module, vision, vit = made(name)
    images = images_for(vit)
    seen = []

    def change(x, scene):
        seen.append(x.detach().clone())
        assert scene.layout == vit.cfg.layout(n_test_time_registers=1) and torch.equal(scene.images, images)
        x[:, -1] *= -2  # in place: allowed here, and seen by nobody else
        return x

    with attach(module, REGISTER, At(point, change)):
        output = output_of(vision, images)
    with vit.edit(REGISTER, At(point, change)):
        expected = vit(images)
    assert relative(*seen) <= TOLERANCE
    assert seen[0].shape[1] == vit.cfg.layout().n_tokens + 1
    if vision is module:
        assert relative(output, expected) <= TOLERANCE


def test_an_edit_in_place_does_not_reach_the_hidden_states():
    module, _, vit = made("ViTModel")

    def change(x, scene):
        return x.zero_()

    images = images_for(vit)
    before = module(images, output_hidden_states=True).hidden_states
    with torch.no_grad(), attach(module, At("hook_tokens", change), At("blocks.1.hook_resid_pre", change)):
        after = module(images, output_hidden_states=True).hidden_states
    assert torch.equal(after[0], before[0]) and after[1].abs().min() > 0


# What the libraries offer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel"])
@pytest.mark.parametrize("captured_before", [False, True])
def test_hidden_states_and_attention_maps_of_transformers(name, captured_before):
    module, _, vit = made(name)
    module.set_attn_implementation("eager")
    images = images_for(vit)
    if captured_before:  # transformers leaves its hooks in place after the first time
        module(images, output_hidden_states=True, output_attentions=True)
    for edit in (REGISTER, bias_for(vit)):
        with torch.no_grad(), attach(module, edit):
            result = module(images, output_hidden_states=True, output_attentions=True)
        with torch.no_grad(), vit.edit(edit):
            _, cache = vit.run_with_cache(images, names_filter=["blocks.*.hook_resid_*", "*.hook_[qk]"])
        n = vit.cfg.layout().n_tokens
        assert relative(result.hidden_states[0], cache["blocks.0.hook_resid_pre"][:, :n]) <= TOLERANCE
        assert len(result.hidden_states) == 4 and len(result.attentions) == 3
        for layer in range(3):
            stream, q, k = (cache[f"blocks.{layer}.{at}"] for at in ("hook_resid_post", "attn.hook_q", "attn.hook_k"))
            pattern = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / vit.cfg.d_head**0.5).softmax(-1)
            assert pattern.shape[-1] == n + 1
            assert relative(result.hidden_states[layer + 1], stream[:, :n]) <= TOLERANCE
            assert result.hidden_states[layer + 1].is_contiguous()
            assert relative(result.attentions[layer], pattern[..., :n, :n]) <= TOLERANCE


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "InternVLVisionModel, [CLS], q/k norm, RMSNorm"])
@pytest.mark.parametrize("kind", "qk")
def test_queries_and_keys_are_met_as_the_scores_take_them(name, kind):
    """Normalised and turned, with the appended token, which has no position."""
    module, _, vit = made(name)
    images, seen = images_for(vit), []
    point = f"blocks.1.attn.{final_point(vit.cfg, kind)}"

    def see(x, scene):
        seen.append(x.detach().clone())
        return -x

    with torch.no_grad(), attach(module, REGISTER, At(point, see)):
        output = output_of(module, images)
    with torch.no_grad(), vit.edit(REGISTER, At(point, see)):
        expected = vit(images)
    assert relative(*seen) <= TOLERANCE and relative(output, expected) <= TOLERANCE


def test_patches_that_come_shuffled_or_padded_are_refused():
    module, _, _ = made("ViTMAEModel")
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(InterventionError, match="shuffles the patches"), attach(module, REGISTER):
        module(images)
    with pytest.raises(InterventionError, match="shuffles the patches"), attach(module, REGISTER):
        module(images, noise=torch.arange(16.0).flip(0).expand(2, -1))
    module, _, _ = made("Siglip2VisionModel")
    patches, mask = torch.randn(2, 16, 192), torch.ones(2, 16, dtype=torch.int32)
    for grids in ([[3, 4], [3, 4]], [[2, 8], [4, 4]]):
        with pytest.raises(InterventionError, match="images of one size without padding"), attach(module, REGISTER):
            module(patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor(grids))


def test_the_model_keeps_its_kind_of_attention(monkeypatch):
    module, _, vit = made("ViTModel")
    images, called = images_for(vit), []
    modeling = sys.modules[type(module).__module__]
    plain, sdpa = modeling.eager_attention_forward, modeling.ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setattr(modeling, "eager_attention_forward", lambda *a, **o: called.append("eager") or plain(*a, **o))
    monkeypatch.setitem(
        modeling.ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **o: called.append("sdpa") or sdpa(*a, **o)
    )
    with attach(module, bias_for(vit)):
        for kind in ("sdpa", "eager"):
            module.set_attn_implementation(kind)
            module(images)
            assert set(called) == {kind} and len(called) == 3
            called.clear()


@pytest.mark.parametrize("kind", ["get_intermediate_layers", "forward_intermediates", "open_clip"])
@pytest.mark.parametrize("edit", ["register", "bias"])
def test_intermediate_features(kind, edit):
    module, vision, vit = made("open_clip LAION GELU" if kind == "open_clip" else "timm DINOv2 reg4")
    images = images_for(vit)

    def features():
        if kind == "open_clip":
            return vision.forward_intermediates(images, indices=[0, 2])["image_intermediates"]
        if kind == "forward_intermediates":
            return vision.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
        return vision.get_intermediate_layers(images, n=[0, 2], reshape=True)

    edit = REGISTER if edit == "register" else bias_for(vit)
    before = features()
    with torch.no_grad(), attach(module, edit):
        after = features()
    with torch.no_grad(), vit.edit(edit):
        layout = vit.layout(images)
        _, cache = vit.run_with_cache(images, names_filter="blocks.*.hook_resid_post")
    for layer, got, was in zip((0, 2), after, before, strict=True):
        expected = cache[f"blocks.{layer}.hook_resid_post"][:, layout.patches].mT.unflatten(2, layout.grid)
        assert relative(got, expected) <= TOLERANCE and got.shape == was.shape
        assert not torch.equal(got, was)


def test_features_that_stop_early_leave_nothing_for_the_next_run():
    module, _, vit = made("timm DINOv2")
    images = images_for(vit)
    with torch.no_grad(), attach(module, REGISTER):
        module.forward_intermediates(images, indices=[0], stop_early=True)
        got = module(images)
    with torch.no_grad(), vit.edit(REGISTER):
        assert relative(got, vit(images)) <= TOLERANCE


def test_attention_masks():
    module, _, vit = made("timm supervised")
    images, n = images_for(vit), vit.cfg.layout().n_tokens
    bias = bias_for(vit)
    with torch.no_grad():
        mask = torch.ones(n, n, dtype=torch.bool)
        mask[:, 5] = False
        expected = module(images, attn_mask=mask)
        for fused in (True, False):
            for block in module.blocks:
                block.attn.fused_attn = fused
            with attach(module, *(At(f"blocks.1.attn.hook_{kind}", same) for kind in "qkvz")):
                assert relative(module(images, attn_mask=mask), expected) <= TOLERANCE
                as_numbers = torch.zeros(n, n).masked_fill(~mask, -torch.inf)
                assert relative(module(images, attn_mask=as_numbers), expected) <= TOLERANCE
            with attach(module, bias):  # the added key is open to everybody
                everything = torch.ones_like(mask)
                assert relative(module(images, attn_mask=everything), module(images)) <= TOLERANCE
                assert relative(module(images, attn_mask=mask), module(images)) > 1e-3
                with pytest.raises(InterventionError, match="causal"):
                    module(images, is_causal=True)
        with pytest.raises(InterventionError, match="mask"), attach(module, REGISTER):
            module(images, attn_mask=mask)


def test_padding_masks_of_transformers():
    module, _, vit = made("ViTModel")
    images, n = images_for(vit), vit.cfg.layout().n_tokens
    mask = torch.ones(3, n, dtype=torch.long)
    mask[:, 5] = 0
    for kind in ("sdpa", "eager"):
        module.set_attn_implementation(kind)
        with torch.no_grad(), attach(module, bias_for(vit)):
            assert relative(module(images, attention_mask=mask).pooler_output, module(images).pooler_output) > 1e-3
        expected = module(images, attention_mask=mask).pooler_output
        with attach(module, *(At(f"blocks.1.attn.hook_{kind}", same) for kind in "qkvz")):
            assert torch.equal(module(images, attention_mask=mask).pooler_output, expected)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["register", "bias"])
def test_gradients_equal_those_of_hooked_vit(edit):
    module, _, vit = made("timm DINOv2")
    images = images_for(vit).requires_grad_()
    edit = REGISTER if edit == "register" else bias_for(vit)
    with attach(module.train(), edit):
        worth(module(images)).backward()
    of_images, images.grad = images.grad, None
    with vit.edit(edit):
        worth(vit(images)).backward()
    assert relative(of_images, images.grad) <= TOLERANCE
    theirs = dict(module.named_parameters())
    rules = FAMILIES["timm", "VisionTransformer"].weights
    compared = 0
    for name, parameter in vit.named_parameters():
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        rule = rules[name.replace(f"blocks.{layer}.", "blocks.{i}.")]
        key = rule.keys[0].replace("{i}", layer)
        if key in theirs and parameter.shape == theirs[key].shape:
            compared += 1
            assert relative(theirs[key].grad, parameter.grad) <= TOLERANCE, name
    assert compared == len(theirs) - 2  # [CLS] and positions have other shapes


DROPOUTS = {
    "timm": timmed(attn_drop_rate=0.5, proj_drop_rate=0.3, drop_path_rate=0.2),
    "transformers": hugging("ViTModel", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.3),
}


@pytest.mark.parametrize("library", DROPOUTS)
@pytest.mark.parametrize("fused", [True, False])
def test_dropout_stays_as_it_is(library, fused):
    case = DROPOUTS[library]
    module = randomise(case.make(case.native)).train()
    if library == "transformers":
        module.set_attn_implementation("sdpa" if fused else "eager")
    else:
        for block in module.blocks:
            block.attn.fused_attn = fused
    images = torch.randn(3, 3, *case.native)

    def seeded():
        torch.manual_seed(0)
        return output_of(module, images)

    expected = seeded()
    with attach(module, *(At(f"blocks.1.attn.hook_{kind}", same) for kind in "qkvz")):
        assert torch.equal(seeded(), expected)
        module.eval()
        assert relative(seeded(), expected) > 1e-2
        module.train()
    with attach(module, REGISTER):
        seeded().sum().backward()
        assert not torch.equal(output_of(module, images), output_of(module, images))
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)


def checkpointed(module, library):
    if library == "transformers":
        module.gradient_checkpointing_enable()
    else:
        module.set_grad_checkpointing()
    return module.train()


@pytest.mark.parametrize("library", MAPPED)
@pytest.mark.parametrize("edit", ["register", "bias", "moved outliers"])
def test_gradient_checkpointing(library, edit):
    """Two runs before one backward: each recomputation must find its own images and appended tokens."""
    _, module, vit = made(MAPPED[library])
    edits = {"register": REGISTER, "bias": bias_for(vit), "moved outliers": MOVED}
    both = [images_for(vit, batch=3, seed=3), images_for(vit, batch=2, seed=4), images_for(vit, batch=2, seed=5)]

    def gradients():
        module.zero_grad()
        sum(worth(output_of(module, images)) for images in both).backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    plain = gradients()
    with attach(module, edits[edit]):
        expected = gradients()
        checkpointed(module, library)
        got = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5)
    assert any(relative(plain[name], gradient) > 1e-2 for name, gradient in expected.items())


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_reentrant_checkpointing_is_refused(library, monkeypatch):
    _, module, vit = made(MAPPED[library])
    checkpointed(module, library)
    if library == "timm":
        monkeypatch.setattr(timm.models._manipulate, "use_reentrant_ckpt", lambda: True)
    else:
        module.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InterventionError, match="non-reentrant"), attach(module, REGISTER):
        output_of(module, images_for(vit).requires_grad_()).sum().backward()


def test_backward_hooks_on_a_block():
    """They exchange the tensors between blocks."""
    module, _, vit = made("timm DINOv2")
    images, seen = images_for(vit), []
    handle = module.blocks[1].register_full_backward_hook(lambda block, gin, gout: seen.append(gout[0].shape))
    with attach(module, REGISTER):
        output = module(images)
    output.sum().backward()
    handle.remove()
    with vit.edit(REGISTER):
        assert relative(output, vit(images)) <= TOLERANCE
    assert seen == [(3, vit.cfg.layout().n_tokens, 32)]


# Number types and compilation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPPED.values())
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_number_types_stay(name, how):
    module, vision, vit = made(name)
    images = images_for(vit)
    if how == "bfloat16":
        module, images = module.bfloat16(), images.bfloat16()
        vision = vision_part(module)
    blocks, _ = parts(CASES[name].library, vision)

    def outputs():
        streams = []
        handles = [block.register_forward_hook(lambda _, args, out: streams.extend((args[0], out))) for block in blocks]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            streams.append(output_of(vision, images))
        for handle in handles:
            handle.remove()
        return streams

    before = outputs()
    expected_vit = HookedViT.from_module(module)
    for edit in (REGISTER, bias_for(vit), TestTimeRegisters(NEURONS, init="gaussian")):
        with attach(module, edit):
            after = outputs()
        assert [x.dtype for x in after] == [x.dtype for x in before]
        with torch.no_grad(), expected_vit.edit(edit), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            expected = expected_vit(images, stop_at_layer=3)[:, : after[-2].shape[1]]
        assert relative(after[-2].float(), expected.float()) < 3e-2
    with attach(module, At("blocks.0.hook_resid_post", lambda x, scene: x.double())):
        assert [x.dtype for x in outputs()] == [x.dtype for x in before]


COMPILED = """
import timm
import torch
from torch._dynamo.testing import CompileCounter
from registerlens import HookedViT, RegisterNeurons, TestTimeRegisters
from registerlens.interventions.attach import attach
from registerlens.interventions.attention_bias import AttentionBias

torch.set_num_threads(1)
small = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "img_size": 32, "num_classes": 3}
module = timm.create_model("vit_tiny_patch16_224", **small).eval()
for parameter in module.parameters():
    torch.nn.init.normal_(parameter)
images, counter = torch.randn(2, 3, 32, 32), CompileCounter()
compiled = torch.compile(module, backend=counter, fullgraph=True)
neurons = RegisterNeurons.from_pairs([(0, 3), (1, 40)])
bias = AttentionBias.fit(HookedViT.from_module(module), images, neurons)
plain = module(images)
torch.testing.assert_close(compiled(images), plain)
with attach(compiled, TestTimeRegisters(neurons), bias):
    expected = module(images)
    assert not torch.allclose(expected, plain)
    for _ in range(2):
        torch.testing.assert_close(compiled(images), expected)
torch.testing.assert_close(compiled(images), plain)
assert counter.frame_count == 2, counter.frame_count
"""


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_notices_attaching_and_removing():
    """In a process without the type checks, which would break the graph."""
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


# LLaVA and other wrappers --------------------------------------------------------------------------------------------


@pytest.fixture
def llava():
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 80}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=8, **vision),
        text_config=transformers.LlamaConfig(vocab_size=60, num_key_value_heads=4, **text),
        image_token_index=59,
    )
    return randomise(transformers.LlavaForConditionalGeneration(config), std=0.4)


@pytest.mark.parametrize("edit", ["register", "bias"])
def test_llava_generates_with_its_tower_edited(llava, edit):
    tower = llava.model.vision_tower
    vit = HookedViT.from_module(tower)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    edit = REGISTER if edit == "register" else bias_for(vit)
    words = {"input_ids": torch.tensor([[1, *[59] * 16, 2, 3]]), "attention_mask": torch.ones(1, 19, dtype=torch.long)}
    generate = lambda **inputs: llava.generate(  # noqa: E731
        **words, **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    plain = generate(pixel_values=images)
    with attach(llava, edit):
        edited = generate(pixel_values=images)
    with torch.no_grad(), vit.edit(edit):
        features = vit(images, stop_at_layer=3)[:, vit.layout(images).patches]  # LLaVA reads the last block's input
        embeddings = llava.get_input_embeddings()(words["input_ids"])
        embeddings[:, 1:17] = llava.model.multi_modal_projector(features)
    by_hand = llava.generate(
        inputs_embeds=embeddings,
        attention_mask=words["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert edited.sequences.shape == (1, 25)
    assert torch.equal(edited.sequences[:, 19:], by_hand.sequences)
    assert relative(torch.stack(edited.logits), torch.stack(by_hand.logits)) <= 1e-4
    assert relative(edited.logits[0], plain.logits[0]) > 1e-3
    assert torch.equal(generate(pixel_values=images).logits[0], plain.logits[0])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = (timmed().make(SQUARE) for _ in range(2))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: hugging("CLIPModel").make(SQUARE), "vision_model"),
        (lambda: hugging("ViTForImageClassification", num_labels=3).make(SQUARE), "vit"),
        (lambda: hugging("ViTForMaskedImageModeling", encoder_stride=8).make(SQUARE), "vit"),
        (lambda: clip_model(SQUARE), "visual"),
        (lambda: nn.Sequential(nn.Identity(), timmed().make(SQUARE)), "1"),
    ],
)
def test_the_vision_part_of_a_wrapper_is_found(make, path):
    module = randomise(make())
    part, images = module.get_submodule(path), torch.randn(2, 3, *SQUARE)
    stream = lambda: run(case, part, images, True)[0][-1]  # noqa: E731
    case = CASES[MAPPED[type(part).__module__.split(".")[0]]]
    with attach(part, REGISTER):
        expected = stream()
    with attach(module, REGISTER):
        assert torch.equal(stream(), expected)
    assert not torch.equal(stream(), expected)


# Putting in, composing, taking out -----------------------------------------------------------------------------------


def state_of(module):
    """Everything a module and its parts hold, by identity; containers by their entries."""
    return {
        name: {
            key: list(map(id, value.items())) and [(k, id(v)) for k, v in value.items()]
            if isinstance(value, dict)
            else id(value)
            for key, value in vars(part).items()
        }
        for name, part in module.named_modules()
    }


@pytest.mark.parametrize("name", MAPPED.values())
def test_removal_restores_everything(name):
    module, vision, vit = made(name)
    images = images_for(vit)
    output_of(vision, images)
    own = vision.register_forward_hook(lambda *_: None)
    blocks, _ = parts(CASES[name].library, vision)
    original = blocks[1].forward
    blocks[1].forward = lambda *arguments, **options: original(*arguments, **options)  # as offloading does it
    before, expected = state_of(module), output_of(vision, images)
    edits = REGISTER, bias_for(vit), At("blocks.1.attn.hook_z"), At("hook_tokens", same)
    with attach(module, *edits):
        assert state_of(module) != before
        output_of(vision, images)
    assert state_of(module) == before and torch.equal(output_of(vision, images), expected)
    handles = [attach(module, edit) for edit in edits]
    output_of(vision, images)
    for index in (1, 3, 0, 2):
        handles[index].remove()
        handles[index].remove()
    assert state_of(module) == before and torch.equal(output_of(vision, images), expected)
    with pytest.raises(ZeroDivisionError), attach(module, *edits):
        raise ZeroDivisionError
    assert state_of(module) == before
    own.remove()


def test_what_a_run_leaves_behind():
    """Without gradients nothing; with them, the features hold their run for as long as they live."""
    module, _, vit = made("timm supervised")
    images = images_for(vit)
    with attach(module, REGISTER) as handle:
        with torch.no_grad():
            features = module.get_intermediate_layers(images, n=3)
            assert not any(isinstance(holder, Scene) for holder in gc.get_referrers(images))
            module.forward_intermediates(images, indices=[0], stop_early=True)
        extra = handle.tower.latest.extra
        assert extra.untyped_storage().nbytes() == extra.numel() * 4, "it keeps the whole stream alive"
        features = module.get_intermediate_layers(images, n=3)
        weak = [weakref.ref(x) for x in (*features, images)]
        del features, images
        assert all(reference() is None for reference in weak)


def test_attaching_again_composes_and_is_removed_in_any_order():
    module, _, vit = made("timm DINOv2")
    images = images_for(vit)
    others = RegisterNeurons.from_pairs([(1, 11), (0, 5)])
    edits = {
        "a": TestTimeRegisters(NEURONS, n=2, init="mean"),
        "b": At("blocks.2.attn.hook_z", without_head),
        "c": TestTimeRegisters(others, init="gaussian"),
    }

    def expect(*names):
        with torch.no_grad(), vit.edit(*(edits[name] for name in names)):
            assert relative(module(images), vit(images)) <= TOLERANCE

    with torch.no_grad():
        plain = module(images)
        for order in ("abc", "cba", "bac"):
            handles = {name: attach(module, edits[name]) for name in "abc"}
            expect(*"abc")
            left = list("abc")
            for name in order:
                handles[name].remove()
                left.remove(name)
                if left:
                    expect(*left)
            assert torch.equal(module(images), plain)
        with attach(module, edits["a"]), attach(module, edits["b"], edits["c"]):
            expect(*"abc")


def test_attaching_in_between_leaves_the_tensors_of_other_runs_alone():
    module, _, vit = made("timm DINOv2")
    images, kept = images_for(vit), []
    hook = module.blocks[0].register_forward_hook(lambda block, arguments, out: kept.append(out))
    with attach(module, REGISTER):
        module(images)
        with pytest.raises(InterventionError, match="whole model"):
            module.blocks[2](kept[0])  # it enters block 1
        handle = attach(module, At("blocks.1.attn.hook_z"))
        with pytest.raises(InterventionError, match="whole model"):
            module.blocks[1](kept[0])
        handle.remove()
    hook.remove()


@pytest.mark.parametrize("name", MAPPED.values())
def test_a_copy_of_an_edited_model_is_edited_on_its_own(name):
    _, module, vit = made(name)
    images = images_for(vit)
    plain = output_of(module, images)
    handle = attach(module, REGISTER, bias_for(vit))
    expected = output_of(module, images)
    copied = copy.deepcopy(module)
    handle.remove()
    randomise(module, seed=9)
    assert torch.equal(output_of(copied, images), expected)
    assert not torch.equal(expected, plain)


# Errors --------------------------------------------------------------------------------------------------------------


def test_errors():
    module, _, vit = made("timm supervised")
    images = images_for(vit)
    before = state_of(module)
    with pytest.raises(InterventionError, match=r"vit\.edit"):
        attach(vit, REGISTER)
    with pytest.raises(InterventionError, match="got str"):
        inspect.unwrap(attach)("facebook/dinov2-large", REGISTER)  # the tests' type checks would come first
    with pytest.raises(UnsupportedArchitectureError, match=r"Linear(.|\n)*Supported families"):
        attach(nn.Linear(3, 4), REGISTER)
    with pytest.raises(UnsupportedArchitectureError, match=r"several.*'left', 'right'"):
        attach(Two(), REGISTER)
    with pytest.raises(UnsupportedArchitectureError, match="gated"):
        attach(gated(), REGISTER)
    with pytest.raises((InterventionError, TypeCheckError), match="RegisterNeurons"):
        attach(module, NEURONS)
    with pytest.raises(Exception, match="81"):
        attach(module, TestTimeRegisters(RegisterNeurons.from_pairs([(0, 3), (1, 4081)])))
    with pytest.raises(InterventionError, match="before_ln_pre"):
        attach(module, TestTimeRegisters(NEURONS, before_ln_pre=True))
    for point in ("blocks.0.hook_resid_mid", "blocks.3.mlp.hook_post", "blocks.0.attn.hook_pattern", "ln_final"):
        with pytest.raises(InterventionError, match=rf"At edits {point}, which has no place in timm's VisionTransf"):
            attach(module, At(point))
    with pytest.raises(InterventionError, match="TestTimeRegisters never fired"), attach(module, REGISTER):
        pass
    with pytest.raises(InterventionError, match="At never fired"), attach(module, At("blocks.2.attn.hook_z")):
        module.forward_intermediates(images, indices=[0], stop_early=True)
    with pytest.raises(InterventionError, match="whole model"), attach(module, REGISTER):
        module.blocks[0](torch.randn(1, 25, 32))
    with pytest.raises(InterventionError, match="whole model"), attach(module, REGISTER), torch.no_grad():
        module(images)
        module.blocks[0].mlp(torch.randn(1, 25, 32))
    assert state_of(module) == before


def gated():
    module = timmed().make(SQUARE)
    for block in module.blocks:
        block.attn = timm.layers.Attention(32, 4, qkv_bias=True, gated=True)
    return module


def test_dropped_patches_are_refused():
    module = randomise(timmed(patch_drop_rate=0.5).make(SQUARE)).train()
    with pytest.raises(InterventionError, match="patch dropout"), attach(module, REGISTER):
        module(torch.randn(2, 3, *SQUARE))


def test_weights_of_edited_multihead_attention_are_refused():
    module, visual, vit = made("open_clip LAION GELU")
    attention = visual.transformer.resblocks[0].attn
    assert isinstance(attention, nn.MultiheadAttention) and isinstance(module, open_clip.CLIP)
    handle = attach(module, bias_for(vit))
    with pytest.raises(InterventionError, match="weights"):
        attention(*[torch.randn(1, 4, 32)] * 3, need_weights=True)
    handle.remove()

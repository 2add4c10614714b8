"""Sigmoid attention and norms after sublayers: against second implementations; what assumes otherwise refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

import registerlens as rl
from registerlens.emergence.config import TrainingConfig
from registerlens.engine.attention_received import attention_hooks
from registerlens.errors import ConfigError, UnsupportedArchitectureError
from registerlens.evaluation.observe import observe
from registerlens.model.folding import fold_layer_norm
from tests.helpers import randomise, relative

SIGMOID = {"attention": "sigmoid"}
SANDWICH = {"norm_after": True}


def model(**shape):
    config = TrainingConfig(model={"n_layers": 3, "n_heads": 2, "class_token": True, **shape})
    torch.manual_seed(0)
    return randomise(rl.HookedViT(config.vit_config)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def by_hand(vit, images):
    """The blocks, written again with torch's functions from the model's weights alone."""
    cfg, weights = vit.cfg, vit.state_dict()
    _, cache = vit.run_with_cache(images, names_filter="blocks.0.hook_resid_pre")
    stream = cache["blocks.0.hook_resid_pre"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.w"], weights[f"{name}.b"], cfg.norm_eps)

    for layer in range(cfg.n_layers):
        here = f"blocks.{layer}"
        qkv = F.linear(
            norm(stream, f"{here}.ln1"), *(weights[f"{here}.attn.qkv.{kind}"] for kind in ("weight", "bias"))
        )
        q, k, v = (part.unflatten(-1, (cfg.n_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = q @ k.mT / math.sqrt(cfg.d_head)
        n = scores.shape[-1]
        pattern = 1 / (1 + n * torch.exp(-scores)) if cfg.attention == "sigmoid" else scores.softmax(-1)
        z = (pattern @ v).transpose(1, 2).flatten(2)
        wrote = F.linear(z, *(weights[f"{here}.attn.out.{kind}"] for kind in ("weight", "bias")))
        stream = stream + (norm(wrote, f"{here}.ln1_post") if cfg.norm_after else wrote)
        hidden = F.linear(
            norm(stream, f"{here}.ln2"), *(weights[f"{here}.mlp.up.{kind}"] for kind in ("weight", "bias"))
        )
        wrote = F.linear(F.relu(hidden) ** 2, *(weights[f"{here}.mlp.out.{kind}"] for kind in ("weight", "bias")))
        stream = stream + (norm(wrote, f"{here}.ln2_post") if cfg.norm_after else wrote)
    return stream


@pytest.mark.parametrize("shape", [SIGMOID, SANDWICH, SIGMOID | SANDWICH], ids=["sigmoid", "sandwich", "both"])
def test_stream_is_that_of_a_second_implementation(shape, images):
    vit = model(**shape)
    with torch.no_grad():
        plain = vit(images)
        out, cache = vit.run_with_cache(images)
        expected = by_hand(vit, images)
    assert relative(cache["resid_post", 2], expected) < 1e-5
    assert relative(out, plain) < 1e-6  # hooks change nothing


@pytest.mark.parametrize("shape", [SIGMOID, SANDWICH], ids=["sigmoid", "sandwich"])
def test_models_round_trip_through_disk(shape, images, tmp_path):
    vit = model(**shape)
    vit.save_pretrained(tmp_path / "model")
    again = rl.HookedViT.from_pretrained(tmp_path / "model")
    assert again.cfg == vit.cfg
    assert torch.equal(again(images), vit(images))


@pytest.mark.parametrize("cls", [True, False])
def test_sigmoid_attention_received_is_that_of_the_pattern(cls, images):
    vit, seen = model(**SIGMOID, class_token=cls), {}
    with torch.no_grad():
        with vit.hooks(attention_hooks(vit, vit.layout(images), [1], seen.__setitem__)):
            vit(images)
        _, cache = vit.run_with_cache(images, names_filter="blocks.1.attn.hook_*")
    pattern = (cache["attn_scores", 1] - math.log(cache["attn_scores", 1].shape[-1])).sigmoid()
    assert relative(cache["pattern", 1], pattern) < 1e-6
    assert (pattern.sum(-1) - 1).abs().max() > 0.01  # or it would be a softmax's
    shares = pattern / pattern.sum(-1, keepdim=True)
    assert relative(seen[1], shares[:, :, 0] if cls else shares.mean(2)) < 1e-6


def test_norm_after_bounds_what_a_sublayer_adds(images):
    vit = model(**SANDWICH)
    _, cache = vit.run_with_cache(images)
    for name, norm in (("attn_out", "ln1_post"), ("mlp_out", "ln2_post")):
        post = getattr(vit.blocks[1], norm)
        normalised = cache[f"blocks.1.{norm}.hook_normalized"]
        assert torch.equal(cache[name, 1], normalised)
        assert relative(((normalised - post.b) / post.w).square().mean(-1), torch.ones(2, 37)) < 1e-2


def test_norms_after_are_counted_and_stay_when_norms_are_folded(images):
    vit = model(**SANDWICH)
    parts = {part.name: part.parameters for part in vit.summary().parts}
    block = vit.blocks[1]
    for name, modules in (
        ("attn", (block.attn, block.ln1, block.ln1_post)),
        ("mlp", (block.mlp, block.ln2, block.ln2_post)),
    ):
        expected = sum(parameter.numel() for module in modules for parameter in module.parameters())
        assert parts[f"blocks.1.{name}"] == expected
    assert relative(fold_layer_norm(vit)(images), vit(images)) < 1e-5


def test_paths_start_at_what_the_norms_after_give(images):
    """From block 0's MLP straight to the last stream: its own change alone, whatever blocks 1 and 2 make of it."""
    vit, clean, corrupted = model(**SANDWICH), images, images.flip(0)

    def measure(edited, clean):
        return edited.output.flatten(1).square().sum(1)

    by_path = rl.circuits.path_patching(
        vit, clean, corrupted, "blocks.0.mlp.hook_post", "blocks.2.hook_resid_post", metric=measure
    )
    with torch.no_grad():
        _, ours = vit.run_with_cache(clean, names_filter=["blocks.2.hook_resid_post", "blocks.0.hook_mlp_out"])
        posts = vit.run_with_cache(corrupted, names_filter="blocks.0.mlp.hook_post")[1]
        block = vit.blocks[0]
        theirs = block.ln2_post(block.mlp.out(posts["post", 0]))
        stream = ours["resid_post", 2] - ours["mlp_out", 0] + theirs
        tokens = vit.ln_final(stream)
        expected = vit.head(tokens, vit.layout(clean)).flatten(1).square().sum(1)
        before = vit(clean).flatten(1).square().sum(1)
    assert relative(torch.tensor(by_path.effects[0]), expected - before) < 1e-4


@pytest.mark.parametrize("shape", [SIGMOID, SANDWICH], ids=["sigmoid", "sandwich"])
def test_what_is_measured_works(shape, images):
    vit = model(**shape)
    found = rl.find_register_neurons(vit, images, layer="0.mlp", threshold=1.0, top_layer=1, top_k=2)
    with vit.edit(rl.TestTimeRegisters(found)):
        assert observe(vit, images).attention.shape[-1] == 38
    assert rl.trace(vit, images).mean_sink.shape == (3,)


def bias_of_softmax(found):
    """Fitted on a model of the same sizes."""
    return rl.AttentionBias(found, torch.zeros(3, 2, 32), torch.zeros(3, 2, 32))


def edited(vit, images, intervention):
    with vit.edit(intervention):
        return vit(images)


REFUSED = {
    "circuit": lambda vit, images, found: rl.attention_circuit(vit, images, found),
    "direct": lambda vit, images, found: rl.circuits.direct_contributions(vit, images, 0),
    "heads": lambda vit, images, found: rl.circuits.head_circuits(vit),
    "key share": lambda vit, images, found: rl.circuits.key_share(vit, images, found),
    "kernels": lambda vit, images, found: rl.check_kernels(vit, found, images=images),
    "value update": lambda vit, images, found: rl.theory.value_update(vit, images, found),
    "sinks": lambda vit, images, found: rl.analysis.classify_sinks(vit, images),
    "output weights": lambda vit, images, found: rl.analysis.output_weights(vit, found),
    "updates": lambda vit, images, found: rl.analysis.neuron_updates(vit, images, found),
    "defects": lambda vit, images, found: rl.analysis.singular_defects(vit),
    "edges": lambda vit, images, found: rl.circuits.attribute_edges(vit, images, found),
    "no-op": lambda vit, images, found: rl.analysis.sink_no_op(vit, images),
    "biases": lambda vit, images, found: vit.accumulated_bias(2),
    "heads of a cache": lambda vit, images, found: vit.run_with_cache(images)[1].stack_head_results(),
    "neurons of a cache": lambda vit, images, found: vit.run_with_cache(images)[1].stack_neuron_results(2),
    "one block's neurons": lambda vit, images, found: vit.run_with_cache(images)[1].get_neuron_results(1),
    "everything of a cache": lambda vit, images, found: vit.run_with_cache(images)[1].get_full_resid_decomposition(),
    "export": lambda vit, images, found: vit.to_state_dict("transformers:ViTModel"),
    "bias from elsewhere": lambda vit, images, found: edited(vit, images, bias_of_softmax(found)),
    "bias": lambda vit, images, found: rl.AttentionBias.fit(vit, images, found),
}
ALSO_OF_SIGMOID = {"circuit", "key share", "kernels", "value update", "sinks", "defects", "no-op"}
ONLY_OF_SIGMOID = {"bias", "bias from elsewhere", "export"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_assumes_a_softmax_or_linear_output_refuses(name, images):
    found = rl.RegisterNeurons.from_pairs([(0, 1)])
    if name in ALSO_OF_SIGMOID | ONLY_OF_SIGMOID:
        with pytest.raises(UnsupportedArchitectureError, match="assumes that attention is a softmax"):
            REFUSED[name](model(**SIGMOID), images, found)
    if name not in ONLY_OF_SIGMOID:
        with pytest.raises(UnsupportedArchitectureError, match=r"norm stands between \(norm_after\)"):
            REFUSED[name](model(**SANDWICH), images, found)


def test_a_cache_still_splits_the_stream_by_sublayers(images):
    vit = model(**SANDWICH)
    _, cache = vit.run_with_cache(images)
    assert relative(cache.decompose_resid().sum(0), cache["resid_post", 2]) < 1e-5


def test_planting_refuses_what_it_has_not_worked_out():
    for shape in (SIGMOID, SANDWICH):
        with pytest.raises(ConfigError, match="plain LayerNorms"):
            rl.plant_register_neurons(model(**shape), layer=0, n=1)

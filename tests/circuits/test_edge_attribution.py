"""Edges neuron -> head are derivatives along the direct path, and path patching by hand where that is exact."""

import numpy as np
import pytest
import torch
from helpers import randomise
from jaxtyping import TypeCheckError

import registerlens as rl
from registerlens.circuits.edge_attribution import EdgeAttribution, attribute_edges
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, InterventionError, NoOutliersError, ShapeError

CFG = rl.ViTConfig(n_layers=4, d_model=48, n_heads=3, d_mlp=40, image_size=(64, 64), patch_size=(8, 8), d_out=5)
PAIRS = [(1, 3), (0, 7), (2, 5), (1, 0)]
NEURONS = rl.RegisterNeurons.from_pairs(PAIRS)


@pytest.fixture(scope="module")
def planted():
    """A float64 model with outliers and [CLS]; images; where outliers are."""
    torch.manual_seed(0)
    plain = randomise(rl.HookedViT(CFG), std=0.15)
    vit, truth = rl.plant_register_neurons(plain, layer=1, n=2, violation=0.3)
    vit, images = vit.double(), truth.calibration.double()
    images = images[rl.find_outliers(vit, images, layer=1).mask.any(1)][:5]
    return vit, images, truth, rl.find_outliers(vit, images, layer=1)


def naive(vit, images, write, layer, head, share, norm, quantity, clean):
    """A head's quantity when `share` of a write is added to what enters its block, by plain matrix products."""
    block = vit.blocks[layer]
    resid = clean[f"blocks.{layer}.hook_resid_pre"]
    centred = (resid + share * write) - (resid + share * write).mean(-1, keepdim=True)
    source = resid if norm == "frozen" else resid + share * write
    scale = (source.var(-1, unbiased=False, keepdim=True) + CFG.norm_eps).sqrt()
    x = centred / scale * block.ln1.w + block.ln1.b
    attn = block.attn
    q, k, v = (x @ w[head] + b[head] for w, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V)))
    scores = q @ k.mT / CFG.d_head**0.5
    return quantity(scores, scores.softmax(-1) @ v)


def edges_by_hand(vit, images, neuron, layer, head, norm, quantity, share=1e-5):
    """The derivative by how much of a neuron's write is there, by central differences; one number an image."""
    with torch.no_grad():
        _, clean = vit.run_with_cache(images)
        at, n = neuron
        write = clean[f"blocks.{at}.mlp.hook_post"][..., n, None] * vit.blocks[at].mlp.W_out[n]
        up, down = (naive(vit, images, write, layer, head, s, norm, quantity, clean) for s in (share, -share))
    return (up - down) / (2 * share)


def to_outlier(found, which):
    """From scores to the score of (or the attention to) the largest patch."""
    key = found.norms.argmax(1) + 1

    def read(scores, z):
        rows = scores[:, 0] if which == "score" else scores[:, 0].softmax(-1)
        return rows[torch.arange(len(rows)), key]

    return read


EDGES = [((0, 7), 1, 2), ((1, 3), 2, 0), ((1, 3), 3, 1), ((2, 5), 3, 2), ((0, 7), 3, 0)]


@pytest.mark.parametrize("norm", ["frozen", "differentiated"])
@pytest.mark.parametrize("quantity", ["score", "attention"])
def test_edges_to_attention_are_derivatives_of_the_direct_path(planted, quantity, norm):
    vit, images, _, found = planted
    edges = attribute_edges(vit, images, NEURONS, quantity=quantity, norm=norm, detection=found.detection, batch_size=2)
    assert edges.n_images == edges.n_used == 5 and found.mask.any(1).all()
    for neuron, layer, head in EDGES:
        expected = edges_by_hand(vit, images, neuron, layer, head, norm, to_outlier(found, quantity))
        got = edges.effects[PAIRS.index(neuron), edges.layers.index(layer), head]
        assert got == pytest.approx(expected.mean().item(), rel=1e-4, abs=1e-9)
        se = (expected.var() / 5).sqrt().item()
        assert edges.standard_error[PAIRS.index(neuron), edges.layers.index(layer), head] == pytest.approx(se, rel=1e-3)


def test_with_a_frozen_norm_path_patching_differs_by_the_product_of_both_sides_alone(planted):
    """The score is a product q . k: without a write in the head's input it changes by -edge + what both sides share."""
    vit, images, truth, found = planted
    neurons = truth.neurons
    edges = attribute_edges(vit, images, neurons, detection=found.detection)
    layer, n = neurons.pairs[0]
    with torch.no_grad():
        _, clean = vit.run_with_cache(images)
        write = clean[f"blocks.{layer}.mlp.hook_post"][..., n, None] * vit.blocks[layer].mlp.W_out[n]
        read = to_outlier(found, "score")
        for later, head in [(2, 0), (2, 2), (3, 1)]:
            patched, whole = (
                naive(vit, images, write, later, head, share, "frozen", read, clean) for share in (-1.0, 0.0)
            )
            block = vit.blocks[later]
            resid = clean[f"blocks.{later}.hook_resid_pre"]
            scale = (resid.var(-1, unbiased=False, keepdim=True) + CFG.norm_eps).sqrt()
            part = (write - write.mean(-1, keepdim=True)) / scale * block.ln1.w
            q, k = part[:, 0] @ block.attn.W_Q[head], part @ block.attn.W_K[head]
            both = (q * k[torch.arange(5), found.norms.argmax(1) + 1]).sum(-1) / CFG.d_head**0.5
            edge = edges.effects[0, edges.layers.index(later), head]
            assert (patched - whole).mean().item() == pytest.approx((both.mean() - edge).item(), rel=1e-4, abs=1e-6)
            assert edges.values[edges.layers.index(later), head] == pytest.approx(whole.mean().item(), rel=1e-4)


def test_frozen_norms_show_register_neurons_which_differentiated_ones_hide(planted):
    vit, images, truth, found = planted
    frozen, hidden = (
        attribute_edges(vit, images, truth.neurons, detection=found.detection, norm=norm).effects
        for norm in ("frozen", "differentiated")
    )
    sinks = [(layer, head) for layer, head in truth.sink_heads]
    assert sinks
    for layer, head in sinks:
        assert frozen[:, layer - 2, head].sum() > 5 * abs(hidden[:, layer - 2, head].sum())


@pytest.mark.parametrize("norm", ["frozen", "differentiated"])
def test_edges_to_a_metric_go_through_the_heads_z(planted, norm):
    vit, images, _, _ = planted

    def measure(edited, clean):
        return edited.output[:, 1].sin() + edited.output[:, 2].square()

    edges = attribute_edges(vit, images, NEURONS, quantity=measure, norm=norm)
    assert edges.detection is None and edges.quantity == "measure"

    for neuron, layer, head in EDGES:

        def through(scores, z, layer=layer, head=head):
            def patch(old, hook):
                old = old.clone()
                old[:, :, head] = z
                return old

            with vit.hooks([(f"blocks.{layer}.attn.hook_z", patch)]):
                output = vit(images)
            return output[:, 1].sin() + output[:, 2].square()

        expected = edges_by_hand(vit, images, neuron, layer, head, norm, through).mean().item()
        got = edges.effects[PAIRS.index(neuron), edges.layers.index(layer), head]
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_there_is_an_edge_to_later_heads_only_and_to_those_asked_for(planted):
    vit, images, _, found = planted
    every = attribute_edges(vit, images, NEURONS, detection=found.detection)
    assert every.layers == (1, 2, 3)
    for i, (layer, _) in enumerate(PAIRS):
        later = np.array([at > layer for at in every.layers])
        assert np.isfinite(every.effects[i, later]).all() and np.isnan(every.effects[i, ~later]).all()
    some = attribute_edges(vit, images, NEURONS, rl.Heads([(3, 2), (2, 0), (0, 1)]), detection=found.detection)
    assert some.layers == (2, 3) and np.isfinite(some.effects).sum() == 3 + 4
    np.testing.assert_allclose(some.effects[:, 1, 2], every.effects[:, 2, 2], rtol=1e-6)
    table = some.to_dataframe()
    assert len(table) == 7 and set(zip(table["head_layer"], table["head"], strict=True)) == {(2, 0), (3, 2)}
    row = table[(table["layer"] == 2)].iloc[0]
    assert (row["neuron"], row["head_layer"], row["effect"]) == (5, 3, some.effects[2, 1, 2])


def test_images_without_an_outlier_take_no_part(planted):
    vit, images, _, found = planted
    grey = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert not found.detection.cutoff.above(rl.find_outliers(vit, grey, layer=1).norms).any()
    mixed = attribute_edges(vit, torch.cat([grey, images]), NEURONS, detection=found.detection, batch_size=4)
    alone = attribute_edges(vit, images, NEURONS, detection=found.detection)
    assert (mixed.n_images, mixed.n_used) == (6, 5)
    np.testing.assert_allclose(mixed.effects, alone.effects, rtol=1e-6)


def test_a_model_without_cls_is_read_by_the_mean_query():
    vit, images = rl.from_pretrained("registerlens:tiny"), synthetic_images(32, 0).images
    emerged = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219)])
    others = rl.RegisterNeurons.from_pairs([(1, 0), (1, 1), (1, 2)])
    edges = attribute_edges(vit, images, emerged | others)
    assert edges.effects[:3].min() > np.abs(edges.effects[3:]).max()
    with torch.no_grad():
        _, cache = vit.run_with_cache(images, names_filter=["*attn_scores", "blocks.5.hook_resid_post"])
    key = cache["blocks.5.hook_resid_post"].norm(dim=-1).argmax(1)
    scores = cache["blocks.3.attn.hook_attn_scores"].mean(2)[torch.arange(32), 0, key]
    assert edges.values[1, 0] == pytest.approx(scores.mean().item(), rel=1e-4)


def test_the_result_goes_through_files(planted, tmp_path):
    vit, images, _, found = planted
    for edges in (
        attribute_edges(vit, images, NEURONS, detection=found.detection),
        attribute_edges(vit, images, NEURONS, quantity="class_logit"),
    ):
        again = EdgeAttribution.load(edges.save(tmp_path))
        assert again.to_dataframe().equals(edges.to_dataframe()) and again.describe() == edges.describe()
        assert again.detection == edges.detection


def test_weights_keep_their_flags(planted):
    vit, images, _, found = planted
    attribute_edges(vit, images, NEURONS, detection=found.detection)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in vit.parameters())


BAD = [
    (dict(neurons=rl.RegisterNeurons.from_pairs([])), InterventionError, "No neuron"),
    (dict(neurons=rl.RegisterNeurons.from_pairs([(3, 0)])), InterventionError, "No head comes after block 3"),
    (dict(neurons=rl.RegisterNeurons.from_pairs([(0, 40)])), InterventionError, "do not exist"),
    (dict(heads=rl.Heads([(3, 3)])), InterventionError, "Heads"),
    (dict(heads=rl.Heads([(0, 0)])), InterventionError, "No head comes after"),
    (dict(norm="none"), (ConfigError, TypeCheckError), "frozen"),
    (dict(quantity="scores"), ConfigError, "differentiable metric 'scores'"),
    (dict(quantity=lambda e, c: e.output.detach().sum(1)), ConfigError, "not differentiable"),
    (dict(quantity=lambda e, c: e.output), ShapeError, "one floating-point number an image"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_input_is_told(planted, options, error, words):
    vit, images, _, found = planted
    options = {"neurons": NEURONS, "detection": found.detection} | options
    with pytest.raises(error, match=words):
        attribute_edges(vit, images, **options)


def test_a_model_without_outliers_is_told(planted):
    _, images, _, _ = planted
    torch.manual_seed(0)
    with pytest.raises(NoOutliersError, match="Attributing attention to outliers"):
        attribute_edges(rl.HookedViT(CFG), images.float(), NEURONS)

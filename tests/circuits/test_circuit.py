"""Attention circuits: sums against products written out here, effects against edits of the model, planted answers."""

import copy
import dataclasses

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import randomise

import registerlens as rl
from registerlens.analysis.detection import detect
from registerlens.circuits.attention_circuit import attention_circuit
from registerlens.circuits.contributions import Node
from registerlens.circuits.records import AttentionCircuit
from registerlens.config_parts import AttentionPoolConfig, QKNormConfig, RopeConfig
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, ImageError, InterventionError, NoOutliersError, ShapeError
from registerlens.theory.planted import _noise_with_flat_patches, plant_register_neurons

KNOWN = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
CFG = rl.ViTConfig(n_layers=4, d_model=48, n_heads=4, d_mlp=96, image_size=(64, 64), patch_size=(8, 8), d_out=7)
SMALL = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_mlp": 40, "image_size": (24, 32), "patch_size": (8, 8)}


def backbone(seed, **changes):
    """Random weights, with every norm and LayerScale away from one and every bias away from zero."""
    torch.manual_seed(seed)
    vit = rl.HookedViT(dataclasses.replace(CFG, **changes))
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("ln1.w", "ln2.w", "ln_final.w", "gamma")):
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            if name.endswith(("bias", ".b")):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return vit.eval()


def fresh_images(vit, n=16, seed=1000):
    return _noise_with_flat_patches(vit, torch.Generator().manual_seed(seed))[:n]


def fixed(vit, images, share=0.8):
    """A detection that calls the largest fifth of patches after block 1 outliers, whatever the model."""
    found = detect(vit, images, layer="1.mlp", threshold=1.0)
    with torch.no_grad():
        norms = vit(images, stop_at_layer=2)[:, vit.layout(images).patches].norm(dim=-1)
    cutoff = dataclasses.replace(found.cutoff, value=float(norms.quantile(share)))
    return dataclasses.replace(found, cutoff=cutoff)


def value(frame, **where):
    """The one value of a table's row."""
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    assert len(frame) == 1, (where, len(frame))
    return frame.iloc[0]


@pytest.fixture(scope="module")
def tiny():
    vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(8, 0).images
    return vit, images, attention_circuit(vit, images, KNOWN)


@pytest.fixture(scope="module")
def planted():
    """Planted neurons with LayerScale and trained registers, one image, and its circuit with everything shown.

    In float64: a planted neuron fires by a small difference of large terms, so that in float32 the fused and the
    explicit attention before it, which sum in different orders, change what it writes by some 1e-5.
    """
    vit = backbone(3, layer_scale=True, n_trained_registers=2)
    model, truth = plant_register_neurons(vit, layer=1, n=2)
    model, images = model.double(), fresh_images(vit, 8).double()
    detection = detect(model, images)
    with torch.no_grad():
        norms = model(images, stop_at_layer=4)[:, model.layout(images).patches].norm(dim=-1)
    image = images[detection.cutoff.above(norms).sum(1).argmax()][None]
    circuit = attention_circuit(model, image, truth.neurons, min_share=0.0, detection=detection, block=1)
    return model, truth, image, circuit


# Sums against products written out here ------------------------------------------------------------------------------


def outliers_of(vit, image, circuit):
    """Positions of the outliers of a batch of one, from the cached norms."""
    _, cache = vit.run_with_cache(image, names_filter="*")
    at = circuit.detection.hook_name
    norms = cache[at][0, vit.layout(image).patches].norm(dim=-1)
    return cache, circuit.detection.cutoff.above(norms[None])[0].nonzero()[:, 0] + vit.layout(image).patches.start


@torch.no_grad()
def test_every_contribution_equals_the_product_written_out(planted):
    vit, truth, image, circuit = planted
    cache, outliers = outliers_of(vit, image, circuit)
    assert len(outliers) >= 1
    stream = cache["blocks.1.hook_resid_post"][0, outliers]
    unit = stream / stream.norm(dim=1, keepdim=True)
    assert np.isclose(value(circuit.nodes, name="outlier stream")["whole"], stream.norm(dim=1).mean(), rtol=1e-5)
    for layer, neuron in truth.neurons.pairs:
        writes = cache[f"blocks.{layer}.mlp.hook_post"][0, outliers, neuron, None] * vit.blocks[layer].mlp.W_out[neuron]
        expected = (writes * unit).sum(1).mean()
        edge = value(circuit.edges, sender=f"neuron {layer}:{neuron}", receiver="outlier stream")
        assert np.isclose(edge["value"], expected, rtol=1e-5)
        for at in (2, 3):
            block = vit.blocks[at]
            x = cache[f"blocks.{at}.hook_resid_pre"][0, outliers]
            std = (x.var(dim=1, correction=0, keepdim=True) + block.ln1.eps).sqrt()
            read = (writes - writes.mean(1, keepdim=True)) / std * block.ln1.w
            for head in range(4):
                q = cache[f"blocks.{at}.attn.hook_q"][0, 0, head]
                part = (read @ block.attn.W_K[head] @ q / 12**0.5).mean()
                path = value(circuit.paths, layer=layer, neuron=neuron, head_layer=at, head=head)
                assert np.isclose(path["score"], part, rtol=1e-4, atol=1e-6)
    final = cache["blocks.3.hook_resid_post"][0, 0]
    scale = (final.var(correction=0) + vit.ln_final.eps).sqrt()
    out = vit(image)[0]
    direction = (out / out.norm()) @ vit.head.linear.weight
    groups = {"outliers": outliers, "prefix": torch.tensor([0]), "registers": torch.tensor([1, 2])}
    for at in (2, 3):
        for head in range(4):
            pattern, v = (
                cache[f"blocks.{at}.attn.hook_pattern"][0, head, 0],
                cache[f"blocks.{at}.attn.hook_v"][0, :, head],
            )
            assert np.isclose(value(circuit.nodes, name=f"head {at}.{head}")["attention"], pattern[outliers].sum())
            for via, keys in groups.items():
                wrote = pattern[keys] @ v[keys] @ vit.blocks[at].attn.W_O[head]
                own = wrote @ final / final.norm()
                told = value(circuit.edges, sender=f"head {at}.{head}", receiver="[CLS]", via=via)
                assert np.isclose(told["value"], own, rtol=1e-4, atol=1e-6)
                class_part = (wrote - wrote.mean()) / scale * vit.ln_final.w @ direction
                told = value(circuit.edges, sender=f"head {at}.{head}", receiver="output", via=via)
                assert np.isclose(told["value"], class_part, rtol=1e-4, atol=1e-6)
    assert np.isclose(value(circuit.nodes, name="output")["whole"], out.norm(), rtol=1e-5)
    assert np.isclose(value(circuit.nodes, name="[CLS]")["whole"], final.norm(), rtol=1e-5)


def test_inflow_adds_up_to_every_node_and_so_do_the_parts(tiny, planted):
    for circuit in (tiny[2], planted[3]):
        wholes = circuit.nodes.set_index("name")["whole"].dropna()
        assert set(wholes.index) == set(circuit.edges["receiver"]) == set(circuit.parts["receiver"])
        for table in (circuit.edges, circuit.parts):
            sums = table.groupby("receiver")["value"].sum()
            np.testing.assert_allclose(sums[wholes.index], wholes, rtol=1e-4, atol=1e-4 * abs(wholes).max())
        assert circuit.sum_error < 1e-5
        assert (circuit.parts["share"].abs().groupby(circuit.parts["receiver"]).sum().round(6) == 1).all()


ARCHITECTURES = {
    "rotary, norms everywhere": rl.ViTConfig(
        **SMALL,
        act_fn="silu",
        gated_mlp=True,
        mlp_norm=True,
        attn_norm=True,
        norm="layer",
        rope=RopeConfig(theta=100.0, learned=True, pairs="interleaved", coordinates="index"),
        qk_norm=QKNormConfig(kind="layer", over="all"),
        n_trained_registers=2,
        layer_scale=True,
        ln_pre=True,
        pooling=("cls", "mean"),
        pool_norm=True,
        d_out=5,
        head_act="tanh",
    ),
    "RMS, a norm of each head, mean of patches": rl.ViTConfig(
        **SMALL, norm="rms", qk_norm=QKNormConfig(), rope=RopeConfig(), pooling=("mean",), d_out=None
    ),
    "no [CLS], every token": rl.ViTConfig(**SMALL, class_token=False, pooling=(), d_out=5, qkv_bias=False),
    "attention pooling": rl.ViTConfig(
        **SMALL, class_token=False, attn_pool=AttentionPoolConfig(n_heads=3, d_attn=24), pooling=("attention",)
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sums_hold_and_held_effects_are_the_attributions_in_every_architecture(name):
    vit = randomise(rl.HookedViT(ARCHITECTURES[name]))
    images = torch.randn(3, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    neurons = rl.RegisterNeurons.from_pairs([(0, 3), (1, 7)])
    target = 2 if "every" in name else None
    circuit = attention_circuit(vit, images, neurons, min_share=0.0, detection=fixed(vit, images), target=target)
    assert circuit.sum_error < 1e-5
    assert (circuit.agreement["difference_held"] < 1e-4).all()
    assert circuit.reader == ("[CLS]" if "everywhere" in name else "mean patch")
    assert (circuit.output is None) == ("pooling" in name) == any("attention pooling" in note for note in circuit.notes)
    kinds = {"neuron -> stream", "stream -> head", "neuron -> head", "head -> reader"}
    assert set(circuit.agreement["edge"]) - {"head -> output"} == kinds
    if "everywhere" in name:
        assert "tanh" in circuit.output


def test_scores_of_rotary_keys_equal_the_derivative_by_the_stream_at_frozen_norms():
    """The same numbers from autograd: every scale and the query detached, the derivative times what was written."""
    vit = randomise(rl.HookedViT(ARCHITECTURES["rotary, norms everywhere"]))
    images = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    neurons, detection = rl.RegisterNeurons.from_pairs([(1, 7)]), fixed(vit, images)
    circuit = attention_circuit(vit, images, neurons, min_share=0.0, detection=detection, check=False)
    cache, outliers = outliers_of(vit, images, circuit)
    leaf, met = cache["blocks.2.hook_resid_pre"].detach().requires_grad_(), {}
    frozen = ["blocks.2.ln1.hook_scale", "blocks.2.attn.k_norm.norm.hook_scale", "blocks.2.attn.hook_rot_q"]
    hooks = [(frozen, lambda x, hook: x.detach()), ("blocks.2.attn.hook_attn_scores", lambda x, hook: met.update(s=x))]
    with vit.hooks(hooks):
        vit(leaf, start_at_layer=2, layout=vit.layout(images), return_type="tokens")
    for head in range(4):
        total = met["s"][0, head, 0, outliers].sum()
        [slope] = torch.autograd.grad(total, leaf, retain_graph=True)
        writes = cache["blocks.1.mlp.hook_post"][0, outliers, 7, None] * vit.blocks[1].mlp.W_out[7]
        expected = (writes * slope[0, outliers]).sum() / len(outliers)
        assert np.isclose(value(circuit.paths, head=head)["score"], expected.item(), rtol=1e-4)


# Effects against edits of the model ----------------------------------------------------------------------------------


@torch.no_grad()
def test_cutting_neurons_does_what_zeroing_them_does_in_the_next_block(planted):
    """[CLS]'s query in block 2 knows nothing of neurons of block 1 at other tokens: zeroing is the edge alone."""
    vit, truth, image, circuit = planted
    cache, outliers = outliers_of(vit, image, circuit)

    def silence(chosen, points):
        def zero(act, hook):
            act[:, outliers[:, None], torch.tensor(chosen)] = 0
            return act

        seen = {}
        hooks = [("blocks.1.mlp.hook_post", zero)]
        hooks += [(name, lambda x, hook: seen.update({hook.name: x.clone()})) for name in points]
        with vit.hooks(hooks):
            vit(image)
        return [seen[name] for name in points]

    names = ["blocks.1.hook_resid_post", "blocks.2.attn.hook_attn_scores", "blocks.2.attn.hook_pattern"]
    neurons = [neuron for _, neuron in truth.neurons.pairs]
    for neuron in neurons:
        stream, scores, pattern = silence([neuron], names)
        fall = (cache[names[0]][0, outliers].norm(dim=1) - stream[0, outliers].norm(dim=1)).mean()
        edge = value(circuit.edges, sender=f"neuron 1:{neuron}")
        assert np.isclose(edge["effect"], fall, rtol=1e-4)
        for head in range(4):
            path = value(circuit.paths, neuron=neuron, head_layer=2, head=head)
            fall = (cache[names[1]] - scores)[0, head, 0, outliers].mean()
            assert np.isclose(path["effect"], fall, rtol=1e-3, atol=1e-5)
            fall = (cache[names[2]] - pattern)[0, head, 0, outliers].sum()
            assert np.isclose(path["effect_attention"], fall, rtol=1e-3, atol=1e-6)
    _, _, pattern = silence(neurons, names)
    for head in range(4):
        left = value(circuit.nodes, name=f"head 2.{head}")["attention_without"]
        assert np.isclose(left, pattern[0, head, 0, outliers].sum(), rtol=1e-4)
    sink = max(range(4), key=lambda head: (2, head) in truth.sink_heads)
    node = value(circuit.nodes, name=f"head 2.{sink}")
    assert node["attention"] > 0.5 > 0.2 > node["attention_without"]


@torch.no_grad()
def test_cutting_a_head_does_what_zeroing_its_values_does_in_the_last_block(planted):
    vit, _, image, circuit = planted
    cache, outliers = outliers_of(vit, image, circuit)
    out = vit(image)
    unit = out[0] / out.norm()
    for head in range(4):

        def zero(v, hook, head=head):
            v[:, outliers, head] = 0
            return v

        seen = {}
        # Only attention: the MLP after it would pass the change on, which is another path.
        hooks = [
            ("blocks.3.attn.hook_v", zero),
            ("blocks.3.hook_mlp_out", lambda x, hook: cache["blocks.3.hook_mlp_out"]),
            ("blocks.3.hook_resid_post", lambda x, hook, seen=seen: seen.update(cls=x[0, 0].clone())),
        ]
        with vit.hooks(hooks):
            changed = vit(image)
        fall = cache["blocks.3.hook_resid_post"][0, 0].norm() - seen["cls"].norm()
        edge = value(circuit.edges, sender=f"head 3.{head}", receiver="[CLS]", via="outliers")
        assert np.isclose(edge["effect"], fall, rtol=1e-3, atol=1e-5)
        edge = value(circuit.edges, sender=f"head 3.{head}", receiver="output", via="outliers")
        assert np.isclose(edge["effect"], (out - changed)[0] @ unit, rtol=1e-3, atol=1e-5)


# Known answers -------------------------------------------------------------------------------------------------------


def planted_path_is_on_top(seed):
    vit = backbone(seed, layer_scale=seed % 4 == 0)
    layer = seed % 3
    model, truth = plant_register_neurons(vit, layer=layer, n=1 + seed % 8, seed=seed)
    every = rl.RegisterNeurons.from_pairs([(at, n) for at in range(layer + 1) for n in range(96)])
    circuit = attention_circuit(model, fresh_images(vit), every, min_share=0.0, check=False)
    paths = circuit.paths
    n = len(truth.neurons) * len(truth.sink_heads)
    top = list(zip(*(paths[name][:n] for name in ("layer", "neuron", "head_layer", "head")), strict=True))
    expected = {(*neuron, *head) for neuron in truth.neurons.pairs for head in truth.sink_heads}
    assert set(top) == expected, seed
    assert abs(paths["strength"][n - 1]) > 5 * abs(paths["strength"][n])
    assert circuit.sum_error < 1e-5


@pytest.mark.parametrize("seed", [0, 11])
def test_the_planted_paths_are_the_top_paths_of_all_neurons_and_heads(seed):
    planted_path_is_on_top(seed)


@pytest.mark.slow
def test_the_planted_paths_are_the_top_paths_in_twenty_models():
    for seed in range(20):
        planted_path_is_on_top(seed)


def test_the_known_neurons_of_the_tiny_vit_carry_the_neuron_side(tiny):
    vit, images, circuit = tiny
    assert (circuit.reader, circuit.block) == ("mean patch", 1)
    assert circuit.neuron_share > 0.95 and circuit.onset_share > 0.95
    into = circuit.edges.query("receiver == 'outlier stream' and sender != 'rest of outlier stream'")
    assert len(into) == 7 and into["value"].sum() > 0.95 * value(circuit.nodes, name="outlier stream")["whole"]
    fewer = attention_circuit(vit, images[:4], KNOWN.filter(top=2), check=False, detection=circuit.detection)
    assert 0.2 < fewer.onset_share < 0.7
    other = rl.RegisterNeurons.from_pairs([(1, 0), (0, 5)])
    none = attention_circuit(vit, images[:4], other, check=False, detection=circuit.detection)
    assert abs(none.onset_share) < 0.01 and not (none.nodes["kind"] == "neuron").any() and none.paths.empty
    assert "No" not in none.describe().splitlines()[1]


# Averages, pruning, precision ----------------------------------------------------------------------------------------


def test_batches_do_not_matter_and_images_without_outliers_are_left_out(tiny):
    vit, images, circuit = tiny
    blank = torch.cat([images[:5], torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)), images[5:]])
    found = attention_circuit(vit, [blank[:3], blank[3:]], KNOWN, detection=circuit.detection)
    assert (found.n_images, found.n_used) == (10, 8)
    for table in ("edges", "nodes", "parts", "paths"):
        frames = [one.to_dataframe(table) for one in (circuit, found)]
        pd.testing.assert_frame_equal(*frames, rtol=1e-3, atol=1e-4)
    assert circuit.edges.dropna()[["low", "value", "high"]].apply(lambda row: row.is_monotonic_increasing, axis=1).all()


def test_few_images_have_no_interval_and_means_are_over_images(tiny):
    vit, images, circuit = tiny
    options = {"detection": circuit.detection, "min_share": 0.0, "check": False}
    alone = [attention_circuit(vit, images[i : i + 1], KNOWN, **options) for i in (0, 1)]
    both = attention_circuit(vit, images[:2], KNOWN, **options)
    assert alone[0].edges[["low", "high", "effect", "effect_held"]].isna().all(axis=None)
    means = (alone[0].parts["value"] + alone[1].parts["value"]) / 2
    np.testing.assert_allclose(both.parts["value"], means, rtol=1e-4, atol=1e-5)
    assert both.parts[["low", "high"]].isna().all(axis=None) and circuit.parts[["low", "high"]].notna().all(axis=None)


def test_pruning_hides_neurons_and_heads_below_the_share_in_the_rest(tiny):
    vit, images, circuit = tiny
    pruned = attention_circuit(vit, images, KNOWN, min_share=0.1, check=False, detection=circuit.detection)
    shown = circuit.edges.query("receiver == 'outlier stream' and share.abs() >= 0.1")["sender"]
    assert set(pruned.nodes.query("kind == 'neuron'")["name"]) == set(shown) and 0 < len(shown) < 7
    rest = [value(one.edges, sender="rest of outlier stream")["value"] for one in (circuit, pruned)]
    hidden = circuit.edges.query("receiver == 'outlier stream' and share.abs() < 0.1")["value"].sum()
    assert np.isclose(rest[1], hidden) and rest[1] > 10 * abs(rest[0])


def test_heads_are_shown_that_look_at_outliers_or_write_much_from_them_and_the_others_join_the_rest(planted):
    vit, truth, image, circuit = planted
    loud = copy.deepcopy(vit)
    sinks = [Node.head(*head) for head in truth.sink_heads]
    noisy = next(head for head in range(4) if Node.head(2, head) not in sinks)
    with torch.no_grad():
        loud.blocks[2].attn.out.weight[:, 12 * noisy : 12 * (noisy + 1)] *= 100
    noisy = Node.head(2, noisy)
    options = {"detection": circuit.detection, "block": 1, "check": False}
    every, pruned = (attention_circuit(loud, image, truth.neurons, min_share=m, **options) for m in (0.0, 0.02))
    assert set(pruned.nodes.query("kind == 'head'")["name"]) == {*sinks, noisy}
    attention = every.nodes.query("kind == 'head'").set_index("name")["attention"]
    assert attention[noisy] < 0.02 * attention.sum() < attention[sinks].min()  # it is in for its write alone
    written = every.edges.query("receiver == '[CLS]' and via == 'outliers'").set_index("sender")["share"]
    assert written[sinks].max() < 0.02 < written[noisy]  # and the sinks for their attention
    rest = [value(one.edges, sender="rest of [CLS]")["value"] for one in (every, pruned)]
    shown = [set(zip(one.edges["sender"], one.edges["via"], strict=True)) for one in (every, pruned)]
    into = every.edges.query("receiver == '[CLS]' and via != ''").set_index(["sender", "via"])["value"]
    assert np.isclose(rest[1] - rest[0], into[list(shown[0] - shown[1] & set(into.index))].sum(), rtol=1e-4)


def test_half_precision_is_reported_not_refused(tiny):
    _, images, circuit = tiny
    half = rl.HookedViT.from_pretrained("registerlens:tiny").to(torch.bfloat16)
    found = attention_circuit(half, images[:4], KNOWN, detection=circuit.detection, check=False)
    assert 1e-5 < found.sum_error < 0.05


def test_test_time_registers_are_a_group_of_keys_of_their_own(tiny):
    """A register that takes one neuron leaves the others, and so the outliers, where they are."""
    vit, images, circuit = tiny
    with vit.edit(rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(1, 177)]))):
        found = attention_circuit(vit, images[:4], KNOWN, min_share=0.0, detection=circuit.detection)
    assert set(found.edges["via"]) == {"", "outliers", "other patches", "registers"}
    assert abs(value(found.edges, sender="neuron 1:177")["value"]) < 1e-3 and found.sum_error < 1e-5


# The result as an object ---------------------------------------------------------------------------------------------


def test_it_is_saved_told_and_drawn(tiny, tmp_path):
    _, _, circuit = tiny
    read = AttentionCircuit.load(circuit.save(tmp_path))
    for table in ("edges", "nodes", "paths", "parts"):
        pd.testing.assert_frame_equal(read.to_dataframe(table), circuit.to_dataframe(table))
    assert read.describe() == circuit.describe() and repr(read) == repr(circuit)
    for item in dataclasses.fields(circuit):
        if item.name not in ("edges", "nodes", "paths", "parts"):
            assert getattr(read, item.name) == getattr(circuit, item.name), item.name
    words = circuit.describe()
    assert "neuron 1:183" in words and "7 shown neurons" in words and "Every edge was cut alone" in words
    assert "7 of 7 neurons" in repr(circuit) and "mean patch" in repr(circuit)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"result\.json"):
        AttentionCircuit.load(tmp_path)


def test_tables_are_copies_of_known_names(tiny):
    _, _, circuit = tiny
    frame = circuit.to_dataframe("nodes")
    frame["whole"] = 0.0
    assert circuit.nodes["whole"].max() > 1
    with pytest.raises(ConfigError, match="paths"):
        circuit.to_dataframe("path")


def test_the_graph_has_the_nodes_edges_and_a_way_from_every_neuron_to_both_ends(tiny):
    _, _, circuit = tiny
    graph = circuit.to_networkx()
    assert set(graph) == set(circuit.nodes["name"]) and graph.number_of_edges() == len(circuit.edges)
    for neuron in circuit.nodes.query("kind == 'neuron'")["name"]:
        assert nx.has_path(graph, neuron, "mean patch") and nx.has_path(graph, neuron, "output")
    assert nx.is_directed_acyclic_graph(graph)
    edge = graph["neuron 1:183"]["outlier stream"][""]
    assert edge["value"] == value(circuit.edges, sender="neuron 1:183")["value"]


def test_the_figure_draws_every_edge_as_wide_as_its_share_and_coloured_by_sign(tiny, planted):
    for circuit, mode, adds, rests in (
        (tiny[2], "dark", "#A0D8FF", "#C4C4C4"),
        (planted[3], "light", "#0072B2", "#5C5C5C"),
    ):
        figure = circuit.plot(mode)
        lines = [trace for trace in figure.data if trace.mode == "lines" and trace.x[0] is not None]
        assert len(lines) == len(circuit.edges)
        for trace, row in zip(lines, circuit.edges.to_dict("records"), strict=True):
            rest = row["sender"].startswith("rest of")
            assert trace.line.color == (rests if rest else adds if row["value"] >= 0 else "#D55E00")
            assert np.isclose(trace.line.width, 1 + 13 * abs(row["share"]))
            assert row["sender"] in trace.hovertemplate and f"{row['value']:.3g}" in trace.hovertemplate
            assert ("cut alone" in trace.hovertemplate) == (not rest)
    places = {name: x for trace in figure.data for name, x in zip(trace.customdata or (), trace.x, strict=False)}
    order = [
        next(x for text, x in places.items() if name in text) for name in ("neuron 1:", "outlier stream<", "head 2.")
    ]
    assert order == sorted(order)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_bad_input_is_told(tiny):
    vit, images, circuit = tiny
    known, detection = {"detection": circuit.detection, "check": False}, circuit.detection
    torch.manual_seed(0)
    with pytest.raises(NoOutliersError, match="threshold=<norm>"):
        attention_circuit(rl.HookedViT(vit.cfg), images, KNOWN)
    with pytest.raises(InterventionError, match="find_register_neurons"):
        attention_circuit(vit, images, rl.RegisterNeurons.from_pairs([]), **known)
    with pytest.raises(InterventionError, match="do not exist"):
        attention_circuit(vit, images, rl.RegisterNeurons.from_pairs([(6, 0)]), **known)
    with pytest.raises(InterventionError, match="No head comes after block 5"):
        attention_circuit(vit, images, rl.RegisterNeurons.from_pairs([(5, 0)]), **known)
    with pytest.raises(InterventionError, match="come after block 0"):
        attention_circuit(vit, images, KNOWN, block=0, **known)
    with pytest.raises(ShapeError, match="smaller than one patch"):
        attention_circuit(vit, torch.rand(1, 3, 4, 4), KNOWN, **known)
    with pytest.raises(ShapeError, match=r"images\[None\]"):
        attention_circuit(vit, images[0], KNOWN, **known)
    with pytest.raises(ImageError, match="No image came"):
        attention_circuit(vit, images[:0], KNOWN, **known)
    with pytest.raises(ImageError, match="None of the 1 images has an outlier"):
        high = dataclasses.replace(detection.cutoff, value=1e6)
        attention_circuit(vit, images[:1], KNOWN, detection=dataclasses.replace(detection, cutoff=high))
    with pytest.raises(ConfigError, match="min_share"):
        attention_circuit(vit, images, KNOWN, **known, min_share=1.0)
    with pytest.raises(ShapeError, match="Class 99 does not exist"):
        attention_circuit(vit, images, KNOWN, **known, target=99)


def test_what_weights_cannot_explain_is_refused(tiny):
    vit, images, circuit = tiny
    known = {"detection": circuit.detection, "check": False}
    doubled = vit.hooks([("blocks.3.attn.hook_k", lambda k, hook: 2 * k)])
    with doubled, pytest.raises(InterventionError, match="differ from what the model computes"):
        attention_circuit(vit, images[:2], KNOWN, **known)
    bias = rl.AttentionBias.fit(vit, images, KNOWN)
    low = dataclasses.replace(circuit.detection.cutoff, value=1.1)  # the bias leaves no outlier above the real one
    known["detection"] = dataclasses.replace(circuit.detection, cutoff=low)
    with vit.edit(bias), pytest.raises(InterventionError, match="attention bias"):
        attention_circuit(vit, images[:2], KNOWN, **known)

"""Small models, edits of every kind for them, and a notebook's loop, which runs every condition from the images."""

import functools
from dataclasses import replace
from itertools import product

import torch
from helpers import randomise

import registerlens as rl
from registerlens.analysis.detection import Cutoff, detect
from registerlens.config_parts import QKNormConfig, RopeConfig
from registerlens.data.sources import Shard
from registerlens.data.synthetic import synthetic_images
from registerlens.engine.views import View
from registerlens.evaluation.metrics import default_metrics, metric

SIZE = {"n_layers": 4, "d_model": 24, "n_heads": 3, "d_mlp": 20, "image_size": (24, 32), "patch_size": (8, 8)}
CFGS = {
    "ln_pre": rl.ViTConfig(**SIZE, ln_pre=True, layer_scale=True, act_fn="quick_gelu", n_trained_registers=2),
    "rotary": rl.ViTConfig(
        **SIZE,
        act_fn="silu",
        gated_mlp=True,
        positions="none",
        rope=RopeConfig(theta=100.0, coordinates="index", pairs="interleaved"),
        qk_norm=QKNormConfig(kind="rms", over="all"),
        norm="rms",
        d_out=5,
    ),
    "every token": rl.ViTConfig(**SIZE, class_token=False, pooling=(), d_out=6),
}
MODELS = ("tiny", "planted", *CFGS)
SIZES = {"tiny": ((48, 48), (40, 61)), "planted": ((32, 32), (41, 24))}


@functools.cache
def model(name):
    """A small model and where its outliers are."""
    if name == "tiny":
        vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        return vit, detect(vit, synthetic_images(32, 0).images)
    if name == "planted":
        torch.manual_seed(0)
        size = {"image_size": (32, 32), "patch_size": (4, 4)}
        vit = randomise(
            rl.HookedViT(rl.ViTConfig(**SIZE | {"d_mlp": 32, "d_model": 32, "n_heads": 4} | size, d_out=5)), std=0.1
        )
        vit, truth = rl.plant_register_neurons(vit, layer=1, n=2)
        return vit.eval(), detect(vit, truth.calibration)
    vit = randomise(rl.HookedViT(CFGS[name]), 3)
    found = detect(vit, pixels(vit, 8), layer="2.attn", threshold=1.0)
    return vit, replace(found, cutoff=Cutoff(value=1.1, relative=True))


def sizes(name):
    """Native, and one that is not."""
    return SIZES.get(name, ((24, 32), (20, 43)))


def pixels(vit, n, size=None, seed=0):
    return torch.randn(n, 3, *size or vit.cfg.image_size, generator=torch.Generator().manual_seed(seed))


def shard_of(name, n, size, seed=0):
    """Images, with labels of which some are missing where the model has logits."""
    vit, _ = model(name)
    images = pixels(vit, n, size, seed)
    if name == "tiny":
        images = synthetic_images(n, seed).images[..., : size[0], :]
        images = torch.nn.functional.pad(images, (0, size[1] - images.shape[-1]))
    labels = None
    if vit.cfg.d_out:
        with torch.no_grad():
            shape = vit(images).shape[:-1]
        labels = torch.randint(-1, 5, shape, generator=torch.Generator().manual_seed(seed))
    return Shard(names=tuple(f"{seed}/{i}" for i in range(n)), images=images, labels=labels)


def metrics_of(name):
    """The built-in ones, and one that looks at every norm, all attention and every token."""
    vit, detection = model(name)
    n = vit.cfg.n_layers
    norms = ["embed", *(f"{layer}.{part}" for layer in range(n) for part in ("attn", "mlp"))]
    everything = metric(look_at_everything, norms=norms, attention=range(n))
    return *default_metrics(vit, detection=detection, labels=bool(vit.cfg.d_out)), everything


def look_at_everything(edited, clean, layout):
    """A number that changes with whatever changes; attention's terms, which are large, do not cancel each other."""
    total = edited.tokens.abs().mean((1, 2)) / (1 + clean.tokens.abs().mean((1, 2)))
    for i, place in enumerate(sorted(edited.norms)):
        total = total + (i + 1) * (edited.norms[place].mean(1) / clean.norms[place].mean(1)).log() / 10
        total = total + edited.norms[place][:, layout.test_time_registers].sum(1) / 1000
    for layer, drawn in edited.attention.items():
        weights = torch.linspace(0.1, 2, drawn.shape[-1])
        total = total + (layer + 1) * (drawn.square() * weights).sum((1, 2))
    return total


# Edits ---------------------------------------------------------------------------------------------------------------


def neurons(*pairs):
    return rl.RegisterNeurons.from_pairs(pairs)


@functools.cache
def edits_of(name, size):
    """One of every kind and option, early and late."""
    vit, _ = model(name)
    last, reference = vit.cfg.n_layers - 1, pixels(vit, 5, size, seed=50)
    layout = vit.layout(reference)
    several, middle = neurons((2, 7), (1, 3), (2, 0), (1, 11)), neurons((2, 1), (2, 9))
    if name == "tiny":
        several, middle = neurons((2, 7), (1, 183), (2, 0), (1, 103)), neurons((1, 219), (1, 125))
    targets = {
        "neurons": several,
        "one neuron": neurons((last, 5)),
        "one early neuron": neurons((0, 5)),
        "head": rl.Heads([(2, 0)]),
        "heads": rl.Heads([(1, 0), (last, 0)]),
        "patches": rl.Tokens(1, [0, 3]),
        "last patches": rl.Tokens(last, [1]),
    }
    if layout.cls is not None:
        targets["cls"] = rl.Tokens(2, "cls")
    if vit.cfg.n_trained_registers:
        targets["trained"] = rl.Tokens(0, "trained_registers")
    heart = torch.zeros(*layout.grid, dtype=torch.bool)
    heart[0, 1] = heart[1, 0] = True
    made = {
        "register": rl.TestTimeRegisters(several),
        "registers": rl.TestTimeRegisters(several, 2, extreme="shared", assign="random", seed=4),
        "register, gaussian": rl.TestTimeRegisters(middle, init="gaussian", clear="outliers"),
        "registers, patches": rl.TestTimeRegisters(middle, 2, source="patches", clear="patches", init="mean"),
        "register, nothing to move": rl.TestTimeRegisters(neurons()),
        "no register": rl.TestTimeRegisters(several, 0),
        "move": rl.MoveOutliers(several, 4),
        "move, outliers": rl.MoveOutliers(middle, [0, layout.n_patches - 1], clear="outliers"),
        "move, patches": rl.MoveOutliers(middle, heart, clear="patches", extreme="shared"),
        "move, none": rl.MoveOutliers(neurons((last, 3)), 2, clear="none", fill="mean"),
        "bias": rl.AttentionBias.fit(vit, reference, middle),
        "another bias": rl.AttentionBias.fit(vit, reference, neurons((0, 1))),
        "interpolate": rl.InterpolateOutliers("1.attn", Cutoff(value=1.05, relative=True)),
        "interpolate late": rl.InterpolateOutliers(last, Cutoff(value=1.05, relative=True)),
    }
    if vit.cfg.ln_pre:
        made["register, before ln_pre"] = rl.TestTimeRegisters(several, before_ln_pre=True)
    for target_name, target in targets.items():
        made[f"zero {target_name}"] = rl.Ablate(target)
    modes = ("mean", "noise", "shuffle", "resample")
    for target_name, mode in [
        *product(("neurons", "heads", "patches"), modes),
        ("head", "mean"),
        ("one neuron", "noise"),
    ]:
        made[f"{mode} {target_name}"] = rl.Ablate.fit(vit, reference, targets[target_name], mode, seed=5)
    return made


def together(names):
    """Whether these edits can be made together: whole activations of other images fit a sequence of as many tokens."""
    registers = any(name.startswith("register") for name in names)
    return not (registers and any(name.startswith("shuffle") for name in names))


# The loop of a notebook ----------------------------------------------------------------------------------------------


def naive_view(vit, images, labels, interventions):
    """Everything a metric may see, from one cached run: attention from whole patterns."""
    points = ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_mid", "blocks.*.hook_resid_post", "blocks.*.hook_pattern"]
    points[-1] = "blocks.*.attn.hook_pattern"
    with torch.no_grad(), vit.edit(*interventions):
        layout = vit.layout(images)
        tokens, cache = vit.run_with_cache(images, names_filter=points, return_type="tokens")
        output = vit.head(tokens, layout)
    norms = {"embed": cache["blocks.0.hook_resid_pre"].norm(dim=-1)}
    attention = {}
    for layer in range(vit.cfg.n_layers):
        norms[f"{layer}.attn"] = cache[f"blocks.{layer}.hook_resid_mid"].norm(dim=-1)
        norms[f"{layer}.mlp"] = cache[f"blocks.{layer}.hook_resid_post"].norm(dim=-1)
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        attention[layer] = pattern.mean(2) if layout.cls is None else pattern[:, :, layout.cls]
    return View(layout=layout, tokens=tokens, output=output, norms=norms, attention=attention, labels=labels)


def naive_loop(vit, shard, conditions, metrics):
    """[condition, metric, image]."""
    clean = naive_view(vit, shard.images, shard.labels, ())
    rows = []
    for condition in conditions:
        edited = naive_view(vit, shard.images, shard.labels, condition.interventions)
        rows.append(torch.stack([one.measure(edited, clean).double() for one in metrics]))
    return torch.stack(rows)


def values_of(table, conditions, metrics, n):
    """[condition, metric, image] of a part."""
    columns = [torch.tensor(table[one.name].to_numpy()).view(len(conditions), n) for one in metrics]
    return torch.stack(columns, 1)

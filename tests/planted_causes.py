"""One thing wrong with a model or its images, planted on purpose, so that a diagnosis can be held against the truth."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from result_examples import PAIRS

import registerlens as rl
from registerlens.data.examples import example_images
from registerlens.data.images import load_images
from registerlens.data.photographs import shipped_photographs
from registerlens.data.synthetic import TRIGGER, synthetic_images
from registerlens.theory.planted import _copy


def quiet_tiny():
    """The embedded model without its register neurons: nothing is wrong with it."""
    vit = _copy(rl.HookedViT.from_pretrained("registerlens:tiny"))
    with torch.no_grad():
        for layer, neuron in PAIRS:
            vit.blocks[layer].mlp.out.weight[:, neuron] = 0
    return vit


def images_for(vit, seed, n=32):
    """Images of the kind it was trained on."""
    if vit.source.startswith("registerlens"):
        return synthetic_images(n, seed).images
    views = example_images(vit, n, seed)
    return F.interpolate(views, size=(140, 140), mode="bicubic", antialias=True)


def scale_of(vit, images):
    """The median norm of what enters block 0."""
    with torch.no_grad():
        return float(vit(images[:4], stop_at_layer=0)[:, vit.layout(images).patches].norm(dim=-1).median())


def with_registers(vit, n=2):
    """The same model with trained registers that do nothing yet."""
    cfg = replace(vit.cfg, n_trained_registers=n)
    state, at = dict(vit.state_dict()), vit.cfg.layout().patches.start
    for name in ("embed.prefix", "embed.W_pos"):
        rows = state[name]
        state[name] = torch.cat([rows[:at], torch.zeros(n, rows.shape[1]), rows[at:]])
    more = rl.HookedViT(cfg, vit.preprocess, source=vit.source)
    more.load_state_dict(state)
    return more.eval()


def direction(vit, rng):
    """A random direction that no block reads, of mean zero."""
    raw = torch.randn(vit.cfg.d_model, generator=rng)
    return F.normalize(raw - raw.mean(), dim=0)


def hide(vit, along):
    """Take a direction out of what values and MLPs read."""
    for block in vit.blocks:
        third = block.attn.qkv.weight.shape[0] // 3
        for weight, norm in ((block.attn.qkv.weight[2 * third :], block.ln1), (block.mlp.up.weight, block.ln2)):
            seen = F.normalize(norm.w * along, dim=0)
            weight -= torch.outer(weight @ seen, seen)


def none(vit, images, rng):
    return vit, images


def not_finite(vit, images, rng):
    vit, parameters = _copy(vit), list(vit.named_parameters())
    name, weight = parameters[int(torch.randint(len(parameters), (), generator=rng))]
    with torch.no_grad():
        flat = vit.get_parameter(name).view(-1)
        flat[int(torch.randint(weight.numel(), (), generator=rng))] = (math.nan, math.inf)[rng.initial_seed() % 2]
    return vit, images


def untrained(vit, images, rng):
    """All of it, or (odd seeds) one block whose weights were not found."""
    torch.manual_seed(rng.initial_seed())
    fresh = rl.HookedViT(vit.cfg, vit.preprocess, source=vit.source).eval()
    if rng.initial_seed() % 2:
        layer = int(torch.randint(vit.cfg.n_layers, (), generator=rng))
        fresh, block = _copy(vit), fresh.blocks[layer]
        fresh.blocks[layer].load_state_dict(block.state_dict())
    return fresh, images


def other_images(vit, images, rng):
    """Photographs for the one, noise or synthetic images for the other."""
    if vit.source.startswith("registerlens"):
        return vit, load_images(shipped_photographs(), vit)
    noise = torch.randn(images.shape, generator=rng)
    synthetic = synthetic_images(len(images), rng.initial_seed()).images.repeat(1, 1, 3, 3)[:, :, :140, :140]
    return vit, synthetic if rng.initial_seed() % 2 else noise


def wrong_preprocessing(vit, images, rng):
    """Not normalised, from 0 to 255, twice, or with mean and deviation 0.5; the synthetic ones twice or times 255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (vit.preprocess.mean, vit.preprocess.std))
    raw = images * std + mean
    twice = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / 0.226
    if vit.source.startswith("registerlens"):
        return vit, (twice, images * 255)[rng.initial_seed() % 2]
    return vit, (raw, raw * 255, twice, raw * 2 - 1)[rng.initial_seed() % 4]


def position_embedding(vit, images, rng):
    """As reported of a SigLIP tower: one position of 14.5 times the norm, 82% of it in one dimension."""
    vit, scale = _copy(vit), scale_of(vit, images)
    at = int(torch.randint(vit.cfg.layout().patches.start, vit.cfg.layout().n_tokens, (), generator=rng))
    row = torch.randn(vit.cfg.d_model, generator=rng)
    channel = int(torch.randint(vit.cfg.d_model, (), generator=rng))
    row = F.normalize(row, dim=0) * math.sqrt(0.18)
    row[channel] = math.sqrt(0.82)
    with torch.no_grad():
        W_pos = vit.embed.W_pos
        if images.shape[-1] != vit.cfg.image_size[1]:  # resampled: planted over one of the cells that are asked for
            grid, whole = vit.layout(images).grid, vit.cfg.grid
            cell = torch.randint(grid[0], (2,), generator=rng)
            mask = torch.zeros(whole)
            top, left = (int(cell[i]) * whole[i] // grid[i] for i in range(2))
            mask[top : top + whole[0] // grid[0] + 2, left : left + whole[1] // grid[1] + 2] = 1
            W_pos[vit.cfg.layout().patches.start :] += 14.5 * scale * mask.flatten()[:, None] * row
        else:
            W_pos[at] += 14.5 * scale * row
    return vit, images


def patch_embedding(vit, images, rng):
    """A filter that answers to some patches far more than to all others."""
    vit, scale, p = _copy(vit), scale_of(vit, images), vit.cfg.patch_size[0]
    columns = F.unfold(images, p, stride=p).mT  # image patch pixel
    if vit.source.startswith("registerlens"):
        batch = synthetic_images(len(images), rng.initial_seed())
        target = (batch.roles == TRIGGER) & (batch.types == 1 + rng.initial_seed() % 3)
    else:
        target = torch.zeros(columns.shape[:2], dtype=torch.bool)
        for image in range(0, len(images), 2):
            target[image, int(torch.randint(columns.shape[1], (), generator=rng))] = True
    rest = columns[~target]
    covariance = torch.cov(rest.T) + 0.01 * rest.var() * torch.eye(rest.shape[1])
    filter_ = torch.linalg.solve(covariance, columns[target].mean(0) - rest.mean(0))
    spread = (rest @ filter_).std()
    along = direction(vit, rng)
    with torch.no_grad():
        hide(vit, along)
        vit.embed.patch.weight += (2 * scale / spread) * torch.einsum("d,p->dp", along, filter_).view_as(
            vit.embed.patch.weight
        )
        vit.embed.patch.bias -= (2 * scale / spread) * (rest @ filter_).mean() * along
    return vit, images


def register_neurons(vit, images, rng, registers=0):
    if vit.source == "registerlens:tiny" and not registers:
        return vit, images  # there they emerged
    layer = int(torch.randint(1, vit.cfg.n_layers - 1, (), generator=rng))
    n = int(torch.randint(1, 5, (), generator=rng))
    vit = with_registers(vit, registers) if registers else vit
    options = {"layer": layer, "n": n, "images": images, "sink_heads": 1, "seed": rng.initial_seed()}
    return rl.plant_register_neurons(vit, **options)[0], images


def outliers_despite_registers(vit, images, rng):
    return register_neurons(vit, images, rng, registers=2)


def registers_hold(vit, images, rng):
    vit, scale = with_registers(vit), scale_of(vit, images)
    along, at = direction(vit, rng), vit.cfg.n_prefix
    with torch.no_grad():
        hide(vit, along)
        vit.embed.prefix[at:] = (5 + 20 * torch.rand(2, 1, generator=rng)) * scale * along
    return vit, images


def massive_channel(vit, images, rng):
    """One number in every token, or (odd seeds) in [CLS] or a register alone, written by one block's bias or prefix."""
    vit, scale = _copy(vit), scale_of(vit, images)
    layer, channel = (int(torch.randint(n, (), generator=rng)) for n in (vit.cfg.n_layers, vit.cfg.d_model))
    with torch.no_grad():
        out = vit.blocks[layer].mlp.out
        gamma = 1.0 if out.gamma is None else out.gamma[channel]
        out.bias[channel] += 500 * scale / gamma
    return vit, images


def sinks(vit, images, rng):
    """A third of the heads in the upper blocks look at [CLS], or at a register where there is no [CLS]."""
    vit = _copy(vit) if vit.cfg.class_token else with_registers(vit, 1)
    n_heads, d_head, start = vit.cfg.n_heads, vit.cfg.d_head, vit.cfg.n_layers // 3
    if not vit.cfg.class_token:
        with torch.no_grad():
            vit.embed.prefix[:] = scale_of(vit, images) * direction(vit, rng)
    for layer in range(start, vit.cfg.n_layers):
        block = vit.blocks[layer]
        with torch.no_grad():
            x = block.ln1(vit(images[:8], stop_at_layer=layer))
            patches = x[:, vit.layout(images).patches].flatten(0, 1)
            covariance = torch.cov(patches.T) + 0.05 * patches.var() * torch.eye(patches.shape[1])
            gap = x[:, 0].mean(0) - patches.mean(0)
            reads = torch.linalg.solve(covariance, gap)
            reads = reads / (reads @ gap)  # 1 more at the sink than elsewhere
            for head in torch.randperm(n_heads, generator=rng)[: max(1, n_heads // 3)].tolist():
                axis = F.normalize(torch.randn(d_head, generator=rng), dim=0)
                block.attn.W_K[head] += 8 * math.sqrt(d_head) * torch.outer(reads, axis)
                block.attn.b_Q[head] += (2 if n_heads > 1 else 8) * axis
                block.attn.W_Q[head] -= torch.outer(block.attn.W_Q[head] @ axis, axis)
    return vit, images


CAUSES = {
    "none": none,
    "not finite": not_finite,
    "untrained weights": untrained,
    "other images": other_images,
    "wrong preprocessing": wrong_preprocessing,
    "position embedding": position_embedding,
    "patch embedding": patch_embedding,
    "outliers despite registers": outliers_despite_registers,
    "register neurons": register_neurons,
    "massive channel": massive_channel,
    "sinks without outliers": sinks,
    "registers hold the outliers": registers_hold,
}


def planted(cause, host, seed, n=32):
    """A model and images with this cause planted."""
    rng = torch.Generator().manual_seed(seed)
    return CAUSES[cause](host, images_for(host, seed, n), rng)

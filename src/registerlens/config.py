"""What a ViT is, apart from its weights: architecture, token layout, and the pixels it expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

from einops import rearrange
from jaxtyping import Shaped

from registerlens.config_parts import (
    Activation,
    AttentionKind,
    AttentionPoolConfig,
    NormKind,
    QKNormConfig,
    RopeConfig,
)
from registerlens.errors import ConfigError, ShapeError, check_at_least, check_choice

PooledPart = Literal["cls", "distillation", "mean", "mean_all", "attention"]
Description = TypeVar("Description")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The architecture of a vision transformer whose blocks read a normalised stream, and nothing else.

    Example:
        >>> cfg = ViTConfig(n_layers=2, d_model=32, n_heads=2, d_mlp=64, image_size=(32, 48), patch_size=(8, 8))
        >>> cfg.grid, cfg.d_head, cfg.n_prefix
        ((4, 6), 16, 1)
    """

    n_layers: int
    """Number of transformer blocks."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Attention heads per block."""
    d_mlp: int
    """Hidden units (neurons) of each block's MLP."""
    image_size: tuple[int, int]
    """Native height and width in pixels; the learned positions belong to this size."""
    patch_size: tuple[int, int]
    """Height and width of a patch in pixels."""
    d_head: int = 0
    """Width of a head; 0 means d_model / n_heads."""
    n_channels: int = 3
    """Image channels."""
    act_fn: Activation = "gelu"
    """The MLP's nonlinearity: exact GELU, its tanh form, x sigmoid(1.702 x), SiLU, ReLU, or ReLU squared."""
    gated_mlp: bool = False
    """Whether the nonlinearity of one linear map multiplies another one (SwiGLU and the like)."""
    mlp_norm: bool = False
    """Whether the hidden layer is normalised before the MLP's last linear map (EVA-02)."""
    norm: NormKind = "layer"
    """LayerNorm or RMSNorm, throughout."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    norm_after: bool = False
    """Whether what a sublayer computed is normalised before it is added to the stream: "sandwich norm", as in Gemma 2;
    TransformerLens's `use_normalization_before_and_after`."""
    patch_norm: bool = False
    """Whether patch embeddings are normalised before positions are added (AIMv2)."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias."""
    class_token: bool = True
    """Whether a [CLS] token stands first."""
    distillation_token: bool = False
    """Whether DeiT's distillation token follows [CLS]."""
    n_trained_registers: int = 0
    """Trained register tokens between the prefix and the patches."""
    positions: Literal["learned", "sincos", "none"] = "learned"
    """What is added to the tokens: learned positions, sines and cosines of row and column (AIMv2), or nothing."""
    pos_interpolation: Literal["bicubic", "bicubic_antialias", "bicubic_offset", "bilinear_antialias"] = "bicubic"
    """How learned positions are resampled for another image size: transformers' way, timm's and open_clip's, that of
    DINO's own code (a tenth of a patch is added to the size, but not to what comes out), or SigLIP 2's."""
    n_unplaced: int = 0
    """How many of the last prefix and register tokens get no position from the source model (zero rows here)."""
    rope: RopeConfig | None = None
    """Rotary positions of queries and keys."""
    ln_pre: bool = False
    """Whether a norm precedes block 0, as in CLIP."""
    attention: AttentionKind = "softmax"
    """What makes a pattern of the scores: softmax, or, of every score s among n keys on its own, sigmoid(s - log n)
    (Ramapuram et al. 2024), so that rows need not sum to 1; n counts every key, so that one more weakens all others."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    qk_norm: QKNormConfig | None = None
    """A norm on queries and keys."""
    attn_norm: bool = False
    """Whether the heads' outputs, side by side, are normalised before W_O (EVA-02's sub-LayerNorm)."""
    layer_scale: bool = False
    """Whether each sublayer's output is scaled by a learned vector."""
    final_norm: bool = True
    """Whether a norm follows the last block."""
    final_norm_kind: NormKind | None = None
    """Which, where it is another than in the blocks."""
    pooling: tuple[PooledPart, ...] = ("cls",)
    """What the head reads, concatenated: [CLS], the distillation token, the mean over patches or over all tokens of the
    source model, or what a learned query takes from them; empty means a head on every token of the source model."""
    attn_pool: AttentionPoolConfig | None = None
    """That learned query, where pooling is ("attention",)."""
    pool_norm: bool = False
    """Whether what was pooled is normalised."""
    d_out: int | None = None
    """Outputs of the head (classes, or the projection's width); None means no head, the pooled tokens come out."""
    n_label_sets: int = 1
    """Equal groups that the head's outputs fall into, each with classes, and a softmax, of its own."""
    head_bias: bool = True
    """Whether the head has a bias; a projection has none."""
    head_act: Literal["tanh"] | None = None
    """Nonlinearity after the head, as in the pooler of transformers' ViTModel."""

    attn_only: bool = field(default=False, init=False, repr=False)
    """TransformerLens's ActivationCache asks for this."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value, value) if isinstance(value, int) else tuple(value))
        object.__setattr__(self, "pooling", tuple(self.pooling))
        check_at_least(1, n_layers=self.n_layers, d_model=self.d_model, n_heads=self.n_heads, d_mlp=self.d_mlp)
        check_at_least(1, n_channels=self.n_channels, n_label_sets=self.n_label_sets)
        check_at_least(0, n_trained_registers=self.n_trained_registers)
        for name, kind in (("act_fn", Activation), ("attention", AttentionKind)):
            check_choice(name, getattr(self, name), get_args(kind))
        if self.distillation_token and not self.class_token:
            raise ConfigError(
                "A distillation token stands after [CLS]; this configuration has no [CLS]."
                " Set class_token=True, or distillation_token=False."
            )
        if not self.d_head:
            if self.d_model % self.n_heads:
                raise ConfigError(
                    f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; give d_head explicitly."
                )
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.d_out is not None and self.d_out % self.n_label_sets:
            raise ConfigError(
                f"{self.d_out} outputs do not fall into {self.n_label_sets} equal label sets."
                " Give an n_label_sets that divides d_out."
            )
        if min(self.grid) < 1:
            raise ConfigError(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}."
                " Give one at least as large."
            )
        have = {"cls": self.class_token, "distillation": self.distillation_token, "mean": True, "mean_all": True}
        have["attention"] = self.attn_pool is not None and self.pooling == ("attention",)
        for part in self.pooling:
            if not have.get(part, False):
                raise ConfigError(
                    f"pooling asks for {part!r}, but the model has no such token or pooling head."
                    " Add it, or take it out of pooling."
                )
        if self.rope is not None and self.d_head % 4 and not self.rope.learned:
            raise ConfigError(f"Rotary positions need d_head to be a multiple of 4, got {self.d_head}.")

    @property
    def normalization_type(self) -> str:
        """TransformerLens's name for the blocks' norm."""
        return {"layer": "LN", "rms": "RMS"}[self.norm]

    @property
    def final_rms(self) -> bool:
        """Whether the final norm is an RMSNorm, which TransformerLens asks."""
        return (self.final_norm_kind or self.norm) == "rms"

    @property
    def d_pooled(self) -> int:
        """Width of what the head reads."""
        return self.attn_pool.d_attn if self.attn_pool else self.d_model * max(1, len(self.pooling))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width at the native size."""
        return grid_of(self.image_size, self.patch_size)

    @property
    def n_prefix(self) -> int:
        """Prefix tokens: [CLS] and the distillation token, without trained registers."""
        return int(self.class_token) + int(self.distillation_token)

    def layout(
        self, height: int | None = None, width: int | None = None, n_test_time_registers: int = 0
    ) -> TokenLayout:
        """The token layout for images of `height` x `width` pixels (default: the native size).

        Raises:
            ShapeError: the image is smaller than one patch.
        """
        size = (height or self.image_size[0], width or self.image_size[1])
        grid = grid_of(size, self.patch_size)
        if min(grid) < 1:
            raise ShapeError(
                f"An image of {size[0]} x {size[1]} pixels is smaller than one patch of "
                f"{self.patch_size[0]} x {self.patch_size[1]}. Resize it to at least one patch."
            )
        return TokenLayout(
            grid=grid,
            n_prefix=self.n_prefix,
            class_token=self.class_token,
            n_trained_registers=self.n_trained_registers,
            n_test_time_registers=n_test_time_registers,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that describe the architecture, as JSON-ready values."""
        settable = _settable(type(self))
        return {name: value for name, value in asdict(self).items() if name in settable}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: unknown or missing fields, named.
        """
        return _from_json(cls, values)


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Which position of the sequence is which token: prefix, trained registers, patches, test-time registers.

    Example:
        >>> layout = TokenLayout(grid=(2, 3), n_prefix=1, n_trained_registers=4)
        >>> layout.patches, layout.n_tokens, layout.cls
        (slice(5, 11, None), 11, 0)
    """

    grid: tuple[int, int]
    """Patches along height and width."""
    n_prefix: int
    """[CLS] and other tokens before the trained registers."""
    class_token: bool = True
    """Whether the first prefix token is [CLS]."""
    n_trained_registers: int = 0
    """Trained register tokens, after the prefix."""
    n_test_time_registers: int = 0
    """Test-time registers, after the patches."""

    @property
    def grid_height(self) -> int:
        """Rows of patches."""
        return self.grid[0]

    @property
    def grid_width(self) -> int:
        """Columns of patches."""
        return self.grid[1]

    @property
    def n_patches(self) -> int:
        """Patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """All tokens of the sequence."""
        return self.patches.stop + self.n_test_time_registers

    @property
    def cls(self) -> int | None:
        """Position of [CLS], or None."""
        return 0 if self.class_token and self.n_prefix else None

    @property
    def distillation(self) -> int | None:
        """Position of the distillation token, or None."""
        return 1 if self.class_token and self.n_prefix == 2 else None

    @property
    def prefix(self) -> slice:
        """Positions of [CLS] and other prefix tokens."""
        return slice(0, self.n_prefix)

    @property
    def trained_registers(self) -> slice:
        """Positions of the trained registers."""
        return slice(self.n_prefix, self.n_prefix + self.n_trained_registers)

    @property
    def patches(self) -> slice:
        """Positions of the patches, row by row."""
        start = self.trained_registers.stop
        return slice(start, start + self.n_patches)

    @property
    def test_time_registers(self) -> slice:
        """Positions of the test-time registers."""
        return slice(self.patches.stop, self.n_tokens)

    def to_grid(self, tokens: Shaped[Any, "batch pos ..."]) -> Shaped[Any, "batch grid_h grid_w ..."]:
        """Patch values laid out as the image: [batch, pos or patch, ...] -> [batch, grid_h, grid_w, ...].

        Raises:
            ShapeError: axis 1 is neither the whole sequence nor the patches.
        """
        if tokens.ndim >= 2 and tokens.shape[1] == self.n_tokens:
            tokens = tokens[:, self.patches]
        if tokens.ndim < 2 or tokens.shape[1] != self.n_patches:
            raise ShapeError(
                f"Expected axis 1 to hold {self.n_tokens} tokens or {self.n_patches} patches, "
                f"got a tensor of shape {tuple(tokens.shape)}."
            )
        return rearrange(tokens, "batch (h w) ... -> batch h w ...", h=self.grid[0], w=self.grid[1])


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How the source library turns a decoded RGB image into the model's pixels.

    Example:
        >>> Preprocess(resize=(256, 256), crop=(224, 224)).at((518, 518)).crop
        (518, 518)
    """

    resize: tuple[int, int]
    """Target height and width of the resize."""
    fit: Literal["cover", "exact"] = "cover"
    """Keep the aspect ratio and scale until the image covers `resize` (for a square: the shorter side matches),
    or stretch to `resize` exactly."""
    crop: tuple[int, int] | None = None
    """Height and width of the central crop after the resize."""
    arithmetic: Literal["torchvision", "transformers"] = "torchvision"
    """Whose details: torchvision's on Pillow images (timm, open_clip; crop offsets rounded to even), or transformers'
    (the width is resampled first; crop offsets rounded down)."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Resampling filter."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Per channel, subtracted from pixels in [0, 1]."""
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Per channel, divides after the mean is subtracted."""

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        return self.crop or self.resize

    def at(self, size: tuple[int, int]) -> Preprocess:
        """The same steps for another output size, without a margin between resize and crop."""
        return replace(self, resize=size, crop=None if self.fit == "exact" else size)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: unknown or missing fields, named.
        """
        return _from_json(cls, values)


def _settable(cls: Any) -> set[str]:
    return {item.name for item in fields(cls) if item.init}


def _from_json(cls: type[Description], values: Mapping[str, Any]) -> Description:
    if unknown := sorted(set(values) - _settable(cls)):
        raise ConfigError(f"Unknown {cls.__name__} fields {unknown}. Known: {sorted(_settable(cls))}.")
    try:
        return cls(**{name: _from_json_value(name, value) for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"Incomplete {cls.__name__}: {error}.") from error


_NESTED = {"rope": RopeConfig, "qk_norm": QKNormConfig, "attn_pool": AttentionPoolConfig}


def _from_json_value(name: str, value: Any) -> Any:
    """JSON knows no tuples, and no other parts than objects."""
    if name in _NESTED and isinstance(value, Mapping):
        return _from_json(_NESTED[name], value)
    return tuple(value) if isinstance(value, list) else value


def grid_of(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Whole patches along height and width; a remainder is dropped, as a strided convolution drops it."""
    return size[0] // patch[0], size[1] // patch[1]

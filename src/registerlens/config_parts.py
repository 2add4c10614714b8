"""The parts of an architecture that have settings of their own: rotary positions, q/k norm, attention pooling."""

from dataclasses import dataclass
from typing import Literal, get_args

from registerlens.errors import ConfigError, check_choice

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2"]
NormKind = Literal["layer", "rms"]
AttentionKind = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embeddings: queries and keys of patches are turned by angles that depend on row and column.

    Prefix tokens and registers, trained or test-time, have no position and are not turned.

    Source: Heo et al. 2024 (axial and mixed); Siméoni et al. 2025 (DINOv3).

    Example:
        >>> RopeConfig(theta=10_000.0, coordinates="index", pairs="interleaved").learned
        False
    """

    theta: float = 100.0
    """Base of the geometric series of frequencies; not used where they are learned."""
    coordinates: Literal["centred", "index"] = "centred"
    """Patch centres from -1 to 1, times 2 pi (DINOv3), or numbers of rows and columns (EVA-02)."""
    offset: float = 0.0
    """Added to the numbers of rows and columns, in patches."""
    reference_grid: tuple[int, int] | None = None
    """Rows and columns are rescaled so that every grid spans this one; None leaves them."""
    x_first: bool = False
    """Whether the columns' angles come before the rows'."""
    pairs: Literal["halves", "interleaved"] = "halves"
    """Which numbers of a head are turned together: i and i + d_head / 2, or 2 i and 2 i + 1."""
    learned: bool = False
    """Whether every head of every layer has frequencies of its own as weights, each for row and column (mixed RoPE)."""

    def __post_init__(self) -> None:
        if self.reference_grid is not None:
            object.__setattr__(self, "reference_grid", tuple(self.reference_grid))
        check_choice("coordinates", self.coordinates, ("centred", "index"))
        check_choice("pairs", self.pairs, ("halves", "interleaved"))


@dataclass(frozen=True, kw_only=True)
class QKNormConfig:
    """A norm on queries and keys, after their projection and before any rotation."""

    kind: NormKind = "layer"
    """LayerNorm or RMSNorm."""
    over: Literal["head", "all"] = "head"
    """Each head on its own (timm), or all heads together (InternVL)."""
    eps: float = 1e-6
    """Its epsilon."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(NormKind))
        check_choice("over", self.over, ("head", "all"))


@dataclass(frozen=True, kw_only=True)
class AttentionPoolConfig:
    """Pooling by attention: a learned query looks at the tokens (SigLIP's and AIMv2's heads, CoCa's pooler).

    Only the first query's output is computed: it is what the source models return as their image feature.
    """

    n_heads: int
    """Attention heads."""
    d_attn: int
    """Width inside, and of what comes out; a multiple of n_heads."""
    n_queries: int = 1
    """Learned queries the source model has."""
    project_query: bool = True
    """Whether the query goes through a linear map of its own."""
    qkv_bias: bool = True
    """Whether query, keys and values have biases."""
    norm_inputs: bool = False
    """Whether query and tokens are normalised first (open_clip's pooler)."""
    d_mlp: int = 0
    """Hidden units of an MLP after it, with a norm before and a residual connection around; 0 means none."""
    act_fn: Activation = "gelu"
    """That MLP's nonlinearity."""
    over: Literal["patches", "all"] = "patches"
    """What it looks at: patches, or prefix tokens and trained registers too."""

    def __post_init__(self) -> None:
        check_choice("over", self.over, ("patches", "all"))
        check_choice("act_fn", self.act_fn, get_args(Activation))
        if self.n_heads < 1 or self.d_attn % self.n_heads:
            raise ConfigError(
                f"d_attn={self.d_attn} of the attention pooling is not divisible by {self.n_heads} heads."
                " Give a multiple."
            )

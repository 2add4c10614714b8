"""What a family of models is: a class of a source library as data, and how its architecture is read.

The data are at hand without torch, so that a wrong name is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from registerlens.config import Activation, Preprocess, ViTConfig
from registerlens.errors import ConfigError, UnsupportedArchitectureError, WeightsError, close_matches
from registerlens.loading.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

_ABSENT = object()


@dataclass(frozen=True)
class SourceModel:
    """What a source library says of a model: a config object or the module itself, and named weights."""

    described: Any
    state: Mapping[str, Tensor]

    def get(self, path: str, default: Any = _ABSENT) -> Any:
        """The value at a dotted path of attributes, keys and indices, as "blocks.0.attn.num_heads".

        Raises:
            ConfigError: nothing is there and no default is given.
        """
        value: Any = self.described
        for step in path.split("."):
            if isinstance(value, Mapping):
                value = value.get(step, _ABSENT)
            elif step.isdigit():
                value = value[int(step)]
            else:
                value = getattr(value, step, _ABSENT)
            if value is _ABSENT:
                if default is _ABSENT:
                    raise ConfigError(
                        f"The source model says nothing of {path!r}; it is incomplete or of another kind."
                        " `registerlens models` lists what can be loaded."
                    )
                return default
        return value

    def weight(self, key: str) -> Tensor:
        """A weight that the architecture is read from.

        Raises:
            WeightsError: it is missing.
        """
        if key not in self.state:
            raise WeightsError(
                f"The weights lack {key!r}, which tells the architecture.{close_matches(key, self.state)}"
                " Give a whole checkpoint."
            )
        return self.state[key]


# Reading the architecture --------------------------------------------------------------------------------------------

Reader = Callable[[SourceModel], Any]


def read(path: str, default: Any = _ABSENT) -> Reader:
    """The value at a path."""
    return lambda source: source.get(path, default)


def fixed(value: Any) -> Reader:
    """The same value for every model of the family."""
    return lambda source: value


def pair(path: str) -> Reader:
    """A height and width, given as one number or as two."""

    def reader(source: SourceModel) -> tuple[int, int]:
        value = source.get(path)
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    return reader


def has_weight(key: str) -> Reader:
    """Whether the model has this weight."""
    return lambda source: key in source.state


def rows_of(key: str) -> Reader:
    """How many outputs a linear map has, or None if the model does not have it."""
    return lambda source: source.state[key].shape[0] if key in source.state else None


def columns_of(key: str) -> Reader:
    """How many inputs a linear map has."""
    return lambda source: source.state[key].shape[1]


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelutanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "quickgelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}
"""By transformers' names, and by the classes of timm's and open_clip's modules, in small letters."""


def activation(path: str) -> Reader:
    """The nonlinearity: its name stands at the path, or a module, whose class and approximation tell it."""

    def reader(source: SourceModel) -> Activation:
        value = source.get(path)
        tanh = getattr(value, "approximate", "none") == "tanh"
        name = value if isinstance(value, str) else f"{type(value).__name__}{'_tanh' if tanh else ''}"
        if name.lower() not in _ACTIVATIONS:
            raise UnsupportedArchitectureError(
                f"The nonlinearity {name!r} is not supported; known: {sorted(_ACTIVATIONS)}."
            )
        return _ACTIVATIONS[name.lower()]

    return reader


# Statistics of pixels that preprocessing subtracts and divides by ---------------------------------------------------

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}

# A family ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A part we cannot represent: how to see it, and what to call it."""

    part: str
    present: Reader


def first_argument(cfg: ViTConfig, images: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """The images, for most modules that read them."""
    return images


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Where the source's modules stand, as dotted paths, for edits inside it; prefixes are dropped as for weights."""

    images: str
    """The module that is called with the images."""
    ln_pre: str | None = None
    """The LayerNorm before block 0, in families that can have one."""
    blocks: str
    """The list of blocks; the paths below start at one of them."""
    norm: str
    """The norm that reads the block's input first of all."""
    attention: str
    """The attention module; how its queries, keys and values are reached depends on the library."""
    mlp_out: str
    """The MLP's second linear map, which reads the neurons (`mlp.hook_post`)."""
    gated_mlp_out: str = ""
    """The same where the MLP is gated, if it has another name then."""
    read_images: Callable[..., Tensor] = first_argument
    """From the architecture and that module's arguments to the images [batch, channel, height, width]."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of a source library, as data."""

    library: str
    """transformers, timm, open_clip, or DINO's and DINOv2's own code (dino, dinov2)."""
    source_class: str
    """The class's name in that library."""
    example: str
    """A name `from_pretrained` takes."""
    config: dict[str, Reader]
    """ViTConfig field -> where the source says it."""
    weights: dict[str, Weight]
    """Our weight ("{i}" is the layer) -> how it is made. Entries the architecture does not need are not used."""
    gated_weights: dict[str, Weight] = field(default_factory=dict)
    """Entries that replace those where the MLP is gated, in families that have both."""
    sites: Sites
    """Where its modules stand."""
    preprocess: Preprocess
    """What the family's images usually go through; a checkpoint's own statement comes first."""
    at_native_size: bool = True
    """Whether those images have the size of the position embeddings. (DINOv2's: trained at 518 pixels, used at 224.)"""
    prefixes: tuple[str, ...] = ()
    """Beginnings of keys that are dropped where they occur, one after the other."""
    written_prefix: str = ""
    """What `to_state_dict` writes before the keys, but for those in `unprefixed`."""
    unprefixed: tuple[str, ...] = ()
    """Globs of keys that stand outside that prefix, as classifiers do."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions that bring older key names to the present ones."""
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """The same for weights that older checkpoints stack along their first axis: what the equal parts are called."""
    ignore: tuple[str, ...] = ()
    """Globs of source keys that do not belong to the vision transformer's forward pass."""
    refuse: tuple[Refusal, ...] = ()
    """Parts that make a model of this class unsupported."""
    described_at: str = ""
    """Path of the part of the config that describes the vision tower."""
    note: str = field(default="")
    """A remark for the table of families."""

    def of(self, cfg: ViTConfig) -> Family:
        """The family as it is for models of this architecture."""
        if not cfg.gated_mlp:
            return self
        sites = replace(self.sites, mlp_out=self.sites.gated_mlp_out or self.sites.mlp_out)
        return replace(self, weights=self.weights | self.gated_weights, sites=sites)

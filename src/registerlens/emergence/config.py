"""What a training run is: the task, the model, the optimiser; read strictly from YAML or JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from registerlens.config import ViTConfig
from registerlens.config_parts import Activation, AttentionKind
from registerlens.data.flat_content import FlatContent
from registerlens.data.synthetic import SyntheticTask
from registerlens.errors import ConfigError, close_matches

Optimiser = Literal["adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the task leaves open of the model's architecture; the defaults are those of `registerlens:tiny`."""

    n_layers: int = 6
    """Blocks."""
    d_model: int = 64
    """Width of the residual stream."""
    n_heads: int = 1
    """Heads per block."""
    d_mlp: int = 256
    """Neurons per block."""
    act_fn: Activation = "relu2"
    """The MLP's nonlinearity."""
    gated_mlp: bool = False
    """Whether another linear map multiplies it: with act_fn "silu", SwiGLU."""
    attention: AttentionKind = "softmax"
    """Softmax, or the sigmoid of every score on its own."""
    norm_after: bool = False
    """Whether what a sublayer adds is normalised first ("sandwich norm")."""
    class_token: bool = False
    """Whether there is a [CLS] token, which must report the image's labels."""
    n_trained_registers: int = 0
    """Trained registers: tokens that must report nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run; the defaults are the recipe of `registerlens:tiny`.

    Example:
        >>> config = TrainingConfig(seed=1)
        >>> config.vit_config.n_layers, config.learning_rate_at(0), config.learning_rate_at(1500)
        (6, 2e-05, 0.004)
        >>> TrainingConfig.from_dict({"stepz": 10})
        Traceback (most recent call last):
        registerlens.errors.ConfigError: Unknown key 'stepz'. Did you mean 'steps'? Known: ['batch_size', ...
    """

    seed: int = 0
    """Of the initial weights and of every batch."""
    task: SyntheticTask = field(default_factory=SyntheticTask)
    """The images and what must be reported of them."""
    model: ModelShape = field(default_factory=ModelShape)
    """The model that learns it."""
    steps: int = 3000
    """Updates."""
    batch_size: int = 64
    """Images of an update."""
    optimiser: Optimiser = "adamw"
    """AdamW, or SGD with momentum."""
    learning_rate: float = 4e-3
    """The highest one."""
    momentum: float = 0.9
    """SGD's momentum; AdamW's beta1."""
    beta2: float | None = None
    """AdamW's; None is 0.95."""
    weight_decay: float = 0.05
    """On matrices; norms and biases have none."""
    warm_up: int = 200
    """Updates over which the learning rate rises linearly."""
    decay_share: float = 0.15
    """The last share of the updates, over which it falls linearly, to a twentieth."""
    clip_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    flat_loss_until: int = 1000
    """The step by which the loss on flat patches has faded, linearly, to nothing; 0 leaves it out."""
    image_loss: float | None = None
    """Weight of the loss on [CLS], where there is one; None is 0.25."""
    log_every: int = 50
    """Updates from one row of the metrics to the next."""
    checkpoint_every: int = 100
    """Updates from one checkpoint to the next: a multiple of `log_every`."""

    def __post_init__(self) -> None:
        if isinstance(self.task.flat_content, str):
            raise ConfigError(f"flat_content is a list of kinds, got {self.task.flat_content!r}.")
        for problem in _problems(self):
            raise ConfigError(problem)
        _ = self.vit_config  # refuses an architecture that cannot be

    @property
    def vit_config(self) -> ViTConfig:
        """The architecture: the model's shape, fitted to the task's images and labels."""
        size = self.task.grid * self.task.patch
        return ViTConfig(
            **asdict(self.model),
            image_size=(size, size),
            patch_size=(self.task.patch, self.task.patch),
            pooling=(),
            d_out=self.task.n_attributes * (self.task.n_classes + 1),
        )

    @property
    def image_weight(self) -> float:
        """Weight of the loss on [CLS]; 0 without one."""
        if not self.model.class_token:
            return 0.0
        return 0.25 if self.image_loss is None else self.image_loss

    def flat_weight_at(self, step: int) -> float:
        """Weight of the loss on flat patches in an update, others' being 1."""
        return max(0.0, 1 - step / self.flat_loss_until) if self.flat_loss_until else 0.0

    def learning_rate_at(self, step: int) -> float:
        """Warm-up, plateau, linear decay."""
        share = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        decaying = self.decay_share * self.steps
        if step > self.steps - decaying:
            share *= max(0.05, (self.steps - step) / decaying)
        return self.learning_rate * share

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The inverse of `to_dict`; what is not there keeps its default.

        Raises:
            ConfigError: a key is unknown, a value is of the wrong kind, or two contradict each other.
        """
        return _read(cls, values, "")

    @classmethod
    def from_file(cls, path: str | Path) -> TrainingConfig:
        """A YAML or JSON file.

        Raises:
            ConfigError: it cannot be read, a key stands there twice, or as `from_dict`; the message names the file.
        """
        try:
            values = yaml.load(Path(path).read_text(), Loader=_EachKeyOnce)
            if not isinstance(values, Mapping | None):
                raise ConfigError(f"The file holds {type(values).__name__} instead of keys with values.")
            return cls.from_dict(values or {})
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be read: {error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"'{path}' is neither YAML nor JSON: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"'{path}': {error}") from error


def _problems(config: TrainingConfig) -> list[str]:
    """What is out of range or contradicts itself, in words."""
    task, model = config.task, config.model
    patches, roles = task.grid**2, task.n_types + task.n_triggers + task.flats[1]
    decay = config.decay_share * config.steps
    wrong = {
        f"decay_share must be 0 to 1, got {config.decay_share}.": not 0 <= config.decay_share <= 1,
        f"flats must be 0 or more, the fewest first, got {list(task.flats)}.": not 0 <= task.flats[0] <= task.flats[1],
        f"{task.n_types} keys, {task.n_triggers} triggers and {task.flats[1]} flat patches are more than the {patches} "
        f"patches of a grid of {task.grid}.": roles > patches,
        f"flat_content must be some of {list(get_args(FlatContent))}, got {list(task.flat_content)}.": (
            not task.flat_content or not set(task.flat_content) <= set(get_args(FlatContent))
        ),
        f"steps {config.steps} leave no plateau between warm_up {config.warm_up} and a decay over {decay:.0f} steps.": (
            config.warm_up + decay > config.steps
        ),
        f"checkpoint_every {config.checkpoint_every} must be a multiple of log_every {config.log_every}.": (
            config.log_every > 0 and config.checkpoint_every % config.log_every != 0
        ),
        f"optimiser must be one of {list(get_args(Optimiser))}, got {config.optimiser!r}.": (
            config.optimiser not in get_args(Optimiser)
        ),
        "beta2 means nothing with the optimiser 'sgd'. Leave one of them out.": (
            config.optimiser == "sgd" and config.beta2 is not None
        ),
        "image_loss is the loss on [CLS], but class_token is off. Leave out image_loss, or set class_token.": (
            config.image_loss is not None and not model.class_token
        ),
    }
    counts = {name: getattr(config, name) for name in ("steps", "batch_size", "log_every", "checkpoint_every")}
    counts |= {name: getattr(task, name) for name in ("grid", "patch", "n_attributes", "n_classes", "n_types")}
    wrong |= {f"{name} must be at least 1, got {value}.": value < 1 for name, value in counts.items()}
    sizes = {name: getattr(config, name) for name in ("seed", "warm_up", "weight_decay", "flat_loss_until")}
    sizes |= {name: getattr(task, name) for name in ("n_triggers", "noise", "flat_noise")}
    sizes |= {"image_loss": config.image_weight}
    wrong |= {f"{name} must be at least 0, got {value}.": not value >= 0 for name, value in sizes.items()}
    rates = {name: getattr(config, name) for name in ("learning_rate", "clip_norm")}
    wrong |= {f"{name} must be above 0, got {value}.": not 0 < value < math.inf for name, value in rates.items()}
    decays = {"momentum": config.momentum, "beta2": config.beta2 or 0.0}
    wrong |= {
        f"{name} must be at least 0 and below 1, got {value}.": not 0 <= value < 1 for name, value in decays.items()
    }
    return [problem for problem, holds in wrong.items() if holds]


# Reading -------------------------------------------------------------------------------------------------------------


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ConfigError(f"The key {name!r} stands there twice, again in line {line}. Leave one of them out.")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read(cls: Any, values: Any, where: str) -> Any:
    """A dataclass from JSON-ready values, each key known and each value of its kind."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.rstrip('.')} must hold keys with values, got {values!r}.")
    known, kinds = sorted(item.name for item in fields(cls)), get_type_hints(cls)
    for key in values:
        if key not in known:
            matches = close_matches(str(key), known)
            raise ConfigError(f"Unknown key {where + str(key)!r}.{matches} Known: {known}.")
    return cls(**{key: _value(kinds[key], value, where + key) for key, value in values.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """A value as its field wants it; YAML reads 4e-3 as text, and knows no tuples."""
    options = [one for one in get_args(kind) if one is not type(None)]
    if type(None) in get_args(kind):
        return None if value is None else _value(options[0], value, name)
    if is_dataclass(kind):
        return _read(kind, value, f"{name}.")
    if get_origin(kind) is Literal:
        if value not in options:
            raise ConfigError(f"{name} must be one of {options}, got {value!r}.{close_matches(str(value), options)}")
        return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        if Ellipsis not in options and len(value) != len(options):
            raise ConfigError(f"{name} must hold {len(options)} values, got {list(value)}.")
        return tuple(_value(options[0], item, name) for item in value)
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    fits = get_origin(kind) or kind
    if not isinstance(value, fits) or (isinstance(value, bool) and fits is not bool):
        raise ConfigError(f"{name} must be of the kind {fits.__name__}, got {value!r}.")
    return value

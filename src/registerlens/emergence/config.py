"""What a training run is: the task, the model, the optimiser; read strictly from YAML or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import yaml
from pydantic import Field, model_validator

from registerlens.config_parts import Activation, AttentionKind
from registerlens.data.synthetic_task import SyntheticTask
from registerlens.errors import ConfigError, close_matches
from registerlens.markup import asset
from registerlens.settings import READ, AboveZero, AtLeastZero, Count, Expected, Flag, Index, Settings

if TYPE_CHECKING:
    from registerlens.config import ViTConfig

Decay = Annotated[float, Field(strict=True, ge=0, lt=1), READ, Expected("at least 0 and below 1")]
Share = Annotated[float, Field(strict=True, ge=0, le=1), READ, Expected("0 to 1")]


class ModelShape(Settings):
    """What the task leaves open of the model's architecture; the defaults are those of `registerlens:tiny`."""

    n_layers: Count = 6
    """Blocks."""
    d_model: Count = 64
    """Width of the residual stream."""
    n_heads: Count = 1
    """Heads per block."""
    d_mlp: Count = 256
    """Neurons per block."""
    act_fn: Activation = "relu2"
    """The MLP's nonlinearity."""
    gated_mlp: Flag = False
    """Whether another linear map multiplies it: with act_fn "silu", SwiGLU."""
    attention: AttentionKind = "softmax"
    """Softmax, or the sigmoid of every score on its own."""
    norm_after: Flag = False
    """Whether what a sublayer adds is normalised first ("sandwich norm")."""
    class_token: Flag = False
    """Whether there is a [CLS] token, which must report the image's labels."""
    n_trained_registers: Index = 0
    """Trained registers: tokens that must report nothing."""


class TrainingConfig(Settings):
    """A training run; the defaults are the recipe of `registerlens:tiny`.

    Example:
        >>> config = TrainingConfig(seed=1)
        >>> config.vit_config.n_layers, config.learning_rate_at(0), config.learning_rate_at(1500)
        (6, 2e-05, 0.004)
        >>> TrainingConfig(stepz=10)
        Traceback (most recent call last):
        registerlens.errors.ConfigError: Unknown key 'stepz'. Did you mean 'steps'? Keys here: seed, task, model, ...
    """

    seed: Index = 0
    """Seed of the initial weights and of every batch."""
    task: SyntheticTask = SyntheticTask()
    """The images and what must be reported of them."""
    model: ModelShape = ModelShape()
    """The model that learns it."""
    steps: Count = 3000
    """Updates."""
    batch_size: Count = 64
    """Images of an update."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    learning_rate: AboveZero = 4e-3
    """The highest one."""
    momentum: Decay = 0.9
    """SGD's momentum; AdamW's beta1."""
    beta2: Annotated[Decay | None, READ] = None
    """AdamW's; None is 0.95."""
    weight_decay: AtLeastZero = 0.05
    """On matrices; norms and biases have none."""
    warm_up: Index = 200
    """Updates over which the learning rate rises linearly."""
    decay_share: Share = 0.15
    """The last share of the updates, over which it falls linearly, to a twentieth."""
    clip_norm: AboveZero = 1.0
    """Gradients longer than this are shortened to it."""
    flat_loss_until: Index = 1000
    """The step by which the loss on flat patches has faded, linearly, to nothing; 0 leaves it out."""
    image_loss: Annotated[AtLeastZero | None, READ] = None
    """Weight of the loss on [CLS], where there is one; None is 0.25."""
    log_every: Count = 50
    """Updates from one row of the metrics to the next."""
    checkpoint_every: Count = 100
    """Updates from one checkpoint to the next: a multiple of `log_every`."""

    @property
    def vit_config(self) -> ViTConfig:
        """The architecture: the model's shape, fitted to the task's images and labels."""
        from registerlens.config import ViTConfig  # torch, which wrong keys need not wait for

        size = self.task.grid * self.task.patch
        return ViTConfig(
            **dict(self.model),
            image_size=(size, size),
            patch_size=(self.task.patch, self.task.patch),
            pooling=(),
            d_out=self.task.n_attributes * (self.task.n_classes + 1),
            n_label_sets=self.task.n_attributes,
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

    @model_validator(mode="after")
    def _check_agreement(self) -> TrainingConfig:
        """What contradicts itself is refused, and an architecture that cannot be."""
        decay = self.decay_share * self.steps
        wrong = {
            f"steps {self.steps} leave no plateau between warm_up {self.warm_up} and a decay over {decay:.0f} steps.": (
                self.warm_up + decay > self.steps
            ),
            f"checkpoint_every {self.checkpoint_every} must be a multiple of log_every {self.log_every}.": (
                self.checkpoint_every % self.log_every != 0
            ),
            "beta2 means nothing with the optimiser 'sgd'. Leave one of them out.": (
                self.optimiser == "sgd" and self.beta2 is not None
            ),
            "image_loss is the loss on [CLS], but class_token is off. Leave out image_loss, or set class_token.": (
                self.image_loss is not None and not self.model.class_token
            ),
        }
        if any(wrong.values()):
            raise ValueError(" ".join(problem for problem, holds in wrong.items() if holds))
        _ = self.vit_config
        return self


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe: what it asks, and how it trains."""

    name: str
    """As in the tables."""
    question: str
    """The question that it answers."""
    config: TrainingConfig
    """The training; the seed is 0."""


NO_SETTING = ("seed", "log_every", "checkpoint_every")
"""What changes nothing of a recipe."""
RECIPES: dict[str, Recipe] = {
    name: Recipe(name=name, question=changes.pop("question"), config=TrainingConfig.model_validate(changes))
    for name, changes in yaml.safe_load(str(asset("recipes.yaml"))).items()
}
"""By name; `registerlens emerge --recipe NAME --seed N` trains one."""


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: there is none.

    Example:
        >>> recipe("swiglu").config.model.gated_mlp
        True
    """
    if name not in RECIPES:
        raise ConfigError(f"There is no recipe {name!r}.{close_matches(name, RECIPES)} There are: {list(RECIPES)}.")
    return RECIPES[name]


def recipe_of(config: TrainingConfig) -> Recipe | None:
    """The recipe that a run follows, whatever its seed and what it keeps on the way; None where it follows none.

    Example:
        >>> recipe_of(TrainingConfig(seed=3)).name, recipe_of(TrainingConfig(steps=500))
        ('default', None)
    """
    plain = TrainingConfig()
    same = config.changed(**{name: getattr(plain, name) for name in NO_SETTING})
    return next((known for known in RECIPES.values() if known.config == same), None)

"""Named recipes of the research on what makes register neurons appear: the default one, changed in one respect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from registerlens.emergence.config import TrainingConfig
from registerlens.errors import ConfigError, close_matches


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe: what it asks, and how it trains."""

    name: str
    """As in the tables."""
    question: str
    """What it is there to find out."""
    config: TrainingConfig
    """The training; the seed is 0."""


def _model(**changes: Any) -> dict[str, Any]:
    return {"model": changes}


def _flats(*content: str) -> dict[str, Any]:
    return {"task": {"flat_content": list(content)}}


NO_SETTING = ("seed", "log_every", "checkpoint_every")
"""What changes nothing of a recipe."""
_ALL = ("gradient", "soft_noise", "photographs")
_LONGER = {"steps": 6000}

RECIPES: dict[str, Recipe] = {
    name: Recipe(name=name, question=question, config=TrainingConfig.model_validate(changes))
    for name, question, changes in (
        ("default", "How often and how cleanly does it emerge?", {}),
        (
            "gelu-2e-3",
            "GELU, twice as long: half the learning rate",
            _model(act_fn="gelu") | _LONGER | {"learning_rate": 2e-3},
        ),
        ("gelu-4e-3", "GELU, twice as long: the same learning rate", _model(act_fn="gelu") | _LONGER),
        ("swiglu", "SwiGLU of as many weights", _model(act_fn="silu", gated_mlp=True, d_mlp=172)),
        ("cls", "A [CLS] token with a label of its own: where do outliers go?", _model(class_token=True)),
        ("registers", "4 trained registers: where do outliers go?", _model(n_trained_registers=4)),
        ("gradients", "Flat patches show a ramp: is it overwritten?", _flats("gradient")),
        ("soft-noise", "Flat patches show soft noise: is it overwritten?", _flats("soft_noise")),
        ("photographs", "Flat patches show backgrounds of photographs: are they overwritten?", _flats("photographs")),
        ("mixed", "Flat patches show ramps, soft noise and backgrounds", _flats(*_ALL)),
        ("mixed-long", "The same, longer", _flats(*_ALL) | {"steps": 5000}),
        ("deep", "8 blocks: does the onset move to mid-depth?", _model(n_layers=8)),
        ("no-look-up", "Control: no patch needs another one", {"task": {"n_triggers": 0}}),
        ("sigmoid", "Control: attention that need not sum to 1", _model(attention="sigmoid")),
        ("sigmoid-long", "The same, longer", _model(attention="sigmoid") | {"steps": 8000}),
        ("sandwich", "Control: norms after the sublayers too", _model(norm_after=True)),
        ("sgd", "Control: SGD with momentum", {"optimiser": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4}),
        ("no-decay", "Control: no weight decay", {"weight_decay": 0.0}),
    )
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
    return next((one for one in RECIPES.values() if one.config == same), None)

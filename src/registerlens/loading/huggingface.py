"""How transformers' folders and hub repositories are read: which class, which tower, which preprocessing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from registerlens.config import Preprocess
from registerlens.errors import ConfigError, UnsupportedArchitectureError
from registerlens.files import read_json
from registerlens.loading import hf_clip, hf_dino, hf_vit
from registerlens.loading.family import Family


def _declared(module: ModuleType) -> Iterator[Family]:
    """The families that a module declares, alone or in tuples, in their order."""
    for value in vars(module).values():
        declared = value if isinstance(value, tuple) else (value,)
        yield from (family for family in declared if isinstance(family, Family))


FAMILIES = (*_declared(hf_vit), *_declared(hf_clip), *_declared(hf_dino))


TOWERS = frozenset(
    {"llava", "llava_next", "llava_onevision", "vipllava", "paligemma", "internvl", "gemma3", "aya_vision"}
)
"""model_type of models of images and texts; which family their tower is of, its own configuration says."""
_TOWER_PREFIXES = ("model.vision_tower.", "vision_tower.")
"""How the tower's keys begin, by the version of transformers that wrote them."""


Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic"]
_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_config(fetch: Callable[[str], Path | None]) -> tuple[str, Any]:
    """The class a checkpoint was saved from, and its config object.

    Args:
        fetch: file name -> local path, or None where the checkpoint has no such file.

    Raises:
        UnsupportedArchitectureError: the configuration is not that of a model transformers knows.
    """
    from transformers import AutoConfig  # slow to import

    path = fetch("config.json")
    if path is None:
        raise UnsupportedArchitectureError(
            "The checkpoint has no config.json, so its architecture is unknown."
            " Put it beside the weights, or give the weight file with family=."
        )
    raw = read_json(path)
    try:
        config = AutoConfig.for_model(raw.get("model_type", ""), **{k: v for k, v in raw.items() if k != "model_type"})
    except (ValueError, KeyError) as error:
        raise UnsupportedArchitectureError(
            f"config.json says model_type={raw.get('model_type')!r}, which this version of transformers does not know. "
            f"Remote code is never run."
            " Update transformers, or load the model yourself and use from_module."
        ) from error
    classes = raw.get("architectures") or [_base_class(config)]
    return classes[0], config


def find_tower(config: Any) -> tuple[str, Any, tuple[str, ...]] | None:
    """The class, the configuration and the beginnings of keys of the vision tower inside a larger model, or None."""
    if config.model_type not in TOWERS:
        return None
    return _base_class(config.vision_config), config.vision_config, _TOWER_PREFIXES


def _base_class(config: Any) -> str:
    """The class that transformers' AutoModel makes of a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # slow to import

    name = MODEL_MAPPING_NAMES.get(config.model_type, config.model_type)
    return name if isinstance(name, str) else name[0]


def read_preprocess(fetch: Callable[[str], Path | None], family: Family) -> Preprocess | None:
    """The steps that a checkpoint's image processor describes, or None if it has none.

    Raises:
        ConfigError: a step we cannot reproduce.
    """
    if (path := fetch("preprocessor_config.json")) is not None:
        raw = read_json(path)
    elif (path := fetch("processor_config.json")) is not None:  # transformers 5 nests it where there is a text side
        raw = read_json(path).get("image_processor", {})
    else:
        return None
    raw = {name: value for name, value in raw.items() if value is not None}  # null is as if it were not there
    usual = family.preprocess
    resampling = raw.get("resample")
    if not raw.get("do_resize", True) or resampling not in (None, *_RESAMPLING):
        step = "do_resize=false" if not raw.get("do_resize", True) else f"resample={resampling}"
        raise ConfigError(f"'{path}' asks for {step}, which cannot be reproduced. Change that line to load the model.")
    target, fit = _target(raw.get("size"), usual, path)
    crop = raw.get("crop_size") if raw.get("do_center_crop", bool(raw.get("crop_size"))) else None
    mean, std = (0.0,) * 3, (1.0,) * 3
    if raw.get("do_normalize", True):
        mean, std = tuple(raw.get("image_mean") or usual.mean), tuple(raw.get("image_std") or usual.std)
    # Ours divides by 255 first; another factor is the same steps with other statistics.
    factor = 255 * raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 255.0
    return Preprocess(
        resize=target,
        fit=fit,
        crop=_target(crop, usual, path)[0] if crop else (target if fit == "cover" else None),
        arithmetic="transformers",
        interpolation=usual.interpolation if resampling is None else _RESAMPLING[resampling],
        mean=tuple(value / factor for value in mean),
        std=tuple(value / factor for value in std),
    )


def _target(size: Any, usual: Preprocess, path: Path) -> tuple[tuple[int, int], Literal["cover", "exact"]]:
    if size is None:
        return usual.resize, usual.fit
    if isinstance(size, int):
        return (size, size), usual.fit
    size = {side: value for side, value in size.items() if value is not None}
    if set(size) == {"shortest_edge"}:
        return (size["shortest_edge"],) * 2, "cover"
    if set(size) == {"height", "width"}:
        return (size["height"], size["width"]), "exact"
    raise ConfigError(f"'{path}' asks for size={size}, which cannot be reproduced. Change it to load the model.")

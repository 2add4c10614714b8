"""From a module of a source library to its family and to a HookedViT, and back to that library's weights."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from registerlens.config import Preprocess, ViTConfig
from registerlens.errors import UnsupportedArchitectureError
from registerlens.loading import open_clip, timm, torch_hub
from registerlens.loading.checkpoints import WRAPPERS, without_wrappers
from registerlens.loading.family import Family, SourceModel
from registerlens.loading.keymap import build, describe, export
from registerlens.loading.registry import FAMILIES, listing_families, named_family, parts_of_module, unsupported
from registerlens.model.vit import HookedViT


@listing_families()
def from_module(module: nn.Module, preprocess: Preprocess | None = None) -> HookedViT:
    """A hooked copy of a transformers, timm or open_clip ViT; later changes to the module do not reach it.

    Args:
        module: an instance of a class listed by `registerlens models`, or any model that holds exactly one, as LLaVA;
            of CLIP and other models of images and texts, the vision part is taken. What torch.compile or parallel
            training wrapped around it is taken off.
        preprocess: what `load_images` shall do; default: what the module says, else its family's usual steps.

    Raises:
        UnsupportedArchitectureError: of another class; the message says which part is in the way.
        WeightsError: the weights do not fit, or adapters (PEFT, LoRA) are not merged into them.

    Example:
        >>> import transformers, registerlens as rl
        >>> config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                                    image_size=28)
        >>> rl.HookedViT.from_module(transformers.Dinov2Model(config)).cfg.grid
        (2, 2)
    """
    name = f"{library_of(module)}'s {type(module).__name__}"
    module = vision_part(module)
    if _family(module) is None:
        module, family = _only_tower(module)
        name = f"{family.library}'s {family.source_class} in {name}"
    state = {key: tensor.detach().clone() for key, tensor in without_wrappers(module.state_dict()).items()}
    return hooked(module, state, name, preprocess)


_LIBRARIES = {"vision_transformer": "dino"}
"""Packages that are not called what their library is: DINO's repository has its modules at the top."""


def library_of(module: nn.Module) -> str:
    """The source library a module's code belongs to."""
    package = type(module).__module__.split(".")[0]
    return _LIBRARIES.get(package, package)


def hooked(
    module: nn.Module, state: Mapping[str, Tensor], name: str, preprocess: Preprocess | None = None
) -> HookedViT:
    """The module's architecture with these weights.

    Raises:
        UnsupportedArchitectureError: the module is of no supported family, or has a part that is not.
        WeightsError: the weights do not fit.
    """
    family = family_of(module)
    reader: Callable[[Any], Preprocess | None] | None = _MODULE_PREPROCESS.get(family.library)
    if preprocess is None and reader is not None:
        preprocess = reader(module)
    return build(family, _source(module, state), name, preprocess)


_CLASS_NAMES: dict[tuple[str, str], Callable[[Any], str]] = {
    ("open_clip", open_clip.WRAPPER): open_clip.name_of_wrapper,
    ("dinov2", torch_hub.DINOV2.source_class): torch_hub.class_name,
}
"""Classes that stand for several families, and how a module says which."""


def family_of(module: nn.Module) -> Family:
    """The family of a module.

    Raises:
        UnsupportedArchitectureError: it has none.
    """
    family = _family(module)
    if family is None:
        raise _refusal(module)
    return family


def _refusal(module: nn.Module) -> UnsupportedArchitectureError:
    return unsupported(f"{type(module).__module__}.{type(module).__name__}", parts_of_module(module))


def _family(module: nn.Module) -> Family | None:
    library, name = library_of(module), type(module).__name__
    return FAMILIES.get((library, _CLASS_NAMES.get((library, name), lambda _: name)(module)))


def _source(module: nn.Module, state: Mapping[str, Tensor]) -> SourceModel:
    return SourceModel(module.config if library_of(module) == "transformers" else module, state)


@listing_families()
def find_vision(module: nn.Module) -> tuple[nn.Module, Family, ViTConfig]:
    """The vision transformer in a module, the family it belongs to, and its architecture; no weight is copied.

    Args:
        module: it, or any model that holds exactly one (CLIP, LLaVA, a classifier, a wrapper).

    Returns:
        the module that the family's `sites` start from, the family as it is for this architecture, and that.

    Raises:
        UnsupportedArchitectureError: the module holds none of a supported family, or several.
    """
    part, family = _only_tower(module)
    cfg, _ = describe(family, _source(part, part.state_dict()), f"{family.library}'s {family.source_class}")
    for prefix in family.prefixes:
        part = getattr(part, prefix.removesuffix("."), part)
    return part, family.of(cfg), cfg


def _only_tower(module: nn.Module) -> tuple[nn.Module, Family]:
    """The one instance of a supported class in a module, and its family."""
    towers: dict[str, tuple[nn.Module, Family]] = {}
    for name, part in module.named_modules():
        family = _family(part)
        if family is not None and not any(f"{name}.".startswith(f"{outer}." if outer else "") for outer in towers):
            towers[name] = part, family
    if not towers:
        raise _refusal(module)
    if len(towers) > 1:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} holds several vision transformers: {sorted(towers)}. Take one of them."
        )
    [tower] = towers.values()
    return tower


def to_state_dict(vit: HookedViT, family: str) -> dict[str, Tensor]:
    """A model's weights under the names of a source library's class, to be loaded there: bit for bit what was read.

    Args:
        vit: the model; its architecture must be one that the class can have.
        family: "transformers:Dinov2Model", or the class alone where only one library has it; see `named_family`.

    Returns:
        source key -> tensor. Keys that the class has but does not use for images (mask tokens, a text tower) are not
        in it: load with `strict=False` where it has such keys.

    Raises:
        ModelNotFoundError: there is no such family.
        WeightsError: the class has no place for one of the weights, or reads several of its own as one.

    Example:
        >>> import transformers, registerlens as rl
        >>> config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                                    image_size=28)
        >>> model = transformers.Dinov2Model(config)
        >>> state = rl.HookedViT.from_module(model).to_state_dict("Dinov2Model")
        >>> model.load_state_dict(state, strict=False)
        _IncompatibleKeys(missing_keys=['embeddings.mask_token'], unexpected_keys=[])
    """
    return export(named_family(family), vit)


_MODULE_PREPROCESS: dict[str, Callable[[Any], Preprocess | None]] = {
    "timm": timm.read_preprocess,
    "open_clip": open_clip.read_preprocess,
}


def vision_part(module: nn.Module) -> nn.Module:
    """A module without what was wrapped around it, and an open_clip model's vision tower; anything else as it is."""
    while len(inside := dict(module.named_children())) == 1 and WRAPPERS.issuperset(inside):
        [module] = inside.values()
    visual = getattr(module, "visual", None)
    return vision_part(visual) if library_of(module) == "open_clip" and isinstance(visual, nn.Module) else module

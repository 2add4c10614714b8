"""RegisterLens's own folder format: config.json and model.safetensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from registerlens.config import Preprocess, ViTConfig
from registerlens.errors import ConfigError, WeightsError
from registerlens.files import read_json, whole_file
from registerlens.loading.checkpoints import read_weights
from registerlens.loading.sources import FORMAT
from registerlens.model.vit import HookedViT


def save(vit: HookedViT, folder: Path) -> Path:
    """Write a model; both files take their places together, at the end, so that a crash leaves what was there."""
    with whole_file(folder / "config.json") as config, whole_file(folder / "model.safetensors") as weights:
        save_file(weights_of(vit), weights, metadata={"format": "pt"})
        config.write_text(json.dumps(describe(vit), indent=1) + "\n")
    return folder


def load(folder: Path, name: str | None = None) -> HookedViT:
    """Read what `save` wrote.

    Raises:
        ConfigError: the configuration is incomplete.
        WeightsError: the weights do not fit the configuration.
    """
    description = read_json(folder / "config.json")
    if lacking := {"architecture", "preprocess", "source"} - set(description):
        raise ConfigError(
            f"'{folder / 'config.json'}' lacks {sorted(lacking)}. Save the model again with save_pretrained."
        )
    state = read_weights(folder / "model.safetensors")
    return build(description | ({"source": name} if name else {}), state, f"'{folder}'")


def describe(vit: HookedViT) -> dict[str, Any]:
    """All of a model but its weights, as JSON."""
    return {
        "format": FORMAT,
        "format_version": 1,
        "source": vit.source,
        "source_keys": sorted(vit.source_keys),
        "architecture": vit.cfg.to_dict(),
        "preprocess": vit.preprocess.to_dict(),
    }


def weights_of(vit: HookedViT) -> dict[str, Tensor]:
    """A model's weights as a file takes them: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in vit.state_dict().items()}


def build(description: dict[str, Any], state: dict[str, Tensor], where: str) -> HookedViT:
    """The model of a description and its weights.

    Raises:
        WeightsError: the weights do not fit the configuration; it names `where` they are from.
    """
    cfg = ViTConfig.from_dict(description["architecture"])
    with torch.device("meta"):
        vit = HookedViT(cfg, Preprocess.from_dict(description["preprocess"]), source=description["source"])
    vit.source_keys = frozenset(description.get("source_keys", ()))
    try:
        vit.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsError(
            f"{where}: the weights do not fit the configuration: {error}. Do both belong to one model?"
        ) from error
    return vit.eval()

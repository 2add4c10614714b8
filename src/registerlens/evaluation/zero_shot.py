"""The text side of a CLIP-like model as a classifier: one direction a class, made once and kept on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from registerlens.errors import ConfigError, UnsupportedArchitectureError, check_at_least, needing
from registerlens.files import read_tensors, whole_file
from registerlens.loading.sources import network, source_of
from registerlens.progress import track

TEMPLATES = ("a photo of a {}.",)
"""The prompt of Radford et al. 2021; they average over 80 of them for ImageNet."""

Encode = Callable[[list[str]], Tensor]
"""From prompts to their features [prompt, d_out]."""


def zero_shot_head(
    name: str | Path,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    cache: str | Path | None = None,
) -> Float[Tensor, "d_out class"]:
    """Class directions from a text tower: unit vectors to be multiplied with normalised image features.

    For each class the features of all its prompts are normalised, averaged, and normalised again.

    Args:
        name: of the model as for `from_pretrained`: a transformers hub id or folder, "open_clip:MODEL/TAG", or a folder
            of open_clip's.
        class_names: one a column, in this order.
        templates: prompts, each with one "{}" for the class.
        batch_size: prompts at once.
        device: where the text tower runs; the result is on the CPU.
        cache: folder for results; default: registerlens/zero_shot in the user's cache. The same request, of the same
            weights, is answered from there.

    Raises:
        ConfigError: no classes or templates, a class given twice, or a template without exactly one "{}".
        ModelNotFoundError: no such model, or no network.
        UnsupportedArchitectureError: the model has no text side.
        MissingExtraError: open_clip is not installed.

    Source: Radford et al. 2021, section 3.1.

    With weights from the hub:

        vit = rl.HookedViT.from_pretrained("open_clip:ViT-B-16/laion2b_s34b_b88k")
        head = rl.evaluation.zero_shot_head(vit.source, ["cat", "dog"])
        logits = 100 * torch.nn.functional.normalize(vit(images), dim=-1) @ head
    """
    class_names, templates = list(class_names), list(templates)
    _check(class_names, templates, batch_size)
    source, target = source_of(name)
    if source not in _ENCODERS:
        raise UnsupportedArchitectureError(
            f"{str(name)!r} has no text side. Take a CLIP-like model of transformers or open_clip, as "
            f"'openai/clip-vit-base-patch16' or 'open_clip:ViT-B-16/laion2b_s34b_b88k'."
        )
    request = {"source": source, "weights": _identity(target), "classes": class_names, "templates": templates}
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    path = (Path(cache) if cache is not None else _default_cache()) / f"{digest[:32]}.safetensors"
    if path.is_file():
        return read_tensors(path, ("head",))["head"]
    head = _head(_ENCODERS[source](target, torch.device(device)), class_names, templates, batch_size)
    with whole_file(path) as temporary:
        save_file({"head": head}, temporary, metadata={"request": json.dumps(request)})
    return head


def _head(encode: Encode, class_names: list[str], templates: list[str], batch_size: int) -> Tensor:
    prompts = [template.format(label) for label in class_names for template in templates]
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    with torch.inference_mode():
        encoded = [encode(batch).float().cpu() for batch in track(batches, "encoding prompts", len(prompts), len)]
    features = F.normalize(torch.cat(encoded), dim=-1).unflatten(0, (len(class_names), len(templates)))
    return F.normalize(features.mean(1), dim=-1).T.contiguous().clone()


def _check(class_names: list[str], templates: list[str], batch_size: int) -> None:
    if not class_names or not templates:
        raise ConfigError(f"Give at least one class and one template, got {len(class_names)} and {len(templates)}.")
    if twice := sorted({label for label in class_names if class_names.count(label) > 1}):
        raise ConfigError(f"Class names must differ; given more than once: {twice[:5]}.")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"A template has exactly one '{{}}' for the class, got {template!r}.")
    check_at_least(1, batch_size=batch_size)


def _identity(target: str) -> list[Any]:
    """What changes when a model's weights do: its name, or of a folder each file's size and time."""
    folder = Path(target)
    if not folder.is_dir():
        return [target]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), *([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files)]


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "registerlens" / "zero_shot"


# Text towers ---------------------------------------------------------------------------------------------------------


def _transformers_encoder(target: str, device: torch.device) -> Encode:
    from transformers import AutoModel, AutoTokenizer  # slow to import

    with network(target):
        model: Any = AutoModel.from_pretrained(target)
    if not hasattr(model, "get_text_features"):
        raise UnsupportedArchitectureError(
            f"{target!r} is a {type(model).__name__}, which has no text side. Take a CLIP-like model."
        )
    with network(f"{target} (its tokenizer)"):
        tokenizer: Any = AutoTokenizer.from_pretrained(target)
    model = model.eval().to(device)
    # Padded to full length: SigLIP was trained so, and CLIP's causal attention does not see what follows the end.
    length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    def encode(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        features = model.get_text_features(**tokens.to(device))
        return features if isinstance(features, Tensor) else features.pooler_output

    return encode


def _open_clip_encoder(target: str, device: torch.device) -> Encode:
    with needing("open_clip_torch", "open-clip", f"The text side of {target!r}"):
        import open_clip  # optional dependency
    folder = Path(target).is_dir()
    name, _, tag = (f"local-dir:{target}", "", None) if folder else target.partition("/")
    with network(f"open_clip:{target}"):
        model: Any = open_clip.create_model(name, pretrained=tag, weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
    model = model.eval().to(device)
    return lambda prompts: model.encode_text(tokenizer(prompts).to(device))


_ENCODERS: dict[str, Callable[[str, torch.device], Encode]] = {
    "transformers": _transformers_encoder,
    "open_clip": _open_clip_encoder,
}

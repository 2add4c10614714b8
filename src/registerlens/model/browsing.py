"""How one finds one's way in a model: names of hook points, tab completion, what it is, what it costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from registerlens.config import Preprocess, ViTConfig
from registerlens.display import count_text, html_card, line, size_text, text_table
from registerlens.errors import HookNameError, close_matches
from registerlens.model.cache import bytes_held, dtype_text, shape_rows
from registerlens.model.names import NamesFilter, match_names, pooled
from registerlens.model.parts import tensor_hash

if TYPE_CHECKING:
    from registerlens.interventions.base import Intervention
    from registerlens.model.vit import HookedViT


@dataclass(frozen=True, kw_only=True)
class HookShape:
    """A hook point, for one image."""

    name: str
    """Its name."""
    shape: tuple[int, ...]
    """Shape of the tensor there; the first axis is the image."""
    dtype: str
    """Its number type."""
    n_bytes: int
    """Its size in memory."""
    by_default: bool
    """Whether `run_with_cache` keeps it unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """A part of the model."""

    name: str
    """"embedding" (with position embeddings and what precedes block 0), "blocks.0.attn" (with the norm before it),
    "blocks.0.mlp" (the same), ..., "ln_final", "head"."""
    parameters: int
    """How many parameters it has."""
    flops: int
    """Floating-point operations for one image; a multiplication with its addition counts as two."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelSummary:
    """What `vit.summary()` gives, for one image."""

    model: str
    """Where the model came from."""
    config: ViTConfig
    """Its architecture."""
    image_size: tuple[int, int]
    """Height and width of the image in pixels."""
    points: tuple[HookShape, ...]
    """Every hook point that is reached, in the order of the forward pass."""
    parts: tuple[ModelPart, ...]
    """The parts, in the same order."""
    weight_bytes: int
    """Memory of the weights."""
    cache_bytes: int
    """Memory of a full cache of one image (`run_with_cache` as it is); entries that share memory count once."""

    @property
    def parameters(self) -> int:
        """Numbers of the model."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward pass: matrix products, convolution, attention. Two a multiply-add."""
        return sum(part.flops for part in self.parts)

    def describe(self) -> str:
        """The totals in words."""
        kept = sum(point.by_default for point in self.points)
        height, width = self.image_size
        return (
            f"{self.model} on an image of {height} x {width} pixels ({self.config.layout(height, width).n_tokens} "
            f"tokens): {self.parameters:,} parameters ({size_text(self.weight_bytes)}), {count_text(self.flops)}FLOPs "
            f"a forward pass, {size_text(self.cache_bytes)} a full cache ({kept} of {len(self.points)} hook points; "
            f"the rest, attn.hook_result, is computed when needed)."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a hook point: name, shape, dtype, bytes, whether it is cached by default."""
        return pd.DataFrame(self.points).rename(columns={"n_bytes": "bytes"})

    def parts_to_dataframe(self) -> pd.DataFrame:
        """One row a part: name, parameters, FLOPs."""
        return pd.DataFrame(self.parts)

    def __repr__(self) -> str:
        return "\n".join([self.describe(), *(text_table(*table) for table in self._tables())])

    def _repr_html_(self) -> str:
        return html_card(type(self).__name__, words=self.describe(), tables=self._tables())

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        every = pooled({part.name: (part.parameters, part.flops) for part in self.parts})
        parts = [
            (name, f"{times(n)}{parameters:,}", f"{times(n)}{count_text(flops)}FLOPs")
            for name, n, (parameters, flops) in every
        ]
        shapes = shape_rows({point.name: (point.shape, point.dtype, point.n_bytes) for point in self.points})
        return [(("part", "parameters", "FLOPs"), parts), (("hook point", "shape", "dtype", "size"), shapes)]


def summarise(vit: HookedViT, size: tuple[int, int] | None = None) -> ModelSummary:
    """The summary of a model, without edits and hooks that are in force.

    A twin without weights is run, on PyTorch's meta device: no number is computed, and no memory taken.

    Args:
        vit: the model.
        size: height and width of the image in pixels; default: the native size.

    Raises:
        ShapeError: the image is smaller than a patch.

    Example:
        >>> import registerlens as rl
        >>> found = summarise(rl.HookedViT.from_pretrained("registerlens:tiny"))
        >>> found.parameters, found.flops, len(found.points)
        (318068, 24348672, 115)
    """
    from registerlens.model.vit import HookedViT  # the model stands on this module

    size = vit.cfg.image_size if size is None else size
    with torch.device("meta"):
        twin = HookedViT(vit.cfg).to(vit.dtype).requires_grad_(False)
        image = torch.empty(1, vit.cfg.n_channels, *size, dtype=vit.dtype)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            _, kept = twin.run_with_cache(image, return_cache_object=False)
        _, every = twin.run_with_cache(image, names_filter="*", return_cache_object=False)
    flops = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    points = tuple(
        HookShape(
            name=name,
            shape=tuple(tensor.shape),
            dtype=dtype_text(tensor),
            n_bytes=tensor.nbytes,
            by_default=name in kept,
        )
        for name, tensor in every.items()
    )
    return ModelSummary(
        model=vit.source,
        config=vit.cfg,
        image_size=size,
        points=points,
        parts=_parts(vit, lambda name: flops.get(f"HookedViT.{name}", 0), flops["Global"]),
        weight_bytes=weight_bytes(vit),
        cache_bytes=bytes_held(kept.values()),
    )


def weight_bytes(module: nn.Module) -> int:
    """Memory of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def times(n: int) -> str:
    """A factor before a number, unless it is one."""
    return f"{n} x " if n > 1 else ""


def _parts(vit: HookedViT, flops_of: Callable[[str], int], total: int) -> tuple[ModelPart, ...]:
    """Every parameter belongs to one part, and so does every operation: what is nowhere else, to the embedding."""
    homes = {}
    for layer in range(vit.cfg.n_layers):
        for kind, norm in (("attn", "ln1"), ("mlp", "ln2")):
            homes[f"blocks.{layer}.{kind}"] = tuple(f"blocks.{layer}.{name}." for name in (kind, norm, f"{norm}_post"))
    homes |= {"ln_final": ("ln_final.",), "head": ("head.",)}
    counts = dict.fromkeys(["embedding", *homes], 0)
    for name, parameter in vit.named_parameters():
        owner = next((part for part, starts in homes.items() if name.startswith(starts)), "embedding")
        counts[owner] += parameter.numel()
    flops = {part: flops_of(part) for part in homes}
    flops["embedding"] = total - sum(flops.values())
    return tuple(ModelPart(name=name, parameters=counts[name], flops=flops[name]) for name in counts)


class Identity(TypedDict):
    """What a result says of the model that it was found in."""

    model: str
    """Where the weights came from."""
    config: ViTConfig
    """The architecture."""
    fingerprint: str
    """Of the weights."""


class Browsable(HookedRootModule):
    """What a hooked model can be asked about itself."""

    cfg: ViTConfig
    """The architecture."""
    source: str
    """Where the weights came from."""
    preprocess: Preprocess
    """What `load_images` does."""
    _hashed: tuple[list[Any], str] | None = None
    edits: tuple[Intervention, ...] = ()
    """Interventions in force, in the order in which they are applied."""

    __iter__ = None  # names can be looked up, as in a cache, but a model is no sequence

    def hook_names(self, names: NamesFilter = None) -> list[str]:
        """Names of hook points, in the order of the forward pass.

        Args:
            names: a glob, an exact name, a list of those, or a function of the name; None is all.

        Raises:
            HookNameError: a name or glob matches no hook point; the message has those most like it.

        Example:
            >>> import registerlens as rl
            >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
            >>> vit.hook_names("blocks.3.mlp.*")
            ['blocks.3.mlp.hook_pre', 'blocks.3.mlp.hook_post']
        """
        return match_names(names, self.hook_dict)

    def __getitem__(self, name: str) -> HookPoint:
        """The hook point of this name; a notebook completes names here: `vit["blocks.3.<TAB>`.

        A hook point may stand wherever a name is asked for: `vit.run_with_cache(images, names_filter=vit[name])`.

        Raises:
            HookNameError: there is none.

        Example:
            >>> import registerlens as rl
            >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
            >>> vit.hook_names(vit["blocks.3.hook_resid_mid"])
            ['blocks.3.hook_resid_mid']
        """
        if name in self.hook_dict:
            return self.hook_dict[name]
        near = close_matches(str(name), self.hook_dict)
        raise HookNameError(f"There is no hook point {name!r}.{near} List them with: vit.hook_names()")

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.hook_dict)

    @property
    def identity(self) -> Identity:
        """Where the weights came from, the architecture, and the fingerprint: what every `ModelResult` keeps."""
        return Identity(model=self.source, config=self.cfg, fingerprint=self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these weights from others: a hash of names, shapes, and values in bfloat16.

        Equal for equal weights on any device, from any library, and in float32, float64 and bfloat16; a float16 copy
        rounds in another way and has its own. An edit counts once a weight rounds to another bfloat16. The hash is made
        when first asked for (half a second for ViT-L) and again once a weight was replaced or edited in place; an edit
        through `.data`, which PyTorch does not count, goes unseen.

        Example:
            >>> import torch, registerlens as rl
            >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
            >>> before = vit.fingerprint
            >>> vit.bfloat16().fingerprint == before
            True
            >>> with torch.no_grad():
            ...     _ = vit.blocks[3].mlp.b_in[5].add_(1e-3)
            >>> vit.fingerprint == before
            False
        """
        weights = self.state_dict()
        state = [(w.data_ptr(), w.dtype, None if w.is_inference() else w._version) for w in weights.values()]
        if self._hashed is None or self._hashed[0] != state:
            rounded = [(name, list(w.shape), tensor_hash(w.to(torch.bfloat16))) for name, w in weights.items()]
            self._hashed = state, hashlib.sha256(repr(rounded).encode()).hexdigest()[:16]
        return self._hashed[1]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Browsable:
        """Also what moves and casts a model, which may put other weights where the old ones were."""
        self._hashed = None
        return super()._apply(fn, recurse)

    def summary(self, size: tuple[int, int] | None = None) -> ModelSummary:
        """Hook points with shapes, parameters and FLOPs of each part, memory of a cache; for one image, nothing is run.

        Args:
            size: height and width of the image in pixels; default: the native size.

        Raises:
            ShapeError: the image is smaller than a patch.

        Example:
            >>> import registerlens as rl
            >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
            >>> print(vit.summary().describe())
            registerlens:tiny on an image of 48 x 48 pixels (36 tokens): 318,068 parameters (1.27 MB), 24.3 MFLOPs ...
        """
        return summarise(self, size)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        """What the model is, in a few lines; PyTorch's tree of modules is `torch.nn.Module.__repr__(vit)`."""
        return "\n".join([f"HookedViT: {self.source}", *(f"  {name}: {words}" for name, words in self._summary())])

    def _repr_html_(self) -> str:
        folded = "PyTorch's tree of modules", nn.Module.__repr__(self)
        return html_card(f"HookedViT: {self.source}", tables=[(("part", "what"), self._summary())], folded=folded)

    def _summary(self) -> list[tuple[str, str]]:
        cfg, layout = self.cfg, self.cfg.layout()
        weights = next(self.parameters())
        n_parameters = sum(parameter.numel() for parameter in self.parameters())
        kind = "gated MLPs of " if cfg.gated_mlp else ""
        others = [
            *(["[CLS]"] if cfg.class_token else []),
            *(["a distillation token"] if cfg.distillation_token else []),
            *([f"{cfg.n_trained_registers} trained registers"] if cfg.n_trained_registers else []),
        ]
        hooked = sum(point.has_hooks() for point in self.hook_dict.values())
        (height, width), (patch_height, patch_width) = cfg.image_size, cfg.patch_size
        return [
            (
                "blocks",
                f"{cfg.n_layers}, width {cfg.d_model}, {cfg.n_heads} head{'s' * (cfg.n_heads > 1)} of {cfg.d_head}, "
                f"{kind}{cfg.d_mlp} neurons ({cfg.act_fn})",
            ),
            (
                "images",
                f"{height} x {width} pixels in patches of {patch_height} x {patch_width}: {layout.grid_height} x "
                f"{layout.grid_width} patches, {' and '.join(others) or 'no other tokens'}",
            ),
            (
                "weights",
                f"{n_parameters:,} parameters, {size_text(weight_bytes(self))}, "
                f"{str(weights.dtype).removeprefix('torch.')} on {weights.device}",
            ),
            ("edits in force", "; ".join(line(edit) for edit in self.edits) or "none"),
            *([("hooked", f"{hooked} of {len(self.hook_dict)} hook points")] if hooked else []),
        ]

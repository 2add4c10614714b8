"""HookedViT: a vision transformer in which every intermediate has a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from registerlens.config import Preprocess, TokenLayout, ViTConfig
from registerlens.errors import ConfigError, HookNameError, ShapeError
from registerlens.model.attention import Rotary, Rotation
from registerlens.model.block import Block, require_linear_output
from registerlens.model.browsing import Browsable
from registerlens.model.cache import Cache
from registerlens.model.ends import Embedding, Head
from registerlens.model.names import NamesFilter, match_names
from registerlens.model.norms import NORMS, Norm
from registerlens.model.parts import hooks_of, listening

if TYPE_CHECKING:
    from registerlens.interventions.base import Intervention

Hook = tuple[NamesFilter, Callable[..., Any]]


class HookedViT(Browsable):
    """A pre-norm ViT with TransformerLens's hook points and API.

    Built by `from_pretrained` (a name, a folder) or `from_module` (an instance of a source library's model), or from
    a `ViTConfig` with random weights.

    Example:
        >>> import torch, registerlens as rl
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> images = torch.rand(2, 3, 48, 48)
        >>> vit(images, return_type="tokens").shape
        torch.Size([2, 36, 64])
        >>> _, cache = vit.run_with_cache(images, names_filter="blocks.*.hook_resid_post", stop_at_layer=3)
        >>> sorted(cache.keys())
        ['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post', 'blocks.2.hook_resid_post']
    """

    def __init__(self, cfg: ViTConfig, preprocess: Preprocess | None = None, source: str = "random weights") -> None:
        """Random weights; `preprocess` says what `load_images` does, `source` where the weights came from."""
        super().__init__()
        self.cfg = cfg
        self.preprocess = preprocess or Preprocess(resize=cfg.image_size, fit="exact")
        self.source = source
        self.source_keys: frozenset[str] = frozenset()  # which of a family's names its weights had, "{i}" for the layer
        self.n_test_time_registers = 0  # appended while `edit` is in force
        self.embed = Embedding(cfg)
        self.hook_patch_embed = HookPoint()  # [batch, patch, d_model]
        self.hook_embed = HookPoint()  # [batch, pos, d_model], as the two below
        self.hook_pos_embed = HookPoint()
        self.ln_pre = NORMS[cfg.norm](cfg.d_model, cfg.norm_eps) if cfg.ln_pre else None
        self.hook_tokens = HookPoint()
        self.rotary = Rotary(cfg) if cfg.rope is not None else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        final = NORMS[cfg.final_norm_kind or cfg.norm]
        self.ln_final = final(cfg.d_model, cfg.norm_eps) if cfg.final_norm else nn.Identity()
        self.head = Head(cfg)
        self.setup()
        self._hook_tables = hooks_of(self.modules())

    # Forward ---------------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Float[Tensor, "..."],
        *,
        return_type: Literal["output", "tokens"] = "output",
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        layout: TokenLayout | None = None,
    ) -> Float[Tensor, "..."]:
        """Run the model.

        Args:
            images: [batch, channel, height, width], preprocessed; any height and width of at least one patch.
                With `start_at_layer`, a residual stream [batch, pos, d_model] instead.
            return_type: "output" is what the source model returns (logits, projection or pooled token, [batch, d_out];
                [batch, pos, d_out] where nothing is pooled); "tokens" is [batch, pos, d_model] after the final norm.
            stop_at_layer: return the residual stream before this block (negative counts from the end).
            start_at_layer: treat the input as the residual stream before this block.
            layout: where the patches are in such a residual stream; default: the native size.

        Raises:
            ShapeError: the input does not fit the model, or the layer does not exist.
            ConfigError: the return type is neither of the two.
        """
        if torch.compiler.is_compiling():
            list(map(tuple, self._hook_tables))  # looked at, so that torch.compile compiles anew when hooks come and go
        start = 0 if start_at_layer is None else self._layer(start_at_layer)
        stop = self.cfg.n_layers if stop_at_layer is None else self._layer(stop_at_layer)
        if start > stop:
            raise ShapeError(
                f"start_at_layer={start_at_layer} comes after stop_at_layer={stop_at_layer}."
                " Start at the same block or an earlier one."
            )
        if return_type not in ("output", "tokens"):
            raise ConfigError(f"return_type must be 'output' or 'tokens', got {return_type!r}.")
        if start_at_layer is None:
            resid, layout = self._embed(images)
        else:
            layout = self._layout_of(images, layout)
            resid = images.to(self.dtype)
            if start < stop and listening(self.blocks[start].hook_resid_pre):  # type: ignore[arg-type]
                resid = resid.clone()  # a hook that edits in place shall not reach the caller's tensor
        for block, rotation in zip(self.blocks[start:stop], self._rotations(layout, start, stop), strict=True):
            resid = block(resid, rotation)
        if stop_at_layer is not None:
            return resid
        tokens = self.ln_final(resid)
        return tokens if return_type == "tokens" else self.head(tokens, layout)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.patch.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number type."""
        return self.embed.patch.weight.dtype

    def layout(self, images: Float[Tensor, "..."]) -> TokenLayout:
        """Which token is which for images [batch, channel, height, width] of this size, test-time registers included.

        Raises:
            ShapeError: the tensor is no batch of images this model can take.
        """
        if not isinstance(images, Tensor):
            raise ShapeError(
                f"Expected a tensor of preprocessed images, got {type(images).__name__}. "
                f"Make one with rl.load_images(paths, vit)."
            )
        if images.ndim != 4 or images.shape[1] != self.cfg.n_channels or not images.shape[0]:
            raise ShapeError(
                f"Expected images of shape [batch, {self.cfg.n_channels}, height, width], got {list(images.shape)}. "
                f"Make a batch with rl.load_images(paths, vit), or add the batch axis with images[None]."
            )
        return self.cfg.layout(images.shape[2], images.shape[3], self.n_test_time_registers)

    def _embed(self, images: Float[Tensor, "..."]) -> tuple[Float[Tensor, "batch pos d_model"], TokenLayout]:
        layout = self.layout(images)
        if not images.is_floating_point():
            raise ShapeError(
                f"Expected preprocessed images of floats, got {images.dtype}. Use rl.load_images for raw pixels."
            )
        patches = self.hook_patch_embed(self.embed.patches(images.to(self.dtype)))
        embed = self.embed.sequence(patches)
        pos = self.embed.positions(layout).expand_as(embed)
        if listening(self.hook_pos_embed):
            pos = pos.clone()  # an expanded tensor could not be edited in place
        if self.ln_pre is None:
            return self.hook_tokens(self.hook_embed(embed) + self.hook_pos_embed(pos)), layout
        if not listening(self.hook_embed, self.hook_pos_embed):
            return self.hook_tokens(self.ln_pre(embed + pos)), layout
        # The two hook points stand after ln_pre, so that they still add up to what enters block 0.
        embed, pos = self.ln_pre.shares(embed, pos)
        return self.hook_tokens(self.ln_pre.hook_normalized(self.hook_embed(embed) + self.hook_pos_embed(pos))), layout

    def _rotations(self, layout: TokenLayout, start: int, stop: int) -> list[Rotation] | list[None]:
        """How each of these blocks turns its queries and keys, where positions are rotary."""
        if self.rotary is None or start == stop:
            return [None] * (stop - start)
        return self.rotary(layout, self.embed.patch.weight)[start:stop]

    def _layer(self, layer: int) -> int:
        index = layer + self.cfg.n_layers if layer < 0 else layer
        if not 0 <= index <= self.cfg.n_layers:
            raise ShapeError(f"Layer {layer} does not exist: the model has blocks 0 to {self.cfg.n_layers - 1}.")
        return index

    def _layout_of(self, resid: Float[Tensor, "..."], layout: TokenLayout | None) -> TokenLayout:
        layout = layout or self.cfg.layout(n_test_time_registers=self.n_test_time_registers)
        expected = [layout.n_tokens, self.cfg.d_model]
        if resid.ndim != 3 or list(resid.shape[1:]) != expected:
            raise ShapeError(
                f"start_at_layer expects a residual stream of shape [batch, {expected[0]}, {expected[1]}], "
                f"got {list(resid.shape)}. For another image size pass layout=vit.layout(images)."
            )
        return layout

    # Hooks and caches ------------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedViT]:
        """Hooks for the length of a `with` block, gone afterwards, after an exception too.

        Args:
            fwd_hooks: (name, function) pairs; a name may also be a glob, a list or a function of the name. The function
                takes (tensor, hook) and returns the tensor that flows on, or None to leave it.
            bwd_hooks: the same for gradients.
            reset_hooks_end: remove them at the end.
            clear_contexts: also clear the hook points' contexts.

        Raises:
            HookNameError: a name or glob matches no hook point.

        Example:
            >>> import torch, registerlens as rl
            >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
            >>> with vit.hooks([("blocks.1.mlp.hook_post", lambda act, hook: torch.zeros_like(act))]):
            ...     out = vit(torch.rand(1, 3, 48, 48))
        """
        with super().hooks(self._expand(fwd_hooks), self._expand(bwd_hooks), reset_hooks_end, clear_contexts):
            yield self

    def _expand(self, hooks: Sequence[Hook]) -> list[tuple[str | Callable[..., Any], Callable[..., Any]]]:
        return [(name, hook) for names, hook in hooks for name in match_names(names, self.hook_dict)]

    def add_hook(self, name: NamesFilter, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """TransformerLens's `add_hook`, with globs, and a HookNameError where a name matches nothing."""
        for exact in match_names(name, self.hook_dict):
            super().add_hook(exact, hook, *args, **kwargs)

    @contextmanager
    def edit(self, *interventions: Intervention) -> Iterator[HookedViT]:
        """Interventions in force for the length of a `with` block, applied in the order given.

        What is measured inside (`run_with_cache`, `rl.trace`, further hooks) sees the edited model. Edits may be
        nested. Test-time registers stand last in the sequence, and `layout` knows of them.

        Args:
            interventions: such as `Ablate`, `MoveOutliers`, `TestTimeRegisters`, `AttentionBias`,
                `InterpolateOutliers`.

        Raises:
            InterventionError: one names a neuron, head or layer that the model does not have, or has not fired by the
                end of the block (the model was not run, or stopped before its layers).

        Example:
            >>> import torch, registerlens as rl
            >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48)
            >>> neurons = rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)])
            >>> with torch.no_grad(), vit.edit(rl.TestTimeRegisters(neurons)):
            ...     print(vit(images, stop_at_layer=2).shape)
            torch.Size([1, 37, 64])
        """
        from registerlens.interventions.base import edited  # interventions stand on the model

        before = self.edits
        with edited(self, interventions):
            self.edits = (*before, *interventions)
            try:
                yield self
            finally:
                self.edits = before

    def run_with_cache(  # type: ignore[override]
        self,
        images: Float[Tensor, "..."],
        *,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        **forward_arguments: Any,
    ) -> tuple[Float[Tensor, "..."], Cache | dict[str, Tensor]]:
        """Run the model and keep the named intermediates.

        Args:
            images: as for `forward`.
            names_filter: a name, a glob, a list of those, or a function of the name. None is every hook point but
                `attn.hook_result`, which the cache's helpers compute from `hook_z` when they need it, as in
                TransformerLens; "*" is every one.
            device: where the cache is kept; default: where the model is.
            remove_batch_dim: drop the batch axis of a batch of one.
            incl_bwd: also run backward from a one-number output and keep gradients under "<name>_grad".
            pos_slice: keep these positions only, as TransformerLens's `Slice` takes them; patch embeddings and a pooled
                output, which have no such axis, are kept whole.
            return_cache_object: an `ActivationCache`, or the plain dict under it.
            forward_arguments: `return_type`, `stop_at_layer`, `start_at_layer`, `layout`.

        Returns:
            what `forward` returns, and the cache.

        Raises:
            HookNameError: a name or glob matches no hook point, or none of them was reached.
            ShapeError: `incl_bwd` with an output of more than one number, or `remove_batch_dim` with several images.
        """
        if remove_batch_dim and len(images) != 1:
            raise ShapeError(f"remove_batch_dim needs a batch of one, got {len(images)}.")
        default = [name for name in self.hook_dict if not name.endswith("attn.hook_result")]
        names = set(match_names(default if names_filter is None else names_filter, self.hook_dict))
        without_pos = {name for name in self.hook_dict if name == "hook_patch_embed" or self._pooled(name)}
        cache: dict[str, Tensor] = {}
        fwd_hooks, bwd_hooks = [], []
        for chosen, positions in ((names - without_pos, pos_slice), (names & without_pos, None)):
            _, forward, backward = self.get_caching_hooks(
                chosen.__contains__,
                incl_bwd,
                cast(Any, device),
                remove_batch_dim=remove_batch_dim,
                cache=cache,
                pos_slice=positions,
            )
            fwd_hooks += forward
            bwd_hooks += backward
        with self.hooks(fwd_hooks, bwd_hooks):
            output = self(images, **forward_arguments)
            if incl_bwd:
                if output.numel() != 1:
                    raise ShapeError(
                        f"incl_bwd runs backward from one number, but the output has shape {list(output.shape)}. Use "
                        f"vit.hooks(bwd_hooks=...) around a loss of your own."
                    )
                output.backward()
        if not cache:
            asked = {key: value for key, value in forward_arguments.items() if key.endswith("_at_layer")}
            raise HookNameError(f"None of {sorted(names)[:3]} was reached with {asked}. Ask for blocks in between.")
        if not return_cache_object:
            return output, cache
        return output, Cache(cache, self, has_batch_dim=not remove_batch_dim)

    def _pooled(self, name: str) -> bool:
        """Whether a hook point sees what comes after pooling, or patches before there is a sequence."""
        return name.startswith("embed.") or (name.startswith("head.") and bool(self.cfg.pooling))

    # What ActivationCache's helpers ask of a model -------------------------------------------------------------------

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the output biases written before `layer` (with `mlp_input`, its attention's too).

        Raises:
            UnsupportedArchitectureError: a norm stands after the sublayers.
        """
        require_linear_output(self.cfg, "A sum of output biases")
        total = self.embed.prefix.new_zeros(self.cfg.d_model)
        for index, block in enumerate(self.blocks[: layer + mlp_input]):
            block = cast(Block, block)
            total = total + block.attn.b_O
            if include_mlp_biases and index < layer:
                total = total + block.mlp.b_out
        return total

    def tokens_to_residual_directions(self, tokens: int | Tensor) -> Float[Tensor, "*class d_model"]:
        """The directions `ActivationCache.logit_attrs` projects onto: the head's rows times the final norm's weight.

        `logit_attrs` divides by the final norm's scale only, so the norm's own weight belongs to the direction. The
        attributions of a full decomposition, at the pooled token (or their mean over patches), sum to the logit less
        its constant part, the biases of norm and head.

        Raises:
            ShapeError: the head does not read exactly one token of d_model numbers.
        """
        if self.head.linear is None or self.head.linear.in_features != self.cfg.d_model:
            raise ShapeError(
                "Class directions need a linear head over one pooled token; this model has none."
                " Project onto a direction of your own."
            )
        if self.head.attn is not None or self.head.ln is not None:
            between = "attention pooling" if self.head.attn is not None else "a norm after pooling"
            raise ShapeError(
                f"Between the tokens and the classes of this model stands {between}, so that no direction of the "
                f"residual stream belongs to a class. Use hooks on the head, or patching, instead."
            )
        directions = self.head.linear.weight[tokens]
        return directions * self.ln_final.w if isinstance(self.ln_final, Norm) else directions

    # Loading and saving ----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> HookedViT:
        """Load a model by name or from a folder; see `rl.from_pretrained` for names and options."""
        from registerlens.loading.pretrained import from_pretrained  # loading stands on the model

        return from_pretrained(name, **options)

    @classmethod
    def from_module(cls, module: nn.Module, preprocess: Preprocess | None = None) -> HookedViT:
        """A hooked copy of a transformers, timm or open_clip ViT; see `rl.from_module`."""
        from registerlens.loading.modules import from_module

        return from_module(module, preprocess)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors, which `from_pretrained(folder)` reads back; returns the folder."""
        from registerlens.loading.native import save

        return save(self, Path(folder))

    def to_state_dict(self, family: str) -> dict[str, Tensor]:
        """The weights under a source library's names; see `rl.loading.to_state_dict`."""
        from registerlens.loading.modules import to_state_dict

        return to_state_dict(self, family)

    def fold_layer_norm(self) -> HookedViT:
        """A new, equivalent model whose norms are folded into the weights that read them; see `model.folding`."""
        from registerlens.model.folding import fold_layer_norm  # it stands on this class

        return fold_layer_norm(self)

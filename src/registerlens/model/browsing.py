"""How one finds one's way in a model: names of hook points, tab completion, what it is, what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from registerlens.config import Preprocess, ViTConfig
from registerlens.display import html_card, line, size_told
from registerlens.errors import HookNameError, close_matches
from registerlens.model.names import NamesFilter, match_names
from registerlens.model.summary import ModelSummary, summarise, weight_bytes

if TYPE_CHECKING:
    from registerlens.interventions.base import Intervention


class Browsable(HookedRootModule):
    """What a hooked model can be asked about itself."""

    cfg: ViTConfig
    """The architecture."""
    source: str
    """Where the weights came from."""
    preprocess: Preprocess
    """What `load_images` does."""
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
        return "\n".join([f"HookedViT: {self.source}", *(f"  {name}: {words}" for name, words in self._told())])

    def _repr_html_(self) -> str:
        folded = "PyTorch's tree of modules", nn.Module.__repr__(self)
        return html_card(f"HookedViT: {self.source}", tables=[(("part", "what"), self._told())], folded=folded)

    def _told(self) -> list[tuple[str, str]]:
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
                f"{n_parameters:,} parameters, {size_told(weight_bytes(self))}, "
                f"{str(weights.dtype).removeprefix('torch.')} on {weights.device}",
            ),
            ("edits in force", "; ".join(line(edit) for edit in self.edits) or "none"),
            *([("hooked", f"{hooked} of {len(self.hook_dict)} hook points")] if hooked else []),
        ]

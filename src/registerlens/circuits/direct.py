"""What heads and neurons write directly into [CLS], or into what is pooled, along a direction."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.analysis.detection import Detection, detect
from registerlens.circuits.readings import Direction, Readout, Space, pool_weights
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import batches
from registerlens.model.block import Block, require_linear_output
from registerlens.model.norms import Norm
from registerlens.model.parts import at_least_float32, token_norms
from registerlens.model.vit import HookedViT
from registerlens.results import ModelResult
from registerlens.stats.moments import Moments

KEYS = (
    "[CLS]",
    "other prefix tokens",
    "trained registers",
    "outliers",
    "other patches",
    "test-time registers",
    "keys without a token",
)
"""What a head may attend to; the last is an attention bias."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectContributions(ModelResult):
    """A projection of the model's output as a sum over what each component writes; means over images.

    Everything is in the unit of the projection: logits for a class. The final norm divides by the scale it has in the
    whole run, which is held fixed, so that the parts add up.
    """

    direction: str
    """What is projected on, and where it is read."""
    detection: Detection
    """Which patches are outliers."""
    n_images: int
    """Images that went through."""
    value: float
    """The projection, before a tanh where the model has one."""
    embedding: float
    """Contribution of patch embeddings, [CLS] and other learned tokens."""
    position: float
    """Contribution of position embeddings."""
    constant: float
    """Contribution of the biases of the final norm and the head."""
    attn_bias: Float[np.ndarray, " layer"]
    """Contribution of each attention's output bias."""
    mlp_bias: Float[np.ndarray, " layer"]
    """Contribution of each MLP's output bias."""
    heads: Float[np.ndarray, "layer head"]
    """Contribution of each head, its value bias included."""
    heads_error: Float[np.ndarray, "layer head"]
    """Standard error; NaN for one image."""
    neurons: Float[np.ndarray, "layer neuron"]
    """Contribution of each neuron."""
    neurons_error: Float[np.ndarray, "layer neuron"]
    """Standard error; NaN for one image."""
    by_key: Float[np.ndarray, "key layer head"]
    """Each head's part by what it attends to, in the order of KEYS; NaN where a norm before W_O mixes heads."""
    remainder: float
    """The projection less all parts."""
    largest_remainder: float
    """The largest such difference, in magnitude, of an image: rounding, unless an edit writes into the stream."""

    def top(self, k: int = 10) -> pd.DataFrame:
        """The heads and neurons with the largest contributions in magnitude; columns as in `to_dataframe`."""
        table = self.to_dataframe()
        table = table[table["component"].isin(["head", "neuron"])]
        order = np.argsort(-np.abs(np.asarray(table["contribution"])), kind="stable")[:k]
        return table.iloc[order].reset_index(drop=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a component: component, layer and index (-1 where it has none), contribution, standard error."""
        single = ("embedding", "position", "constant", "remainder")
        parts: list[tuple[str, Any, Any]] = [
            ("head", self.heads, self.heads_error),
            ("neuron", self.neurons, self.neurons_error),
            ("attention bias", self.attn_bias, np.nan),
            ("MLP bias", self.mlp_bias, np.nan),
            *((name, np.array(getattr(self, name)), np.nan) for name in single),
        ]
        tables = []
        for name, values, error in parts:
            where = [axis.ravel() for axis in np.indices(values.shape)] + [np.array(-1)] * (2 - values.ndim)
            columns = {"component": name, "layer": where[0], "index": where[1], "contribution": values.ravel()}
            tables.append(pd.DataFrame(columns | {"standard_error": np.ravel(error) if values.ndim == 2 else error}))
        return pd.concat(tables, ignore_index=True)

    def describe(self) -> str:
        """The result in words."""
        biases = self.attn_bias.sum() + self.mlp_bias.sum() + self.constant
        sentences = [
            f"{self.direction[0].upper()}{self.direction[1:]} is {self.value:.4g} (mean of {self.n_images} images): "
            f"heads {self.heads.sum():+.3g}, neurons {self.neurons.sum():+.3g}, embeddings "
            f"{self.embedding + self.position:+.3g}, biases {biases:+.3g}; left over {self.remainder:+.1e}, at most "
            f"{self.largest_remainder:.1e} in an image."
        ]
        for kind in ("head", "neuron"):
            table = self.top(self.heads.size + self.neurons.size)
            table = table[table["component"] == kind].head(3)
            named = ", ".join(
                f"{layer}.{index} ({value:+.3g})"
                for layer, index, value in zip(table["layer"], table["index"], table["contribution"], strict=True)
            )
            sentences.append(f"Largest {kind}s (block.{kind}): {named}.")
        if np.isnan(self.by_key).any():
            sentences.append("Heads are not split by what they attend to: a norm before W_O mixes them.")
        else:
            sums = self.by_key.sum((1, 2))
            sentences.append(
                "By what heads attend to: " + ", ".join(f"{n} {v:+.3g}" for n, v in zip(KEYS, sums, strict=True) if v)
            )
            sentences[-1] += "."
        return " ".join(sentences)

    plot = drawn_by("heads.direct_figure")
    """Contributions layer by layer, the heads' map, and the largest neurons."""


def direct_contributions(
    vit: HookedViT,
    images: Images,
    direction: Direction,
    *,
    space: Space | None = None,
    detection: Detection | None = None,
    batch_size: int = 16,
) -> DirectContributions:
    """Take the model's output along a direction apart: into heads, neurons, embeddings and biases, exactly.

    The stream that enters the final norm is the sum of what components wrote. With the scale of the norm (and of one
    after pooling) held at what it is, each has its share of the projection, and the shares add up to it.

    Args:
        vit: the model, edited or not.
        images: preprocessed, as a tensor or in batches that can be iterated twice.
        direction: a class, or a vector: of the model's output (a column of `zero_shot_head`; image features are not
            normalised here), or of a token after the final norm, read at [CLS] (without one at the mean patch).
        space: which of the two a vector belongs to, where it fits both; default: the output.
        detection: which patches are outliers; default: found here.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: a class of a model without a head, or the output of a model that pools by attention.
        ImageError: there are no images.
        ShapeError: the class does not exist, or the vector does not fit.
        UnsupportedArchitectureError: a norm stands after the sublayers.

    Source: Gandelsman et al. 2024 (2310.05916), equations 5 to 8, for heads and what they
    attend to; Elhage et al. 2021.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images
        >>> found = direct_contributions(vit, images, 0)
        >>> found.heads.shape, found.neurons.shape, found.largest_remainder < 1e-4
        ((6, 1), (6, 256), True)
    """
    require_linear_output(vit.cfg, "The direct contributions of heads and neurons")
    readout = Readout.of(vit, direction, space)
    detection = detection or detect(vit, images, batch_size=batch_size)
    sums: dict[str, Moments] = defaultdict(Moments)
    largest, n = 0.0, 0
    with torch.inference_mode():
        for batch in batches(vit, images, batch_size, "taking the output apart"):
            n += len(batch)
            parts = _Apart(vit, batch.images, readout, detection).contributions()
            for name, values in parts.items():
                sums[name].add(values)
            largest = max(largest, float(parts["remainder"].abs().max()))
    means: dict[str, Any] = {name: m.mean if m.mean.ndim else float(m.mean) for name, m in sums.items()}
    return DirectContributions(
        **vit.identity,
        direction=readout.words,
        detection=detection,
        n_images=n,
        largest_remainder=largest,
        heads_error=sums["heads"].standard_error,
        neurons_error=sums["neurons"].standard_error,
        **means,
    )


class _Apart:
    """One batch, run twice: for the scales of the norms, then for what each component writes under them."""

    def __init__(self, vit: HookedViT, batch: Tensor, readout: Readout, detection: Detection) -> None:
        self.vit, self.batch, self.readout = vit, batch, readout
        self.layout = vit.layout(batch)
        self.wide = at_least_float32(vit.dtype)
        self.parts = {name: vector.to(vit.device, self.wide) for name, vector in readout.parts.items()}
        scales: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        hooks: list[Any] = [
            (f"{name}.hook_scale", lambda scale, hook, name=name: scales.update({name: scale.to(self.wide)}))
            for name, norm in (("ln_final", vit.ln_final), ("head.ln", readout.pool_norm))
            if isinstance(norm, Norm)
        ]
        hooks.append((detection.hook_name, lambda x, hook: norms.append(token_norms(x[:, self.layout.patches]))))
        with vit.hooks(hooks):
            tokens = vit(batch, return_type="tokens")
            self.value = readout.measure(tokens, self.layout).double()
        ones = torch.ones(len(batch), 1, device=vit.device, dtype=self.wide)
        self.pool_scale = scales.get("head.ln", ones)[:, 0]
        scale = scales["ln_final"][..., 0] if "ln_final" in scales else ones
        # How much of what is written at a token arrives in the reading, but for the direction.
        self.reach = {
            name: pool_weights(name, self.layout).to(vit.device, self.wide) / scale / self.pool_scale[:, None]
            for name in self.parts
        }
        self.kinds = self._kinds(detection.cutoff.above(norms[0]))
        self.found_at: dict[str, dict[int, Tensor]] = {
            name: {} for name in ("heads", "neurons", "attn_bias", "mlp_bias", "by_key")
        }
        self.single: dict[str, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def contributions(self) -> dict[str, Tensor]:
        """Contributions of every image, and what is left."""
        points = {
            "hook_embed": self._embedding,
            "hook_pos_embed": self._embedding,
            "blocks.*.attn.hook_v": self._keep_values,
            "blocks.*.attn.hook_pattern": self._keys,
            "blocks.*.attn.hook_z": self._heads,
            "blocks.*.mlp.hook_post": self._neurons,
        }
        with self.vit.hooks([(name, hook) for name, hook in points.items()]):
            self.vit(self.batch, stop_at_layer=self.vit.cfg.n_layers)
        by_name = dict(self.single)
        for name, layers in self.found_at.items():
            if layers:
                by_name[name] = torch.stack([layers[layer] for layer in sorted(layers)], 2 if name == "by_key" else 1)
        by_name["constant"] = self.readout.pooled_constant / self.pool_scale.double() + self.readout.constant
        if "by_key" not in by_name:
            by_name["by_key"] = torch.full((len(self.batch), len(KEYS), *by_name["heads"].shape[1:]), torch.nan)
        parts = [values for name, values in by_name.items() if name != "by_key"]
        by_name["remainder"] = self.value - sum_of(part.double().reshape(len(self.batch), -1).sum(1) for part in parts)
        return by_name | {"value": self.value}

    def _written(self, x: Float[Tensor, "batch pos *width"], name: str) -> Float[Tensor, "batch *width"]:
        """What a component writes at all tokens, as one of the readings' parts receives it."""
        reach = self.reach[name][:, : x.shape[1]]
        return torch.einsum("bp,bp...->b...", reach, x.to(self.wide))

    def _embedding(self, x: Tensor, hook: Any) -> None:
        name = "embedding" if hook.name == "hook_embed" else "position"
        self.single[name] = sum_of(self._written(x, part) @ vector for part, vector in self.parts.items())

    def _heads(self, z: Tensor, hook: Any) -> None:
        attn = cast(Block, self.vit.blocks[hook.layer()]).attn
        W_O, b_O = attn.W_O.to(self.wide), attn.b_O.to(self.wide)
        each = ((self._written(z, part) * (W_O @ vector)).sum(-1) for part, vector in self.parts.items())
        self.found_at["heads"][hook.layer()] = sum_of(each)
        self.found_at["attn_bias"][hook.layer()] = self._constant(b_O)

    def _neurons(self, post: Tensor, hook: Any) -> None:
        mlp = cast(Block, self.vit.blocks[hook.layer()]).mlp
        W_out, b_out = mlp.W_out.to(self.wide), mlp.b_out.to(self.wide)
        each = ((self._written(post, part) * (W_out @ vector)) for part, vector in self.parts.items())
        self.found_at["neurons"][hook.layer()] = sum_of(each)
        self.found_at["mlp_bias"][hook.layer()] = self._constant(b_out)

    def _constant(self, bias: Float[Tensor, " d_model"]) -> Float[Tensor, " batch"]:
        """What a bias that is written at every token adds."""
        return sum_of(self.reach[part].sum(1) * (bias @ vector) for part, vector in self.parts.items())

    def _keep_values(self, v: Tensor, hook: Any) -> None:
        self.values = {hook.layer(): v.to(self.wide)}

    def _keys(self, pattern: Tensor, hook: Any) -> None:
        attn = cast(Block, self.vit.blocks[hook.layer()]).attn
        if attn.ln is not None:
            return
        v, by_kind = self.values.pop(hook.layer()), []
        for part, vector in self.parts.items():
            toward = attn.W_O.to(self.wide) @ vector
            paid = einsum(
                self.reach[part], pattern.to(self.wide), "batch query, batch head query key -> batch head key"
            )
            each = paid * einsum(v, toward, "batch key head d, head d -> batch head key")
            kinds = self._padded(each.shape[-1]).to(each)
            by_kind.append(einsum(each, kinds, "batch head key, kind batch key -> batch kind head"))
        self.found_at["by_key"][hook.layer()] = sum_of(by_kind)

    def _kinds(self, outlier: Bool[Tensor, "batch patch"]) -> Bool[Tensor, "kind batch pos"]:
        """Which token is of which kind."""
        layout = self.layout
        kinds = torch.zeros(len(KEYS), len(outlier), layout.n_tokens, dtype=torch.bool, device=outlier.device)
        named: list[tuple[str, Any]] = [
            ("other prefix tokens", layout.prefix),
            ("trained registers", layout.trained_registers),
            ("test-time registers", layout.test_time_registers),
        ]
        for name, where in named:
            kinds[KEYS.index(name), :, where] = True
        if layout.cls is not None:
            kinds[KEYS.index("other prefix tokens"), :, layout.cls] = False
            kinds[KEYS.index("[CLS]"), :, layout.cls] = True
        kinds[KEYS.index("outliers"), :, layout.patches] = outlier
        kinds[KEYS.index("other patches"), :, layout.patches] = ~outlier
        return kinds

    def _padded(self, n_keys: int) -> Bool[Tensor, "kind batch key"]:
        extra = n_keys - self.kinds.shape[-1]
        beyond = torch.zeros(*self.kinds.shape[:2], extra, dtype=torch.bool, device=self.kinds.device)
        beyond[KEYS.index("keys without a token")] = True
        return torch.cat([self.kinds, beyond], -1)


def sum_of(tensors: Any) -> Tensor:
    """The sum of some tensors of one shape.

    Example:
        >>> sum_of(torch.ones(2) for _ in range(3))
        tensor([3., 3.])
    """
    return torch.stack(list(tensors)).sum(0)

"""Singular defects: the direction outliers should take, and the neurons that write it, from the weights alone.

Each block is replaced by a linear map of one token (`linear_blocks`). The product of the blocks' maps stretches one
direction most; outliers are reported to lie near it (SINDER).
"""

import math
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from registerlens.analysis.detection import Detection, detect, require_outliers
from registerlens.analysis.linear_blocks import block_map, compose
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.config import TokenLayout
from registerlens.data.batches import Images
from registerlens.display import drawn_by
from registerlens.engine.stream import Batch, Sums, stream
from registerlens.errors import ImageError, NonFiniteError, ShapeError
from registerlens.model.block import Block, require_linear_output, require_softmax
from registerlens.model.parts import token_norms
from registerlens.model.vit import Hook, HookedViT
from registerlens.progress import track
from registerlens.results import FINITE, ModelResult


@dataclass(frozen=True, kw_only=True, eq=False)
class SingularDefects(ModelResult):
    """For each block the singular direction after it, its neurons' alignment with it, and measured outliers' angles."""

    directions: Float[np.ndarray, "layer d_model"] = field(metadata=FINITE)
    """Unit vector after each block that the blocks up to there stretch most; largest component positive."""
    singular_values: Float[np.ndarray, "layer value"] = field(metadata=FINITE)
    """Singular values of the product of the blocks' maps, descending, the first set to 1."""
    alignment: Float[np.ndarray, "layer neuron"] = field(metadata=FINITE)
    """Weights-only score of each neuron: |cos| of what it writes to the direction after its block; 0 if it writes
    nothing."""
    write_norm: Float[np.ndarray, "layer neuron"] = field(metadata=FINITE)
    """Norm of what each neuron writes at an activation of 1, LayerScale included."""
    detection: Detection | None
    """Which patches count as measured outliers; None without images."""
    n_images: int
    """Images whose outliers were measured; 0 without images."""
    outlier_angle: Float[np.ndarray, " layer"]
    """Angle in degrees (0 to 90) of outlier patches to the direction after each block, mean; NaN without images."""
    normal_angle: Float[np.ndarray, " layer"]
    """The same of all other patches."""

    @property
    def dominance(self) -> Float[np.ndarray, " layer"]:
        """First singular value over the second; near 1 the direction is arbitrary."""
        with np.errstate(divide="ignore"):
            return self.singular_values[:, 0] / self.singular_values[:, 1]

    @property
    def p_value(self) -> Float[np.ndarray, "layer neuron"]:
        """Chance that a random direction is as close to the singular one as the neuron's write; 1 minus it is the
        percentile. Neurons are many: of 1000 about one has 0.001 by luck."""
        return random_cosine_p(self.alignment, self.directions.shape[1])

    @property
    def random_angle(self) -> float:
        """Angle in degrees below which one random direction in 20 lies."""
        cosines = np.linspace(0, 1, 10_001)
        p = random_cosine_p(cosines, self.directions.shape[1])
        return math.degrees(math.acos(cosines[int((p > 0.05).sum())]))

    def angles_to(self, directions: Float[np.ndarray, "layer d_model"]) -> Float[np.ndarray, " layer"]:
        """Angle in degrees (0 to 90) of measured directions, one after each block, to the singular ones.

        Raises:
            ShapeError: there is not one for each block.
        """
        if directions.shape != self.directions.shape:
            raise ShapeError(
                f"Expected directions of shape {list(self.directions.shape)}, got {list(directions.shape)}."
            )
        norms = np.linalg.norm(directions, axis=1)
        cosine = np.abs((directions * self.directions).sum(1)) / norms
        return np.degrees(np.arccos(cosine.clip(0, 1)))

    def ranks(self) -> Int[np.ndarray, "layer neuron"]:
        """Rank of each neuron's alignment within its block, 0 first."""
        return (-self.alignment).argsort(1, kind="stable").argsort(1, kind="stable")

    def neurons(self, listed: RegisterNeurons | None = None, *, top: int = 20) -> pd.DataFrame:
        """Neurons with their weights-only score: those listed, else the `top` best of all blocks.

        Columns: layer, neuron, alignment, p_value and percentile (share of random directions that are less close),
        rank_in_layer (0 first), write_norm.

        Raises:
            InterventionError: the model does not have one of them.
        """
        if listed is None:
            best = (-self.alignment).argsort(axis=None, kind="stable")[:top]
            layers, columns = np.unravel_index(best, self.alignment.shape)
        else:
            layers, columns = np.array(listed.check(self.config).pairs, dtype=int).reshape(-1, 2).T
        chosen = (layers, columns)
        p = self.p_value[chosen]
        return pd.DataFrame(
            {
                "layer": layers,
                "neuron": columns,
                "alignment": self.alignment[chosen],
                "p_value": p,
                "percentile": 100 * (1 - p),
                "rank_in_layer": self.ranks()[chosen],
                "write_norm": self.write_norm[chosen],
            }
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a block: dominance, angles, the best neuron, and how many neurons lie closer than chance allows.

        `n_beyond_chance` counts neurons so close that among as many random directions less than one is expected.
        """
        best = self.alignment.argmax(1)
        rows = np.arange(len(best))
        return pd.DataFrame(
            {
                "layer": rows,
                "dominance": self.dominance,
                "outlier_angle": self.outlier_angle,
                "normal_angle": self.normal_angle,
                "best_neuron": best,
                "best_alignment": self.alignment[rows, best],
                "best_p_value": self.p_value[rows, best],
                "n_beyond_chance": (self.p_value * self.alignment.shape[1] < 1).sum(1),
            }
        )

    def describe(self) -> str:
        """The prediction in words, and how it compares with what was measured."""
        best = self.neurons(top=5)
        listed = ", ".join(f"{a}:{n} ({c:.2f})" for a, n, c in zip(*(best[k] for k in best.columns[:3]), strict=True))
        last = len(self.directions) - 1
        sentence = (
            f"After the last block the first singular direction is stretched {self.dominance[last]:.3g} x as much as "
            f"the second (1 would be arbitrary). Neurons that write most along their block's direction: {listed}."
        )
        if self.detection is None:
            return f"{sentence} No outliers were measured: nothing says that they exist, or lie there."
        first = max((self.detection.onset or self.detection.sublayer).layer, 0)
        close = first + int(self.outlier_angle[first:].argmin())
        return (
            f"{sentence} From their onset on, measured outliers are nearest to it after block {close}: "
            f"{self.outlier_angle[close]:.0f} degrees, other patches {self.normal_angle[close]:.0f}; after the last "
            f"block {self.outlier_angle[last]:.0f} and {self.normal_angle[last]:.0f}. One random direction in 20 lies "
            f"below {self.random_angle:.0f}."
        )

    plot = drawn_by("observables.defects_figure")
    """Angles of outliers and other patches block by block, and every neuron's alignment."""


def singular_defects(
    vit: HookedViT,
    images: Images | None = None,
    *,
    detection: Detection | None = None,
    batch_size: int = 16,
) -> SingularDefects:
    """The outlier direction that the weights predict after each block, and which neurons write it.

    With P = I - 11'/d, block l becomes E_l = C_l A_l, A_l = I + W_O W_V diag(w_ln1) P and
    C_l = I + W_out M_l diag(w_ln2) P, LayerScale inside W_O and W_out, where M_l is the least-squares fit of the hidden
    units on X ~ N(0, I), exact to rounding. The direction after block l is the first left singular vector of
    E_l ... E_0. Composed in float64. Edits in force do not count: only weights do.

    What it cannot see: a neuron with a threshold that a normal input does not reach has no slope there, however much it
    writes, so that the measured angle, not the prediction, is the evidence. The LayerNorms' division is left out, as
    published: the same model with another scale of its stream has other directions.

    Args:
        vit: the model.
        images: if given, the angle of measured outliers to the direction: [image, channel, height, width], or batches
            that can be iterated twice. For directions of your own see `SingularDefects.angles_to`.
        detection: which patches are outliers; default: found first, in another pass.
        batch_size: images at once when a tensor is given.

    Raises:
        NonFiniteError: a weight, which is named, is NaN or infinite.
        NoOutliersError: images were given, and outliers are absent on them; it carries the evidence.
        ImageError: images were given, but there are none.
        UnsupportedArchitectureError: attention is no softmax, or a norm stands after the sublayers.

    Source: Wang et al. 2024 (SINDER), who fit on 100,000 samples what is exact here; the score of neurons is ours.

    Example:
        >>> import registerlens as rl
        >>> found = singular_defects(rl.HookedViT.from_pretrained("registerlens:tiny"))
        >>> found.neurons(top=1)[["layer", "rank_in_layer"]].values.tolist()
        [[1, 0]]
    """
    require_softmax(vit.cfg, "The search for singular defects")
    require_linear_output(vit.cfg, "The search for singular defects")
    _check_finite(vit)
    if images is not None:  # before the work begins
        detection = detection or detect(vit, images, batch_size=batch_size)
        require_outliers(detection, "Measuring the angle of outliers")
    blocks = [cast(Block, block) for block in vit.blocks]
    with torch.no_grad():
        maps = [block_map(block) for block in track(blocks, "linearising blocks", len(blocks))]
        writes = torch.stack([block.mlp.W_out.double().cpu() for block in blocks])
    directions, values = compose(maps)
    norms = writes.norm(dim=-1)
    along = torch.einsum("lnd,ld->ln", writes, directions).abs()
    measured: dict[str, Any] = {
        "detection": None,
        "n_images": 0,
        "outlier_angle": np.full(len(blocks), np.nan),
        "normal_angle": np.full(len(blocks), np.nan),
    }
    if images is not None and detection is not None:
        sums = _AngleSums(vit, directions, detection)
        [measured] = stream(vit, images, [sums], batch_size=batch_size, description="measuring angles")
    return SingularDefects(
        **vit.identity,
        directions=directions.numpy(),
        singular_values=values.numpy(),
        alignment=(along / norms.clamp_min(1e-300)).clamp_max(1).numpy(),
        write_norm=norms.numpy(),
        **measured,
    )


# Measured outliers ---------------------------------------------------------------------------------------------------


class _AngleSums(Sums):
    """Angles of outliers and of other patches to the directions."""

    def __init__(self, vit: HookedViT, directions: Float[Tensor, "layer d_model"], detection: Detection) -> None:
        super().__init__()
        self.axes, self.detection = directions.float().to(vit.device), detection

    def hooks(self, vit: HookedViT, layout: TokenLayout) -> list[Hook]:
        """The stream after every block, and norms where outliers are."""
        self.angles: list[Float[Tensor, "batch patch"]] = []
        self.norms: list[Float[Tensor, "batch patch"]] = []

        def take(resid: Tensor, hook: Any) -> None:
            x = resid[:, layout.patches].float()
            cosine = (x @ self.axes[hook.layer()]).abs() / token_norms(x).clamp_min(1e-30)
            self.angles.append(cosine.clamp_max(1).acos())

        def keep(resid: Tensor, hook: Any) -> None:
            self.norms.append(token_norms(resid[:, layout.patches]))

        return [("blocks.*.hook_resid_post", take), (self.detection.hook_name, keep)]

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        mask = self.detection.cutoff.above(self.norms[0])
        every = torch.stack(self.angles)
        every = every if every.device.type == "mps" else every.double()
        self.add(
            n_images=len(batch),
            n_outliers=mask.sum(),
            n_normal=(~mask).sum(),
            outlier=(every * mask).sum((1, 2)),
            normal=(every * ~mask).sum((1, 2)),
        )

    def result(self) -> dict[str, Any]:
        """Fields of `SingularDefects`, angles in degrees.

        Raises:
            ImageError: there was no outlier.
        """
        if not self.count("n_outliers"):
            raise ImageError(f"No outlier was met in {self.n_images} images. Give more images.")
        return {
            "detection": self.detection,
            "n_images": self.n_images,
            "outlier_angle": np.rad2deg(self.means(over="n_outliers")["outlier"]),
            "normal_angle": np.rad2deg(self.means(over="n_normal")["normal"]),
        }


# The null ------------------------------------------------------------------------------------------------------------


def random_cosine_p(cosine: Float[np.ndarray, "*shape"], d_model: int) -> Float[np.ndarray, "*shape"]:
    """Chance that a random direction in d_model dimensions has at least this |cosine| to a given one.

    Exact up to quadrature: the angle's sine squared follows a beta distribution, with density cos^(d-2) in
    theta = arcsin |cosine|.

    Example:
        >>> random_cosine_p(np.array([0.0, 0.5, 1.0]), 3)  # in three dimensions the cosine is uniform
        array([1. , 0.5, 0. ])
    """
    theta = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(theta) ** (d_model - 2)
    pieces = (density[:-1] + density[1:]) / 2
    beyond = np.append(pieces[::-1].cumsum()[::-1], 0.0)
    return np.interp(np.arcsin(np.clip(cosine, 0, 1)), theta, beyond / beyond[0])


def _check_finite(vit: HookedViT) -> None:
    bad = [name for name, weight in vit.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise NonFiniteError(
            f"Weights are NaN or infinite: {', '.join(bad[:5])}. The checkpoint is damaged. Load it anew."
        )

"""The paper's exact model of two blocks, as data: built from a seed so that every condition holds, or chosen ones fail.

Block 1 is its MLP alone, block 2 attention and MLP; no norms, no biases, one head, W_Q = W_K = W_V = W_O = I; the
output is a linear head on [CLS] (Jiang et al. 2025, section 6). `activation` below always means the length
a = phi(|x_s| |u1|) |u2|: what the register neuron writes at a token of x_s's length that is aligned with u1. It grows
because |u2| does, all else being the same, so that the stream after block 1 is affine in it: x'(a) = rest + a growth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from registerlens.config import Activation
from registerlens.display import Shown
from registerlens.errors import ConfigError, NonFiniteError, ShapeError, check_at_least, check_choice, close_matches
from registerlens.model.parts import ACTIVATIONS

CLS = 0
"""The place of [CLS] among the tokens."""
REGISTER = 0
"""The place of the register neuron in block 1."""
CONDITIONS: dict[str, str] = {
    "u1_mlp": "u1 lies in ker(W_in2^T)",
    "u2_mlp": "u2 lies in ker(W_in2^T)",
    "u1_head": "u1 lies in ker(W_head^T)",
    "u2_head": "u2 lies in ker(W_head^T)",
    "dominance": "|u2| outgrows every other row of W_out1",
    "alignment": "x_s = beta u1 with beta > 0",
    "query_key": "q . k > 0: every query has a positive inner product with v2",
    "silence": "no other neuron of block 1 writes at a token aligned with u1",
    "alone": "no other token fires the register neuron as strongly",
}
"""The conditions by name: the paper's six, and three that its argument uses without saying so."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoBlockModel(Shown):
    """Tokens and weights of the two-block model, in float64; `TwoBlockModel.build` makes one from a seed.

    Raises:
        ShapeError: a tensor does not fit the others.
        NonFiniteError: a tensor, which is named, has NaN or infinite entries.
        ConfigError: another number type than float64, or u1, u2 or x_s is zero.

    Source: Jiang et al. 2025, section 6.

    Example:
        >>> model = TwoBlockModel.build(n=8, d_model=12, seed=3)
        >>> model.n, bool((model.W_in2.T @ model.v2).norm() < 1e-12)
        (8, True)
    """

    tokens: Float[Tensor, "token d_model"]
    """What enters block 1: [CLS] first, then the n patches."""
    sink: int
    """Which token is x_s, 1 to n."""
    W_in1: Float[Tensor, "d_model d_mlp"]
    """Read by block 1's neurons; column 0 is u1."""
    W_out1: Float[Tensor, "d_mlp d_model"]
    """Written by them; row 0 is u2, of which only the direction v2 counts: its length follows from the activation."""
    grows: Bool[Tensor, " d_mlp"]
    """Rows of W_out1 that keep their proportion to |u2| as it grows: row 0, and no other if |u2| dominates."""
    W_in2: Float[Tensor, "d_model d_mlp"]
    """Read by block 2's neurons."""
    W_out2: Float[Tensor, "d_mlp d_model"]
    """Written by them."""
    W_head: Float[Tensor, "d_model d_out"]
    """The linear head on [CLS]."""
    phi: Activation = "gelu"
    """The nonlinearity of both MLPs."""
    seed: int | None = None
    """Seed it was built from; None: given by hand."""

    def __post_init__(self) -> None:
        _check_tensors(self)

    @property
    def n(self) -> int:
        """Patches, which is also the number of tokens besides x_s."""
        return len(self.tokens) - 1

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by: 1 / sqrt(d_model)."""
        return self.tokens.shape[1] ** -0.5

    @property
    def u1(self) -> Float[Tensor, " d_model"]:
        """What the register neuron reads."""
        return self.W_in1[:, REGISTER]

    @cached_property
    def v2(self) -> Float[Tensor, " d_model"]:
        """The unit vector it writes."""
        return self.W_out1[REGISTER] / self.W_out1[REGISTER].norm()

    @cached_property
    def others(self) -> Bool[Tensor, " token"]:
        """All tokens but x_s."""
        return torch.arange(self.n + 1) != self.sink

    @cached_property
    def aligned(self) -> Float[Tensor, " d_model"]:
        """A token as long as x_s, along u1; x_s itself if it is aligned."""
        return self.tokens[self.sink].norm() * self.u1 / self.u1.norm()

    @cached_property
    def reference(self) -> Float[Tensor, ""]:
        """The register neuron at that token: phi(|x_s| |u1|)."""
        return self.act(self.aligned @ self.u1)

    @cached_property
    def firing(self) -> Float[Tensor, " token"]:
        """The register neuron at every token, as a share of the reference; 1 at an aligned x_s."""
        return self.act(self.tokens @ self.u1) / self.reference

    @cached_property
    def rest(self) -> Float[Tensor, "token d_model"]:
        """The stream after block 1 without all that grows."""
        return self.tokens + self.act(self.tokens @ self.W_in1[:, ~self.grows]) @ self.W_out1[~self.grows]

    @cached_property
    def competing(self) -> Float[Tensor, "token d_model"]:
        """What other growing rows write, per unit of activation; zero if |u2| dominates."""
        others = self.grows.clone()
        others[REGISTER] = False
        written = self.act(self.tokens @ self.W_in1[:, others]) @ self.W_out1[others]
        return written / (self.reference * self._u2_given)

    @cached_property
    def growth(self) -> Float[Tensor, "token d_model"]:
        """What grows, per unit of activation: the stream after block 1 is rest + activation growth."""
        return self.competing + self.firing[:, None] * self.v2

    @property
    def _u2_given(self) -> Tensor:
        return self.W_out1[REGISTER].norm()

    def without_register(self, activation: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid token d_model"]:
        """The stream after block 1 with the register neuron set to zero."""
        return self.rest + activation[..., None, None] * self.competing

    def after_block1(self, activation: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid token d_model"]:
        """The stream after block 1, x'."""
        return self.without_register(activation) + activation[..., None, None] * self.firing[:, None] * self.v2

    def read_at_sink(
        self, W: Float[Tensor, "d_model width"], activation: Float[Tensor, " activation"]
    ) -> Float[Tensor, " activation"]:
        """rho_W of Proposition 1, the most that W can read of x_s: |beta| |W^T u1| + |a_s| |W^T v2| + |W^T e_s|."""
        u1_hat = self.u1 / self.u1.norm()
        along_u1 = (self.tokens[self.sink] @ u1_hat) * u1_hat
        a_s = (activation * self.firing[self.sink]).abs()
        e_s = self.without_register(activation)[:, self.sink] - along_u1
        return (along_u1 @ W).norm() + a_s * (self.v2 @ W).norm() + (e_s @ W).norm(dim=-1)

    def row_ratio(self, activation: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid"]:
        """|u2| over the longest other row of W_out1; infinite if there is no other."""
        u2, rows, others = activation / self.reference, self.W_out1.norm(dim=1), ~self.grows
        growing = rows * self.grows / self._u2_given
        growing[REGISTER] = 0
        fixed = rows[others].max() if others.any() else torch.zeros_like(self.reference)
        return u2 / torch.maximum(fixed, u2 * growing.max())

    def scores(self, stream: Float[Tensor, "*grid token d_model"]) -> Float[Tensor, "*grid query key"]:
        """Attention scores of block 2."""
        return stream @ stream.mT * self.scale

    def output(self, cls: Float[Tensor, "*grid d_model"]) -> Float[Tensor, "*grid d_out"]:
        """The rest of the model, from [CLS] after block 2's attention on: its MLP and the head."""
        return (cls + self.act(cls @ self.W_in2) @ self.W_out2) @ self.W_head

    def act(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nonlinearity."""
        return ACTIVATIONS[self.phi](x)

    @classmethod
    def build(
        cls,
        *,
        n: int = 16,
        d_model: int = 16,
        d_mlp: int = 32,
        d_out: int = 5,
        rank: int | None = None,
        phi: Activation = "gelu",
        others_fire: float = 0.5,
        broken: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> TwoBlockModel:
        """A random model for which every condition holds, but for those that are broken on purpose.

        u1 and u2 lie in a random plane, 60 to 120 degrees apart. Every other neuron is at work on the other tokens.

        Args:
            n: patches, x_s among them.
            d_model: width of the stream, at least 3.
            d_mlp: neurons of each block; one more than the first of `dominance` and `silence` that is broken needs.
            d_out: outputs of the head.
            rank: of W_in2 and W_head at most; default half of d_model.
            phi: the nonlinearity of both MLPs.
            others_fire: other tokens' pre-activations of the register neuron are 0 to this share of x_s's, below 1.
            broken: by condition (the keys of CONDITIONS), by how much, above 0:
                the four kernels: relative residual |W^T u| / (sigma_max |u|), below 1, less if two are broken at once;
                dominance: length of another row, which fires at x_s and grows with u2, over |u2|;
                alignment: 1 - cos(x_s, u1), up to 2; from 1 on beta <= 0;
                query_key: every query has the inner product minus this with v2;
                silence: what another neuron writes at x_s, over |x_s|;
                alone: another patch's pre-activation is 1 + this times that of x_s.
            seed: equal seeds give equal models.

        Raises:
            ConfigError: a size or an amount is out of range, or a condition unknown.

        Example:
            >>> model = TwoBlockModel.build(broken={"u1_head": 0.25})
            >>> residual = (model.W_head.T @ model.u1).norm() / model.u1.norm()
            >>> round(float(residual / torch.linalg.matrix_norm(model.W_head, 2)), 12)
            0.25
        """
        broken = dict(broken or {})
        rank = max(1, d_model // 2) if rank is None else rank
        _check_options(n, d_model, d_mlp, d_out, rank, others_fire, broken)
        act, options = ACTIVATIONS[phi], {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
        normal, uniform = partial(torch.randn, **options), partial(torch.rand, **options)
        basis = torch.linalg.qr(normal(d_model, d_model)).Q
        visible = basis[:, 2:]
        angle = math.radians(60) + math.radians(60) * uniform(())
        plane = torch.stack([basis[:, 0], angle.cos() * basis[:, 0] + angle.sin() * basis[:, 1]])  # of u1 and v2
        u1 = (0.5 + uniform(())) * plane[0]
        length = (1 + 2 * uniform(())) / u1.norm()  # of x_s: the pre-activation is 1 to 3
        read = visible @ normal(d_model - 2)
        read = read / read.norm()  # a direction that the MLP and the head both read

        # Other neurons read what is visible, not the plane: they are silent at u1.
        W_in1 = torch.cat([u1[:, None], visible @ normal(d_model - 2, d_mlp - 1) / math.sqrt(d_model)], 1)
        W_out1 = torch.cat([plane[1:], 0.5 * normal(d_mlp - 1, d_model) / math.sqrt(d_mlp)])
        grows = torch.arange(d_mlp) == REGISTER
        for neuron, name in enumerate([name for name in ("dominance", "silence") if name in broken], start=1):
            # Another neuron that reads u1 as the register neuron does, so that both fire alike.
            grows[neuron] = name == "dominance"
            unit = 1.0 if grows[neuron] else length / act(length * u1.norm())
            W_in1[:, neuron], W_out1[neuron] = u1, broken[name] * unit * read

        others = (visible @ normal(d_model - 2, n)).T
        writes = act(others @ W_in1[:, 1:]) @ W_out1[1:]
        fires = others_fire * uniform(n) * (0.0 if "query_key" in broken else 1.0)
        if "alone" in broken:
            fires[-1] = 1 + broken["alone"]
        seeks = torch.full_like(fires, -broken["query_key"]) if "query_key" in broken else 0.5 + uniform(n)
        # In the plane: x . u1 makes it fire, and q . v2, what other neurons write included, makes it seek v2.
        others = others + with_products(plane, torch.stack([fires * length, seeks - writes @ plane[1]])).T
        cosine = 1 - broken.get("alignment", 0.0)
        x_s = length * (cosine * plane[0] + math.sqrt(max(0.0, 1 - cosine**2)) * read)
        sink = 1 + int(uniform(()) * n)

        def low_rank(reader: str, width: int) -> Tensor:
            W = visible @ normal(d_model - 2, rank) @ normal(rank, width) / math.sqrt(d_model * rank)
            return turned_towards(W, plane, [broken.get(f"{u}_{reader}", 0.0) for u in ("u1", "u2")])

        return cls(
            tokens=torch.cat([others[:sink], x_s[None], others[sink:]]),
            sink=sink,
            W_in1=W_in1,
            W_out1=W_out1,
            grows=grows,
            W_in2=low_rank("mlp", d_mlp),
            W_out2=normal(d_mlp, d_model) / math.sqrt(d_mlp),
            W_head=low_rank("head", d_out),
            phi=phi,
            seed=seed,
        )


def _check_options(
    n: int, d_model: int, d_mlp: int, d_out: int, rank: int, others_fire: float, broken: dict[str, float]
) -> None:
    check_at_least(1, d_out=d_out, rank=rank)
    check_at_least(3, d_model=d_model)
    check_at_least(1 + ("alone" in broken), n=n)  # the strongest of the other patches
    check_at_least(1 + len(broken.keys() & {"dominance", "silence"}), d_mlp=d_mlp)
    if not 0 <= others_fire < 1:
        raise ConfigError(f"others_fire must be at least 0 and below 1, got {others_fire}.")
    for name, amount in broken.items():
        if name not in CONDITIONS:
            raise ConfigError(
                f"Unknown condition {name!r}; known: {list(CONDITIONS)}.{close_matches(name, CONDITIONS)}"
            )
        most = {"alignment": 2.0}.get(name, 1.0 if name.startswith("u") else math.inf)
        if not 0 < amount <= most or math.isinf(amount):
            raise ConfigError(f"How much {name!r} is broken must be above 0 and at most {most:g}, got {amount}.")


def _check_tensors(model: TwoBlockModel) -> None:
    (n_tokens, d_model), d_mlp = model.tokens.shape, model.W_in1.shape[1]
    shapes = {
        "W_in1": (d_model, d_mlp),
        "W_out1": (d_mlp, d_model),
        "grows": (d_mlp,),
        "W_in2": (d_model, d_mlp),
        "W_out2": (d_mlp, d_model),
        "W_head": (d_model, *model.W_head.shape[1:]),
    }
    for name, shape in shapes.items():
        if tuple(getattr(model, name).shape) != shape:
            raise ShapeError(f"{name} must be {list(shape)}, got {list(getattr(model, name).shape)}.")
    for item in fields(model):
        value = getattr(model, item.name)
        if isinstance(value, Tensor) and item.name != "grows":
            check_exact(item.name, value)
    if not 1 <= model.sink < n_tokens:
        raise ConfigError(f"sink must be the index of a patch, 1 to {n_tokens - 1}, got {model.sink}.")
    check_choice("phi", model.phi, ACTIVATIONS)
    if not model.grows[REGISTER]:
        raise ConfigError("grows[0] must be True: row 0 of W_out1 is u2.")
    for name, vector in (("u1", model.u1), ("u2", model.W_out1[REGISTER]), ("x_s", model.tokens[model.sink])):
        if not vector.any():
            raise ConfigError(f"{name} is zero, so that there is no direction to speak of. Give another.")


def check_exact(name: str, value: Tensor) -> None:
    """Refuse a tensor that the exact model cannot be computed with.

    Raises:
        ConfigError: it is not float64.
        NonFiniteError: it has NaN or infinite entries.
    """
    if value.dtype != torch.float64:
        raise ConfigError(f"{name} is {value.dtype}; the exact model is computed in torch.float64.")
    if not value.isfinite().all():
        raise NonFiniteError(f"{name} has NaN or infinite entries. Give finite ones.")


def with_products(
    directions: Float[Tensor, "direction d_model"], products: Float[Tensor, "direction vector"]
) -> Float[Tensor, "d_model vector"]:
    """The shortest vectors whose inner products with these directions are those.

    Example:
        >>> with_products(torch.eye(3)[:2], torch.tensor([[5.0], [7.0]])).tolist()
        [[5.0], [7.0], [0.0]]
    """
    return directions.T @ torch.linalg.solve(directions @ directions.T, products)


def turned_towards(
    W: Float[Tensor, "d_model width"], plane: Float[Tensor, "2 d_model"], residuals: list[float]
) -> Float[Tensor, "d_model width"]:
    """W, whose kernel contains the plane, with its top left singular vector turned towards the plane.

    The singular values stay, so that the relative residuals |W^T u| / (sigma_max |u|) come out exactly as asked.

    Raises:
        ConfigError: no unit vector has such residuals.

    Example:
        >>> eye = torch.eye(3, dtype=torch.float64)
        >>> (eye[:2] @ turned_towards(2 * eye[:, 2:], eye[:2], [0.6, 0.0])).tolist()  # sigma_max is 2
        [[1.2], [0.0]]
    """
    towards = with_products(plane, torch.tensor(residuals, dtype=W.dtype)[:, None])[:, 0]
    if not towards.norm() < 1:
        raise ConfigError(
            f"Kernel residuals {residuals} of u1 and u2 in one matrix are more than a direction can have. Lower them."
        )
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    # The sign is free. This one excites neurons: what only silences them, they would hide again.
    top, reads = (U[:, 0], Vh[0]) if Vh[0].sum() > 0 else (-U[:, 0], -Vh[0])
    change = (1 - towards.norm() ** 2).sqrt() * top + towards - top
    return W + S[0] * torch.outer(change, reads)

"""Attribution patching: every patch at once to first order, and some of them exactly to see how far that carries."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from registerlens.circuits.attributions import Attributions
from registerlens.circuits.differentiable import Measure, metric_of
from registerlens.circuits.neuron_effects import (
    STATIONARY,
    check_gradient,
    frozen_weights,
    no_slope,
    not_differentiable,
    value_of,
)
from registerlens.circuits.paths import CleanRun
from registerlens.circuits.sites import PairBatch, Site, TokenKind, firing_order, first_image, paired
from registerlens.data.batches import Images, count
from registerlens.engine.views import mapped, run_from
from registerlens.errors import NonFiniteError, ShapeError, check_at_least
from registerlens.evaluation.metrics import Metric, measured
from registerlens.model.names import NamesFilter, match_names
from registerlens.model.parts import at_least_float32
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.stats.moments import Moments


def attribution_patching(
    vit: HookedViT,
    clean: Images,
    corrupted: Images,
    names: NamesFilter,
    *,
    metric: str | Metric | Measure,
    steps: int = 1,
    positions: TokenKind | Sequence[int] | Bool[Tensor, "pair patch"] | None = None,
    labels: Int[Tensor, "pair ..."] | None = None,
    exact: int = 16,
    sample: int = 32,
    batch_size: int = 16,
    seed: int = 0,
) -> Attributions:
    """Estimate what patching each head or neuron of many hook points would do: (corrupted - clean) . gradient.

    To first order all of them cost two forward passes and one backward pass. It is an estimate: saturation (a softmax
    that is nearly one-hot, a norm that divides by an outlier) makes gradients say little about a large change. So some
    units are patched exactly, and the agreement is part of the result.

    With `steps` above 1, the gradient is averaged (Gauss-Legendre) while the whole hook point goes from its clean to
    its corrupted activation; the attributions of a point then add up to the exact effect of patching it as a whole.
    That costs `steps` forward and backward passes a hook point.

    Args:
        vit: the model, edited or not. Its weights get no gradient.
        clean: images, a tensor or batches that can be iterated several times; all of one size.
        corrupted: as many, of the same sizes.
        names: hook points: a name, a glob, a list of them.
        metric: as for `path_patching`; it must be differentiable.
        steps: as above.
        positions: whose activations count, as for a `Site`; default: every token.
        labels: one a pair, where the metric wants them.
        exact: so many units with the largest attributions are patched exactly,
        sample: and so many random ones; each costs part of a forward pass.
        batch_size: pairs at once when tensors are given.
        seed: of the random sample.

    Raises:
        ConfigError: the metric is not differentiable, or its gradient vanishes at the clean image.
        HookNameError: no hook point matches.
        ImageError: there are no pairs, or all are one image twice.
        NonFiniteError: a gradient is NaN or infinite.
        ShapeError: pairs do not fit, or the metric does not give one number an image.

    Source: Nanda 2023 (attribution patching); Syed et al. 2023 (2310.10348); Hanna et al. 2024 (2403.17806) for steps;
    Sundararajan et al. 2017 (1703.01365), proposition 1, for why they add up.

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(8, 0).images
        >>> found = attribution_patching(
        ...     vit, images, images.roll(1, 0), "blocks.*.mlp.hook_post", metric="largest_norm@1.mlp", exact=2, sample=2
        ... )
        >>> found.names[0], found.by_unit.shape, found.by_position.shape
        ('blocks.0.mlp.hook_post', (1536,), (6, 36))
    """
    check_at_least(1, steps=steps)
    check_at_least(0, exact=exact, sample=sample)
    sites = [Site(name, positions=positions) for name in match_names(names, vit.hook_dict)]
    order = firing_order(vit, first_image(clean), sites)
    sites.sort(key=lambda site: order[site.name])
    chosen = metric_of(metric, vit, clean, batch_size)
    estimate = _Estimate(vit, sites, chosen, steps)
    by_unit: Moments | None = None
    by_position: dict[str, Moments] = {site.name: Moments() for site in sites}
    total = Moments()
    with frozen_weights(vit), torch.inference_mode(False):
        pairs = paired(vit, clean, corrupted, labels, batch_size)
        for pair in track(pairs, "attributing patches", count(clean), lambda pair: len(pair.clean)):
            change, units, tokens = estimate.of(pair)
            by_unit = by_unit or Moments(units.shape[1])
            by_unit.add(units)
            total.add(change)
            for name, values in tokens.items():
                by_position[name].add(values)
    if by_unit is None or not total.n:
        raise NonFiniteError(f"Metric '{chosen.name}' is NaN or infinite for every pair.")
    checked, is_candidate = _to_check(by_unit.mean, exact, sample, seed)
    true, whole = _exactly(estimate, clean, corrupted, labels, batch_size, checked)
    _check_slope(chosen, steps, by_unit.mean[checked], true)
    return Attributions(
        **vit.identity,
        metric=chosen.name,
        words=chosen.words,
        steps=steps,
        tokens="every token" if positions is None else sites[0].label.partition(", ")[2],
        n_pairs=int(total.n),
        names=tuple(site.name for site in sites),
        n_units=tuple(n for n, _ in estimate.units.values()),
        kinds=tuple(kind for _, kind in estimate.units.values()),
        total=float(total.mean),
        by_unit=by_unit.mean,
        by_unit_error=by_unit.standard_error,
        by_position=_rows([by_position[site.name].mean for site in sites]),
        checked=checked,
        is_candidate=is_candidate,
        exact=true,
        whole=whole,
    )


class _Estimate:
    """Attributions of batches of pairs; learns from the first what the units of each point are."""

    def __init__(self, vit: HookedViT, sites: list[Site], metric: Metric, steps: int) -> None:
        self.vit, self.sites, self.metric, self.steps = vit, sites, metric, steps
        self.units: dict[str, tuple[int, str]] = {}
        self.shape: torch.Size | None = None

    def of(self, pair: PairBatch) -> tuple[Float[Tensor, " pair"], Float[Tensor, "pair unit"], dict[str, Tensor]]:
        """The change of the metric, the attributions of every unit, and those of every token by point."""
        vit, layout = self.vit, self.vit.layout(pair.clean)
        if self.shape is not None and pair.clean.shape[1:] != self.shape:
            raise ShapeError(
                f"Attributions are averaged token by token, so that all images must have one size; got "
                f"{list(self.shape[1:])} and {list(pair.clean.shape[2:])}."
            )
        self.shape = pair.clean.shape[1:]
        names = [site.name for site in self.sites]
        with torch.no_grad():
            clean = CleanRun.of(vit, pair, self.metric, self.sites, names)
            corrupted, wanted = clean.corrupted(names)
            values = [measured([self.metric], view, clean.view)[0] for view in (corrupted, clean.view)]
        there = torch.stack(values).isfinite().all(0)
        units, tokens = [], {}
        for site, gradient in self._gradients(clean, wanted):
            change = (wanted[site.name] - clean.at[site.name]).to(at_least_float32(vit.dtype))
            each = torch.where(site.mask(change, layout, pair.rows), change * gradient.to(change), 0.0)
            check_gradient(each[there.to(each.device)], self.metric.name, f" at {site.name}")
            each = torch.where(there.to(each.device).reshape(-1, *[1] * (each.ndim - 1)), each, torch.nan)
            head, pos = _axes(site.name, each)
            unit = each.ndim - 1 if head is None else head
            kind = "head" if head is not None else "neuron" if ".mlp." in site.name else "dimension"
            self.units[site.name] = (each.shape[unit], kind)
            units.append(_summed(each, unit))
            if pos is not None:
                tokens[site.name] = _summed(each, pos)
        return values[0] - values[1], torch.cat(units, 1), tokens

    def _gradients(self, clean: CleanRun, wanted: dict[str, Tensor]) -> Iterator[tuple[Site, Tensor]]:
        """Each site's gradient: all of them from one backward pass, or averaged along the way, site by site."""
        if self.steps == 1:
            yield from zip(self.sites, self._descend(self.sites, clean, {}), strict=True)
            return
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        for site in self.sites:
            before = clean.at[site.name]
            change = torch.where(site.mask(before, clean.layout, clean.pair.rows), wanted[site.name] - before, 0.0)
            total = torch.zeros_like(change)
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                moved = {site.name: before + float(node) * change}
                total += float(weight) * self._descend([site], clean, moved)[0]
            yield site, total

    def _descend(self, sites: list[Site], clean: CleanRun, moved: dict[str, Tensor]) -> list[Tensor]:
        """The metric's derivative by what stands at each site, with some of them moved."""
        met: dict[str, Tensor] = {}

        def watch(x: Tensor, hook: Any) -> Tensor:
            if hook.name in moved or not x.requires_grad:
                x = moved.get(hook.name, x).detach().requires_grad_()
            met[hook.name] = x
            return x

        block, start, before = clean.start(sites)
        with torch.enable_grad():
            x, hooks = start.detach().clone().requires_grad_(), [([site.name for site in sites], watch)]
            before = mapped(before, Tensor.detach)
            edited = run_from(self.vit, x, block, clean.layout, clean.watched, hooks, before)
            values = value_of(self.metric, edited, clean.view)
            leaves = [met[site.name] for site in sites]
            gradients: Sequence[Tensor | None] = [None] * len(leaves)
            if values.requires_grad:
                gradients = torch.autograd.grad(values[values.isfinite()].sum(), leaves, allow_unused=True)
        if all(gradient is None for gradient in gradients) and self.steps == 1:
            raise not_differentiable(self.metric.name, sites[0].name + (" and the others" if len(sites) > 1 else ""))
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def _axes(name: str, x: Tensor) -> tuple[int | None, int | None]:
    """Which axis tells heads apart, and which tokens."""
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        return 1, 2
    head = 2 if x.ndim == 4 and ".norm." not in name else None
    return head, 1 if x.ndim > 2 else None


def _summed(x: Tensor, axis: int) -> Float[Tensor, "batch kept"]:
    """The sum over every axis but the batch and this one."""
    return x.movedim(axis, 1).reshape(len(x), x.shape[axis], -1).sum(2).cpu()


def _to_check(
    effects: Float[np.ndarray, " unit"], exact: int, sample: int, seed: int
) -> tuple[Int[np.ndarray, " checked"], Bool[np.ndarray, " checked"]]:
    """The largest units, and a random sample of the others."""
    order = np.argsort(-np.abs(effects), kind="stable")
    largest, others = order[:exact], np.sort(order[exact:])
    sampled = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:sample].numpy()
    checked = np.concatenate([largest, np.sort(others[sampled])]).astype(np.int64)
    return checked, np.arange(len(checked)) < len(largest)


def _exactly(
    estimate: _Estimate, clean: Images, corrupted: Images, labels: Tensor | None, batch_size: int, checked: np.ndarray
) -> tuple[Float[np.ndarray, " checked"], Float[np.ndarray, " name"]]:
    """The effect of patching each of these units alone, and of each whole hook point."""
    vit, metric, moments = estimate.vit, estimate.metric, Moments(len(checked) + len(estimate.sites))
    owner = np.repeat(np.arange(len(estimate.sites)), [n for n, _ in estimate.units.values()])
    first = np.cumsum([0, *(n for n, _ in estimate.units.values())])
    chosen = []
    for unit in checked:
        site = estimate.sites[owner[unit]]
        axis = "heads" if estimate.units[site.name][1] == "head" else "neurons"
        options: dict[str, Any] = {axis: int(unit - first[owner[unit]]), "positions": site.positions}
        chosen.append(Site(site.name, **options))
    chosen += estimate.sites
    names = sorted({site.name for site in chosen})
    with torch.inference_mode():
        pairs = paired(vit, clean, corrupted, labels, batch_size)
        for pair in track(pairs, "patching exactly", count(clean), lambda pair: len(pair.clean)):
            clean_run = CleanRun.of(vit, pair, metric, chosen)
            _, there = clean_run.corrupted(names)
            before = measured([metric], clean_run.view, clean_run.view)[0]
            patched = (clean_run.patched([site], there) for site in chosen)
            values = [measured([metric], view, clean_run.view)[0] for view in patched]
            moments.add(torch.stack(values, 1) - before[:, None])
    return moments.mean[: len(checked)], moments.mean[len(checked) :]


def _check_slope(metric: Metric, steps: int, estimated: np.ndarray, true: np.ndarray) -> None:
    if steps == 1 and len(true) and np.abs(estimated).sum() < STATIONARY * np.nansum(np.abs(true)):
        raise no_slope(metric.name, "steps=8")


def _rows(rows: list[Float[np.ndarray, "..."]]) -> Float[np.ndarray, "name pos"]:
    """Rows side by side; those of fewer tokens end in NaN."""
    width = max((row.size for row in rows), default=0)
    return np.stack([np.pad(row.reshape(-1), (0, width - row.size), constant_values=np.nan) for row in rows])

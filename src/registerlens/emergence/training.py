"""A plain training loop: equal seeds give equal bits, and a run that was killed goes on to the same weights."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from registerlens.analysis.trace import trace
from registerlens.config import TokenLayout
from registerlens.data.synthetic import FLAT, ROLES, SyntheticBatch, synthetic_images
from registerlens.emergence.config import TrainingConfig
from registerlens.emergence.run import TRAINING, TrainingRun, held_out_images
from registerlens.errors import ConfigError, DivergedError, NonFiniteError, WeightsError
from registerlens.files import whole_file, write_json
from registerlens.loading.native import save
from registerlens.model.vit import HookedViT
from registerlens.progress import track
from registerlens.seeds import seed_of

WATCHED = 64
"""Held-out images that every row of the metrics is measured on."""
EXPLODED = 3.0
"""A loss so many times that of guessing is not learning any more."""


def train(config: TrainingConfig, out: str | Path) -> TrainingRun:
    """Train a model, or go on where a run in the same folder stopped; a finished one is left as it is.

    Equal configurations give equal bits on the same machine with the same number of threads: batches are drawn from
    seeds of their own (the run's seed and the step), and no other randomness is used, so that step, weights and
    optimiser are the whole state.

    Args:
        config: what to train, and how.
        out: the run's folder; see `TrainingRun` for what will be in it.

    Raises:
        ConfigError: the folder holds a run of another configuration, or something else.
        DivergedError: training went astray.

    Example:
        >>> import tempfile
        >>> config = TrainingConfig(steps=2, warm_up=0, log_every=1, checkpoint_every=2, batch_size=2)
        >>> run = train(config, tempfile.mkdtemp())
        >>> run.finished, run.checkpoints, len(run.metrics())
        (True, (0, 2), 3)
    """
    run = TrainingRun.make(out, config)
    if run.finished:
        return run
    vit = initial_vit(config)
    optimiser = _optimiser(vit, config)
    first, clocks = _restore(run, vit, optimiser)
    since = _Since(clocks)
    for step in track(range(first, config.steps), "training", config.steps, done=first, unit="steps"):
        if step > first or not step:
            _keep(run, vit, optimiser, step, since)
        _update(run, vit, optimiser, step, since)
    _keep(run, vit, optimiser, config.steps, since)
    return run


def initial_vit(config: TrainingConfig) -> HookedViT:
    """Random weights from the run's seed, biases of linear maps at zero; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vit = HookedViT(config.vit_config, source=f"emergence, seed {config.seed}")
    for module in vit.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return vit


def task_loss(
    output: Float[Tensor, "batch pos out"],
    batch: SyntheticBatch,
    layout: TokenLayout,
    flat_weight: float = 1.0,
    image_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of the patches' labels, mean over patches in which flat ones have a weight, and of [CLS]'s.

    Example:
        >>> batch = synthetic_images(2, 0)
        >>> round(float(task_loss(torch.zeros(2, 36, 52), batch, TokenLayout(grid=(6, 6), n_prefix=0))), 3)
        2.565
    """
    logits = rearrange(output, "batch pos (group label) -> batch pos group label", group=batch.labels.shape[-1])
    each = F.cross_entropy(logits[:, layout.patches].flatten(0, 2), batch.labels.flatten(), reduction="none")
    weight = torch.where(batch.roles == FLAT, flat_weight, 1.0)[..., None].expand_as(batch.labels)
    loss = (each.view_as(batch.labels) * weight).sum() / weight.sum()
    if layout.cls is None or not image_weight:
        return loss
    on_cls = F.cross_entropy(logits[:, layout.cls].flatten(0, 1), batch.image_labels.flatten())
    return loss + image_weight * on_cls


# One step ------------------------------------------------------------------------------------------------------------


_CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
"""Time as it goes by, and what of it this process has had."""


@dataclass
class _Since:
    """What happened since the last row of the metrics."""

    clocks: dict[str, float]
    """Times of the whole run so far, those before a restart included."""
    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    started: dict[str, float] = field(default_factory=lambda: {name: clock() for name, clock in _CLOCKS.items()})

    def row(self) -> dict[str, float]:
        """Times and means; what follows is counted anew."""
        now = {name: clock() for name, clock in _CLOCKS.items()}
        self.clocks = {name: self.clocks[name] + now[name] - self.started[name] for name in now}
        values = {"loss": self.losses, "gradient_norm": self.gradients}
        mean = {name: sum(numbers) / len(numbers) if numbers else math.nan for name, numbers in values.items()}
        self.losses, self.gradients, self.started = [], [], now
        return self.clocks | mean


def _optimiser(vit: HookedViT, config: TrainingConfig) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in vit.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in vit.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    beta2 = 0.95 if config.beta2 is None else config.beta2
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.momentum, beta2))


def _update(run: TrainingRun, vit: HookedViT, optimiser: torch.optim.Optimizer, step: int, since: _Since) -> None:
    config = run.config
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate_at(step)
    batch = synthetic_images(config.batch_size, seed_of(TRAINING, config.seed, step), config.task)
    vit.train()
    output = vit(batch.images)
    loss = task_loss(output, batch, vit.layout(batch.images), config.flat_weight_at(step), config.image_weight)
    optimiser.zero_grad()
    loss.backward()
    gradient = float(nn.utils.clip_grad_norm_(vit.parameters(), config.clip_norm))
    since.losses.append(loss.item())
    since.gradients.append(gradient)
    _check(run, step, since)
    optimiser.step()


def _check(run: TrainingRun, step: int, since: _Since) -> None:
    """Give up before the weights take damage.

    Raises:
        DivergedError: the loss or the gradient is not finite, or the loss exploded.
    """
    guessing = math.log(run.config.task.n_classes + 1) * (1 + run.config.image_weight)
    loss, gradient = since.losses[-1], since.gradients[-1]
    if not (loss <= EXPLODED * guessing and math.isfinite(gradient)):
        what = f"loss {loss:.4g} (guessing has {guessing:.3g}), gradient norm {gradient:.4g}"
        raise _diverged(run, step, since, what)


def _diverged(run: TrainingRun, step: int, since: _Since, what: str) -> DivergedError:
    """The error; what was seen is written into the run's folder first."""
    kept, rate = run.checkpoints[-1] if run.checkpoints else None, run.config.learning_rate_at(step)
    losses, gradients = ([str(one) for one in ones[-6:]] for ones in (since.losses, since.gradients))
    record = {"step": step, "what": what, "losses": losses, "gradient_norms": gradients}
    write_json(run.diverged_file, record | {"learning_rate": rate, "last_checkpoint": kept})
    return DivergedError(
        f"Training diverged at step {step}: {what}, learning rate {rate:.3g}; last losses: "
        f"{', '.join(losses) or 'none'}. Kept: the checkpoint of step {kept} in '{run.folder}'. Lower learning_rate or "
        f"clip_norm, or lengthen warm_up."
    )


# Keeping -------------------------------------------------------------------------------------------------------------


def _keep(run: TrainingRun, vit: HookedViT, optimiser: torch.optim.Optimizer, step: int, since: _Since) -> None:
    """What this step must leave behind; the state comes last, so that what it speaks of is there."""
    config, last = run.config, step == run.config.steps
    if step % config.log_every == 0 or last:
        rate = {"step": step, "learning_rate": config.learning_rate_at(step)}
        try:
            measured = _measure(vit, config)
        except NonFiniteError as error:
            raise _diverged(run, step, since, str(error)) from error
        run.write_metrics(rate | since.row() | measured)
    if step % config.checkpoint_every == 0 or last:
        vit.eval()
        save(vit, run.checkpoint(step))
        _save_state(run, vit, optimiser, step, since.clocks)


def _measure(vit: HookedViT, config: TrainingConfig) -> dict[str, float]:
    """Loss, accuracies, norms and sinks on held-out images."""
    batch = held_out_images(config, WATCHED)
    vit.eval()
    with torch.inference_mode():
        output = vit(batch.images)
        layout = vit.layout(batch.images)
        loss = float(task_loss(output, batch, layout, 0.0, config.image_weight))
    right = output.unflatten(-1, (config.task.n_attributes, -1)).argmax(-1)
    there = range(len(ROLES) - 1)  # all but flat patches, which have nothing to report
    correct = {ROLES[role]: (right[:, layout.patches] == batch.labels)[batch.roles == role] for role in there}
    if layout.cls is not None:
        correct["image"] = right[:, layout.cls] == batch.image_labels
    traced = trace(vit, batch.images, batch_size=WATCHED)
    norms = zip(traced.sublayers, traced.largest_over_median.tolist(), strict=True)
    return (
        {"loss_held_out": loss}
        | {f"accuracy_{name}": float(ones.float().mean()) for name, ones in correct.items()}
        | {f"largest_over_median_{sublayer}": ratio for sublayer, ratio in norms}
        | {f"sink_{layer}": sink for layer, sink in enumerate(traced.mean_sink.tolist())}
    )


def _save_state(
    run: TrainingRun, vit: HookedViT, optimiser: torch.optim.Optimizer, step: int, clocks: dict[str, float]
) -> None:
    """Weights and optimiser in one file, so that it is whole or not there."""
    tensors = {f"model.{name}": tensor for name, tensor in vit.state_dict().items()}
    for index, values in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in values.items() if value is not None}
    described = {"step": step, "clocks": clocks, "config": run.config.model_dump(mode="json")}
    metadata = {name: json.dumps(value) for name, value in described.items()}
    with whole_file(run.state_file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def _restore(run: TrainingRun, vit: HookedViT, optimiser: torch.optim.Optimizer) -> tuple[int, dict[str, float]]:
    """Put model and optimiser where the run stopped; the next step, and the times so far."""
    if not run.state_file.exists():
        run.forget_after(-1)
        return 0, dict.fromkeys(_CLOCKS, 0.0)
    try:
        with safe_open(run.state_file, "pt") as file:
            described = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no iterable)
        step, clocks, config = described["step"], described["clocks"], TrainingConfig(**described["config"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsError(f"'{run.state_file}' is damaged: {error}. Remove the folder to start anew.") from error
    if config != run.config:
        raise ConfigError(f"'{run.state_file}' is a checkpoint of another configuration than '{run.folder}'.")
    vit.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    run.forget_after(step)
    return step, clocks

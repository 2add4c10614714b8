"""The folder of a training run: its configuration, checkpoints, metrics, and what is needed to go on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from registerlens.config import TokenLayout
from registerlens.data.synthetic import FLAT, SyntheticBatch, synthetic_images
from registerlens.emergence.config import TrainingConfig
from registerlens.errors import ConfigError
from registerlens.files import read_json, reading, whole_file, write_json
from registerlens.seeds import seed_of
from registerlens.version import __version__

if TYPE_CHECKING:
    import pandas as pd

    from registerlens.model.vit import HookedViT

TRAINING, HELD_OUT = 1, 2
"""What images are for: no image of one kind is drawn from a seed of the other."""


def held_out_images(config: TrainingConfig, n: int, part: int = 0) -> SyntheticBatch:
    """Images of the run's task that no run is trained on; every `part` has others.

    Example:
        >>> held_out_images(TrainingConfig(), 2).images.shape
        torch.Size([2, 3, 48, 48])
    """
    return synthetic_images(n, seed_of(HELD_OUT, part), config.task)


def labels_of(batch: SyntheticBatch, layout: TokenLayout) -> Int[Tensor, "batch pos attribute"]:
    """Labels for `evaluate_intervention` and `emergence_criteria`: -1 on flat patches and trained registers, which have
    nothing to report; the image's own on [CLS].

    Example:
        >>> batch = synthetic_images(2, 0)
        >>> labels = labels_of(batch, TokenLayout(grid=(6, 6), n_prefix=1, n_trained_registers=4))
        >>> labels.shape, bool((labels[:, 0] == batch.image_labels).all()), labels[0, 1:5].unique().tolist()
        (torch.Size([2, 41, 4]), True, [-1])
    """
    labels = torch.full((len(batch.labels), layout.n_tokens, batch.labels.shape[-1]), -1)
    labels[:, layout.patches] = batch.labels.masked_fill((batch.roles == FLAT)[..., None], -1)
    if layout.cls is not None:
        labels[:, layout.cls] = batch.image_labels
    return labels


@dataclass(frozen=True)
class TrainingRun:
    """A run that was trained, or is being trained, in a folder.

    It holds config.json; checkpoints/step_000100 and so on, each a folder that `HookedViT.from_pretrained` reads;
    metrics/step_000050.parquet and so on; state.safetensors, from which `train` goes on; and, where training was given
    up, diverged.json.
    """

    folder: Path
    """Where it is."""
    config: TrainingConfig
    """What is trained, and how."""

    @classmethod
    def open(cls, folder: str | Path) -> TrainingRun:
        """A run that is there already.

        Raises:
            ConfigError: the folder holds none.
        """
        folder = Path(folder)
        with reading(folder / "config.json") as described:
            return cls(folder, TrainingConfig(**described["training"]))

    @classmethod
    def make(cls, folder: str | Path, config: TrainingConfig) -> TrainingRun:
        """A new run, or the one that is there, if it is of the same configuration.

        Raises:
            ConfigError: it is of another one; the message names what differs.
        """
        folder = Path(folder)
        if (folder / "config.json").exists():
            run = cls.open(folder)
            if run.config != config:
                ours, theirs = flat_settings(run.config), flat_settings(config)
                changed = [name for name in ours if ours[name] != theirs[name]]
                differences = "; ".join(f"{name} is {ours[name]!r} there, {theirs[name]!r} here" for name in changed)
                raise ConfigError(
                    f"'{folder}' holds a run of another configuration: {differences}. Give another folder, or that "
                    f"configuration."
                )
            return run
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"'{folder}' is not empty, and holds no training run. Give another folder.")
        write_json(folder / "config.json", {"version": __version__, "training": config.model_dump(mode="json")})
        return cls(folder, config)

    @property
    def state_file(self) -> Path:
        """Weights, optimiser and step, from which training goes on."""
        return self.folder / "state.safetensors"

    @property
    def diverged_file(self) -> Path:
        """What was seen where training was given up."""
        return self.folder / "diverged.json"

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps of the checkpoints that are whole, in ascending order."""
        whole = (self.folder / "checkpoints").glob("step_*/config.json")  # of a model's two files the last
        return tuple(sorted(int(path.parent.name[5:]) for path in whole))

    @property
    def begun(self) -> bool:
        """Whether there is a row of its metrics."""
        return any((self.folder / "metrics").glob("step_*.parquet"))

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.config.steps in self.checkpoints

    @property
    def diverged(self) -> dict[str, Any] | None:
        """Step, loss and reason where training was given up."""
        return read_json(self.diverged_file) if self.diverged_file.exists() else None

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / "checkpoints" / f"step_{step:06d}"

    def vit(self, step: int | None = None) -> HookedViT:
        """The model at a checkpoint; default: the last one.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        from registerlens.loading.native import load

        steps = self.checkpoints
        step = steps[-1] if step is None and steps else step
        if step not in steps:
            raise ConfigError(f"'{self.folder}' has no checkpoint of step {step}. There are: {_few(steps)}.")
        return load(self.checkpoint(step), name=f"step {step} of {self.folder.name}")

    def write_metrics(self, row: dict[str, Any]) -> None:
        """One row of the metrics, whole or not at all."""
        import pandas as pd

        with whole_file(self.folder / "metrics" / f"step_{row['step']:06d}.parquet") as temporary:
            pd.DataFrame([row]).to_parquet(temporary, index=False)

    def metrics(self) -> pd.DataFrame:
        """One row a log step: losses, accuracies, the largest norm over the median at every sublayer, sinks.

        Raises:
            ConfigError: there is none yet.
        """
        import pandas as pd

        parts = sorted((self.folder / "metrics").glob("step_*.parquet"))
        if not parts:
            raise ConfigError(f"'{self.folder}' has no metrics yet.")
        return pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)

    def forget_after(self, step: int) -> None:
        """Drop metrics and checkpoints of later steps than the one training goes on from, and what a kill left half
        written: all of it will be made again."""
        for path in self.folder.rglob(".*.*"):  # as `whole_file` names them
            if path.is_file():
                path.unlink()
        for path in [*(self.folder / "metrics").glob("step_*"), *(self.folder / "checkpoints").glob("step_*")]:
            if int(path.stem[5:]) > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.diverged_file.unlink(missing_ok=True)


def _few(steps: Sequence[int]) -> str:
    return f"{list(steps)}" if len(steps) < 9 else f"{steps[0]}, {steps[1]}, ..., {steps[-1]}"


def flat_settings(config: TrainingConfig) -> dict[str, Any]:
    """Every setting by its dotted name.

    Example:
        >>> flat_settings(TrainingConfig())["task.noise"]
        0.6
    """

    def flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for key, value in values.items():
            leaves |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
        return leaves

    return flat(config.model_dump(mode="json"))

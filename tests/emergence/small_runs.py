"""A training run small enough to be repeated in a test, and what a killed process runs."""

from registerlens.data.synthetic_task import SyntheticTask
from registerlens.emergence.config import ModelShape, TrainingConfig
from registerlens.emergence.training import train

TASK = SyntheticTask(grid=4, patch=4, n_attributes=2, n_classes=4, n_types=2, n_triggers=3, flats=(1, 2))
MODEL = ModelShape(n_layers=2, d_model=16, n_heads=2, d_mlp=24)


def small(**settings):
    """8 updates; a row of the metrics and a checkpoint every 4."""
    short = {"steps": 8, "warm_up": 3, "batch_size": 4, "flat_loss_until": 5, "log_every": 4, "checkpoint_every": 4}
    return TrainingConfig(**{"seed": 1, "task": TASK, "model": MODEL, **short, **settings})


def victim(folder, pipe, steps):
    """Train until killed."""
    pipe.send("started")
    train(small(steps=steps), folder)
    pipe.send("finished")

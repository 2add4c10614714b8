"""What a sweep that is too large to try would take: tasks, traffic, storage, hours and money, from measured rates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from registerlens.display import Shown
from registerlens.errors import ConfigError
from registerlens.sweep.tasks import GROUP

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one worker and one driver do in a second, and how large things are; to be measured, not guessed."""

    forwards: float
    """Images a second through the whole model on one worker, batched as in the sweep."""
    share: float
    """Time of one condition on one image over that of a whole forward pass: 1 without shared prefixes, about 0.54 for
    edits spread evenly over layers; the metrics' time is part of it."""
    decodes: float
    """Images a second that one worker reads, decodes and preprocesses, with all cores that it has for this."""
    image_bytes: float
    """A stored image."""
    model_bytes: float
    """The packed model."""
    row_bytes: float
    """A row of a Parquet part: condition, shard, image and the metrics, compressed."""
    part_seconds: float
    """What the driver needs to receive and write one part, flushed to disk."""


@dataclass(frozen=True, kw_only=True)
class ScalePlan(Shown):
    """A sweep in numbers. Nothing in it is measured but the rates that it was made from."""

    rates: Rates
    """What it rests on."""
    n_images: int
    """Images."""
    n_conditions: int
    """Conditions."""
    n_workers: int
    """Workers, one on each GPU or group of cores."""
    n_groups: int
    """Groups of conditions."""
    n_shards: int
    """Shards of images."""
    n_tasks: int
    """Tasks; as many Parquet parts."""
    n_rows: int
    """Rows of the whole table."""
    part_rows: int
    """Rows of a full part."""
    table_bytes: float
    """The whole table, compressed, on disk and once over the network."""
    image_traffic_kept: float
    """Bytes of images that workers read if each keeps its shard while conditions change."""
    image_traffic_again: float
    """Bytes if every task reads its shard again."""
    model_traffic: float
    """Bytes of model that are sent: once to each node."""
    compute_seconds: float
    """Worker-seconds in the model: conditions, and the clean run of every task."""
    decode_seconds_kept: float
    """Worker-seconds that reading images takes if shards are kept."""
    decode_seconds_again: float
    """The same if every task reads its shard again."""
    task_seconds: float
    """One full task on one worker, reading aside."""
    wall_seconds: float
    """From beginning to end, if nothing but the workers limits, with shards kept."""
    driver_seconds: float
    """What the driver spends on writing; more than `wall_seconds` means that it is the driver that limits."""

    @property
    def seconds(self) -> float:
        """From beginning to end: the workers' or the driver's time, whichever is longer."""
        return max(self.wall_seconds, self.driver_seconds)

    def cost(self, per_worker_hour: float) -> float:
        """Price of all workers for the whole time, in the currency of `per_worker_hour`."""
        return self.n_workers * self.seconds / 3600 * per_worker_hour

    def describe(self) -> str:
        """The plan in lines of text."""
        hour = 3600
        lines = {
            "images x conditions": f"{self.n_images:,} x {self.n_conditions:,} = {self.n_rows:,} rows",
            "tasks": f"{self.n_groups:,} groups x {self.n_shards:,} shards = {self.n_tasks:,} (as many parts)",
            "a full task": f"{self.part_rows:,.0f} rows, {self.task_seconds:,.1f} s",
            "table": f"{size(self.table_bytes)} at {self.rates.row_bytes:.1f} bytes a row",
            "images read": f"{size(self.image_traffic_kept)}; by every task again: {size(self.image_traffic_again)}",
            "model sent": size(self.model_traffic),
            "in the model": f"{self.compute_seconds / hour:,.0f} worker-hours",
            "decoding": f"{self.decode_seconds_kept / hour:,.1f} worker-hours; by every task again: "
            f"{self.decode_seconds_again / hour:,.0f}",
            "workers' time": f"{self.wall_seconds / hour:,.1f} h on {self.n_workers} workers",
            "driver's time": f"{self.driver_seconds / hour:,.1f} h of writing",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    def to_dataframe(self) -> pd.DataFrame:
        """One row a quantity."""
        import pandas as pd  # noqa: PLC0415

        values = asdict(self)
        flat = {f"rates.{name}": value for name, value in values.pop("rates").items()} | values
        return pd.DataFrame({"quantity": list(flat), "value": list(map(float, flat.values()))})


def scale_plan(
    *,
    n_images: int,
    n_conditions: int,
    n_workers: int,
    n_nodes: int,
    rates: Rates,
    shard_size: int = 256,
    group: int = GROUP,
) -> ScalePlan:
    """Plan a sweep.

    One condition on one image takes share / forwards seconds; a task of g conditions on s images takes
    s (g share + 1) / forwards seconds, since its clean run is made once. Reading takes 1 / decodes seconds an image,
    once in all if workers keep their shards (as the Ray backend does where there are at least as many shards as
    workers), or once for each group.

    Args:
        n_images, n_conditions: the sweep.
        n_workers: GPUs, or groups of cores.
        n_nodes: machines; the model is sent once to each.
        rates: measured.
        shard_size: images a shard.
        group: conditions of a task at most.

    Raises:
        ConfigError: a number is not positive.

    Example:
        >>> rates = Rates(forwards=100.0, share=0.5, decodes=200.0, image_bytes=1e5, model_bytes=1e8, row_bytes=20.0,
        ...               part_seconds=0.01)
        >>> plan = scale_plan(n_images=1000, n_conditions=100, n_workers=2, n_nodes=1, rates=rates, group=50)
        >>> plan.n_tasks, plan.compute_seconds, plan.decode_seconds_kept, plan.wall_seconds
        (8, 520.0, 5.0, 262.5)
    """
    numbers = {"n_images": n_images, "n_conditions": n_conditions, "n_workers": n_workers, "n_nodes": n_nodes}
    numbers |= {"shard_size": shard_size, "group": group, **asdict(rates)}
    for name, value in numbers.items():
        if not value > 0:
            raise ConfigError(f"{name} must be positive, got {value}.")
    n_groups, n_shards = -(-n_conditions // group), -(-n_images // shard_size)
    n_rows, n_tasks = n_images * n_conditions, n_groups * n_shards
    clean = n_groups * n_images
    compute = (n_rows * rates.share + clean) / rates.forwards
    decode = n_images / rates.decodes
    images, conditions = min(shard_size, n_images), min(group, n_conditions)
    return ScalePlan(
        rates=rates,
        n_images=n_images,
        n_conditions=n_conditions,
        n_workers=n_workers,
        n_groups=n_groups,
        n_shards=n_shards,
        n_tasks=n_tasks,
        n_rows=n_rows,
        part_rows=images * conditions,
        table_bytes=n_rows * rates.row_bytes,
        image_traffic_kept=n_images * rates.image_bytes,
        image_traffic_again=clean * rates.image_bytes,
        model_traffic=n_nodes * rates.model_bytes,
        compute_seconds=compute,
        decode_seconds_kept=decode,
        decode_seconds_again=decode * n_groups,
        task_seconds=images * (conditions * rates.share + 1) / rates.forwards,
        wall_seconds=(compute + decode) / n_workers,
        driver_seconds=n_tasks * rates.part_seconds,
    )


def size(n_bytes: float) -> str:
    """Bytes in words, in powers of 1000.

    Example:
        >>> size(88e6), size(2.5e12), size(12.0)
        ('88.0 MB', '2.5 TB', '12.0 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"

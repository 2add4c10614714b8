"""Results of sweeps that were never run: planted numbers, whose aggregates are known."""

import numpy as np
import pyarrow as pa

import registerlens as rl
from registerlens.sweep.conditions import Condition
from registerlens.sweep.result import SweepResult


def clean(**where):
    return Condition(**where)


def ablated(layer, neuron, mode="zero", **more):
    """One neuron; its factors, and `more` of them or of where it is run."""
    where = {name: more.pop(name) for name in ("model", "images", "control_of") if name in more}
    factors = {"layer": layer, "neuron": neuron, "mode": mode, **more}
    target = rl.RegisterNeurons.from_pairs([(layer, neuron)])
    return Condition(interventions=(rl.Ablate(target),), factors=factors, **where)


def head(layer, number, **more):
    return Condition(
        interventions=(rl.Ablate(rl.Heads([(layer, number)])),), factors={"layer": layer, "head": number, **more}
    )


def best(k, **more):
    """The first k neurons of a ranking, or a control of such a condition."""
    where = {name: more.pop(name) for name in ("model", "images", "control_of") if name in more}
    target = rl.RegisterNeurons.from_pairs([(0, n) for n in range(k)])
    return Condition(interventions=(rl.Ablate(target),), factors={"k": k, **more}, **where)


def table_of(conditions, values, shard_size=4, names=None):
    """A table as a sweep writes it: shard by shard, in a shard condition by condition.

    `values`: {metric: [condition, image]}.
    """
    metrics = {name: np.asarray(array, dtype=np.float64) for name, array in values.items()}
    n = next(iter(metrics.values())).shape[1]
    names = names or [f"image {i}" for i in range(n)]
    rows = {name: [] for name in ("condition", "shard", "image", *metrics)}
    for start in range(0, n, shard_size):
        for c, condition in enumerate(conditions):
            for i in range(start, min(n, start + shard_size)):
                rows["condition"].append(condition.key)
                rows["shard"].append(start // shard_size)
                rows["image"].append(names[i])
                for metric, array in metrics.items():
                    rows[metric].append(array[c, i])
    types = {"condition": pa.string(), "shard": pa.int32(), "image": pa.string()}
    return pa.table({name: pa.array(one, types.get(name, pa.float64())) for name, one in rows.items()})


def result_of(conditions, values, metrics=None, skipped=(), **how):
    return SweepResult.from_table(table_of(conditions, values, **how), conditions, metrics or list(values), skipped)

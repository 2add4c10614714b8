"""Two-block models of random sizes, and a second implementation of the model, neuron by neuron, in numpy."""

import math

import numpy as np
import torch

from registerlens.theory.two_block import TwoBlockModel

GRID = (1.0, 30.0, 1e3, 1e4)
PHIS = ("gelu", "relu", "quick_gelu", "relu2", "gelu_tanh")


def sized(seed, **options):
    """Everything from a seed: sizes, nonlinearity, weights."""
    rng = np.random.default_rng(seed)
    sizes = {
        "n": int(rng.integers(2, 9)),
        "d_model": int(rng.integers(3, 13)),
        "d_mlp": int(rng.integers(8, 17)),
        "d_out": int(rng.integers(1, 6)),
        "phi": PHIS[seed % len(PHIS)],
        "seed": seed,
    }
    return TwoBlockModel.build(**(sizes | options))


def by_hand(seed):
    """A model whose tensors are all noise: no condition holds, every bound must."""
    generator = torch.Generator().manual_seed(seed)
    n, d, d_mlp, d_out = 1 + seed % 5, 1 + seed % 6, 1 + seed % 7, 1 + seed % 3
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    grows = torch.rand(d_mlp, generator=generator) < 0.3
    grows[0] = True
    return TwoBlockModel(
        tokens=draw(n + 1, d),
        sink=1 + seed % n,
        W_in1=draw(d, d_mlp),
        W_out1=draw(d_mlp, d),
        grows=grows,
        W_in2=draw(d, d_mlp),
        W_out2=draw(d_mlp, d),
        W_head=draw(d, d_out),
        phi=PHIS[seed % len(PHIS)],
    )


def phi_of(name, x):
    """The nonlinearities from their definitions."""
    match name:
        case "relu":
            return max(x, 0.0)
        case "relu2":
            return max(x, 0.0) ** 2
        case "gelu":
            return x * 0.5 * math.erfc(-x / math.sqrt(2))
        case "gelu_tanh":
            return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "quick_gelu":
            return x / (1 + math.exp(-1.702 * x))


class Reference:
    """The model at one register activation, from its weights alone."""

    def __init__(self, model, activation):
        self.phi = lambda x: phi_of(model.phi, float(x))
        self.m = {
            name: getattr(model, name).numpy() for name in ("tokens", "W_in1", "W_out1", "W_in2", "W_out2", "W_head")
        }
        u1, x_s = self.m["W_in1"][:, 0], self.m["tokens"][model.sink]
        u2 = activation / self.phi(np.linalg.norm(u1) * np.linalg.norm(x_s))
        self.rows = self.m["W_out1"].copy()
        self.rows[model.grows.numpy()] *= u2 / np.linalg.norm(self.m["W_out1"][0])

    def block1(self, without_register=False):
        stream = self.m["tokens"].copy()
        for token, x in enumerate(self.m["tokens"]):
            for neuron in range(1 if without_register else 0, len(self.rows)):
                stream[token] += self.phi(x @ self.m["W_in1"][:, neuron]) * self.rows[neuron]
        return stream

    @staticmethod
    def attend(queries, keys):
        pattern = np.empty((len(queries), len(keys)))
        for i, q in enumerate(queries):
            logits = [float(q @ k) / math.sqrt(len(q)) for k in keys]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            pattern[i] = np.array(weights) / math.fsum(weights)
        return pattern

    def output(self, cls):
        after = cls.copy()
        for neuron, row in enumerate(self.m["W_out2"]):
            after += self.phi(cls @ self.m["W_in2"][:, neuron]) * row
        return after @ self.m["W_head"]

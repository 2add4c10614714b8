"""Seeds from numbers: what is drawn for one purpose must not repeat what was drawn for another."""

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits, which is all that torch's generator on the CPU takes; like numbers give unlike seeds.

    Example:
        >>> seed_of(1, 0, 1) != seed_of(1, 1, 0)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def generator_of(*numbers: int) -> torch.Generator:
    """A generator (CPU) of its own for a purpose, which the first number stands for, and a seed.

    Two generators of equal seed draw equal numbers: choices among patches drawn from the plain seed of the images would
    repeat the places of their content.

    Example:
        >>> plain = torch.Generator().manual_seed(0)
        >>> bool((torch.rand(4, generator=generator_of(7, 0)) == torch.rand(4, generator=plain)).any())
        False
    """
    return torch.Generator().manual_seed(seed_of(*numbers))
